"""Attention that is not a softmax over the whole history: linear, by hash, searched, and DIN's.

Pure functions to replace `tarq_jax.attention.multi_head_attention`, with its conventions: the axis of heads
comes before positions, an empty history gives zero, and masked positions have no effect. Hashes compare
vectors of one space, such as embeddings of items; signs have no derivative, so that projections before them
would never be trained. The hash planes come from a fixed seed. Shapes that do not fit raise chex's
AssertionError.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tarq_jax.attention import attention_weights

EPSILON = 1e-6  # added to the denominator of linear attention


def linear_attention(
    queries: jax.Array, keys: jax.Array, values: jax.Array, mask: chex.Array
) -> jax.Array:
    """`o = f(q) sum_n f(k_n) v_n^T / (f(q) sum_n f(k_n))`, `f(x) = elu(x) + 1`.

    Katharopoulos et al. 2020 (arXiv 2006.16236), eq. 5 to 7. Both sums are computed once per request; each
    candidate then costs E x E multiplications per head, however long the history is.

    Args:
      queries: [B, H, G, E].
      keys: [B, H, N, E].
      values: [B, H, N, E].
      mask: [B, N] bool.

    Returns:
      [B, H, G, E].
    """
    _check_heads(queries, keys, values)
    chex.assert_shape(mask, (keys.shape[0], keys.shape[2]))
    features = jnp.where(mask[:, None, :, None], positive_features(keys), 0.0)
    sums = jnp.swapaxes(features, -1, -2) @ values.astype(jnp.float32)
    totals = jnp.sum(features, axis=-2)[..., None]
    queries = positive_features(queries)
    return (queries @ sums / (queries @ totals + EPSILON)).astype(values.dtype)


def positive_features(x: jax.Array) -> jax.Array:
    """`elu(x) + 1`, the feature map of linear attention: [...] to [...] float32."""
    return jax.nn.elu(x.astype(jnp.float32)) + 1.0


def hash_planes(width: int, rounds: int, bits: int, seed: int = 0) -> np.ndarray:
    """Normal vectors of random planes through the origin: [D, R, T] for R rounds of T bits."""
    return np.random.default_rng(seed).normal(size=(width, rounds, bits)).astype(np.float32)


def signatures(vectors: jax.Array, planes: chex.Array) -> jax.Array:
    """The side of each plane on which each vector is: SimHash (Charikar 2002).

    Two vectors at an angle a agree on a bit with probability `1 - a / pi`.

    Args:
      vectors: [..., D].
      planes: [D, R, T].

    Returns:
      [..., R, T] bool.
    """
    chex.assert_shape(planes, (vectors.shape[-1], None, None))
    highest = jax.lax.Precision.HIGHEST  # a bit must not depend on the device
    return jnp.tensordot(vectors.astype(jnp.float32), planes, axes=1, precision=highest) > 0


def signature_codes(vectors: jax.Array, planes: chex.Array) -> jax.Array:
    """The signature of each round as a number below 2^T: [..., D] and [D, R, T] to [..., R] int."""
    return jnp.sum(signatures(vectors, planes) * 2 ** np.arange(planes.shape[-1]), axis=-1)


def sides(vectors: jax.Array, planes: chex.Array) -> jax.Array:
    """The bits of all rounds together: [..., D] and [D, R, T] to [..., R * T] bool."""
    return signatures(vectors, planes.reshape(planes.shape[0], 1, -1))[..., 0, :]


def collision_attention(
    queries: jax.Array, keys: jax.Array, values: jax.Array, mask: chex.Array, planes: chex.Array
) -> jax.Array:
    """Weights positions by the number of rounds in which their whole signature equals the candidate's.

    `o = sum_n c_n v_n / sum_n c_n` with c_n collisions in R rounds: in expectation `R (1 - a_n / pi)^T`,
    where a_n is the angle between candidate and position. SDIM (Cao et al. 2022, arXiv 2205.10249); the
    normalisation of the weights to a sum of one is ours. Per request, the 2^T buckets of each round are
    filled once; each candidate looks up R of them, written as a product with one-hot codes.

    Args:
      queries: [B, G, D], vectors to hash.
      keys: [B, N, D], vectors to hash.
      values: [B, H, N, E].
      mask: [B, N] bool.
      planes: [D, R, T], see `hash_planes`.

    Returns:
      [B, H, G, E]; zero for a candidate without collisions. Only the values get gradients.
    """
    _check_shared(queries, keys, values, mask)
    filled = jnp.where(mask[..., None], _buckets(keys, planes), 0.0)
    found = _buckets(queries, planes)
    sums = jnp.einsum("bns,bhne->bhse", filled, values.astype(jnp.float32))
    collisions = jnp.einsum("bgs,bs->bg", found, jnp.sum(filled, axis=1))
    attended = jnp.einsum("bgs,bhse->bhge", found, sums)
    return (attended / jnp.maximum(collisions, 1.0)[:, None, :, None]).astype(values.dtype)


def _buckets(vectors: jax.Array, planes: chex.Array) -> jax.Array:
    """One-hot codes of the signature of each round, side by side: [..., D] to [..., R * 2^T]."""
    one_hot = jax.nn.one_hot(signature_codes(vectors, planes), 2 ** planes.shape[-1])
    return one_hot.reshape(*one_hot.shape[:-2], -1)


def hash_similarity(queries: jax.Array, keys: jax.Array, planes: chex.Array) -> jax.Array:
    """Number of bits on which candidates and positions agree: R x T minus the Hamming distance.

    ETA (Chen et al. 2021, arXiv 2108.04468).

    Args:
      queries: [B, G, D].
      keys: [B, N, D].
      planes: [D, R, T].

    Returns:
      [B, G, N] int32.
    """
    chex.assert_shape(keys, (queries.shape[0], None, queries.shape[-1]))
    ones = [jnp.where(sides(x, planes), 1.0, -1.0) for x in (queries, keys)]
    products = jnp.einsum("bgt,bnt->bgn", *ones)  # exact, as all terms are integers
    return (ones[0].shape[-1] + products.astype(jnp.int32)) // 2


def category_similarity(queries: chex.Array, keys: chex.Array) -> jax.Array:
    """0 where candidate and position have the same category; -1 elsewhere and for the unknown category 0.

    The hard search of SIM (Pi et al. 2020, arXiv 2006.05639).

    Args:
      queries: [B, G] int.
      keys: [B, N] int.

    Returns:
      [B, G, N] int32.

    Example:
      >>> category_similarity(jnp.array([[3, 0]]), jnp.array([[3, 4, 0]])).tolist()
      [[[0, -1, -1], [-1, -1, -1]]]
    """
    chex.assert_rank([queries, keys], 2)
    chex.assert_equal_shape_prefix([queries, keys], 1)
    same = (queries[:, :, None] == keys[:, None]) & (queries[:, :, None] != 0)
    return jnp.where(same, 0, -1)


def select(similarity: jax.Array, mask: chex.Array, num_selected: int) -> jax.Array:
    """The most similar positions of each candidate; among equally similar ones the newest, which come last.

    Args:
      similarity: [B, G, N] int, below 2^24; a position of negative similarity is never selected.
      mask: [B, N] bool.
      num_selected: maximal number of selected positions per candidate.

    Returns:
      [B, G, N] bool.

    Example:
      >>> select(jnp.array([[[2, 0, 2, 2, -1]]]), jnp.ones((1, 5), bool), 2).tolist()
      [[[False, False, True, True, False]]]
    """
    chex.assert_rank(similarity, 3)
    positions = similarity.shape[-1]
    chex.assert_shape(mask, (similarity.shape[0], positions))
    if not positions or num_selected < 1:
        return jnp.zeros(similarity.shape, bool)
    similarity = jnp.where(mask[:, None], similarity, -1).astype(jnp.float32)
    # `top_k` returns the first of equal entries, so reverse to prefer the newest. On CPU, XLA uses a fast
    # top-k only for floats whose result is not sliced; otherwise it sorts everything.
    found, where = jax.lax.top_k(similarity[..., ::-1], min(num_selected, positions))
    least = jnp.min(found, axis=-1, keepdims=True)
    oldest = positions - 1 - jnp.max(jnp.where(found == least, where, 0), axis=-1, keepdims=True)
    newer = jnp.arange(positions) >= oldest
    return (similarity >= 0) & ((similarity > least) | ((similarity == least) & newer))


def searched_attention(
    queries: jax.Array, keys: jax.Array, values: jax.Array, selected: chex.Array
) -> jax.Array:
    """Target attention of every candidate over its own selected positions.

    It is computed by masking attention over all positions, which saves no time; a server would gather the
    selected positions.

    Args:
      queries: [B, H, G, E].
      keys: [B, H, N, E].
      values: [B, H, N, E].
      selected: [B, G, N] bool, see `select`.

    Returns:
      [B, H, G, E]; zero for a candidate without selected positions.
    """
    _check_heads(queries, keys, values)
    chex.assert_shape(selected, (keys.shape[0], queries.shape[2], keys.shape[2]))
    return attention_weights(queries, keys, selected[:, None]).astype(values.dtype) @ values


def activation_unit_attention(
    queries: jax.Array, keys: jax.Array, values: jax.Array, mask: chex.Array,
    unit: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """`o = sum_n unit([q, k_n, q * k_n, q - k_n]) v_n`: weights may be negative and need not sum to one.

    DIN (Zhou et al. 2018, arXiv 1706.06978), eq. 3. Without normalisation the output keeps the strength of an
    interest.

    Args:
      queries: [B, G, D].
      keys: [B, N, D].
      values: [B, H, N, E].
      mask: [B, N] bool.
      unit: function from [B, G, N, 4D] to weights [B, G, N], which all heads use.

    Returns:
      [B, H, G, E].
    """
    _check_shared(queries, keys, values, mask)
    query, key = queries[:, :, None], keys[:, None]
    pairs = jnp.broadcast_arrays(query, key, query * key, query - key)
    weights = jnp.where(mask[:, None], unit(jnp.concatenate(pairs, axis=-1)), 0.0)
    return weights[:, None].astype(values.dtype) @ values


def _check_heads(queries: jax.Array, keys: jax.Array, values: jax.Array) -> None:
    """Checks that queries, keys and values have the same heads and the same width."""
    chex.assert_rank(keys, 4)
    chex.assert_equal_shape([keys, values])
    chex.assert_shape(queries, (*keys.shape[:2], None, keys.shape[-1]))


def _check_shared(queries: jax.Array, keys: jax.Array, values: jax.Array, mask: chex.Array) -> None:
    """Checks shapes where queries and keys have no heads but the values do."""
    batch, positions, width = keys.shape
    chex.assert_shape([queries, values, mask], [
        (batch, None, width), (batch, None, positions, None), (batch, positions)])
