"""Order-1 personalised codebooks: attention around a codeword, to first order in the query (ours).

The attention output is a smooth function of its query. Expanded around a codeword c,
`o(q) ~ m_c + J_c (q - c)`, with `a = softmax(<c, k_n> / sqrt(E))` over the history,

    m_c = sum_n a_n v_n,    J_c = (sum_n a_n v_n k_n^T - m_c mk_c^T) / sqrt(E),    mk_c = sum_n a_n k_n

head by head. A candidate costs one matrix-vector product with [E, E] per head, however long the
history is. If its query is a codeword, the result is exact. The residual `q - c` is itself quantized, by the
levels of the codebook after the first, so that an item is still L codes.

Shapes that do not fit raise chex's AssertionError; the expansion over an empty history is zero.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tarq_jax import checks
from tarq_jax.attention import attention_sums
from tarq_jax.kernels import Implementation, pick, with_derivative_of
from tarq_jax.types import Expansion


def expand(
    queries: jax.Array, keys: jax.Array, values: jax.Array, mask: chex.Array, *, block: int | None = None,
    implementation: Implementation = None,
) -> Expansion:
    """Expands attention around every codeword; once per request, for any number of candidates.

    Args:
      queries: [H, K, E], projected codewords, the same for all requests.
      keys: [B, H, N, E].
      values: [B, H, N, E].
      mask: [B, N] bool.
      block: maximal number of codewords and of positions processed together, see `attention_sums`.
      implementation: see `tarq_jax.kernels`.

    Returns:
      Expansion with means [B, H, K, E] and jacobians [B, H, K, E, E].

    Raises:
      NotImplementedError: `implementation` is "pallas", and no kernel supports these arguments.
      ValueError: `block` is no whole number or negative, or `implementation` is unknown.

    Example:
      >>> keys = values = jnp.array([[[[0.0], [2.0]]]])
      >>> expansion = expand(jnp.zeros((1, 1, 1)), keys, values, jnp.ones((1, 2), bool))
      >>> float(expansion.means.squeeze()), float(expansion.jacobians.squeeze())  # mean, variance of 0 and 2
      (1.0, 1.0)
    """
    chex.assert_rank([queries, keys], [3, 4])
    chex.assert_equal_shape([keys, values])
    requests, heads, positions, width = keys.shape
    chex.assert_shape(queries, (heads, None, width))
    chex.assert_shape(mask, (requests, positions))
    queries = jnp.broadcast_to(queries, (requests, *queries.shape))

    def plain(queries, keys, values, mask):
        return attention_sums(queries, keys, values, mask[:, None, None], block=block, summed=_moments)

    middle = _middle(values, mask)
    keys, values = keys - _middle(keys, mask), values - middle
    kernel = pick("expand", implementation, queries, keys, values, mask)
    sums = with_derivative_of(plain, kernel) if kernel else plain
    means, mean_keys, second = sums(queries, keys, values, mask)
    covariance = second.reshape(*means.shape, width) - means[..., :, None] * mean_keys[..., None, :]
    return Expansion(means=means + middle, jacobians=covariance / jnp.sqrt(width))


def _middle(vectors: jax.Array, mask: chex.Array) -> jax.Array:
    """Mean of each request's real positions, head by head: [B, H, N, E] to [B, H, 1, E]; 0 if there are none.

    Less it, the difference of two sums in the Jacobian cancels nothing that keys or values have in common.
    The expansion does not depend on what is subtracted, so that derivatives take it as a constant.
    """
    where = mask[:, None, :, None]
    total = jnp.sum(vectors, axis=-2, keepdims=True, where=where)
    count = jnp.maximum(jnp.sum(where, axis=-2, keepdims=True), 1)
    return jax.lax.stop_gradient(total / count).astype(vectors.dtype)


def _moments(keys: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Values, keys and their products `v_n k_n^T`, [..., N, E] twice and [..., N, E * E]."""
    products = values[..., :, None] * keys[..., None, :]
    return values, keys, products.reshape(*keys.shape[:-1], values.shape[-1] * keys.shape[-1])


def look_up_expansion(
    expansion: Expansion, codes: jax.Array, residuals: jax.Array, *, implementation: Implementation = None
) -> jax.Array:
    """`m_c + J_c (q - c)` for every candidate.

    One gather per column of the Jacobians, which XLA fuses with product and sum, so that the candidates' own
    Jacobians [G, E, E] are never materialised.

    Args:
      expansion: from `expand`.
      codes: [B, G] int, codes of the first level; larger codes than K - 1 are clipped to it.
      residuals: [B, H, G, E], `q - c`, quantized or exact.
      implementation: see `tarq_jax.kernels`.

    Returns:
      [B, H, G, E], attention output head by head.

    Raises:
      NotImplementedError: `implementation` is "pallas", and no kernel supports these arguments.
      ValueError: `implementation` is unknown.
    """
    requests, heads, _, width = expansion.means.shape
    chex.assert_shape(codes, (requests, None))
    chex.assert_shape(residuals, (requests, heads, codes.shape[1], width))
    arguments = expansion.means, expansion.jacobians, codes, residuals
    kernel = pick("look_up_expansion", implementation, *arguments)
    return with_derivative_of(_gathered, kernel or _by_columns)(*arguments)


def _gathered(means, jacobians, codes, residuals):
    """Gathers the Jacobian of each candidate: slower than `_by_columns`, but with a faster gradient."""
    codes = codes[:, None, :, None]
    take = functools.partial(jnp.take_along_axis, axis=2, mode="clip")
    own = take(jacobians, codes[..., None])
    return take(means, codes) + jnp.einsum("bhgef,bhgf->bhge", own, residuals)


def _by_columns(means, jacobians, codes, residuals):
    take = jax.vmap(functools.partial(jnp.take, axis=1, mode="clip"))  # over requests, from [H, K, E]
    columns = (take(jacobians[..., f], codes) * residuals[..., f, None] for f in range(residuals.shape[-1]))
    return functools.reduce(jnp.add, columns, take(means, codes))


class Blocks(NamedTuple):
    """Items grouped by first code into blocks of S with the same code; each group's last block is padded."""

    items: np.ndarray  # [P, S] int32, index of the item; 0 on padding
    codes: np.ndarray  # [P] int32, the code that the items of a block share
    positions: np.ndarray  # [M] int32, position of each item in the flattened blocks


def group_by_code(codes: chex.Array, *, block: int = 32) -> Blocks:
    """Groups the items of an index as `look_up_blocks` reads them; computed once, on the host.

    Args:
      codes: [M] int, codes of the first level.
      block: S, number of items per block.

    Raises:
      ValueError: `block` is below 1.

    Example:
      >>> blocks = group_by_code(np.array([1, 0, 1, 1]), block=2)
      >>> blocks.items.tolist(), blocks.codes.tolist(), blocks.positions.tolist()
      ([[1, 0], [0, 2], [3, 0]], [0, 1, 1], [2, 0, 3, 4])
    """
    codes = np.asarray(codes)
    chex.assert_rank(codes, 1)
    checks.positive_int("block", block)
    order = np.argsort(codes, kind="stable")
    present, starts, counts = np.unique(codes[order], return_index=True, return_counts=True)
    blocks_of = -(-counts // block)
    first_block = np.cumsum(blocks_of) - blocks_of
    rank = np.arange(len(codes)) - np.repeat(starts, counts)
    slots = np.repeat(first_block, counts) * block + rank
    items = np.zeros(int(blocks_of.sum()) * block, np.int32)
    items[slots] = order
    positions = np.empty(len(codes), np.int32)
    positions[order] = slots
    return Blocks(items.reshape(-1, block), np.repeat(present, blocks_of).astype(np.int32), positions)


def look_up_blocks(expansion: Expansion, blocks: Blocks, residuals: jax.Array) -> jax.Array:
    """As `look_up_expansion`, for one set of items that all requests score: a batched matrix product.

    Args:
      expansion: from `expand`.
      blocks: from `group_by_code`.
      residuals: [H, P, S, E], residuals of the items in the order of `blocks.items`.

    Returns:
      [B, H, P, S, E]; for the original order of the items, flatten P and S and take `blocks.positions`.
    """
    chex.assert_rank([expansion.means, residuals], 4)
    chex.assert_shape(residuals, (expansion.means.shape[1], *blocks.items.shape, expansion.means.shape[-1]))
    means = expansion.means[:, :, blocks.codes]
    jacobians = expansion.jacobians[:, :, blocks.codes]
    return means[..., None, :] + jnp.einsum("bhpef,hpsf->bhpse", jacobians, residuals)


def first_order(
    attend: Callable[[jax.Array], jax.Array], centres: jax.Array, residuals: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The terms of the look-up, computed without a Jacobian: for training, where candidates are few.

    `J_c r` is the derivative of attention at c in the direction r; several r are computed together.

    Args:
      attend: the function to expand, of queries [B, H, G, E].
      centres: [B, H, G, E], the codeword of each candidate.
      residuals: [R, B, H, G, E].

    Returns:
      `attend(centres)`, and its changes along the residuals, with R as first axis.

    Example:
      >>> value, changes = first_order(jnp.square, jnp.array([3.0]), jnp.array([[1.0], [2.0]]))
      >>> value.tolist(), changes.tolist()
      ([9.0], [[6.0], [12.0]])
    """
    chex.assert_equal_shape_suffix([centres, residuals], centres.ndim)
    value, push = jax.linearize(attend, centres)
    return value, jax.vmap(push)(residuals)
