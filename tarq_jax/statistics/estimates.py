"""What an analysis says of a number: its value, how sure it is, and whether it differs from nothing."""

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
    """`level` if it is a share of certainty; ValueError otherwise."""
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number in (0, 1), got {level!r}")
    return level


def wald(value: float, variance: float, *, level: float = 0.95, null: float = 0.0,
         degrees: float = math.inf) -> Estimate:
    """The estimate of a value that is normal with a variance estimated on so many degrees of freedom.

    Args:
      value: the estimate.
      variance: of the estimate, at least 0.
      level: of the interval, in (0, 1).
      null: the value of the hypothesis that `p_value` tests.
      degrees: of freedom of the variance; infinite for the normal distribution.

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
