"""Seeds as a batch axis: each seed's run equals that of `loop.train`, and either can resume it."""

import copy
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tarq_jax import metrics, reporting
from tarq_jax.cli import Interrupted
from tarq_jax.training import checkpoint, loop, provenance, seeds, setup
from tarq_jax.training.evaluate import SCORES

pytestmark = pytest.mark.usefixtures("compiled_once", "one_device")

SEEDS = (3, 0)


def folders(root, chosen=SEEDS):
    return {seed: root / str(seed) for seed in chosen}


def with_seed(config, seed):
    config = copy.deepcopy(config)
    config.seed = seed
    return config


def saved_state(workdir, config, dataset):
    """The newest state that a run saved."""
    objective = setup.build(config.model, config.loss_weights, dataset.schema)
    fresh = setup.init_state(config, objective, setup.make_optimizer(config), dataset)
    with checkpoint.manager(workdir) as checkpoints:
        return checkpoint.restore_latest(checkpoints, fresh, config, dataset.schema).state


def newest_meta(workdir):
    with checkpoint.manager(workdir) as checkpoints:
        return checkpoint.newest_meta(checkpoints)


def assert_close(found, expected, rtol=1e-3):
    """Compares states whose arithmetic ran in another order.

    Biases of keys shift all weights of a softmax equally: their gradient is rounding error, which Adam
    amplifies.
    """
    assert jax.random.key_data(found.rng).tolist() == jax.random.key_data(expected.rng).tolist()
    expected, found = (jax.tree_util.tree_leaves_with_path(s.replace(rng=None)) for s in (expected, found))
    assert len(found) == len(expected) > 10
    for (path, leaf), (_, own) in zip(expected, found, strict=True):
        if "'key_projection'" not in jax.tree_util.keystr(path):
            np.testing.assert_allclose(own, leaf, rtol=rtol, atol=1e-5, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def together(tmp_path_factory, tiny_dataset, silent, compiled_once):
    """A run of two seeds on two devices: (folder, rows by seed)."""
    root = tmp_path_factory.mktemp("together")
    config = tiny.make_config()
    config.save_scores = True
    return root, seeds.train(config, tiny_dataset, folders(root), silent)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_ends_as_it_does_on_its_own(
        seed, together, tiny_config, tiny_dataset, tmp_path, silent, untimed):
    root, rows = together
    config = with_seed(tiny_config, seed)
    alone = loop.train(config, tiny_dataset, tmp_path, silent)
    assert_close(saved_state(root / str(seed), config, tiny_dataset), alone.state)
    for row, expected in zip(*map(untimed, (rows[seed], alone.rows)), strict=True):
        assert row.pop("model") == expected.pop("model")
        assert row == pytest.approx(expected, rel=1e-3)
    lines = map(reporting.read_metrics, (root / str(seed), tmp_path))
    for found, expected in zip(*lines, strict=True):
        assert found["step"] == expected["step"]
        for name in ("loss", "gradient_norm", "test/tarq/log_loss"):
            assert (name in found) == (name in expected)
            if name in expected:
                assert found[name] == pytest.approx(expected[name], rel=1e-3)


def test_every_seed_is_a_run_of_its_own(together):
    root, rows = together
    assert list(rows) == list(SEEDS)
    assert len({row[0]["log_loss"] for row in rows.values()}) == len(SEEDS)
    for seed, workdir in folders(root).items():
        assert json.loads((workdir / "results.json").read_text()) == rows[seed]
        meta = newest_meta(workdir)
        assert meta["config"]["seed"] == seed
        entry, = provenance.read(workdir)
        assert entry["config"]["seed"] == seed


def test_every_seed_has_its_share_of_the_time(together):
    """Steps 2 and 6 are counted, each of 8 requests of 3 candidates: the others follow a pause."""
    root, rows = together
    for seed, workdir in folders(root).items():
        candidates, seconds, _ = newest_meta(workdir)["counted"]
        assert candidates == 2 * 8 * 3
        for row in rows[seed]:
            assert row["train_seconds"] == pytest.approx(seconds)
            assert row["examples_per_second"] == pytest.approx(candidates / seconds)
    assert len({row[0]["train_seconds"] for row in rows.values()}) == 1


def test_scores_are_those_that_rows_were_made_of(together, tiny_dataset):
    root, rows = together
    split = tiny_dataset.splits["test"]
    users = np.repeat(split.user, np.diff(split.candidate_offsets))
    for seed, workdir in folders(root).items():
        with np.load(workdir / SCORES) as scores:
            np.testing.assert_array_equal(scores["users"], users)
            for row in rows[seed]:
                labels, found, weights = scores["labels"], scores[row["model"]], scores["weights"]
                assert metrics.auc(labels, found, weights) == pytest.approx(row["auc"], abs=1e-12)
                grouped = metrics.grouped_auc(labels, found, users, weights).value
                assert grouped == pytest.approx(row["gauc"], abs=1e-12)


def test_devices_share_seeds(together):
    del together
    assert seeds.make_mesh(4).size == 4
    assert seeds.make_mesh(7, jax.devices()[:4]).size == 1
    assert seeds.make_mesh(6, jax.devices()[:4]).size == 3


def parts_of(config, dataset):
    """Objective and optimizer, states of seeds 0 to 3, and one batch per seed."""
    objective = setup.build(config.model, config.loss_weights, dataset.schema)
    optimizer = setup.make_optimizer(config)
    init = jax.vmap(setup.initialiser(config, objective, optimizer), in_axes=(0, None),
                    out_axes=seeds.STACKED)
    batch = setup.example(dataset)
    batches = jax.tree.map(lambda leaf: np.stack([np.roll(leaf, seed, axis=0) for seed in range(4)]), batch)
    return objective, optimizer, lambda: init(jax.random.split(jax.random.key(0), 4), batch), batches


def test_the_step_has_no_collective(tiny_config, tiny_dataset):
    """Devices exchange nothing, and periodic work is a branch, not a selection."""
    objective, optimizer, init, batches = parts_of(tiny_config, tiny_dataset)
    state = jax.eval_shape(init)
    compiled = seeds.compile_step(tiny_config, objective, optimizer, seeds.make_mesh(4))
    together = jax.jit(seeds.over_seeds(setup.make_step(tiny_config, objective, optimizer), in_turn=False))
    for step in (compiled, together):
        text = step.lower(state, batches).as_text()
        assert "stablehlo.case" in text
        for collective in ("all_reduce", "all_gather", "all_to_all", "collective_permute", "reduce_scatter"):
            assert collective not in text


@pytest.mark.parametrize(("model", "table"), [
    ("two_tower", "lazy_adam"), pytest.param("two_tower", "adamw", marks=pytest.mark.slow),
    pytest.param("tarq", "adamw", marks=pytest.mark.slow)])
def test_in_turn_or_together_it_is_each_seeds_own_step(model, table, tiny_config, tiny_dataset):
    tiny_config.model.name, tiny_config.codebook.start, tiny_config.optimizer.table = model, 0, table
    objective, optimizer, init, batches = parts_of(tiny_config, tiny_dataset)
    states, step = jax.jit(init)(), setup.make_step(tiny_config, objective, optimizer)
    own = jax.tree.map(lambda leaf: leaf[2], states.replace(step=None)).replace(step=states.step)
    expected, scalars = jax.jit(step)(own, jax.tree.map(lambda leaf: leaf[2], batches))
    for in_turn in (True, False):
        found, metrics = jax.jit(seeds.over_seeds(step, in_turn))(states, batches)
        assert metrics["loss"].shape == (4,)
        assert float(metrics["loss"][2]) == pytest.approx(float(scalars["loss"]), rel=1e-5)
        for leaf, other in zip(jax.tree.leaves(seeds.unstack(found)[2].replace(rng=None)),
                               jax.tree.leaves(expected.replace(rng=None)), strict=True):
            np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-5)


def test_stacking_is_undone_by_unstacking(together, tiny_config, tiny_dataset, same_bits):
    root, _ = together
    states = [saved_state(folder, with_seed(tiny_config, seed), tiny_dataset)
              for seed, folder in folders(root).items()]
    stacked = seeds.stack_states(states, seeds.make_mesh(2))
    assert {leaf.shape[0] for leaf in jax.tree.leaves(stacked.replace(step=None))} == {2}
    for found, expected in zip(seeds.unstack(stacked), states, strict=True):
        same_bits(found, expected)


def test_an_interrupted_run_goes_on_to_the_same_bits(
        together, tiny_config, tiny_dataset, tmp_path, silent, send, same_bits):
    workdirs = folders(tmp_path)
    with send(signal.SIGTERM, 4), pytest.raises(Interrupted, match="saved step 4 of 2 seeds"):
        seeds.train(tiny_config, tiny_dataset, workdirs, silent)
    seeds.train(tiny_config, tiny_dataset, workdirs, silent)
    for seed, workdir in workdirs.items():
        config = with_seed(tiny_config, seed)
        same_bits(saved_state(workdir, config, tiny_dataset),
                  saved_state(together[0] / str(seed), config, tiny_dataset))


@pytest.mark.parametrize(("split", "message"), [
    ("validation", "saved step 3 of 2 seeds"), ("test", "interrupted")])
def test_a_signal_within_an_evaluation_loses_no_step(
        split, message, tiny_config, tiny_dataset, tmp_path, silent, monkeypatch):
    """Steps are saved before the run ends, at the latest when the evaluation stops."""
    tiny_config.model.name, tiny_config.eval_every, tiny_config.checkpoint_every = "two_tower", 3, 100
    test, signals = loop.evaluate_split, []

    def signalled(*arguments, **options):
        if arguments[4] == split and not signals:
            signals.append(os.kill(os.getpid(), signal.SIGTERM))
        return test(*arguments, **options)

    monkeypatch.setattr(loop, "evaluate_split", signalled)
    with pytest.raises(Interrupted, match=message):
        seeds.train(tiny_config, tiny_dataset, folders(tmp_path), silent)
    steps = {int(path.name) for path in (tmp_path / "0" / "checkpoints").iterdir() if path.name.isdecimal()}
    assert max(steps) == (3 if split == "validation" else tiny_config.steps)


@pytest.mark.slow
def test_seeds_at_different_steps_go_on_apart(together, tiny_config, tiny_dataset, tmp_path, silent, send):
    """One seed was started alone, the other is finished."""
    with send(signal.SIGTERM, 2), pytest.raises(Interrupted):
        loop.train(with_seed(tiny_config, 3), tiny_dataset, tmp_path / "3", silent)
    rows = loop.train(with_seed(tiny_config, 0), tiny_dataset, tmp_path / "0", silent).rows
    found = seeds.train(tiny_config, tiny_dataset, folders(tmp_path), silent)
    assert list(found) == list(SEEDS)
    assert found[0][0]["log_loss"] == rows[0]["log_loss"]
    for seed in SEEDS:
        assert found[seed][0]["log_loss"] == pytest.approx(together[1][seed][0]["log_loss"], rel=1e-3)


def test_models_without_a_codebook(tiny_config, tiny_dataset, tmp_path, silent):
    tiny_config.model.name = "two_tower"
    tiny_config.eval_every = 3
    rows = seeds.train(tiny_config, tiny_dataset, folders(tmp_path, (1, 0)), silent)
    assert [row["model"] for found in rows.values() for row in found] == ["two_tower"] * 2
    lines = reporting.read_metrics(tmp_path / "1")
    assert [line["step"] for line in lines if "validation/two_tower/auc" in line] == [3, 6]


@pytest.mark.slow
def test_tables_are_rounded_up_as_in_the_loop(tiny_config, tiny_dataset, tmp_path, silent):
    """So that either can resume what the other saved."""
    tiny_config.model.name, tiny_config.model.table_multiple = "two_tower", 64
    rows = seeds.train(tiny_config, tiny_dataset, folders(tmp_path, (1,)), silent)
    again = loop.train(with_seed(tiny_config, 1), tiny_dataset, tmp_path / "1", silent).rows
    assert again[0]["log_loss"] == pytest.approx(rows[1][0]["log_loss"], rel=1e-6)


def test_a_failing_seed_is_named(tiny_config, tiny_dataset, tmp_path, silent, monkeypatch):
    make = setup.initialiser

    def poisoned(*arguments):
        def init(rng, batch):
            state = make(*arguments)(rng, batch)
            chosen = jnp.all(jax.random.key_data(rng) == jax.random.key_data(jax.random.key(0)))
            factor = jnp.where(chosen, jnp.nan, 1)
            return state.replace(params=jax.tree.map(lambda leaf: leaf * factor, state.params))
        return init

    monkeypatch.setattr(setup, "initialiser", poisoned)
    with pytest.raises(FloatingPointError, match=r"seed 0, step 1: .*not finite.*checkpoints before it"):
        seeds.train(tiny_config, tiny_dataset, folders(tmp_path), silent)
    assert not list(tmp_path.glob("*/checkpoints/[0-9]*"))


@pytest.mark.parametrize(("name", "value"), [
    ("best_metric", "auc"), ("mesh.rules", (("embedding$", ("model",)),)), ("data.buckets", (2,)),
    ("parallel", "pmap")])
def test_what_seeds_cannot_have(name, value, tiny_config, tiny_dataset, tmp_path, silent):
    tiny_config.update_from_flattened_dict({name: value})
    with pytest.raises(ValueError, match=rf"config.{name} is .*expected .* where seeds are trained together"):
        seeds.train(tiny_config, tiny_dataset, folders(tmp_path), silent)
