"""Processes that Ray starts on this machine train together, stop together and report how they ended."""

import re
import signal
import time

import pytest
import tiny

pytest.importorskip("ray", reason="the extra [ray] is not installed")

from tarq_jax.training import checkpoint

TRAIN = """
import pathlib, sys
import tiny
from rich.console import Console
from tarq_jax import cli
from tarq_jax.training import distributed, loop

def main():
    assert distributed.initialize() == "JAX_COORDINATOR_ADDRESS"
    config = tiny.make_config()
    config.steps = int(sys.argv[2])
    loop.train(config, tiny.make_dataset(), pathlib.Path(sys.argv[1]), Console(file=sys.stderr))

sys.exit(cli._exit_code(main))
"""
LAUNCH = ("-m", "tarq_jax.training.ray", "--processes=2")


@pytest.mark.slow
def test_two_processes_are_like_one(command, tmp_path, finished):
    done = command(*LAUNCH, "--together", "--", "-c", TRAIN, tmp_path, 6)
    assert done.returncode == 0, done.stderr[-3000:]
    assert tiny.losses(tmp_path) == pytest.approx(tiny.losses(finished[0]), rel=1e-4)


@pytest.mark.slow
def test_a_signal_is_passed_on(start_command, tmp_path):
    process = start_command(*LAUNCH, "--together", "--", "-c", TRAIN, tmp_path, 20_000)
    for _ in range(3000):
        assert process.poll() is None, process.communicate()[1][-3000:]
        if (tmp_path / "metrics.jsonl").exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 75 and "2 of 2 processes were interrupted" in errors, errors[-3000:]
    with checkpoint.manager(tmp_path) as checkpoints:
        assert checkpoints.latest_step()


@pytest.mark.slow
def test_a_signal_before_training_can_catch_it(start_command, tmp_path):
    begin = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(300)"
    process = start_command(*LAUNCH, "--together", "--", "-c", begin, tmp_path / "begun")
    while not (tmp_path / "begun").exists():
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 75 and "2 of 2 processes were interrupted" in errors, errors[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "code", "words"), [
    (["--together", "--", "-c", "raise SystemExit(3)"], 1, r"exit codes \[3, 3\], expected 0 of each"),
    (["--wait_seconds=1", "--", "-c", ""], 1,
     r"no place for 2 processes with .* each, on as many machines, within 1 seconds; .* have \[{'CPU': \d"),
    (["--wait_seconds=1", "--together", "--gpus=1000", "--", "-c", ""], 1,
     r"no place for 2 processes with {.*'GPU': 1000.0} each within 1 seconds"),
    ([], 2, "no command is given"),
])
def test_what_cannot_run(command, arguments, code, words):
    done = command(*LAUNCH, *arguments)
    assert done.returncode == code and re.search(words, done.stderr.splitlines()[-1]), done.stderr
