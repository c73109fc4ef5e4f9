"""The results of a study: differences from its reference, with seeds and users as sources of variance.

They need only the table of the study. For each run it has the settings, the AUC with each user's influence on
it, and the learning curve, so that a study can be moved and evaluated without the files of its runs.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tarq_jax import statistics
from tarq_jax.experiments import run_table
from tarq_jax.reporting import read_metrics
from tarq_jax.statistics import Estimate
from tarq_jax.training.evaluate import SCORES

ENDS = ("two_tower", "target_attention")  # the variants at the two ends of the gap


class Variant(NamedTuple):
    """Runs of one variant, seed by seed."""

    name: str
    seeds: tuple[int, ...]
    rows: list[dict[str, Any]]  # of the table
    auc: np.ndarray  # [S]
    influence: np.ndarray  # [S, U], see `statistics.auc_influence`

    def at(self, seeds: Sequence[int]) -> "Variant":
        """The runs of these seeds, in their order."""
        index = [self.seeds.index(seed) for seed in seeds]
        return Variant(self.name, tuple(seeds), [self.rows[i] for i in index], self.auc[index],
                       self.influence[index])


def row_of_run(rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What the row of a run has from its measurements: metrics, and the columns `run_table.MEASURED`.

    Args:
      rows: one per predictor, the run's own before its teacher's, as `tarq_jax.training.loop.train` returns
        them.
      config: configuration of the run, with `save_scores`.
      folder: folder of the run.
    """
    row = dict(rows[0])
    for teacher in rows[1:]:
        row |= {f"teacher_{key}": teacher[key] for key in ("auc", "gauc", "log_loss")}
    with np.load(folder / SCORES) as scores:
        kept = scores["weights"] > 0
        found = statistics.auc_influence(*(
            scores[name][kept] for name in ("labels", row["model"], "users", "weights")))
    key = f"validation/{row['model']}/auc"
    curve = {line["step"]: line[key] for line in read_metrics(folder) if line.get(key) is not None}
    return row | {
        "influence": found.influence.astype(np.float32).tolist(), "curve_step": list(curve),
        "curve_auc": list(curve.values()), "config": json.dumps(config, sort_keys=True)}


def load(workdir: Path) -> dict[str, Variant]:
    """The variants of a study, from its table.

    Raises:
      FileNotFoundError: there is no table, or it has no rows.
      ValueError: the table is damaged, or runs differ in data, or those of a variant in settings.
    """
    path = workdir / run_table.FILE
    rows = run_table.read(path)
    if not rows:
        raise FileNotFoundError(f"no runs in {path}: expected the --workdir of tarq_jax.experiments.ablate")
    if len(data := {row["data"] for row in rows}) > 1:
        raise ValueError(f"{path}: runs are of {len(data)} data sets, expected one; move others to a study "
                         f"of their own")
    variants: dict[str, Variant] = {}
    for name in dict.fromkeys(row["variant"] for row in rows):
        own = sorted((row for row in rows if row["variant"] == name), key=lambda row: row["seed"])
        if len(settings := {row["settings"] for row in own}) > 1:
            raise ValueError(f"{path}: the runs of {name} are of {len(settings)} settings, expected the same "
                             f"but for seeds; move others to a study of their own")
        variants[name] = Variant(
            name, tuple(row["seed"] for row in own), own, np.array([row["auc"] for row in own]),
            np.array([row["influence"] for row in own]))
    return variants


def on_shared_seeds(*variants: Variant) -> list[Variant] | None:
    """The variants, each with only the seeds that all of them have; None if there is none."""
    seeds = [seed for seed in variants[0].seeds if all(seed in other.seeds for other in variants)]
    return [variant.at(seeds) for variant in variants] if seeds else None


def difference(variant: Variant, reference: Variant, level: float = 0.95) -> statistics.SeededEstimate | None:
    """AUC less that of the reference, on the seeds that both have; None if there is none."""
    if (shared := on_shared_seeds(variant, reference)) is None:
        return None
    own, other = shared
    return statistics.over_seeds_and_data(own.auc - other.auc, own.influence - other.influence, level=level)


def gap_recovered(variant: Variant, variants: Mapping[str, Variant], level: float = 0.95) -> Estimate | None:
    """Share of the gap between two-tower and target attention: a ratio of means over seeds, by delta method.

    None if an end of the gap was not trained, no seed is shared, or there is no gap.
    """
    if not all(name in variants for name in ENDS):
        return None
    if (shared := on_shared_seeds(variant, *(variants[name] for name in ENDS))) is None:
        return None
    own, low, high = shared
    gap = float((high.auc - low.auc).mean())
    if gap <= 0:
        return None
    share = float((own.auc - low.auc).mean()) / gap
    values, influence = (
        (getattr(own, name) - getattr(low, name) - share * (getattr(high, name) - getattr(low, name))) / gap
        for name in ("auc", "influence"))
    found = statistics.over_seeds_and_data(values, influence, level=level).estimate
    return found._replace(value=share, low=share + found.low, high=share + found.high)


def summary(variants: Mapping[str, Variant], reference: str, level: float = 0.95) -> list[dict[str, Any]]:
    """One row per variant, the best first: AUC, difference from the reference, gap recovered, health.

    Raises:
      ValueError: there is no such reference.
    """
    if reference not in variants:
        raise ValueError(f"--reference is {reference!r}, expected one of {sorted(variants)}")
    rows = []
    for variant in variants.values():
        row: dict[str, Any] = {"variant": variant.name, "seeds": len(variant.seeds),
                               "auc": float(variant.auc.mean())}
        if variant.name != reference and (found := difference(variant, variants[reference], level)):
            estimate, parts = found
            row |= {"paired_seeds": len(set(variant.seeds) & set(variants[reference].seeds)),
                    "difference": estimate.value, "low": estimate.low, "high": estimate.high,
                    "p_value": estimate.p_value, "data_error": max(parts.data, 0.0)**0.5}
            if row["paired_seeds"] > 1:  # one seed does not show how seeds differ
                row["seeds_error"] = max(parts.seeds, 0.0)**0.5
        if (gap := gap_recovered(variant, variants, level)) is not None:
            row |= {"gap_recovered": gap.value, "gap_low": gap.low, "gap_high": gap.high}
        for name in ("teacher_auc", "utilisation", "attention_error", "parameters", "train_seconds"):
            if name in variant.rows[0]:
                row[name] = float(np.mean([one[name] for one in variant.rows]))
        rows.append(row)
    tested = [row for row in rows if "p_value" in row]
    for row, p_value in zip(tested, statistics.adjust([row["p_value"] for row in tested]), strict=True):
        row["p_adjusted"] = float(p_value)
    return sorted(rows, key=lambda row: -row["auc"])


def learning_curve(variant: Variant) -> tuple[list[int], list[float]]:
    """Steps, and mean AUC over seeds on the validation split; empty without evaluations during training."""
    by_step: dict[int, list[float]] = {}
    for row in variant.rows:
        for step, auc in zip(row["curve_step"], row["curve_auc"], strict=True):
            by_step.setdefault(step, []).append(auc)
    return sorted(by_step), [float(np.mean(by_step[step])) for step in sorted(by_step)]


def settings(variant: Variant) -> dict[str, Any]:
    """The configuration of the variant's first run."""
    return json.loads(variant.rows[0]["config"])


# Names in `benchmarks.serving` and `benchmarks.frontier` of the methods that serve models, except TARQ.
METHODS = {
    "two_tower": "two-tower", "target_attention": "target attention, in blocks", "cold": "COLD-style MLP",
    "inttower": "IntTower", "linear_attention": "linear attention", "sdim": "SDIM", "eta": "ETA",
    "din": "DIN",
}
MEASURED_LEVELS = 3  # levels of TARQ in these benchmarks


def tarq_name(order: int, head: str, codewords: int) -> str:
    """The name of a TARQ method in tables of latency.

    Example:
      >>> tarq_name(1, "mlp", 64)
      'TARQ order 1 mlp, K=64'
    """
    return f"TARQ order {order} {head}, K={codewords}"


def served_as(config: Mapping[str, Any]) -> str | None:
    """The name of the method that serves such a model, if benchmarks measure its latency, else None."""
    model = config["model"]
    if model["name"] == "tarq":
        if model["num_levels"] != MEASURED_LEVELS:
            return None
        return tarq_name(model["order"], model["head"], model["num_codewords"])
    return METHODS.get(model["name"])


def latencies(serving: Sequence[Mapping[str, Any]], candidates: int, history: int) -> dict[str, float]:
    """Median milliseconds of a whole request by method, from rows of `benchmarks.serving`."""
    return {row["model"]: row["latency_p50_ms"] for row in serving
            if row.get("kind") == "request" and (row["candidates"], row["history"]) == (candidates, history)
            and row["latency_p50_ms"] is not None}


def on_frontier(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of points (latency, quality) that no other point beats in both, the fastest first.

    >>> on_frontier({"a": (1.0, 0.1), "b": (2.0, 0.9), "c": (3.0, 0.5)})
    ['a', 'b']
    """
    best, found = -np.inf, []
    for name, (_, quality) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if quality > best:
            best = quality
            found.append(name)
    return found
