"""Seeds and data as separate sources of variance: what a mean over S seeds and U test users knows."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from tarq_jax import checks
from tarq_jax.statistics.estimates import Estimate, wald


class Components(NamedTuple):
    """Variances of the mean over all seeds, which add up to that of the estimate."""

    seeds: float  # of other seeds on the same users
    data: float  # of other users with the same seeds
    both: float  # that the two have in common


class SeededEstimate(NamedTuple):
    """An estimate that counts both sources, and what each adds."""

    estimate: Estimate
    components: Components


def over_seeds_and_data(values: ArrayLike, influence: ArrayLike, *, level: float = 0.95) -> SeededEstimate:
    """The mean of a metric over seeds, as an estimate for other seeds and other users.

    A two-way layout: with `values_s = mu + a_s + mean_u (b_u + c_su)` the variance of the mean is
    `var_a / S + var_b / U + var_c / (S U)`. The spread of values over seeds tells the first and the last
    term, the spread over users of the influence averaged over seeds the last two; the last, which is then
    counted twice, is the spread of the influence about that average. Degrees of freedom are Satterthwaite's.
    Moment estimators of crossed random effects; their use for seeds and users is ours.

    Args:
      values: [S], the metric of each seed, or a difference of two metrics of the same seed.
      influence: [S, U], what each user adds to its error, see `auc_influence`.
      level: of the interval.

    Returns:
      The estimate, whose p-value is of a mean of 0, and the components of its variance. With one seed the
      data alone count.

    Raises:
      ValueError: shapes differ, or a value is not finite.
    """
    values, influence = checks.finite("values", values), checks.finite("influence", influence)
    checks.rank_of("values", values, "S")
    checks.rank_of("influence", influence, "S U")
    seeds, units = influence.shape
    checks.shape_of("values", values, (seeds,), "influence without its last axis")
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
