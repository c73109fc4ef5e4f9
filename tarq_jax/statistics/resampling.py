"""Resampling: bootstrap over users of any metric, and permutation of paired values."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from tarq_jax import checks
from tarq_jax.statistics.estimates import Estimate, check_level

CHUNK = 2**24  # weights that are in memory at the same time


def bootstrap(metric: Callable[[np.ndarray], ArrayLike], users: int | Sequence[int] | np.ndarray, *,
              replicates: int = 2000, seed: int = 0, level: float = 0.95, null: float = 0.0) -> Estimate:
    """Percentile interval of a metric under resampling of whole users (Efron and Tibshirani 1993, ch. 13).

    Args:
      metric: function from weights [R, U], how often each user was drawn in each replicate, to R values. A
        metric of candidates weights each by its user: `weights[:, user]`. A sum over users is
        `weights @ column`.
      users: U, the number of users; or the number for each group, such as an arm, within which users are then
        drawn: U is their sum.
      replicates: total number of replicates; `metric` may receive them in several parts.
      seed: seed of the draws.
      level: level of the interval.
      null: value that `p_value` tests: twice the smaller of the shares of replicates on either side of it.

    Returns:
      The metric of the original users, with the spread of the replicates.

    Raises:
      ValueError: a number is below 1, there is no group, or a replicate is not finite.
    """
    groups = [checks.positive_int("users", size) for size in np.atleast_1d(users).tolist()]
    if not groups:
        raise ValueError("users: expected a number, or one for each group, got none")
    total, replicates = sum(groups), checks.positive_int("replicates", replicates)
    tail = (1 - check_level(level)) / 2
    value = float(np.asarray(metric(np.ones((1, total)))).reshape(()))
    rng = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    while (left := replicates - sum(map(len, found))) > 0:
        count = min(left, max(1, CHUNK // total))
        drawn = [rng.multinomial(size, np.full(size, 1 / size), size=count) for size in groups]
        found.append(np.asarray(metric(np.concatenate(drawn, axis=1)), dtype=float))
    values = checks.finite("replicates of the metric", np.concatenate(found))
    low, high = np.quantile(values, [tail, 1 - tail])
    beyond = min((values <= null).mean(), (values >= null).mean())
    p_value = min(1.0, 2 * max(float(beyond), 1 / (replicates + 1)))
    return Estimate(value, float(values.std(ddof=1)) if replicates > 1 else 0.0, float(low), float(high),
                    p_value)


def paired_permutation(
    first: ArrayLike, second: ArrayLike, *, replicates: int = 9999, seed: int = 0
) -> float:
    """Two-sided p-value that paired values have the same mean, by permuting the signs of their differences.

    Exact if there are no more than `replicates` permutations, 2^U; see `scipy.stats.permutation_test`.

    Args:
      first: [U], one value per user.
      second: [U].
      replicates: largest number of permutations.
      seed: seed of the draws.

    Raises:
      ValueError: shapes differ, a value is not finite, there are fewer than 2, or `replicates` is below 1.

    >>> paired_permutation([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    0.25
    """
    first, second = checks.finite("first", first), checks.finite("second", second)
    checks.rank_of("first", first, "U")
    checks.shape_of("second", second, first.shape, "first")
    if len(first) < 2:
        raise ValueError(f"first: expected at least 2 values, got {len(first)}")
    replicates = checks.positive_int("replicates", replicates)
    done = stats.permutation_test(
        (first, second), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples",
        vectorized=True, n_resamples=replicates, batch=max(1, CHUNK // len(first)),
        rng=np.random.default_rng(seed))
    return float(done.pvalue)
