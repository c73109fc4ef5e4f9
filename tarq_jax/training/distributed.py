"""Many hosts: joining the cluster that a launcher started this process in, and what its processes share.

Each process runs the same program. Parameters and batches are global arrays; a process reads its own part of
each batch (`data_shard`). Processes other than the first print nothing. The working directory has to be one
that all hosts see.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils

from tarq_jax import cli, data


class Launcher(NamedTuple):
    """How a process knows that it is one of several.

    Attributes:
      started: the environment -> whether this launcher started several processes.
      arguments: the environment -> arguments of `jax.distributed.initialize`; none where JAX finds them.
    """

    started: Callable[[Mapping[str, str]], bool]
    arguments: Callable[[Mapping[str, str]], dict[str, Any]] = lambda environment: {}


def _coordinator(environment: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {"coordinator_address": environment["JAX_COORDINATOR_ADDRESS"]}
    for argument, name in (("num_processes", "JAX_NUM_PROCESSES"), ("process_id", "JAX_PROCESS_ID")):
        found[argument] = _whole(name, environment.get(name, ""), " with JAX_COORDINATOR_ADDRESS set")
    if found["process_id"] >= found["num_processes"]:
        raise ValueError(f"JAX_PROCESS_ID is {found['process_id']}, expected less than JAX_NUM_PROCESSES, "
                         f"{found['num_processes']}")
    return found


def _several(name: str) -> Callable[[Mapping[str, str]], bool]:
    return lambda environment: _whole(name, environment.get(name) or "1") > 1


def _whole(name: str, value: str, where: str = "") -> int:
    if not value.isdecimal():
        raise ValueError(f"{name} is {value!r}, expected a whole number{where}")
    return int(value)


LAUNCHERS: Mapping[str, Launcher] = {
    "JAX_COORDINATOR_ADDRESS": Launcher(lambda environment: "JAX_COORDINATOR_ADDRESS" in environment,
                                        _coordinator),
    "SLURM": Launcher(_several("SLURM_NTASKS")),
    "Open MPI": Launcher(_several("OMPI_COMM_WORLD_SIZE")),
    "Cloud TPU": Launcher(lambda environment: "," in environment.get("TPU_WORKER_HOSTNAMES", "")),
    "TPU slices": Launcher(_several("MEGASCALE_NUM_SLICES")),
}


def initialize(environment: Mapping[str, str] = os.environ) -> str | None:
    """Joins the other processes, if a launcher started any; to be called before JAX is used.

    Args:
      environment: variables of this process.

    Returns:
      The key of `LAUNCHERS`; None for a process on its own.

    Raises:
      ValueError: a variable is missing or out of range.
    """
    found = next((name for name, launcher in LAUNCHERS.items() if launcher.started(environment)), None)
    if found is not None:
        jax.distributed.initialize(**LAUNCHERS[found].arguments(environment))
        if not is_first():
            sys.stdout = open(os.devnull, "w")  # for as long as the process lives
    return found


def is_first() -> bool:
    """Whether this is the process that writes what there is to be only one of."""
    return jax.process_index() == 0


def data_shard() -> data.Shard:
    """The part of every batch that this process reads."""
    return data.Shard(jax.process_index(), jax.process_count())


def wait_for_all(what: str) -> None:
    """Returns once every process has called it; `what` names the place in the program."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


class Interruption(NamedTuple):
    """What a run asks about signals.

    Attributes:
      due: step -> whether to save and leave, the same on all processes; to be called at every step.
      now: whether to leave what lasts long at once; never of several processes, which would have to agree.
    """

    due: Callable[[int], bool]
    now: Callable[[], bool] = lambda: False


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Within it a signal ends no process.

    Processes on their own see SIGINT and SIGTERM. Of several, any may get SIGTERM, as schedulers send it;
    they agree on the step to stop at.
    """
    if jax.process_count() > 1:
        yield Interruption(multihost_utils.reached_preemption_sync_point)
        return
    with cli.interruptible() as caught:
        yield Interruption(lambda step: caught(), caught)
