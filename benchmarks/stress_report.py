"""Results of a stress test: claims and the page of `benchmarks.stress`, made only from its rows."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.serving_report import Rows, of_kind
from tarq_jax.experiments import plots
from tarq_jax.experiments.page import Section, render
from tarq_jax.serving.http.options import Options

WARM, SATURATED = "warming up", "as much as it answers"  # names of stages
ALONE, AFTERWARDS = "one at a time", "one at a time, after all that"
RAMP, HELD, KILLED = "ramp", "held, with swaps and bad requests", "killed and started again"
DELAY_MS = 1e3 * Options.delay  # of micro-batching, by default
REFUSED, BUSY = "refused", "status 503"  # beginnings of outcomes of bad requests that are as they should be
SAMPLED = 0.5  # seconds between samples of memory
GROWTH = 1.05  # largest allowed growth of memory from the first to the last third of some stages
FILE = "stress.png"


def claims(model: str, rows: Rows) -> Iterator[dict[str, Any]]:
    """The claims about one service: for each a value, its upper bound if there is one, and the verdict."""
    def kind(name: str, **wanted: Any) -> list[Mapping[str, Any]]:
        return [row for row in rows if row["kind"] == name and wanted.items() <= row.items()]

    def claim(what: str, value: float, most: float | None = None) -> dict[str, Any]:
        verdict = None if most is None else "met" if value <= most else "missed"
        return {"kind": "claim", "model": model, "what": what, "value": value, "most": most,
                "verdict": verdict}

    stages = kind("stage")
    alone, afterwards = (next(row for row in stages if row["stage"] == name) for name in (ALONE, AFTERWARDS))
    twice = kind("stage", stage=RAMP)[-1]
    bound = 2 * alone["latency_p99_ms"] + DELAY_MS
    yield claim("p99 of answers under twice the load, ms", twice["latency_p99_ms"], bound)
    first = kind("second", second=twice["second"])[0]
    yield claim("p99 of answers in its first second, ms", first["latency_p99_ms"])
    yield claim("requests lost, but while killed",
                sum(row["errors"] for row in stages if row["stage"] != KILLED), 0)
    for what, of in (("swap", "swaps that did not end as they should"),
                     ("hostile", "bad requests that were not refused by name")):
        yield claim(of, sum(not row["fine"] for row in kind("event", what=what)), 0)
    for begin, of in ((REFUSED, "bad requests read and refused by name"),
                      (BUSY, "bad requests told 503 instead")):
        yield claim(of, sum(row["outcome"].startswith(begin) for row in kind("event", what="hostile")))
    ramp, held = (memory_by_third(rows, kind("stage", stage=name)) for name in (RAMP, HELD))
    swaps, before = kind("event", what="swap"), median_mb(ramp[2])
    between = [[row for row in third if not _in_swap(row, swaps)] for third in held]
    swapping = [row["memory_mb"] for third in held for row in third if _in_swap(row, swaps)]
    yield claim("growth of memory while load rises", before / median_mb(ramp[0]), GROWTH)
    yield claim("growth of memory by the first swaps", median_mb(between[0]) / before)
    yield claim("growth of memory while held, between swaps", median_mb(between[2]) / median_mb(between[0]),
                GROWTH)
    yield claim("most memory in swaps, over that before", max(swapping, default=np.nan) / before)
    yield claim("seconds from the kill until ready", kind("event", what="kill")[0]["seconds"])
    yield claim("requests lost while killed", kind("stage", stage=KILLED)[0]["errors"])
    most = max(row["answered_per_second"] for row in stages if row["stage"] in (SATURATED, RAMP))
    yield claim("answers a second at best", most)
    yield claim("twice the load over them", twice["rate"] / most)
    yield claim("share of them under twice the load", twice["answered_per_second"] / most)
    yield claim("p50 one at a time, afterwards over before",
                afterwards["latency_p50_ms"] / alone["latency_p50_ms"])


def memory_by_third(rows: Rows, stages: Rows) -> list[list[Mapping[str, Any]]]:
    """The samples of memory in each third of consecutive stages."""
    begin, end = stages[0]["second"], stages[-1]["second"] + stages[-1]["seconds"]
    thirds: list[list[Mapping[str, Any]]] = [[], [], []]
    for row in rows:
        place = (row["second"] - begin) / (end - begin) if row["kind"] == "memory" else -1.0
        if 0 <= place < 1 and np.isfinite(row["memory_mb"]):
            thirds[int(3 * place)].append(row)
    return thirds


def median_mb(samples: Rows) -> float:
    """Median memory in MB; NaN without samples."""
    return float(np.median([row["memory_mb"] for row in samples])) if samples else np.nan


def _in_swap(sample: Mapping[str, Any], swaps: Rows) -> bool:
    """Whether a version was being loaded, or may have been between two samples."""
    return any(0 <= sample["second"] - swap["second"] <= swap["seconds"] + SAMPLED for swap in swaps)


def write(rows: Rows, folder: Path) -> None:
    """Writes `stress.html`, which needs no other file, and its figure as a PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    image = plots.png(figure(rows))
    (folder / FILE).write_bytes(image)
    odd = [row for row in of_kind(rows, "event") if not row["fine"] or row["what"] != "hostile"]
    (folder / "stress.html").write_text(render("Services under more load than they hold", [
        Section("What has to hold", rows=of_kind(rows, "claim")),
        Section("Over time", image=image, caption="Latency of answers, outcomes a second, and memory of the "
                "process; a column a service. Dotted: another version takes over; solid: killed."),
        Section("Stages", rows=of_kind(rows, "stage", (
            "stage", "share", "rate", "sent", "answered", "rejected", "errors", "latency_p50_ms",
            "latency_p99_ms", "rejected_p99_ms", "late_p99_ms"))),
        Section("Swaps, kills and what was not refused", rows=odd),
        Section("Machine", rows=of_kind(rows, "machine")),
    ]))


def figure(rows: Rows) -> Figure:
    """A column per service: latency, outcomes and memory by second."""
    columns: dict[str, dict[str, dict[str, plots.Line]]] = {}
    marks: dict[str, dict[str, list[float]]] = {}
    for model in dict.fromkeys(row["model"] for row in rows if row["kind"] == "stage"):
        own = [row for row in rows if row.get("model") == model]

        def line(kind: str, column: str, own: Rows = own) -> plots.Line:
            found = [(row["second"], row[column]) for row in own
                     if row["kind"] == kind and row[column] is not None]
            return [x for x, _ in found], [y for _, y in found]

        columns[model] = {
            "latency, ms": {name: line("second", f"latency_{name}_ms") for name in ("p50", "p99")},
            "requests a second": {name: line("second", name) for name in ("answered", "rejected", "errors")},
            "memory, MB": {"resident": line("memory", "memory_mb")}}
        marks[model] = {what: [row["second"] for row in own if row["kind"] == "event" and row["what"] == what]
                        for what in ("swap", "kill")}
    return plots.timelines(columns, marks)
