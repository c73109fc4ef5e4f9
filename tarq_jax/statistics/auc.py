"""Intervals and paired tests of AUC by DeLong's placements, over independent candidates or over users.

The method is that of DeLong, DeLong and Clarke-Pearson 1988, in O(n log n) by one sort as in Sun and Xu 2014.
Candidates of one user are not independent: with `users`, placements are summed within each user, as in
Obuchowski 1997.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from tarq_jax import checks
from tarq_jax.statistics.estimates import Estimate, wald


class AucInfluence(NamedTuple):
    """An AUC, and what each independent unit adds to its error."""

    auc: float
    influence: np.ndarray  # [U], sums to 0; the variance of the AUC is U / (U - 1) times its sum of squares


def auc_influence(labels: ArrayLike, scores: ArrayLike, users: ArrayLike,
                  weights: ArrayLike | None = None) -> AucInfluence:
    """AUC with its influence by user.

    V_i is the share of negatives below positive i, ties counted half, V_j the share of positives above
    negative j; P and N are the numbers of positives and negatives. User u then adds
    `sum_{i in u} (V_i - AUC) / P + sum_{j in u} (V_j - AUC) / N` (Obuchowski 1997, eq. 5). With weights,
    shares, sums, P and N are weighted (ours): a weight of 2 counts the candidate twice.

    Args:
      labels: [C] in {0, 1}.
      scores: [C] finite.
      users: [C] integers or strings, the user of each candidate.
      weights: [C] > 0; 1 if not given.

    Returns:
      `AucInfluence`, users in the order of `numpy.unique`.

    Raises:
      ValueError: shapes differ, a value is out of range, or there are fewer than two users or candidates of a
        class.
    """
    positive, scores = _guarded(labels, "scores", scores)
    checks.shape_of("users", users, positive.shape, "labels")
    users = np.asarray(users)
    kinds = {type(user) for user in users} if users.dtype.kind == "O" else {users.dtype.type}
    if not any(all(issubclass(kind, allowed) for kind in kinds) for allowed in (
            str, np.bytes_, int | np.integer)) or bool in kinds:
        found = sorted(kind.__name__ for kind in kinds)
        raise ValueError(f"users: expected integers or strings, got {', '.join(found)}")
    _, unit = np.unique(users, return_inverse=True)
    units = int(unit.max()) + 1
    if units < 2:
        raise ValueError(f"users: expected at least 2, got {units}")
    if weights is not None:
        weights = checks.non_negative("weights", weights)
        checks.shape_of("weights", weights, positive.shape, "labels")
        if np.any(weights == 0):
            raise ValueError("weights: expected positive ones, got 0; leave those candidates out")
    auc, spread = _spread(positive, scores, weights)
    return AucInfluence(auc, np.bincount(unit, spread, units))


def auc_estimate(labels: ArrayLike, scores: ArrayLike, users: ArrayLike | None = None, *,
                 level: float = 0.95) -> Estimate:
    """AUC with an interval, and the p-value of the hypothesis that the AUC is 0.5.

    Args:
      labels: [C] in {0, 1}.
      scores: [C] finite.
      users: [C], the user of each candidate; candidates of one user may depend on each other. None for
        independent candidates (DeLong).
      level: level of the interval.

    Returns:
      An `Estimate`. Its interval and p-value are NaN if scores separate the classes completely: placements
      that do not vary carry no information about the error.

    Raises:
      ValueError: as `auc_influence`.

    >>> round(auc_estimate([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]).value, 3)
    0.75
    """
    if users is not None:
        auc, influence = auc_influence(labels, scores, users)
        return _estimate(auc, _clustered(influence), level, 0.5)
    positive, scores = _guarded(labels, "scores", scores)
    auc, spread = _spread(positive, scores)
    return _estimate(auc, _independent(positive, spread), level, 0.5)


def auc_difference(labels: ArrayLike, first: ArrayLike, second: ArrayLike, users: ArrayLike | None = None, *,
                   level: float = 0.95) -> Estimate:
    """AUC of the first scores less that of the second, on the same candidates: DeLong's paired test.

    Args:
      labels: [C] in {0, 1}.
      first: [C] finite.
      second: [C] finite.
      users: [C], the user of each candidate; None for independent candidates.
      level: level of the interval.

    Raises:
      ValueError: as `auc_estimate`.
    """
    if users is not None:
        (auc, influence), (other, others) = (auc_influence(labels, s, users) for s in (first, second))
        return _estimate(auc - other, _clustered(influence - others), level)
    positive, first = _guarded(labels, "first", first)
    _, second = _guarded(labels, "second", second)
    (auc, spread), (other, others) = (_spread(positive, scores) for scores in (first, second))
    return _estimate(auc - other, _independent(positive, spread - others), level)


def _guarded(labels: ArrayLike, name: str, scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    positive, scores = checks.binary("labels", labels), checks.finite(name, scores)
    checks.rank_of("labels", positive, "C")
    checks.shape_of(name, scores, positive.shape, "labels")
    for kind, count in (("1", positive.sum()), ("0", (~positive).sum())):
        if count < 2:
            raise ValueError(f"labels: expected at least 2 that are {kind}, got {count}")
    return positive, scores


def _spread(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None
            ) -> tuple[float, np.ndarray]:
    """AUC, and [C] each candidate's weight times (placement - AUC), over the total weight of its class."""
    weights = np.ones(len(scores)) if weights is None else weights
    _, place = np.unique(scores, return_inverse=True)

    def below(of_class):
        """Weight of a class below each candidate, ties half."""
        at = np.bincount(place, weights * of_class)
        return (np.cumsum(at) - at / 2)[place]

    all_positive, all_negative = weights[positive].sum(), weights[~positive].sum()
    placements = np.where(positive, below(~positive) / all_negative, 1.0 - below(positive) / all_positive)
    auc = float(weights[positive] @ placements[positive] / all_positive)
    return auc, weights * (placements - auc) / np.where(positive, all_positive, all_negative)


def _independent(positive: np.ndarray, spread: np.ndarray) -> float:
    """DeLong's variance: the variance of each class's placements, divided by their number, summed."""
    def of_class(spread: np.ndarray) -> float:
        return len(spread) / (len(spread) - 1) * np.square(spread).sum()

    return float(of_class(spread[positive]) + of_class(spread[~positive]))


def _estimate(value: float, variance: float, level: float, null: float = 0.0) -> Estimate:
    """`wald`, except that zero variance with a value other than the null gives NaN for interval and p-value.

    Constant placements carry no information about the error.
    """
    if not variance and value != null:
        return Estimate(value, 0.0, np.nan, np.nan, np.nan)
    return wald(value, variance, level=level, null=null)


def _clustered(influence: np.ndarray) -> float:
    units = len(influence)
    return units / (units - 1) * float(np.square(influence).sum())
