"""The codebook alignment loss on NVIDIA's Hopper GPUs: 64 candidates meet a level's codewords in one pass.

With the scores `s` and `t` of both distributions, `sum_k (P - Q)(log P - log Q) = E_P[s - t] - E_Q[s - t]`,
because the probabilities of each add up to one. Both expectations are computed online, like attention, so
that no distribution is kept. Products are float32, as in `tarq_jax.kernels.encode_gpu`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu

from tarq_jax.blockwise import MASKED
from tarq_jax.distances import central
from tarq_jax.kernels import calling, hopper
from tarq_jax.kernels.hopper import COLUMNS, ROWS, TERMS, by_column, by_row, swizzled


def align(
    latents: jax.Array, outputs: jax.Array, codewords: jax.Array, personalized: jax.Array,
    chosen: jax.Array, attended: jax.Array, *, interpret: Any = None,
) -> jax.Array:
    """As `tarq_jax.kernels.align.align`; `interpret` as in `pallas.mosaic_gpu.kernel`."""
    requests, size, width = len(latents), latents.shape[1], hopper.width_for(latents.shape[-1])
    points, *of_latents = _side(latents, codewords[None], central(codewords)[None], chosen, width)
    targets, *of_outputs = _side(outputs, personalized, personalized[:, :, :1], attended, width)
    rows = points.shape[2]
    found = hopper.call(
        _kernel, points, targets, *of_latents, *of_outputs, programs=requests * (rows // ROWS),
        out_type=jax.ShapeDtypeStruct((requests, rows), jnp.float32), interpret=interpret,
        scratch_types=[gpu.SMEM((ROWS, width), jnp.float32, transforms=swizzled(width, jnp.float32)),
                       *[gpu.SMEM((TERMS, ROWS, width), jnp.bfloat16, transforms=swizzled(width))] * 2,
                       gpu.SMEM((ROWS,), jnp.float32), gpu.Barrier()])
    return found[:, :size].astype(latents.dtype)


def _side(points, words, centres, chosen, width):
    """Residuals [B, L, G, D], factors [B or 1, L, TERMS * D, K] and squared lengths [B or 1, L, K] of a side.

    All are relative to the level's centre [B or 1, L, 1, D], as in `tarq_jax.distances.centred`.
    """
    points, words, centres, chosen = (calling.padded(array.astype(jnp.float32), -1, width)
                                      for array in (points, words, centres, chosen))
    before = jnp.cumsum(jnp.pad(chosen[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0))), axis=2)
    residuals = calling.padded(points[:, None] - jnp.moveaxis(before, 2, 1) - centres, 2, ROWS)
    moved = calling.padded(words - centres, 2, COLUMNS)
    real = jnp.arange(moved.shape[2]) < words.shape[2]
    return residuals, hopper.across(2 * moved), jnp.where(real, jnp.sum(moved**2, axis=-1), hopper.NEVER)


def _kernel(
    cast, points_ref, targets_ref, words_ref, lengths_ref, personalized_ref, personal_lengths_ref, output_ref,
    rows_ref, left_ref, right_ref, total_ref, barrier,
):
    request, start = hopper.place(points_ref.shape[2])
    levels, _, width = points_ref.shape[1:]
    one_per_row, one_per_column = gpu.Layout.WGMMA.reduce(1), gpu.Layout.WGMMA.reduce(0)

    def filled(value):
        return cast(jnp.full((ROWS,), value, jnp.float32), one_per_row)

    def load(source_ref, level, terms_ref):
        gpu.copy_gmem_to_smem(source_ref.at[request, level, pl.ds(start, ROWS)], rows_ref, barrier)
        gpu.barrier_wait(barrier)
        points = cast(rows_ref[...], gpu.Layout.WGMMA)
        for term, part in enumerate(hopper.terms(points, in_kernel=True)):
            terms_ref[term] = part
        gpu.commit_smem()

    def scores_of(terms_ref, words, lengths):
        return hopper.inner_products(terms_ref, words) - by_column(cast(lengths[...], one_per_column))

    def expect(scores, gaps, carry):
        """Adds a block to a distribution's largest score, total and sum of gaps."""
        largest, total, expected = carry
        rising = jnp.maximum(largest, scores.max(axis=1))
        weights, fading = jnp.exp(scores - by_row(rising)), jnp.exp(largest - rising)
        return rising, fading * total + weights.sum(axis=1), fading * expected + (weights * gaps).sum(axis=1)

    def add(_, words, lengths, personalized, personal_lengths, carry):
        scores = scores_of(left_ref, words, lengths)
        targets = scores_of(right_ref, personalized, personal_lengths)
        (_, seen, _), _, start = carry
        # Any start changes both expectations alike; this one keeps gaps, and so their roundings, small.
        start = jnp.where(seen > 0, start, scores.max(axis=1) - targets.max(axis=1))
        gaps = scores - targets - by_row(start)
        return expect(scores, gaps, carry[0]), expect(targets, gaps, carry[1]), start

    divergence = filled(0.0)
    for level in range(levels):
        load(points_ref, level, left_ref)
        load(targets_ref, level, right_ref)
        factor = gpu.BlockSpec((TERMS * width, COLUMNS), lambda block: (0, block), transforms=swizzled(width))
        length = gpu.BlockSpec((COLUMNS,), lambda block: (block,))
        (_, total, expected), (_, other_total, other), _ = gpu.emit_pipeline(
            add, grid=(lengths_ref.shape[2] // COLUMNS,), max_concurrent_steps=2,
            in_specs=[factor, length, factor, length],
            init_carry=(*((filled(MASKED), filled(0.0), filled(0.0)),) * 2, filled(0.0)),
        )(words_ref.at[0, level], lengths_ref.at[0, level], personalized_ref.at[request, level],
          personal_lengths_ref.at[request, level])
        divergence += jnp.maximum(expected / total - other / other_total, 0.0)
    total_ref[...] = divergence
    gpu.commit_smem()
    gpu.copy_smem_to_gmem(total_ref, output_ref.at[request, pl.ds(start, ROWS)])
    gpu.wait_smem_to_gmem(0)
