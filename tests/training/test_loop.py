"""The loop: what it writes, what it refuses, and that it never saves a broken state."""

import dataclasses
import io
import json
import math
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from tarq_jax import data, metrics, reporting
from tarq_jax.training import checkpoint, loop, setup, sharding
from tarq_jax.training.evaluate import SCORES

pytestmark = pytest.mark.usefixtures("compiled_once")


def test_what_a_run_leaves(finished):
    workdir, result = finished
    assert [row["model"] for row in result.rows] == ["tarq", "tarq_teacher"]
    assert json.loads((workdir / "results.json").read_text()) == [dict(row) for row in result.rows]
    lines = reporting.read_metrics(workdir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 6]
    for line in lines[:-1]:
        assert {"loss", "loss/student", "loss/alignment", "gradient_norm", "parameter_norm",
                "examples_per_second", "input_wait_share"} <= line.keys()
    assert lines[-1]["test/tarq/auc"] == result.rows[0]["auc"]
    assert list((workdir / "tensorboard").glob("events.out.tfevents.*"))
    leaves = jax.tree.leaves(result.state.trainable)
    assert {row["parameters"] for row in result.rows} == {sum(leaf.size for leaf in leaves)}
    assert all(row["train_seconds"] > 0 and row["examples_per_second"] > 0 for row in result.rows)


@pytest.mark.parametrize("settings", [
    {"parallel": "pmap"}, {"mesh.model": 4, "mesh.rules": (("embedding$", (("data", "model"),)),)},
], ids=["pmap", "mesh"])
@pytest.mark.slow  # steps: test_sharding.py, test_table_rows.py and test_step.py
def test_other_ways_to_use_the_devices_end_the_same(
        settings, finished, tiny_config, tiny_dataset, tmp_path, silent):
    """From data to table, compared with a run that replicated its state on all eight devices."""
    left_out = {"examples_per_second", "input_wait_share"}
    tiny_config.update_from_flattened_dict(settings)
    result = loop.train(tiny_config, tiny_dataset, tmp_path, silent)
    lines = (reporting.read_metrics(workdir)[:-1] for workdir in (tmp_path, finished[0]))
    for found, expected in zip(*lines, strict=True):
        for name in expected.keys() - left_out:
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), (found["step"], name)
    for row, expected in zip(result.rows, finished[1].rows, strict=True):
        assert row["log_loss"] == pytest.approx(expected["log_loss"], rel=1e-4)


@pytest.mark.parametrize(("same", "processes", "says"), [
    (False, 2, True), (True, 2, False), (False, None, False)])
def test_another_order_of_the_data_is_said(
        same, processes, says, tiny_config, tiny_dataset, tmp_path, finished, monkeypatch):
    """Where the number of processes that saved is known, see `same_order`."""
    asked = []
    monkeypatch.setattr(loop, "same_order", lambda *args, **shapes: asked.append(args) or same)
    shutil.copytree(finished[0], tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "6" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    assert meta["processes"] == 1
    path.write_text(json.dumps(meta | {"processes": processes}))
    console = Console(file=io.StringIO(), width=1000)
    loop.train(tiny_config, tiny_dataset, tmp_path / "run", console)
    assert asked == ([(tiny_dataset, "train", (2, 1))] if processes else [])
    assert ("saved by 2 processes, this run has 1. That changes the order" in console.file.getvalue()) == says


def test_a_run_that_goes_on_for_longer_says_so(tiny_config, tiny_dataset, tmp_path, finished):
    shutil.copytree(finished[0], tmp_path / "run")
    console = Console(file=io.StringIO(), width=1000)
    before, tiny_config.steps = tiny_config.steps, tiny_config.steps + 1
    loop.train(tiny_config, tiny_dataset, tmp_path / "run", console)
    said = console.file.getvalue()
    assert f"saved with config.steps={before}, this run has {before + 1}. The result differs from" in said


def test_the_student_rests_until_the_codebook_starts(finished):
    """Also in the loop: until step 3 the loss contains only the teacher's and the decoder's loss."""
    lines = reporting.read_metrics(finished[0])
    early, late = lines[:3], lines[3:6]
    for line in early:
        assert line["loss"] == pytest.approx(line["loss/teacher"] + line["loss/reconstruction"], rel=1e-5)
    for line in late:
        assert line["loss"] > line["loss/teacher"] + line["loss/reconstruction"] + line["loss/student"]


def test_scores_are_those_of_the_saved_state(finished, tiny_config, tiny_dataset):
    rows = loop.evaluate_split(
        tiny_config, setup.build(tiny_config.model, tiny_config.loss_weights, tiny_dataset.schema),
        finished[1].state, tiny_dataset, "test")
    for row, expected in zip(rows, finished[1].rows, strict=True):  # that run was on eight devices
        assert row.pop("model") == expected["model"]
        assert row == pytest.approx({name: expected[name] for name in row}, rel=1e-5)


def test_evaluation_on_the_way(tiny_config, tiny_dataset, tmp_path, silent, finished, same_bits):
    tiny_config.eval_every = 4
    result = loop.train(tiny_config, tiny_dataset, tmp_path, silent)
    validated = [line["step"] for line in reporting.read_metrics(tmp_path) if "validation/tarq/auc" in line]
    assert validated == [4]
    same_bits(result.state, finished[1].state)


def test_the_scores_of_the_test_are_saved_if_asked_for(
        finished, tiny_config, tiny_dataset, tmp_path, silent):
    """The run is finished, so that only its test is repeated."""
    assert not (finished[0] / SCORES).exists()
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    tiny_config.save_scores = True
    rows = loop.train(tiny_config, tiny_dataset, tmp_path, silent).rows
    with np.load(tmp_path / SCORES) as scores:
        for row in rows:
            found = metrics.auc(scores["labels"], scores[row["model"]], scores["weights"])
            assert found == row["auc"] and len(scores["users"]) == 72


def test_batches_come_from_the_buckets(tiny_config, short_histories, tmp_path, silent, monkeypatch):
    compiled, shapes = setup.compile_step, []

    def watched_step(*arguments):
        step = compiled(*arguments)

        def take_step(state, batch):
            shapes.append(batch.history_mask.shape)
            return step(state, batch)
        return take_step

    monkeypatch.setattr(setup, "compile_step", watched_step)
    tiny_config.model.name, tiny_config.data.buckets = "two_tower", (2,)
    loop.train(tiny_config, short_histories, tmp_path, silent)
    assert len(shapes) == tiny_config.steps and set(shapes) == {(8, 2), (8, 5)}


@pytest.mark.parametrize("where", ["parameters", "codebook"])
def test_nothing_that_is_not_finite_is_saved(
        where, tiny_config, tiny_dataset, tmp_path, silent, finished, monkeypatch):
    """It is found when a checkpoint is due, here at every second step."""
    tiny_config.log_every = 6
    make = setup.initialise_codebook

    def poisoned_state(*args):
        state = make(*args)
        if where == "parameters":
            return state.replace(params=jax.tree.map(lambda x: x * jnp.inf, state.params))
        broken = state.codebook.replace(codewords=state.codebook.codewords * jnp.nan)
        return state.replace(codebook=broken)

    monkeypatch.setattr(setup, "initialise_codebook", poisoned_state)
    with pytest.raises(FloatingPointError) as caught:  # the codebook is initialised after step 3
        loop.train(tiny_config, tiny_dataset, tmp_path, silent)
    assert str(caught.value).startswith("step 4: ") and "'loss': nan" in str(caught.value)
    with checkpoint.manager(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 2
        restored = checkpoint.restore_latest(checkpoints, finished[1].state, tiny_config, tiny_dataset.schema)
    values = [leaf for leaf in jax.tree.leaves(restored.state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert len(values) > 50 and all(np.isfinite(value).all() for value in values)
    assert not (tmp_path / "results.json").exists()
    assert all(math.isfinite(line["loss"]) for line in reporting.read_metrics(tmp_path))


def test_a_state_that_breaks_in_its_last_step_is_not_saved(
        tiny_config, tiny_dataset, tmp_path, silent, monkeypatch):
    """The loss of a step is computed from the state before it, so it is still finite."""
    compiled = setup.compile_step

    def breaking_step(*args):
        def step(state, batch):
            state, step_metrics = compiled(*args)(state, batch)
            if int(state.step) == 2:
                assert np.isfinite(step_metrics["loss"])
                step_metrics = step_metrics | {"parameter_norm": jnp.asarray(jnp.inf)}
            return state, step_metrics
        return step

    monkeypatch.setattr(setup, "compile_step", breaking_step)
    with pytest.raises(FloatingPointError, match=r"step 2: \{'parameter_norm': inf\}"):
        loop.train(tiny_config, tiny_dataset, tmp_path, silent)
    with checkpoint.manager(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None


def test_run_trains_baselines_and_tells_the_gap(tiny_config, tiny_dataset, tmp_path, monkeypatch, capsys):
    """Training is replaced; the test is about order, folders and the table."""
    tiny_config.baselines = ("two_tower", "target_attention")
    aucs = {"two_tower": 0.6, "target_attention": 0.8, "tarq": 0.75}
    calls = []

    def train(config, dataset, workdir, console, resume):
        assert resume
        calls.append((config.model.name, os.path.relpath(workdir, tmp_path)))
        assert dataset is tiny_dataset
        return loop.Result([{"model": config.model.name, "auc": aucs[config.model.name]}], None)

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(loop, "load_data", lambda config: tiny_dataset)
    rows = loop.run(tiny_config, tmp_path)
    assert calls == [("two_tower", "baselines/two_tower"), ("target_attention", "baselines/target_attention"),
                     ("tarq", ".")]
    assert [row["gap_recovered"] for row in rows] == pytest.approx([0.0, 1.0, 0.75])
    assert json.loads((tmp_path / "results.json").read_text()) == rows
    assert "60 items" in capsys.readouterr().out
    assert tiny_config.model.name == "tarq"


def test_nothing_is_trained_before_all_can_be(tiny_config, tiny_dataset, tmp_path, monkeypatch, finished):
    """Otherwise baselines with another learning rate would be in the folder of a run that cannot resume."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(loop, "train", lambda *arguments, **how: pytest.fail("trained"))
    monkeypatch.setattr(loop, "load_data", lambda config: tiny_dataset)
    tiny_config.baselines = ("two_tower",)
    with pytest.raises(ValueError, match=r"holds a checkpoint of step .*, expected none with --noresume"):
        loop.run(tiny_config, tmp_path, resume=False)
    tiny_config.optimizer.learning_rate *= 2
    with pytest.raises(ValueError, match=r"saved with config.optimizer.learning_rate="):
        loop.run(tiny_config, tmp_path)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=["no_requests", "no_candidates"])
def test_splits_without_candidates_are_refused(tiny_config, tiny_dataset, split, lengths):
    empty = data.records.make_requests([1] * len(lengths), [], lengths, [], lengths, [])
    dataset = dataclasses.replace(tiny_dataset, splits={**tiny_dataset.splits, split: empty})
    tiny_config.eval_every = 2
    with pytest.raises(ValueError, match=rf"split '{split}' has {len(lengths)} requests of at most 0"):
        setup.make_objective(tiny_config, dataset, sharding.make_tables(tiny_config))


def test_a_model_among_the_baselines_is_trained_once(tiny_config, tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "train", lambda config, dataset, workdir, console, resume: loop.Result(
        [{"model": config.model.name, "auc": 0.5, "workdir": workdir.name}], None))
    monkeypatch.setattr(loop, "load_data", lambda config: tiny_dataset)
    tiny_config.model.name, tiny_config.baselines = "two_tower", ("two_tower", "target_attention")
    rows = loop.run(tiny_config, tmp_path)
    assert [row["workdir"] for row in rows] == ["target_attention", tmp_path.name]


def test_gap_needs_both_ends():
    rows = [{"model": "two_tower", "auc": 0.6}, {"model": "tarq", "auc": 0.7}]
    assert loop.add_gap_recovered(rows) == rows
    both = loop.add_gap_recovered([*rows, {"model": "target_attention", "auc": 0.8}])
    assert [row["gap_recovered"] for row in both] == pytest.approx([0.0, 0.5, 1.0])
    assert both[1]["gap_recovered"] == metrics.gap_recovered(0.7, 0.6, 0.8)


def test_random_codebooks_stay_random(tiny_config, tiny_dataset, finished):
    tiny_config.codebook.init = "random"
    objective = setup.build(tiny_config.model, tiny_config.loss_weights, tiny_dataset.schema)
    state = finished[1].state
    assert setup.initialise_codebook(tiny_config, objective, state, tiny_dataset, {}, None) is state


def test_kmeans_runs_on_real_latents_of_training(tiny_config, tiny_dataset, finished):
    """Each centroid is near some latent, and each latent is near some centroid."""
    objective = setup.build(tiny_config.model, tiny_config.loss_weights, tiny_dataset.schema)
    shapes, state = setup.batch_shapes(tiny_dataset), finished[1].state
    mesh = sharding.make_mesh()
    state = setup.initialise_codebook(tiny_config, objective, state, tiny_dataset, shapes, mesh)
    latents = np.concatenate([
        np.asarray(jax.jit(objective.latents)(state.params, batch))[batch.candidate_mask]
        for batch in data.eval_batches(tiny_dataset, "train", batch_size=8, **shapes)])
    first = np.asarray(state.codebook.codewords[0])
    nearest = np.linalg.norm(latents[:, None] - first, axis=-1)
    assert nearest.min(axis=0).max() < 1.0 and nearest.min(axis=1).mean() < 0.7 * nearest.mean()
    assert state.codebook.counts.sum() == pytest.approx(tiny_config.codebook.init_latents * 2, rel=1e-5)


def test_latents_are_of_candidates_of_training(tiny_config, tiny_dataset):
    """None is of padding, though requests have 1 to 3 candidates; the seed decides which they are."""
    shown, splits = {"train": np.arange(1, 31), "test": np.arange(31, 61)}, {}
    for name, ids in shown.items():
        lengths = np.tile([1, 3, 1], len(ids) // 5)
        splits[name] = data.records.make_requests(
            np.ones_like(lengths), ids[:len(lengths)], np.ones_like(lengths), ids, lengths, ids % 2)
    dataset = dataclasses.replace(tiny_dataset, splits=splits)
    found = []
    for tiny_config.seed in (0, 0, 1):
        found.append(setup.draw_latents(
            tiny_config, lambda batch: batch.candidates["item_id"][..., None], dataset,
            setup.batch_shapes(dataset)))
        assert found[-1].shape == (tiny_config.codebook.init_latents, 1)
        assert set(found[-1].ravel()) <= set(shown["train"])
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] != found[2]).any()


def test_no_device_computes_latents_of_a_large_batch_at_once(tiny_config, tiny_dataset, monkeypatch):
    monkeypatch.setattr(setup, "MOST_REQUESTS", 3)
    sizes = set()

    def latents_of(batch):
        sizes.add(len(batch.candidate_mask))
        return np.zeros((*batch.candidate_mask.shape, 1))

    setup.draw_latents(tiny_config, latents_of, tiny_dataset, setup.batch_shapes(tiny_dataset))
    assert sizes == {3} and tiny_config.batch_size == 8


def test_batch_shapes_cover_every_split(tiny_dataset):
    longer = data.synthetic.generate(data.SyntheticOptions(
        num_items=60, num_clusters=8, history_length=9, num_candidates=5, train_requests=3,
        validation_requests=0, test_requests=0, max_interests=5)).splits["train"]
    dataset = data.Dataset(tiny_dataset.schema, tiny_dataset.items, {}, {
        "train": tiny_dataset.splits["train"], "test": longer})
    assert setup.batch_shapes(tiny_dataset) == {"history_length": 5, "num_candidates": 3}
    assert setup.batch_shapes(dataset) == {"history_length": 9, "num_candidates": 5}


def updates_of(config, gradient=1.0) -> np.ndarray:
    """Updates in ten steps of the configured optimizer, for one parameter and one codeword of value 1."""
    optimizer, variables = setup.make_optimizer(config), {"params": jnp.ones(1), "codewords": jnp.ones(1)}
    state, found = optimizer.init(variables), []
    for _ in range(10):
        gradients = jax.tree.map(lambda x: jnp.full_like(x, gradient), variables)
        updates, state = optimizer.update(gradients, state, variables)
        found.append([float(updates["params"][0]), float(updates["codewords"][0])])
    return np.array(found)


def test_schedule_warms_up_and_decays(tiny_config):
    tiny_config.optimizer.learning_rate, tiny_config.steps = 0.1, 10
    plain = -updates_of(tiny_config)[:, 0]
    np.testing.assert_allclose(plain, 0.05 * (1 + np.cos(np.pi * np.arange(10) / 10)), rtol=1e-4)
    tiny_config.optimizer.warmup_steps = 4
    warm = -updates_of(tiny_config)[:, 0]
    np.testing.assert_allclose(warm[:5], 0.1 * np.arange(5) / 4, rtol=1e-4, atol=1e-7)
    assert (np.diff(warm[4:]) < 0).all()
    tiny_config.optimizer.warmup_steps = 1000  # longer than the run
    np.testing.assert_allclose(-updates_of(tiny_config)[:, 0], 1e-4 * np.arange(10), rtol=1e-3, atol=1e-7)


def test_gradients_are_clipped_where_asked_for(tiny_config):
    tiny_config.optimizer.clip_norm = 0.5
    optimizer, zeros = setup.make_optimizer(tiny_config), {"params": jnp.zeros(4), "codewords": None}
    gradients = {"params": jnp.array([3.0, 4.0, 0.0, 0.0]), "codewords": None}
    _, state = optimizer.update(gradients, optimizer.init(zeros), zeros)
    moments = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose(moments["params"], 0.1 * np.array([0.3, 0.4, 0, 0]), rtol=1e-5)


def test_weight_decay_spares_the_codewords(tiny_config):
    """A codeword without a gradient does not move."""
    tiny_config.optimizer.weight_decay = 0.5
    updates = updates_of(tiny_config, gradient=0.0)[: tiny_config.steps]
    assert (updates[:, 0] < 0).all() and not updates[:, 1].any()


def test_micro_batches_of_pmap_divide_the_batch_of_a_device(tiny_config, tiny_dataset):
    """Each of the eight devices has two requests."""
    tiny_config.batch_size, tiny_config.accumulate = 16, 4
    setup.set_up(tiny_config, tiny_dataset)
    tiny_config.parallel = "pmap"
    message = "config.batch_size is 16, expected a multiple of the 8 devices times config.accumulate, 4, with"
    with pytest.raises(ValueError, match=message):
        setup.set_up(tiny_config, tiny_dataset)


def test_prepared_data_with_an_id_out_of_the_vocabulary(tmp_path):
    options = {"num_items": 60, "num_clusters": 8, "max_interests": 5, "history_length": 4,
               "num_candidates": 2, "train_requests": 20, "validation_requests": 2, "test_requests": 2}
    data.load("synthetic", data_dir=tmp_path, **options)
    metadata, = tmp_path.rglob("metadata.json")
    text = metadata.read_text()
    assert '\\"size\\": 61' in text
    metadata.write_text(text.replace('\\"size\\": 61', '\\"size\\": 31'))
    with pytest.raises(ValueError, match=r"field 'item_id' is 31 .*expected an id in \[0, 31\)"):
        data.load("synthetic", data_dir=tmp_path, **options)


@pytest.mark.parametrize("column", ["history", "candidates"])
@pytest.mark.parametrize("bad", [-1, 61])
def test_requests_with_an_id_out_of_the_vocabulary(tiny_dataset, column, bad):
    ids = getattr(tiny_dataset.splits["test"], column).copy()
    ids[5] = bad
    splits = {"test": dataclasses.replace(tiny_dataset.splits["test"], **{column: ids})}
    message = rf"split 'test': field '{column}' is {bad} in row 5, expected an id in \[0, 61\)"
    with pytest.raises(ValueError, match=message):
        data.check_dataset(dataclasses.replace(tiny_dataset, splits=splits))


def test_options_of_the_data_reach_it(tiny_config, tmp_path):
    tiny_config.data.data_dir = str(tmp_path)
    tiny_config.data.num_itens = 3
    with pytest.raises(ValueError, match=r"has no option 'num_itens', expected one of .*num_items"):
        loop.load_data(tiny_config)
    tiny_config.data.name = "synthetik"
    with pytest.raises(ValueError, match=r"data set is 'synthetik', expected one of .*'synthetic'"):
        loop.load_data(tiny_config)
