"""Attention over a user's history: multi-head, target attention, personalised codebooks, look-up.

Pure functions on projected queries, keys and values; the projections are parameters and are in
`tarq_jax.models.layers`. The axis of heads comes before positions, `[B, H, N, E]`, so that each product is
one batched matrix multiplication. Attention over an empty history is zero. The values at masked positions
have no effect if they are finite. Softmax is computed in float32 for inputs of any type. Attention over
long histories takes bounded memory if a `block` is given, see `tarq_jax.blockwise`. Shapes that do not
fit raise chex's AssertionError.
"""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp

from tarq_jax.blockwise import MASKED, Summed, best_block, blockwise_sums, check_block, scaled_products
from tarq_jax.kernels import Implementation, pick, with_derivative_of


def attention_weights(queries: jax.Array, keys: jax.Array, mask: chex.Array) -> jax.Array:
    """Softmax of scaled inner products over the unmasked positions.

    `a_n = softmax_n(<q, k_n> / sqrt(E))` (Vaswani et al. 2017, eq. 1).

    Args:
      queries: [..., Q, E].
      keys: [..., N, E].
      mask: bool, broadcastable to [..., Q, N].

    Returns:
      [..., Q, N] float32; each row sums to one, or is all zero if every position is masked.
    """
    chex.assert_equal_shape_suffix([queries, keys], 1)
    return _masked_softmax(scaled_products(queries, keys), mask)


@jax.custom_jvp
def _masked_softmax(logits: jax.Array, mask: chex.Array) -> jax.Array:
    """Softmax over the last axis where `mask` is True; all zero where the whole row is masked.

    The derivative is written by hand, `dp = p (ds - <p, ds>)`: it reuses the weights and saves two
    passes over them, which on CPU is a fifth of the time of attention with its gradient.
    """
    logits = jnp.where(mask, logits, MASKED)
    exponentials = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf))
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    return exponentials * (jnp.any(mask, axis=-1, keepdims=True) / total)


@_masked_softmax.defjvp
def _masked_softmax_jvp(primals, tangents):
    weights = _masked_softmax(*primals)
    tangent = tangents[0]
    return weights, weights * (tangent - jnp.sum(weights * tangent, axis=-1, keepdims=True))


def attention_sums(
    queries: jax.Array, keys: jax.Array, values: jax.Array, mask: chex.Array, *, block: int | None = None,
    summed: Summed = lambda keys, values: values,
) -> Any:
    """`sum_n a_n summed(k, v)_n`, with the attention weights `a` of each query over the history.

    Args:
      queries: [..., Q, E], leading axes broadcastable to those of `keys`.
      keys: [..., N, E].
      values: [..., N, E].
      mask: bool, broadcastable to [..., 1, N].
      block: maximal number of queries and of positions that are processed together. With more of either,
        attention runs block by block, and memory grows neither with Q x N nor with the output of `summed`
        for all positions. 0 processes all together; None chooses, see `tarq_jax.blockwise.best_block`.
      summed: (keys, values) -> pytree of [..., N, any], position by position; by default the values.

    Returns:
      Pytree like that of `summed`, [..., Q, any] each; zero if every position is masked.

    Raises:
      ValueError: `block` is no whole number or negative.
    """
    chex.assert_equal_shape_suffix([queries, keys], 1)
    check_block(block)
    block = best_block(queries.shape[-2], keys.shape[-2], 512) if block is None else block
    if block and max(queries.shape[-2], keys.shape[-2]) > block:
        return blockwise_sums(queries, keys, values, mask, block=block, summed=summed)
    weights = attention_weights(queries, keys, mask)
    return jax.tree.map(lambda values: weights.astype(values.dtype) @ values, summed(keys, values))


def multi_head_attention(
    queries: jax.Array, keys: jax.Array, values: jax.Array, mask: chex.Array, *, block: int | None = None,
    implementation: Implementation = None,
) -> jax.Array:
    """Every query attends over its request's history, head by head.

    With candidates as queries this is target attention (DIN, arXiv 1706.06978, in dot-product
    form); with history positions as queries it is self-attention. Axes between B and H, such as
    levels, are batch axes like B.

    Args:
      queries: [B, ..., H, Q, E].
      keys: [B, ..., H, N, E].
      values: [B, ..., H, N, E].
      mask: [B, N] bool.
      block: see `attention_sums`.
      implementation: see `tarq_jax.kernels`.

    Returns:
      [B, ..., H, Q, E]; zero for an empty history.

    Raises:
      NotImplementedError: `implementation` is "pallas", and no kernel supports these arguments.
      ValueError: `block` is no whole number or negative, or `implementation` is unknown.
    """
    chex.assert_equal_shape([keys, values])
    chex.assert_equal_rank([queries, keys])
    chex.assert_equal_shape_prefix([queries, keys], keys.ndim - 2)
    chex.assert_equal_shape_suffix([queries, keys], 1)
    batch, positions = keys.shape[0], keys.shape[-2]
    chex.assert_shape(mask, (batch, positions))

    def plain(queries, keys, values, mask):
        mask = mask.reshape(batch, *(1,) * (keys.ndim - 2), positions)
        return attention_sums(queries, keys, values, mask, block=block)

    kernel = pick("attend", implementation, queries, keys, values, mask)
    return (with_derivative_of(plain, kernel) if kernel else plain)(queries, keys, values, mask)


def personalized_codebook(
    queries: jax.Array, keys: jax.Array, values: jax.Array, mask: chex.Array, *, block: int | None = None,
    implementation: Implementation = None,
) -> jax.Array:
    """Every codeword of every level attends over each user's history (TARQ; `A_l` of docs/mathematics.md).

    Args:
      queries: [L, H, K, E], projected codewords, the same for all requests.
      keys: [B, L, H, N, E].
      values: [B, L, H, N, E].
      mask: [B, N] bool.
      block: see `attention_sums`.
      implementation: see `tarq_jax.kernels`.

    Returns:
      [B, L, H, K, E]; computed once per request, for any number of candidates.

    Raises:
      NotImplementedError, ValueError: as `multi_head_attention`.
    """
    chex.assert_rank([queries, keys], [4, 5])
    queries = jnp.broadcast_to(queries, (keys.shape[0], *queries.shape))
    return multi_head_attention(queries, keys, values, mask, block=block, implementation=implementation)


def look_up(
    personalized: jax.Array, codes: jax.Array, *, implementation: Implementation = None
) -> jax.Array:
    """Sums each candidate's entries of its request's personalised codebook: `o = sum_l A_l[c_l]`.

    One gather per level, which XLA fuses with the sum, so that neither the entries [B, G, L, D] nor one-hot
    codes are materialised. On CPU it runs near the speed of memory, at least sixty times faster than with
    either.

    Args:
      personalized: [B, L, K, D].
      codes: [B, G, L] int, below K; larger codes are clipped to K - 1.
      implementation: see `tarq_jax.kernels`.

    Returns:
      [B, G, D].

    Raises:
      NotImplementedError: `implementation` is "pallas", and no kernel supports these arguments.
      ValueError: `implementation` is unknown.

    Example:
      >>> personalized = jnp.array([[[[1.0], [2.0]], [[30.0], [40.0]]]])
      >>> look_up(personalized, jnp.array([[[0, 1], [1, 1]]])).tolist()
      [[[41.0], [42.0]]]
    """
    chex.assert_rank(personalized, 4)
    requests, levels = personalized.shape[:2]
    chex.assert_shape(codes, (requests, None, levels))
    kernel = pick("look_up", implementation, personalized, codes)
    return (with_derivative_of(_look_up, kernel) if kernel else _look_up)(personalized, codes)


def _look_up(personalized: jax.Array, codes: jax.Array) -> jax.Array:
    take = jax.vmap(functools.partial(jnp.take, axis=0, mode="clip"))
    entries = (take(personalized[:, level], codes[..., level]) for level in range(codes.shape[-1]))
    return functools.reduce(jnp.add, entries)
