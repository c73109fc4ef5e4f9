"""Does the comparison of `python -m benchmarks` notice a slowdown, and nothing else?

    python -m benchmarks.detection --operations=align,encode,expand,look_up --json=FILE

The library is compared with itself, while half of the operations, drawn anew each time, take 1.3 times as
long in one of the two copies. The command counts the verdicts, for measurements in turns (as with
`--revision`) and for comparisons with the numbers of the previous repeat (as with `--against` and a file that
names its revision).
"""

from collections import Counter
from typing import Any

import numpy as np
from absl import flags
from rich.console import Console

from benchmarks import comparing, measuring, verdicts
from benchmarks.operations import OPERATIONS
from tarq_jax import cli, reporting
from tarq_jax.training import provenance

REPEATS = flags.DEFINE_integer("repeats", 20, "Number of comparisons.", lower_bound=2)
FACTOR = flags.DEFINE_float("factor", 1.3, "Factor by which times are increased.", lower_bound=1.0)
TRIED = flags.DEFINE_list("operations", list(OPERATIONS), "Operations to measure.")
JSON = cli.json_flag()

WORKLOAD, PROCESSES, SECONDS = "config", 3, 0.2


def compare(
    slowed: list[str], before: dict[str, list[float]] | None, machine: dict[str, Any], console: Console,
) -> tuple[dict[str, verdicts.Verdict], dict[str, list[float]]]:
    """Compares the slowed library with the unchanged one.

    Args:
      slowed: names of the operations that are slowed down.
      before: times of the unchanged library from another comparison; None measures all in turns.
      machine: from `comparing.ask_machine`.
      console: where progress is shown.

    Returns:
      Verdicts by program name, and the times of the unchanged library if it was measured in turns.
    """
    keys = [key for key in measuring.keys(cli.names(TRIED, OPERATIONS), [WORKLOAD], ["plain", "xla"])
            if key.direction == "forward"]
    found, judged = comparing.compare(
        keys, comparing.ROOT, before, machine=machine, processes=PROCESSES, seconds=SECONDS,
        console=console, slowdowns=[f"{name}={FACTOR.value}" for name in slowed])
    return judged, comparing.times_of(found.get("old", {}))


def main() -> None:
    """Repeats the comparison and prints the counts."""
    tried = cli.names(TRIED, OPERATIONS)
    rng, console, counts = np.random.default_rng(0), Console(), Counter[tuple[str, str, str]]()
    before, machine = dict[str, list[float]](), comparing.ask_machine(SECONDS)
    for index in range(REPEATS.value):
        slowed = [str(name) for name in rng.choice(tried, len(tried) // 2, replace=False)]
        console.print(f"repeat {index + 1} of {REPEATS.value}, slowed down: {', '.join(slowed)}")
        comparisons = {"in turns": None, "against a file": before} if before else {"in turns": None}
        for how, old in comparisons.items():
            found, times = compare(slowed, old, machine, console)
            before = times or before
            for name, verdict in found.items():
                kind = "slowed" if name.split("/")[0] in slowed else "same"
                counts[how, kind, verdict.word] += 1
                if verdict.word != ("slower" if kind == "slowed" else "same"):
                    ratios = ", ".join(f"{ratio:.2f}" for ratio in verdict.ratios)
                    console.print(f"{how}: {name}, {kind}, is called {verdict.word}: {ratios}")
    rows: list[dict[str, Any]] = [
        {"compared": how, "program": kind, "factor": FACTOR.value if kind == "slowed" else 1.0,
         **{word: counts[how, kind, word] for word in ("slower", "same", "faster")}}
        for how in ("in turns", "against a file") for kind in ("slowed", "same")]
    reporting.print_table(rows, f"{REPEATS.value} comparisons")
    if JSON.value:
        facts = {"device": machine["device"], "revision": provenance.revision(), "operations": tried}
        reporting.write_rows([facts | row for row in rows], JSON.value)


if __name__ == "__main__":
    cli.run(main)
