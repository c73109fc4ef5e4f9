"""Intervals and paired tests of AUC, compared with scikit-learn, Stata, and the definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from tarq_jax import metrics
from tarq_jax.statistics import auc_difference, auc_estimate, auc_influence


def draw(seed, size=60, values=6):
    """Labels with both classes and two scores with ties."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(size) % 3 == 0)
    return labels, *(rng.integers(0, values, size) + labels * rng.integers(0, 2, size) for _ in range(2))


def kernel(labels, scores):
    """[P, N]: 1 if the positive scores higher than the negative, 0.5 if they tie."""
    positive, negative = scores[labels][:, None], scores[~labels][None]
    return (positive > negative) + 0.5 * (positive == negative)


@given(st.integers(0, 10_000), st.integers(2, 30))
@settings(max_examples=30, deadline=None)
def test_auc_is_that_of_scikit_learn(seed, values):
    labels, scores, _ = draw(seed, values=values)
    assert auc_estimate(labels, scores).value == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert auc_estimate(labels, scores, np.arange(60)).value == pytest.approx(roc_auc_score(labels, scores))


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_variance_is_the_definition(seed):
    """DeLong et al. 1988, eq. 4 to 6, on all pairs."""
    labels, first, second = draw(seed)
    parts = [(k.mean(axis=1), k.mean(axis=0)) for k in (kernel(labels, s) for s in (first, second))]
    (p, n), (q, m) = parts
    expected = np.var(p, ddof=1) / len(p) + np.var(n, ddof=1) / len(n)
    assert auc_estimate(labels, first).standard_error == pytest.approx(np.sqrt(expected))
    expected = np.var(p - q, ddof=1) / len(p) + np.var(n - m, ddof=1) / len(n)
    found = auc_difference(labels, first, second)
    assert found.standard_error == pytest.approx(np.sqrt(expected), abs=1e-12)
    areas = [roc_auc_score(labels, scores) for scores in (first, second)]
    assert found.value == pytest.approx(areas[0] - areas[1], abs=1e-12)


def test_interval_is_that_of_stata():
    """`roctab disease rating` in Stata's manual: the ratings of 109 CT images of Hanley and McNeil 1982."""
    normal, abnormal = (33, 6, 6, 11, 2), (3, 2, 2, 11, 33)  # images by rating, from 1 to 5
    labels = np.repeat([False, True], [sum(normal), sum(abnormal)])
    found = auc_estimate(labels, np.repeat(np.tile(np.arange(1, 6), 2), normal + abnormal))
    assert (round(found.value, 4), round(found.standard_error, 4)) == (0.8932, 0.0307)
    assert (round(found.low, 5), round(found.high, 5)) == (0.83295, 0.95339)


def test_interval_and_p_value():
    labels, first, second = draw(0)
    found = auc_difference(labels, first, second, level=0.9)
    half = stats.norm.ppf(0.95) * found.standard_error
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half))
    assert found.p_value == pytest.approx(2 * stats.norm.sf(abs(found.value) / found.standard_error))
    turned = auc_difference(labels, second, first)
    assert turned.value == -found.value and turned.p_value == found.p_value


@pytest.mark.parametrize("users", [None, [1, 1, 2, 2]])
def test_classes_that_are_wholly_apart_tell_no_interval(users):
    """Four candidates do not prove that the AUC is 1."""
    labels, apart, same = [0, 0, 1, 1], [1.0, 2, 3, 4], [0.0] * 4
    for found, value in ((auc_estimate(labels, apart, users), 1.0),
                         (auc_difference(labels, apart, same, users), 0.5)):
        assert found.value == value and np.isnan([found.low, found.high, found.p_value]).all()


def test_the_same_scores_do_not_differ():
    labels, scores, _ = draw(1)
    found = auc_difference(labels, scores, np.exp(scores / 7))
    assert (found.value, found.standard_error, found.p_value) == (0.0, 0.0, 1.0)


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_influence_is_the_jackknife_to_first_order(seed):
    """It is the change of the AUC when a user is left out, for many users with few candidates each."""
    rng = np.random.default_rng(seed)
    users = np.repeat(np.arange(200), 4)
    labels = rng.random(800) < 0.4
    scores = rng.normal(size=800) + labels + np.repeat(rng.normal(size=200), 4)
    auc, influence = auc_influence(labels, scores, users)
    assert influence.sum() == pytest.approx(0, abs=1e-12)
    without = np.array([roc_auc_score(labels[users != u], scores[users != u]) for u in range(0, 200, 20)])
    np.testing.assert_allclose(auc - without, influence[::20], atol=2e-4)


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_a_weight_is_so_many_copies(seed):
    labels, scores, _ = draw(seed)
    rng = np.random.default_rng(seed)
    users, copies = rng.permutation(np.arange(60) % 9), rng.integers(1, 4, 60)
    weighted = auc_influence(labels, scores, users, 0.5 * copies)
    copied = auc_influence(*(np.repeat(values, copies) for values in (labels, scores, users)))
    assert weighted.auc == pytest.approx(copied.auc) == metrics.auc(labels, scores, copies)
    np.testing.assert_allclose(weighted.influence, copied.influence, atol=1e-12)
    with pytest.raises(ValueError, match="weights: expected positive ones, got 0"):
        auc_influence(labels, scores, users, copies - copies.min())


def test_candidates_that_are_copied_tell_nothing_new():
    """Obuchowski 1997: copies of a candidate in one cluster keep the error; DeLong's error shrinks."""
    rng = np.random.default_rng(3)
    labels = rng.random(300) < 0.5
    scores = rng.normal(size=300) + labels
    copied = [np.repeat(values, 5) for values in (labels, scores, np.arange(300))]
    once = auc_estimate(labels, scores, np.arange(300))
    clustered, believed = auc_estimate(*copied), auc_estimate(*copied[:2])
    assert clustered.standard_error == pytest.approx(once.standard_error)
    assert believed.standard_error == pytest.approx(once.standard_error / np.sqrt(5), rel=0.02)


def test_users_of_one_candidate_are_as_delong():
    labels, first, second = draw(5, size=3000)
    users = np.arange(3000)
    assert auc_difference(labels, first, second, users).standard_error == pytest.approx(
        auc_difference(labels, first, second).standard_error, rel=1e-3)


@pytest.mark.parametrize("users", [
    np.array(["a", np.str_("b"), "a", "c"], object), np.array([7, np.int64(2**40), 7, 2**70], object)])
def test_users_in_arrays_of_objects(users):
    """As columns of joined tables are; of numbers beyond 64 bits too."""
    labels, scores = [0, 1, 1, 0], [0.1, 0.4, 0.35, 0.8]
    found, expected = (auc_influence(labels, scores, each) for each in (users, [0, 1, 0, 2]))
    assert found.auc == expected.auc
    np.testing.assert_allclose(np.sort(found.influence), np.sort(expected.influence))


@pytest.mark.parametrize(("arguments", "message"), [
    (([0, 1, 1, 1], [1.0, 2, 3, 4]), "labels: expected at least 2 that are 0, got 1"),
    (([0, 0, 0, 0], [1.0, 2, 3, 4]), "labels: expected at least 2 that are 1, got 0"),
    (([], []), "labels: expected at least 2"),
    (([0, 0, 1, 2], [1.0, 2, 3, 4]), r"labels: expected labels in \{0, 1\}, got 2"),
    (([0, 0, 1, 1], [1.0, np.nan, 3, 4]), "scores: expected finite values, got nan"),
    (([0, 0, 1, 1], [1.0, 2, 3]), "scores: expected shape"),
    (([0, 0, 1, 1], [1.0, 2, 3, 4], [1, 1, 1, 1]), "users: expected at least 2, got 1"),
    (([0, 0, 1, 1], [1.0, 2, 3, 4], [1, 2]), "users: expected shape"),
    (([0, 0, 1, 1], [1.0, 2, 3, 4], [1.0, 2, 3, np.nan]), "users: expected integers or strings"),
    (([0, 0, 1, 1], [1.0, 2, 3, 4], np.array(["a", "b", None, 1], object)), "users: expected integers or "),
])
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        auc_estimate(*arguments)


@pytest.mark.parametrize("level", [0.0, 1.0, -1, np.nan])
def test_wrong_levels(level):
    labels, scores, _ = draw(0)
    with pytest.raises(ValueError, match="level: expected a number in"):
        auc_estimate(labels, scores, level=level)
