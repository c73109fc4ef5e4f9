"""The variance of a mean over S seeds and U test users, with seeds and data as separate sources."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special

from tarq_jax import checks
from tarq_jax.statistics.estimates import Estimate, check_level, wald

SMALLEST = 1e-200  # p-values below this are 0; much below, `stdtrit` is wrong


class Components(NamedTuple):
    """Variances of the mean over all seeds, which add up to that of the estimate."""

    seeds: float  # from the choice of seeds, on the same users
    data: float  # from the choice of users, with the same seeds
    both: float  # from the interaction of seeds and users


class SeededEstimate(NamedTuple):
    """An estimate that accounts for both sources of variance, and what each adds."""

    estimate: Estimate
    components: Components


def over_seeds_and_data(values: ArrayLike, influence: ArrayLike, *, level: float = 0.95) -> SeededEstimate:
    """The mean of a metric over seeds, as an estimate for other seeds and other users.

    A two-way layout: with `values_s = mu + a_s + mean_u (b_u + c_su)` the variance of the mean is
    `var_a / S + var_b / U + var_c / (S U)`. The spread of values over seeds estimates the first plus the last
    term. The spread over users of the influence, averaged over seeds, estimates the last two terms. The last
    term is then counted twice; the spread of the influence about that average estimates it, and it is
    subtracted. These are moment estimators of crossed random effects; their use for seeds and users is ours.

    A quantile is the mean of those of t with S - 1 and with U - 1 degrees of freedom, weighted by the two
    variances (Cochran and Cox 1957, section 4.14). Unlike Satterthwaite's degrees, it holds its level with
    two seeds, too, which may agree by chance.

    Args:
      values: [S], the metric of each seed, or a difference of two metrics of the same seed.
      influence: [S, U], what each user adds to the error of the metric, see `auc_influence`.
      level: level of the interval.

    Returns:
      The estimate, whose p-value is that of a mean of 0, and the components of its variance. With one seed
      only the data count as a source.

    Raises:
      ValueError: shapes differ, or a value is not finite.
    """
    values, influence = checks.finite("values", values), checks.finite("influence", influence)
    checks.rank_of("values", values, "S")
    checks.rank_of("influence", influence, "S U")
    seeds, units = influence.shape
    checks.shape_of("values", values, (seeds,), "influence without its last axis")
    if not seeds:
        raise ValueError("values: expected at least 1 seed, got 0")
    if units < 2:
        raise ValueError(f"influence: expected at least 2 users, got {units}")
    bessel = units / (units - 1)
    average = influence.mean(axis=0)
    data = bessel * float(np.square(average).sum())
    if seeds == 1:
        return SeededEstimate(wald(values[0], data, level=level, degrees=units - 1),
                              Components(0.0, data, 0.0))
    between = float(values.var(ddof=1)) / seeds
    both = bessel * float(np.square(influence - average).sum()) / (seeds - 1) / seeds
    both = min(both, between, data)
    share = between / (between + data) if between + data else 0.0
    estimate = _mixed(float(values.mean()), between + data - both, (share, seeds - 1), (1 - share, units - 1),
                      level=level)
    return SeededEstimate(estimate, Components(between - both, data - both, both))


def _mixed(value: float, variance: float, *parts: tuple[float, int], level: float) -> Estimate:
    """As `wald`, with a quantile that is a mean of those of t; parts are (weight, degrees of freedom)."""
    error = math.sqrt(variance)
    if not error:
        return wald(value, 0.0, level=level)

    def quantile(tail: float) -> float:
        return -sum(weight * special.stdtrit(degrees, tail) for weight, degrees in parts if weight)

    def beyond(log_tail: float) -> float:
        return quantile(math.exp(log_tail)) - abs(value) / error

    half = quantile((1 - check_level(level)) / 2) * error
    least, most = math.log(SMALLEST / 2), math.log(0.5)
    p_value = 0.0 if beyond(least) < 0 else 2 * math.exp(optimize.brentq(beyond, least, most))
    return Estimate(value, error, value - half, value + half, p_value)
