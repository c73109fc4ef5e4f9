"""Attention sums on a TPU: one block of queries at a time, past which the history is streamed.

The softmax is computed online (Milakov and Gimelshein 2018; Dao et al. 2022, arXiv 2205.14135), so that
neither the logits [Q, N] nor the summands [N, E * E] are ever written to slow memory.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tarq_jax.blockwise import MASKED
from tarq_jax.kernels import attention_gpu, calling, hopper

Summed = Callable[[jax.Array, jax.Array], Sequence[jax.Array]]  # [n, E] twice -> arrays [n, any]


def refuse_attend(
    queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array
) -> str | None:
    """Why `attend` cannot take these arguments; None if it can."""
    del mask
    if jax.default_backend() == "gpu":
        return _refuse_any(queries, keys, values) or attention_gpu.refusal(queries, keys, values)
    return _refuse(queries, keys, values, [values.shape[-1]])


def refuse_expand(
    queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array
) -> str | None:
    """Why `expand` cannot take these arguments; None if it can."""
    del mask
    width = keys.shape[-1]
    return _refuse(queries, keys, values, [width, width, width * width],
                   formed=3 * calling.lanes(width * width) // 2)


def _refuse(queries, keys, values, widths, *, formed=0):
    """Why sums of these widths cannot be computed; None if they can. `formed` is what a position forms."""
    width = calling.lanes(queries.shape[-1])
    rows = calling.block_of(queries.shape[-2], calling.ROWS)
    columns = calling.block_of(keys.shape[-2], calling.POSITIONS)
    working = (2 * rows * (width + sum(map(calling.lanes, widths)))
               + columns * (4 * width + 3 * rows + formed))
    return _refuse_any(queries, keys, values) or calling.too_large(working=working)


def _refuse_any(queries, keys, values):
    """Why no kernel can take these arguments."""
    return calling.empty(queries=queries, keys=keys) or calling.not_real(queries, keys, values)


def attend(queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
    """`sum_n a_n v_n`: [B, ..., Q, E], keys and values [B, ..., N, E], mask [B, N] to [B, ..., Q, E]."""
    def on_tpu(queries, keys, values, mask):
        found, = _sums(lambda keys, values: (values,), (values.shape[-1],), queries, keys, values, mask)
        return found.astype(values.dtype)

    return hopper.where_possible(attention_gpu.attend, on_tpu, queries, keys, values, mask,
                                 refusal=attention_gpu.refusal(queries, keys, values))


def expand(
    queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums of values, keys and their products `v_n k_n^T`, [B, H, K, E] twice and [B, H, K, E * E]."""
    width = keys.shape[-1]
    found = _sums(_moments, (width, width, width * width), queries, keys, values, mask)
    means, mean_keys, products = (sums.astype(values.dtype) for sums in found)
    return means, mean_keys, products


def _moments(keys, values):
    """As in `tarq_jax.expansion`; products are formed by constant matrices, as reshaping lanes is slow."""
    width = keys.shape[-1]
    products = (calling.dot(values.astype(jnp.float32), calling.repeated(width)) *
                calling.dot(keys.astype(jnp.float32), calling.tiled(width)))
    return values, keys, products.astype(values.dtype)


def _sums(
    summed: Summed, widths: Sequence[int], queries: jax.Array, keys: jax.Array, values: jax.Array,
    mask: jax.Array,
) -> tuple[jax.Array, ...]:
    leading, (size, width), length = queries.shape[:-2], queries.shape[-2:], keys.shape[-2]
    each = math.prod(leading) // len(mask)  # heads and other axes that attend to the same history
    rows, columns = calling.block_of(size, calling.ROWS), calling.block_of(length, calling.POSITIONS)
    flat = calling.padded(queries.reshape(-1, size, width), 1, rows)
    history = [calling.padded(array.reshape(-1, length, width), 1, columns) for array in (keys, values)]
    seen = calling.padded(mask[:, None].astype(jnp.float32), 2, columns)
    grid = (len(flat), flat.shape[1] // rows, history[0].shape[1] // columns)
    by_query = [pl.BlockSpec((1, rows, of), lambda one, row, column: (one, row, 0))
                for of in (width, *widths)]
    by_position = pl.BlockSpec((1, columns, width), lambda one, row, column: (one, column, 0))
    found = calling.call(
        functools.partial(_kernel, summed, len(widths)), flat, *history, seen, grid=grid, sequential=1,
        in_specs=[by_query[0], by_position, by_position,
                  pl.BlockSpec((1, 1, columns), lambda one, _, column: (jax.lax.div(one, each), 0, column))],
        out_specs=by_query[1:],
        out_shape=[jax.ShapeDtypeStruct((*flat.shape[:2], of), jnp.float32) for of in widths],
        scratch_shapes=[pltpu.VMEM((rows, 1), jnp.float32)] * 2)
    return tuple(sums[:, :size].reshape(*leading, size, -1) for sums in found)


def _kernel(summed, count, query_ref, key_ref, value_ref, mask_ref, *refs):
    outputs, (largest_ref, total_ref) = refs[:count], refs[count:]

    @pl.when(pl.program_id(2) == 0)
    def _():
        largest_ref[...] = jnp.full(largest_ref.shape, MASKED, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
        for output in outputs:
            output[...] = jnp.zeros(output.shape, jnp.float32)

    queries, keys, values = query_ref[0], key_ref[0], value_ref[0]
    scale = jnp.sqrt(jnp.float32(queries.shape[-1])).astype(queries.dtype)
    mask = mask_ref[0] > 0
    logits = jnp.where(mask, calling.dot(queries / scale, keys, (1, 1)), MASKED)
    rising = jnp.maximum(largest_ref[...], jnp.max(logits, axis=1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(logits - rising), 0.0)
    fading = jnp.exp(largest_ref[...] - rising)
    largest_ref[...] = rising
    total_ref[...] = fading * total_ref[...] + jnp.sum(weights, axis=1, keepdims=True)
    for output, new in zip(outputs, summed(keys, values), strict=True):
        output[0] = fading * output[0] + calling.dot(weights.astype(new.dtype), new)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        total = total_ref[...]
        for output in outputs:
            output[0] = output[0] * jnp.where(total > 0, 1.0 / jnp.where(total > 0, total, 1.0), 0.0)
