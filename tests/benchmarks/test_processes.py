"""Benchmarks that measure in a process of their own: its devices, its memory, and what is told if it dies."""

import functools
import os
import sys

import pytest

from benchmarks import seeds
from benchmarks.processes import in_own_process
from tarq_jax import memory


def test_scaling_has_eight_devices_whatever_the_environment(command):
    """The command sets the number of devices to one, as XLA_FLAGS may; JAX may be told to use a GPU."""
    done = command("-c", "import os; os.environ['JAX_PLATFORMS'] = 'cuda'; from benchmarks import scaling; "
                         "import jax; print(jax.default_backend(), jax.device_count())")
    assert done.stdout.split() == ["cpu", "8"], done.stderr


def test_a_process_that_is_killed_is_told():
    with pytest.raises(OSError, match=r"the process that called _exit\(9,\) ended"):
        in_own_process(os._exit, 9)


def test_what_is_called_first():
    own = sys.getrecursionlimit()
    double = functools.partial(sys.setrecursionlimit, 2 * own)
    assert in_own_process(sys.getrecursionlimit, first=double) == 2 * own
    assert sys.getrecursionlimit() == own


def test_a_run_keeps_its_memory_as_commands_do(monkeypatch, with_flags):
    made = []

    def measure(*_, first):
        made.append(first)
        return {"seconds": 1.0, "seeds": 1}

    monkeypatch.setattr(seeds, "in_own_process", measure)
    with with_flags(counts=["2"]):
        seeds.main()
    assert made == [memory.keep_freed] * 2
