"""Checkpoints: which are kept, which is the best, and what happens to damaged ones."""

import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
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


def flip_a_bit(folder):
    largest = max((path for path in (folder / "state").rglob("*") if path.is_file()),
                  key=lambda path: (path.stat().st_size, path))
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


DAMAGES = {
    "emptied": lambda folder: [shutil.rmtree(part) for part in folder.iterdir() if part.is_dir()],
    "state is gone": lambda folder: shutil.rmtree(folder / "state"),
    "meta is gone": lambda folder: shutil.rmtree(folder / "meta"),
    "meta is no JSON": lambda folder: (folder / "meta" / "metadata").write_text("{"),
    "meta lacks its parts": lambda folder: (folder / "meta" / "metadata").write_text("{}"),
    "truncated": truncate,
    "overwritten": scribble,
    "a bit is flipped": flip_a_bit,
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
    sentence, = restored.damaged.values()
    assert sentence.startswith("Checkpoint 6 is damaged (")
    assert (copied / "damaged" / "6").is_dir()


def test_wrong_numbers_that_can_be_read_are_damage(copied, tiny_config, tiny_dataset, finished, monkeypatch):
    """One bit of a parameter differs; Orbax has nothing to say."""
    read = checkpoint._read

    def flipped(checkpoints, step, **item):
        found = read(checkpoints, step, **item)
        if step == 4 or "state" not in item:
            return found
        return found.replace(params=jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].multiply(-1),
                                                 found.params))

    monkeypatch.setattr(checkpoint, "_read", flipped)
    with checkpoint.manager(copied) as checkpoints:
        restored = checkpoint.restore_latest(checkpoints, finished[1].state, tiny_config, tiny_dataset.schema)
    assert int(restored.state.step) == 4
    assert "Checkpoint 6 is damaged (the checksum of .params" in restored.damaged[6]


def test_a_checkpoint_without_checksums_is_restored(
        copied, tiny_config, tiny_dataset, finished, same_bits):
    """As those of older versions."""
    path = copied / "checkpoints" / "6" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    assert meta.pop("checksums")
    path.write_text(json.dumps(meta))
    with checkpoint.manager(copied) as checkpoints:
        restored = checkpoint.restore_latest(checkpoints, finished[1].state, tiny_config, tiny_dataset.schema)
    same_bits(restored.state, finished[1].state)
    assert not restored.damaged


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int32", "int8", "bool"])
def test_a_checksum_shows_any_bit_and_another_order(dtype):
    values = np.arange(24).reshape(2, 3, 4).astype(dtype)
    values[0, 0, 0], values[1, 2, 3] = 0, 1
    (before,) = checkpoint.checksums([values])
    for bit in range(values.nbytes * 8) if dtype != "bool" else ():
        changed = values.copy()
        changed.view(np.uint8).reshape(-1)[bit // 8] ^= 1 << bit % 8
        assert checkpoint.checksums([changed])[0] != before
    assert checkpoint.checksums([values[::-1, ::-1, ::-1].copy()])[0] != before


def test_the_checksum_is_that_of_its_formula():
    values = np.array([[1, 2], [3, 2**32 - 1]], np.uint32)
    found = checkpoint.checksums({"a": values, "b": jnp.float32(1.0), "c": np.zeros((3, 0)), "d": True,
                                  "e": jax.random.key(7)})
    assert [int(value) for value in found] == [
        (1 + 3 * 2 + 3 * 3 - 9) % 2**32, 0x3F800000, 0, 1, int(checkpoint.checksums([np.uint32([0, 7])])[0])]


@pytest.mark.parametrize("devices", [8, 4])
def test_the_checksum_does_not_depend_on_sharding(devices):
    values = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    expected = int(checkpoint.checksums([values])[0])
    for spec in (("data",), (None, "data"), ()):
        placed = jax.device_put(values, NamedSharding(mesh, PartitionSpec(*spec)))
        assert int(checkpoint.checksums([placed])[0]) == expected


def test_a_run_goes_on_from_before_the_damage(
        copied, tiny_config, tiny_dataset, finished, console, same_bits):
    truncate(copied / "checkpoints" / "6")
    result = loop.train(tiny_config, tiny_dataset, copied, console)
    same_bits(result.state, finished[1].state)
    assert "Checkpoint 6 is damaged" in console.file.getvalue()
    assert "Going on from step 4" in console.file.getvalue()


def test_reading_a_run_says_what_is_damaged_and_leaves_it(
        copied, tiny_config, tiny_dataset, monkeypatch, caplog):
    """As another process may be training there."""
    truncate(copied / "checkpoints" / "6")
    before = sorted(copied.rglob("*"))
    monkeypatch.setattr(loop, "load_data", lambda config: tiny_dataset)
    assert restore.load_run(copied).steps == 4
    message, = (record.getMessage() for record in caplog.records if record.name == restore.__name__)
    assert "Checkpoint 6 is damaged (" in message and message.endswith("Step 4 is read instead.")
    assert sorted(copied.rglob("*")) == before


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
