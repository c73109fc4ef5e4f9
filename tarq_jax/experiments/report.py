"""The results of a study on one page: differences with intervals, frontier, learning curves, codebooks.

    python -m tarq_jax.experiments.report --study=runs/ablation --serving=benchmarks/results/serving.json

Writes OUT/index.html, which opens without a network, OUT/README.md, the figures beside them as PNG files, and
OUT/summary.json. Latencies of whole requests come from the rows that `benchmarks.serving` wrote.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from tarq_jax import cli, reporting
from tarq_jax.statistics import Estimate

STUDY = flags.DEFINE_string("study", None, "The --workdir of tarq_jax.experiments.ablate.", required=True)
OUT = flags.DEFINE_string("out", None, "Folder of the page; STUDY/report if not given.", allow_override=True)
REFERENCE = flags.DEFINE_string("reference", "tarq", "Variant that the others are compared with.")
SERVING = flags.DEFINE_string("serving", None, "JSON file with rows of benchmarks.serving, for latencies.")
POINT = flags.DEFINE_list("point", ["10000", "1000"], "Number of candidates and length of history for which "
                          "latencies are shown.")
LEVEL = cli.level_flag()
TITLE = flags.DEFINE_string("title", "Ablation", "Title of the page.")
JSON = cli.json_flag()

TABLE = ("variant", "seeds", "paired_seeds", "auc", "difference", "low", "high", "p_adjusted", "seeds_error",
         "data_error", "gap_recovered", "gap_low", "gap_high", "latency_ms")
HEALTH = ("variant", "seeds", "utilisation", "perplexity", "dead", "quantization_error", "attention_error",
          "teacher_auc", "parameters", "train_seconds")
CURVES = 8  # learning curves that a figure has room for; the reference and the ends of the gap come first


def add_latencies(rows: Sequence[dict[str, Any]], methods: Mapping[str, str | None],
                  latencies: Mapping[str, float]) -> None:
    """Adds to each row the latency of the method that serves its variant, if it was measured."""
    for row in rows:
        method = methods.get(row["variant"])
        if method is not None and method in latencies:
            row["latency_ms"] = latencies[method]


def verdicts(rows: Sequence[Mapping[str, Any]], reference: str, level: float, gap: Estimate | None
             ) -> list[str]:
    """The table in words: which variants differ from the reference, and which do not measurably.

    Args:
      rows: rows from `study.summary`.
      reference: the variant that the others are compared with.
      level: confidence level of the intervals.
      gap: the gap from `study.gap`, or None.
    """
    tested = [row for row in rows if "p_adjusted" in row]
    worse = [row for row in tested if row["p_adjusted"] < 1 - level and row["difference"] < 0]
    better = [row for row in tested if row["p_adjusted"] < 1 - level and row["difference"] > 0]
    same = [row for row in tested if row["p_adjusted"] >= 1 - level]
    sentences = [
        f"{what} (adjusted by Holm, {reporting.percent(level)}): {_named(found) or 'none'}."
        for what, found in ((f"Below {reference}", worse), (f"Above {reference}", better))]
    if same:
        furthest = max(max(abs(row["low"]), abs(row["high"])) for row in same)
        sentences.append(f"Not significantly different from {reference}, with intervals that reach "
                         f"{furthest:.4f} AUC: {', '.join(row['variant'] for row in same)}.")
    if alone := [row["variant"] for row in tested if row["paired_seeds"] == 1]:
        sentences.append(f"Of one seed, so that intervals are over users alone: {', '.join(alone)}.")
    if other := [row["variant"] for row in rows if row["variant"] != reference and "p_adjusted" not in row]:
        sentences.append(f"Without a seed of {reference}, so that nothing can be said of them: "
                         f"{', '.join(other)}.")
    if uneven := [row["variant"] for row in tested if row["paired_seeds"] != row["seeds"]]:
        sentences.append(f"Compared only on the seeds that {reference} has too, though their AUC is over all "
                         f"of theirs: {', '.join(uneven)}.")
    if gap is None:
        return sentences
    if gap.low <= 0:
        found = "is negative" if gap.high < 0 else "may be 0"
        sentences.append(
            f"The gap between two-tower and target attention, {gap.value:+.4f} [{gap.low:+.4f}, "
            f"{gap.high:+.4f}], {found}, so that no share of it is given.")
    elif without := [row["variant"] for row in rows if "gap_recovered" not in row]:
        sentences.append(f"Without a share of the gap, which may be 0 on their seeds: {', '.join(without)}.")
    return sentences


def _named(rows: Sequence[Mapping[str, Any]]) -> str:
    ordered = sorted(rows, key=lambda row: -abs(row["difference"]))
    return ", ".join(f"{row['variant']} {row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"
                     for row in ordered)


def frontier_sentence(rows: Sequence[Mapping[str, Any]], reference: str) -> str | None:
    """Which methods are on the frontier of latency and quality; None without latencies."""
    from tarq_jax.experiments import study

    auc = study.comparable(rows, reference)
    points = {row["variant"]: (row["latency_ms"], auc[row["variant"]]) for row in rows
              if "latency_ms" in row and row["variant"] in auc}
    if len(points) < 2:
        return None
    on = study.on_frontier(points)
    listed = ", ".join(f"{name} ({points[name][0]:.1f} ms, AUC {points[name][1]:.4f})" for name in on)
    missing = [row["variant"] for row in rows if "latency_ms" not in row]
    return f"On the frontier: {listed}. Without a latency: {', '.join(missing) or 'none'}."


def sections(variants: Mapping[str, Any], rows: list[dict[str, Any]], reference: str, level: float,
             command: str) -> dict[str, Any]:
    """The parts of the page, by the names of their figures."""
    from tarq_jax.experiments import plots, study
    from tarq_jax.experiments.page import Section

    words = verdicts(rows, reference, level, study.gap(variants, level))
    if others := study.of_other_origin(variants, reference):
        words.append(f"Of another revision, other packages or another device than {reference}, which may "
                     f"explain a difference: {', '.join(others)}.")
    parts = {"summary": Section("In words", words, _columns(rows, TABLE))}
    tested = [row for row in rows if "difference" in row]
    if tested:
        parts["forest"] = Section(
            "Differences", image=plots.png(plots.forest(
                {row["variant"]: (row["difference"], row["low"], row["high"]) for row in tested},
                f"test AUC less that of {reference}")),
            caption=f"{reporting.percent(level)} intervals over seeds and users; not adjusted.")
    if (sentence := frontier_sentence(rows, reference)) is not None:
        quality = "gap_recovered" if all("gap_recovered" in row for row in rows) else "auc"
        values = (study.comparable(rows, reference) if quality == "auc" else
                  {row["variant"]: row[quality] for row in rows})
        points = {row["variant"]: (row["latency_ms"], values[row["variant"]]) for row in rows
                  if "latency_ms" in row and row["variant"] in values}
        parts["frontier"] = Section(
            "Quality against latency", [sentence],
            image=plots.png(plots.frontier(points, study.on_frontier(points),
                                           quality.replace("_", " "), reference)),
            caption="Quality is of this study; latency the median of a whole request, of the serving "
                    "benchmark, at its sizes.")
    first = dict.fromkeys([reference, *study.ENDS, *(row["variant"] for row in rows)])
    shown = [name for name in first if name in variants][:CURVES]
    curves = {name: curve for name in shown if (curve := study.learning_curve(variants[name]))[0]}
    if curves:
        parts["learning"] = Section(
            "Learning curves", image=plots.png(plots.lines(curves, "step", "AUC, validation")),
            caption="Mean over seeds, of the reference, the ends of the gap, and the best others.")
    health = [row for row in rows if "utilisation" in row]
    if health:
        parts["health"] = Section(
            "Codebooks", ["On the test split, means over seeds; utilisation, perplexity and dead codewords "
                          "are those of the worst level."],
            _columns(health, HEALTH))
    parts["provenance"] = Section("Where the numbers come from", [command, *provenance(variants)])
    return parts


def _columns(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    present = [name for name in names if any(name in row for row in rows)]
    if all(row.get("paired_seeds", row["seeds"]) == row["seeds"] for row in rows):
        present = [name for name in present if name != "paired_seeds"]
    return [{name: row.get(name, "") for name in present} for row in rows]


def provenance(variants: Mapping[str, Any]) -> list[str]:
    """Seeds, data, code, packages and devices of all runs, one sentence each."""
    rows = [row for variant in variants.values() for row in variant.rows]
    names = {json.loads(row["config"]).get("data", {}).get("name", "unknown") for row in rows}
    facts = {"seeds": "seed", "data fingerprint": "data", "revision": "revision", "device": "device"}
    packages = sorted({key for row in rows for key in row if key.startswith("version_")})
    facts |= {key.removeprefix("version_"): key for key in packages}
    commands = sorted({row["command"] for row in rows if row.get("command")})
    return [*commands, f"data: {', '.join(sorted(names))}",
            *(f"{name}: {', '.join(sorted({str(row.get(key, 'unknown')) for row in rows}))}"
              for name, key in facts.items())]


def read_serving(path: str | None) -> list[dict[str, Any]]:
    """Rows of `benchmarks.serving`; none without a file."""
    if path is None:
        return []
    try:
        rows = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"--serving {path} cannot be read as JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"--serving {path} has another form, expected rows of benchmarks.serving")
    columns = {"model", "candidates", "history", "latency_p50_ms"}
    for row in rows:
        if row.get("kind") == "request" and (missing := columns - row.keys()):
            raise ValueError(f"--serving {path} has a row of a request without {sorted(missing)[0]!r}, "
                             f"expected rows of benchmarks.serving")
    return rows


def main() -> None:
    """Reads the flags, writes page and Markdown, and prints the table."""
    from tarq_jax.experiments import page, study

    point = cli.whole_numbers(POINT, "candidates and length of history like 10000,1000")
    if len(point) != 2:
        cli.wrong_call(f"--point is {','.join(POINT.value)!r}, expected two numbers like 10000,1000")
    serving = read_serving(SERVING.value)
    folder = Path(str(STUDY.value))
    variants, level = study.load(folder), LEVEL.value
    rows = study.summary(variants, REFERENCE.value, level)
    methods = {name: study.served_as(study.settings(variant)) for name, variant in variants.items()}
    latencies = study.latencies(serving, *point)
    if SERVING.value and not latencies:
        points = {(row["candidates"], row["history"]) for row in serving if row.get("kind") == "request"}
        raise ValueError(f"--serving {SERVING.value} has no latencies for --point={','.join(POINT.value)}, "
                         f"expected one of {[f'{one},{other}' for one, other in sorted(points)]}")
    add_latencies(rows, methods, latencies)
    command = cli.command_line("tarq_jax.experiments.report")
    parts = sections(variants, rows, REFERENCE.value, level, command)
    out = Path(OUT.value or folder / "report")
    page.write(out, TITLE.value, parts)
    (out / "README.md").write_text(page.markdown(TITLE.value, parts))
    reporting.write_rows(rows, out / "summary.json")
    reporting.print_table(rows, f"{TITLE.value}, against {REFERENCE.value}", TABLE)
    for sentence in parts["summary"].sentences:
        print(sentence)
    print(f"page: {out / 'index.html'}")
    if JSON.value:
        reporting.write_rows(rows, JSON.value)


if __name__ == "__main__":
    cli.run(main)
