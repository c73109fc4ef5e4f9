"""Ranking metrics: closed forms, scikit-learn and SciPy as references, properties, extreme inputs."""

import doctest
import importlib
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as reference_metrics

from tarq_jax import metrics

examples = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def candidates(seed, size=40, num_scores=8, num_groups=5):
    """Labels of both classes, scores with ties, positive weights and groups."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(size) % rng.integers(2, 5) == 0).astype(np.float32)
    scores = rng.integers(0, num_scores, size) - num_scores / 2
    return labels, scores, rng.uniform(0.1, 3.0, size), rng.integers(0, num_groups, size)


def requests(seed, shape=(6, 12), num_scores=5):
    """Scores and reference scores with ties, and a mask of uneven lengths, 0 included."""
    rng = np.random.default_rng(seed)
    mask = np.arange(shape[1]) < rng.integers(0, shape[1] + 1, shape[0])[:, None]
    scores, reference = rng.integers(0, num_scores, (2, *shape)).astype(np.float64)
    return scores, reference, rng.permuted(mask, axis=1)


# AUC


@pytest.mark.parametrize(
    ("labels", "scores", "expected"),
    [
        ([0, 1], [1.0, 2.0], 1.0),
        ([1, 0], [1.0, 2.0], 0.0),
        ([1, 0], [2.0, 2.0], 0.5),
        ([0, 0, 1, 1], [1.0, 3.0, 3.0, 4.0], 0.875),
        ([1, 0], [-0.0, 0.0], 0.5),
        ([[0, 1], [1, 0]], [[0.0, 2.0], [1.0, 3.0]], 0.5),
    ],
)
def test_auc_closed_form(labels, scores, expected):
    assert metrics.auc(labels, scores) == expected


def test_auc_weights_closed_form():
    # Pairs (positive, negative) of weight 1*3 are won, and pairs of weight 2*3 are lost.
    assert metrics.auc([1, 1, 0], [2.0, 0.0, 1.0], [1.0, 2.0, 3.0]) == pytest.approx(1 / 3)


@examples
@given(seeds)
def test_auc_is_that_of_scikit_learn(seed):
    labels, scores, weights, _ = candidates(seed)
    expected = reference_metrics.roc_auc_score(labels, scores)
    assert metrics.auc(labels, scores) == pytest.approx(expected, abs=1e-12)
    expected = reference_metrics.roc_auc_score(labels, scores, sample_weight=weights)
    assert metrics.auc(labels, scores, weights) == pytest.approx(expected, abs=1e-12)


@examples
@given(seeds)
def test_auc_properties(seed):
    labels, scores, weights, _ = candidates(seed)
    value = metrics.auc(labels, scores, weights)
    order = np.random.default_rng(seed).permutation(labels.size)
    assert 0.0 <= value <= 1.0
    assert metrics.auc(labels, np.exp(scores), weights) == pytest.approx(value, abs=1e-12)
    assert metrics.auc(1 - labels, scores, weights) == pytest.approx(1 - value, abs=1e-12)
    assert metrics.auc(labels[order], scores[order], weights[order]) == pytest.approx(value, abs=1e-12)
    even_weights = metrics.auc(labels, scores, np.full(labels.size, 2.5))
    assert even_weights == pytest.approx(metrics.auc(labels, scores), abs=1e-12)


@pytest.mark.parametrize("labels", [[], [1, 1], [0, 0, 0]])
def test_auc_of_one_class_is_nan(labels):
    assert math.isnan(metrics.auc(labels, np.arange(len(labels))))
    assert math.isnan(metrics.grouped_auc(labels, np.arange(len(labels)), np.arange(len(labels))).value)


def test_auc_of_extreme_scores_and_of_jax_arrays():
    assert metrics.auc([0, 1, 1], [-1e300, 1e300, 1e-300]) == 1.0
    assert metrics.auc(jnp.array([0.0, 1.0]), jnp.array([1.0, 2.0], dtype=jnp.bfloat16)) == 1.0
    assert metrics.auc(np.array([False, True]), [1, 2]) == 1.0


@pytest.mark.parametrize("metric", [metrics.auc, metrics.log_loss, metrics.calibration])
def test_weight_zero_is_leaving_out(metric):
    labels, scores, weights, _ = candidates(0)
    kept = np.arange(labels.size) % 3 > 0
    expected = metric(labels[kept], scores[kept], weights[kept])
    assert metric(labels, scores, weights * kept) == pytest.approx(expected, abs=1e-12)
    assert math.isnan(metric(labels, scores, np.zeros(labels.size)))


# Grouped AUC


@examples
@given(seeds)
def test_grouped_auc_is_a_weighted_mean_of_scikit_learn(seed):
    labels, scores, weights, groups = candidates(seed, num_groups=9)
    for w in (np.ones(labels.size), weights):
        total, used, value = 0.0, 0, 0.0
        for group in np.unique(groups):
            own = groups == group
            if 0 < labels[own].mean() < 1:
                auc = reference_metrics.roc_auc_score(labels[own], scores[own], sample_weight=w[own])
                value, total, used = value + auc * w[own].sum(), total + w[own].sum(), used + 1
        result = metrics.grouped_auc(labels, scores, groups, w)
        assert result.value == pytest.approx(value / total if used else math.nan, abs=1e-12, nan_ok=True)
        assert (result.groups_used, result.groups_total) == (used, len(np.unique(groups)))


@examples
@given(seeds)
def test_grouped_auc_properties(seed):
    labels, scores, weights, groups = candidates(seed)
    result = metrics.grouped_auc(labels, scores, groups, weights)
    shift = np.random.default_rng(seed).normal(size=5)[groups]  # only the order within a group matters
    order = np.random.default_rng(seed).permutation(labels.size)
    one_group = metrics.grouped_auc(labels, scores, np.zeros(labels.size, int), weights)
    assert one_group == (pytest.approx(metrics.auc(labels, scores, weights), abs=1e-12), 1, 1)
    for same in (
        metrics.grouped_auc(labels, scores, np.char.add("user-", groups.astype(str)), weights),
        metrics.grouped_auc(labels, 2 * scores + 1, -groups, weights),
        metrics.grouped_auc(labels, (scores * 1024).round() + (shift * 1024).round(), groups, weights),
        metrics.grouped_auc(labels[order], scores[order], groups[order], weights[order]),
    ):
        assert same == (pytest.approx(result.value, abs=1e-12), result.groups_used, result.groups_total)


def test_grouped_auc_leaves_out_one_class_and_padding():
    labels, scores = [1, 0, 1, 1, 0, 1], [2.0, 1.0, 5.0, 6.0, 9.0, 0.0]
    assert metrics.grouped_auc(labels, scores, [4, 4, 2, 2, 0, 0], [1, 1, 1, 1, 0, 0]) == (1.0, 1, 2)
    assert metrics.grouped_auc([], [], []).groups_total == 0


# Log loss and calibration


@examples
@given(seeds)
def test_log_loss_is_that_of_scikit_learn(seed):
    labels, logits, weights, _ = candidates(seed)
    probabilities = 1 / (1 + np.exp(-logits))
    expected = reference_metrics.log_loss(labels, probabilities)
    assert metrics.log_loss(labels, logits) == pytest.approx(expected)
    expected = reference_metrics.log_loss(labels, probabilities, sample_weight=weights)
    assert metrics.log_loss(labels, logits, weights) == pytest.approx(expected)


def test_log_loss_of_extreme_logits():
    assert metrics.log_loss([1, 0], [1e4, -1e4]) == 0.0
    assert metrics.log_loss([1, 0], [-1e4, 1e4]) == 1e4
    assert metrics.log_loss([1], [50.0]) == pytest.approx(math.exp(-50.0))


def test_calibration():
    assert metrics.calibration([1, 0], [0.0, 0.0]) == 1.0
    assert metrics.calibration([1, 0], [0.0, 0.0], [1.0, 3.0]) == 2.0
    assert metrics.calibration([1, 0], [1e4, -1e4]) == 1.0
    assert metrics.calibration([1, 0], [-1e4, -1e4]) == 0.0
    assert math.isnan(metrics.calibration([0, 0], [0.0, 0.0]))


# Recall and rank correlation


@examples
@given(seeds, st.integers(1, 8))
def test_recall_is_that_of_a_sort(seed, k):
    rng = np.random.default_rng(seed)
    _, _, mask = requests(seed)
    scores, reference = rng.normal(size=(2, *mask.shape))
    shares = []
    for s, r, m in zip(scores, reference, mask, strict=True):
        if m.sum() > k:
            top = [set(np.flatnonzero(m)[np.argsort(-x[m])[:k]]) for x in (s, r)]
            shares.append(len(top[0] & top[1]) / k)
    expected = np.mean(shares) if shares else math.nan
    assert metrics.recall_at_k(scores, reference, mask, k) == pytest.approx(expected, nan_ok=True)


@examples
@given(seeds, st.integers(1, 8))
def test_recall_properties(seed, k):
    scores, reference, mask = requests(seed)
    value = metrics.recall_at_k(scores, reference, mask, k)
    if not (mask.sum(axis=1) > k).any():
        assert math.isnan(value)
        return
    order = np.random.default_rng(seed).permutation(mask.shape[1])
    permuted = metrics.recall_at_k(scores[:, order], reference[:, order], mask[:, order], k)
    assert 0.0 <= value <= 1.0
    assert metrics.recall_at_k(reference, reference, mask, k) == pytest.approx(1.0)
    assert metrics.recall_at_k(np.exp(scores), 3 * reference, mask, k) == pytest.approx(value)
    assert permuted == pytest.approx(value)


def test_recall_of_ties():
    mask = np.ones((1, 4), np.bool_)
    constant, distinct = np.zeros((1, 4)), np.array([[1.0, 2.0, 3.0, 4.0]])
    assert metrics.recall_at_k(constant, distinct, mask, 1) == 0.25  # as good as chance
    assert metrics.recall_at_k([[9.0, 0.0, 0.0, 0.0]], distinct, mask, 2) == pytest.approx(1 / 3)
    assert metrics.recall_at_k(distinct, constant, mask, 2) == 1.0  # any two candidates are correct
    assert metrics.recall_at_k([[4.0, 3.0, 2.0, 1.0]], [[1.0, 1.0, 1.0, 5.0]], mask, 2) == 0.5


def test_recall_leaves_out_short_requests_and_padding():
    scores = np.array([[1.0, 2.0, np.nan], [3.0, 2.0, 1.0]])
    reference = np.array([[2.0, 1.0, np.inf], [3.0, 1.0, 2.0]])
    mask = np.array([[True, True, False], [True, True, True]])
    assert metrics.recall_at_k(scores, reference, mask, 2) == 0.5
    assert metrics.recall_at_k(scores, reference, mask, 1) == 0.5
    assert math.isnan(metrics.recall_at_k(scores, reference, mask, 3))
    assert math.isnan(metrics.recall_at_k(scores, reference, np.zeros_like(mask), 1))
    assert math.isnan(metrics.recall_at_k(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros((0, 3), np.bool_), 1))


@examples
@given(seeds)
def test_rank_correlation_is_that_of_scipy(seed):
    scores, reference, mask = requests(seed)
    values = []
    for s, r, m in zip(scores, reference, mask, strict=True):
        if m.sum() >= 2 and np.ptp(s[m]) > 0 and np.ptp(r[m]) > 0:
            values.append(stats.spearmanr(s[m], r[m]).statistic)
    expected = np.mean(values) if values else math.nan
    value = metrics.rank_correlation(scores, reference, mask)
    assert value == pytest.approx(expected, abs=1e-12, nan_ok=True)
    order = np.random.default_rng(seed).permutation(mask.shape[1])
    permuted = metrics.rank_correlation(scores[:, order], reference[:, order], mask[:, order])
    assert permuted == pytest.approx(value, abs=1e-12, nan_ok=True)
    if values:
        assert metrics.rank_correlation(np.exp(scores), -reference, mask) == pytest.approx(-value, abs=1e-12)


def test_rank_correlation_of_nothing_is_nan():
    scores, mask = np.array([[1.0, 2.0, 3.0]]), np.ones((1, 3), np.bool_)
    assert metrics.rank_correlation(scores, 1e300 * scores, mask) == pytest.approx(1.0)
    assert math.isnan(metrics.rank_correlation(scores, np.ones((1, 3)), mask))
    assert math.isnan(metrics.rank_correlation(scores, scores, np.array([[True, False, False]])))
    for shape in ((0, 3), (2, 0)):
        assert math.isnan(
            metrics.rank_correlation(np.zeros(shape), np.zeros(shape), np.zeros(shape, np.bool_))
        )


# Gap and relative error


def test_gap_recovered():
    assert metrics.gap_recovered(0.70, 0.70, 0.80) == 0.0
    assert metrics.gap_recovered(0.80, 0.70, 0.80) == 1.0
    assert metrics.gap_recovered(0.65, 0.70, 0.80) == pytest.approx(-0.5)
    assert math.isnan(metrics.gap_recovered(0.7, 0.8, 0.8))
    assert math.isnan(metrics.gap_recovered(0.7, 0.8, 0.7))
    for position in range(3):
        assert math.isnan(metrics.gap_recovered(*np.where(np.arange(3) == position, np.nan, [0.7, 0.6, 0.8])))


def relative_error(*arguments):
    return metrics.relative_error(metrics.error_energy(*arguments))


@examples
@given(seeds)
def test_relative_error(seed):
    rng = np.random.default_rng(seed)
    exact, noise = rng.normal(size=(2, 3, 5, 4))
    mask = np.arange(5) < np.array([5, 2, 0])[:, None]
    value = relative_error(exact + noise, exact, mask)
    assert value == pytest.approx(np.linalg.norm(noise[mask]) / np.linalg.norm(exact[mask]))
    assert relative_error(7 * (exact + noise), 7 * exact, mask) == pytest.approx(value)
    assert relative_error(exact, exact) == 0.0
    assert relative_error(0 * exact, exact) == 1.0
    padding = np.where(mask[..., None], 0.0, np.nan)
    assert relative_error(exact + noise + padding, exact + padding, mask) == pytest.approx(value)


def test_relative_error_of_nothing_is_nan():
    assert math.isnan(relative_error(np.ones((2, 3)), np.zeros((2, 3))))
    assert math.isnan(relative_error(np.ones((2, 3)), np.ones((2, 3)), np.zeros(2, np.bool_)))


# Mistakes


@pytest.mark.parametrize("metric", [metrics.auc, metrics.log_loss, metrics.calibration])
@pytest.mark.parametrize(
    ("labels", "scores", "weights", "message"),
    [
        ([0, 1], [[1.0, 2.0]], None, r"expected shape \(2,\), that of labels, got \(1, 2\)"),
        ([0, 1], [1.0, 2.0], [1.0], r"weights: expected shape \(2,\)"),
        ([0, 1], [1.0, np.nan], None, r"expected finite values, got nan at index \(1,\)"),
        ([0, 1], [1.0, np.inf], None, "expected finite values, got inf"),
        ([0, 1], [1.0, 2.0], [1.0, -1.0], "weights: expected values >= 0, got -1.0"),
        ([0, 1], [1.0, 2.0], [1.0, np.nan], "weights: expected finite values, got nan"),
        ([0, 2], [1.0, 2.0], None, r"labels: expected labels in \{0, 1\}, got 2 at index \(1,\)"),
        ([0, np.nan], [1.0, 2.0], None, "labels: .* got nan"),
        ([0, 0.5], [1.0, 2.0], None, "labels: .* got 0.5"),
    ],
)
def test_refuses_bad_labels_scores_weights(metric, labels, scores, weights, message):
    with pytest.raises(ValueError, match=message):
        metric(labels, scores, weights)


def test_refuses_bad_groups():
    with pytest.raises(ValueError, match=r"groups: expected shape \(2, 3\), that of labels, got \(2,\)"):
        metrics.grouped_auc(np.zeros((2, 3)), np.zeros((2, 3)), np.zeros(2, int))
    with pytest.raises(ValueError, match="groups: expected integers or strings, got dtype float64"):
        metrics.grouped_auc([0, 1], [1.0, 2.0], [1.0, 2.0])


@pytest.mark.parametrize("metric", [lambda *a: metrics.recall_at_k(*a, 1), metrics.rank_correlation])
def test_refuses_bad_requests(metric):
    scores, mask = np.ones((2, 3)), np.ones((2, 3), np.bool_)
    for arguments, message in (
        ((scores[:1], scores, mask), r"scores: expected shape \(2, 3\), that of mask, got \(1, 3\)"),
        ((scores, scores[0], mask), r"reference: expected shape \(2, 3\)"),
        ((scores, scores, mask.astype(int)), "mask: expected a boolean mask, got dtype int64"),
        ((scores[0], scores[0], mask[0]), r"mask: expected shape \[B, G\], got \(3,\)"),
        ((np.where([1, 0, 1], scores, np.nan), scores, mask), r"scores: .* got nan at index \(0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            metric(*arguments)


@pytest.mark.parametrize("k", [0, -1, 1.5, True])
def test_refuses_bad_k(k):
    with pytest.raises(ValueError, match="k: expected an integer >= 1"):
        metrics.recall_at_k(np.ones((1, 2)), np.ones((1, 2)), np.ones((1, 2), np.bool_), k)


def test_refuses_bad_vectors():
    with pytest.raises(ValueError, match=r"approximation: expected shape \(2, 3\), .* got \(3,\)"):
        relative_error(np.ones(3), np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"mask: expected shape \(2,\)"):
        relative_error(np.ones((2, 3)), np.ones((2, 3)), np.ones((2, 3), np.bool_))
    with pytest.raises(ValueError, match=r"exact: expected shape \[\.\.\., D\]"):
        relative_error(1.0, 1.0)
    with pytest.raises(ValueError, match="approximation: expected finite values, got nan"):
        relative_error([np.nan], [1.0])


@pytest.mark.parametrize("module", ["ranking", "codebook"])
def test_examples_in_docstrings(module):
    result = doctest.testmod(importlib.import_module(f"tarq_jax.metrics.{module}"))
    assert result.attempted > 5 and not result.failed


def test_public_names_are_sorted_and_exist():
    assert metrics.__all__ == sorted(metrics.__all__)
    assert all(hasattr(metrics, name) for name in metrics.__all__)
