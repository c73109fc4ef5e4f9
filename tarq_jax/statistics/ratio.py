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


class Arms(NamedTuple):
    """The ratios of two arms, and how their errors vary together."""

    treatment: float
    control: float
    covariance: np.ndarray  # [2, 2], of (treatment, control)


def independent(treatment: Ratio, control: Ratio) -> Arms:
    """Two arms whose errors are independent."""
    return Arms(treatment.value, control.value, np.diag([treatment.variance, control.variance]))


def cuped(treatment: Ratio, control: Ratio, before_treatment: Ratio, before_control: Ratio) -> Arms:
    """Both ratios, less what the same users' ratio in a period before the test explains.

    `r - theta (r_before - mean of r_before over both arms)`. Both arms have the same theta: the slope of a
    regression of users' influence on r on their influence on r_before (Deng et al. 2013; by influence for
    ratios, Deng, Knoblich and Lu 2018). As they share the mean too, the errors of the results are correlated.

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
    counts = np.array([len(now.influence) for now, _ in arms])
    scaled = [tuple(count * part.influence for part in arm) for count, arm in zip(counts, arms, strict=True)]
    spread = sum(float(before @ before) for _, before in scaled)
    theta = sum(float(now @ before) for now, before in scaled) / spread if spread else 0.0
    own, others = counts / counts.sum(), counts[::-1] / counts.sum()
    values, covariance = [], np.zeros((2, 2))
    for index, (now, before) in enumerate(arms):
        values.append(now.value - theta * others[index] * (before.value - arms[1 - index][1].value))
        influence = np.empty((2, counts[index]))  # of this arm's users on both results
        influence[index] = now.influence - theta * others[index] * before.influence
        influence[1 - index] = theta * own[index] * before.influence
        covariance += counts[index] / (counts[index] - 1) * influence @ influence.T
    return Arms(values[0], values[1], covariance)


def lift(treatment: Ratio, control: Ratio, *, before: tuple[Ratio, Ratio] | None = None,
         level: float = 0.95) -> Estimate:
    """Relative difference `r_t / r_c - 1` of two arms, whose users are independent.

    The interval is Fieller's (1954): all lifts d for which `r_t - (1 + d) r_c` does not differ from 0
    significantly. If the control is known well, it is about the delta method's, `value +- z error`, and
    agrees with the p-value, which is that of `r_t - r_c = 0`. If the control could be 0, the interval is
    infinite, whatever the p-value.

    Args:
      treatment: ratio of the treated users.
      control: ratio of the control users; its value has to differ from 0.
      before: the ratios of both arms in a period before the test, for `cuped`; None if there is none.
      level: confidence level of the interval.

    Raises:
      ValueError: the control's value is 0, or `cuped` makes it 0 or changes its sign.

    >>> estimate = lift(ratio([1, 0, 1, 1], [1, 1, 1, 1]), ratio([1, 0, 1, 0], [1, 1, 1, 1]))
    >>> estimate.value
    0.5
    """
    if not control.value:
        raise ValueError("control: expected a value other than 0 for a lift over it, got 0")
    now = _in_unit(treatment, control)  # changes no lift; squares of very small numbers would be 0
    first, second, covariance = independent(*now) if before is None else cuped(*now, *_in_unit(*before))
    if np.sign(second) != np.sign(control.value):
        raise ValueError(f"control: expected an adjusted value of the sign of {control.value:g}, got "
                         f"{second / now[1].value * control.value:g}; the arms differed before")
    if abs(first - second) <= ROUNDING * max(abs(first), abs(second)):
        first = second
    quotient = first / second
    spread, both, other = covariance[0, 0], covariance[0, 1], covariance[1, 1]
    error = math.sqrt(max(spread - 2 * quotient * both + quotient**2 * other, 0.0)) / abs(second)
    p_value = wald(first - second, spread - 2 * both + other, level=level).p_value
    square = stats.norm.ppf(0.5 + level / 2) ** 2
    scale, middle = second**2 - square * other, first * second - square * both
    if scale <= 0:
        return Estimate(quotient - 1, error, -math.inf, math.inf, p_value)
    half = math.sqrt(max(middle**2 - scale * (first**2 - square * spread), 0.0))
    low, high = ((middle + sign * half) / scale - 1 for sign in (-1, 1))
    return Estimate(quotient - 1, error, low, high, p_value)


def _in_unit(first: Ratio, second: Ratio) -> tuple[Ratio, Ratio]:
    """Both ratios, divided by the larger of their absolute values."""
    unit = max(abs(first.value), abs(second.value)) or 1.0
    one, other = (Ratio(part.value / unit, part.influence / unit) for part in (first, second))
    return one, other
