"""Gradients through quantization: straight-through, the rotation trick, and those of the codewords."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal

from tarq_jax import quantization

TRICKS = [quantization.straight_through, quantization.rotate]


def test_straight_through_value_and_gradient(quantized):
    codewords, latents, output = quantized
    passed = jax.jit(quantization.straight_through)(latents, output.quantized)
    np.testing.assert_array_equal(passed, output.quantized)
    upstream = normal(2, *latents.shape)

    def value(codewords, latents):
        quantized = quantization.encode(codewords, latents).quantized
        return jnp.sum(upstream * quantization.straight_through(latents, quantized))

    to_codewords, to_latents = jax.jit(jax.grad(value, argnums=(0, 1)))(codewords, latents)
    np.testing.assert_array_equal(to_latents, upstream)
    np.testing.assert_array_equal(to_codewords, 0.0)


def test_gradient_of_quantized_counts_assignments(quantized):
    codewords, latents, output = quantized
    counts, _ = quantization.assignment_statistics(output, codewords)
    used = np.broadcast_to(counts[..., None], codewords.shape)

    def sums(codewords):
        output = quantization.encode(codewords, latents)
        return output.quantized.sum(), output.residuals[..., -1, :].sum()

    of_quantized, of_residual = jax.jit(jax.jacrev(sums))(codewords)
    np.testing.assert_array_equal(of_quantized, used)
    np.testing.assert_array_equal(of_residual, np.where(np.arange(3)[:, None, None] < 2, -used, 0.0))


# The rotation trick


def test_rotation_equals_its_matrix(quantized):
    """Value and gradient equal those of the matrix `s (I - 2 r r^T + 2 q e^T)`, latent by latent."""
    _, latents, output = quantized
    upstream = normal(3, *latents.shape)
    value, back = jax.vjp(lambda z: quantization.rotate(z, output.quantized), latents)
    np.testing.assert_array_equal(value, output.quantized)
    gradient = np.asarray(back(upstream)[0])
    for index in np.ndindex(latents.shape[:-1]):
        z, target = (np.asarray(x[index], np.float64) for x in (latents, output.quantized))
        unit, direction = z / np.linalg.norm(z), target / np.linalg.norm(target)
        middle = (unit + direction) / np.linalg.norm(unit + direction)
        matrix = np.eye(5) - 2 * np.outer(middle, middle) + 2 * np.outer(direction, unit)
        matrix *= np.linalg.norm(target) / np.linalg.norm(z)
        np.testing.assert_allclose(gradient[index], matrix.T @ upstream[index], rtol=1e-3, atol=1e-4)


def test_rotation_is_the_identity_where_nothing_is_lost():
    latents, upstream = normal(0, 4, 3), normal(1, 4, 3)
    value, back = jax.vjp(lambda z: quantization.rotate(z, latents), latents)
    np.testing.assert_array_equal(value, latents)
    np.testing.assert_allclose(back(upstream)[0], upstream, rtol=1e-5)


def test_rotation_keeps_the_angle_of_the_gradient(quantized):
    _, latents, output = quantized
    upstream = normal(4, *latents.shape)
    gradient = jax.vjp(lambda z: quantization.rotate(z, output.quantized), latents)[1](upstream)[0]

    def cosine(one, other):
        return np.sum(one * other, axis=-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)

    np.testing.assert_allclose(
        cosine(np.asarray(gradient), latents), cosine(upstream, np.asarray(output.quantized)), atol=1e-4)


@pytest.mark.parametrize(("latent", "target"), [
    ([0.0, 0.0], [1.0, 2.0]), ([1.0, 2.0], [0.0, 0.0]), ([1.0, 2.0], [-2.0, -4.0]), ([0.0, 0.0], [0.0, 0.0]),
])
def test_rotation_falls_back_where_none_is_defined(latent, target):
    latent, target = np.array([latent], np.float32), np.array([target], np.float32)
    value, back = jax.vjp(lambda z: quantization.rotate(z, target), latent)
    np.testing.assert_array_equal(value, target)
    np.testing.assert_array_equal(back(np.ones((1, 2), np.float32))[0], [[1.0, 1.0]])


def test_rotation_takes_the_latent_to_the_codeword(quantized):
    """The map is linear in the latent, so its derivative along the latent is the codeword."""
    _, latents, output = quantized
    _, along = jax.jvp(lambda z: quantization.rotate(z, output.quantized), (latents,), (latents,))
    np.testing.assert_allclose(along, output.quantized, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12])
def test_lengths_that_differ_by_far_keep_the_value(trick, scale):
    latents, target = np.float32(scale) * normal(0, 8, 3), normal(1, 8, 3)
    value, back = jax.vjp(lambda z: trick(z, target), latents)
    np.testing.assert_array_equal(value, target)
    assert np.isfinite(back(normal(2, 8, 3))[0]).all()


@pytest.mark.parametrize("trick", TRICKS)
def test_leading_axes_are_only_a_shape(trick):
    latents, target, upstream = normal(0, 6, 4), normal(1, 6, 4), normal(2, 6, 4)

    def gradient(*shape):
        return jax.vjp(lambda z: trick(z, target.reshape(shape)), latents.reshape(shape))[1](
            upstream.reshape(shape))[0]

    np.testing.assert_allclose(gradient(2, 3, 4).reshape(6, 4), gradient(6, 4), rtol=1e-6)
    alone = [jax.vjp(lambda z, q=q: trick(z, q), z)[1](g)[0]
             for z, q, g in zip(latents, target, upstream, strict=True)]
    np.testing.assert_allclose(np.stack(alone), gradient(6, 4), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trick", TRICKS)
def test_shapes_that_do_not_fit_are_refused(trick):
    with pytest.raises(AssertionError):
        trick(np.zeros((6, 5)), np.zeros((1, 5)))
