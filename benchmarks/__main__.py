"""Microbenchmarks of the core's operations: every implementation, in turns, with cost, numbers and verdict.

    python -m benchmarks                                  # all operations at the sizes of a request
    python -m benchmarks encode align --workload=config   # some, at those of a training batch
    python -m benchmarks --json=FILE                      # ... and keep the numbers
    python -m benchmarks --against=FILE                   # is anything slower than then?
    python -m benchmarks --revision=HEAD~1                # ... or than that revision, measured in turns

For each: milliseconds to lower, compile and run (median and interquartile range over all calls in all
processes), times as fast as `plain`, MB of output and temporary memory, the bound that this device sets by
FLOPs of `plain`, bytes of arguments and results, and exponentials, with the share of it that is reached, and
the difference to the numbers of `plain`. See `benchmarks.verdicts` for what is called slower; then the exit
code is 1.
"""

import json
import math
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from rich.console import Console

from benchmarks import comparing, measuring
from benchmarks.machine import Peaks
from benchmarks.measuring import Key
from benchmarks.operations import OPERATIONS
from benchmarks.workloads import WORKLOADS
from tarq_jax import cli, reporting

WORKLOAD = flags.DEFINE_list("workload", ["paper"], f"Of {', '.join(WORKLOADS)}.", allow_override=True)
IMPLEMENTATION = flags.DEFINE_list("implementation", [], "All that run on this device if not given.")
SECONDS = flags.DEFINE_float("seconds", 0.3, "That each is run for in each process.", lower_bound=0.01,
                             allow_override=True)
PROCESSES = flags.DEFINE_integer("processes", 3, "That each is measured in.", lower_bound=1)
AGAINST = flags.DEFINE_string("against", None, "File of an earlier call to compare with.")
REVISION = flags.DEFINE_string("revision", None, "Of this repository, to compare with in turns.")
SLOWDOWN = flags.DEFINE_multi_string(
    "slowdown", [], "OPERATION=FACTOR: pretend that it takes so many times as long, to see it noticed.")
JSON = cli.json_flag()

COLUMNS = ("operation", "workload", "direction", "implementation", "run_ms", "spread_ms", "speedup",
           "peak_mb", "bound_ms", "bound", "roofline_share", "error", "lower_ms", "compile_ms", "note",
           "change", "verdict")


def rows_of(found: Mapping[Key, comparing.Series], peaks: Peaks) -> list[dict[str, Any]]:
    """A row a program, with what it is compared with in the same run."""
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
        if plain and "flops" in plain.described and "bytes" in row:
            cost = plain.described
            bounds = peaks.bounds(cost["flops"], row["bytes"], cost["exponentials"])
            name = max(bounds, key=lambda name: bounds[name])
            row |= {"bound": name.removesuffix("_bound_ms"), "bound_ms": bounds[name]}
            row["roofline_share"] = bounds[name] / row["run_ms"] if "run_ms" in row else math.nan
        rows.append(row)
    return rows


def wrong_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What programs were found wrong beside `plain`, where that runs: a line each."""
    return [f"{_key(row).name} {row.get('note', '')}" for row in rows
            if row.get("error") is not None and not row["error"] <= measuring.WORST]


def earlier(path: str) -> dict[str, list[float]]:
    """Medians by name from a file; a file that is none of this command is a wrong call."""
    try:
        rows = json.loads(Path(path).read_text())
        return {_key(row).name: row["processes_ms"] for row in rows if row.get("processes_ms")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        cli.wrong_call(f"--against={path}: {type(error).__name__}: {error}; expected a file that "
                       "`python -m benchmarks --json=FILE` wrote")


def chosen(words: Sequence[str]) -> list[Key]:
    """What is asked for; unknown names are a wrong call."""
    implementations = {name for operation in OPERATIONS.values() for name in operation.implementations}
    for what, names, known in (("operation", words, OPERATIONS), ("--workload", WORKLOAD.value, WORKLOADS),
                               ("--implementation", IMPLEMENTATION.value, implementations)):
        for name in names:
            if name not in known:
                cli.wrong_call(f"{what} is {name!r}, expected some of {', '.join(sorted(known))}")
    if not IMPLEMENTATION.value and jax.default_backend() == "cpu":
        implementations.discard("pallas")  # interpreted there
    return measuring.keys(list(words) or list(OPERATIONS), WORKLOAD.value,
                          list(IMPLEMENTATION.value or implementations))


def _key(row: Mapping[str, Any]) -> Key:
    return Key(*(row[field] for field in Key._fields))


def main(words: Sequence[str]) -> None:
    """Flags to table."""
    wanted, old, console = chosen(words), earlier(AGAINST.value) if AGAINST.value else {}, Console()
    with tempfile.TemporaryDirectory() as folder:
        trees = {"new": comparing.ROOT}
        if REVISION.value:
            try:
                trees["old"] = comparing.tree_of(REVISION.value, Path(folder))
            except subprocess.CalledProcessError as error:
                cli.wrong_call(f"--revision is {REVISION.value!r}: {error.stderr.decode().strip()}")

        machine = comparing.ask_machine(SECONDS.value)
        found, verdict_of = comparing.compare(
            wanted, trees, old, processes=PROCESSES.value, seconds=SECONDS.value,
            slowdowns=SLOWDOWN.value, console=console)
    rows = rows_of(found["new"], Peaks(*machine["peaks"]))
    for row in rows:
        if verdict := verdict_of.get(_key(row).name):
            row |= {"change": verdict.ratio, "change_low": min(verdict.ratios),
                    "change_high": max(verdict.ratios), "verdict": verdict.word}
    reporting.print_table(rows, machine["device"], COLUMNS)
    if JSON.value:
        reporting.write_rows([{"device": machine["device"]} | row for row in rows], JSON.value)
    wrong = wrong_of(rows)
    slower = [f"slower: {_key(row).name} x {row['change']:.2f}" for row in rows
              if row.get("verdict") == "slower"]
    if wrong or slower:
        raise ValueError("; ".join(wrong + slower))


if __name__ == "__main__":
    cli.run(main, words=True)
