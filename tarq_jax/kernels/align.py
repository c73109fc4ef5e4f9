"""The codebook alignment loss on a TPU: both distributions over codewords stay in VMEM."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from tarq_jax.distances import central
from tarq_jax.kernels import align_gpu, calling, hopper

ROWS = 128  # candidates per block; VMEM holds two distributions of each, with their exponentials


def refuse_align(
    latents: jax.Array, outputs: jax.Array, codewords: jax.Array, personalized: jax.Array,
    chosen: jax.Array, attended: jax.Array,
) -> str | None:
    """Why `align` cannot take these arguments; None if it can."""
    del outputs, chosen, attended
    refusal = (calling.empty(latents=latents, personalized=personalized)
               or calling.not_real(latents, codewords, personalized))
    if refusal:
        return refusal
    if jax.default_backend() == "gpu":
        return hopper.refuse_wide(latents=latents)
    levels, most, width = codewords.shape
    rows = calling.block_of(latents.shape[1], ROWS)
    working = rows * ((10 + 4 * levels) * calling.lanes(width) + 5 * calling.lanes(most))
    return calling.too_large(copies=2, working=working, codewords=codewords,
                             personalized=jax.ShapeDtypeStruct(codewords.shape, personalized.dtype))


def align(
    latents: jax.Array, outputs: jax.Array, codewords: jax.Array, personalized: jax.Array,
    chosen: jax.Array, attended: jax.Array,
) -> jax.Array:
    """As `tarq_jax.losses.codebook_alignment`, with the same shapes: [B, G]."""
    return hopper.where_possible(
        align_gpu.align, _on_tpu, latents, outputs, codewords, personalized, chosen, attended,
        refusal=hopper.refuse_wide(latents=latents))


def _on_tpu(latents, outputs, codewords, personalized, chosen, attended):
    requests, size, width = latents.shape
    levels = len(codewords)
    block = calling.block_of(size, ROWS)
    latents, outputs = (calling.padded(array, 1, block) for array in (latents, outputs))
    chosen, attended = (calling.padded(jnp.swapaxes(array, 1, 2), 2, block) for array in (chosen, attended))
    by_candidate = pl.BlockSpec((1, block, width), lambda request, row: (request, row, 0))
    by_level = pl.BlockSpec((1, levels, block, width), lambda request, row: (request, 0, row, 0))
    found = calling.call(
        _kernel, latents, outputs, codewords, personalized, chosen, attended,
        grid=(requests, latents.shape[1] // block),
        in_specs=[by_candidate, by_candidate,
                  pl.BlockSpec(codewords.shape, lambda request, row: (0, 0, 0)),
                  pl.BlockSpec((1, *codewords.shape), lambda request, row: (request, 0, 0, 0)),
                  by_level, by_level],
        out_specs=pl.BlockSpec((1, block, 1), lambda request, row: (request, row, 0)),
        out_shape=jax.ShapeDtypeStruct((*latents.shape[:2], 1), jnp.float32))
    return found[:, :size, 0].astype(latents.dtype)


def _kernel(latents_ref, outputs_ref, codewords_ref, personalized_ref, chosen_ref, attended_ref, total_ref):
    latent, output = latents_ref[0].astype(jnp.float32), outputs_ref[0].astype(jnp.float32)
    total = jnp.zeros(total_ref.shape[1:], jnp.float32)
    for level in range(codewords_ref.shape[0]):
        words = codewords_ref[level].astype(jnp.float32)
        attended = personalized_ref[0, level].astype(jnp.float32)
        log_p = _log_softmax(latent, words, central(words))
        log_q = _log_softmax(output, attended, attended[:1])
        total += jnp.sum((jnp.exp(log_p) - jnp.exp(log_q)) * (log_p - log_q), axis=1, keepdims=True)
        latent -= chosen_ref[0, level].astype(jnp.float32)
        output -= attended_ref[0, level].astype(jnp.float32)
    total_ref[0] = total


def _log_softmax(points, words, centre):
    """`log softmax_k(-|x - c_k|^2)`: [M, D] and [K, D] to [M, K]; see `tarq_jax.distances.centred`."""
    points, words = points - centre, words - centre
    norms = calling.dot(jnp.ones((1, words.shape[1]), jnp.float32), words**2, (1, 1))
    scores = 2.0 * calling.dot(points, words, (1, 1)) - norms
    scores -= jnp.max(scores, axis=1, keepdims=True)
    return scores - jnp.log(jnp.sum(jnp.exp(scores), axis=1, keepdims=True))
