"""Attention on NVIDIA's Hopper GPUs: 64 queries attend to the whole history at a time.

Both products run on the tensor cores, in bfloat16 with sums in float32. Keys and values are streamed through
shared memory; the next block is loaded while one is multiplied. The softmax is computed online, as on a TPU.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu

from tarq_jax.blockwise import MASKED
from tarq_jax.kernels import calling, hopper
from tarq_jax.kernels.hopper import COLUMNS, ROWS, WIDTHS, by_column, by_row, product, swizzled


def refusal(queries: jax.Array, keys: jax.Array, values: jax.Array) -> str | None:
    """Why `attend` cannot take these arguments; None if it can."""
    if any(array.dtype != jnp.bfloat16 for array in (queries, keys, values)):
        return f"queries are {queries.dtype}, expected bfloat16 on a GPU"
    if queries.shape[-1] not in WIDTHS:
        return f"heads are {queries.shape[-1]} wide, expected one of {WIDTHS} on a GPU"
    return None


def attend(
    queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array, *, interpret: Any = None
) -> jax.Array:
    """As `tarq_jax.kernels.attention.attend`; `interpret` as in `pallas.mosaic_gpu.kernel`."""
    leading, (size, width), length = queries.shape[:-2], queries.shape[-2:], keys.shape[-2]
    each = math.prod(leading) // len(mask)
    flat = calling.padded(queries.reshape(-1, size, width), 1, ROWS)
    keys, values = (calling.padded(array.reshape(-1, length, width), 1, COLUMNS) for array in (keys, values))
    seen = calling.padded(mask.astype(jnp.float32), 1, COLUMNS)
    found = hopper.call(
        functools.partial(_kernel, each), flat, jnp.swapaxes(keys, 1, 2), values, seen,
        out_type=jax.ShapeDtypeStruct(flat.shape, flat.dtype),
        programs=len(flat) * (flat.shape[1] // ROWS), interpret=interpret,
        scratch_types=[
            *(gpu.SMEM((ROWS, columns), jnp.bfloat16, transforms=swizzled(width))
              for columns in (width, COLUMNS)), gpu.Barrier()])
    return found[:, :size].reshape(*leading, size, width)


def _kernel(
    each, cast, query_ref, key_ref, value_ref, seen_ref, output_ref, rows_ref, weights_ref, barrier,
):
    one, start = hopper.place(query_ref.shape[1])
    width, length = value_ref.shape[2], value_ref.shape[1]
    gpu.copy_gmem_to_smem(query_ref.at[one, pl.ds(start, ROWS)], rows_ref, barrier)
    gpu.barrier_wait(barrier)

    def add(_, keys, values, seen_row, carry):
        sums, largest, total = carry
        logits = product(COLUMNS, (rows_ref, keys)) / math.sqrt(width)
        seen = by_column(cast(seen_row[...], gpu.Layout.WGMMA.reduce(0)))
        logits = jnp.where(seen > 0, logits, MASKED)
        rising = jnp.maximum(largest, logits.max(axis=1))
        weights = jnp.exp(logits - by_row(rising)) * seen
        fading = jnp.exp(largest - rising)
        weights_ref[...] = weights.astype(jnp.bfloat16)
        gpu.commit_smem()
        sums = sums * by_row(fading, width) + product(width, (weights_ref, values))
        return sums, rising, fading * total + weights.sum(axis=1)

    one_per_row = gpu.Layout.WGMMA.reduce(1)
    sums, _, total = gpu.emit_pipeline(
        add, grid=(length // COLUMNS,), max_concurrent_steps=2,
        in_specs=[gpu.BlockSpec((width, COLUMNS), lambda column: (0, column), transforms=swizzled(width)),
                  gpu.BlockSpec((COLUMNS, width), lambda column: (column, 0), transforms=swizzled(width)),
                  gpu.BlockSpec((COLUMNS,), lambda column: (column,))],
        init_carry=(cast(jnp.zeros((ROWS, width), jnp.float32), gpu.Layout.WGMMA),
                    cast(jnp.full((ROWS,), MASKED, jnp.float32), one_per_row),
                    cast(jnp.zeros((ROWS,), jnp.float32), one_per_row)),
    )(key_ref.at[one], value_ref.at[one], seen_ref.at[lax.div(one, each)])
    total = jnp.where(total > 0, 1.0 / jnp.where(total > 0, total, 1.0), 0.0)
    rows_ref[...] = (sums * by_row(total, width)).astype(jnp.bfloat16)
    gpu.commit_smem()
    gpu.copy_smem_to_gmem(rows_ref, output_ref.at[one, pl.ds(start, ROWS)])
    gpu.wait_smem_to_gmem(0)
