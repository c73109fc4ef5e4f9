"""Ratios, resampling, multiple tests and power, compared with scipy, statsmodels and closed forms."""

import gc
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats import power as statsmodels_power

from tarq_jax import metrics, statistics
from tarq_jax.statistics import Estimate, adjust, bootstrap, cuped, lift, paired_permutation, ratio


@pytest.fixture(scope="module", autouse=True)
def little_garbage():
    """statsmodels collects all garbage in every call: a second each in a process with many programs."""
    gc.freeze()
    yield
    gc.unfreeze()


def users_of(rng, size=4000, rate=0.2):
    impressions = rng.poisson(8, size) + 1
    return rng.binomial(impressions, np.clip(rng.beta(2, 2 / rate - 2, size), 0, 1)), impressions


def test_a_mean_is_a_ratio():
    values = np.random.default_rng(0).normal(3.0, 2.0, 50)
    found = ratio(values, np.ones(50))
    assert found.value == pytest.approx(values.mean())
    assert math.sqrt(found.variance) == pytest.approx(stats.sem(values))


def test_delta_method_is_that_of_the_literature():
    """Deng, Knoblich and Lu 2018, eq. 1: from the variances and the covariance of both sums."""
    clicks, impressions = users_of(np.random.default_rng(1))
    size, found = len(clicks), ratio(clicks, impressions)
    x, y = impressions.mean(), clicks.mean()
    cov = np.cov(clicks, impressions)
    expected = (cov[0, 0] / x**2 - 2 * y / x**3 * cov[0, 1] + y**2 / x**4 * cov[1, 1]) / size
    assert found.variance == pytest.approx(expected)


def test_lift_is_the_bootstrap_for_many_users():
    rng = np.random.default_rng(2)
    arms = [users_of(rng, 3000, rate) for rate in (0.22, 0.2)]
    found = lift(*(ratio(*arm) for arm in arms))
    shares = [bootstrap(lambda w, arm=arm: (w @ arm[0]) / (w @ arm[1]), 3000, replicates=800, seed=i)
              for i, arm in enumerate(arms)]
    errors = shares[0].standard_error, (1 + found.value) * shares[1].standard_error
    assert found.standard_error == pytest.approx(math.hypot(*errors) / shares[1].value, rel=0.06)
    assert found.value == pytest.approx(shares[0].value / shares[1].value - 1)


def test_cuped_of_means_is_that_of_the_paper():
    """Deng et al. 2013: the variance falls by the squared correlation, the expectation does not change."""
    rng = np.random.default_rng(3)
    before = [rng.normal(10, 3, 5000) for _ in range(2)]
    now = [0.8 * b + rng.normal(1, 2, 5000) for b in before]
    ones = np.ones(5000)
    plain = [ratio(values, ones) for values in now]
    adjusted = cuped(*plain, *(ratio(values, ones) for values in before))
    correlation = np.corrcoef(np.concatenate(now), np.concatenate(before))[0, 1]
    difference = np.array([1.0, -1.0])
    assert difference @ adjusted.covariance @ difference == pytest.approx(
        sum(each.variance for each in plain) * (1 - correlation**2), rel=0.03)
    assert adjusted.treatment + adjusted.control == pytest.approx(sum(each.value for each in plain))
    theta = 0.8
    expected = plain[0].value - plain[1].value - theta * (before[0].mean() - before[1].mean())
    assert adjusted.treatment - adjusted.control == pytest.approx(expected, abs=0.01)


def test_cuped_is_the_same_from_either_side():
    """Values and their covariance change places with the arms, whose numbers of users differ."""
    rng = np.random.default_rng(8)
    before = [rng.normal(10, 3, size) for size in (300, 500)]
    now = [values + rng.normal(1, 2, len(values)) for values in before]
    first, second, *pre = (ratio(values, np.ones(len(values))) for values in (*now, *before))
    found, swapped = cuped(first, second, *pre), cuped(second, first, *pre[::-1])
    assert (found.treatment, found.control) == pytest.approx((swapped.control, swapped.treatment))
    np.testing.assert_allclose(found.covariance, swapped.covariance[::-1, ::-1])
    assert found.covariance[0, 1] > 0


def test_a_lift_whose_control_changes_its_sign_is_refused():
    """Arms that differed before by more than the control's value."""
    ones = np.ones(4)
    now, pre = np.array([1.0, 2.0, 3.0, 4.0]), np.array([11.0, 12.0, 13.0, 14.0])
    arms = ratio(now, ones), ratio(now, ones)
    with pytest.raises(ValueError, match=r"expected an adjusted value of the sign of 2\.5, got -2\.5"):
        lift(*arms, before=(ratio(pre - 10, ones), ratio(pre, ones)))


@pytest.mark.parametrize("unit", [1e-200, 1e-20, 1e20, 1e45])
def test_a_lift_has_no_unit(unit):
    rng = np.random.default_rng(9)
    arms, before = rng.exponential(1.0, (2, 2, 50))
    ones = np.ones(50)

    def found(unit):
        now, pre = (tuple(ratio(unit * values, ones) for values in pair) for pair in (arms, before))
        return [*lift(*now), *lift(*now, before=pre)]

    assert found(unit) == pytest.approx(found(1.0), rel=1e-9)


def test_a_constant_that_rounds_differently_is_no_lift():
    first, second = ratio(np.full(7, 0.1), np.ones(7)), ratio(np.full(11, 0.1), np.ones(11))
    assert first.value != second.value
    assert lift(first, second) == Estimate(0.0, 0.0, 0.0, 0.0, 1.0)


def test_cuped_without_a_period_before_changes_nothing():
    values, ones = np.arange(5.0), np.ones(5)
    found = cuped(ratio(values, ones), ratio(values, ones), ratio(ones, ones), ratio(ones, ones))
    assert found.treatment == found.control == 2.0


def test_bootstrap_of_a_mean():
    values = np.random.default_rng(4).exponential(size=400)
    found = bootstrap(lambda weights: weights @ values / 400, 400, replicates=4000, null=1.0)
    assert found.value == pytest.approx(values.mean())
    assert found.standard_error == pytest.approx(values.std() / 20, rel=0.05)
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=0)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval), rel=0.01)


def test_bootstrap_of_an_auc_by_user():
    """The standard error agrees with the one from the influence of users."""
    rng = np.random.default_rng(5)
    users = np.repeat(np.arange(150), 6)
    labels = rng.random(900) < 0.4
    scores = rng.normal(size=900) + labels + np.repeat(rng.normal(size=150), 6)
    found = bootstrap(
        lambda weights: [metrics.auc(labels, scores, own[users]) for own in weights], 150, replicates=300)
    assert found.standard_error == pytest.approx(
        statistics.auc_estimate(labels, scores, users).standard_error, rel=0.12)


def test_bootstrap_in_chunks_is_of_all_replicates(monkeypatch):
    from tarq_jax.statistics import resampling

    sizes = []
    monkeypatch.setattr(resampling, "CHUNK", 70)
    bootstrap(lambda weights: sizes.append(len(weights)) or weights.sum(axis=1), 10, replicates=17)
    assert sizes == [1, 7, 7, 3]


def test_bootstrap_of_groups_draws_within_each():
    totals = []
    bootstrap(lambda weights: totals.append((weights[:, :3].sum(1), weights[:, 3:].sum(1)))
              or weights.sum(axis=1), np.array([3, 5]), replicates=50)
    assert all((first == 3).all() and (second == 5).all() for first, second in totals)


def test_a_lift_over_what_could_be_0_has_no_end():
    """The interval is unbounded even with a tiny p-value, which says that the two arms surely differ."""
    wide = np.array([0.5, -0.5, 0.5, -0.5])
    found = lift(statistics.Ratio(10.0, wide), statistics.Ratio(1.0, wide))
    assert (found.low, found.high) == (-math.inf, math.inf) and found.p_value < 1e-6


def test_permutation_is_exact_for_few():
    first, second = [3.0, 1.0, 4.0, 1.5, 9.0], [2.0, 1.5, 1.0, 1.0, 2.0]
    differences = np.subtract(first, second)
    signs = np.array(np.meshgrid(*[[1, -1]] * 5)).reshape(5, -1)
    expected = np.mean(abs(signs.T @ differences) >= abs(differences.sum()) - 1e-12)
    assert paired_permutation(first, second) == pytest.approx(expected)


def test_permutations_are_drawn_where_there_are_many():
    """2^14 permutations, of which all or some are looked at; the seed decides which."""
    rng = np.random.default_rng(6)
    first, second = rng.normal(0.45, 1.0, 14), rng.normal(size=14)
    signs = np.array(list(itertools.product([1, -1], repeat=14)))
    exact = np.mean(abs(signs @ (first - second)) >= abs((first - second).sum()) - 1e-12)
    assert 0.02 < exact < 0.5
    assert paired_permutation(first, second, replicates=2**14) == pytest.approx(exact)
    drawn = [paired_permutation(first, second, replicates=8000, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn == pytest.approx([exact] * 3, abs=4 * math.sqrt(exact * (1 - exact) / 8000))


def test_adjusted_p_values_are_those_of_r():
    """p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm" and "BH")."""
    values = [0.01, 0.02, 0.03, 0.04, 0.05]
    assert adjust(values, "holm") == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert adjust(values, "benjamini_hochberg") == pytest.approx([0.05] * 5)
    assert adjust([0.001, 0.2, 0.03]) == pytest.approx([0.003, 0.2, 0.06])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
@settings(max_examples=10, deadline=None)
def test_adjusting_keeps_the_order(values):
    holm, hochberg = adjust(values), adjust(values, "benjamini_hochberg")
    assert (holm >= hochberg - 1e-12).all() and (hochberg >= np.array(values) - 1e-12).all()
    order = np.argsort(values)[::-1]
    scaled = np.array(values)[order] * len(values) / np.arange(len(values), 0, -1)
    assert hochberg[order] == pytest.approx(np.minimum.accumulate(scaled))


def test_users_and_power_agree():
    needed = statistics.users_needed(0.1, 1.0, share=0.3)
    error = math.sqrt(1 / (0.3 * needed) + 1 / (0.7 * needed))
    assert statistics.minimum_detectable_effect(error) == pytest.approx(0.1, rel=1e-4)
    assert statistics.power_of(0.1, error) == pytest.approx(0.8, abs=1e-4)
    assert statistics.power_of(-0.1, error) == pytest.approx(0.8, abs=1e-4)
    assert statistics.users_needed(0.1, 1.0) == pytest.approx(
        2 * statsmodels_power.NormalIndPower().solve_power(0.1, power=0.8, alpha=0.05, ratio=1), rel=1e-5)
    for effect, deviation in ((1.0, 0.2), (0.0057, 0.001), (1e-6, 1e3)):  # far from a search's first guess
        factor = (stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) * deviation / effect
        assert statistics.users_needed(effect, deviation) == pytest.approx(4 * factor**2)
    assert statistics.users_needed(0.1, 0.0) == 0.0


@pytest.mark.parametrize(("call", "message"), [
    (lambda: ratio([1.0], [1.0]), "numerator: expected at least 2 users, got 1"),
    (lambda: ratio([1.0, 2.0], [0.0, 0.0]), "denominator: expected a sum other than 0"),
    (lambda: ratio([1.0, 2.0], [1.0]), "denominator: expected shape"),
    (lambda: ratio([1.0, 1e60], [1.0, 1.0]), r"numerator: expected values of at most 1e\+50, got 1e\+60"),
    (lambda: bootstrap(lambda weights: weights[:, 0], [3, 0]), "users: expected an integer >= 1, got 0"),
    (lambda: lift(ratio([1, 2], [1, 1]), ratio([0, 0], [1, 1])), "control: expected a value other than 0"),
    (lambda: cuped(*[ratio([1, 2], [1, 1])] * 3, ratio([1, 2, 3], [1, 1, 1])), "before: expected shape"),
    (lambda: bootstrap(lambda weights: weights[:, 0], 0), "users: expected an integer >= 1, got 0"),
    (lambda: bootstrap(lambda weights: weights[:, 0] * np.nan, 3), "replicates of the metric: expected fini"),
    (lambda: bootstrap(lambda weights: weights[:, 0], []), "users: expected a number, or one for each"),
    (lambda: paired_permutation([1.0, 2.0], [2.0, 1.0], replicates=0), "replicates: expected an integer"),
    (lambda: paired_permutation([1.0], [2.0]), "first: expected at least 2 values, got 1"),
    (lambda: paired_permutation([1.0, 2.0], [2.0]), "second: expected shape"),
    (lambda: adjust([0.5, 1.5]), r"p_values: expected values in \[0, 1\], got 1.5"),
    (lambda: adjust([0.5], "bonferroni"), "method: expected one of"),
    (lambda: statistics.users_needed(0.0, 1.0), "effect: expected a number other than 0"),
    (lambda: statistics.users_needed(0.1, 1.0, share=1.0), "share: expected a number in"),
    (lambda: statistics.users_needed(0.1, -1.0), "deviation: expected a number of at least 0"),
    (lambda: statistics.users_needed(0.1, 1.0, power=1.0), "power: expected a number in"),
    (lambda: statistics.users_needed(0.1, 1.0, power=0.02), r"power: expected .* \(0.025, 1\), got"),
    (lambda: statistics.power_of(math.nan, 1.0), "effect: expected a finite number"),
    (lambda: statistics.power_of(0.1, 0.0), "standard_error: expected a number above 0"),
    (lambda: statistics.minimum_detectable_effect(-1.0), "standard_error: expected a number of at least 0"),
])
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_nothing_to_adjust():
    assert len(adjust([])) == 0


def test_an_estimate_is_flat():
    assert Estimate._fields == ("value", "standard_error", "low", "high", "p_value")
