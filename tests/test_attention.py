"""Attention over a history: a naive reference, masks, gradients, extremes, look-ups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from draws import normal
from jax.test_util import check_grads

from tarq_jax import attention

B, L, H, Q, K, N, E = 3, 2, 4, 5, 6, 7, 8


@pytest.fixture(scope="module")
def inputs():
    """Queries [B, H, Q, E], keys and values [B, H, N, E], and a mask [B, N] with an empty history."""
    mask = np.random.default_rng(0).random((B, N)) < 0.6
    mask[1], mask[2] = False, True
    return normal(0, B, H, Q, E), normal(1, B, H, N, E), normal(2, B, H, N, E), mask


# compiled once here, as the library leaves that to its callers
attend = jax.jit(attention.multi_head_attention)
masked_softmax = jax.jit(attention._masked_softmax)


@jax.jit
@functools.partial(jax.grad, argnums=(0, 1, 2))
def gradients(queries, keys, values, mask):
    return jnp.sum(attention.multi_head_attention(queries, keys, values, mask) ** 2)


# Values


def test_equals_naive_attention(inputs):
    np.testing.assert_allclose(attend(*inputs), reference.attention(*inputs), rtol=1e-5, atol=1e-6)


def test_jit_and_vmap_equal_eager(inputs):
    expected = attention.multi_head_attention(*inputs)
    np.testing.assert_allclose(attend(*inputs), expected, rtol=1e-5, atol=1e-6)
    # over heads; over requests multi_head_attention already is a vmap
    batched = jax.vmap(attention.multi_head_attention, in_axes=(1, 1, 1, None), out_axes=1)(*inputs)
    np.testing.assert_allclose(batched, expected, rtol=1e-5, atol=1e-6)


def test_weights_are_a_distribution_over_unmasked_positions(inputs):
    queries, keys, _, mask = inputs
    mask = np.broadcast_to(mask[:, None, None], (B, H, Q, N))
    weights = np.asarray(attention.attention_weights(queries, keys, mask))
    assert weights.shape == (B, H, Q, N)
    assert (weights[~mask] == 0.0).all() and (weights[mask] > 0.0).all()
    np.testing.assert_allclose(weights.sum(axis=-1), mask.any(axis=-1), rtol=1e-6)


@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, B, 1, 1, N)])
def test_masks_are_broadcast_in_blocks_too(inputs, shape):
    queries, keys, values, _ = inputs
    mask = np.ones(shape, bool)
    whole, parts = (attention.attention_sums(queries, keys, values, mask, block=block) for block in (0, 2))
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-6)


def test_masked_equals_truncated(inputs):
    queries, keys, values, _ = inputs
    mask = np.arange(N) < np.array([4, 0, 3])[:, None]
    truncated = attend(queries, keys[..., :4, :], values[..., :4, :], mask[:, :4])
    np.testing.assert_allclose(attend(queries, keys, values, mask), truncated, rtol=1e-5, atol=1e-6)


def test_levels_are_batch_axes(inputs):
    """Inputs with a level axis between B and H give the same results as level by level."""
    queries, keys, values = normal(3, B, L, H, Q, E), normal(4, B, L, H, N, E), normal(5, B, L, H, N, E)
    mask = inputs[-1]
    expected = np.stack([attend(queries[:, i], keys[:, i], values[:, i], mask) for i in range(L)], axis=1)
    np.testing.assert_allclose(attend(queries, keys, values, mask), expected, rtol=1e-5, atol=1e-6)


# Masks and extremes


def test_empty_history_gives_exactly_zero(inputs):
    assert not np.any(attend(*inputs)[1])
    for gradient in gradients(*inputs):
        assert np.isfinite(gradient).all()
        assert not np.any(gradient[1])
        assert np.any(gradient[0]) and np.any(gradient[2])


@pytest.mark.parametrize("size", [1e3, 1e30, 3e38])
def test_masked_positions_do_not_leak(inputs, size):
    queries, keys, values, mask = inputs
    masked = ~mask[:, None, :, None]
    sign = np.sign(normal(6, *keys.shape))
    poisoned = (queries, np.where(masked, size * sign, keys), np.where(masked, -size * sign, values), mask)
    np.testing.assert_array_equal(attend(*poisoned), attend(*inputs))
    if size < 1e38:  # for larger values the gradient overflows, as zero weights multiply them
        for changed, expected in zip(gradients(*poisoned), gradients(*inputs), strict=True):
            np.testing.assert_allclose(changed, expected, rtol=1e-5, atol=1e-6)


def test_masked_positions_get_no_gradient(inputs):
    for gradient in gradients(*inputs)[1:]:
        moved = np.any(np.asarray(gradient) != 0, axis=(1, 3))
        np.testing.assert_array_equal(moved, inputs[-1])


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_extreme_logits_pick_the_best_position(inputs, scale):
    queries, keys, values, mask = inputs
    extreme = (queries * scale, keys * scale, values, mask)
    logits = np.where(mask[:, None, None], queries @ np.swapaxes(keys, -1, -2), -np.inf)
    picked = np.take_along_axis(values, np.argmax(logits, axis=-1)[..., None], axis=2)
    expected = picked * mask.any(axis=-1)[:, None, None, None]
    np.testing.assert_allclose(attend(*extreme), expected, atol=1e-3)
    for gradient in gradients(*extreme):
        assert np.isfinite(gradient).all()


def test_weights_of_equal_extreme_logits_are_even():
    for logit in (-1e4, 1e4):
        weights = masked_softmax(np.full((1, 4), logit, np.float32), np.array([[True, True, False, True]]))
        np.testing.assert_allclose(weights, [[1 / 3, 1 / 3, 0.0, 1 / 3]], rtol=1e-6)


# Gradients


def plain_softmax(logits, mask):
    """The same softmax without a custom derivative."""
    exponentials = jnp.where(mask, jnp.exp(jnp.where(mask, logits, 0.0)), 0.0)
    total = exponentials.sum(axis=-1, keepdims=True)
    return exponentials / jnp.where(total > 0, total, 1.0)


@pytest.fixture(scope="module")
def rows():
    """Logits [4, 7] and a mask that allows all, some, one and none of a row's positions."""
    mask = np.ones((4, 7), bool)
    mask[1, [0, 3, 4]], mask[2, 1:], mask[3] = False, False, False
    return 2.0 * normal(7, 4, 7), mask


def test_derivatives_equal_those_of_plain_softmax(rows):
    logits, mask = rows
    tangent, upstream = normal(8, 4, 7), normal(9, 4, 7)

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(softmax, logits):
        function = functools.partial(softmax, mask=mask)
        value, forward = jax.jvp(function, (logits,), (tangent,))
        def loss(x):
            return jnp.sum(upstream * function(x) ** 2)

        curvature = jax.jvp(jax.grad(loss), (logits,), (tangent,))[1]
        return value, forward, jax.grad(loss)(logits), curvature

    expected = derivatives(plain_softmax, logits)
    # pass arguments by position, as a keyword would bypass custom_jvp's rule
    actual = derivatives(lambda x, mask: attention._masked_softmax(x, mask), logits)
    for one, other in zip(actual, expected, strict=True):
        assert np.any(other)
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["fwd", "rev"])
def test_derivatives_equal_finite_differences(rows, mode):
    logits, mask = rows
    check_grads(lambda x: masked_softmax(x, mask), (logits,), 1, [mode], atol=1e-2, rtol=1e-2, eps=1e-2)


def test_gradients_of_attention_equal_finite_differences(inputs):
    *arrays, mask = inputs
    check_grads(lambda *args: attend(*args, mask), arrays, 1, ["rev"], atol=2e-2, rtol=2e-2, eps=1e-2)


# Personalised codebooks


def test_personalized_codebook_is_attention_of_every_codeword(inputs):
    queries, keys, values = normal(3, L, H, K, E), normal(4, B, L, H, N, E), normal(5, B, L, H, N, E)
    mask = inputs[-1]
    personalized = jax.jit(attention.personalized_codebook)(queries, keys, values, mask)
    assert personalized.shape == (B, L, H, K, E)
    for level in range(L):
        repeated = np.broadcast_to(queries[level], (B, H, K, E))
        expected = attend(repeated, keys[:, level], values[:, level], mask)
        np.testing.assert_allclose(personalized[:, level], expected, rtol=1e-5, atol=1e-6)
    assert not np.any(personalized[1])


@pytest.fixture(scope="module")
def codebook():
    """Personalised codewords [B, L, K, D] and codes [B, Q, L]."""
    return normal(10, B, L, K, E), np.random.default_rng(11).integers(0, K, (B, Q, L))


def test_look_up_sums_what_a_gather_finds(codebook):
    personalized, codes = codebook
    expected = np.zeros((B, Q, E), np.float32)
    for request, candidate, level in np.ndindex(B, Q, L):
        expected[request, candidate] += personalized[request, level, codes[request, candidate, level]]
    np.testing.assert_allclose(attention.look_up(personalized, codes), expected, rtol=1e-6)


def test_gradient_of_look_up_is_a_scatter(codebook):
    personalized, codes = codebook
    upstream = normal(12, B, Q, E)
    gradient = jax.grad(lambda p: jnp.sum(upstream * attention.look_up(p, codes)))(personalized)
    expected = np.zeros_like(personalized)
    for request, candidate, level in np.ndindex(B, Q, L):
        expected[request, level, codes[request, candidate, level]] += upstream[request, candidate]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


# Shapes


def ones(*shape):
    return np.ones(shape, np.float32)


@pytest.mark.parametrize("shapes", [
    ((B, H, Q, E), (B, H, N, E), (B, H, N + 1, E), (B, N)),  # keys and values differ
    ((B, H, Q, E), (B, H, N, E), (B, H, N, E), (B, N + 1)),
    ((B, H, Q, E), (B, H, N, E), (B, H, N, E), (1, N)),
    ((B, H, Q, E), (B, H, N, E), (B, H, N, E), (B, 1)),
    ((B, H, Q, E + 1), (B, H, N, E), (B, H, N, E), (B, N)),
    ((1, H, Q, E), (B, H, N, E), (B, H, N, E), (B, N)),
    ((B, 1, Q, E), (B, H, N, E), (B, H, N, E), (B, N)),
    ((B, H, E), (B, H, N, E), (B, H, N, E), (B, N)),
    ((B, H, H, Q, E), (B, H, N, E), (B, H, N, E), (B, N)),
])
def test_attention_refuses_other_shapes(shapes):
    with pytest.raises(AssertionError):
        attention.multi_head_attention(*(ones(*shape) for shape in shapes[:3]), np.ones(shapes[3], bool))


@pytest.mark.parametrize("queries", [(B, L, H, K, E), (L, K, E), (1, H, K, E), (L, 1, K, E), (L, H, K, 1)])
def test_personalized_codebook_refuses_other_shapes(queries):
    with pytest.raises(AssertionError):
        attention.personalized_codebook(
            ones(*queries), ones(B, L, H, N, E), ones(B, L, H, N, E), np.ones((B, N), bool)
        )


@pytest.mark.parametrize("shapes", [
    ((L, K, E), (B, Q, L)),
    ((1, L, K, E), (B, Q, L)),
    ((B, 1, K, E), (B, Q, L)),
    ((B, L, K, E), (B, Q, L + 1)),
    ((B, L, K, E), (B, Q)),
])
def test_look_up_refuses_other_shapes(shapes):
    with pytest.raises(AssertionError):
        attention.look_up(ones(*shapes[0]), np.zeros(shapes[1], int))
