"""Benchmarks that measure in a process of their own: its devices, its memory, and what is told if it dies."""

import os
import sys

import pytest

from benchmarks import input_pipeline, seeds
from tarq_jax import memory


def test_scaling_has_eight_devices_whatever_the_environment(command):
    """The command sets the number of devices to one, as XLA_FLAGS may; JAX may be told to use a GPU."""
    done = command("-c", "import os; os.environ['JAX_PLATFORMS'] = 'cuda'; from benchmarks import scaling; "
                         "import jax; print(jax.default_backend(), jax.device_count())")
    assert done.stdout.split() == ["cpu", "8"], done.stderr


def test_a_measurement_that_is_killed_silently_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(OSError, match="ended with code 1: it printed nothing"):
        input_pipeline.in_own_process(tmp_path, input_pipeline.SETTINGS[0])


def test_a_run_that_is_killed_is_told():
    with pytest.raises(OSError, match=r"the process that called _exit\(9,\) ended"):
        seeds.in_own_process(os._exit, 9)


def test_a_run_keeps_its_memory_as_commands_do(monkeypatch):
    made = []

    class Pool(seeds.ProcessPoolExecutor):
        def __init__(self, *arguments, **options):
            made.append(options["initializer"])
            super().__init__(*arguments, **options)

    monkeypatch.setattr(seeds, "ProcessPoolExecutor", Pool)
    assert seeds.in_own_process(abs, -3) == 3
    assert made == [memory.keep_freed]
