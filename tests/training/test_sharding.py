"""Meshes, rules and state that is created sharded: one device or eight give the same numbers and bits.

The long comparison, 50 steps on every shape of mesh and under pmap, takes minutes: `pytest -m slow`.
"""

import functools

import jax
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from tarq_jax import data
from tarq_jax.training import hlo, loop, parallel, setup, sharding

BY_MODEL = (("embedding$", ("model",)),)
BY_BOTH = (("item_id/embedding$", (("data", "model"),)),)


class Run:
    """Some steps of a configuration on given devices, k-means included."""

    def __init__(self, dataset, shape=(0, 1), devices=None, optimizer=None, **settings):
        self.config, self.dataset = tiny.make_config(), dataset
        self.config.update_from_flattened_dict({"model.table_multiple": 64} | settings)
        self.mesh = sharding.make_mesh(*shape, devices=devices)
        self.way = parallel.WAYS[self.config.parallel]
        self.objective = setup.build(
            self.config.model, self.config.loss_weights, dataset.schema,
            sharding.make_tables(self.config, self.mesh), self.way.axis_name)
        optimizer = setup.make_optimizer(self.config) if optimizer is None else optimizer
        self.start = setup.init_state(self.config, self.objective, optimizer, dataset, self.mesh)
        self.step = setup.compile_step(self.config, self.objective, optimizer, self.mesh, self.start)

    def batches(self):
        """Batches in the form that the step takes."""
        shapes = setup.batch_shapes(self.dataset)
        for batch in data.train_batches(self.dataset, "train", batch_size=8, seed=0, **shapes):
            yield self.way.put(batch, self.mesh)

    def text(self):
        """The compiled step's HLO, and its memory analysis."""
        compiled = self.step.lower(self.start, next(self.batches())).compile()
        return compiled.as_text(), compiled.memory_analysis()

    def train(self, steps, on_start=lambda state: None):
        """The last state, and (codebook, metrics) of every step; `on_start` gets the state after k-means."""
        state, history = jax.tree.map(lambda leaf: leaf.copy(), self.start), []
        for number, batch in zip(range(steps), self.batches(), strict=False):
            if number == self.config.codebook.start:
                shapes = setup.batch_shapes(self.dataset)
                state = setup.initialise_codebook(
                    self.config, self.objective, state, self.dataset, shapes, self.mesh)
                on_start(jax.device_get(state.replace(rng=None)))
            state, metrics = self.step(state, batch)
            history.append(jax.device_get((state.codebook, metrics)))
        return state, history


close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def agree(history, expected):
    """Asserts that two runs agree: metrics and codebooks of all steps.

    This excludes norms of parameters whose gradient is only rounding error (biases of keys), which Adam
    amplifies.
    """
    moved = np.max([metrics["gradient_norms"] for _, metrics in expected], axis=0) > 1e-6
    assert moved.mean() > 0.8
    for step, ((book, metrics), (other, wanted)) in enumerate(zip(history, expected, strict=True)):
        for name, value in wanted.items():
            kept = moved if name == "parameter_norms" else ...
            close(metrics[name][kept], value[kept], err_msg=f"{name}, {step}")
        jax.tree.map(close, book, other)


def replicas_agree(tree, devices=8):
    """Asserts that devices that hold the same part of an array hold the same bits."""
    leaves = [jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
              for leaf in jax.tree.leaves(tree)]
    assert len(leaves) > 20
    copies = 0
    for leaf in leaves:
        parts = {}
        for shard in leaf.addressable_shards:
            parts.setdefault(str(shard.index), []).append(np.asarray(shard.data).tobytes())
        assert sum(map(len, parts.values())) == devices
        assert all(len(set(found)) == 1 for found in parts.values())
        copies += any(len(found) > 1 for found in parts.values())
    assert copies > 20


# Mesh by mesh


SGD = {"optimizer": optax.sgd(0.02, momentum=0.9)}  # Adam amplifies rounding errors of zero gradients


@pytest.fixture(scope="module")
def on_one(tiny_dataset):
    return Run(tiny_dataset, devices=jax.devices()[:1], **SGD).train(8)


@pytest.fixture(scope="module")
def on_eight(tiny_dataset):
    assert len(jax.devices()) == 8
    return Run(tiny_dataset, (4, 2), **SGD, **{"mesh.rules": BY_MODEL}).train(8)


def test_one_device_and_eight_agree(on_one, on_eight):
    agree(on_eight[1], on_one[1])
    jax.tree.map(close, on_eight[0].replace(rng=0), on_one[0].replace(rng=0))


def test_replicas_hold_the_same_bits(on_eight):
    replicas_agree(on_eight[0])
    table = on_eight[0].params["params"]["teacher"]["backbone"]["item_features"]["item_id"]["embedding"]
    assert {shard.data.shape for shard in table.addressable_shards} == {(32, 4)} and table.shape == (64, 4)


def test_those_steps_used_and_revived_the_codebook(on_one, on_eight, tiny_dataset):
    """Otherwise the two tests above would prove little."""
    books = [book for book, _ in on_eight[1]]
    np.testing.assert_array_equal(books[0].codewords, books[2].codewords)  # not in use yet
    never, fitted = Run(tiny_dataset, devices=jax.devices()[:1], **SGD, **{"codebook.revive_every": 0}), []
    history = never.train(4, fitted.append)[1]
    assert tiny.moved(fitted[0].codebook, books[2]).all()  # k-means
    for (_, metrics), (_, expected) in zip(history, on_one[1][:4], strict=True):
        close(metrics["loss"], expected["loss"])
    revived = tiny.moved(books[3], history[3][0])
    assert revived.any() and not revived.all()  # the dead ones




@pytest.fixture(scope="module")
def fifty_on_one(tiny_dataset):
    return Run(tiny_dataset, devices=jax.devices()[:1]).train(50)


WAYS = {
    "8x1": ((8, 1), {"mesh.rules": BY_MODEL}), "4x2": ((4, 2), {"mesh.rules": BY_MODEL}),
    "2x4": ((2, 4), {"mesh.rules": BY_BOTH}), "1x8": ((1, 8), {"mesh.rules": BY_MODEL}),
    "pmap": ((8, 1), {"parallel": "pmap"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_fifty_steps_go_the_same_way(name, tiny_dataset, fifty_on_one):
    """AdamW, k-means in step 4, revival every second step."""
    shape, settings = WAYS[name]
    found = Run(tiny_dataset, shape, **settings).train(50)
    agree(found[1], fifty_on_one[1])
    replicas_agree(found[0])
    losses = [metrics["loss"] for _, metrics in found[1]]
    assert losses[0] != losses[1] and losses[3] > 2 * losses[2]  # the student's losses have been added


# What moves between devices


LARGE = {"model.name": "two_tower", "model.table_multiple": 4096}  # rows, of which a batch reads 64


@pytest.mark.parametrize(("shape", "rules"), [
    ((8, 1), BY_MODEL), ((2, 4), BY_MODEL), ((2, 4), BY_BOTH), ((1, 8), BY_MODEL)], ids=str)
def test_no_table_moves(shape, rules, tiny_dataset):
    text, memory = Run(tiny_dataset, shape, **LARGE, **{"mesh.rules": rules}).text()
    found = hlo.collectives(text)
    table = 4096 * 4 * 4  # bytes
    assert found and max(array.num_bytes for each in found for array in each.arrays) < table / 64
    parts = 8 if rules is BY_BOTH else shape[1]
    assert memory.argument_size_in_bytes < 3 * table / parts + table / 8  # table, two moments, the rest


@pytest.mark.slow
def test_no_table_of_tarq_moves(tiny_dataset):
    found = hlo.collectives(Run(tiny_dataset, (2, 4), **{
        "model.table_multiple": 4096, "mesh.rules": BY_MODEL}).text()[0])
    assert found and max(array.num_bytes for each in found for array in each.arrays) < 4096 * 4 * 4 / 64


def test_without_rules_the_gradient_of_a_table_does_move(tiny_dataset):
    """This shows that the tests above can fail."""
    found = hlo.collectives(Run(tiny_dataset, (8, 1), **LARGE).text()[0])
    assert max(array.num_bytes for each in found for array in each.arrays) == 4096 * 4 * 4


# State and rules


@pytest.mark.parametrize("name", ["adamw", "rowwise_adagrad", "lazy_adam"])
def test_state_is_made_in_its_parts(name, tiny_dataset):
    """Tables and their optimizer state are created sharded, with the numbers of one device."""
    settings = LARGE | {"optimizer.table": name}
    split = Run(tiny_dataset, (2, 4), **settings, **{"mesh.rules": BY_MODEL}).start
    whole = Run(tiny_dataset, devices=jax.devices()[:1], **settings).start
    jax.tree.map(np.testing.assert_array_equal, split.replace(rng=0), whole.replace(rng=0))
    tables = [leaf for leaf in jax.tree.leaves(split) if leaf.shape[:1] == (4096,)]
    assert len(tables) == {"adamw": 3, "rowwise_adagrad": 2, "lazy_adam": 4}[name]
    for leaf in tables:
        assert {shard.data.shape for shard in leaf.addressable_shards} == {(1024, *leaf.shape[1:])}
    replicas_agree(split)


TOWER = {"tower": {"kernel": np.zeros((4, 6))}}
STATE = {
    "params": {"params": {"item_id": {"embedding": np.zeros((64, 4))}, **TOWER}},
    "opt_state": {"mu": {"params": {"params": TOWER}}, "count": np.zeros(())},
    "codebook": np.zeros((2, 8, 4)),
}


def specs(*rules, shape=(4, 2)):
    mesh = sharding.make_mesh(*shape)
    found = sharding.state_shardings(STATE, mesh, sharding.parse_rules(rules))
    return jax.tree.map(lambda leaf: leaf.spec, found)


def test_the_first_rule_that_matches_holds():
    found = specs(("kernel$", (None, "model")), ("tower", ("data",)), ("item_id", (("data", "model"),)))
    assert found == {
        "params": {"params": {"item_id": {"embedding": P(("data", "model"))},
                              "tower": {"kernel": P(None, "model")}}},
        "opt_state": {"mu": {"params": {"params": {"tower": {"kernel": P(None, "model")}}}}, "count": P()},
        "codebook": P(),
    }
    assert set(jax.tree.leaves(specs(), is_leaf=lambda leaf: isinstance(leaf, P))) == {P()}


@pytest.mark.parametrize(("rule", "message"), [
    (("kernle", ("model",)), r"'kernle' matches no parameter, expected a part of one of 2 .*'params/item"),
    (("codebook", ("model",)), "'codebook' matches no parameter"),
    (("kernel", ("data", None, None)), r"params/tower/kernel \[4, 6\] is .*, expected at most 2 axes"),
    (("kernel", (None, "data")), r"params/tower/kernel \[4, 6\] .*, expected a multiple of 4 instead of 6$"),
    (("embedding", (None, "model")), r"params/item_id/embedding .*, expected at most 1 axis, its rows"),
])
def test_rules_that_do_not_fit(rule, message):
    with pytest.raises(ValueError, match=rf"config.mesh.rules: {message}"):
        specs(rule)


@pytest.mark.parametrize(("rules", "rows"), [(BY_MODEL, 64), (BY_BOTH, 64), ((), 61)])
def test_rows_are_padded_for_the_devices_of_a_table(rules, rows, tiny_dataset):
    run = Run(tiny_dataset, (2, 4), **{
        "model.name": "two_tower", "model.table_multiple": 1, "mesh.rules": rules})
    table = np.asarray(run.start.params["params"]["item_features"]["item_id"]["embedding"])
    assert table.shape == (rows, 4) and table[60].all() and not table[61:].any()


@pytest.mark.parametrize(("shape", "expected"), [
    ((0, 1), (8, 1)), ((0, 2), (4, 2)), ((2, 4), (2, 4)), ((0, 8), (1, 8))])
def test_meshes(shape, expected):
    mesh = sharding.make_mesh(*shape)
    assert tuple(mesh.shape.items()) == (("data", expected[0]), ("model", expected[1]))


@pytest.mark.parametrize(("shape", "message"), [
    ((0, 3), "config.mesh.model is 3, expected a divisor of the 8 devices"),
    ((3, 2), "config.mesh.data is 3, expected 4: 8 devices, 2 along config.mesh.model")])
def test_meshes_that_do_not_fit(shape, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(*shape)


# Batches


@pytest.mark.parametrize("batch_size", [4, 12, 7])
def test_batch_size_that_does_not_divide(batch_size, tiny_config, tiny_dataset, tmp_path, silent):
    tiny_config.batch_size = batch_size
    with pytest.raises(ValueError, match=rf"config.batch_size is {batch_size}, expected .* the 8 "):
        loop.train(tiny_config, tiny_dataset, tmp_path / "run", silent)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_batch_size_that_divides(devices):
    sharding.check_batch_size(16, sharding.make_mesh(devices=jax.devices()[:devices]))


@pytest.mark.parametrize("way", parallel.WAYS)
def test_batches_are_split_by_request(way, tiny_dataset):
    mesh = sharding.make_mesh(2, 4)
    batch = next(data.train_batches(
        tiny_dataset, "train", batch_size=16, seed=0, **setup.batch_shapes(tiny_dataset)))
    order = {"mesh": np.arange(16).reshape(8, 2), "pmap": np.arange(16).reshape(2, 8).T}[way]
    for found, expected in zip(jax.tree.leaves(parallel.WAYS[way].put(batch, mesh)), jax.tree.leaves(batch),
                               strict=True):
        for number, shard in enumerate(found.addressable_shards):
            rows = np.reshape(shard.data, (2, *expected.shape[1:]))
            np.testing.assert_array_equal(rows, expected[order[number]])


@pytest.mark.parametrize(("batch_size", "rows"), [(16, 2), (12, 12)])
def test_evaluation_is_split_where_the_batch_divides(batch_size, rows, tiny_dataset):
    mesh = sharding.make_mesh(2, 4)
    batch = next(data.eval_batches(
        tiny_dataset, "test", batch_size=batch_size, **setup.batch_shapes(tiny_dataset)))
    leaves = map(jax.tree.leaves, (sharding.split_evaluation(batch, mesh), batch))
    for found, expected in zip(*leaves, strict=True):
        assert {shard.data.shape[0] for shard in found.addressable_shards} == {rows}
        np.testing.assert_array_equal(found, expected)
