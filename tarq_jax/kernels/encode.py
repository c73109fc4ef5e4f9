"""Residual encoding on a TPU: a block of latents goes through all levels without leaving VMEM."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from tarq_jax.distances import central
from tarq_jax.kernels import calling, encode_gpu, hopper


def refuse_encode(levels: Sequence[jax.Array], latents: jax.Array) -> str | None:
    """Why `encode` cannot take these arguments; None if it can."""
    if latents.size == 0:
        return f"latents are of shape {latents.shape}, expected some"
    if refusal := calling.not_real(latents, *levels):
        return refusal
    if jax.default_backend() == "gpu":
        return hopper.refuse_wide(latents=latents)
    width, most = calling.lanes(latents.shape[-1]), max(map(len, levels))
    rows = calling.block_of(math.prod(latents.shape[:-1]), calling.ROWS)
    working = 2 * most * width + rows * (4 * width + 2 * calling.lanes(most))
    return calling.too_large(working=working, codewords=list(levels))


def encode(levels: Sequence[jax.Array], latents: jax.Array) -> jax.Array:
    """Greedy residual codes by Euclidean distance: L arrays [K_l, D] and [M, D] to int32 [M, L].

    Distances [M, K] and residuals stay on the chip; the codewords to subtract are looked up by a product with
    one-hot codes. Among equally near codewords the first one wins.
    """
    return hopper.where_possible(encode_gpu.encode, _on_tpu, levels, latents,
                                 refusal=hopper.refuse_wide(latents=latents))


def _on_tpu(levels, latents):
    size, width = latents.shape
    block = calling.block_of(size, calling.ROWS)
    found = calling.call(
        functools.partial(_kernel, len(levels)), calling.padded(latents, 0, block), *levels,
        grid=(-(-size // block),),
        in_specs=[pl.BlockSpec((block, width), lambda index: (index, 0)),
                  *(pl.BlockSpec(level.shape, lambda index: (0, 0)) for level in levels)],
        out_specs=pl.BlockSpec((block, len(levels)), lambda index: (index, 0)),
        out_shape=jax.ShapeDtypeStruct((-(-size // block) * block, len(levels)), jnp.int32))
    return found[:size]


def _kernel(num_levels, latents_ref, *refs):
    levels, codes_ref = refs[:num_levels], refs[num_levels]
    residual = latents_ref[...].astype(jnp.float32)
    for index, level in enumerate(levels):
        words = level[...].astype(jnp.float32)
        centre = central(words)  # as in `tarq_jax.distances.centred`
        moved = words - centre
        offsets = calling.dot(jnp.ones((1, words.shape[1]), jnp.float32), 0.5 * moved**2, (1, 1))
        scores = calling.dot(residual - centre, moved, (1, 1)) - offsets
        best = jnp.max(scores, axis=1, keepdims=True)
        places = calling.positions(scores.shape, 1).astype(jnp.float32)
        first = jnp.min(jnp.where(scores >= best, places, len(words) - 1), axis=1, keepdims=True)
        code = first.astype(jnp.int32)
        codes_ref[:, index:index + 1] = code
        residual -= calling.dot(calling.one_hot(code, len(words)), words)
