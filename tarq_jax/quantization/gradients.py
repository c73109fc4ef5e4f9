"""Gradients through the choice of a codeword, which itself has no gradient."""

import chex
import jax
import jax.numpy as jnp


def straight_through(latents: jax.Array, quantized: jax.Array) -> jax.Array:
    """The quantized value with the gradient of the latent: `sg(z_q) + z - sg(z)` (van den Oord et al. 2017).

    Args:
      latents: [..., D], `z`.
      quantized: [..., D], `z_q`.

    Returns:
      [..., D], equal to `quantized` to the bit.

    Example:
      >>> jax.vjp(straight_through, jnp.array([3.0, 4.0]), jnp.array([0.0, 2.0]))[0].tolist()
      [0.0, 2.0]
    """
    chex.assert_equal_shape([latents, quantized])
    return jax.lax.stop_gradient(quantized) + (latents - jax.lax.stop_gradient(latents))


def rotate(latents: jax.Array, quantized: jax.Array) -> jax.Array:
    """The quantized value with the gradient of the rotation and rescaling that map the latent to it.

    `z_q = s R z` with `s = |z_q| / |z|` and `R` the rotation, in the plane of both vectors, that maps the
    direction of `z` to that of `z_q`: `R = I - 2 r r^T + 2 q e^T`, with e and q the unit vectors of `z` and
    `z_q`, and `r` that of `e + q` (rotation trick, Fifty et al. 2024, arXiv 2410.06424). `s` and `R` are
    held constant. The angle between gradient and vector is the same at the latent as at the codeword;
    `straight_through` instead copies the gradient unchanged.

    Args:
      latents: [..., D], `z`.
      quantized: [..., D], `z_q`.

    Returns:
      [..., D], equal to `quantized` to the bit. If no rotation is defined (for a zero vector or opposite
      directions), the gradient is that of `straight_through`.

    Example:
      >>> _, to_latent = jax.vjp(lambda z: rotate(z, jnp.array([0.0, 2.0])), jnp.array([1.0, 0.0]))
      >>> to_latent(jnp.array([0.0, 1.0]))[0].round(3).tolist()  # from codeword to latent, doubled
      [2.0, 0.0]
    """
    chex.assert_equal_shape([latents, quantized])
    fixed, target = jax.lax.stop_gradient((latents, quantized))
    length, target_length = _norm(fixed), _norm(target)
    unit, target = _divide(fixed, length), _divide(target, target_length)
    middle = unit + target
    defined = (length > 0) & (target_length > 0) & (_norm(middle) > 1e-3)
    middle = _divide(middle, _norm(middle))
    rotated = latents - 2.0 * middle * _inner(middle, latents) + 2.0 * target * _inner(unit, latents)
    return straight_through(jnp.where(defined, _divide(target_length, length) * rotated, latents), quantized)


def _inner(one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.sum(one * other, axis=-1, keepdims=True)


def _norm(vectors: jax.Array) -> jax.Array:
    return jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def _divide(values: jax.Array, lengths: jax.Array) -> jax.Array:
    """`values / lengths`, or `values` where the length is 0."""
    return values / jnp.where(lengths > 0, lengths, 1.0)
