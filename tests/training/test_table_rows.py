"""Steps over the looked-up rows of tables equal steps over whole tables, on all kinds of devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from tarq_jax import data
from tarq_jax.models.embedding import rows_among
from tarq_jax.training import failure, optimizers, parallel, setup, sharding, table_rows
from tarq_jax.training.objectives import build

ROWS = 4096  # of the table of items, of which a batch reads 64 or fewer
BY_MODEL, BY_BOTH = (("embedding$", ("model",)),), (("embedding$", (("data", "model"),)),)
# Operations on a table that read or write some of its rows where they are
IN_PLACE = {"parameter", "get-tuple-element", "fusion", "scatter", "dynamic-update-slice"}


def make_optimizer(name, clip=0.0):
    """SGD for the network, as Adam amplifies rounding errors; `name` for tables, with weight decay."""
    table = optax.chain(optimizers.OF_TABLES[name](), optimizers.decay_touched(0.1), optax.scale(-0.02))
    parts = {optimizers.NETWORK: optax.sgd(0.02, momentum=0.9), optimizers.TABLE: table}
    return optimizers.RowWise(*optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        optax.partition(parts, optimizers.labels)))


class Run:
    """A few steps of a configuration with some optimizer of tables."""

    def __init__(self, dataset, name, shape=(1, 1), clip=0.0, row_wise=True, batch_size=8, **settings):
        self.config = tiny.make_config()
        self.config.update_from_flattened_dict(
            {"model.name": "two_tower", "model.table_multiple": ROWS, "codebook.start": 0} | settings)
        self.mesh = sharding.make_mesh(*shape, devices=jax.devices()[:shape[0] * shape[1]])
        self.way = parallel.WAYS[self.config.parallel]
        self.objective = setup.build(
            self.config.model, self.config.loss_weights, dataset.schema,
            sharding.make_tables(self.config, self.mesh), self.way.axis_name)
        optimizer = make_optimizer(name, clip)
        optimizer = optimizer if row_wise else optax.GradientTransformation(*optimizer)
        self.start = setup.init_state(self.config, self.objective, optimizer, dataset, self.mesh)
        batches = data.train_batches(
            dataset, "train", batch_size=batch_size, seed=0, **setup.batch_shapes(dataset))
        self.batches = [self.way.put(next(batches), self.mesh) for _ in range(4)]
        step = setup.compile_step(self.config, self.objective, optimizer, self.mesh, self.start)
        self.lowered = step.lower(self.start, self.batches[0])
        self.step = self.lowered.compile()

    def train(self):
        """The last state, and the metrics of all steps."""
        state, found = jax.tree.map(lambda leaf: leaf.copy(), self.start), []
        for batch in self.batches:
            state, metrics = self.step(state, batch)
            found.append(jax.device_get(metrics))
        return state.replace(rng=0), found


@pytest.fixture(scope="module")
def dense(tiny_dataset):
    """The same steps over whole tables, on one device."""
    return functools.cache(lambda *arguments, **settings: Run(
        tiny_dataset, *arguments, row_wise=False, **settings).train())


close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)


def agree(found, expected):
    """Asserts that state and metrics are the same, but for the norms of tables, and of all parameters."""
    state, metrics = found
    jax.tree.map(close, state, expected[0])
    paths = failure.paths_of(state.trainable)
    network = [not path.endswith("embedding") for path in paths]
    for one, other in zip(metrics, expected[1], strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"parameter_norm", "parameter_norms"}:
            close(one[name], other[name], err_msg=name)
        close(one["parameter_norms"][network], other["parameter_norms"][network])
        large = one["parameter_norms"] < other["parameter_norms"] - 1e-3
        assert [path for path, smaller in zip(paths, large, strict=True) if smaller], "no table by its rows"


def replicas_agree(state):
    """Asserts that devices that hold the same part of an array hold the same bits."""
    for leaf in jax.tree.leaves(state.replace(rng=None)):
        parts = {}
        for shard in getattr(leaf, "addressable_shards", ()):
            parts.setdefault(str(shard.index), set()).add(np.asarray(shard.data).tobytes())
        assert all(len(found) == 1 for found in parts.values())


def operations_on(text, rows):
    """Operations of a compiled program whose result has this many rows."""
    return {match[1] for match in re.finditer(rf" = \w+\[{rows}[,\]]\S* ([\w\-]+)\(", text)}


# One device


@pytest.mark.parametrize(("name", "clip"), [("rowwise_adagrad", 0.0), ("lazy_adam", 0.05)])
def test_equal_to_steps_over_whole_tables(name, clip, tiny_dataset, dense):
    run = Run(tiny_dataset, name, clip=clip)
    found, expected = run.train(), dense(name, clip=clip)
    agree(found, expected)
    assert not clip or min(metrics["gradient_norm"] for metrics in expected[1]) > clip
    assert operations_on(run.step.as_text(), ROWS) <= IN_PLACE  # no copy, no sum
    state, _ = found
    moved = np.any(table_of(state) != table_of(run.start), axis=-1)
    assert 0 < moved.sum() < tiny_dataset.schema.num_items + 1


def table_of(state):
    table, = (leaf for leaf in jax.tree.leaves(state.params) if leaf.shape[:1] == (ROWS,))
    return np.asarray(table)


def test_those_over_whole_tables_do_pass_over_all_rows(tiny_dataset):
    """This shows that the test above can fail."""
    text = Run(tiny_dataset, "rowwise_adagrad", row_wise=False).step.as_text()
    assert operations_on(text, ROWS) - IN_PLACE


SETTINGS = {
    "micro-batches": {"accumulate": 2}, "bfloat16": {"model.dtype": "bfloat16"},
    "tarq": {"model.name": "tarq"},
    "tarq, ema": {"model.name": "tarq", "codebook.learning": "ema", "accumulate": 4, "clip": 0.1},
    "order 1": {"model.name": "tarq", "model.order": 1},
    "target attention": {"model.name": "target_attention", "model.remat": True},
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in SETTINGS if name != "micro-batches"]


@pytest.mark.parametrize("name", ["micro-batches", *SLOW])
def test_settings(name, tiny_dataset, dense):
    settings = SETTINGS[name]
    agree(Run(tiny_dataset, "lazy_adam", **settings).train(), dense("lazy_adam", **settings))


# Several devices


DEVICES = {
    "8x1, not split": ((8, 1), {}),
    "8x1": ((8, 1), {"mesh.rules": BY_MODEL}), "4x2": ((4, 2), {"mesh.rules": BY_MODEL}),
    "2x4": ((2, 4), {"mesh.rules": BY_MODEL}), "1x8": ((1, 8), {"mesh.rules": BY_MODEL}),
    "2x4, all": ((2, 4), {"mesh.rules": BY_BOTH}), "pmap": ((8, 1), {"parallel": "pmap"}),
    "micro-batches": ((2, 2), {"mesh.rules": BY_MODEL, "accumulate": 2}),
    "pmap, micro-batches": ((4, 1), {"parallel": "pmap", "accumulate": 2}),
}
FAST = ("2x4", "pmap")


@pytest.mark.parametrize("optimizer", ["lazy_adam", pytest.param("rowwise_adagrad", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [
    *FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in DEVICES if name not in FAST)])
def test_devices(name, optimizer, tiny_dataset, dense):
    shape, settings = DEVICES[name]
    run = Run(tiny_dataset, optimizer, shape, clip=0.05, **settings)
    found = run.train()
    agree(found, dense(optimizer, clip=0.05))
    replicas_agree(found[0])
    parts = {(): 1, BY_MODEL: shape[1], BY_BOTH: 8}[settings.get("mesh.rules", ())]
    assert operations_on(run.step.as_text(), ROWS // parts) <= IN_PLACE


# What decides


def test_tables_that_a_batch_covers_stay_whole(tiny_dataset, dense):
    """Of 61 rows, 64 are looked up."""
    settings = {"model.table_multiple": 1}
    state, metrics = Run(tiny_dataset, "lazy_adam", **settings).train()
    expected, others = dense("lazy_adam", **settings)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    jax.tree.map(np.testing.assert_array_equal, metrics, others)


def test_micro_batches_that_do_not_divide_leave_tables_whole(tiny_dataset, dense):
    """Four requests over eight devices."""
    run = Run(tiny_dataset, "lazy_adam", (2, 4), **{"mesh.rules": BY_MODEL, "accumulate": 2})
    state, _ = run.train()
    jax.tree.map(close, state, dense("lazy_adam")[0])


@pytest.mark.parametrize(("name", "row_wise"), [
    ("adamw", False), ("lazy_adam", True), ("rowwise_adagrad", True)])
def test_optimizers_of_the_configuration(name, row_wise, tiny_config, tiny_dataset):
    tiny_config.optimizer.table = name
    objective = setup.build(tiny_config.model, tiny_config.loss_weights, tiny_dataset.schema)
    step = setup.make_step(tiny_config, objective, setup.make_optimizer(tiny_config))
    assert (step.keywords["row_wise"] is not None) == row_wise


def test_objectives_that_do_not_tell_their_look_ups_get_whole_tables(tiny_dataset, monkeypatch):
    monkeypatch.setattr(setup, "build", lambda *how: build(*how)._replace(lookups=None))
    text = Run(tiny_dataset, "rowwise_adagrad").step.as_text()
    assert operations_on(text, ROWS) - IN_PLACE


@pytest.mark.parametrize("name", ["two_tower", "tarq"])
def test_look_ups_of_objectives(name, tiny_config, tiny_dataset):
    tiny_config.model.name = name
    objective = setup.build(tiny_config.model, tiny_config.loss_weights, tiny_dataset.schema)
    optimizer = setup.make_optimizer(tiny_config)
    state = setup.init_state(tiny_config, objective, optimizer, tiny_dataset)
    assert set(state.params) == {"params"}  # nothing is recorded on initialisation
    batch = setup.example(tiny_dataset)
    found = objective.lookups(state.params, state.codewords, batch)
    (path, ids), = jax.tree_util.tree_leaves_with_path(found, is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert jax.tree_util.keystr(path[-3:], simple=True, separator="/") == "item_features/item_id/ids"
    expected = [batch.candidates["item_id"], batch.history["item_id"]]
    assert sorted(map(np.shape, ids)) == sorted(map(np.shape, expected))
    assert set(np.concatenate([np.ravel(each) for each in ids])) == set(
        np.concatenate([np.ravel(each) for each in expected]))


def test_a_look_up_that_was_not_found_is_not_a_number():
    """So a loss that looks up more than its `lookups` tell fails at once."""
    known = jnp.array([1, 4, 9, 9])  # the last two are out of range
    rows = rows_among(known, jnp.arange(4.0)[:, None], jnp.array([[4, 0], [7, 1]]))
    np.testing.assert_array_equal(rows[..., 0], [[1.0, np.nan], [np.nan, 0.0]])


def test_a_row_that_is_not_finite_is_found_when_it_is_read(tiny_dataset):
    run = Run(tiny_dataset, "rowwise_adagrad")
    read = int(np.asarray(run.batches[0].candidates["item_id"])[0, 0])
    paths = failure.paths_of(run.start.trainable)

    def poisoned(row):
        state = jax.tree.map(lambda leaf: leaf.copy(), run.start)
        params = jax.tree.map(
            lambda leaf: leaf.at[row].set(np.nan) if leaf.shape[:1] == (ROWS,) else leaf, state.params)
        return jax.device_get(run.step(state.replace(params=params), run.batches[0])[1])

    assert failure.culprit(poisoned(ROWS - 1), paths) is None
    message = failure.culprit(poisoned(read), paths)
    assert "not finite" in message and "parameter of" in message


def test_rows_in_trees_by_their_paths():
    table = np.arange(12.0).reshape(6, 2)
    params = {"params": {"embedding": table}}
    tree = {"mu": params, "count": np.ones(6), "nu": (params,)}
    rows = {"params/embedding": table_rows.Rows(jnp.array([1, 4, 6]), 6, None)}
    taken = table_rows.take(tree, rows)
    np.testing.assert_array_equal(taken["mu"]["params"]["embedding"], [[2, 3], [8, 9], [0, 0]])
    np.testing.assert_array_equal(taken["count"], np.ones(6))
    back = table_rows.put(tree, rows, jax.tree.map(lambda leaf: leaf + 100, taken))
    expected = table + 100 * np.isin(np.arange(6), (1, 4))[:, None]
    np.testing.assert_array_equal(back["nu"][0]["params"]["embedding"], expected)
    np.testing.assert_array_equal(back["count"], np.full(6, 101.0))
