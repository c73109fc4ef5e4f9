"""Estimates: a number with its standard error, an interval, and the p-value of a null hypothesis."""

import math
from typing import NamedTuple

from scipy import stats


class Estimate(NamedTuple):
    """A number with its uncertainty."""

    value: float
    standard_error: float
    low: float  # of the interval
    high: float
    p_value: float  # two-sided, of the hypothesis that the true value is the null


def check_level(level: float) -> float:
    """`level`; ValueError unless it is in (0, 1)."""
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number in (0, 1), got {level!r}")
    return level


def wald(value: float, variance: float, *, level: float = 0.95, null: float = 0.0,
         degrees: float = math.inf) -> Estimate:
    """The estimate of a normally distributed value whose variance was estimated, too.

    Args:
      value: the estimate.
      variance: variance of the estimate, at least 0.
      level: level of the interval, in (0, 1).
      null: the value of the hypothesis that `p_value` tests.
      degrees: degrees of freedom of the variance; infinite for the normal distribution.

    Returns:
      An `Estimate`; with a variance of 0 its interval is the value, and its p-value 0 or 1.

    Raises:
      ValueError: the level is not in (0, 1).

    >>> estimate = wald(1.96, 1.0)
    >>> round(estimate.low, 3), round(estimate.p_value, 3)
    (0.0, 0.05)
    """
    quantile = float(stats.t.ppf(0.5 + check_level(level) / 2, degrees))
    error = math.sqrt(max(variance, 0.0))
    away = abs(value - null)
    p_value = float(2 * stats.t.sf(away / error, degrees)) if error else float(not away)
    return Estimate(value, error, value - quantile * error, value + quantile * error, p_value)
