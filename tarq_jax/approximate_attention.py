"""Attention that is not a softmax over the whole history: linear, by hash, searched, and DIN's.

Pure functions in place of `tarq_jax.attention.multi_head_attention`, with its conventions: heads before
positions, an empty history yields zero, masked positions never show. Hashes compare vectors of one space,
such as embeddings of items: signs have no derivative, so that projections before them would never be trained.
Their planes come from a fixed seed. Shapes that do not fit are an AssertionError of chex.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tarq_jax.attention import attention_weights

EPSILON = 1e-6  # beside the denominator of linear attention


def linear_attention(
    queries: jax.Array, keys: jax.Array, values: jax.Array, mask: chex.Array
) -> jax.Array:
    """`o = f(q) sum_n f(k_n) v_n^T / (f(q) sum_n f(k_n))`, `f(x) = elu(x) + 1`.

    Katharopoulos et al. 2020 (arXiv 2006.16236), eq. 5 to 7. Both sums are made once a request: a candidate
    costs E x E multiplications a head, whatever the history.

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
    """Normals of random planes through the origin: [D, R, T] for R rounds of T bits."""
    return np.random.default_rng(seed).normal(size=(width, rounds, bits)).astype(np.float32)


def signatures(vectors: jax.Array, planes: chex.Array) -> jax.Array:
    """On which side of each plane vectors lie: SimHash (Charikar 2002).

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
    """Weighs positions by the rounds in which their whole signature is the candidate's.

    `o = sum_n c_n v_n / sum_n c_n` with c_n collisions in R rounds: in expectation `R (1 - a_n / pi)^T`, a_n
    being the angle between candidate and position. SDIM (Cao et al. 2022, arXiv 2205.10249); that weights
    sum to one, as those of a softmax do, is ours. A request fills 2^T buckets a round once; a candidate looks
    up R of them, written as a product with one-hot codes as in `tarq_jax.attention.look_up`.

    Args:
      queries: [B, G, D], hashed.
      keys: [B, N, D], hashed.
      values: [B, H, N, E].
      mask: [B, N] bool.
      planes: [D, R, T], see `hash_planes`.

    Returns:
      [B, H, G, E]; zero also where nothing collides. Gradients reach the values alone.
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
    """Bits on which candidates and positions agree, R x T less the Hamming distance.

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
    products = jnp.einsum("bgt,bnt->bgn", *ones)  # of whole numbers: exact
    return (ones[0].shape[-1] + products.astype(jnp.int32)) // 2


def category_similarity(queries: chex.Array, keys: chex.Array) -> jax.Array:
    """0 where candidate and position are of one category, -1 elsewhere and for the unknown category 0.

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
    """The most similar positions of each candidate; of equals the newest, which come last.

    Args:
      similarity: [B, G, N] int, below 2^24; a negative one is never selected.
      mask: [B, N] bool.
      num_selected: how many at most.

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
    # The first of equals, so newest first. On CPU XLA sorts all, unless of floats, and not sliced afterwards.
    found, where = jax.lax.top_k(similarity[..., ::-1], min(num_selected, positions))
    least = jnp.min(found, axis=-1, keepdims=True)
    oldest = positions - 1 - jnp.max(jnp.where(found == least, where, 0), axis=-1, keepdims=True)
    newer = jnp.arange(positions) >= oldest
    return (similarity >= 0) & ((similarity > least) | ((similarity == least) & newer))


def searched_attention(
    queries: jax.Array, keys: jax.Array, values: jax.Array, selected: chex.Array
) -> jax.Array:
    """Target attention of every candidate over positions of its own.

    Written as a mask on attention over all positions: it saves nothing here, what is served would gather.

    Args:
      queries: [B, H, G, E].
      keys: [B, H, N, E].
      values: [B, H, N, E].
      selected: [B, G, N] bool, see `select`.

    Returns:
      [B, H, G, E]; zero where nothing is selected.
    """
    _check_heads(queries, keys, values)
    chex.assert_shape(selected, (keys.shape[0], queries.shape[2], keys.shape[2]))
    return attention_weights(queries, keys, selected[:, None]).astype(values.dtype) @ values


def activation_unit_attention(
    queries: jax.Array, keys: jax.Array, values: jax.Array, mask: chex.Array,
    unit: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """`o = sum_n unit([q, k_n, q * k_n, q - k_n]) v_n`: weights may be negative and need not sum to one.

    DIN (Zhou et al. 2018, arXiv 1706.06978), eq. 3: the strength of an interest is kept.

    Args:
      queries: [B, G, D].
      keys: [B, N, D].
      values: [B, H, N, E].
      mask: [B, N] bool.
      unit: [B, G, N, 4D] to weights [B, G, N], those of every head.

    Returns:
      [B, H, G, E].
    """
    _check_shared(queries, keys, values, mask)
    query, key = queries[:, :, None], keys[:, None]
    pairs = jnp.broadcast_arrays(query, key, query * key, query - key)
    weights = jnp.where(mask[:, None], unit(jnp.concatenate(pairs, axis=-1)), 0.0)
    return weights[:, None].astype(values.dtype) @ values


def _check_heads(queries: jax.Array, keys: jax.Array, values: jax.Array) -> None:
    """Queries, keys and values are of one width, head by head."""
    chex.assert_rank(keys, 4)
    chex.assert_equal_shape([keys, values])
    chex.assert_shape(queries, (*keys.shape[:2], None, keys.shape[-1]))


def _check_shared(queries: jax.Array, keys: jax.Array, values: jax.Array, mask: chex.Array) -> None:
    """Queries and keys have no heads, the values do."""
    batch, positions, width = keys.shape
    chex.assert_shape([queries, values, mask], [
        (batch, None, width), (batch, None, positions, None), (batch, positions)])
