"""Several hosts: how a process joins the cluster that a launcher started, and how the processes coordinate.

Each process runs the same program. Parameters and batches are global arrays; a process reads its own part of
each batch (`data_shard`). Only the first process prints. All hosts must see the same working directory.
"""

import itertools
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from tarq_jax import data, signals

Tree = TypeVar("Tree")


class Launcher(NamedTuple):
    """How a process recognises a launcher and that it is one of several processes.

    Attributes:
      started: environment -> whether this launcher started several processes.
      arguments: environment -> arguments for `jax.distributed.initialize`; none if JAX finds them itself.
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
    "GKE": Launcher(lambda environment: "," in environment.get("TPU_WORKER_HOSTNAMES", "")),
    "TPU slices": Launcher(_several("MEGASCALE_NUM_SLICES")),
}


def initialize(environment: Mapping[str, str] = os.environ) -> str | None:
    """Joins the other processes, if a launcher started any; call it before JAX is used.

    Args:
      environment: environment variables of this process.

    Returns:
      The launcher, a key of `LAUNCHERS`; None for a single process.

    Raises:
      ValueError: a variable is missing or out of range.
    """
    found = next((name for name, launcher in LAUNCHERS.items() if launcher.started(environment)), None)
    if found is not None:
        jax.distributed.initialize(**LAUNCHERS[found].arguments(environment))
        if not is_first():
            sys.stdout = open(os.devnull, "w")  # until the process ends
    return found


def is_first() -> bool:
    """Whether this is the first process, which writes the files of which there is only one."""
    return jax.process_index() == 0


def data_shard() -> data.Shard:
    """The part of every batch that this process reads."""
    return data.Shard(jax.process_index(), jax.process_count())


def wait_for_all(what: str) -> None:
    """Returns when every process has called it; `what` names the place in the program."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def gather_text(text: str) -> list[str]:
    """The texts of all processes, which have to call it together."""
    if jax.process_count() == 1:
        return [text]
    own = np.frombuffer(text.encode(errors="replace"), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(own))).tolist()
    padded = np.pad(own, (0, max(lengths) - len(own)))
    return [bytes(row[:length]).decode()
            for row, length in zip(multihost_utils.process_allgather(padded), lengths, strict=True)]


def of_first(tree: Tree) -> Tree:
    """The NumPy arrays that the first device holds of replicated ones, on all processes."""
    return multihost_utils.broadcast_one_to_all(jax.tree.map(np.asarray, tree))


def check_same(what: str, value: str) -> None:
    """Raises ValueError, on all processes, unless all of them call it with the same `value` of `what`."""
    first, *others = gather_text(value)
    if wrong := [index for index, other in enumerate(others, start=1) if other != first]:
        raise ValueError(f"{what} of processes {wrong} is not that of process 0, expected the same on all")


def check_shared(folder: Path) -> None:
    """Raises ValueError, on all processes, unless all see a file that the first makes in `folder`."""
    if jax.process_count() == 1:
        return
    file = folder / gather_text(f".shared_{secrets.token_hex(8)}")[0]
    if is_first():
        with suppress(OSError):  # the run itself says why nothing can be written
            folder.mkdir(parents=True, exist_ok=True)
            file.touch()
    wait_for_all("file made")
    try:
        check_same(f"the folder {folder}, which must be the same folder on all hosts,", str(file.exists()))
    finally:
        if is_first():
            file.unlink(missing_ok=True)


# JAX has all processes stop at the number after the largest that any of them has asked about, so that these
# numbers may neither skip any, as steps do where a run resumes, nor start again with the next model.
_questions = itertools.count(1)


class Interruption(NamedTuple):
    """What a run can ask about signals.

    Attributes:
      due: step -> whether to save and stop, the same on all processes; must be called at every step.
      now: whether to abort a long operation, such as evaluation, immediately. Always False with several
        processes, as they would have to agree first.
    """

    due: Callable[[int], bool]
    now: Callable[[], bool] = lambda: False


@contextmanager
def terminable() -> Iterator[None]:
    """`signals.terminable` for a single process; with several, SIGTERM is left to JAX."""
    with signals.terminable() if jax.process_count() == 1 else nullcontext():
        yield


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Context in which SIGINT and SIGTERM are reported by the `Interruption`.

    A single process catches SIGTERM and the first SIGINT; a second SIGINT raises KeyboardInterrupt. With
    several processes SIGINT is not caught, and a scheduler may send SIGTERM to any of them; then all agree on
    the step at which they stop.
    """
    if jax.process_count() > 1:
        yield Interruption(lambda step: multihost_utils.reached_preemption_sync_point(next(_questions)))
        return
    with signals.interruptible() as caught:
        yield Interruption(lambda step: caught(), caught)
