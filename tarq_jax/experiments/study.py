"""The results of a study: differences from its reference, with seeds and users as sources of variance.

They need only the table of the study. For each run it has the settings, the AUC with each user's influence on
it, and the learning curve, so that a study can be moved and evaluated without the files of its runs.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize

from tarq_jax import statistics
from tarq_jax.experiments import run_table
from tarq_jax.reporting import read_metrics
from tarq_jax.statistics import Estimate
from tarq_jax.training.evaluate import SCORES

ENDS = ("two_tower", "target_attention")  # the variants at the two ends of the gap
HEALTH = ("teacher_auc", "utilisation", "quantization_error", "attention_error", "parameters",
          "train_seconds")
WORST: Mapping[str, Callable[..., float]] = {"perplexity": min, "dead": max}  # columns of each level


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
      ValueError: the table is damaged, runs differ in data, or those of a variant in settings or users; or a
        variant has different runs of one seed.
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
        own = _one_a_seed([row for row in rows if row["variant"] == name], path)
        if len(settings := {row["settings"] for row in own}) > 1:
            raise ValueError(f"{path}: the runs of {name} are of {len(settings)} settings, expected the same "
                             f"but for seeds; move others to a study of their own")
        if len(users := {len(row["influence"]) for row in own}) > 1:
            raise ValueError(f"{path}: the runs of {name} have influences of {sorted(users)} users, expected "
                             f"as many of each")
        variants[name] = Variant(
            name, tuple(row["seed"] for row in own), own, np.array([row["auc"] for row in own]),
            np.array([row["influence"] for row in own]))
    return variants


def _one_a_seed(rows: Sequence[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """The runs of a variant by seed; the same run in both of two tables that were joined counts once."""
    by_seed: dict[int, dict[str, Any]] = {}
    for row in rows:
        first = by_seed.setdefault(row["seed"], row)
        if (first["auc"], first["influence"]) != (row["auc"], row["influence"]):
            raise ValueError(f"{path}: {row['variant']} has runs of seed {row['seed']} with an AUC of "
                             f"{first['auc']:.6f} and of {row['auc']:.6f}, expected one run of each seed")
    return [by_seed[seed] for seed in sorted(by_seed)]


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


def gap(variants: Mapping[str, Variant], level: float = 0.95) -> Estimate | None:
    """AUC of target attention less that of the two-tower; None where one is missing, or no seed is shared."""
    if not all(name in variants for name in ENDS):
        return None
    low, high = (variants[name] for name in ENDS)
    found = difference(high, low, level)
    return None if found is None else found.estimate


def gap_recovered(variant: Variant, variants: Mapping[str, Variant], level: float = 0.95) -> Estimate | None:
    """Share of the gap between two-tower and target attention: a ratio of means over seeds.

    The interval is Fieller's (1954) with both sources of variance: all shares s for which the means of
    `own - low` and `s (high - low)` do not differ at the level. The p-value is of a share of 0.

    None if an end of the gap was not trained, no seed is shared, or the gap's own interval reaches 0, so that
    the interval of the share has no bounds.
    """
    if not all(name in variants for name in ENDS):
        return None
    if (shared := on_shared_seeds(variant, *(variants[name] for name in ENDS))) is None:
        return None
    own, low, high = shared

    def less(share: float) -> Estimate:
        """The variant's advantage over the two-tower, less that share of the gap."""
        values, influence = (
            getattr(own, name) - getattr(low, name) - share * (getattr(high, name) - getattr(low, name))
            for name in ("auc", "influence"))
        return statistics.over_seeds_and_data(values, influence, level=level).estimate

    whole = difference(high, low, level)
    if whole is None or whole.estimate.low <= 0:
        return None
    size, gained = whole.estimate.value, less(0.0)
    share = gained.value / size
    error = less(share).standard_error / size
    low_end, high_end = (_end(lambda s: _excess(less(s)), share, sign * error) for sign in (-1.0, 1.0))
    return Estimate(share, error, low_end, high_end, gained.p_value)


def _excess(found: Estimate) -> float:
    """How far 0 is outside of an interval; below 0 within it."""
    return max(found.low, -found.high)


def _end(excess: Callable[[float], float], start: float, step: float) -> float:
    """The first number from `start` in the direction of `step` from which on `excess` is above 0."""
    if excess(start) >= 0:  # an end of the gap itself, whose share is certain
        return start
    while excess(start + step) < 0:
        step *= 2
    return float(optimize.brentq(excess, start, start + step, xtol=1e-6 * abs(step)))


def comparable(rows: Sequence[Mapping[str, Any]], reference: str) -> dict[str, float]:
    """AUC by variant on equal terms: the reference's AUC plus the variant's difference on shared seeds.

    Args:
      rows: of `summary`.
      reference: as there; a variant without a shared seed is left out.
    """
    own = next(row["auc"] for row in rows if row["variant"] == reference)
    return {row["variant"]: own + row.get("difference", 0.0) for row in rows
            if "difference" in row or row["variant"] == reference}


def summary(variants: Mapping[str, Variant], reference: str, level: float = 0.95) -> list[dict[str, Any]]:
    """One row per variant, the best first: AUC, difference from the reference, gap recovered, health.

    Variants without a seed of the reference, which cannot be compared with it, come last.

    Raises:
      ValueError: there is no such reference.
    """
    if reference not in variants:
        raise ValueError(f"--reference is {reference!r}, expected one of {sorted(variants)}")
    whole = gap(variants, level)
    certain = whole is not None and whole.low > 0
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
        if certain and (share := gap_recovered(variant, variants, level)) is not None:
            row |= {"gap_recovered": share.value, "gap_low": share.low, "gap_high": share.high}
        rows.append(row | _health(variant))
    tested = [row for row in rows if "p_value" in row]
    for row, p_value in zip(tested, statistics.adjust([row["p_value"] for row in tested]), strict=True):
        row["p_adjusted"] = float(p_value)
    order = comparable(rows, reference)
    return sorted(rows, key=lambda row: -order.get(row["variant"], -np.inf))


def _health(variant: Variant) -> dict[str, float]:
    """Means over seeds of what was measured beside the AUC; of metrics of each level, that of the worst."""
    had = [name for name in variant.rows[0] if all(name in row for row in variant.rows)]

    def mean(name: str) -> float:
        return float(np.mean([row[name] for row in variant.rows]))

    found = {name: mean(name) for name in HEALTH if name in had}
    for name, worst in WORST.items():
        if levels := [level for level in had if level.startswith(f"{name}_")]:
            found[name] = worst(mean(level) for level in levels)
    return found


def of_other_origin(variants: Mapping[str, Variant], reference: str) -> list[str]:
    """Variants whose code, packages or device are not those of the reference, on the seeds that both have."""
    def origin(row: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in row.items()
                if key in ("revision", "device") or key.startswith("version_")}

    paired = {name: on_shared_seeds(variant, variants[reference]) for name, variant in variants.items()}
    return [name for name, pair in paired.items() if pair and any(
        origin(row) != origin(like) for row, like in zip(pair[0].rows, pair[1].rows, strict=True))]


def learning_curve(variant: Variant) -> tuple[list[int], list[float]]:
    """Steps at which all seeds were evaluated, and AUC on the validation split, mean over seeds."""
    curves = [dict(zip(row["curve_step"], row["curve_auc"], strict=True)) for row in variant.rows]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return steps, [float(np.mean([curve[step] for curve in curves])) for step in steps]


def settings(variant: Variant) -> dict[str, Any]:
    """The configuration of the variant's first run."""
    return json.loads(variant.rows[0]["config"])


# Names in `benchmarks.serving` and `benchmarks.frontier` of the methods that serve models, except TARQ.
METHODS = {
    "two_tower": "two-tower", "two_tower_large": "two-tower of TARQ's size",
    "target_attention": "target attention, in blocks", "cold": "COLD-style MLP",
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
