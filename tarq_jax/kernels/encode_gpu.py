"""Residual encoding on NVIDIA's Hopper GPUs: 64 latents go through all levels without leaving the chip.

Products run on the tensor cores in bfloat16. Three terms of bfloat16 hold a float32, and six products of such
terms hold a product of two, so that codes are those of float32 arithmetic. Codewords are streamed through
shared memory; the nearest of each block competes with the nearest so far, and brings its vector along.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu

from tarq_jax.distances import central
from tarq_jax.kernels import calling, hopper
from tarq_jax.kernels.hopper import COLUMNS, ROWS, TERMS, by_column, by_row, product, swizzled


def encode(levels: Sequence[jax.Array], latents: jax.Array, *, interpret: Any = None) -> jax.Array:
    """As `tarq_jax.kernels.encode.encode`; `interpret` as in `pallas.mosaic_gpu.kernel`."""
    size, width = len(latents), hopper.width_for(latents.shape[-1])
    length = -(-max(map(len, levels)) // COLUMNS) * COLUMNS
    # Relative to the level's centre, as in `tarq_jax.distances.centred`: a codeword that is subtracted brings
    # along the centre of the next level.
    wide = [_widened(level, width) for level in levels]
    centres = jnp.stack([central(level) for level in wide])  # [L, 1, D]
    moved = jnp.stack([calling.padded(level - centre, 0, length)
                       for level, centre in zip(wide, centres, strict=True)])
    subtracted = moved + jnp.pad(centres[1:], ((0, 1), (0, 0), (0, 0)))
    real = jnp.stack([jnp.arange(length) < len(level) for level in levels])
    offsets = jnp.where(real, 0.5 * jnp.sum(moved**2, axis=-1), hopper.NEVER)
    words = jnp.stack([term.reshape(len(levels), -1, COLUMNS, width) for term in hopper.terms(subtracted)],
                      axis=2)  # the terms of each block of codewords
    points = calling.padded(_widened(latents, width) - centres[0], 0, ROWS)
    found = hopper.call(
        functools.partial(_kernel, [len(level) for level in levels]),
        points, hopper.across(moved), words.reshape(len(levels), -1, width), offsets,
        out_type=jax.ShapeDtypeStruct((len(levels), len(points)), jnp.int32),
        programs=len(points) // ROWS, interpret=interpret,
        scratch_types=[gpu.SMEM((ROWS, width), jnp.float32, transforms=swizzled(width, jnp.float32)),
                       gpu.SMEM((TERMS, ROWS, width), jnp.bfloat16, transforms=swizzled(width)),
                       gpu.SMEM((ROWS, COLUMNS), jnp.bfloat16, transforms=swizzled(width)),
                       gpu.SMEM((ROWS,), jnp.int32), gpu.Barrier()])
    return found[:, :size].T


def _widened(rows: jax.Array, width: int) -> jax.Array:
    """Rows in float32, padded with zeros, which change no distance."""
    return calling.padded(rows.astype(jnp.float32), 1, width)


def _kernel(
    sizes, cast, latent_ref, across_ref, words_ref, offset_ref, output_ref, rows_ref, points_ref, chosen_ref,
    codes_ref, barrier,
):
    _, start = hopper.place(latent_ref.shape[0])
    width, length = words_ref.shape[2], offset_ref.shape[1]
    one_per_row, one_per_column = gpu.Layout.WGMMA.reduce(1), gpu.Layout.WGMMA.reduce(0)
    gpu.copy_gmem_to_smem(latent_ref.at[pl.ds(start, ROWS)], rows_ref, barrier)
    gpu.barrier_wait(barrier)
    residual = cast(rows_ref[...], gpu.Layout.WGMMA)

    def nearest(size, index, across, words, offset_row, carry):
        best, code, vector = carry
        scores = hopper.inner_products(points_ref, across) - by_column(cast(offset_row[...], one_per_column))
        here = scores.max(axis=1)
        places = cast(lax.broadcasted_iota(jnp.int32, scores.shape, 1), gpu.Layout.WGMMA)
        place = jnp.where(scores >= by_row(here), places, COLUMNS - 1).min(axis=1)
        chosen_ref[...] = jnp.where(places == by_row(place), 1.0, 0.0).astype(jnp.bfloat16)
        gpu.commit_smem()
        found = product(width, *((chosen_ref, words.at[pl.ds(term * COLUMNS, COLUMNS)])
                                 for term in range(TERMS)))
        nearer, valid = here > best, here > -jnp.inf
        code = jnp.where(nearer, index[0] * COLUMNS + place, code)
        # Where a score is NaN, the code is the last one, for good, as by XLA.
        return (jnp.where(valid, jnp.maximum(best, here), jnp.inf), jnp.where(valid, code, size - 1),
                jnp.where(by_row(nearer, width), found, vector))

    for level, size in enumerate(sizes):
        for term, part in enumerate(hopper.terms(residual, in_kernel=True)):
            points_ref[term] = part
        gpu.commit_smem()
        _, code, vector = gpu.emit_pipeline(
            functools.partial(nearest, size), grid=(length // COLUMNS,), max_concurrent_steps=2,
            in_specs=[
                gpu.BlockSpec((TERMS * width, COLUMNS), lambda block: (0, block), transforms=swizzled(width)),
                gpu.BlockSpec((TERMS * COLUMNS, width), lambda block: (block, 0), transforms=swizzled(width)),
                gpu.BlockSpec((COLUMNS,), lambda block: (block,))],
            init_carry=(cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), one_per_row),
                        cast(jnp.zeros((ROWS,), jnp.int32), one_per_row),
                        cast(jnp.zeros((ROWS, width), jnp.float32), gpu.Layout.WGMMA)),
        )(across_ref.at[level], words_ref.at[level], offset_ref.at[level])
        residual -= vector
        codes_ref[...] = code
        gpu.commit_smem()
        gpu.copy_smem_to_gmem(codes_ref, output_ref.at[level, pl.ds(start, ROWS)])
        gpu.wait_smem_to_gmem(0)
