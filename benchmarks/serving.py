"""What a request costs to serve: latency, memory, time by part, and where target attention is cheaper.

    python -m benchmarks.serving --json=benchmarks/results/serving.json --report=DIR

All methods of `benchmarks.serving_contenders` have the same size and random weights; they run in one process
and are measured in turns. Measured are complete requests through `Scorer` (ids in, the best 500 ids out), and
the parts of `benchmarks.serving_parts` separately. Either the number of candidates or the length of the
history is varied, the other is fixed. Scores are compared with those of the training code before anything is
measured. Percentiles are over `calls` requests. Target attention over all candidates at once is left out if
its logits would take more than a gigabyte. `--quick` runs everything at sizes too small for meaningful
numbers.
"""

import functools
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import track

from benchmarks import serving_claims, serving_parts, serving_report
from benchmarks.machine import Peaks, peaks
from benchmarks.serving_claims import Medians
from benchmarks.serving_contenders import (
    IN_BLOCKS,
    TWO_TOWER,
    WHOLE,
    Contender,
    Sizes,
    load_scorer,
    make_batch,
    make_contenders,
    make_dataset,
    user_stages,
)
from benchmarks.timing import in_turns
from tarq_jax import cli, reporting
from tarq_jax.data import Dataset
from tarq_jax.serving import Scorer
from tarq_jax.serving.index import round_up
from tarq_jax.serving.method import SERVED
from tarq_jax.types import Batch

REPORT = flags.DEFINE_string("report", None, "Folder for a page with figures.",
                             allow_override=True)
QUICK = flags.DEFINE_bool("quick", False, "Tiny sizes, to check that everything runs.",
                          allow_override=True)
SECONDS = flags.DEFINE_float("seconds", 2.0, "Seconds to measure each method at each point.", lower_bound=0)
CANDIDATES = flags.DEFINE_list(
    "candidates", None, "Numbers of candidates; the main one and those for reporting growth are added.")
HISTORIES = flags.DEFINE_list("histories", None, "Lengths of histories; the main one is added.")
JSON = cli.json_flag()

LARGEST = 10**9  # bytes of the logits of target attention over all candidates at once
TOLERANCE = 1e-5  # difference of scores, relative to the largest
QUANTILES = {"latency_p50_ms": 0.5, "latency_p95_ms": 0.95, "latency_p99_ms": 0.99}


class Plan(NamedTuple):
    """What to measure."""

    sizes: Sizes = Sizes()
    candidates: tuple[int, ...] = (1_000, 10_000, 50_000, 100_000)  # at the main history
    histories: tuple[int, ...] = (50, 250, 1_000, 10_000)  # at the main number of candidates
    main: tuple[int, int] = (10_000, 1_000)
    growth: tuple[int, int] = (10_000, 50_000)
    few: int = 512  # candidates at which the item side is measured separately too, for crossovers
    seconds: float = 2.0
    least: int = 9  # calls at least
    top_k: int = 500


SHARED = {"towers": TWO_TOWER, "encoder": IN_BLOCKS}  # parts that are measured once, in that model

TINY = Plan(
    Sizes(items=1_100, width=8, heads=2, hidden=(4,), levels=2, codewords=8, few_codewords=4, features=3),
    candidates=(600, 1_100), histories=(4, 6), main=(600, 6), growth=(600, 1_100), seconds=0.0, least=1,
    top_k=20)


class Bench(NamedTuple):
    """Everything to measure, loaded."""

    plan: Plan
    dataset: Dataset
    contenders: Mapping[str, Contender]
    scorers: Mapping[str, Scorer]

    def has(self, name: str, count: int, length: int) -> bool:
        """Whether to measure a method at a point; `WHOLE` only if memory allows."""
        return name != WHOLE or 4 * self.plan.sizes.heads * count * length <= LARGEST

    def history(self, length: int) -> np.ndarray:
        """Ids of a history."""
        return np.random.default_rng(1).integers(1, self.plan.sizes.items + 1, length)

    def candidates(self, count: int) -> np.ndarray:
        """Ids of candidates, in random order."""
        return np.random.default_rng(2).permutation(self.plan.sizes.items)[:count] + 1

    def slots(self, name: str, count: int) -> np.ndarray:
        """The candidates' slots in the index, ascending as in a request, the last repeated as padding."""
        slots = np.sort(self.scorers[name].index.slots_of(self.candidates(count)))
        return np.pad(slots, (0, round_up(count) - len(slots)), mode="edge")


def load(plan: Plan, folder: Path, console: Console, models: Collection[str] = ()) -> Bench:
    """Makes, exports and loads the named contenders, or all."""
    dataset = make_dataset(plan.sizes)
    contenders = {made.name: made for made in make_contenders(plan.sizes, dataset)
                  if not models or made.name in models}
    scorers = {}
    for number, (name, made) in enumerate(track(contenders.items(), "exporting", console=console)):
        (out := folder / str(number)).mkdir()
        scorers[name] = load_scorer(made, dataset, out, histories=plan.histories, candidates=plan.candidates,
                                    top_k=plan.top_k)
    return Bench(plan, dataset, contenders, scorers)


def check(bench: Bench, name: str) -> float:
    """Largest difference of scores from the training code's, relative to the largest of these.

    Raises:
      ValueError: the difference is not below `TOLERANCE`.
    """
    return difference_of(name, bench.contenders[name].reference, bench.scorers[name], bench.dataset,
                         bench.history(bench.plan.main[1]), bench.candidates(bench.plan.candidates[0]))


def difference_of(
    name: str, reference: Callable[[Batch], jax.Array], scorer: Scorer, dataset: Dataset,
    history: np.ndarray, ids: np.ndarray,
) -> float:
    """As `check`, for one request to a loaded scorer, compared with the training code's logits."""
    found = scorer.score({"history": {"item_id": history}}, ids)
    expected = np.asarray(reference(make_batch(dataset, history, found.ids)))[0]
    difference = float(np.abs(found.scores - expected).max() / np.abs(expected).max())
    if not difference < TOLERANCE:
        raise ValueError(f"{name}: scores differ from the training code's by {difference:.1e} of the "
                         f"largest, expected at most {TOLERANCE:.0e}")
    return difference


def points(plan: Plan) -> list[tuple[int, int]]:
    """(candidates, history): the main point, then the points that vary one of the two."""
    varied = [(count, plan.main[1]) for count in plan.candidates]
    varied += [(plan.main[0], length) for length in plan.histories]
    return list(dict.fromkeys([plan.main, *varied]))


def request_rows(bench: Bench, parts: Sequence[dict[str, Any]], console: Console) -> Iterator[dict[str, Any]]:
    """Latency and memory of complete requests, a row per method and point."""
    for count, length in track(points(bench.plan), "requests", console=console):
        request, ids = {"history": {"item_id": bench.history(length)}}, bench.candidates(count)
        names = [name for name in bench.scorers if bench.has(name, count, length)]
        times = in_turns({name: functools.partial(
            bench.scorers[name].score, request, ids, top_k=bench.plan.top_k) for name in names},
            seconds=bench.plan.seconds, least=bench.plan.least)
        for name, seconds in times.items():
            yield {"kind": "request", "model": name, "candidates": count, "history": length,
                   **latency(seconds), **memory(bench, parts, name, count, length)}


def user_side_parts(contender: Contender) -> list[tuple[str, str]]:
    """(model, part) whose measurements apply to the contender."""
    return [(SHARED.get(part, contender.name), part) for part in user_stages(contender.module, SERVED)]


def memory(bench: Bench, parts: Sequence[dict[str, Any]], name: str, count: int, length: int
           ) -> dict[str, float]:
    """MB of the index, of a user's state, and the largest temporary memory of any part of a request."""
    method = bench.contenders[name].method
    state = serving_parts.state_specs(method, length)
    shared = user_side_parts(bench.contenders[name])
    of_items = length if method.keeps_history else bench.plan.main[1]
    held = [row["temporary_mb"] for row in parts if
            (row["history"] == length and (row["model"], row["part"]) in shared)
            or (row["model"], row["part"], row["candidates"], row["history"]) == (
                name, "items", count, of_items)]
    return {"index_mb": sum(values.nbytes for values in bench.scorers[name].index.arrays.values()) / 1e6,
            "state_mb": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) / 1e6,
            "temporary_mb": max(held)}


def latency(seconds: np.ndarray) -> dict[str, Any]:
    """Percentiles and spread of calls, in ms."""
    lower, upper = np.quantile(seconds, [0.25, 0.75])
    return {column: 1e3 * float(np.quantile(seconds, share)) for column, share in QUANTILES.items()} | {
        "spread_ms": 1e3 * float(upper - lower), "calls": len(seconds)}


def parts_at(bench: Bench, count: int, length: int) -> dict[serving_claims.Part, serving_parts.Part]:
    """The parts to measure separately at a point; parts of the user side have 0 candidates."""
    plan = bench.plan
    found: dict[serving_claims.Part, serving_parts.Part] = {}
    main, at_history = (count, length) == plan.main, count == plan.main[0]
    for name, made in bench.contenders.items():
        if not bench.has(name, count, length):
            continue
        slots = bench.slots(name, count)
        if at_history:
            of_user = ("codebooks", *(part for part, model in SHARED.items() if model == name))
            if made.method.name == "dot":
                of_user += ("personalized",)
            found |= {(name, part, 0, length): value for part, value in serving_parts.user_parts(
                made, length, of_user).items()}
        if length == plan.main[1] or made.method.keeps_history:
            of_items = ("items", "look_ups", "gather") if main else ("items",)
            found |= {(name, part, count, length): value for part, value in serving_parts.item_parts(
                made, bench.scorers[name].index, slots, length, of_items).items()}
    if main:
        found |= {(TWO_TOWER, part, count, length): value
                  for part, value in serving_parts.answer_parts(slots, plan.top_k).items()}
    return found


def part_rows(bench: Bench, roof: Peaks, console: Console) -> Iterator[dict[str, Any]]:
    """Latency and lower bounds of parts, a row per method, part and point."""
    few = (bench.plan.few, bench.plan.main[1])
    for point in track([*points(bench.plan), few], "parts", console=console):
        parts = parts_at(bench, *point)
        times = in_turns({key: part.call for key, part in parts.items()}, seconds=bench.plan.seconds,
                         least=bench.plan.least)
        for (name, part, count, length), seconds in times.items():
            cost = parts[name, part, count, length].cost
            yield {"kind": "part", "model": name, "part": part, "candidates": count, "history": length,
                   **latency(seconds), **roof.bounds(cost.flops, cost.bytes, cost.exponentials),
                   "mflop": cost.flops / 1e6, "moved_mb": cost.bytes / 1e6,
                   "temporary_mb": cost.temporary / 1e6}
        del parts


def breakdown(bench: Bench, found: Medians, name: str) -> dict[str, Any]:
    """Where the time of a request goes, in ms: medians of parts, and the remaining time of the request.

    The time of the head is that of the item side minus that of its look-ups.
    """
    candidates, history = found.main

    def part(model: str, part: str, count: int = candidates) -> float:
        return found.parts.get((model, part, count, history), 0.0)

    items, look_ups = part(name, "items"), part(name, "look_ups")
    spent = {label: part(model, label, 0) for model, label in user_side_parts(bench.contenders[name])} | {
        "gather": part(name, "gather"), "look_ups": min(look_ups, items), "head": max(items - look_ups, 0.0),
        "top_k": part(TWO_TOWER, "top_k"), "transfer": part(TWO_TOWER, "transfer")}
    total = found.requests[name, candidates, history]
    return {"kind": "breakdown", "model": name, "candidates": candidates, "history": history} | {
        f"{label}_ms": value for label, value in spent.items()} | {
        "other_ms": total - sum(spent.values()), "request_ms": total}


def medians(rows: Sequence[dict[str, Any]], plan: Plan) -> Medians:
    """The medians of the measured rows, by part and by request."""
    parts = {(row["model"], row["part"], row["candidates"], row["history"]): row["latency_p50_ms"]
             for row in rows if row["kind"] == "part"}
    requests = {(row["model"], row["candidates"], row["history"]): row["latency_p50_ms"]
                for row in rows if row["kind"] == "request"}
    return Medians(parts, requests, tuple(sorted({plan.few, *plan.candidates})), plan.main)


def run(plan: Plan, console: Console) -> list[dict[str, Any]]:
    """All rows: `kind` is machine, check, part, request, breakdown, ratio or crossover."""
    roof = peaks(plan.seconds / 2)
    load_average = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        bench = load(plan, Path(folder), console)
        rows = [{"kind": "machine", "cores": os.cpu_count(), "load": load_average,
                 "gflop_per_second": roof.flops / 1e9, "gb_per_second": roof.bytes / 1e9,
                 "gexp_per_second": roof.exponentials / 1e9}]
        rows += [{"kind": "check", "model": name, "difference": check(bench, name)}
                 for name in track(bench.contenders, "checking", console=console)]
        parts = list(part_rows(bench, roof, console))
        rows += [*parts, *request_rows(bench, parts, console)]
    found = medians(rows, plan)
    rows += [breakdown(bench, found, name) for name in bench.contenders]
    rows += serving_claims.against_target_attention(found, plan.sizes)
    rows += serving_claims.further_ratios(found, plan.sizes, plan.growth)
    rows += serving_claims.crossovers(found, [
        name for name in bench.contenders if name not in (IN_BLOCKS, WHOLE)])
    return rows


def print_tables(rows: Sequence[dict[str, Any]], plan: Plan) -> None:
    """Prints a table per kind of row, of parts only those at the main point; requests come last."""
    titles = {"machine": "this machine at best", "check": "scores against the training code's",
              "breakdown": "where the time of a request goes, ms", "ratio": "ratios and targets",
              "crossover": "candidates under which target attention does less work",
              "part": "parts, with bounds", "request": "whole requests"}
    for kind, title in titles.items():
        shown = serving_report.of_kind(rows, kind)
        if kind == "part":
            shown = [row for row in shown if row["candidates"] in (0, plan.main[0])
                     and row["history"] == plan.main[1]]
        reporting.print_table(shown, title)


def numbers(flag: flags.FlagHolder, default: tuple[int, ...]) -> tuple[int, ...]:
    """The numbers of a list flag, which may be empty; the default if it is not given."""
    if flag.value is None:
        return default
    return tuple(cli.whole_numbers(flag, "positive whole numbers")) if flag.value else ()


def main() -> None:
    """Measures what the flags ask for, prints the tables and writes the page."""
    plan = TINY if QUICK.value else Plan(seconds=SECONDS.value)
    candidates, histories = numbers(CANDIDATES, plan.candidates), numbers(HISTORIES, plan.histories)
    plan = plan._replace(candidates=tuple(sorted({*candidates, plan.main[0], *plan.growth})),
                         histories=tuple(sorted({*histories, plan.main[1]})))
    if plan.candidates[-1] > plan.sizes.items:
        cli.wrong_call(f"--candidates has {plan.candidates[-1]}, expected at most {plan.sizes.items}, the "
                       "number of items")
    rows = run(plan, Console(stderr=True))
    print_tables(rows, plan)
    if JSON.value:
        reporting.write_rows(rows, JSON.value)
    if REPORT.value:
        serving_report.write(rows, plan.main, Path(REPORT.value))


if __name__ == "__main__":
    cli.run(main)
