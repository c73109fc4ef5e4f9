"""Softmax attention in bounded memory: one block of queries over one block of the history at a time.

The softmax is computed online (Milakov and Gimelshein 2018; Rabe and Staats 2021, arXiv 2112.05682): the
sums so far are rescaled whenever a larger logit appears. The derivative recomputes the weights of
a block from the log-sum-exp of its row (Dao et al. 2022, arXiv 2205.14135). It is written as a
Jacobian-vector product, so that forward mode, reverse mode and their compositions all work block by block.
Training order-1 look-ups needs this: their forward pass contains a derivative, which the training gradient
differentiates again.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from tarq_jax import checks

MASKED = -1e30  # replaces masked logits, so that their weight underflows to exactly 0

CACHED = 2**20  # number of logits beyond which they do not stay in the cache of a CPU
MOST = 2**24  # number of logits of a request and head that are computed together elsewhere: 64 MB

Summed = Callable[[jax.Array, jax.Array], Any]  # keys, values [..., N, E] -> pytree of [..., N, any]


def best_block(rows: int, columns: int, block: int) -> int:
    """How many rows to process together, given a [rows, columns] matrix of logits; 0 for all, no blocks.

    On a CPU it is `block` if the cache cannot hold the matrix. Blocks then take less time, down to a fifth:
    `python -m benchmarks attend align encode --workload=paper`. Elsewhere, where no blocks were measured,
    they are at least `block` and only bound memory: to some `MOST` logits for each request, head and level. A
    program that is exported for every size has none.
    """
    if not isinstance(rows * columns, int):  # symbolic
        return 0
    if jax.default_backend() == "cpu":
        return block if rows * columns > CACHED else 0
    return max(block, MOST // columns) if rows * columns > MOST else 0


def check_block(block: int | None) -> None:
    """Raises ValueError unless `block` is a whole number from 0 on or None; callers say what it means."""
    if block is not None:
        checks.int_from("block", block, least=0)


def scaled_products(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """`<q, k_n> / sqrt(E)` in float32: [..., Q, E] and [..., N, E] to [..., Q, N]."""
    scaled = queries / jnp.sqrt(queries.shape[-1]).astype(queries.dtype)
    return jnp.matmul(scaled, jnp.swapaxes(keys, -1, -2), preferred_element_type=jnp.float32)


def blockwise_sums(
    queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array, *, block: int, summed: Summed
) -> Any:
    """`sum_n a_n summed(k, v)_n` with `a = softmax_n(<q, k_n> / sqrt(E))`, in blocks of at most `block`.

    Args:
      queries: [..., Q, E], leading axes broadcastable to those of `keys`.
      keys: [..., N, E].
      values: [..., N, E].
      mask: bool, broadcastable to [..., 1, N].
      block: maximal number of queries, and of positions of the history, processed together.
      summed: (keys, values) -> pytree of [..., N, any] that the weights multiply, position by position.

    Returns:
      Pytree like that of `summed`, [..., Q, any] each, with the types of its leaves; zero if every position
      is masked.
    """
    leading = jnp.broadcast_shapes(keys.shape[:-2], values.shape[:-2], mask.shape[:-2])
    keys, values = (jnp.broadcast_to(x, (*leading, *x.shape[-2:])) for x in (keys, values))
    mask = jnp.broadcast_to(mask, (*mask.shape[:-1], keys.shape[-2]))
    parts = split_blocks(queries, block, -2)
    history = split_blocks(keys, block, -2), split_blocks(values, block, -2), split_blocks(mask, block, -1)
    return jax.tree.map(lambda means: _join(means, queries.shape[-2]), _attend(summed, parts, *history)[0])


def split_blocks(array: jax.Array, block: int, axis: int) -> jax.Array:
    """Splits an axis into equal blocks, the last padded with zeros; blocks first: [S, ..., size, ...]."""
    length = array.shape[axis]
    num = max(1, -(-length // block))
    size = -(-length // num)
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, num * size - length)
    axis %= array.ndim
    shape = (*array.shape[:axis], num, size, *array.shape[axis + 1:])
    return jnp.moveaxis(jnp.pad(array, padding).reshape(shape), axis, 0)


def _join(parts: jax.Array, length: int) -> jax.Array:
    """[T, ..., size, E] to [..., length, E]: undoes `split_blocks` along the axis -2."""
    parts = jnp.moveaxis(parts, 0, -3)
    return parts.reshape(*parts.shape[:-3], -1, parts.shape[-1])[..., :length, :]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(
    summed: Summed, queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array
) -> tuple[Any, jax.Array]:
    """Means weighted by attention, and the log-sum-exp [T, ..., q, 1] of the logits.

    Queries are in blocks [T, ..., q, E], keys and values in blocks [S, ..., n, E], the mask in blocks
    [S, ..., n].
    """
    like = jax.eval_shape(summed, keys[0], values[0])

    def attend(queries):
        rows = (*jnp.broadcast_shapes(queries.shape[:-2], keys.shape[1:-2]), queries.shape[-2])
        start = (jnp.full((*rows, 1), MASKED), jnp.zeros((*rows, 1)),
                 jax.tree.map(lambda leaf: jnp.zeros((*rows, leaf.shape[-1])), like))
        add = functools.partial(_add_block, summed, queries)
        (largest, total, sums), _ = jax.lax.scan(add, start, (keys, values, mask))
        seen = total > 0
        total = jnp.where(seen, total, 1.0)
        means = jax.tree.map(lambda leaf, of: (leaf / total).astype(of.dtype), sums, like)
        return means, jnp.where(seen, largest + jnp.log(total), 0.0)

    return jax.lax.map(attend, queries)


def _add_block(summed, queries, carry, history):
    """One step of the online softmax: updates largest logit, total and sums with one more block."""
    largest, total, sums = carry
    keys, values, mask = history
    logits = jnp.where(mask, scaled_products(queries, keys), MASKED)
    rising = jnp.maximum(largest, jnp.max(logits, axis=-1, keepdims=True, initial=MASKED))
    weights = jnp.where(mask, jnp.exp(logits - rising), 0.0)
    fading = jnp.exp(largest - rising)
    sums = jax.tree.map(lambda old, new: fading * old + _weigh(weights, new), sums, summed(keys, values))
    return (rising, fading * total + jnp.sum(weights, axis=-1, keepdims=True), sums), None


def _weigh(weights: jax.Array, values: jax.Array) -> jax.Array:
    """Weighted sums [..., Q, any], in float32, of values [..., N, any] by weights [..., Q, N]."""
    return jnp.matmul(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)


# XLA cannot merge the body of a scan with code outside it, so common-subexpression elimination need not be
# prevented there.
_recompute = functools.partial(jax.checkpoint, prevent_cse=False)


def _attend_jvp(summed, primals, tangents):
    """`d mean = sum_n a_n (ds_n v_n + dv_n) - mean dlse`, with `dlse = sum_n a_n ds_n` and logits s."""
    queries, keys, values, mask = primals
    moved = [None if isinstance(tangent, SymbolicZero) else tangent for tangent in tangents[:3]]
    means, log_totals = _attend(summed, *primals)

    @_recompute
    def change(part):
        queries, moved_queries, means, log_total = part
        start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), (means, log_total))
        add = functools.partial(_add_change, summed, queries, moved_queries, log_total)
        (sums, shifts), _ = jax.lax.scan(_recompute(add), start, (keys, values, mask, *moved[1:]))
        return jax.tree.map(lambda new, mean: (new - mean * shifts).astype(mean.dtype), sums, means), shifts

    changes = jax.lax.map(change, (queries, moved[0], means, log_totals))
    return (means, log_totals), changes


def _add_change(summed, queries, moved_queries, log_total, carry, history):
    """Adds one more block to the sums of `a_n (ds_n v_n + dv_n)` and of `a_n ds_n`."""
    keys, values, mask, *moved = history
    at = queries, keys, values
    along = tuple(jnp.zeros_like(x) if dx is None else dx
                  for x, dx in zip(at, (moved_queries, *moved), strict=True))
    logits, shift = jax.jvp(scaled_products, at[:2], along[:2])
    weights = jnp.exp(jnp.where(mask, logits, MASKED) - log_total)
    shift = weights * shift
    sums = jax.tree.map(
        lambda value, change: _weigh(shift, value) + _weigh(weights, change),
        *jax.jvp(summed, at[1:], along[1:]))
    return jax.tree.map(jnp.add, carry, (sums, jnp.sum(shift, axis=-1, keepdims=True))), None


_attend.defjvp(_attend_jvp, symbolic_zeros=True)
