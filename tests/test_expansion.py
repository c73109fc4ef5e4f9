"""Order-1 personalised codebooks: a naive reference, exact cases, look-ups, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from tarq_jax import attention, expansion

B, H, K, N, E, G = 3, 2, 5, 6, 4, 7
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


# compiled once here, as the library leaves that to its callers
expand = jax.jit(expansion.expand)
attend = jax.jit(attention.multi_head_attention)
look_up = jax.jit(expansion.look_up_expansion)


@pytest.fixture(scope="module")
def history():
    """Keys, values [B, H, N, E] and a mask [B, N] with an empty history."""
    mask = np.random.default_rng(0).random((B, N)) < 0.7
    mask[1], mask[2] = False, True
    return normal(1, B, H, N, E), normal(2, B, H, N, E), mask


@pytest.fixture(scope="module")
def codewords():
    return normal(3, H, K, E)


@pytest.fixture(scope="module")
def expanded(codewords, history):
    return expand(codewords, *history)


def candidates(codewords, scale, seed=4):
    """Codes [B, G], residuals [B, H, G, E] of the given size, and the codes' codewords [B, H, G, E]."""
    codes = np.random.default_rng(seed).integers(0, K, (B, G))
    return codes, scale * normal(seed + 1, B, H, G, E), np.moveaxis(codewords[:, codes], 0, 1)


def naive(codeword, keys, values):
    """`m_c` and `J_c` of one codeword over one history, term by term."""
    if not len(keys):
        return np.zeros(E), np.zeros((E, E))
    logits = keys @ codeword / np.sqrt(E)
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    mean, mean_key = weights @ values, weights @ keys
    outer = sum(a * np.outer(v, k) for a, v, k in zip(weights, values, keys, strict=True))
    return mean, (outer - np.outer(mean, mean_key)) / np.sqrt(E)


# Values


def test_equals_the_formula(expanded, codewords, history):
    keys, values, mask = history
    for b, h, k in np.ndindex(B, H, K):
        mean, jacobian = naive(codewords[h, k], keys[b, h, mask[b]], values[b, h, mask[b]])
        close(expanded.means[b, h, k], mean)
        close(expanded.jacobians[b, h, k], jacobian)


def test_jacobian_is_the_derivative_of_attention(expanded, codewords, history):
    def output(query, b, h):
        keys, values, mask = (x[b] for x in history)
        return attention.attention_weights(query[None], keys[h], mask)[0] @ values[h]

    for b, h in np.ndindex(B, H):
        derivative = jax.vmap(jax.jacfwd(lambda query, b=b, h=h: output(query, b, h)))(codewords[h])
        close(expanded.jacobians[b, h], derivative)


def test_empty_history_expands_to_zero(expanded, codewords):
    assert not np.any(expanded.means[1]) and not np.any(expanded.jacobians[1])
    codes, residuals, _ = candidates(codewords, 10.0)
    assert not np.any(np.asarray(look_up(expanded, codes, residuals))[1])


def with_offset(codewords, history, offset, dtype):
    """Codewords, keys and values with a common offset, in a type, and the exact expansion of these."""
    keys, values, mask = history
    given = [jnp.asarray(x, dtype) for x in (codewords, keys + offset, values - offset)]
    queries, keys, values = (np.asarray(x).astype(np.float64) for x in given)
    exact = [naive(queries[h, k], keys[b, h, mask[b]], values[b, h, mask[b]])
             for b, h, k in np.ndindex(B, H, K)]
    means, jacobians = map(np.stack, zip(*exact, strict=True))
    return (*given, mask), means.reshape(B, H, K, E), jacobians.reshape(B, H, K, E, E)


@pytest.mark.parametrize(("dtype", "offset", "tolerance"), [
    ("float32", 0.0, 1e-5), ("float32", 100.0, 1e-5), ("float32", 1000.0, 1e-5),
    ("bfloat16", 0.0, 0.02), ("bfloat16", 3.0, 0.02)])
def test_an_offset_costs_no_precision(codewords, history, dtype, offset, tolerance):
    """What keys and values have in common cancels in the Jacobian; the error is relative to the largest."""
    arguments, means, jacobians = with_offset(codewords, history, offset, dtype)
    found = expand(*arguments)
    assert found.means.dtype == found.jacobians.dtype == dtype
    assert not np.any(found.means[1]) and not np.any(found.jacobians[1])
    for one, exact in ((found.means, means), (found.jacobians, jacobians)):
        np.testing.assert_allclose(
            np.asarray(one).astype(np.float64), exact, rtol=0, atol=tolerance * np.abs(exact).max())


def test_masked_equals_truncated(codewords, history):
    keys, values, _ = history
    mask = np.arange(N) < np.array([4, 0, 3])[:, None]
    masked = expand(codewords, keys, values, mask)
    truncated = expand(codewords, keys[:, :, :4], values[:, :, :4], mask[:, :4])
    jax.tree.map(close, masked, truncated)


@pytest.mark.parametrize("padding", [1e3, -1e3])
def test_padding_never_shows(expanded, codewords, history, padding):
    keys, values, mask = history
    filled = (np.where(mask[:, None, :, None], x, np.float32(padding)) for x in (keys, values))
    jax.tree.map(close, expand(codewords, *filled, mask), expanded)


def test_exact_where_the_query_is_a_codeword(expanded, codewords, history):
    codes, residuals, centres = candidates(codewords, 0.0)
    close(look_up(expanded, codes, residuals), attend(centres, *history))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_error_falls_with_the_square_of_the_residual(expanded, codewords, history, seed):
    """In the limit, half the distance to the codeword gives a quarter of the error."""
    codes, residuals, centres = candidates(codewords, 0.2, seed)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64) if x.dtype == np.float32 else x, history)
        around = expansion.expand(codewords.astype(np.float64), *wide)
        errors = []
        for scale in (1.0, 0.5, 0.25):
            exact = attention.multi_head_attention(centres + scale * residuals, *wide)
            found = expansion.look_up_expansion(around, codes, scale * residuals.astype(np.float64))
            errors.append(float(jnp.linalg.norm(exact - found)))
    assert errors[0] > errors[1] > errors[2]
    assert 3.0 < errors[1] / errors[2] < 5.0


def test_beats_order_0(expanded, codewords, history):
    codes, residuals, centres = candidates(codewords, 0.3)
    exact = attend(centres + residuals, *history)
    first = np.linalg.norm(exact - look_up(expanded, codes, residuals))
    assert first < 0.3 * np.linalg.norm(exact - attend(centres, *history))


# Ways to look up


def test_first_order_equals_the_look_up(expanded, codewords, history):
    """Training attends with candidates' own codewords, serving looks up; both agree, level by level."""
    codes, residuals, centres = candidates(codewords, 0.5)
    parts = np.stack([0.25 * residuals, 0.75 * residuals])
    compute = jax.jit(lambda *args: expansion.first_order(lambda q: attend(q, *history), *args))
    value, changes = compute(centres, parts)
    close(value, look_up(expanded, codes, 0.0 * residuals))
    close(value + changes.sum(axis=0), look_up(expanded, codes, residuals))
    close(changes[0] * 3.0, changes[1])


@pytest.mark.parametrize("block", [1, 2, 8])
def test_blocks_equal_gathering(expanded, codewords, block):
    codes = np.random.default_rng(7).integers(0, K - 1, 23)  # no item has the last codeword
    residuals = normal(8, 23, H, E)
    blocks = expansion.group_by_code(codes, block=block)
    in_blocks = np.moveaxis(residuals[blocks.items], 2, 0)
    found = jax.jit(expansion.look_up_blocks)(expanded, blocks, in_blocks)
    found = np.asarray(found).reshape(B, H, -1, E)[:, :, blocks.positions]
    everyone = np.broadcast_to(np.moveaxis(residuals, 1, 0), (B, H, 23, E))
    close(found, expansion.look_up_expansion(expanded, np.broadcast_to(codes, (B, 23)), everyone))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(1, 9))
def test_blocks_hold_every_item_once(codes, block):
    codes = np.array(codes)
    blocks = expansion.group_by_code(codes, block=block)
    np.testing.assert_array_equal(blocks.items.ravel()[blocks.positions], np.arange(len(codes)))
    np.testing.assert_array_equal(np.repeat(blocks.codes, block)[blocks.positions], codes)
    assert len(np.unique(blocks.positions)) == len(codes)
    assert len(blocks.codes) <= len(codes) / block + len(np.unique(codes))


# Gradients


@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_gradients(codewords, history, offset):
    keys, values, mask = history
    keys, values = keys + np.float32(offset), values - np.float32(offset)
    codes, residuals, _ = candidates(codewords, 0.5)

    def value(codewords, keys, values, residuals):
        return expansion.look_up_expansion(expansion.expand(codewords, keys, values, mask), codes, residuals)

    arguments = (codewords, keys, values, residuals)
    check_grads(jax.jit(value), arguments, order=1, modes=["rev"], rtol=2e-2, atol=2e-2)


def test_jit_and_vmap_equal_eager(expanded, codewords, history):
    jax.tree.map(close, expansion.expand(codewords, *history), expanded)
    one = jax.vmap(lambda *row: jax.tree.map(lambda x: x[0], expansion.expand(
        codewords, *(x[None] for x in row))))(*history)
    jax.tree.map(close, one, expanded)


@pytest.mark.parametrize("call", [
    lambda c, h: expansion.expand(c[0], *h),
    lambda c, h: expansion.expand(c[..., :2], *h),
    lambda c, h: expansion.expand(c, h[0], h[1][:, :, :2], h[2]),
    lambda c, h: expansion.expand(c, h[0], h[1], h[2][:, :2]),
    lambda c, h: expansion.look_up_expansion(expand(c, *h), np.zeros((B, G), int), np.zeros((B, H, 1, E))),
    lambda c, h: expansion.first_order(jnp.square, np.zeros((2, 3)), np.zeros((1, 3))),
    lambda c, h: expansion.group_by_code(np.zeros((2, 3), int)),
])
def test_shapes_that_do_not_fit_are_refused(codewords, history, call):
    with pytest.raises(AssertionError):
        call(codewords, history)
