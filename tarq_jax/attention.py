"""Attention over a user's history: multi-head, target attention, personalised codebooks, look-up.

Pure functions on projected queries, keys and values; the projections are parameters and live in
`tarq_jax.models.layers`. Heads lie before positions, `[B, H, N, E]`, so that each product is one
batched matrix multiplication. An empty history attends to nothing and yields zero, and what masked
positions hold never shows, so long as it is finite. Softmax is in float32 whatever the inputs. Long
histories attend in bounded memory where a `block` is given, see `tarq_jax.blockwise`. Shapes that do not
fit are an AssertionError of chex.
"""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp

from tarq_jax.blockwise import MASKED, Summed, best_block, blockwise_sums, refuse_negative, scaled_products
from tarq_jax.kernels import Implementation, pick, with_derivative_of


def attention_weights(queries: jax.Array, keys: jax.Array, mask: chex.Array) -> jax.Array:
    """Softmax of scaled inner products over the unmasked positions.

    `a_n = softmax_n(<q, k_n> / sqrt(E))` (Vaswani et al. 2017, eq. 1).

    Args:
      queries: [..., Q, E].
      keys: [..., N, E].
      mask: bool, broadcastable to [..., Q, N].

    Returns:
      [..., Q, N] float32; each row sums to one, or is all zero where no position is unmasked.
    """
    chex.assert_equal_shape_suffix([queries, keys], 1)
    return _masked_softmax(scaled_products(queries, keys), mask)


@jax.custom_jvp
def _masked_softmax(logits: jax.Array, mask: chex.Array) -> jax.Array:
    """Softmax over the last axis where `mask`, all zero where nothing is unmasked.

    The derivative is given by hand, `dp = p (ds - <p, ds>)`: it reuses the weights and saves two
    passes over them, a fifth of the time of attention and its gradient on CPU.
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
      block: queries, and positions, looked at together where there are more of either: memory then does
        not grow with Q x N, nor by what `summed` makes of all positions. 0 looks at all at once; None
        chooses, see `tarq_jax.blockwise.best_block`.
      summed: (keys, values) -> pytree of [..., N, any], position by position; the values alone by default.

    Returns:
      Pytree like that of `summed`, [..., Q, any] each; zero where no position is unmasked.

    Raises:
      ValueError: `block` is negative.
    """
    chex.assert_equal_shape_suffix([queries, keys], 1)
    refuse_negative(block)
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

    With candidates as queries this is target attention (DIN, arXiv 1706.06978, in its
    dot-product form); with history positions as queries it is self-attention. Axes between B and
    H, such as levels, are batch axes like B.

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
      NotImplementedError: `implementation` is "pallas", and it has no kernel for these arguments.
      ValueError: `block` is negative, or `implementation` unknown.
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
      queries: [L, H, K, E], projected codewords; the same for all requests.
      keys: [B, L, H, N, E].
      values: [B, L, H, N, E].
      mask: [B, N] bool.
      block: see `attention_sums`.
      implementation: see `tarq_jax.kernels`.

    Returns:
      [B, L, H, K, E], once a request, whatever the number of candidates.

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

    A gather a level, which XLA fuses with the sum: neither the entries [B, G, L, D] nor one-hot codes are
    formed. On CPU it runs at the speed of memory, some forty times faster than either.

    Args:
      personalized: [B, L, K, D].
      codes: [B, G, L] int, below K; larger ones are taken for K - 1.
      implementation: see `tarq_jax.kernels`.

    Returns:
      [B, G, D].

    Raises:
      NotImplementedError: `implementation` is "pallas", and it has no kernel for these arguments.
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
