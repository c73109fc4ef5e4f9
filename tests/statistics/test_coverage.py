"""Intervals cover a known truth at their nominal rate; p-values are uniform if nothing differs."""

import numpy as np
import pytest
from scipy import special, stats

from tarq_jax.statistics import auc_difference, auc_estimate, lift, over_seeds_and_data, ratio

pytestmark = pytest.mark.slow

DATA_SETS = 2000
SHARE = (0.93, 0.97)
UNLIKELY = 0.001  # uniform p-values fail a Kolmogorov-Smirnov test at this level once in a thousand


def covered(estimates, truth) -> float:
    return float(np.mean([found.low <= truth <= found.high for found in estimates]))


def uniform(estimates) -> float:
    """p-value of a Kolmogorov-Smirnov test that the estimates' p-values are uniform."""
    return float(stats.kstest([found.p_value for found in estimates], "uniform").pvalue)


def candidates(rng, users=120, each=5):
    """Labels, users, and scores of two equally good rankers, which share part of a user's noise."""
    labels = rng.random((users, each)) < 0.4
    shared = 0.6 * rng.normal(size=(users, 1))
    scores = [labels + shared + rng.normal(size=(users, each)) for _ in range(2)]
    return labels.ravel(), [score.ravel() for score in scores], np.repeat(np.arange(users), each)


AUC = float(stats.norm.cdf(1 / np.sqrt(2 * (1 + 0.6**2))))  # for pairs of different users, by far the most


def test_auc():
    """The truth includes pairs within a user (4 of 599 others), for which shared noise does no harm."""
    own = float(stats.norm.cdf(1 / np.sqrt(2)))
    truth = AUC + (own - AUC) * 4 / 599
    rng = np.random.default_rng(0)
    found = []
    for _ in range(DATA_SETS):
        labels, scores, users = candidates(rng)
        found.append(auc_estimate(labels, scores[0], users))
    assert SHARE[0] <= covered(found, truth) <= SHARE[1]


def test_auc_of_independent_candidates():
    rng = np.random.default_rng(1)
    found = []
    for _ in range(DATA_SETS):
        labels = rng.random(400) < 0.3
        found.append(auc_estimate(labels, labels + rng.normal(size=400)))
    assert SHARE[0] <= covered(found, float(stats.norm.cdf(1 / np.sqrt(2)))) <= SHARE[1]


def test_auc_difference():
    rng = np.random.default_rng(2)
    found = []
    for _ in range(DATA_SETS):
        labels, scores, users = candidates(rng)
        found.append(auc_difference(labels, *scores, users))
    assert SHARE[0] <= covered(found, 0.0) <= SHARE[1]
    assert uniform(found) > UNLIKELY


def arm(rng, ctr, value, users=3000):
    """Clicks, impressions and heavy-tailed revenue per user."""
    impressions = rng.poisson(6, users) + 1
    taste = special.expit(rng.normal(special.logit(ctr), 0.7, users))
    clicks = rng.binomial(impressions, taste)
    revenue = value * rng.poisson(0.05 * impressions) * rng.lognormal(0, 1.0, users)
    return clicks, impressions, revenue


def lifts(seed, better):
    """(CTR, GMV) lifts of `DATA_SETS` experiments; the treated arm's revenue is `better` times as high."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(DATA_SETS):
        treated, others = arm(rng, 0.1, better), arm(rng, 0.1, 1.0)
        ones = np.ones(3000)
        found.append((lift(*(ratio(clicks, shown) for clicks, shown, _ in (treated, others))),
                      lift(*(ratio(revenue, ones) for _, _, revenue in (treated, others)))))
    return zip(*found, strict=True)


def test_ctr_and_gmv_without_a_difference():
    ctr, gmv = lifts(3, 1.0)
    for found in (ctr, gmv):
        assert SHARE[0] <= covered(found, 0.0) <= SHARE[1]
    assert min(uniform(ctr), uniform(gmv)) > UNLIKELY


def test_gmv_lift():
    ctr, gmv = lifts(4, 1.1)
    assert SHARE[0] <= covered(gmv, 0.1) <= SHARE[1]
    assert SHARE[0] <= covered(ctr, 0.0) <= SHARE[1]


def test_ctr_lift():
    """Rates are scaled so that the ratio of expectations is exact; none reaches 1."""
    rng = np.random.default_rng(7)
    found = []
    for _ in range(DATA_SETS):
        shown = rng.poisson(6, (2, 3000)) + 1
        rates = 0.1 * rng.lognormal(0, 0.4, (2, 3000)).clip(max=9) * [[1.1], [1.0]]
        clicks = rng.binomial(shown, rates)
        found.append(lift(ratio(clicks[0], shown[0]), ratio(clicks[1], shown[1])))
    assert SHARE[0] <= covered(found, 0.1) <= SHARE[1]


def test_gmv_lift_with_cuped():
    """Users keep their taste from the earlier period; revenue has a heavy tail."""
    rng = np.random.default_rng(11)
    found, ones = [], np.ones(3000)
    for _ in range(DATA_SETS):
        taste = rng.lognormal(0, 0.8, (2, 3000))
        before, now = (rng.poisson(0.3 * taste) * rng.lognormal(0, 1.0, (2, 3000)) for _ in range(2))
        arms = ratio(1.1 * now[0], ones), ratio(now[1], ones)
        found.append(lift(*arms, before=tuple(ratio(values, ones) for values in before)))
    assert SHARE[0] <= covered(found, 0.1) <= SHARE[1]


@pytest.mark.parametrize(("true_lift", "noise"), [(0.3, 0.2), (0.1, 0.05), (-0.3, 0.5), (1.0, 0.5)])
def test_lift_with_cuped_of_what_the_period_before_explains(true_lift, noise):
    """What is left of the error is small beside the difference, so that both arms' common part counts."""
    rng = np.random.default_rng(12)
    found, ones = [], np.ones(500)
    for _ in range(DATA_SETS):
        before = rng.gamma(2, 1, (2, 500))
        now = before + rng.normal(0, noise, (2, 500)) + 5 + [[7 * true_lift], [0.0]]
        found.append(lift(*(ratio(values, ones) for values in now),
                          before=tuple(ratio(values, ones) for values in before)))
    assert SHARE[0] <= covered(found, true_lift) <= SHARE[1]


def test_seeds_and_data():
    """Five seeds, as in an ablation, and another spread of users than in the other tests."""
    rng = np.random.default_rng(5)
    found = []
    for _ in range(DATA_SETS):
        table = 0.1 * rng.normal(size=(5, 1)) + rng.normal(size=(1, 200)) + rng.normal(size=(5, 200))
        values = table.mean(axis=1)
        found.append(over_seeds_and_data(values, (table - values[:, None]) / 200).estimate)
    assert SHARE[0] <= covered(found, 0.0) <= SHARE[1]
