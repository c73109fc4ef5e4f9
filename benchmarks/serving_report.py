"""The page of `benchmarks.serving`: figures and tables, made only from its rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tarq_jax.experiments import plots
from tarq_jax.experiments.page import Section, render

Rows = Sequence[Mapping[str, Any]]

PARTS = ("towers", "encoder", "codebooks", "gather", "look_ups", "head", "top_k", "transfer", "other")
FILES = {"serving_candidates.png": "latency by candidates", "serving_history.png": "latency by history",
         "serving_parts.png": "where time goes"}


def write(rows: Rows, main: tuple[int, int], folder: Path) -> None:
    """Writes `serving.html`, which needs no other file, and the figures as PNGs."""
    candidates, history = main
    images = [plots.png(figure) for figure in (
        work_figure(rows, history), request_figure(rows, candidates), parts_figure(rows))]
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in zip(FILES, images, strict=True):
        (folder / name).write_bytes(image)
    captions = (
        f"Codebooks, look-ups and head alone, by candidates; history {history:,}.",
        f"Whole requests by length of history; {candidates:,} candidates.",
        f"Medians of parts of a request; {candidates:,} candidates, history {history:,}.")
    sections = [Section("Ratios", rows=of_kind(rows, "ratio", (
        "what", "against", "ratio", "target", "verdict", "request_ratio")))]
    sections += [Section(title, image=image, caption=caption)
                 for title, image, caption in zip(FILES.values(), images, captions, strict=True)]
    sections += [
        Section("Where target attention does less work", rows=of_kind(rows, "crossover", (
            "against", "candidates"))),
        Section("Requests", rows=of_kind(rows, "request")),
        Section("Parts, with bounds", rows=of_kind(rows, "part")),
        Section("Machine", rows=of_kind(rows, "machine")),
    ]
    (folder / "serving.html").write_text(render("What a request costs to serve", sections))


def of_kind(rows: Rows, kind: str, columns: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Rows of a kind; if columns are given, only `model` and these."""
    found = [row for row in rows if row["kind"] == kind]
    if columns:
        return [{key: "-" if row.get(key) is None else row[key] for key in ("model", *columns)}
                for row in found]
    return [{key: value for key, value in row.items() if key != "kind"} for row in found]


def work_figure(rows: Rows, history: int) -> Figure:
    """A line per method: time of codebooks and item side by number of candidates."""
    codebooks = {row["model"]: row["latency_p50_ms"] for row in rows
                 if row["kind"] == "part" and row["part"] == "codebooks" and row["history"] == history}
    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["kind"] == "part" and row["part"] == "items" and row["history"] == history:
            lines.setdefault(row["model"], {})[row["candidates"]] = (
                row["latency_p50_ms"] + codebooks.get(row["model"], 0.0))
    return plots.times_by_size(lines, "candidates")


def request_figure(rows: Rows, candidates: int) -> Figure:
    """A line per method: time of complete requests by length of the history."""
    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["kind"] == "request" and row["candidates"] == candidates:
            lines.setdefault(row["model"], {})[row["history"]] = row["latency_p50_ms"]
    return plots.times_by_size({name: line for name, line in lines.items() if len(line) > 1}, "history")


def parts_figure(rows: Rows) -> Figure:
    """A bar per method, with its parts stacked."""
    return plots.stacked({row["model"]: {part: row.get(f"{part}_ms", 0.0) for part in PARTS}
                          for row in rows if row["kind"] == "breakdown"}, "ms")
