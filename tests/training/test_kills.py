"""A run killed repeatedly at random moments, even while saving, ends with the same bits.

    python tests/training/test_kills.py LAYOUT WORKDIR

trains the run of a layout; this is what the test kills.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import tiny
from rich.console import Console

from tarq_jax import data
from tarq_jax.training import checkpoint, loop

KILLS, STEPS = 20, 150
LAYOUTS = {"memory": 1, "disk": 8}  # where the data are -> devices


def train(layout: str, workdir: Path, console: Console) -> loop.Result:
    """Data in memory, on one device; or on disk, with tables split over a mesh, read by two threads."""
    config, dataset = tiny.make_config(), tiny.make_dataset()
    config.steps, config.checkpoint_every = STEPS, 1
    if layout == "disk":
        config.mesh.model, config.mesh.rules = 2, (("embedding$", ("model",)),)
        config.data.readers = 2
        dataset = data.load("synthetic", data_dir=workdir.parent / "data", stream=True, **tiny.SIZES)
    return loop.train(config, dataset, workdir, console)


def newest(workdir) -> int:
    """The newest step with a complete checkpoint; incomplete ones have longer names."""
    folder = workdir / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=0)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_twenty_kills_leave_no_trace(layout, tmp_path, silent, start_command, same_bits):
    """This includes data order, random numbers, optimizer and codebook statistics."""
    def start(name):
        return start_command(__file__, layout, tmp_path / name, devices=LAYOUTS[layout])

    draw = random.Random(0)
    for _ in range(KILLS):
        before = newest(tmp_path / "killed")
        process = start("killed")
        while newest(tmp_path / "killed") <= before:
            assert process.poll() is None, process.communicate()[1][-3000:]
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed: raise STEPS"
    for name in ("killed", "undisturbed"):
        finished = start(name)
        _, errors = finished.communicate(timeout=900)
        assert finished.returncode == 0, errors[-3000:]

    found, expected = (train(layout, tmp_path / name, silent).state for name in ("killed", "undisturbed"))
    assert int(found.step) == STEPS
    same_bits(found, expected)
    with checkpoint.manager(tmp_path / "killed") as checkpoints:
        assert list(checkpoints.all_steps()) == [STEPS - 1, STEPS]


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]), Console(file=sys.stderr))
