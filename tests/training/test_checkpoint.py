"""Checkpoints: which are kept, which is the best, and what happens to damaged ones."""

import io
import shutil

import pytest
from rich.console import Console

from tarq_jax import reporting
from tarq_jax.config import BEST
from tarq_jax.training import checkpoint, loop, restore

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, with checkpoints of steps 4 and 6."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def console():
    """A console with the output of one test."""
    return Console(file=io.StringIO(), width=1000)


def truncate(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def scribble(folder):
    for path in (folder / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"\x5a" * path.stat().st_size)


DAMAGES = {
    "emptied": lambda folder: [shutil.rmtree(part) for part in folder.iterdir() if part.is_dir()],
    "state is gone": lambda folder: shutil.rmtree(folder / "state"),
    "meta is gone": lambda folder: shutil.rmtree(folder / "meta"),
    "meta is no JSON": lambda folder: (folder / "meta" / "metadata").write_text("{"),
    "meta lacks its parts": lambda folder: (folder / "meta" / "metadata").write_text("{}"),
    "truncated": truncate,
    "overwritten": scribble,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
        damage, copied, tiny_config, tiny_dataset, finished, same_bits):
    """The run ends with the same bits; a message names the damage, and the damaged files are kept."""
    damage(copied / "checkpoints" / "6")
    with checkpoint.manager(copied) as checkpoints:
        restored = checkpoint.restore_latest(checkpoints, finished[1].state, tiny_config, tiny_dataset.schema)
        assert list(checkpoints.all_steps()) == [4]
    assert int(restored.state.step) == 4
    sentence, = restored.damaged
    assert sentence.startswith("Checkpoint 6 is damaged (")
    assert (copied / "damaged" / "6").is_dir()


def test_a_run_goes_on_from_before_the_damage(
        copied, tiny_config, tiny_dataset, finished, console, same_bits):
    truncate(copied / "checkpoints" / "6")
    result = loop.train(tiny_config, tiny_dataset, copied, console)
    same_bits(result.state, finished[1].state)
    assert "Checkpoint 6 is damaged" in console.file.getvalue()
    assert "Going on from step 4" in console.file.getvalue()


def test_where_all_are_damaged_nothing_is_trained(copied, tiny_config, tiny_dataset, silent):
    for step in (4, 6):
        truncate(copied / "checkpoints" / str(step))
    with pytest.raises(ValueError, match="none of 2 checkpoints can be read, expected one at least"):
        loop.train(tiny_config, tiny_dataset, copied, silent)
    assert not (copied / "damaged").exists()


def test_a_fresh_start_is_refused_where_something_is_saved(copied, tiny_config, tiny_dataset, silent):
    with pytest.raises(ValueError, match="holds a checkpoint of step 6, expected none with --noresume"):
        loop.train(tiny_config, tiny_dataset, copied, silent, resume=False)


@pytest.mark.parametrize("kept", [1, 3])
def test_the_newest_are_kept(kept, tiny_config, tiny_dataset, finished, tmp_path):
    with checkpoint.manager(tmp_path, kept=kept) as checkpoints:
        for step in range(1, 6):
            state = finished[1].state.replace(step=finished[1].state.step * 0 + step)
            checkpoint.save(checkpoints, state, tiny_config, tiny_dataset.schema, (0.0, 0.0, 0.0))
        checkpoints.wait_until_finished()
        assert list(checkpoints.all_steps()) == list(range(6 - kept, 6))


@pytest.mark.parametrize(("name", "best"), [("auc", 2), ("log_loss", 3)])
def test_the_best_is_kept_besides(name, best, tiny_config, tiny_dataset, finished, tmp_path):
    """The earliest of equals."""
    values = {1: 0.5, 2: 0.9, 3: 0.2, 4: 0.9, 5: 0.4, 6: 0.6}
    with checkpoint.manager(tmp_path, kept=1, best_metric=name) as checkpoints:
        for step, value in values.items():
            state = finished[1].state.replace(step=finished[1].state.step * 0 + step)
            checkpoint.save(checkpoints, state, tiny_config, tiny_dataset.schema, (0.0, 0.0, 0.0),
                            None if step == 1 else dict.fromkeys(BEST, value))
        checkpoints.wait_until_finished()
        kept = checkpoint.best_step(checkpoints, name)
        assert kept == best and set(checkpoints.all_steps()) == {kept, 6}


def test_the_best_is_tested(tiny_config, tiny_dataset, tmp_path, console, same_bits, monkeypatch):
    """And it is what `load_run` gives, from which a run is exported; the newest state is another one."""
    tiny_config.eval_every, tiny_config.best_metric, tiny_config.checkpoints_kept = 1, "auc", 1
    result = loop.train(tiny_config, tiny_dataset, tmp_path, console)
    lines = reporting.read_metrics(tmp_path)
    measured = {line["step"]: line["validation/tarq/auc"] for line in lines if "validation/tarq/auc" in line}
    assert sorted(measured) == [1, 2, 3, 4, 5, 6]
    assert int(result.state.step) == max(measured, key=measured.get)  # the earliest of equals
    assert f"testing step {int(result.state.step)}, the best by auc" in console.file.getvalue()
    with checkpoint.manager(tmp_path, kept=1, best_metric="auc") as checkpoints:
        assert int(result.state.step) in checkpoints.all_steps()
        assert 6 in checkpoints.all_steps()
    assert int(result.state.step) < 6
    monkeypatch.setattr(loop, "load_data", lambda config: tiny_dataset)
    run = restore.load_run(tmp_path)
    same_bits(run.state, result.state)
    assert run.steps == 6
