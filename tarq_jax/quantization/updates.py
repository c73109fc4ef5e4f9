"""Updates of a `Codebook` during training: statistics, EMA, revival of dead codewords.

Each is written for a level and mapped over all: leaves are arrays [L, K, ...], or tuples of L arrays
[K_l, ...] where levels differ in size (`Levels`).
"""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp

from tarq_jax.quantization.encoding import as_levels
from tarq_jax.types import Codebook, Levels, QuantizerOutput


def random_codebook(
    rng: jax.Array, *, num_levels: int, num_codewords: int | Sequence[int], width: int, scale: float = 1.0
) -> Codebook:
    """Codewords drawn from a normal of standard deviation `scale`, see `with_codewords`.

    `num_codewords` is K of every level, or a K for each.
    """
    sizes = sizes_of_levels(num_levels, num_codewords)
    rngs = jax.random.split(rng, num_levels)
    levels = [scale * jax.random.normal(key, (size, width)) for key, size in zip(rngs, sizes, strict=True)]
    return with_codewords(like_levels(num_codewords, levels))


def with_codewords(codewords: Levels) -> Codebook:
    """A codebook of the given codewords, with statistics as if each had been used once, just now."""
    as_levels(codewords)
    counts = jax.tree.map(lambda level: jnp.ones(level.shape[:-1]), codewords)
    return Codebook(
        codewords=codewords, counts=counts, sums=jax.tree.map(jnp.copy, codewords),
        ages=jax.tree.map(jnp.zeros_like, counts),
    )


def sizes_of_levels(num_levels: int, num_codewords: int | Sequence[int]) -> tuple[int, ...]:
    """K of each level; a ValueError unless there is one for each."""
    sizes = (num_codewords,) * num_levels if isinstance(num_codewords, int) else tuple(num_codewords)
    if len(sizes) != num_levels:
        raise ValueError(f"num_codewords is {num_codewords}, expected one number or one for each of "
                         f"{num_levels} levels")
    return sizes


def like_levels(num_codewords: int | Sequence[int], levels: Sequence[jax.Array]) -> Levels:
    """The levels stacked if `num_codewords` is one number, as a tuple if it is one for each."""
    return jnp.stack(levels) if isinstance(num_codewords, int) else tuple(levels)


def assignment_statistics(
    output: QuantizerOutput, codewords: Levels, where: jax.Array | None = None
) -> tuple[Levels, Levels]:
    """Per codeword: how many latents chose it, and the sum of the residuals they had there.

    Args:
      output: of an encoder, with leading axes `...`.
      codewords: that it encoded with, for their number.
      where: [...] bool, latents to count; None counts all. What the others hold does not matter.

    Returns:
      Counts [L, K] and sums [L, K, D], or tuples of levels. Both add up over shards: under
      `shard_map` or `pmap` sum them with `jax.lax.psum`; under `jit` over a mesh they are global.
    """
    chex.assert_equal_shape_prefix([output.codes, output.residuals], output.codes.ndim)
    where = jnp.ones(output.codes.shape[:-1], bool) if where is None else jnp.asarray(where)
    chex.assert_shape(where, output.codes.shape[:-1])
    codes = output.codes.reshape(-1, output.codes.shape[-1])
    residuals = output.residuals.reshape(-1, *output.residuals.shape[-2:])
    residuals = jnp.where(where.reshape(-1, 1, 1), residuals, 0.0)
    counts, sums = [], []
    for index, level in enumerate(codewords):
        one_hot = jax.nn.one_hot(codes[:, index], len(level), dtype=residuals.dtype)
        one_hot = jnp.where(where.reshape(-1, 1), one_hot, 0.0)
        counts.append(one_hot.sum(axis=0))
        sums.append(one_hot.T @ residuals[:, index])
    if isinstance(codewords, tuple):
        return tuple(counts), tuple(sums)
    return jnp.stack(counts), jnp.stack(sums)


def update_statistics(codebook: Codebook, counts: Levels, sums: Levels, *, decay: float) -> Codebook:
    """Moves the running statistics towards those of one step; the codewords stay as they are.

    `N <- decay N + (1 - decay) n`, and the same for the sums. Codewords that the step used are of
    age 0, all others grow older by one.

    Args:
      codebook: with K codewords at each of L levels.
      counts: [L, K], `n` of `assignment_statistics`.
      sums: [L, K, D], likewise.
      decay: share of the old statistics that is kept, in [0, 1).

    Returns:
      The codebook with new counts, sums and ages.
    """
    chex.assert_trees_all_equal_shapes(codebook.counts, counts)
    chex.assert_trees_all_equal_shapes(codebook.sums, sums)

    def average(old, new):
        return decay * old + (1.0 - decay) * new

    return codebook.replace(
        counts=jax.tree.map(average, codebook.counts, counts),
        sums=jax.tree.map(average, codebook.sums, sums),
        ages=jax.tree.map(lambda age, n: jnp.where(n > 0, 0.0, age + 1.0), codebook.ages, counts),
    )


def ema_codewords(codebook: Codebook, *, smoothing: float = 1e-5) -> Codebook:
    """Sets each codeword to the running mean of the residuals assigned to it.

    Counts are Laplace-smoothed, `n_k = (N_k + smoothing) / (N + K * smoothing) * N`, so that a
    codeword that is never chosen fades rather than divides by zero (van den Oord et al. 2017,
    appendix A.1). Follows `update_statistics`; together they are the EMA update.

    Args:
      codebook: with running counts [L, K] and sums [L, K, D].
      smoothing: in assignments.

    Returns:
      The codebook with new codewords; everything else stays as it is.
    """

    def means(counts, sums):
        total = counts.sum(axis=-1, keepdims=True)
        smoothed = (counts + smoothing) / (total + counts.shape[-1] * smoothing) * total
        return sums / jnp.maximum(smoothed, 1e-12)[..., None]

    return codebook.replace(codewords=jax.tree.map(means, codebook.counts, codebook.sums))


def dead_by_count(codebook: Codebook, *, min_usage: float) -> Levels:
    """[L, K] bool: codewords whose running count is under `min_usage` of an even share of their level."""
    return jax.tree.map(
        lambda counts: counts < min_usage * counts.mean(axis=-1, keepdims=True), codebook.counts)


def dead_by_age(codebook: Codebook, *, max_age: float) -> Levels:
    """[L, K] bool: codewords that no step has used for more than `max_age` steps."""
    return jax.tree.map(lambda ages: ages > max_age, codebook.ages)


def revive(
    rng: jax.Array,
    codebook: Codebook,
    residuals: jax.Array,
    dead: Levels,
    *,
    where: jax.Array | None = None,
) -> Codebook:
    """Moves each dead codeword onto a residual drawn from those its level has to quantize (ours).

    Residuals are drawn without replacement, the more likely the worse their level serves them: by
    squared distance to the nearest living codeword, as k-means++ does. A revived codeword starts with
    an even share of the level's count, so that it has time to win assignments before it can be found
    dead again.

    Args:
      rng: key of the draw.
      codebook: with running statistics.
      residuals: [..., L, D], of an encoder on real latents.
      dead: [L, K] bool, of `dead_by_count` or `dead_by_age`.
      where: [...] bool, residuals that may be drawn; all of them if None. Codewords for which none
        is left stay as they are.

    Returns:
      The codebook with codewords, counts, sums and ages of the dead ones replaced.
    """
    levels = as_levels(codebook.codewords)
    chex.assert_shape(residuals, (..., len(levels), levels[0].shape[-1]))
    where = jnp.ones(residuals.shape[:-2], bool) if where is None else jnp.asarray(where)
    chex.assert_shape(where, residuals.shape[:-2])
    points = jnp.asarray(residuals).reshape(-1, *residuals.shape[-2:])
    revived = [
        _revive_level(jax.random.fold_in(rng, index), *leaves, points[:, index], where.reshape(-1))
        for index, leaves in enumerate(zip(
            levels, codebook.counts, codebook.sums, codebook.ages, dead, strict=True))
    ]
    even = not isinstance(codebook.codewords, tuple)
    fields = (jnp.stack(leaves) if even else leaves for leaves in zip(*revived, strict=True))
    return Codebook(*fields)


def _revive_level(rng, codewords, counts, sums, ages, dead, points, allowed):
    """`revive` for codewords [K, D] and points [M, D]: its new codewords, counts, sums and ages."""
    num_drawn = min(len(codewords), len(points))
    points = jnp.where(allowed[:, None], points, 0.0)  # what the others hold must not show, NaN least of all
    distances = jnp.sum(points**2, axis=-1, keepdims=True) - 2.0 * points @ codewords.T
    distances = jnp.where(dead, jnp.inf, distances + jnp.sum(codewords**2, axis=-1))
    nearest = jnp.min(distances, axis=-1)
    nearest = jnp.where(jnp.isfinite(nearest), jnp.maximum(nearest, 1e-12), 1.0)  # all are dead: evenly
    keys = jnp.where(allowed, jnp.log(nearest) + jax.random.gumbel(rng, nearest.shape), -jnp.inf)
    best, drawn = jax.lax.top_k(keys, num_drawn)  # Gumbel's trick: a draw without replacement
    rank = jnp.cumsum(dead) - 1  # the first dead codeword takes the first drawn point, and so on
    replaced = dead & (rank < num_drawn) & jnp.isfinite(best[jnp.clip(rank, 0, num_drawn - 1)])
    new = points[drawn[jnp.clip(rank, 0, num_drawn - 1)]]
    share = jnp.where(replaced, counts.mean(), counts)
    return (
        jnp.where(replaced[:, None], new, codewords), share,
        jnp.where(replaced[:, None], new * share[:, None], sums), jnp.where(replaced, 0.0, ages),
    )
