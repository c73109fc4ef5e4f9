"""Dead codewords of a `Codebook`, and their revival on residuals that are quantized badly."""

import chex
import jax
import jax.numpy as jnp

from tarq_jax.quantization.encoding import as_levels
from tarq_jax.quantization.updates import like_levels, mask_or_ones
from tarq_jax.types import Codebook, Levels


def dead_by_count(codebook: Codebook, *, min_usage: float) -> Levels:
    """[L, K] bool: codewords whose running count is below `min_usage` times the mean count of their level.

    Example:
      >>> from tarq_jax import quantization
      >>> codebook = quantization.with_codewords(jnp.zeros((1, 2, 3))).replace(counts=jnp.array([[9.0, 1.0]]))
      >>> dead_by_count(codebook, min_usage=0.5).tolist()
      [[False, True]]
    """
    return jax.tree.map(
        lambda counts: counts < min_usage * counts.mean(axis=-1, keepdims=True), codebook.counts)


def dead_by_age(codebook: Codebook, *, max_age: float) -> Levels:
    """[L, K] bool: codewords that have not been used for more than `max_age` steps.

    Example:
      >>> from tarq_jax import quantization
      >>> codebook = quantization.with_codewords(jnp.zeros((1, 2, 3))).replace(ages=jnp.array([[0.0, 11.0]]))
      >>> dead_by_age(codebook, max_age=10).tolist()
      [[False, True]]
    """
    return jax.tree.map(lambda ages: ages > max_age, codebook.ages)


def revive(
    rng: jax.Array,
    codebook: Codebook,
    residuals: jax.Array,
    dead: Levels,
    *,
    where: jax.Array | None = None,
) -> Codebook:
    """Moves each dead codeword onto one of the residuals that its level has to quantize (ours).

    Residuals are drawn one after the other, by squared distance to the nearest codeword that is alive
    or already revived (the k-means++ rule, Arthur and Vassilvitskii 2007). So badly quantized residuals
    are likely to be drawn, a residual equal to one of these is never drawn, and no two of these coincide.
    A revived codeword has age 0 and starts with the mean count of its level, so that it has time to win
    assignments before it can count as dead again.

    Args:
      rng: key for the draws.
      codebook: codebook with running statistics.
      residuals: [..., L, D], from an encoder on real latents. Under `shard_map` or `pmap`, pass those of
        all shards (`jax.lax.all_gather`), or replicas diverge; under `jit` over a mesh they are global.
      dead: [L, K] bool, from `dead_by_count` or `dead_by_age`.
      where: [...] bool, residuals that may be drawn; None allows all. Residuals that are not finite are
        never drawn. Codewords for which no residual is left stay as they are.

    Returns:
      The codebook with codewords, counts, sums and ages of the revived codewords replaced.

    Example:
      >>> from tarq_jax import quantization
      >>> codebook = quantization.with_codewords(jnp.array([[[1.0], [2.0], [9.0]]]))
      >>> dead, residuals = jnp.array([[False, False, True]]), jnp.array([[[1.0]], [[2.0]], [[5.0]]])
      >>> revive(jax.random.key(0), codebook, residuals, dead).codewords.tolist()
      [[[1.0], [2.0], [5.0]]]
    """
    levels = as_levels(codebook.codewords)
    chex.assert_shape(residuals, (..., len(levels), levels[0].shape[-1]))
    chex.assert_trees_all_equal_shapes(codebook.counts, dead)
    if not residuals.size:
        return codebook
    where = mask_or_ones(where, residuals.shape[:-2])
    points = jnp.where(where[..., None, None], residuals, 0.0).reshape(-1, *residuals.shape[-2:])
    drawn, moved = zip(*(
        _draw(jax.random.fold_in(rng, index), level, is_dead, points[:, index], where.reshape(-1))
        for index, (level, is_dead) in enumerate(zip(levels, dead, strict=True))), strict=True)
    return _start_anew(
        codebook, like_levels(codebook.codewords, drawn), like_levels(codebook.codewords, moved))


def _draw(
    rng: jax.Array, codewords: jax.Array, dead: jax.Array, points: jax.Array, allowed: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One level of `revive`: codewords [K, D] after drawing from points [M, D], and which ones moved, [K]."""
    finite = jnp.isfinite(points).all(axis=-1)
    points, allowed = jnp.where(finite[:, None], points, 0.0), allowed & finite

    def squared_distances(codeword):
        return jnp.sum((points - codeword) ** 2, axis=-1)

    def replace(nearest, inputs):
        key, codeword, is_dead = inputs
        mass = jnp.where(allowed, nearest, 0.0)
        moves = is_dead & jnp.any(mass > 0)
        codeword = jnp.where(moves, points[jax.random.categorical(key, jnp.log(mass))], codeword)
        served = jnp.minimum(nearest, squared_distances(codeword))
        return jnp.where(moves, served, nearest), (codeword, moves)

    far = jnp.finfo(points.dtype).max  # equal for all points if no codeword is alive
    nearest = jnp.min(jnp.where(dead[:, None], far, jax.vmap(squared_distances)(codewords)), axis=0)
    _, drawn = jax.lax.scan(replace, nearest, (jax.random.split(rng, len(codewords)), codewords, dead))
    return drawn


def _start_anew(codebook: Codebook, codewords: Levels, moved: Levels) -> Codebook:
    """The codebook with the given codewords; those that moved get the statistics of a fresh codeword."""

    def share(counts, moved):
        return jnp.where(moved, counts.mean(axis=-1, keepdims=True), counts)

    counts = jax.tree.map(share, codebook.counts, moved)
    return Codebook(
        codewords=codewords, counts=counts,
        sums=jax.tree.map(
            lambda sums, level, n, moved: jnp.where(moved[..., None], n[..., None] * level, sums),
            codebook.sums, codewords, counts, moved),
        ages=jax.tree.map(lambda ages, moved: jnp.where(moved, 0.0, ages), codebook.ages, moved),
    )
