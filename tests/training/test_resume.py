"""Interrupted, killed, refused: a repeated call ends where an undisturbed run ends."""

import os
import shutil
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

from tarq_jax import reporting
from tarq_jax.cli import Interrupted
from tarq_jax.config import default_config
from tarq_jax.schema import Field, Schema
from tarq_jax.training import checkpoint, loop, setup, sharding
from tarq_jax.training.meter import NOTHING_COUNTED

pytestmark = pytest.mark.usefixtures("compiled_once")

KILLED_AT_5 = """
import os, pathlib, signal, sys
import tiny
from rich.console import Console
from tarq_jax.training import loop

write = loop.MetricsWriter.write

def write_and_die(self, step, scalars):
    write(self, step, scalars)
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)

loop.MetricsWriter.write = write_and_die
loop.train(tiny.make_config(), tiny.make_dataset(), pathlib.Path(sys.argv[1]), Console(file=sys.stderr))
"""


STOPPED_AT = """
import os, pathlib, signal, sys
import tiny
from rich.console import Console
from tarq_jax import cli
from tarq_jax.training import loop

workdir, stop, model = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
write = loop.MetricsWriter.write

def write_and_stop(self, step, scalars):
    write(self, step, scalars)
    if step == stop:
        os.kill(os.getpid(), signal.SIGTERM)

loop.MetricsWriter.write = write_and_stop
config = tiny.make_config()
config.mesh.model, config.mesh.rules = model, (("embedding$", ("model",)),)
try:
    loop.train(config, tiny.make_dataset(), pathlib.Path(workdir), Console(file=sys.stderr))
except cli.Interrupted:
    sys.exit(cli.INTERRUPTED)
"""


def saved_steps(workdir) -> list[int]:
    with checkpoint.manager(workdir) as checkpoints:
        return list(checkpoints.all_steps())


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("number", "step"), [
    (signal.SIGTERM, 2),  # before the codebook starts
    (signal.SIGINT, 3),  # exactly at the start: the random codebook is saved, k-means runs after resuming
    (signal.SIGTERM, 5),  # after the start, with running statistics
    (signal.SIGTERM, 6),  # only evaluation is left
])
def test_interrupted_run_ends_in_the_same_bits(
        number, step, tiny_config, tiny_dataset, tmp_path, silent, send, finished, same_bits, untimed):
    before = signal.getsignal(number)
    with send(number, step), pytest.raises(Interrupted) as caught:
        loop.train(tiny_config, tiny_dataset, tmp_path, silent)
    message = str(caught.value)
    assert "\n" not in message and f"saved step {step}" in message and str(tmp_path) in message
    assert signal.getsignal(number) is before
    assert saved_steps(tmp_path)[-1] == step
    assert not (tmp_path / "results.json").exists()
    result = loop.train(tiny_config, tiny_dataset, tmp_path, silent)
    same_bits(result.state, finished[1].state)
    assert untimed(result.rows) == untimed(finished[1].rows)
    lines = reporting.read_metrics(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_signals_while_the_last_state_is_written_lose_nothing(
        tiny_config, tiny_dataset, tmp_path, silent, send, monkeypatch):
    """Launchers repeat SIGTERM; the state is written in the background until the manager closes."""
    close, unheld = ocp.CheckpointManager.close, []

    def close_after_a_signal(self):
        os.kill(os.getpid(), signal.SIGTERM)
        close(self)

    before = signal.signal(signal.SIGTERM, lambda *_: unheld.append(1))
    try:
        monkeypatch.setattr(ocp.CheckpointManager, "close", close_after_a_signal)
        with send(signal.SIGTERM, 3), pytest.raises(Interrupted, match="saved step 3"):
            loop.train(tiny_config, tiny_dataset, tmp_path, silent)
    finally:
        signal.signal(signal.SIGTERM, before)
    monkeypatch.undo()
    assert unheld == [] and saved_steps(tmp_path)[-1] == 3


def test_a_signal_before_the_first_step(tiny_config, tiny_dataset, tmp_path, monkeypatch):
    """`cli.run` turns KeyboardInterrupt into the exit code of an interrupted run."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(loop, "load_data", lambda config: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        loop.run(tiny_config, tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def killed_while_evaluating(monkeypatch):
    """SIGTERM arrives as evaluation begins."""
    evaluate = loop.evaluate

    def interrupted_evaluate(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", interrupted_evaluate)
        yield patch


def test_a_signal_during_the_last_evaluation(
        tiny_config, tiny_dataset, tmp_path, silent, finished, killed_while_evaluating):
    """Evaluation stops immediately, as all is saved, and the next of several models does not start."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    with pytest.raises(Interrupted, match="evaluating the test split; run it again"):
        loop.train(tiny_config, tiny_dataset, tmp_path, silent)


@pytest.mark.parametrize("best_metric", ["", "auc"])
def test_a_signal_during_evaluation(
        best_metric, tiny_config, tiny_dataset, tmp_path, silent, finished, same_bits,
        killed_while_evaluating):
    """Evaluation stops immediately, its step saved; if the best step is wanted, evaluation ends first."""
    tiny_config.eval_every, tiny_config.best_metric = 4, best_metric
    with pytest.raises(Interrupted, match="saved step 4"):
        loop.train(tiny_config, tiny_dataset, tmp_path, silent)
    lines = reporting.read_metrics(tmp_path)
    assert any("validation/tarq/auc" in line for line in lines) == bool(best_metric)
    killed_while_evaluating.undo()
    if not best_metric:
        same_bits(loop.train(tiny_config, tiny_dataset, tmp_path, silent).state, finished[1].state)


@pytest.mark.parametrize(("best_metric", "saved"), [("", [2, 4]), ("auc", [2])])
def test_a_step_is_saved_before_it_is_evaluated(
        best_metric, saved, tiny_config, tiny_dataset, tmp_path, silent, monkeypatch):
    """A run that is killed while it evaluates loses nothing, unless the best step is wanted."""
    def killed(*args, **kwargs):
        raise MemoryError("killed")

    monkeypatch.setattr(loop, "evaluate", killed)
    tiny_config.eval_every, tiny_config.best_metric = 4, best_metric
    with pytest.raises(MemoryError, match="killed"):
        loop.train(tiny_config, tiny_dataset, tmp_path, silent)
    assert saved_steps(tmp_path) == saved


def test_killed_run_ends_in_the_same_bits(
        tiny_config, tiny_dataset, tmp_path, silent, command, finished, same_bits, untimed):
    killed = command("-c", KILLED_AT_5, tmp_path, devices=len(jax.devices()))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert set(saved_steps(tmp_path)) <= {2, 4} and saved_steps(tmp_path)
    result = loop.train(tiny_config, tiny_dataset, tmp_path, silent)
    same_bits(result.state, finished[1].state)
    assert untimed(result.rows) == untimed(finished[1].rows)


@pytest.mark.slow
def test_eight_devices_then_four_then_one_and_back(command, tmp_path):
    """Rows of tables are split over four devices, two, none and two; losses are those of one device."""
    for devices, model, stop, code in ((8, 4, 2, 75), (4, 2, 4, 75), (1, 1, 5, 75), (8, 2, 7, 0)):
        done = command("-c", STOPPED_AT, tmp_path / "moved", stop, model, devices=devices)
        assert done.returncode == code, done.stderr[-3000:]
    assert command("-c", STOPPED_AT, tmp_path / "stayed", 7, 1).returncode == 0
    moved, stayed = (tiny.losses(tmp_path / name) for name in ("moved", "stayed"))
    assert len(stayed) == 6 and moved == pytest.approx(stayed, rel=1e-4)


def test_what_was_saved_while_training_went_on_is_what_was(
        tiny_config, tiny_dataset, tmp_path, silent, finished, same_bits):
    """Steps after an asynchronous save reuse the memory of the state that is being saved."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    assert saved_steps(tmp_path) == [4, 6]
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    same_bits(loop.train(tiny_config, tiny_dataset, tmp_path, silent).state, finished[1].state)


def test_a_finished_run_trains_nothing(
        tiny_config, tiny_dataset, tmp_path, silent, finished, same_bits, monkeypatch):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    before = contents(tmp_path / "checkpoints")

    def compile_step(*_):
        def step(*_):
            raise AssertionError("a step was taken")
        return step

    monkeypatch.setattr(setup, "compile_step", compile_step)
    result = loop.train(tiny_config, tiny_dataset, tmp_path, silent)
    assert result.rows == finished[1].rows  # time and speed too
    same_bits(result.state, finished[1].state)
    assert contents(tmp_path / "checkpoints") == before


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(tiny_config, tiny_dataset, tmp_path, silent, send):
    """One device reads tables that four devices saved, in 64 rows; training ends as if it had not moved."""
    tiny_config.update_from_flattened_dict({
        "model.name": "two_tower", "mesh.model": 4,
        "mesh.rules": (("embedding$", ("model",)),), "optimizer.table": "lazy_adam"})
    with send(signal.SIGTERM, 4), pytest.raises(Interrupted):
        loop.train(tiny_config, tiny_dataset, tmp_path / "moved", silent)
    tiny_config.update_from_flattened_dict({"mesh.model": 1, "mesh.rules": ()})
    moved, stayed = (loop.train(tiny_config, tiny_dataset, tmp_path / name, silent).state
                     for name in ("moved", "stayed"))
    assert len(saved_steps(tmp_path / "moved")) == 2
    tables = [state.params["params"]["item_features"]["item_id"]["embedding"] for state in (moved, stayed)]
    assert {shard.data.shape for shard in tables[0].addressable_shards} == {(61, 4)}
    np.testing.assert_allclose(*tables, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("saved", "read"), [(1, 64), (64, 1)])
def test_tables_may_have_another_number_of_rows(saved, read, tiny_config, tiny_dataset, tmp_path):
    """Rows of zeros, which no id reads, come or go; no checksum and no other array takes part in them."""
    def fresh(multiple, seed):
        tiny_config.update_from_flattened_dict({
            "seed": seed, "model.name": "two_tower", "model.table_multiple": multiple,
            "optimizer.table": "lazy_adam"})
        objective = setup.make_objective(tiny_config, tiny_dataset, sharding.make_tables(tiny_config))
        return setup.init_state(
            tiny_config, objective, setup.make_optimizer(tiny_config), tiny_dataset,
            sharding.make_mesh())

    state, other = fresh(saved, 0), fresh(read, 1)
    tiny_config.seed = 0
    with checkpoint.manager(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, state, tiny_config, tiny_dataset.schema, NOTHING_COUNTED)
        checkpoints.wait_until_finished()
        found = checkpoint.restore_latest(checkpoints, other, tiny_config, tiny_dataset.schema)
    assert not found.damaged
    shapes = [jax.tree.map(np.shape, each.replace(rng=None)) for each in (found.state, other)]
    assert shapes[0] == shapes[1]
    for after, before in zip(*(map(np.atleast_1d, jax.tree.leaves(each.replace(rng=None)))
                               for each in (found.state, state)), strict=True):
        shared = min(len(after), len(before))
        np.testing.assert_array_equal(after[:shared], before[:shared])
        assert not after[shared:].any()


def flat_keys(config, prefix="") -> list[str]:
    return [name for key, value in config.items() for name in (
        flat_keys(value, f"{prefix}{key}.") if hasattr(value, "items") else [f"{prefix}{key}"])]


def other(value):
    """Another value of the same type."""
    return {str: lambda: f"{value}_other", tuple: lambda: (*value, 7), bool: lambda: not value}.get(
        type(value), lambda: value + 1)()


@pytest.fixture(scope="module")
def opened(finished):
    with checkpoint.manager(finished[0]) as checkpoints:
        yield checkpoints


@pytest.mark.parametrize("key", flat_keys(default_config()))
def test_every_setting_is_held_to(key, tiny_config, tiny_dataset, opened, finished, same_bits):
    saved = tiny_config
    for part in key.split("."):
        saved = saved[part]
    changed = other(saved)
    tiny_config.update_from_flattened_dict({key: changed})
    state = finished[1].state
    if key in checkpoint.FREE_TO_CHANGE:
        restored = checkpoint.restore_latest(opened, state, tiny_config, tiny_dataset.schema)
        same_bits(restored.state, state)
        return
    with pytest.raises(ValueError) as caught:
        checkpoint.restore_latest(opened, state, tiny_config, tiny_dataset.schema)
    message = str(caught.value)
    values = (list(value) if isinstance(value, tuple) else value for value in (saved, changed))
    assert f"config.{key}=" in message and all(repr(value) in message for value in values)
    assert "\n" not in message


def test_only_these_may_change():
    """A change of any other setting makes it another experiment."""
    assert set(checkpoint.FREE_TO_CHANGE) <= {
        "steps", "baselines", "log_every", "eval_every", "eval_batch_size", "checkpoint_every",
        "checkpoints_kept", "best_metric", "recall_k", "save_scores", "prefetch", "data.readers",
        "accumulate", "model.remat", "model.attention_block", "optimizer.max_gradient_norm", "parallel",
        "mesh.data", "mesh.model", "mesh.rules", "model.table_multiple",
        "data.data_dir", "data.prepared", "data.source", "data.attributes"}


def test_a_run_that_is_past_its_end_is_not_taken_for_a_shorter_one(
        tiny_config, tiny_dataset, opened, finished):
    tiny_config.steps -= 1
    with pytest.raises(ValueError, match=rf"step {tiny_config.steps + 1} is saved, this run has"):
        checkpoint.restore_latest(opened, finished[1].state, tiny_config, tiny_dataset.schema)


def test_settings_that_came_or_went(tiny_config, tiny_dataset, opened, finished):
    tiny_config.data.num_items = 7
    with pytest.raises(ValueError, match=r"config.data.num_items=None.* 7"):
        checkpoint.restore_latest(opened, finished[1].state, tiny_config, tiny_dataset.schema)


def test_a_refused_run_loses_nothing(tiny_config, tiny_dataset, tmp_path, silent, finished):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    before = contents(tmp_path)
    tiny_config.seed = 5
    with pytest.raises(ValueError, match=r"config.seed=0, this run has 5; use another --workdir"):
        loop.train(tiny_config, tiny_dataset, tmp_path, silent)
    after = contents(tmp_path)
    assert {name: after.get(name) for name in before} == before
    assert {name.split("/")[0] for name in after.keys() - before.keys()} <= {"tensorboard"}


def test_a_run_that_another_process_trains_is_left_alone(
        tiny_config, tiny_dataset, tmp_path, silent, finished):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    before = contents(tmp_path)
    with reporting.MetricsWriter(tmp_path):
        with pytest.raises(ValueError, match="another process is training there, expected one at a time"):
            loop.train(tiny_config, tiny_dataset, tmp_path, silent)
    after = contents(tmp_path)
    assert {name: after.get(name) for name in before} == before


def test_another_schema_is_refused(tiny_config, tiny_dataset, opened, finished):
    fields = tiny_dataset.schema.fields
    schema = Schema((*fields, Field("colour", "item", "categorical", 3)))
    with pytest.raises(ValueError, match=r"schema.*colour"):
        checkpoint.restore_latest(opened, finished[1].state, tiny_config, schema)


def test_a_step_saved_before_stays(tiny_config, tiny_dataset, tmp_path, finished, same_bits):
    state = finished[1].state
    with checkpoint.manager(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, state, tiny_config, tiny_dataset.schema, (1.0, 2.0, 0.5))
        checkpoints.wait_until_finished()
        spoilt = state.replace(codebook=state.codebook.replace(counts=state.codebook.counts * 0))
        checkpoint.save(checkpoints, spoilt, tiny_config, tiny_dataset.schema, (9.0, 9.0, 9.0))
        restored = checkpoint.restore_latest(checkpoints, state, tiny_config, tiny_dataset.schema)
    same_bits(restored.state, state)
    assert tuple(restored.counted) == (1.0, 2.0, 0.5)


def test_a_fresh_workdir_gives_the_state_back(tiny_config, tiny_dataset, tmp_path, finished):
    state = finished[1].state
    with checkpoint.manager(tmp_path) as checkpoints:
        restored = checkpoint.restore_latest(checkpoints, state, tiny_config, tiny_dataset.schema)
    assert restored.state is state and not any(restored.counted)


def test_the_run_went_through_all_that_it_has_to_survive(
        finished, tiny_config, tiny_dataset, tmp_path, silent, monkeypatch):
    """The reference run covers everything: k-means ran before step 4, which then revived dead codewords."""
    state, initialise, fitted = finished[1].state, setup.initialise_codebook, []

    def watched(*arguments):
        started = initialise(*arguments)
        fitted.append(tiny.moved(started.codebook, arguments[2].codebook))
        return started

    monkeypatch.setattr(setup, "initialise_codebook", watched)
    tiny_config.codebook.revive_every = 0
    loop.train(tiny_config, tiny_dataset, tmp_path, silent)
    assert len(fitted) == 1 and fitted[0].all()
    losses = [tiny.losses(workdir)[:5] for workdir in (finished[0], tmp_path)]
    assert losses[0][:4] == pytest.approx(losses[1][:4], rel=1e-5) and losses[0][4] != losses[1][4]
    with checkpoint.manager(finished[0]) as saved, checkpoint.manager(tmp_path) as unrevived:
        revived = tiny.moved(*(checkpoint.restore_step(each, 4, state).codebook
                               for each in (saved, unrevived)))
    assert revived.any() and not revived.all()
    assert int(state.step) == 6
    assert np.isfinite(state.codebook.codewords).all() and np.ptp(state.codebook.counts) > 0
    assert len(tiny_dataset.splits["train"]) // 8 == 5  # the sixth step is in the second epoch
