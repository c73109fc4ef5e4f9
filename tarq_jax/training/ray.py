"""Starts a Python command in several processes on a Ray cluster, one on each machine with the resources.

    pip install -e '.[ray]'
    python -m tarq_jax.training.ray --processes=4 --gpus=8 -- train.py --config=C --workdir=W

The processes find each other, see `tarq_jax.training.distributed`. They run in this command's folder, which
all machines must see, with the variables that Ray gives them. RAY_ADDRESS names the cluster; without it, Ray
takes one that runs on this machine, or starts one. SIGINT and SIGTERM let the processes save and end. The
exit code is 0 if all processes ended with 0, 75 if they were interrupted, and else 1.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from absl import flags
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tarq_jax import cli, signals

PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes.", required=True, lower_bound=1)
CPUS = flags.DEFINE_float("cpus", 1.0, "CPUs that Ray reserves for each process.", lower_bound=0.0)
GPUS = flags.DEFINE_float("gpus", 0.0, "GPUs of each process.", lower_bound=0.0)
TPUS = flags.DEFINE_float("tpus", 0.0, "TPU chips of each process.", lower_bound=0.0)
TOGETHER = flags.DEFINE_bool("together", False, "Machines may get several of the processes.")
SECONDS = flags.DEFINE_float("wait_seconds", 60.0, "How long to wait for the resources; give a cluster that "
                             "grows on demand more.", lower_bound=0.0)

POLL = 0.5  # seconds


class Process:
    """A process on the machine where Ray places it."""

    def __init__(self):
        """Starts nothing."""
        self._child: subprocess.Popen | None = None
        self._told = False

    def address(self) -> str:
        """This machine's address with a free port."""
        with socket.create_server(("", 0)) as free:
            return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def run(self, arguments: Sequence[str], folder: str, variables: Mapping[str, str]) -> int:
        """Runs Python with the arguments in the folder; returns its exit code.

        A process that SIGTERM reaches before it can catch it counts as interrupted: it has nothing to save.
        """
        self._child = subprocess.Popen([sys.executable, *arguments], cwd=folder, env=os.environ | variables)
        if self._told:
            self._child.terminate()
        code = self._child.wait()
        return cli.INTERRUPTED if self._told and code == -signal.SIGTERM else code

    def terminate(self) -> None:
        """Sends SIGTERM to the process, or will as soon as it runs."""
        self._told = True
        if self._child is not None:
            self._child.terminate()


def start(number: int, resources: Mapping[str, float], *, together: bool, seconds: float) -> list:
    """Actors of `Process`, once Ray has resources for all; each has its own machine unless `together`.

    Raises:
      ValueError: the cluster had not all of them within `seconds`.
    """
    group = placement_group([dict(resources)] * number, strategy="SPREAD" if together else "STRICT_SPREAD")
    if not ray.wait([group.ready()], timeout=seconds)[0]:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        have = [{name: machine.get(name, 0.0) for name in resources} for machine in machines]
        raise ValueError(f"no place for {number} processes with {dict(resources)} each"
                         f"{'' if together else ', on as many machines,'} within {seconds:g} seconds; the "
                         f"machines have {have}, used or not; see --together and --wait_seconds")
    custom = {name: each for name, each in resources.items() if name not in ("CPU", "GPU")}
    actor: Any = ray.remote(max_concurrency=2)(Process)  # `terminate` is called while the process runs
    return [actor.options(
        num_cpus=resources.get("CPU", 0), num_gpus=resources.get("GPU", 0), resources=custom,
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
    ).remote() for index in range(number)]


def wait(processes: Sequence, arguments: Sequence[str], folder: str) -> list[int]:
    """Runs the command in all processes; returns their exit codes."""
    address = ray.get(processes[0].address.remote())
    variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(len(processes))}
    codes = [process.run.remote(arguments, folder, variables | {"JAX_PROCESS_ID": str(index)})
             for index, process in enumerate(processes)]
    with signals.interruptible() as caught:
        told = False
        while len(ray.wait(codes, num_returns=len(codes), timeout=POLL)[0]) < len(codes):
            if caught() and not told:
                told = True
                ray.get([process.terminate.remote() for process in processes])
        return ray.get(codes)


def main(arguments: Sequence[str]) -> None:
    """Reads the flags, starts the processes and waits for them."""
    if not arguments:
        cli.wrong_call("no command is given, expected one as `-- train.py --config=C --workdir=W`")
    wanted = {"CPU": CPUS.value, "GPU": GPUS.value, "TPU": TPUS.value}
    try:
        ray.init(include_dashboard=False)
        processes = start(PROCESSES.value, {name: each for name, each in wanted.items() if each},
                          together=TOGETHER.value, seconds=SECONDS.value)
        codes = wait(processes, arguments, os.getcwd())
    except ray.exceptions.RayError as error:
        raise ValueError(f"Ray: {error}") from None
    if cli.INTERRUPTED in codes and set(codes) <= {0, cli.INTERRUPTED}:
        raise cli.Interrupted(f"{codes.count(cli.INTERRUPTED)} of {len(codes)} processes were interrupted; "
                              "run it again to resume")
    if any(codes):
        raise ValueError(f"the processes ended with the exit codes {codes}, expected 0 of each")


if __name__ == "__main__":
    cli.run(main, words=True)
