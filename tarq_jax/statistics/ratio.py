"""Ratios of sums over users, such as clicks over impressions: delta method, lifts, CUPED.

Users are the units that were randomised; impressions of one user depend on each other.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from tarq_jax import checks
from tarq_jax.statistics.estimates import Estimate, wald

ROUNDING = 1e-14  # relative difference below which values count as equal
LARGEST = 1e50  # its fourth power, which the interval of a lift needs, is still a finite float64


class Ratio(NamedTuple):
    """A ratio of sums, and what each user adds to its error."""

    value: float
    influence: np.ndarray  # [U], sums to 0

    @property
    def variance(self) -> float:
        """Variance of the ratio."""
        units = len(self.influence)
        return units / (units - 1) * float(np.square(self.influence).sum())


def ratio(numerator: ArrayLike, denominator: ArrayLike) -> Ratio:
    """`sum_u y_u / sum_u x_u` with influence `(y_u - r x_u) / sum_u x_u` (Deng, Knoblich and Lu 2018).

    Args:
      numerator: [U], y, at least 2 users.
      denominator: [U], x; ones for a mean over users.

    Raises:
      ValueError: shapes differ, a value is not finite or too large (`LARGEST`), or the denominators sum
        to 0.
    """
    top, bottom = checks.finite("numerator", numerator), checks.finite("denominator", denominator)
    checks.rank_of("numerator", top, "U")
    checks.shape_of("denominator", bottom, top.shape, "numerator")
    if len(top) < 2:
        raise ValueError(f"numerator: expected at least 2 users, got {len(top)}")
    for name, values in (("numerator", top), ("denominator", bottom)):
        if (largest := float(np.abs(values).max())) > LARGEST:
            raise ValueError(f"{name}: expected values of at most {LARGEST:g}, got {largest:g}")
    total = float(bottom.sum())
    if not total:
        raise ValueError("denominator: expected a sum other than 0, got 0")
    value = float(top.sum()) / total
    away = top - value * bottom
    rounding = ROUNDING * np.maximum(np.abs(top), np.abs(value * bottom))
    return Ratio(value, np.where(np.abs(away) > rounding, away, 0.0) / total)


def cuped(treatment: Ratio, control: Ratio, before_treatment: Ratio, before_control: Ratio
          ) -> tuple[Ratio, Ratio]:
    """Both ratios, less what the same users' ratio in a period before the test explains.

    `r - theta (r_before - mean of r_before over both arms)`. Both arms have the same theta: the slope of a
    regression of users' influence on r on their influence on r_before (Deng et al. 2013; by influence for
    ratios, Deng, Knoblich and Lu 2018).

    Args:
      treatment: ratio of the treated users.
      control: ratio of the control users.
      before_treatment: ratio of the treated users before the test, in the same order.
      before_control: ratio of the control users before the test, in the same order.

    Raises:
      ValueError: an arm's numbers of users before and in the test differ.
    """
    arms = ((treatment, before_treatment), (control, before_control))
    for now, before in arms:
        checks.shape_of("before", before.influence, now.influence.shape, "the ratio")
    scaled = [tuple(part.influence * len(part.influence) for part in arm) for arm in arms]
    covariance = sum(float(now @ before) for now, before in scaled)
    spread = sum(float(before @ before) for _, before in scaled)
    theta = covariance / spread if spread else 0.0
    counts = [len(now.influence) for now, _ in arms]
    middle = sum(count * before.value for count, (_, before) in zip(counts, arms, strict=True)) / sum(counts)
    first, second = (
        Ratio(now.value - theta * (before.value - middle), now.influence - theta * before.influence)
        for now, before in arms)
    return first, second


def lift(treatment: Ratio, control: Ratio, *, level: float = 0.95) -> Estimate:
    """Relative difference `r_t / r_c - 1` of two independent arms.

    The interval is Fieller's (1954): all lifts d for which `r_t - (1 + d) r_c` does not differ from 0
    significantly. If the control is known well, it is about the delta method's, `value +- z error`, and
    agrees with the p-value, which is that of `r_t - r_c = 0`. If the control could be 0, the interval is
    infinite, whatever the p-value.

    Args:
      treatment: ratio of the treated users.
      control: ratio of the control users; its value has to differ from 0.
      level: level of the interval.

    Raises:
      ValueError: the control's value is 0.

    >>> estimate = lift(ratio([1, 0, 1, 1], [1, 1, 1, 1]), ratio([1, 0, 1, 0], [1, 1, 1, 1]))
    >>> estimate.value
    0.5
    """
    if not control.value:
        raise ValueError("control: expected a value other than 0 for a lift over it, got 0")
    first, second, (spread, other) = treatment.value, control.value, (treatment.variance, control.variance)
    quotient = first / second
    error = math.sqrt(spread + quotient**2 * other) / abs(second)
    apart = first - second if abs(first - second) > ROUNDING * max(abs(first), abs(second)) else 0.0
    p_value = wald(apart, spread + other, level=level).p_value
    square = stats.norm.ppf(0.5 + level / 2) ** 2
    scale = second**2 - square * other
    if scale <= 0:
        return Estimate(quotient - 1, error, -math.inf, math.inf, p_value)
    half = math.sqrt(max((first * second) ** 2 - scale * (first**2 - square * spread), 0.0))
    low, high = ((first * second + sign * half) / scale - 1 for sign in (-1, 1))
    return Estimate(quotient - 1, error, low, high, p_value)
