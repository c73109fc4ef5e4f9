"""Look-ups on a TPU as products with one-hot codes: the MXU reads tables in VMEM, and no row is gathered."""


import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from tarq_jax.kernels import calling


def refuse_look_up(personalized: jax.Array, codes: jax.Array) -> str | None:
    """Why `look_up` cannot take these arguments; None if it can."""
    *_, size, width = personalized.shape
    rows = calling.block_of(codes.shape[1], calling.ROWS)
    working = rows * (calling.lanes(size) + 3 * calling.lanes(width))  # one-hot codes, and results
    return (calling.empty(personalized=personalized, codes=codes) or calling.not_real(personalized)
            or calling.too_large(copies=3, working=working, personalized=jax.ShapeDtypeStruct(
                personalized.shape[1:], personalized.dtype)))


def look_up(personalized: jax.Array, codes: jax.Array) -> jax.Array:
    """Sums each candidate's entries over levels: [B, L, K, D] and int [B, G, L] to [B, G, D]."""
    requests, size, levels = codes.shape
    block = calling.block_of(size, calling.ROWS)
    codes = calling.padded(_within(codes, personalized.shape[2]), 1, block)
    width = personalized.shape[-1]
    found = calling.call(
        _look_up_kernel, personalized, codes, grid=(requests, codes.shape[1] // block),
        in_specs=[pl.BlockSpec((1, *personalized.shape[1:]), lambda request, row: (request, 0, 0, 0)),
                  pl.BlockSpec((1, block, levels), lambda request, row: (request, row, 0))],
        out_specs=pl.BlockSpec((1, block, width), lambda request, row: (request, row, 0)),
        out_shape=jax.ShapeDtypeStruct((requests, codes.shape[1], width), personalized.dtype))
    return found[:, :size]


def _within(codes: jax.Array, size: int) -> jax.Array:
    """Clips codes to the rows of the table, as a gather that clips does."""
    return jnp.clip(codes.astype(jnp.int32), 0, size - 1)


def _look_up_kernel(table_ref, codes_ref, output_ref):
    total = jnp.zeros(output_ref.shape[1:], jnp.float32)
    for level in range(table_ref.shape[1]):
        table = table_ref[0, level]
        codes = codes_ref[0, :, level:level + 1]
        total += calling.dot(calling.one_hot(codes, len(table), table.dtype), table)
    output_ref[0] = total.astype(output_ref.dtype)


def refuse_look_up_expansion(
    means: jax.Array, jacobians: jax.Array, codes: jax.Array, residuals: jax.Array
) -> str | None:
    """Why `look_up_expansion` cannot take these arguments; None if it can."""
    *_, size, width = means.shape
    rows = calling.block_of(codes.shape[1], calling.ROWS)
    # One-hot codes, which are used twice; results; chosen Jacobians, which are rows.
    working = rows * (2 * calling.lanes(size) + 3 * calling.lanes(width) + calling.lanes(width**2))
    return (calling.empty(jacobians=jacobians, codes=codes) or calling.not_real(means, jacobians, residuals)
            or calling.too_large(copies=2, working=working,
                                 means=jax.ShapeDtypeStruct((size, width), means.dtype),
                                 jacobians=jax.ShapeDtypeStruct((size, width**2), jacobians.dtype)))


def look_up_expansion(
    means: jax.Array, jacobians: jax.Array, codes: jax.Array, residuals: jax.Array
) -> jax.Array:
    """`m_c + J_c r`: [B, H, K, E], [B, H, K, E, E], int [B, G], [B, H, G, E] to [B, H, G, E]."""
    requests, heads, size, width = residuals.shape
    block = calling.block_of(size, calling.ROWS)
    jacobians = jacobians.reshape(*means.shape[:3], width * width)
    codes = calling.padded(_within(codes, means.shape[2])[..., None], 1, block)
    residuals = calling.padded(residuals, 2, block)

    def table(of):
        return pl.BlockSpec((1, 1, *of.shape[2:]), lambda request, head, row: (request, head, 0, 0))

    by_candidate = pl.BlockSpec((1, 1, block, width), lambda request, head, row: (request, head, row, 0))
    found = calling.call(
        _expansion_kernel, means, jacobians, codes, residuals,
        grid=(requests, heads, codes.shape[1] // block),
        in_specs=[table(means), table(jacobians),
                  pl.BlockSpec((1, block, 1), lambda request, head, row: (request, row, 0)), by_candidate],
        out_specs=by_candidate, out_shape=jax.ShapeDtypeStruct(residuals.shape, means.dtype))
    return found[:, :, :size]


def _expansion_kernel(means_ref, jacobians_ref, codes_ref, residuals_ref, output_ref):
    means, jacobians, residuals = means_ref[0, 0], jacobians_ref[0, 0], residuals_ref[0, 0]
    chosen = calling.one_hot(codes_ref[0], len(means), means.dtype)
    width = residuals.shape[1]
    # J_c r: repeat the residual for each row of J, multiply entry by entry, and sum the columns of each row.
    beside = calling.dot(residuals.astype(jnp.float32), calling.tiled(width))
    products = calling.dot(chosen, jacobians) * beside
    change = calling.dot(products, calling.repeated(width), (1, 1))
    output_ref[0, 0] = (calling.dot(chosen, means) + change).astype(output_ref.dtype)
