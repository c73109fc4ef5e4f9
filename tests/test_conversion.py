"""An index of a trained model's items: codes, corrections, and attention with them."""

import functools

import jax
import numpy as np
import pytest
from draws import normal

from tarq_jax import conversion
from tarq_jax.attention import multi_head_attention

B, H, N, E, V, G = 8, 2, 6, 4, 30, 5
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def queries():
    return 2.0 * normal(0, V, H, E)


@pytest.fixture(scope="module")
def history():
    mask = np.random.default_rng(1).random((B, N)) < 0.8
    mask[0] = False
    return 1.5 * normal(2, B, H, N, E), normal(3, B, H, N, E), mask


@pytest.fixture(scope="module")
def index(queries):
    return conversion.quantize_queries(jax.random.key(0), queries, num_codewords=6)


def error(index, queries, history):
    """Relative error of the attention output of all items."""
    items = np.broadcast_to(np.arange(V), (B, V))
    exact = multi_head_attention(np.broadcast_to(np.moveaxis(queries, 1, 0), (B, H, V, E)), *history)
    found = conversion.attend(index, items, *history)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def test_codes_are_of_the_nearest_codeword(index, queries):
    assert index.codes.shape == (V, 1) and index.levels[0].shape == (6, H, E)
    distances = np.sum((queries[:, None] - np.asarray(index.levels[0])) ** 2, axis=(2, 3))
    np.testing.assert_array_equal(index.codes[:, 0], distances.argmin(axis=1))


def test_order_0_attends_with_codewords(index, history):
    items = np.random.default_rng(4).integers(0, V, (B, G))
    codewords = np.asarray(index.levels[0])[np.asarray(index.codes)[items, 0]]
    expected = multi_head_attention(np.swapaxes(codewords, 1, 2), *history)
    close(conversion.attend(index, items, *history), expected)


def test_as_many_codewords_as_items_is_exact(queries, history):
    whole = conversion.quantize_queries(jax.random.key(1), queries, num_codewords=V)
    assert error(whole, queries, history) < 1e-4


@pytest.mark.parametrize("name", conversion.CORRECTIONS)
def test_corrections_lower_the_error(name, index, queries, history):
    corrections = conversion.CORRECTIONS[name](index, queries, [history])
    assert corrections.shape == (V, H, E)
    corrected = conversion.with_corrections(index, corrections)
    lower = 1.0 if name == "plain" else 0.9  # the tangent overshoots if queries are far apart
    assert error(corrected, queries, history) < lower * error(index, queries, history)


def test_plain_corrections_are_residuals(index, queries):
    residuals = conversion.plain_corrections(index, queries, [])
    close(residuals + index.chosen(np.arange(V))[0], queries)


def test_fitted_corrections_are_the_best(index, queries, history):
    found = {}
    for name, make in conversion.CORRECTIONS.items():
        corrections = make(index, queries, [history])
        found[name] = error(conversion.with_corrections(index, corrections), queries, history)
    assert found["fitted"] < min(found["plain"], found["damped"])


def test_calibration_comes_in_batches(index, queries, history):
    whole = conversion.fitted_corrections(index, queries, [history])
    halves = [tuple(x[rows] for x in history) for rows in (slice(0, 4), slice(4, B))]
    close(conversion.fitted_corrections(index, queries, halves), whole, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="calibration has no requests"):
        conversion.fitted_corrections(index, queries, [])


def test_corrections_kept_exactly(index, queries, history):
    corrections = conversion.plain_corrections(index, queries, [])
    exact = conversion.with_corrections(index, corrections)
    np.testing.assert_array_equal(exact.chosen(np.arange(V))[1], corrections)
    assert exact.exact and not index.exact
    assert conversion.relative_error(exact, corrections) == 0.0
    with pytest.raises(ValueError, match="index has 1 level, expected further levels"):
        conversion.relative_error(index, corrections)
    nothing = 0 * corrections
    assert conversion.relative_error(conversion.with_corrections(index, nothing), nothing) == 0.0


def test_further_levels_approach_exact_corrections(index, queries, history):
    corrections = conversion.plain_corrections(index, queries, [])
    errors = []
    for num_levels in (1, 3):
        quantized = conversion.with_quantized_corrections(
            jax.random.key(2), index, corrections, num_levels=num_levels, num_codewords=8)
        assert quantized.codes.shape == (V, 1 + num_levels) and not quantized.exact
        np.testing.assert_array_equal(quantized.codes[:, 0], index.codes[:, 0])
        errors.append(conversion.relative_error(quantized, corrections))
        with pytest.raises(AssertionError):
            conversion.relative_error(quantized, quantized.levels[1])  # codewords, not corrections
    assert errors[1] < 0.5 * errors[0] < 0.5
    exact = conversion.with_corrections(index, corrections)
    assert error(quantized, queries, history) < 1.2 * error(exact, queries, history)


def test_corrections_need_a_level(index, queries):
    corrections = conversion.plain_corrections(index, queries, [])
    with pytest.raises(ValueError, match="num_levels: expected an integer >= 1, got 0"):
        conversion.with_quantized_corrections(jax.random.key(2), index, corrections, num_levels=0)


def test_more_codewords_than_items_are_refused(queries):
    with pytest.raises(ValueError, match=f"points: {V} given, expected at least num_codewords={V + 1}"):
        conversion.quantize_queries(jax.random.key(0), queries, num_codewords=V + 1)
