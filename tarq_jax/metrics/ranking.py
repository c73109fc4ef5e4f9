"""How well candidates are ordered, how true their probabilities are, how close they are to full attention.

Everything here runs on the host in float64, on an entire evaluation set: arguments are NumPy or JAX arrays,
results Python floats. The cost is that of a sort; no loop runs over users or requests. Axis letters are those
of `tarq_jax.types`: B request, G candidate of a request, D width.

Labels, scores, weights and groups may have any shape, but all the same one (nothing is broadcast). Select the
real candidates first (`labels[mask]`), or give padding the weight 0: both give the same result. A metric that
is undefined for the data, such as the AUC of a single class, is `nan`.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from tarq_jax import checks


class GroupedAuc(NamedTuple):
    """What `grouped_auc` returns."""

    value: float  # weighted mean over the groups used; nan if there are none
    groups_used: int  # groups with both classes
    groups_total: int  # groups with any weight


def auc(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Area under the ROC curve.

    `sum_ij w_i w_j ([s_i > s_j] + [s_i = s_j] / 2) / sum_ij w_i w_j` over positives i and negatives j: the
    chance that a positive scores above a negative, ties counted half (Mann-Whitney U).

    Args:
      labels: [...] in {0, 1}.
      scores: [...] finite; logits or probabilities, as only their order matters.
      weights: [...] >= 0, importance of each candidate; 1 if not given.

    Returns:
      The area, in [0, 1]; `nan` when one of the classes has no weight.

    Raises:
      ValueError: shapes differ, a label is not 0 or 1, a score or weight is not finite, a weight is < 0.

    >>> auc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    0.75
    """
    labels, scores, weights = _arguments(labels, "scores", scores, weights)
    groups = np.zeros(labels.shape, dtype=np.int8)
    won, positive, negative = _pairs_by_group(labels, scores, groups, weights, np.argsort(scores))
    return _ratio(won.sum(), (positive * negative).sum())


def grouped_auc(
    labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, weights: ArrayLike | None = None
) -> GroupedAuc:
    """AUC within each group (user), averaged over groups by their number of candidates (GAUC).

    `sum_u n_u AUC_u / sum_u n_u`, with n_u the impressions of user u, as under "Metrics" in Zhou et al.,
    "Deep Interest Network for Click-Through Rate Prediction", KDD 2018 (arXiv 1706.06978). Groups with only
    one class have no AUC and are left out of both sums. With weights, AUC_u is weighted and n_u is the weight
    of the group.

    Args:
      labels: [...] in {0, 1}.
      scores: [...] finite.
      groups: [...] integers or strings, the user (or request) of each candidate, in any order.
      weights: [...] >= 0, importance of each candidate; 1 if not given.

    Returns:
      A `GroupedAuc`: the mean, `nan` if no group has both classes, and the numbers of groups behind it.

    Raises:
      ValueError: as `auc`; or groups are floats, in which large identifiers collide.

    >>> grouped_auc([0, 1, 0, 1, 1], [0.2, 0.9, 0.7, 0.3, 0.5], [7, 7, 8, 8, 9])
    GroupedAuc(value=0.5, groups_used=2, groups_total=3)
    """
    groups = np.asarray(groups)
    checks.shape_of("groups", groups, np.shape(labels), "labels")
    if groups.dtype.kind not in "iubUS" and groups.size:
        raise ValueError(f"groups: expected integers or strings, got dtype {groups.dtype}")
    labels, scores, weights = _arguments(labels, "scores", scores, weights)
    groups = groups.ravel()
    order = np.lexsort((scores, groups))
    won, positive, negative = _pairs_by_group(labels, scores, groups, weights, order)
    pairs, size = positive * negative, positive + negative
    used = pairs > 0
    value = _ratio((size[used] * won[used] / pairs[used]).sum(), size[used].sum())
    return GroupedAuc(value, int(used.sum()), int((size > 0).sum()))


def log_loss(labels: ArrayLike, logits: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Mean binary cross-entropy of logits, in nats.

    It is `-log sigmoid(x)` of a positive and `-log sigmoid(-x)` of a negative, without clipping: a logit of
    1e4 costs 1e4 if it is wrong.

    Args:
      labels: [...] in {0, 1}.
      logits: [...] finite.
      weights: [...] >= 0; 1 if not given.

    Returns:
      The weighted mean; `nan` when there is no weight.

    Raises:
      ValueError: as `auc`.

    >>> round(log_loss([1, 0], [0.0, 0.0]), 6)
    0.693147
    """
    labels, logits, weights = _arguments(labels, "logits", logits, weights)
    return _ratio(weights @ -special.log_expit(np.where(labels, logits, -logits)), weights.sum())


def calibration(labels: ArrayLike, logits: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Predicted over observed positives: `sum w sigmoid(logit) / sum w label`.

    Args:
      labels: [...] in {0, 1}.
      logits: [...] finite.
      weights: [...] >= 0; 1 if not given.

    Returns:
      The ratio: 1 if calibrated on average, above 1 if predictions are too high; `nan` if no positive is
      observed.

    Raises:
      ValueError: as `auc`.

    >>> calibration([1, 0, 0, 0], [0.0, 0.0, 0.0, 0.0])
    2.0
    """
    labels, logits, weights = _arguments(labels, "logits", logits, weights)
    return _ratio(weights @ special.expit(logits), weights @ labels)


def recall_at_k(scores: ArrayLike, reference: ArrayLike, mask: ArrayLike, k: int) -> float:
    """Share of the reference's top k candidates that are among the top k by scores, mean over requests.

    Only requests with more than k real candidates count: in the others every ranking has recall 1. The order
    of candidates does not decide ties. Candidates tied at the k-th score share the remaining places equally
    (the expectation over random tie-breaks); candidates tied at the reference's k-th score are equally good.
    Constant scores thus have the recall of chance, k over the number of candidates.

    Args:
      scores: [B, G], of the ranking under test; finite for real candidates.
      reference: [B, G], of the ranking to match, full target attention; finite for real candidates.
      mask: [B, G] bool, True where the candidate is real.
      k: how many are kept, at least 1.

    Returns:
      The mean recall, in [0, 1]; `nan` if no request has more than k real candidates.

    Raises:
      ValueError: shapes differ, a real score is not finite, mask is not boolean, k < 1.

    >>> scores, reference = [[4.0, 3.0, 2.0, 1.0]], [[9.0, 1.0, 5.0, 7.0]]
    >>> recall_at_k(scores, reference, [[True] * 4], k=2)
    0.5
    """
    scores, reference, mask = _requests(scores, reference, mask)
    k = checks.positive_int("k", k)
    kept = mask.sum(axis=1) > k
    if not kept.any():
        return math.nan
    above, tied, places = _top_k(np.where(mask, scores, -np.inf)[kept], k)
    chosen = above + tied * (places / tied.sum(axis=1))[:, None]  # [B, G], chance of a place
    above, tied, places = _top_k(np.where(mask, reference, -np.inf)[kept], k)
    hits = (chosen * above).sum(axis=1) + np.minimum((chosen * tied).sum(axis=1), places)
    return float(hits.mean() / k)


def rank_correlation(scores: ArrayLike, reference: ArrayLike, mask: ArrayLike) -> float:
    """Spearman's rank correlation within each request, with average ranks for ties; mean over requests.

    Requests with fewer than two real candidates, or with constant scores or reference, have no correlation
    and are left out.

    Args:
      scores: [B, G], of the ranking under test; finite for real candidates.
      reference: [B, G], of the ranking to match; finite for real candidates.
      mask: [B, G] bool, True where the candidate is real.

    Returns:
      The mean correlation, in [-1, 1]; `nan` when no request has one.

    Raises:
      ValueError: shapes differ, a real score is not finite, mask is not boolean.

    >>> rank_correlation([[1.0, 2.0, 3.0]], [[1.0, 3.0, 2.0]], [[True] * 3])
    0.5
    """
    scores, reference, mask = _requests(scores, reference, mask)
    a, b = _centred_ranks(scores, mask), _centred_ranks(reference, mask)
    variances = (a * a).sum(axis=1) * (b * b).sum(axis=1)
    defined = variances > 0
    correlations = (a * b).sum(axis=1)[defined] / np.sqrt(variances[defined])
    return _ratio(correlations.sum(), defined.sum())


def gap_recovered(auc_student: float, auc_two_tower: float, auc_target_attention: float) -> float:
    """Share of the gap from two-tower to target attention that a student wins back.

    `(AUC_student - AUC_two_tower) / (AUC_TA - AUC_two_tower)`, each trained alone on the same data and
    budget. Below 0: worse than two-tower; above 1: better than target attention.

    Args:
      auc_student: AUC of the student.
      auc_two_tower: AUC of the two-tower baseline.
      auc_target_attention: AUC of full target attention.

    Returns:
      The share; `nan` if target attention does not beat two-tower, or an AUC is `nan`.

    >>> round(gap_recovered(0.75, 0.70, 0.80), 6)
    0.5
    """
    gap = float(auc_target_attention) - float(auc_two_tower)
    return (float(auc_student) - float(auc_two_tower)) / gap if gap > 0 else math.nan


def error_energy(approximation: ArrayLike, exact: ArrayLike, mask: ArrayLike | None = None) -> np.ndarray:
    """`sum |approximation - exact|^2` and `sum |exact|^2`; values of batches can be added.

    Args:
      approximation: [..., D]; real vectors are finite.
      exact: [..., D]; real vectors are finite.
      mask: [...] bool, True where the vector is real; all of them if not given.

    Returns:
      [2] float64.

    Raises:
      ValueError: shapes differ, there is no axis D, a real value is not finite, mask is not boolean.

    >>> error_energy([[3.0, 0.0]], [[3.0, 4.0]])
    array([16., 25.])
    """
    exact_shape = np.shape(exact)
    if not exact_shape:
        raise ValueError("exact: expected shape [..., D], got a scalar")
    mask = np.ones(exact_shape[:-1], np.bool_) if mask is None else checks.boolean("mask", mask)
    checks.shape_of("mask", mask, exact_shape[:-1], "exact without its last axis")
    exact = checks.finite("exact", exact, mask[..., None])[mask]
    checks.shape_of("approximation", approximation, exact_shape, "exact")
    approximation = checks.finite("approximation", approximation, mask[..., None])[mask]
    return np.array([np.square(approximation - exact).sum(), np.square(exact).sum()])


def relative_error(energy: ArrayLike) -> float:
    """Relative error of vectors: `sqrt(sum |approximation - exact|^2 / sum |exact|^2)`.

    Both sums run over all real vectors, so that long vectors count more and short ones cannot dominate.

    Args:
      energy: [2], from `error_energy`; a sum over batches if there are several.

    Returns:
      The error, 0 if equal; `nan` when all exact vectors are zero or none is real.

    Raises:
      ValueError: the energy is not [2], or negative or not finite.

    >>> relative_error(error_energy([[3.0, 0.0]], [[3.0, 4.0]]))
    0.8
    """
    energy = checks.non_negative("energy", energy)
    checks.shape_of("energy", energy, (2,), "error and exact")
    return math.sqrt(_ratio(*energy))


def _arguments(labels, name, scores, weights):
    """Flat labels [M] bool, scores [M] and weights [M] float64, guarded."""
    labels, scores = checks.binary("labels", labels), checks.finite(name, scores)
    checks.shape_of(name, scores, labels.shape, "labels")
    weights = np.ones(labels.shape) if weights is None else checks.non_negative("weights", weights)
    checks.shape_of("weights", weights, labels.shape, "labels")
    return labels.ravel(), scores.ravel(), weights.ravel()


def _requests(scores, reference, mask):
    """Scores and reference [B, G] float64 and mask [B, G] bool, guarded."""
    mask = checks.boolean("mask", mask)
    checks.rank_of("mask", mask, "B G")
    for name, values in (("scores", scores), ("reference", reference)):
        checks.shape_of(name, values, mask.shape, "mask")
    return checks.finite("scores", scores, mask), checks.finite("reference", reference, mask), mask


def _pairs_by_group(labels, scores, groups, weights, order):
    """Per group: weight of correctly ordered pairs (ties half), of positives, of negatives.

    `order` [M] sorts by group, then by score. Runs of one group and one score are summed first; a run's
    positives win over all negatives in lower runs of the group and half of those in their own run.
    """
    if not order.size:
        return np.zeros((3, 0))
    labels, scores, groups, weights = labels[order], scores[order], groups[order], weights[order]
    new_group = np.concatenate(([True], groups[1:] != groups[:-1]))
    new_run = new_group | np.concatenate(([True], scores[1:] != scores[:-1]))
    runs = np.flatnonzero(new_run)
    positive = np.add.reduceat(weights * labels, runs)
    negative = np.add.reduceat(weights * ~labels, runs)
    group_starts = np.flatnonzero(new_group[runs])  # indices of runs
    run_group = np.cumsum(new_group[runs]) - 1
    below = np.concatenate(([0.0], np.cumsum(negative)[:-1]))  # exclusive, over all groups
    below -= below[group_starts][run_group]
    won = positive * (below + negative / 2)
    return tuple(np.add.reduceat(x, group_starts) for x in (won, positive, negative))


def _top_k(values, k):
    """[B, G] bool, which values are above the k-th largest and which equal it; [B] places left for those."""
    threshold = np.partition(values, -k, axis=1)[:, -k, None]
    above = values > threshold
    return above, values == threshold, k - above.sum(axis=1)


def _centred_ranks(values, mask):
    """Average ranks [B, G] of the real entries of each row, less their mean; 0 on padding."""
    if not values.size:
        return np.zeros(values.shape)
    from scipy import stats  # only here: importing it takes most of a second

    ranks = stats.rankdata(np.where(mask, values, np.inf), axis=1)  # padding ranks last
    return np.where(mask, ranks - (mask.sum(axis=1, keepdims=True) + 1) / 2, 0.0)


def _ratio(numerator, denominator) -> float:
    return float(numerator) / float(denominator) if denominator > 0 else math.nan
