"""What SIGINT and SIGTERM do to what is trained or written."""

import os
import signal
import time

import pytest

from tarq_jax import signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruptible_only_notes_signals(number):
    before = signal.getsignal(number)
    with signals.interruptible() as interrupted:
        assert not interrupted()
        os.kill(os.getpid(), number)
        assert interrupted()
    assert signal.getsignal(number) is before


def test_a_second_interrupt_does_not_wait():
    with signals.interruptible() as interrupted:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_interruptible_gives_handlers_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError), signals.interruptible():
        raise ValueError
    assert signal.getsignal(signal.SIGTERM) is before
    with signals.interruptible() as interrupted:
        assert not interrupted()


WRITES = """
import sys, time
from pathlib import Path
from tarq_jax import cli
from tarq_jax.serving.artefact import new_folder

def main(arguments):
    with new_folder(Path(arguments[0])) as folder:
        (folder / "half").write_text("")
        time.sleep(60)

cli.run(main, words=True)
"""


LOST = WRITES.replace("time.sleep(60)", """
        class Swallows:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)
        Swallows()""").replace("import sys, time", "import os, signal, sys, time")


def test_a_termination_that_gets_lost_in_a_callback_is_raised_again(command, tmp_path):
    done = command("-c", LOST, tmp_path / "out")
    assert done.returncode == 75 and list(tmp_path.iterdir()) == []
    assert done.stderr.splitlines()[-1] == "error: interrupted; run it again to resume"


def test_termination_leaves_nothing_half_written(start_command, tmp_path):
    process = start_command("-c", WRITES, tmp_path / "out")
    while not list(tmp_path.iterdir()):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75 and list(tmp_path.iterdir()) == []
    assert process.stderr.read() == "error: interrupted; run it again to resume\n"
