"""Losses: closed forms, weights, extremes, which side gets a gradient, alignment against a naive copy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from hypothesis import given, settings
from hypothesis import strategies as st

from tarq_jax import losses

examples = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31 - 1)
B, G, L, K, D = 3, 4, 2, 5, 6


# Weighted mean


@examples
@given(seeds)
def test_weighted_mean_closed_form(seed):
    rng = np.random.default_rng(seed)
    values, weights = rng.normal(size=(3, 4)), rng.uniform(size=(3, 4)) * (rng.random((3, 4)) < 0.7)
    weights[0, 0] = 1.0
    expected = np.average(values, weights=weights)
    args = np.float32(values), np.float32(weights)
    assert float(losses.weighted_mean(*args)) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    doubled = losses.weighted_mean(args[0], 2.0 * args[1])
    assert float(doubled) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e38])
def test_weighted_mean_leaves_values_of_zero_weight_out(bad):
    values, weights = jnp.array([1.0, bad, 3.0]), jnp.array([1.0, 0.0, 3.0])
    value, gradient = jax.value_and_grad(losses.weighted_mean)(values, weights)
    assert float(value) == 2.5
    np.testing.assert_allclose(gradient, [0.25, 0.0, 0.75])


def test_weighted_mean_shows_bad_values_of_positive_weight():
    for bad in (np.nan, np.inf):
        value = losses.weighted_mean(jnp.array([1.0, bad, 3.0]), jnp.array([1.0, 1e-6, 0.0]))
        assert not np.isfinite(value)


def test_weighted_mean_without_weights_is_zero():
    value, gradient = jax.value_and_grad(losses.weighted_mean)(jnp.array([1.0, jnp.nan]), jnp.zeros(2))
    assert value == 0.0
    np.testing.assert_array_equal(gradient, 0.0)


# Elementwise losses


@pytest.mark.parametrize(("logit", "label", "expected"), [
    (0.0, 1.0, math.log(2)),
    (0.0, 0.0, math.log(2)),
    (math.log(3), 1.0, math.log(4 / 3)),  # p = 3/4
    (math.log(3), 0.0, math.log(4)),
    (math.log(3), 0.25, 0.25 * math.log(4 / 3) + 0.75 * math.log(4)),
    (1e4, 1.0, 0.0),
    (1e4, 0.0, 1e4),
    (-1e4, 1.0, 1e4),
    (-1e4, 0.0, 0.0),
])
def test_binary_cross_entropy_closed_form(logit, label, expected):
    value, gradient = jax.value_and_grad(losses.binary_cross_entropy)(np.float32(logit), np.float32(label))
    assert float(value) == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert float(gradient) == pytest.approx(1 / (1 + math.exp(-min(max(logit, -700), 700))) - label, abs=1e-6)


@pytest.mark.parametrize(("student", "teacher", "expected"), [
    (0.0, math.log(3), math.log(2)),
    (math.log(3), math.log(3), 0.75 * math.log(4 / 3) + 0.25 * math.log(4)),  # entropy of 3/4
    (math.log(3), -1e4, math.log(4)),
    (-1e4, 1e4, 1e4),
    (1e4, 1e4, 0.0),
])
def test_distillation_closed_form(student, teacher, expected):
    logits = np.float32(student), np.float32(teacher)
    value, gradients = jax.value_and_grad(losses.distillation, argnums=(0, 1))(*logits)
    assert float(value) == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert np.isfinite(gradients).all() and gradients[1] == 0.0


def test_distillation_is_smallest_at_the_teacher():
    teacher = jnp.linspace(-4.0, 4.0, 9)
    least = losses.distillation(teacher, teacher)
    for shift in (-1.0, -0.1, 0.1, 1.0):
        assert (losses.distillation(teacher + shift, teacher) > least).all()
    gradient = jax.grad(lambda student: losses.distillation(student, teacher).sum())(teacher)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)
    gradient = jax.grad(lambda student: losses.distillation(student, teacher).sum())(teacher + 0.1)
    assert (gradient > 0).all()


# Squared errors


@pytest.mark.parametrize(("loss", "factor"), [
    (losses.squared_error, 1.0), (losses.commitment, 1.0), (losses.output_reconstruction, 0.5),
])
def test_squared_errors(loss, factor):
    """Closed form; only the first argument gets a gradient."""
    moved, fixed = normal(0, B, G, D), normal(1, B, G, D)
    upstream = normal(2, B, G)
    value, pull = jax.vjp(loss, moved, fixed)
    assert value.shape == (B, G)
    np.testing.assert_allclose(value, factor * np.sum((moved - fixed) ** 2, axis=-1), rtol=1e-5)
    to_moved, to_fixed = pull(upstream)
    expected = 2 * factor * upstream[..., None] * (moved - fixed)
    np.testing.assert_allclose(to_moved, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(to_fixed, 0.0)
    np.testing.assert_array_equal(loss(moved, moved), 0.0)
    np.testing.assert_allclose(loss(jnp.full(4, 1e4), jnp.full(4, -1e4)), factor * 4 * 4e8, rtol=1e-6)


def test_codebook_loss():
    chosen, residuals, upstream = normal(0, B, G, L, D), normal(1, B, G, L, D), normal(2, B, G)
    value, pull = jax.vjp(losses.codebook_loss, chosen, residuals)
    np.testing.assert_allclose(value, np.sum((chosen - residuals) ** 2, axis=(-1, -2)), rtol=1e-5)
    to_chosen, to_residuals = pull(upstream)
    expected = 2 * upstream[..., None, None] * (chosen - residuals)
    np.testing.assert_allclose(to_chosen, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(to_residuals, 0.0)


@pytest.mark.parametrize("loss", [
    losses.weighted_mean, losses.binary_cross_entropy, losses.distillation, losses.squared_error,
    losses.output_reconstruction, losses.commitment, losses.codebook_loss,
])
def test_shapes_that_differ_are_refused(loss):
    with pytest.raises(AssertionError):
        loss(jnp.ones((4, 3, 2)), jnp.ones((1, 3, 2)))
    with pytest.raises(AssertionError):
        loss(jnp.ones((4, 3, 2)), jnp.ones((3, 2)))


# Codebook alignment


def naive_alignment(latents, teacher_outputs, codewords, personalized, chosen, attended):
    """The formula as written: differences [B, G, K, D], and both divergences separately."""
    latent, output, total = latents, jax.lax.stop_gradient(teacher_outputs), 0.0
    for level in range(codewords.shape[0]):
        far = jnp.sum((latent[:, :, None] - codewords[level]) ** 2, axis=-1)
        far_attended = jnp.sum((output[:, :, None] - personalized[:, None, level]) ** 2, axis=-1)
        p, q = jax.nn.softmax(-far), jax.nn.softmax(-far_attended)
        total += jnp.sum(p * jnp.log(p / q), axis=-1) + jnp.sum(q * jnp.log(q / p), axis=-1)
        latent = latent - chosen[:, :, level]
        output = output - attended[:, :, level]
    return total


def aligned(seed, scale=0.5):
    """The arguments of `codebook_alignment`, in order; `chosen` and `attended` belong to random codes."""
    rng = np.random.default_rng(seed)
    latents, outputs = rng.normal(size=(2, B, G, D))
    codewords, personalized = rng.normal(size=(L, K, D)), rng.normal(size=(B, L, K, D))
    codes = rng.integers(0, K, (B, G, L))
    chosen = codewords[np.arange(L), codes]
    attended = personalized[np.arange(B)[:, None, None], np.arange(L), codes]
    parts = latents, outputs, codewords, personalized, chosen, attended
    return tuple((scale * part).astype(np.float32) for part in parts)


@pytest.fixture(scope="module")
def alignment():
    """Loss [B, G] and its gradients for a random upstream gradient: ours and the naive one, compiled."""
    upstream = normal(20, B, G)

    def with_gradients(loss):
        def call(*args):
            value, pull = jax.vjp(loss, *args)
            return value, pull(upstream)

        return jax.jit(call)

    return with_gradients(losses.codebook_alignment), with_gradients(naive_alignment)


@examples
@given(seeds)
def test_alignment_equals_naive_formula(alignment, seed):
    ours, naive = alignment
    (value, gradients), (expected, expected_gradients) = ours(*aligned(seed)), naive(*aligned(seed))
    assert value.shape == (B, G)
    np.testing.assert_allclose(value, expected, rtol=1e-3, atol=1e-4)
    for one, other in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)
    takes_gradient = [bool(np.any(gradient)) for gradient in gradients]
    assert takes_gradient == [True, False, True, True, True, True]  # none for the teacher's outputs


@examples
@given(seeds, st.sampled_from([0.1, 1.0, 30.0, 1e4]))
def test_alignment_is_not_negative_and_finite(alignment, seed, scale):
    value, gradients = alignment[0](*aligned(seed, scale))
    assert (value >= 0).all()
    for array in (value, *gradients):
        assert np.isfinite(array).all()


def test_alignment_is_zero_where_the_orders_agree(alignment):
    latents, _, codewords, _, chosen, _ = aligned(0)
    personalized = np.broadcast_to(codewords, (B, L, K, D))
    value, gradients = alignment[0](latents, latents, codewords, personalized, chosen, chosen)
    np.testing.assert_allclose(value, 0.0, atol=1e-6)
    for gradient in gradients:
        np.testing.assert_allclose(gradient, 0.0, atol=1e-5)


def test_alignment_closed_form():
    """One level, two codewords at 0 and 1; the latent is at the first, the output half-way."""
    zero = jnp.zeros((1, 1, 1))
    codewords = jnp.array([[[0.0], [1.0]]])
    value = losses.codebook_alignment(zero, zero + 0.5, codewords, codewords[None], zero[None], zero[None])
    p, q = 1 / (1 + math.exp(-1)), 0.5
    first = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    second = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    assert float(value[0, 0]) == pytest.approx(first + second, rel=1e-5)


@pytest.mark.parametrize(("position", "shape"), [
    (0, (B, G, 1)), (1, (B, G, 1)), (1, (1, G, D)), (2, (1, K, D)), (2, (L, 1, D)), (3, (1, L, K, D)),
    (3, (B, L, 1, D)), (4, (B, 1, L, D)), (5, (1, G, L, D)), (4, (B, G, D)),
])
def test_alignment_refuses_other_shapes(position, shape):
    args = list(aligned(0))
    args[position] = np.ones(shape, np.float32)
    with pytest.raises(AssertionError):
        losses.codebook_alignment(*args)


def test_alignment_refuses_negative_blocks():
    with pytest.raises(ValueError, match="block: expected an integer >= 0, got -1"):
        losses.codebook_alignment(*aligned(0), block=-1)
