"""Power: how small an effect a test can find, and how many users that needs."""

import math
from typing import Any

from scipy import stats

from tarq_jax.statistics.estimates import check_level


def minimum_detectable_effect(standard_error: float, *, level: float = 0.95, power: float = 0.8) -> float:
    """The true difference that a two-sided test finds with probability `power`, in units of the error.

    `(z_{1 - alpha / 2} + z_power) standard_error`, by normal approximation.

    Args:
      standard_error: standard error of the difference, at least 0.
      level: 1 - alpha.
      power: in ((1 - level) / 2, 1).

    Raises:
      ValueError: a number is out of range.

    >>> round(minimum_detectable_effect(1.0), 3)
    2.802
    """
    if not 0 <= standard_error < math.inf:
        raise ValueError(f"standard_error: expected a number of at least 0, got {standard_error!r}")
    return _quantiles(level, power) * standard_error


def users_needed(effect: float, deviation: float, *, share: float = 0.5, level: float = 0.95,
                 power: float = 0.8) -> float:
    """Number of users, both arms together, that is needed to find a true difference of means.

    `((z_{1 - alpha / 2} + z_power) deviation / effect)^2 (1 / share + 1 / (1 - share))`, see
    `statsmodels.stats.power.normal_sample_size_one_tail`.

    Args:
      effect: the difference, not 0.
      deviation: standard deviation of a user's value.
      share: share of the users that are in one of the arms, in (0, 1).
      level: 1 - alpha.
      power: in ((1 - level) / 2, 1).

    Raises:
      ValueError: a number is out of range.

    >>> round(users_needed(0.1, 1.0))
    3140
    """
    if not effect or not math.isfinite(effect):
        raise ValueError(f"effect: expected a number other than 0, got {effect!r}")
    if not 0 < share < 1:
        raise ValueError(f"share: expected a number in (0, 1), got {share!r}")
    if not 0 <= deviation < math.inf:
        raise ValueError(f"deviation: expected a number of at least 0, got {deviation!r}")
    if not deviation:
        return 0.0
    _quantiles(level, power)  # checks their ranges
    alone = _statsmodels().normal_sample_size_one_tail(
        abs(effect), power, (1 - level) / 2, std_null=deviation)  # for one mean against a fixed number
    return float(alone) * (1 / share + 1 / (1 - share))


def power_of(effect: float, standard_error: float, *, level: float = 0.95) -> float:
    """Probability that a two-sided test finds a true difference.

    Args:
      effect: the difference.
      standard_error: standard error of its estimate, above 0.
      level: 1 - alpha.

    Raises:
      ValueError: a number is out of range.

    >>> round(power_of(2.802, 1.0), 3)
    0.8
    """
    if not math.isfinite(effect):
        raise ValueError(f"effect: expected a finite number, got {effect!r}")
    if not 0 < standard_error < math.inf:
        raise ValueError(f"standard_error: expected a number above 0, got {standard_error!r}")
    return float(_statsmodels().normal_power(abs(effect), 1, 1 - check_level(level), sigma=standard_error))


def _statsmodels() -> Any:
    from statsmodels.stats import power  # imported here because it takes a second

    return power


def _quantiles(level: float, power: float) -> float:
    by_chance = (1 - check_level(level)) / 2  # probability of a finding on this side without an effect
    if not by_chance < power < 1:
        raise ValueError(f"power: expected a number in ({by_chance:.4g}, 1), got {power!r}")
    return float(stats.norm.ppf(0.5 + level / 2) + stats.norm.ppf(power))
