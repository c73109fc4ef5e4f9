"""Attention on NVIDIA's Hopper GPUs (Mosaic GPU): a warpgroup attends with 64 queries to the whole history.

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
from tarq_jax.kernels import calling

ROWS, COLUMNS = 64, 64  # queries and positions per block
WIDTHS = (16, 32, 64)  # E: 32, 64 or 128 bytes per row, the widths of swizzled shared memory


def refusal(queries: jax.Array, keys: jax.Array, values: jax.Array) -> str | None:
    """Why `attend` cannot take these arguments; None if it can."""
    if any(array.dtype != jnp.bfloat16 for array in (queries, keys, values)):
        return f"queries are {queries.dtype}, expected bfloat16 on a GPU"
    if queries.shape[-1] not in WIDTHS:
        return f"heads are {queries.shape[-1]} wide, expected one of {WIDTHS} on a GPU"
    return None


def refuse_device() -> str | None:
    """Why `attend` cannot run on the GPU of this machine; None if it can.

    This is separate from `refusal`, because code may be lowered for another GPU than this machine's.
    """
    capability = getattr(jax.local_devices()[0], "compute_capability", None)
    if str(capability).split(".")[0] == "9":
        return None
    return f"this GPU is of compute capability {capability}, expected 9.x: wgmma is on Hopper alone"


def attend(
    queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array, *, interpret: Any = None
) -> jax.Array:
    """As `tarq_jax.kernels.attention.attend`; `interpret` as in `pallas.mosaic_gpu.kernel`."""
    leading, (size, width), length = queries.shape[:-2], queries.shape[-2:], keys.shape[-2]
    each = math.prod(leading) // len(mask)
    flat = calling.padded(queries.reshape(-1, size, width), 1, ROWS)
    keys, values = (calling.padded(array.reshape(-1, length, width), 1, COLUMNS) for array in (keys, values))
    seen = calling.padded(mask.astype(jnp.float32), 1, COLUMNS)
    # The interpreter has no layouts.
    laid_out = gpu.layout_cast if interpret is None else lambda array, layout: array
    found = gpu.kernel(
        functools.partial(_kernel, each, laid_out), out_type=jax.ShapeDtypeStruct(flat.shape, flat.dtype),
        grid=(len(flat), flat.shape[1] // ROWS), grid_names=("one", "row"),
        scratch_types=[
            *(gpu.SMEM((ROWS, columns), jnp.bfloat16, transforms=_swizzled(width))
              for columns in (width, COLUMNS)), gpu.Barrier()],
        **({} if interpret is None else {"interpret": interpret}),
    )(flat, jnp.swapaxes(keys, 1, 2), values, seen)
    return found[:, :size].reshape(*leading, size, width)


def _swizzled(width):
    """The layout of every matrix in shared memory: the tensor cores require the same for both factors."""
    return gpu.TilingTransform((8, width)), gpu.SwizzleTransform(2 * width)


def _kernel(
    each, laid_out, query_ref, key_ref, value_ref, seen_ref, output_ref, rows_ref, weights_ref,
    barrier,
):
    one, start = lax.axis_index("one"), lax.axis_index("row") * ROWS
    width, length = value_ref.shape[2], value_ref.shape[1]
    rows = gpu.Layout.WGMMA.reduce(1)
    gpu.copy_gmem_to_smem(query_ref.at[one, pl.ds(start, ROWS)], rows_ref, barrier)
    gpu.barrier_wait(barrier)

    def product(left, right, columns):
        def multiply(sums_ref):
            gpu.wgmma(sums_ref, left, right)
            return sums_ref[...]

        return pl.run_scoped(multiply, gpu.ACC((ROWS, columns), jnp.float32))

    def add(_, keys, values, seen_row, carry):
        sums, largest, total = carry
        logits = product(rows_ref, keys, COLUMNS) / math.sqrt(width)
        seen = laid_out(seen_row[...], gpu.Layout.WGMMA.reduce(0))
        seen = lax.broadcast_in_dim(seen, logits.shape, [1])
        logits = jnp.where(seen > 0, logits, MASKED)
        rising = jnp.maximum(largest, logits.max(axis=1))
        weights = jnp.exp(logits - lax.broadcast_in_dim(rising, logits.shape, [0])) * seen
        fading = jnp.exp(largest - rising)
        weights_ref[...] = weights.astype(jnp.bfloat16)
        gpu.commit_smem()
        sums = sums * lax.broadcast_in_dim(fading, sums.shape, [0]) + product(weights_ref, values, width)
        return sums, rising, fading * total + weights.sum(axis=1)

    sums, _, total = gpu.emit_pipeline(
        add, grid=(length // COLUMNS,), max_concurrent_steps=2,
        in_specs=[gpu.BlockSpec((width, COLUMNS), lambda column: (0, column), transforms=_swizzled(width)),
                  gpu.BlockSpec((COLUMNS, width), lambda column: (column, 0), transforms=_swizzled(width)),
                  gpu.BlockSpec((COLUMNS,), lambda column: (column,))],
        init_carry=(laid_out(jnp.zeros((ROWS, width), jnp.float32), gpu.Layout.WGMMA),
                    laid_out(jnp.full((ROWS,), MASKED, jnp.float32), rows),
                    laid_out(jnp.zeros((ROWS,), jnp.float32), rows)),
    )(key_ref.at[one], value_ref.at[one], seen_ref.at[lax.div(one, each)])
    total = jnp.where(total > 0, 1.0 / jnp.where(total > 0, total, 1.0), 0.0)
    rows_ref[...] = (sums * lax.broadcast_in_dim(total, sums.shape, [0])).astype(jnp.bfloat16)
    gpu.commit_smem()
    gpu.copy_smem_to_gmem(rows_ref, output_ref.at[one, pl.ds(start, ROWS)])
    gpu.wait_smem_to_gmem(0)
