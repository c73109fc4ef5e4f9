"""A run killed repeatedly at random moments, even while saving, ends with the same bits."""

import os
import random
import signal
import time

import pytest
import tiny

from tarq_jax.training import checkpoint, loop

KILLS, STEPS = 20, 150

TRAIN = """
import pathlib, sys
import tiny
from rich.console import Console
from tarq_jax.training import loop

config = tiny.make_config()
config.steps, config.checkpoint_every = int(sys.argv[2]), 1
loop.train(config, tiny.make_dataset(), pathlib.Path(sys.argv[1]), Console(file=sys.stderr))
"""


def newest(workdir) -> int:
    """The newest step with a complete checkpoint; incomplete ones have longer names."""
    folder = workdir / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=0)


@pytest.mark.slow
def test_twenty_kills_leave_no_trace(tmp_path, silent, start_command, same_bits):
    """This includes data order, random numbers, optimizer and codebook statistics."""
    draw = random.Random(0)
    for _ in range(KILLS):
        before = newest(tmp_path / "killed")
        process = start_command("-c", TRAIN, tmp_path / "killed", STEPS)
        while newest(tmp_path / "killed") <= before:
            assert process.poll() is None, process.communicate()[1][-3000:]
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed: raise STEPS"
    finished = start_command("-c", TRAIN, tmp_path / "killed", STEPS)
    _, errors = finished.communicate(timeout=900)
    assert finished.returncode == 0, errors[-3000:]

    undisturbed = start_command("-c", TRAIN, tmp_path / "undisturbed", STEPS)
    _, errors = undisturbed.communicate(timeout=900)
    assert undisturbed.returncode == 0, errors[-3000:]
    config = tiny.make_config()
    config.steps, config.checkpoint_every = STEPS, 1
    found, expected = (loop.train(config, tiny.make_dataset(), tmp_path / name, silent).state
                       for name in ("killed", "undisturbed"))
    assert int(found.step) == STEPS
    same_bits(found, expected)
    with checkpoint.manager(tmp_path / "killed") as checkpoints:
        assert list(checkpoints.all_steps()) == [STEPS - 1, STEPS]
