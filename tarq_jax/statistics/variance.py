"""The variance of a mean over S seeds and U test users, with seeds and data as separate sources."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from tarq_jax import checks
from tarq_jax.statistics.estimates import Estimate, wald


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
    subtracted. Degrees of freedom are Satterthwaite's. These are moment estimators of crossed random effects;
    their use for seeds and users is ours.

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
    total = between + data - both
    degrees = total**2 / (between**2 / (seeds - 1) + data**2 / (units - 1)) if total else units - 1
    return SeededEstimate(wald(float(values.mean()), total, level=level, degrees=degrees),
                          Components(between - both, data - both, both))
