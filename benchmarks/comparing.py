"""Measures programs in separate processes; programs of several revisions take turns."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from benchmarks import verdicts
from benchmarks.measuring import Key
from benchmarks.timing import SHORT
from tarq_jax import reporting

ROOT = Path(__file__).resolve().parents[1]
TURNS = 5  # of each program in each process, unless its time is used up earlier
SAME = "the same program as xla"
LEAST = 4  # calls of a program in a process, whatever its time
EXCLUSIVE = ("tpu",)  # platforms whose devices only one process can use
MEMORY = "XLA_PYTHON_CLIENT_MEM_FRACTION"  # of a GPU that a process takes when it starts


class Series(NamedTuple):
    """The measurements of a program."""

    described: dict[str, Any]
    times: list[list[float]]  # milliseconds of each call, by process

    @property
    def typical(self) -> list[float]:
        """Lower quartile of each process's times, because disturbances only add time."""
        return [float(np.quantile(times, 0.25)) for times in self.times]


class Worker:
    """A `benchmarks.worker` process that runs in a source tree; it ends with the context."""

    def __init__(self, tree: Path, slowdowns: Sequence[str] = ()):
        """Starts the process."""
        environment = {MEMORY: "0.45"} | os.environ | {"PYTHONPATH": str(tree)}  # two may run at a time
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", *slowdowns], cwd=tree, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> "Worker":
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def ask(self, **request: Any) -> dict[str, Any]:
        """The worker's answer to a request; raises OSError if the worker died."""
        if self._process.stdin is None or self._process.stdout is None:
            raise OSError("the worker has no pipes")
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())
        except (BrokenPipeError, ValueError) as error:
            code = self._process.wait()
            raise OSError(f"the process that measures {request} ended with code {code}") from error


def tree_of(revision: str, folder: Path) -> Path:
    """Writes a revision's library with today's benchmarks; raises ValueError if git has no such revision."""
    archive = subprocess.run(["git", "archive", "--format=tar", revision, "tarq_jax"], cwd=ROOT,
                             capture_output=True)
    if archive.returncode:
        raise ValueError(archive.stderr.decode().strip())
    subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks", ignore=shutil.ignore_patterns("results"))
    return folder


def ask_machine(seconds: float) -> dict[str, Any]:
    """Kind, platform and peaks of the device of this machine, whose other devices are not used."""
    with Worker(ROOT) as worker:
        return worker.ask(device=True) | worker.ask(peaks=seconds)


def with_plain(keys: Sequence[Key], names: Sequence[str], running: Collection[str]) -> list[Key]:
    """The keys with these names, and their `plain` versions; if none of these is `running`, all that are."""
    chosen = {key for key in keys if key.name in names}
    plain = {key for key in keys if key.implementation == "plain" and key.name in running}
    beside = {key._replace(implementation="plain") for key in chosen} & plain
    return [key for key in keys if key in chosen | (beside or plain)]


def times_of(found: Mapping[Key, Series]) -> dict[str, list[float]]:
    """The times on which verdicts are based, by program name."""
    return {key.name: series.typical for key, series in found.items() if series.times}


def measure(
    keys: Sequence[Key], trees: Mapping[str, Path], *, machine: Mapping[str, Any], processes: int,
    seconds: float, slowdowns: Sequence[str] = (), console: Console | None = None,
) -> dict[str, dict[Key, Series]]:
    """Measures every program in every tree.

    Programs with the same operation, workload and direction take turns, in all trees; where only one process
    can use a device, processes of the trees take turns instead.

    Args:
      keys: programs to measure.
      trees: folders with `tarq_jax` and `benchmarks`, by name.
      machine: from `ask_machine`.
      processes: number of processes, one after the other; each measures everything.
      seconds: time for each program in each process.
      slowdowns: see `benchmarks.worker`; they apply only to the tree "new".
      console: where progress is shown.

    Returns:
      The measurements by tree name and key.
    """
    found: dict[str, dict[Key, Series]] = {name: {key: Series({}, []) for key in keys} for name in trees}
    groups: dict[tuple[str, ...], list[Key]] = {}
    for key in keys:
        groups.setdefault((key.operation, key.workload, key.direction), []).append(key)
    alone = machine["platform"] in EXCLUSIVE
    together = [{name: tree} for name, tree in trees.items()] if alone else [trees]
    with reporting.progress_bar(console or Console(quiet=True)) as bar:
        task = bar.add_task("measuring", total=processes * len(together) * len(groups), note="")
        for part in processes * together:
            with ExitStack() as stack:
                workers = {name: stack.enter_context(Worker(tree, slowdowns if name == "new" else ()))
                           for name, tree in part.items()}
                _check_devices(workers.values(), machine["device"])
                for group, members in groups.items():
                    bar.update(task, note=" ".join(group))
                    _measure_group(members, workers, seconds, found)
                    bar.advance(task)
    return found


def compare(
    keys: Sequence[Key], old: Path | None, before: verdicts.Times | None = None, *, processes: int,
    **options: Any,
) -> tuple[dict[str, dict[Key, Series]], dict[str, verdicts.Verdict]]:
    """Measures, and measures programs that look different a second time before judging them.

    Args:
      keys: as for `measure`.
      old: tree with which this one is compared; may be None if `before` is given.
      before: its times, measured earlier; then only programs that look different are measured in turns.
      processes: as for `measure`; the second time there are more.
      **options: as for `measure`.

    Returns:
      The first measurements, as from `measure`, and verdicts by program name.
    """
    new, both = {"new": ROOT}, {"new": ROOT} | ({"old": old} if old else {})

    def judge(found):
        times = {name: times_of(programs) for name, programs in found.items()}
        return (verdicts.in_turns(times["new"], times["old"]) if "old" in times
                else verdicts.against(times["new"], before or {}))

    def again(names):
        suspects = [key for key in keys if key.name in names] if old else with_plain(keys, names, running)
        return judge(measure(suspects, both, processes=verdicts.AGAIN * processes, **options))

    found = measure(keys, new if before else both, processes=processes, **options)
    running = times_of(found["new"]).keys() & (before or {}).keys()
    return found, verdicts.settled(judge(found), again)


def not_compared(found: Mapping[str, Mapping[Key, Series]], judged: Collection[str]) -> dict[str, str]:
    """Why programs of the library that ran have no verdict; the arguments are the results of `compare`."""
    return {key.name: found["old"][key].described["note"] if "old" in found else "not in the file"
            for key, series in found["new"].items()
            if series.times and key.implementation != "plain" and key.name not in judged}


def _check_devices(workers: Iterable[Worker], expected: str) -> None:
    """Raises OSError if a worker has another device: JAX takes the CPU if it cannot start a GPU."""
    for worker in workers:
        if (found := worker.ask(device=True)["device"]) != expected:
            raise OSError(f"a process that measures has device {found!r}, expected {expected!r}")


def _measure_group(
    members: Sequence[Key], workers: Mapping[str, Worker], seconds: float,
    found: Mapping[str, dict[Key, Series]],
) -> None:
    """Adds the measurements of one process of each tree to `found`.

    What has the same program as `xla`, such as blocks where it chooses these, is not run again. Programs that
    take long run after the others: they may take gigabytes, which makes the next calls of others slow.
    """
    running = {"short": list[tuple[Key, Worker, list[list[float]]]](), "long": []}
    programs: dict[str, str] = {}
    for key in members:
        longest, entries = 0.0, []
        for name, worker in workers.items():
            described = worker.ask(key=key, may_lack=name == "old")
            longest = max(longest, described.pop("once_ms", 0.0))
            if key.implementation == "xla" and "program" in described:
                programs[name] = described["program"]
            elif programs.get(name) == described.get("program", ""):
                described.pop("error", None)
                described["note"] = SAME
            found[name][key].described.update(described)
            if "error" in described:
                entries.append((key, worker, found[name][key].times))
                found[name][key].times.append([])
        running["long" if longest > 1e3 * SHORT else "short"] += entries
    for part, _ in itertools.product(running.values(), range(TURNS)):
        for key, worker, times in part:
            if sum(times[-1]) < 1e3 * seconds or len(times[-1]) < LEAST:
                times[-1] += worker.ask(key=key, seconds=seconds / TURNS)["times"]
    for worker in workers.values():
        worker.ask(forget=True)
