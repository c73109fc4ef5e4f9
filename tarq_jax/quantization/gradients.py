"""Gradients through the choice of a codeword, which has none of its own."""

import chex
import jax


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
