"""Two sources of variance: simulated layouts with known components, and simpler cases."""

import numpy as np
import pytest
from scipy import stats

from tarq_jax.statistics import over_seeds_and_data


def layout(rng, seeds, users, of_seeds=1.0, of_users=1.0, of_both=1.0):
    """Simulated (values, influence) of a mean over users."""
    table = (of_seeds * rng.normal(size=(seeds, 1)) + of_users * rng.normal(size=(1, users))
             + of_both * rng.normal(size=(seeds, users)))
    values = table.mean(axis=1)
    return values, (table - values[:, None]) / users


def test_without_users_noise_it_is_the_t_interval_over_seeds():
    rng = np.random.default_rng(0)
    values, influence = layout(rng, 5, 40, of_users=0.0, of_both=0.0)
    found = over_seeds_and_data(values, influence).estimate
    expected = stats.ttest_1samp(values, 0.0)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))


def test_without_seeds_noise_it_is_the_t_interval_over_users():
    rng = np.random.default_rng(0)
    values, influence = layout(rng, 5, 40, of_seeds=0.0, of_both=0.0)
    found = over_seeds_and_data(values, influence).estimate
    users = influence[0] * 40 + values[0]
    assert found.p_value == pytest.approx(stats.ttest_1samp(users, 0.0).pvalue)


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_the_p_value_is_that_of_the_interval_that_ends_at_0(seeds):
    rng = np.random.default_rng(seeds)
    values, influence = layout(rng, seeds, 40, of_seeds=0.2)
    p_value = over_seeds_and_data(values + 0.4, influence).estimate.p_value
    assert 1e-6 < p_value < 1
    found = over_seeds_and_data(values + 0.4, influence, level=1 - p_value).estimate
    assert found.low == pytest.approx(0.0, abs=1e-9) and found.high > 0
    assert over_seeds_and_data(values - values.mean(), influence).estimate.p_value == pytest.approx(1.0)
    assert over_seeds_and_data(values + 1e200, influence).estimate.p_value < 1e-100


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("of_seeds", [0.0, 0.2, 1.0])
def test_few_seeds_are_covered(seeds, of_seeds):
    """Two seeds may agree by chance, which must not make users the only source of variance."""
    rng = np.random.default_rng(4)
    found = [over_seeds_and_data(*layout(rng, seeds, 100, of_seeds)).estimate for _ in range(1000)]
    assert np.mean([one.low <= 0.0 <= one.high for one in found]) >= 0.935


def test_one_seed_counts_data_alone():
    rng = np.random.default_rng(0)
    values, influence = layout(rng, 1, 40)
    found = over_seeds_and_data(values, influence)
    users = influence[0] * 40 + values[0]
    assert found.estimate.standard_error == pytest.approx(stats.sem(users))
    assert found.components.seeds == found.components.both == 0


def test_components_are_unbiased():
    """Means over many layouts are compared with 4 / S, 9 / U and 1 / (S U) for S = 6 and U = 50."""
    rng = np.random.default_rng(1)
    parts = np.array([over_seeds_and_data(*layout(rng, 6, 50, 2.0, 3.0, 1.0)).components
                      for _ in range(3000)]).mean(axis=0)
    np.testing.assert_allclose(parts, [4 / 6, 9 / 50, 1 / 300], rtol=0.06)


def test_components_add_up():
    rng = np.random.default_rng(2)
    found = over_seeds_and_data(*layout(rng, 4, 30))
    assert sum(found.components) == pytest.approx(found.estimate.standard_error**2)
    assert found.estimate.value == pytest.approx(layout(np.random.default_rng(2), 4, 30)[0].mean())


@pytest.mark.parametrize(("values", "influence", "message"), [
    ([1.0], [[0.0]], "influence: expected at least 2 users, got 1"),
    ([1.0, 2.0], [[0.0, 1.0]], "values: expected shape"),
    ([], np.zeros((0, 4)), "values: expected at least 1 seed, got 0"),
    ([np.nan], [[0.0, 1.0]], "values: expected finite values"),
    ([1.0], [[0.0, np.inf]], "influence: expected finite values"),
    ([[1.0]], [[0.0, 1.0]], "values: expected shape"),
])
def test_wrong_arguments(values, influence, message):
    with pytest.raises(ValueError, match=message):
        over_seeds_and_data(values, influence)
