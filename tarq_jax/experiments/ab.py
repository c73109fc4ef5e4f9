"""Analysis of an A/B test: lifts of CTR, CVR and GMV, their uncertainty, and the users that a test needs.

    python -m tarq_jax.experiments.ab --data=runs/ab.csv --simulate=200000

The file of `--data` has a header and one row per user: `user`, `arm`, `impressions`, `clicks`, `orders`,
`revenue`. If a row is a bucket of users, `users` says how many. The file may also have the same counts
for a period before the test, `pre_impressions` and so on, which CUPED uses. CTR is clicks over
impressions, CVR orders over clicks, GMV revenue per user. `--simulate` first writes the file, which must
not exist yet, with the lifts that the TARQ paper reports. Intervals are by the delta method over users,
and for GMV, whose tail is heavy, by bootstrap, too. p-values are adjusted over all metrics and arms by
Holm.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from scipy import stats

from tarq_jax import cli, reporting, statistics
from tarq_jax.experiments import ab_rows
from tarq_jax.experiments.ab_rows import USERS
from tarq_jax.statistics.ratio import ROUNDING

DATA = flags.DEFINE_string("data", None, "File of rows, CSV or Parquet.", required=True)
CONTROL = flags.DEFINE_string("control", "control", "Arm that the others are compared with.")
RATIO = flags.DEFINE_list("ratio", [], "Planned shares of the arms, in the alphabetical order of their "
                          "names; equal shares if not given.")
LEVEL = cli.level_flag()
POWER = flags.DEFINE_float("power", 0.8, "Probability of finding an effect that exists.", lower_bound=0.5,
                           upper_bound=0.9999)
REPLICATES = flags.DEFINE_integer("replicates", 2000, "Replicates of the bootstrap.", lower_bound=100)
MAX_BAD_FRACTION = flags.DEFINE_float(
    "max_bad_fraction", 0.0, "Largest share of bad rows, which are left out.", lower_bound=0.0,
    upper_bound=1.0)
SIMULATE = flags.DEFINE_integer("simulate", 0, "Users to simulate first, at least 100; 0 for none.",
                                lower_bound=0)
JSON = cli.json_flag()

METRICS = {"ctr": ("clicks", "impressions"), "cvr": ("orders", "clicks"), "gmv": ("revenue", USERS)}
REPORTED = {"ctr": 0.0057, "cvr": 0.0459, "gmv": 0.0757}  # relative lifts that the paper reports
BUCKETS = 2000  # of rows; the bootstrap draws buckets if an arm has more rows than this
LEAST_SIMULATED = 100  # users; with fewer, an arm may have none
MISMATCH = 0.001  # p-value below which the shares of the arms count as a mismatch


Ratios = tuple[statistics.Ratio, statistics.Ratio]  # of an arm, and of the control


class Plan(NamedTuple):
    """Level of intervals, power of tests, and replicates of the bootstrap."""

    level: float = 0.95
    power: float = 0.8
    replicates: int = 2000


class Arm(NamedTuple):
    """The users of an arm: its name, and one column per count."""

    name: str
    columns: Mapping[str, np.ndarray]


def ratio_of(arm: Arm, metric: str, prefix: str = "") -> statistics.Ratio:
    """The metric of one arm's users; ValueError if its denominator is 0."""
    top, bottom = METRICS[metric]
    try:
        return statistics.ratio(
            arm.columns[prefix + top], arm.columns[bottom if bottom == USERS else prefix + bottom])
    except ValueError as error:
        raise ValueError(f"{prefix}{metric} of arm {arm.name!r} cannot be computed: {error}") from error


def compare(treated: Arm, control: Arm, plan: Plan) -> list[dict[str, Any]]:
    """One row per metric and method: `delta`, `cuped` if there is a period before, `bootstrap` for GMV.

    If a lift cannot be computed, such as that of CVR before the first order, its row has the reason as `note`
    instead of numbers; other rows are not affected.
    """
    rows: list[dict[str, Any]] = []
    sizes = (treated.columns[USERS].sum(), control.columns[USERS].sum())
    for metric, (top, bottom) in METRICS.items():
        before = {f"pre_{name}" for name in (top, bottom) if name != USERS} <= control.columns.keys()
        there = {"delta": True, "cuped": before, "bootstrap": bottom == USERS}
        own: list[dict[str, Any]] = [
            {"metric": metric, "arm": treated.name, "method": method} for method in there if there[method]]
        rows += own
        try:
            ratios = _ratios(treated, control, metric)
        except ValueError as error:
            for row in own:
                row["note"] = str(error)
            continue
        for row in own:
            try:
                found = LIFTS[row["method"]](ratios, treated, control, metric, plan)
                row |= {"control_value": ratios[1].value, "value": ratios[0].value}
                row |= describe(found, metric, sizes, plan)
            except ValueError as error:
                row["note"] = str(error)
    return rows


def _ratios(treated: Arm, control: Arm, metric: str) -> Ratios:
    """The metric of both arms; ValueError if that of the control is 0."""
    ratios = ratio_of(treated, metric), ratio_of(control, metric)
    if not ratios[1].value:
        raise ValueError(f"{metric} of arm {control.name!r} is 0, expected more for a lift")
    return ratios


def delta_lift(ratios: Ratios, treated: Arm, control: Arm, metric: str, plan: Plan) -> statistics.Estimate:
    """Lift by the delta method."""
    return statistics.lift(*ratios, level=plan.level)


def cuped_lift(ratios: Ratios, treated: Arm, control: Arm, metric: str, plan: Plan) -> statistics.Estimate:
    """Lift by the delta method, less what the period before explains."""
    before = ratio_of(treated, metric, "pre_"), ratio_of(control, metric, "pre_")
    return statistics.lift(*ratios, before=before, level=plan.level)


def describe(found: statistics.Estimate, metric: str, sizes: tuple[float, float], plan: Plan
             ) -> dict[str, Any]:
    """An estimated lift as columns, with the users needed to find the lift that the paper reports.

    Args:
      found: the lift.
      metric: a key of `METRICS`.
      sizes: users of the arm and of the control; the needed users are split between the two in this ratio.
      plan: level and power.
    """
    users = sum(sizes)
    share = sizes[0] / users
    deviation = found.standard_error / np.sqrt(1 / (share * users) + 1 / ((1 - share) * users))
    return {
        "lift": found.value, "low": found.low, "high": found.high, "p_value": found.p_value,
        "detectable_lift": statistics.minimum_detectable_effect(
            found.standard_error, level=plan.level, power=plan.power),
        "reported_lift": REPORTED[metric],
        "users_for_reported": round(statistics.users_needed(
            REPORTED[metric], deviation, share=share, level=plan.level, power=plan.power)),
    }


def bootstrap_lift(
    ratios: Ratios, treated: Arm, control: Arm, metric: str, plan: Plan
) -> statistics.Estimate:
    """Lift of means with a percentile interval; an arm of many rows is resampled by `BUCKETS` buckets."""
    top, _ = METRICS[metric]
    sums = [_bucket_sums(arm.columns[top], arm.columns[USERS], seed)
            for seed, arm in enumerate((treated, control))]
    sizes = [len(part[0]) for part in sums]

    def lift(weights: np.ndarray) -> np.ndarray:
        first, second = np.split(weights, [sizes[0]], axis=1)
        means = [(weights @ totals) / (weights @ counts)
                 for weights, (totals, counts) in zip((first, second), sums, strict=True)]
        with np.errstate(divide="ignore", invalid="ignore"):  # `bootstrap` refuses the resulting values
            lifts = means[0] / means[1] - 1
        return np.where(np.abs(lifts) <= ROUNDING, 0.0, lifts)

    try:
        return statistics.bootstrap(lift, sizes, replicates=plan.replicates, level=plan.level)
    except ValueError as error:
        raise ValueError(f"{metric} of so few users with {top} has no bootstrap: {error}") from error


LIFTS = {"delta": delta_lift, "cuped": cuped_lift, "bootstrap": bootstrap_lift}


def _bucket_sums(values: np.ndarray, users: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of users of each bucket; if rows are few, each is a bucket."""
    if len(values) <= BUCKETS:
        return values, users
    bucket = np.random.default_rng(seed).permutation(len(values)) % BUCKETS
    return np.bincount(bucket, values, BUCKETS), np.bincount(bucket, users, BUCKETS)


def analyse(table: ab_rows.Table, control: str, plan: Plan) -> list[dict[str, Any]]:
    """Compares all arms with the control.

    Args:
      table: rows that `ab_rows.read` returned.
      control: name of an arm.
      plan: level, power and replicates.

    Returns:
      Rows of `compare`. `p_adjusted` is over the primary rows: `cuped` if it could be computed, else `delta`.

    Raises:
      ValueError: there is no such arm, or no lift can be computed.
    """
    if control not in table.arms:
        raise ValueError(f"--control is {control!r}, expected one of the arms {list(table.arms)}")
    arms = [Arm(name, table.of(index)) for index, name in enumerate(table.arms)]
    others = arms.pop(table.arms.index(control))
    rows = [row for arm in arms for row in compare(arm, others, plan)]
    had = [row for row in rows if "note" not in row]
    if not had:
        raise ValueError(rows[0]["note"])
    has_cuped = {(row["metric"], row["arm"]) for row in had if row["method"] == "cuped"}
    primary = [row for row in had
               if row["method"] == ("cuped" if (row["metric"], row["arm"]) in has_cuped else "delta")]
    for row, p_value in zip(primary, statistics.adjust([row["p_value"] for row in primary]), strict=True):
        row["p_adjusted"] = float(p_value)
    return rows


def sample_ratio(table: ab_rows.Table, planned: Sequence[float]) -> tuple[np.ndarray, float]:
    """Users of each arm, and the p-value of a chi-squared test that they were assigned as planned."""
    counts = np.bincount(table.arm, table.columns[USERS], len(table.arms)).astype(int)
    shares = np.array(planned, float) if len(planned) else np.ones(len(counts))
    if len(shares) != len(counts) or not (np.isfinite(shares) & (shares > 0)).all():
        raise ValueError(f"--ratio is {','.join(map(str, planned))!r}, expected {len(counts)} positive "
                         f"numbers, one for each of the arms {list(table.arms)}")
    return counts, float(stats.chisquare(counts, shares / shares.sum() * counts.sum()).pvalue)


def main() -> None:
    """Reads the flags and prints the tables."""
    path = Path(DATA.value)
    try:
        planned = [float(text) for text in RATIO.value]
    except ValueError:
        planned = [-1.0]
    if not all(0 < share < np.inf for share in planned):
        cli.wrong_call(f"--ratio is {','.join(RATIO.value)!r}, expected positive numbers like 1,1")
    if SIMULATE.value:
        if SIMULATE.value < LEAST_SIMULATED:
            cli.wrong_call(f"--simulate is {SIMULATE.value}, expected 0 or at least {LEAST_SIMULATED} users")
        lifts = {"ctr": REPORTED["ctr"], "cvr": REPORTED["cvr"],
                 "revenue": (1 + REPORTED["gmv"]) / (1 + REPORTED["ctr"]) / (1 + REPORTED["cvr"]) - 1}
        ab_rows.simulate(path, SIMULATE.value, lifts)
    table, report = ab_rows.read(path, max_bad_fraction=MAX_BAD_FRACTION.value)
    counts, p_value = sample_ratio(table, planned)
    print(f"rows: {report.read:,} read, {report.bad:,} left out")
    arms = ", ".join(f"{name} {count:,}" for name, count in zip(table.arms, counts, strict=True))
    verdict = ("as planned" if p_value >= MISMATCH else
               "SAMPLE RATIO MISMATCH: users are missing in an arm; lifts are not to be believed")
    print(f"users: {arms}; p = {p_value:.3g} of shares as planned: {verdict}")
    rows = analyse(table, CONTROL.value, Plan(LEVEL.value, POWER.value, REPLICATES.value))
    rows = [row | {"sample_ratio_p": p_value} for row in rows]
    reporting.print_table(rows, f"lifts over {CONTROL.value}, {reporting.percent(LEVEL.value)} intervals", [
        "metric", "arm", "method", "control_value", "value", "lift", "low", "high", "p_value", "p_adjusted",
        "detectable_lift", "reported_lift", "users_for_reported", "note"])
    if JSON.value:
        reporting.write_rows(rows, JSON.value)


if __name__ == "__main__":
    cli.run(main)
