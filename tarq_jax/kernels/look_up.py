"""Look-ups on a TPU as products with one-hot codes: the MXU reads tables in VMEM, and no row is gathered."""


import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from tarq_jax.kernels import calling


def refuse_look_up(personalized: jax.Array, codes: jax.Array) -> str | None:
    """Why `look_up` cannot take these arguments; None if it can."""
    return (calling.empty(personalized=personalized, codes=codes) or calling.not_real(personalized)
            or calling.too_large(copies=3, working=_working(codes, *personalized.shape[-2:]),
                                 personalized=calling.part(personalized, 1)))


def _working(codes: jax.Array, size: int, width: int) -> int:
    """Numbers of one-hot codes for a table [size, width], and of results."""
    return calling.block_of(codes.shape[1], calling.ROWS) * (calling.lanes(size) + 3 * calling.lanes(width))


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
    return (calling.empty(jacobians=jacobians, codes=codes) or calling.not_real(means, jacobians, residuals)
            or calling.too_large(copies=2, working=_expansion_working(codes, *means.shape[-2:]),
                                 means=calling.part(means, 2), jacobians=_as_rows(jacobians)))


def _expansion_working(codes: jax.Array, size: int, width: int) -> int:
    """As `_working`; codes are used twice, and Jacobians [E, E] are rows."""
    return _working(codes, size, width) + calling.block_of(codes.shape[1], calling.ROWS) * (
        calling.lanes(size) + calling.lanes(width**2))


def _as_rows(jacobians):
    *_, size, width, _ = jacobians.shape
    return calling.part(jacobians, 0, size, width**2)


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
