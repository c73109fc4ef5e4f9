"""The tables of pages that show result files, made from these files.

    python -m benchmarks.tables

A page marks the place of a table by `<!-- table NAME -->` and `<!-- end -->`; lines of a table between them
are replaced. A test compares the pages with the files.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import serving_report, stress_report
from benchmarks.comparing import ROOT
from benchmarks.serving_contenders import IN_BLOCKS, WHOLE
from tarq_jax import cli, reporting
from tarq_jax.experiments.page import markdown_table

RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", RESULTS / "README.md", ROOT / "docs" / "kernels.md")
STUDIES = {"synthetic": "synthetic", "MovieLens-100K": "movielens_100k", "LastFM": "lastfm"}
PARTS = {"no_teacher": "teacher without a loss of its own",
         "gradient_to_teacher": "student's gradient reaches the teacher",
         "head_scalar": "head `scalar` instead of `mlp`",
         "head_dot": "head `dot` instead of `mlp`",
         "codewords_16": "K=16 instead of 64",
         "order_0": "look-ups of order 0 (the paper's) instead of 1",
         "no_guidance": "neither distillation nor output reconstruction",
         "random_codebook": "random instead of k-means initialisation",
         "no_revival": "no revival",
         "learned_by_gradient": "codewords learned by gradient instead of EMA",
         "target_attention": "full target attention"}
PLACE = re.compile(r"(?<=<!-- table )(\w+)( -->\n)(?:\n|\|.*\n)*(?=<!-- end -->)")

Row = Mapping[str, Any]


@functools.cache
def read(name: str) -> list[Row]:
    """The rows of a result file; several tables show the same file."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def short(value: float | None) -> str:
    """A number of about three digits; `-` for None.

    Example:
      >>> [short(value) for value in (0.123, 1.234, 12.34, 123.4, 1234.5, None)]
      ['0.12', '1.2', '12.3', '123', '1,234', '-']
    """
    if value is None:
        return "-"
    return f"{value:,.{0 if abs(value) >= 100 else 1 if abs(value) >= 1 else 2}f}"


def quantization() -> list[str]:
    """Error and time of ours and of the peers, by number of latents and beam."""
    found = {(row["latents"], row["beam"], row["model"]): row for row in read("quantization")}
    peers = ("faiss", "faiss, refined", "vector-quantize-pytorch")
    timed = ("faiss", "faiss, refined, LUT", "vector-quantize-pytorch")
    rows = []
    for latents, beam in dict.fromkeys(key[:2] for key in found):
        own = found[latents, beam, "tarq_jax, refined"]
        rows.append([f"{latents:,}", str(beam), *(f"{row['quantization_error']:.3f}" for row in (
            own, *(found[latents, beam, name] for name in peers))), short(1e3 * own["encode_seconds"]),
            *(f"x {short(found[latents, beam, name]['ratio'])}" for name in timed),
            f"{own['temporary_mb']:.0f} MB"])
    return markdown_table(
        ["latents", "beam", "error: ours", *peers, "time: ours, ms", "faiss", "faiss with its table",
         "vector-quantize-pytorch", "our temporary memory"], rows)


def training_step() -> list[str]:
    """Time of a step, examples per second, and time over ours, by order."""
    rows = read("training_step")
    found = {(row["config"], row["model"]): row for row in rows}

    def cells(row: Row) -> list[str]:
        return [f"{row['step_ms']:.1f} ± {row['step_spread_ms'] / 2:.1f}",
                f"{row['examples_per_second']:,.0f}", f"x {row['ratio']:.2f}"]

    return markdown_table(
        ["model", *(column for order in (1, 0) for column in (
            f"order {order}, ms", "examples/s", "time over ours"))],
        [[model, *cells(found["order 1", model]), *cells(found["order 0", model])]
         for model in dict.fromkeys(row["model"] for row in rows)])


def serving_ratios() -> list[str]:
    """How many times faster than either form of target attention."""
    found = [row for row in serving_report.of_kind(read("serving"), "ratio")
             if row["against"] in (IN_BLOCKS, WHOLE)]
    rows = []
    for model, what in dict.fromkeys((row["model"], row["what"]) for row in found):
        pair = [next(row for row in found if (row["model"], row["what"], row["against"]) == (
            model, what, against)) for against in (IN_BLOCKS, WHOLE)]
        target = pair[0]["target"]
        rows.append([model, what, target.replace(">=", "at least") if target else "-",
                     *(_judged(row) for row in pair),
                     " / ".join(f"{row['request_ratio']:.1f}" for row in pair)])
    return markdown_table(["method", "measured part", "target", "in blocks", "whole",
                     "complete request, in blocks / whole"], rows)


def _judged(row: Row) -> str:
    digits = 1 if row["target"] is None or ">=" in row["target"] else 2
    return f"{row['ratio']:.{digits}f}" + (f", {row['verdict']}" if row["verdict"] else "")


def serving_growth() -> list[str]:
    """The scalar head against a dot product, and with more candidates."""
    return markdown_table(["`scalar`, order 0", "divided by", "target", "ratio"], [
        [row["what"].replace("whole", "complete"), row["against"], row["target"].replace("<=", "at most"),
         _judged(row)] for row in read("serving")
        if row["kind"] == "ratio" and row["against"] not in (IN_BLOCKS, WHOLE)])


def serving_requests() -> list[str]:
    """Median time of complete requests by candidates and by history, and memory."""
    found = {(row["model"], row["candidates"], row["history"]): row for row in read("serving")
             if row["kind"] == "request"}
    points = [(count, 1_000) for count in (1_000, 10_000, 50_000, 100_000)]
    points += [(10_000, length) for length in (50, 250, 10_000)]
    rows = []
    for model in dict.fromkeys(key[0] for key in found):
        times = [found.get((model, *point), {}).get("latency_p50_ms") for point in points]
        main = found[model, 10_000, 1_000]
        rows.append([model, *("-" if time is None else f"{time:,.{int(time < 10)}f}" for time in times),
                     f"{main['index_mb']:.0f}", f"{main['state_mb']:.2f}", f"{main['temporary_mb']:.0f}"])
    return markdown_table(["method", "1,000", "10,000", "50,000", "100,000", "history 50", "250", "10,000",
                     "index, MB", "state of a user, MB", "temporary, MB"], rows)


def serving_parts() -> list[str]:
    """Where the time of a request goes."""
    names = {"look_ups": "look-ups, attention", "top_k": "top-k"}
    return markdown_table(["method", *(names.get(part, part) for part in serving_report.PARTS)], [
        [row["model"], *(f"{row.get(f'{part}_ms', 0.0):.1f}" for part in serving_report.PARTS)]
        for row in read("serving") if row["kind"] == "breakdown"])


def serving_quality() -> list[str]:
    """Recall of the best 500 items of full target attention, and AUC, by data set."""
    return markdown_table(["data", "method", "recall@500", "AUC"], [
        [row["data"], row["model"], f"{row['recall_at_500']:.3f}", f"{row['auc']:.4f}"]
        for row in read("serving_quality")])


def serving_crossovers() -> list[str]:
    """Numbers of candidates below which target attention does less work, to two digits."""
    found = {(row["model"], row["against"]): row["candidates"] for row in read("serving")
             if row["kind"] == "crossover"}
    models = [model for model in dict.fromkeys(key[0] for key in found) if model.startswith("TARQ")]
    return markdown_table(["method", "in blocks", "whole"], [
        [model, *(f"{float(f'{found[model, against]:.2g}'):,.0f}" for against in (IN_BLOCKS, WHOLE))]
        for model in models])


def frontier() -> list[str]:
    """Latency of every method, the fastest first."""
    return markdown_table(["method", "p50, ms", "p95, ms", "calls"], [
        [row["model"], f"{row['latency_p50_ms']:.1f}", f"{row['latency_p95_ms']:.1f}", str(row["calls"])]
        for row in sorted(read("frontier_latency"), key=lambda row: row["latency_p50_ms"])])


def _differences() -> list[dict[str, str]]:
    """By study: the AUC of each variant minus that of the reference, in the report's order."""
    return [{row["variant"]: f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"
             for row in read(f"ablation/{folder}/summary") if row.get("difference") is not None}
            for folder in STUDIES.values()]


def ablation() -> list[str]:
    """Every variant, in the order of the first study."""
    found = _differences()
    return markdown_table(["variant", *STUDIES], [
        [f"`{name}`", *(study[name] for study in found)] for name in found[0]])


def parts() -> list[str]:
    """What single parts of TARQ contribute, in words."""
    found = _differences()
    return markdown_table(["changed", *STUDIES], [
        [what, *(study[name] for study in found)] for name, what in PARTS.items()])


def stress() -> list[str]:
    """A column per service."""
    rows = read("stress")
    services = {model: _stressed([row for row in rows if row.get("model") == model])
                for model in dict.fromkeys(row["model"] for row in rows if "model" in row)}
    lines = next(iter(services.values()))
    return markdown_table(["", *services], [
        [what, *(found[what] for found in services.values())] for what in lines])


def _stressed(rows: Sequence[Row]) -> dict[str, str]:
    claims = {row["what"]: row for row in rows if row["kind"] == "claim"}
    stages = {row["stage"]: row for row in rows if row["kind"] == "stage"}  # the last of each name
    alone, held, twice = (stages[name] for name in (
        stress_report.ALONE, stress_report.HELD, stress_report.RAMP))
    refused = [f"{100 * row['rejected'] / row['sent']:.1f}" for row in rows
               if row["kind"] == "stage" and row["stage"] == stress_report.RAMP and row["share"] < 1]

    def claim(what: str, digits: int) -> str:
        row = claims[what]
        value = f"{row['value']:.{digits}f}"
        return value if not row["most"] else (
            f"{value} (at most {row['most']:.{digits}f}: {row['verdict']})")

    def values(*whats: str) -> str:
        return " / ".join(claim(what, 0) for what in whats)

    def outcomes(row: Row) -> str:
        return " / ".join(f"{row[what]:,}" for what in ("answered", "rejected", "errors"))

    swaps = [f"{row['seconds']:.1f}" for row in rows if row["kind"] == "event" and row["what"] == "swap"]
    return {
        "one at a time: p50 / p99, ms": f"{alone['latency_p50_ms']:.1f} / {alone['latency_p99_ms']:.1f}",
        "most answers per second": claim("answers a second at best", 0),
        "refused with 503 at a quarter / half / three quarters of them, %": " / ".join(refused),
        f"{twice['seconds']:.0f} s at twice the load: answered / refused with 503 / lost": outcomes(twice),
        "p50 of answers, ms": f"{twice['latency_p50_ms']:.1f}",
        "p99 of answers, ms": claim("p99 of answers under twice the load, ms", 1),
        "p99 of answers in its first second, ms": claim("p99 of answers in its first second, ms", 1),
        "p99 of a 503, ms": f"{twice['rejected_p99_ms']:.1f}",
        "memory while load rises, last third divided by first": claim("growth of memory while load rises", 2),
        "memory after one swap of each kind, divided by that before":
            claim("growth of memory by the first swaps", 2),
        f"{held['seconds']:.0f} s at twice the load with swaps and bad requests: "
        "answered / refused with 503 / lost": outcomes(held),
        "p50 / p99 of answers meanwhile, ms":
            f"{held['latency_p50_ms']:.0f} / {held['latency_p99_ms']:.0f}",
        "memory between these swaps, last third divided by first":
            claim("growth of memory while held, between swaps", 2),
        "most memory in these swaps, divided by that before":
            claim("most memory in swaps, over that before", 2),
        "seconds of each swap, in order; the first five without load": " / ".join(swaps),
        "swaps that did not end as they should": claim("swaps that did not end as they should", 0),
        "bad requests refused by name / told 503 / neither": values(
            "bad requests read and refused by name", "bad requests told 503 instead",
            "bad requests that were not refused by name"),
        "requests lost while killed; seconds until ready again":
            f"{claim('requests lost while killed', 0)}; {claim('seconds from the kill until ready', 1)}",
        "p50 one at a time, afterwards divided by before":
            claim("p50 one at a time, afterwards over before", 2)}


def microbenchmarks() -> list[str]:
    """Median times of the forms of every operation at the sizes of a request."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in read("microbenchmarks"):
        if row["workload"] == "paper":
            found.setdefault((row["operation"], row["direction"]), {})[row["implementation"]] = row
    names = {"xla_blocks": "blocks", "xla_whole": "whole", "one_hot": "one-hot product",
             "sorted_segments": "sorted segments", "pallas": "kernel",
             "dot_product_attention": "`jax.nn.dot_product_attention`"}
    rows = []
    for (operation, direction), ways in found.items():
        plain, xla = ways["plain"], ways["xla"]
        others = [f"{names[name]} {short(row['run_ms'])}" for name, row in ways.items()
                  if name not in ("plain", "xla") and "run_ms" in row]
        rows.append([f"`{operation}`", direction, short(plain.get("run_ms")), short(xla["run_ms"]),
                     ", ".join(others) or "-", f"{short(xla['bound_ms'])}, {xla['bound']}",
                     f"{short(xla['peak_mb'])} ({short(plain['peak_mb'])})"])
    return markdown_table(["operation", "direction", "textbook", "XLA", "other ways", "bound, by",
                           "XLA, MB without its arguments (textbook's)"], rows)


def rooflines() -> list[str]:
    """Lower bounds in microseconds on other chips, at the sizes of a request."""
    chips = ("TPU v5e", "TPU v6e", "H100", "H200")
    found = {(row["operation"], row["direction"], row["chip"]): row for row in read("compiled")
             if row.get("workload") == "paper" and "bound" in row}
    return markdown_table(["operation", "direction", *chips], [
        [f"`{operation}`", direction, *(f"{1e3 * row['bound_ms']:.1f}, {row['bound']}" for row in (
            found[operation, direction, chip] for chip in chips))]
        for operation, direction in dict.fromkeys(key[:2] for key in found)])


def compiled() -> list[str]:
    """MB that programs for a v5e read and write, at the sizes of a request."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in read("compiled"):
        if row.get("workload") == "paper" and "v5" in row["chip"] and "temporary_mb" in row:
            form = "xla" if row["implementation"] == "xla_whole" else row["implementation"]
            found.setdefault((row["operation"], row["direction"]), {})[form] = (
                short(row["bytes_accessed_mb"]) + (
                    f" (temporary {row['temporary_mb']:,.0f})" if row["temporary_mb"] >= 1 else ""))
    return markdown_table(["operation", "direction", "textbook", "XLA", "kernel"], [
        [f"`{operation}`", direction, *(forms.get(form, "-") for form in ("plain", "xla", "pallas"))]
        for (operation, direction), forms in found.items()])


def limits() -> list[str]:
    """The largest size of one axis that each kernel accepts; all chips have the same."""
    found = {row["operation"]: row for row in read("compiled") if "largest" in row}
    return markdown_table(["", *(f"`{name}`" for name in found)], [
        ["largest", *(f"{row['axis']} = {row['largest']:,}" for row in found.values())]])


def input_pipeline() -> list[str]:
    """Candidate examples per second by source and readers."""
    return markdown_table(["source", "readers", "examples/s", "cold, one epoch", "first batch, ms"], [
        [row["source"], str(row["readers"]), f"{row['examples_per_second']:,.0f}",
         f"{row['cold_examples_per_second']:,.0f}", f"{row['first_batch_ms']:.0f}"]
        for row in read("input_pipeline") if row["history_lengths"] == "50"])


TABLES: Mapping[str, Callable[[], list[str]]] = {table.__name__: table for table in (
    quantization, training_step, serving_ratios, serving_growth, serving_requests, serving_parts,
    serving_crossovers, serving_quality, frontier, ablation, parts, stress, microbenchmarks, rooflines,
    compiled, limits, input_pipeline)}


def rendered(page: Path) -> str:
    """The text of a page with its tables made anew."""
    def made(place):
        return "\n".join([place[1] + place[2], *TABLES[place[1]](), "", ""])

    return PLACE.sub(made, page.read_text())


def main() -> None:
    """Writes the pages."""
    for page in PAGES:
        with reporting.replacing(page) as written:
            written.write_text(rendered(page))


if __name__ == "__main__":
    cli.run(main)
