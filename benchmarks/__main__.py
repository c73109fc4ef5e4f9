"""Microbenchmarks of the core's operations: times, costs, numerical errors and verdicts.

    python -m benchmarks                                  # all operations at the sizes of a request
    python -m benchmarks encode align --workload=config   # some, at those of a training batch
    python -m benchmarks --json=FILE                      # ... and write the numbers to a file
    python -m benchmarks --against=FILE                   # is anything slower than in that file?
    python -m benchmarks --revision=HEAD~1                # ... or than in that revision, measured in turns

The implementations are measured in turns, those that take more than a quarter of a second after the others.
Each row gives the milliseconds to lower, compile and run (median and interquartile range over all calls in
all processes), the speed-up over `plain`, MB of output and temporary memory, the lower bound on this device,
the share of that bound that is reached, and the difference from the numbers of `plain`. The bound is from the
least FLOPs and exponentials of any form without loops, and from the bytes of arguments and results.

`benchmarks.verdicts` defines when a program is called slower; the exit code is then 1. Programs that could
not be compared are listed. What seems to differ from a file is measured in turns with the revision that the
file names, if the library had no changes then; so the file may be of another day.
"""

import json
import math
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from rich.console import Console

from benchmarks import comparing, measuring
from benchmarks.machine import Peaks, highest
from benchmarks.measuring import Key
from benchmarks.operations import OPERATIONS
from benchmarks.workloads import WORKLOADS
from tarq_jax import cli, reporting
from tarq_jax.training import provenance

WORKLOAD = flags.DEFINE_list("workload", ["paper"], f"Some of {', '.join(WORKLOADS)}.", allow_override=True)
IMPLEMENTATION = flags.DEFINE_list("implementation", [], "Default: all, without kernels on a CPU.")
SECONDS = flags.DEFINE_float("seconds", 0.3, "Seconds to run each program in each process.", lower_bound=0.01,
                             allow_override=True)
PROCESSES = flags.DEFINE_integer("processes", 3, "Processes that measure each program.", lower_bound=1)
AGAINST = flags.DEFINE_string("against", None, "JSON file of an earlier call to compare with.")
REVISION = flags.DEFINE_string("revision", None, "Revision of this repository to compare with, in turns.")
SLOWDOWN = flags.DEFINE_multi_string(
    "slowdown", [], "OPERATION=FACTOR: slow the operation down by FACTOR, to check that it is noticed.")
JSON = cli.json_flag()

COLUMNS = ("operation", "workload", "direction", "implementation", "run_ms", "spread_ms", "speedup",
           "peak_mb", "bound_ms", "bound", "roofline_share", "error", "lower_ms", "compile_ms", "note",
           "change", "verdict")


def rows_of(found: Mapping[Key, comparing.Series], peaks: Peaks) -> list[dict[str, Any]]:
    """A row per program, with its comparison to `plain` in the same run."""
    rows = []
    for key, series in found.items():
        row = key._asdict() | dict(series.described)
        plain = found.get(key._replace(implementation="plain"))
        if series.times:
            times = np.concatenate(series.times)
            row["run_ms"], row["calls"] = float(np.median(times)), len(times)
            row["spread_ms"] = float(np.subtract(*np.quantile(times, [0.75, 0.25])))
            row["processes_ms"] = series.typical
            if plain and plain.times:
                row["speedup"] = float(np.median(np.concatenate(plain.times))) / row["run_ms"]
        cost = measuring.least(found[form].described for form in measuring.counted(key) if form in found)
        if len(cost) == 2 and "bytes" in row:
            row |= highest(peaks.bounds(moved=row["bytes"], **cost))
            if "run_ms" in row:
                row["roofline_share"] = row["bound_ms"] / row["run_ms"]
        rows.append(row)
    return rows


def wrong_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each program that failed, or whose numbers differ too much from those of `plain`."""
    return [f"{_key(row).name} {row.get('note', '')}" for row in rows if row.get("failed") or (
        row.get("error") is not None and not row["error"] <= measuring.WORST)]


class Earlier(NamedTuple):
    """What a file of an earlier call says."""

    times: dict[str, list[float]]  # of each process, by program name
    device: str | None
    revision: str | None  # of the library; see `tarq_jax.training.provenance`


def earlier(path: str) -> Earlier:
    """Reads a file; if this command did not write it, a wrong call."""
    try:
        rows = json.loads(Path(path).read_text())
        times = {_key(row).name: row["processes_ms"] for row in rows if row.get("processes_ms")}
        facts = rows[0] if rows else {}
        return Earlier(times, facts.get("device"), facts.get("revision"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        cli.wrong_call(f"--against={path}: {type(error).__name__}: {error}; expected a file that "
                       "`python -m benchmarks --json=FILE` wrote")


def comparable(wanted: Sequence[Key]) -> Earlier:
    """What the file of `--against` says, if it is given; too few times for a verdict are a wrong call."""
    if AGAINST.value is None:
        return Earlier({}, None, None)
    if REVISION.value:
        cli.wrong_call(f"--against is {AGAINST.value!r} and --revision is {REVISION.value!r}, expected one")
    found = earlier(AGAINST.value)
    plain = [key.implementation == "plain" for key in wanted if key.name in found.times]
    if all(plain) or not any(plain):
        cli.wrong_call(f"--against={AGAINST.value} has times of {sum(plain)} `plain` and "
                       f"{len(plain) - sum(plain)} other programs that are asked for, expected some of both: "
                       "`plain` ones tell the speed of the machine")
    return found


def tree_to_compare(old: Earlier, folder: Path) -> Path | None:
    """The tree of `--revision` or of the file, in `folder`; None if the file's cannot be had."""
    revision = REVISION.value or old.revision
    if not revision:
        return None
    try:
        return comparing.tree_of(revision, folder)
    except (OSError, ValueError) as error:  # no git, or no such revision
        if REVISION.value:
            cli.wrong_call(f"--revision is {revision!r}: {error}")
        return None


def is_slowdown(text: str, operations: Collection[str]) -> bool:
    """Whether the text is OPERATION=FACTOR, with one of the operations and a finite factor of at least 1."""
    name, _, factor = text.partition("=")
    try:
        return name in operations and 1.0 <= float(factor) < math.inf
    except ValueError:
        return False


def chosen(words: Sequence[str]) -> list[Key]:
    """The programs that the command line asks for; unknown names and wrong slowdowns are a wrong call."""
    implementations = {name for operation in OPERATIONS.values() for name in operation.implementations}
    operations = list(dict.fromkeys(words)) or list(OPERATIONS)
    workloads = cli.names(WORKLOAD, WORKLOADS)
    for name in operations:
        if name not in OPERATIONS:
            cli.wrong_call(f"operation is {name!r}, expected some of {', '.join(sorted(OPERATIONS))}")
    if IMPLEMENTATION.value:
        implementations = set(cli.names(IMPLEMENTATION, implementations))
    for text in SLOWDOWN.value:
        if not is_slowdown(text, operations):
            cli.wrong_call(f"--slowdown is {text!r}, expected OPERATION=FACTOR with one of "
                           f"{', '.join(sorted(operations))} and a factor of at least 1")
    if not (found := measuring.keys(operations, workloads, list(implementations))):
        cli.wrong_call(f"--implementation is {','.join(IMPLEMENTATION.value)!r}, expected some that "
                       f"{', '.join(operations)} has")
    return found


def _key(row: Mapping[str, Any]) -> Key:
    return Key(*(row[field] for field in Key._fields))


def main(words: Sequence[str]) -> None:
    """Measures what the flags ask for and prints the table."""
    wanted, console = chosen(words), Console()
    old = comparable(wanted)
    with tempfile.TemporaryDirectory() as folder:
        other = tree_to_compare(old, Path(folder))
        if old.times and other is None:
            console.print(f"revision {old.revision} of {AGAINST.value} cannot be measured again: verdicts "
                          "are by the file alone", soft_wrap=True, markup=False, highlight=False)
        machine = comparing.ask_machine(SECONDS.value)
        if old.device not in (None, machine["device"]):
            cli.wrong_call(f"--against={AGAINST.value} is of device {old.device!r}, expected "
                           f"{machine['device']!r}")
        if machine["platform"] == "cpu" and not IMPLEMENTATION.value:  # kernels would be interpreted
            wanted = [key for key in wanted if key.implementation != "pallas"]
        options: dict[str, Any] = {
            "machine": machine, "processes": PROCESSES.value, "seconds": SECONDS.value,
            "slowdowns": SLOWDOWN.value, "console": console}
        if other or old.times:
            found, verdict_of = comparing.compare(wanted, other, old.times, **options)
        else:
            found, verdict_of = comparing.measure(wanted, {"new": comparing.ROOT}, **options), {}
    rows = rows_of(found["new"], Peaks(*machine["peaks"]))
    for row in rows:
        if verdict := verdict_of.get(_key(row).name):
            row |= {"change": verdict.ratio, "change_low": min(verdict.ratios),
                    "change_high": max(verdict.ratios), "verdict": verdict.word}
    reporting.print_table(rows, machine["device"], COLUMNS)
    if JSON.value:
        facts = {"device": machine["device"], "revision": provenance.revision()}
        reporting.write_rows([facts | row for row in rows], JSON.value)
    wrong = wrong_of(rows)
    if old.times or REVISION.value:
        for name, reason in comparing.not_compared(found, verdict_of).items():
            console.print(f"not compared: {name}: {reason}", soft_wrap=True, markup=False, highlight=False)
        if not verdict_of:
            wrong.append("no program could be compared")
    slower = [f"slower: {_key(row).name} x {row['change']:.2f}" for row in rows
              if row.get("verdict") == "slower"]
    if wrong or slower:
        raise ValueError("; ".join(wrong + slower))


if __name__ == "__main__":
    cli.run(main, words=True)
