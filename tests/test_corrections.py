"""Corrections for order-1 look-ups: damping, and least squares over calibration requests."""

import functools

import jax
import numpy as np
import pytest
from draws import normal

from tarq_jax import corrections, expansion
from tarq_jax.attention import multi_head_attention

B, H, K, N, E, M = 12, 2, 3, 5, 3, 10
close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def problem():
    """Codewords [H, K, E], items in blocks, their queries [H, P, S, E], histories of which one is empty."""
    codes = np.random.default_rng(0).integers(0, K, M)
    blocks = expansion.group_by_code(codes, block=4)
    codewords, queries = normal(1, H, K, E), 2.0 * normal(2, M, H, E)
    mask = np.random.default_rng(3).random((B, N)) < 0.8
    mask[0] = False
    history = 2.0 * normal(4, B, H, N, E), normal(5, B, H, N, E), mask
    return codewords, blocks, np.moveaxis(queries[blocks.items], 2, 0), history


@pytest.fixture(scope="module")
def statistics(problem):
    codewords, blocks, queries, history = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corrections, "TOGETHER", 3)
        measure = jax.jit(functools.partial(corrections.correction_statistics, codewords, blocks))
        assert len(blocks.codes) == 4  # some together, and the rest
        return measure(queries, *history)


def test_nothing_to_correct_stays_nothing():
    residuals = np.zeros((M, H, E), np.float32)
    factors = corrections.damping(residuals, radius=corrections.damping_radius(residuals))
    np.testing.assert_array_equal(factors * residuals, residuals)


def items(blocks, in_blocks):
    """[H, P, S, ...] to [M, H, ...]."""
    flat = np.asarray(in_blocks).reshape(H, -1, *np.shape(in_blocks)[3:])
    return np.moveaxis(flat[:, blocks.positions], 0, 1)


def errors(problem, in_blocks):
    """Squared error of the attention output with the given corrections, over all requests, [M, H]."""
    codewords, blocks, queries, (keys, values, mask) = problem
    expanded = expansion.expand(codewords, keys, values, mask)
    found = expansion.look_up_blocks(expanded, blocks, in_blocks)
    flat = np.broadcast_to(queries.reshape(H, -1, E), (B, H, blocks.items.size, E))
    exact = multi_head_attention(flat, keys, values, mask).reshape(found.shape)
    return items(blocks, np.sum(np.square(found - exact), axis=(0, -1)))


@pytest.mark.parametrize("value", [0, -1.0])
def test_values_out_of_range(statistics, problem, value):
    with pytest.raises(ValueError, match=f"radius is {value}, expected a number above 0"):
        corrections.damping(np.ones((3, 2)), radius=value)
    with pytest.raises(ValueError, match=f"ridge is {value}, expected a number above 0"):
        corrections.fit_corrections(*statistics, problem[1], np.ones_like(statistics[1]), ridge=value)


def test_damping_closed_form():
    residuals = np.array([[0.0, 0.0], [3.0, 4.0], [30.0, 40.0]], np.float32)
    close(corrections.damping(residuals, radius=5.0), [[1.0], [0.5], [1 / 101]])
    close(corrections.damping(residuals, radius=np.inf), np.ones((3, 1)))
    radius = np.array([[1.0], [5.0], [50.0]])
    close(corrections.damping(residuals, radius=radius), [[1.0], [0.5], [0.5]])


def test_damped_residuals_are_never_long():
    residuals = normal(0, 200, 3) * np.logspace(-3, 6, 200)[:, None].astype(np.float32)
    lengths = np.linalg.norm(residuals * corrections.damping(residuals, radius=2.0), axis=-1)
    assert lengths.max() <= 1.0001
    close(lengths[:20], np.linalg.norm(residuals[:20], axis=-1))


def test_statistics_add_up_over_batches(problem, statistics):
    codewords, blocks, queries, history = problem
    halves = [corrections.correction_statistics(codewords, blocks, queries, *(x[rows] for x in history))
              for rows in (slice(0, 5), slice(5, B))]
    jax.tree.map(lambda whole, a, b: close(whole, a + b), statistics, *halves)


def test_fit_equals_least_squares(problem, statistics):
    """NumPy's solver, item by item, on the stacked requests."""
    codewords, blocks, queries, (keys, values, mask) = problem
    residuals = queries - codewords[:, blocks.codes][:, :, None]
    fitted = items(blocks, corrections.fit_corrections(
        *statistics, blocks, residuals, ridge=1e-6, reach=np.inf))
    expanded = jax.tree.map(np.asarray, expansion.expand(codewords, keys, values, mask))
    item_queries, codes = items(blocks, queries), np.repeat(blocks.codes, 4)[blocks.positions]
    for m in range(M):
        query = np.broadcast_to(item_queries[m][None, :, None], (B, H, 1, E))
        exact = np.asarray(multi_head_attention(query, keys, values, mask))[:, :, 0]
        for h in range(H):
            design = expanded.jacobians[:, h, codes[m]].reshape(-1, E)
            target = (exact[:, h] - expanded.means[:, h, codes[m]]).reshape(-1)
            expected = np.linalg.lstsq(design.astype(np.float64), target, rcond=None)[0]
            np.testing.assert_allclose(fitted[m, h], expected, rtol=2e-2, atol=2e-3)


def test_fit_is_never_worse_than_the_tangent(problem, statistics):
    codewords, blocks, queries, _ = problem
    residuals = queries - codewords[:, blocks.codes][:, :, None]
    fitted = corrections.fit_corrections(*statistics, blocks, residuals, ridge=1e-6)
    tangent, secant = errors(problem, residuals), errors(problem, fitted)
    assert (secant <= tangent + 1e-3).all()
    assert secant.sum() < 0.7 * tangent.sum()


def test_strong_ridge_keeps_the_residual(problem, statistics):
    codewords, blocks, queries, _ = problem
    residuals = queries - codewords[:, blocks.codes][:, :, None]
    close(corrections.fit_corrections(*statistics, blocks, residuals, ridge=1e6), residuals, rtol=1e-2)


def test_nothing_to_learn_keeps_the_residual(problem):
    """Empty histories give no information: nothing is divided by zero, and the residual stays."""
    codewords, blocks, queries, (keys, values, mask) = problem
    found = corrections.correction_statistics(codewords, blocks, queries, keys, values, np.zeros_like(mask))
    residuals = queries - codewords[:, blocks.codes][:, :, None]
    close(corrections.fit_corrections(*found, blocks, residuals), residuals)


def test_saturated_attention_leaves_corrections_bounded(problem):
    """Where one event has all the weight, Jacobians almost vanish, and the best fit would be unbounded."""
    codewords, blocks, queries, (keys, values, mask) = problem
    loud = 20 * np.sign(codewords.mean(axis=1))[:, None]  # [H, 1, E]
    keys = np.where(np.arange(keys.shape[2])[:, None] == 0, loud, keys)
    found = corrections.correction_statistics(codewords, blocks, queries, keys, values, mask)
    residuals = queries - codewords[:, blocks.codes][:, :, None]
    lengths = np.linalg.norm(residuals, axis=-1)
    endless = corrections.fit_corrections(*found, blocks, residuals, reach=np.inf)
    assert (np.linalg.norm(endless, axis=-1) > 2 * lengths).any()
    fitted = corrections.fit_corrections(*found, blocks, residuals)
    assert (np.linalg.norm(fitted, axis=-1) <= 2 * lengths * 1.0001).all()


def test_shapes_that_do_not_fit_are_refused(problem, statistics):
    codewords, blocks, queries, history = problem
    with pytest.raises(AssertionError):
        corrections.correction_statistics(codewords, blocks, queries[:, :1], *history)
    with pytest.raises(AssertionError):
        corrections.fit_corrections(*statistics, blocks, queries[:, :1])
