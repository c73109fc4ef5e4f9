"""Codebooks fitted to real latents: k-means, level by level."""

import chex
import jax
import jax.numpy as jnp

from tarq_jax.quantization.encoding import encode, negative_distances
from tarq_jax.quantization.updates import assignment_statistics
from tarq_jax.types import Codebook


def kmeans(rng: jax.Array, points: jax.Array, *, num_codewords: int, iterations: int = 20) -> jax.Array:
    """Lloyd's algorithm from a k-means++ start; an emptied cluster takes over a random point.

    (Lloyd 1982; Arthur and Vassilvitskii 2007.)

    Args:
      rng: key of the start and of the random points.
      points: [M, D] with M >= num_codewords.
      num_codewords: K.
      iterations: of Lloyd.

    Returns:
      Centroids [K, D].

    Raises:
      ValueError: with fewer points than codewords.
    """
    chex.assert_rank(points, 2)
    if points.shape[0] < num_codewords:
        raise ValueError(f"points: {points.shape[0]} given, expected at least num_codewords={num_codewords}")
    points = jnp.asarray(points)
    seed_rng, lloyd_rng = jax.random.split(rng)

    def lloyd(centroids, step_rng):
        assigned = jnp.argmax(negative_distances(points, centroids), axis=-1)
        one_hot = jax.nn.one_hot(assigned, num_codewords, dtype=points.dtype)
        counts = one_hot.sum(axis=0)[:, None]
        spare = points[jax.random.randint(step_rng, (num_codewords,), 0, points.shape[0])]
        means = one_hot.T @ points / jnp.maximum(counts, 1.0)
        return jnp.where(counts > 0, means, spare), None

    start = _kmeans_plus_plus(seed_rng, points, num_codewords)
    centroids, _ = jax.lax.scan(lloyd, start, jax.random.split(lloyd_rng, iterations))
    return centroids


def _kmeans_plus_plus(rng: jax.Array, points: jax.Array, num_codewords: int) -> jax.Array:
    """Starts of k-means: each next one drawn with probability ~ squared distance to the nearest."""

    def pick(nearest, step_rng):
        logits = jnp.where(nearest > 0, jnp.log(nearest), -jnp.inf)
        logits = jnp.where(jnp.any(nearest > 0), logits, 0.0)
        chosen = points[jax.random.categorical(step_rng, logits)]
        return jnp.minimum(nearest, jnp.sum((points - chosen) ** 2, axis=-1)), chosen

    even = jnp.ones(points.shape[0]) * jnp.finfo(points.dtype).max
    _, chosen = jax.lax.scan(pick, even, jax.random.split(rng, num_codewords))
    return chosen


def kmeans_codebook(
    rng: jax.Array, latents: jax.Array, *, num_levels: int, num_codewords: int, iterations: int = 20
) -> Codebook:
    """A codebook fitted level by level: k-means on the latents, then on what each level leaves over.

    Args:
      rng: key.
      latents: [M, D], real latents, M >= num_codewords.
      num_levels: L.
      num_codewords: K.
      iterations: of Lloyd at each level.

    Returns:
      Codebook whose counts and sums are those of `latents`: M / K uses a codeword on average.

    Raises:
      ValueError: with fewer latents than codewords.
    """
    residual, levels = jnp.asarray(latents), []
    for level_rng in jax.random.split(rng, num_levels):
        level = kmeans(level_rng, residual, num_codewords=num_codewords, iterations=iterations)
        residual = residual - level[jnp.argmax(negative_distances(residual, level), axis=-1)]
        levels.append(level)
    codewords = jnp.stack(levels)
    counts, sums = assignment_statistics(encode(codewords, latents), num_codewords)
    return Codebook(codewords=codewords, counts=counts, sums=sums)
