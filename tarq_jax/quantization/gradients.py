"""Gradients through the choice of a codeword, which has none of its own."""

import chex
import jax
import jax.numpy as jnp


def straight_through(latents: jax.Array, quantized: jax.Array) -> jax.Array:
    """The quantized value with the latent's gradient: `z + sg(z_q - z)` (van den Oord et al. 2017).

    Args:
      latents: [..., D], `z`.
      quantized: [..., D], `z_q`.

    Returns:
      [..., D], equal to `quantized` up to rounding.
    """
    chex.assert_equal_shape([latents, quantized])
    return latents + jax.lax.stop_gradient(quantized - latents)


def rotate(latents: jax.Array, quantized: jax.Array) -> jax.Array:
    """The quantized value as a rotation and rescaling of the latent, which are held constant.

    `z_q = s R z` with `s = |z_q| / |z|` and `R` the rotation in the plane of both that takes one
    direction to the other: `R = I - 2 r r^T + 2 q e^T`, e and q the unit vectors, `r` that of `e + q`
    (rotation trick, Fifty et al. 2024, arXiv 2410.06424). The gradient keeps its angle to the codeword,
    where `straight_through` moves it in parallel.

    Args:
      latents: [..., D], `z`.
      quantized: [..., D], `z_q`.

    Returns:
      [..., D], equal to `quantized` up to rounding. Where no rotation is defined, a zero vector or
      opposite directions, it falls back to `straight_through`.
    """
    chex.assert_equal_shape([latents, quantized])
    fixed, quantized = jax.lax.stop_gradient((latents, quantized))
    lengths, target_lengths = _norm(fixed), _norm(quantized)
    unit, target = _divide(fixed, lengths), _divide(quantized, target_lengths)
    middle = unit + target
    defined = (lengths > 0) & (target_lengths > 0) & (_norm(middle) > 1e-3)
    middle = _divide(middle, _norm(middle))
    rotated = latents - 2.0 * middle * _inner(middle, latents) + 2.0 * target * _inner(unit, latents)
    scaled = _divide(target_lengths, lengths) * rotated
    return jnp.where(defined, scaled, straight_through(latents, quantized))


def _inner(one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.sum(one * other, axis=-1, keepdims=True)


def _norm(vectors: jax.Array) -> jax.Array:
    return jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def _divide(values: jax.Array, lengths: jax.Array) -> jax.Array:
    """`values / lengths`, or `values` where the length is 0."""
    return values / jnp.where(lengths > 0, lengths, 1.0)
