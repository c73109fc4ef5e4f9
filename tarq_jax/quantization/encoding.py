"""Residual quantization of latents: distances, greedy encoding, decoding."""

import chex
import jax
import jax.numpy as jnp

from tarq_jax.types import QuantizerOutput


def negative_distances(points: jax.Array, codewords: jax.Array) -> jax.Array:
    """`-|x - c|^2` up to a constant of each point: `2<x, c> - |c|^2`.

    The dropped `-|x|^2` changes neither an argmax nor a softmax over the codewords, and without
    it no `[..., K, D]` difference is ever formed.

    Args:
      points: [..., M, D].
      codewords: [..., K, D], with the same leading axes as `points` or none.

    Returns:
      [..., M, K], larger is nearer.
    """
    chex.assert_equal_shape_suffix([points, codewords], 1)
    inner = points @ jnp.swapaxes(codewords, -1, -2)
    return 2.0 * inner - jnp.sum(codewords**2, axis=-1)[..., None, :]


def encode(codewords: jax.Array, latents: jax.Array) -> QuantizerOutput:
    """Greedy residual quantization.

    Args:
      codewords: [L, K, D].
      latents: [..., D].

    Returns:
      Codes [..., L], quantized latents [..., D], residuals and chosen codewords [..., L, D]; all
      but the codes are differentiable.

    Example:
      >>> codewords = jnp.array([[[0.0], [4.0]], [[-1.0], [1.0]]])
      >>> output = encode(codewords, jnp.array([[3.2]]))
      >>> output.codes.tolist(), output.quantized.tolist()
      ([[1, 0]], [[3.0]])
    """
    chex.assert_rank(codewords, 3)
    chex.assert_equal_shape_suffix([codewords, latents], 1)
    residual, codes, residuals, chosen = latents, [], [], []
    for level in jnp.asarray(codewords):
        flat = residual.reshape(-1, residual.shape[-1])
        code = jnp.argmax(negative_distances(flat, level), axis=-1).reshape(residual.shape[:-1])
        residuals.append(residual)
        codes.append(code.astype(jnp.int32))
        chosen.append(level[code])
        residual = residual - chosen[-1]
    return QuantizerOutput(
        codes=jnp.stack(codes, axis=-1),
        quantized=sum(chosen),
        residuals=jnp.stack(residuals, axis=-2),
        chosen=jnp.stack(chosen, axis=-2),
    )


def decode(codewords: jax.Array, codes: jax.Array) -> jax.Array:
    """Sums the codewords that `codes` name: [L, K, D] and int [..., L] to [..., D].

    Example:
      >>> decode(jnp.array([[[0.0], [4.0]], [[-1.0], [1.0]]]), jnp.array([1, 0])).tolist()
      [3.0]
    """
    chex.assert_rank(codewords, 3)
    chex.assert_axis_dimension(codes, -1, codewords.shape[0])
    return sum(level[codes[..., index]] for index, level in enumerate(jnp.asarray(codewords)))
