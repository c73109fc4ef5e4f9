"""Updates of a `Codebook` during training: running statistics and EMA.

Each update is written for one level and mapped over all levels: leaves are arrays [L, K, ...], or tuples
of L arrays [K_l, ...] if levels differ in size (`Levels`).
"""

from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from tarq_jax import checks
from tarq_jax.quantization.encoding import as_levels
from tarq_jax.types import Codebook, Levels, QuantizerOutput


def random_codebook(
    rng: jax.Array, *, num_levels: int, num_codewords: int | Sequence[int], width: int, scale: float = 1.0
) -> Codebook:
    """Codewords drawn from a normal distribution of mean 0, with the statistics of `with_codewords`.

    Args:
      rng: key for the draw.
      num_levels: L.
      num_codewords: K, one number for all levels or one per level.
      width: D.
      scale: standard deviation of an entry.

    Returns:
      Codebook with leaves [L, K, ...], or tuples of [K_l, ...] if `num_codewords` gives one per level.

    Raises:
      ValueError: `num_levels` is below 1, or there are not as many sizes as levels.

    Example:
      >>> codebook = random_codebook(jax.random.key(0), num_levels=2, num_codewords=(8, 3), width=5)
      >>> [level.shape for level in codebook.codewords]
      [(8, 5), (3, 5)]
    """
    sizes = sizes_of_levels(num_levels, num_codewords)
    rngs = jax.random.split(rng, num_levels)
    levels = [scale * jax.random.normal(key, (size, width)) for key, size in zip(rngs, sizes, strict=True)]
    return with_codewords(like_levels(num_codewords, levels))


def with_codewords(codewords: Levels) -> Codebook:
    """A codebook of the codewords [L, K, D], with statistics as if each had just been used once."""
    codewords = like_levels(codewords, as_levels(codewords))
    counts = jax.tree.map(lambda level: jnp.ones(level.shape[:-1]), codewords)
    return Codebook(
        codewords=codewords, counts=counts, sums=jax.tree.map(jnp.copy, codewords),
        ages=jax.tree.map(jnp.zeros_like, counts),
    )


def sizes_of_levels(num_levels: int, num_codewords: int | Sequence[int]) -> tuple[int, ...]:
    """K of each level; raises ValueError if there is no level, or sizes are given but not one for each."""
    checks.positive_int("num_levels", num_levels)
    sizes = tuple(num_codewords) if isinstance(num_codewords, Sequence) else (num_codewords,) * num_levels
    if len(sizes) != num_levels:
        raise ValueError(f"num_codewords is {num_codewords}, expected one number or one for each of "
                         f"{num_levels} levels")
    return sizes


def like_levels(like: Any, levels: Sequence[jax.Array]) -> Levels:
    """The levels as a tuple if `like` (sizes or levels) is a sequence; otherwise stacked to [L, ...]."""
    return tuple(levels) if isinstance(like, Sequence) else jnp.stack(levels)


def assignment_statistics(
    output: QuantizerOutput, codewords: Levels, where: jax.Array | None = None
) -> tuple[Levels, Levels]:
    """Per codeword: how many latents chose it, and the sum of their residuals at its level.

    Args:
      output: output of an encoder, with leading axes `...`.
      codewords: the codewords that it used; only their number matters.
      where: [...] bool, latents to count; None counts all. The values of the other latents do not matter.

    Returns:
      Counts [L, K] and sums [L, K, D], or tuples with one array per level, in float32 or the residuals' type
      if that is wider. Both add up over shards: under
      `shard_map` or `pmap`, sum them with `jax.lax.psum`; under `jit` over a mesh they are global.

    Example:
      >>> from tarq_jax.quantization import encode
      >>> codewords = jnp.array([[[0.0], [4.0]]])
      >>> output = encode(codewords, jnp.array([[3.0], [5.0], [1.0]]))
      >>> counts, sums = assignment_statistics(output, codewords)
      >>> counts.tolist(), sums.tolist()
      ([[1.0, 2.0]], [[[1.0], [8.0]]])
    """
    chex.assert_equal_shape_prefix([output.codes, output.residuals], output.codes.ndim)
    chex.assert_axis_dimension(output.codes, -1, len(codewords))
    where = mask_or_ones(where, output.codes.shape[:-1])
    codes = jnp.where(where[..., None], output.codes, -1).reshape(-1, len(codewords))  # -1: no codeword
    residuals = jnp.where(where[..., None, None], output.residuals, 0.0)
    residuals = residuals.reshape(-1, *residuals.shape[-2:])
    counts, sums = zip(*(
        _level_statistics(codes[:, index], residuals[:, index], len(level))
        for index, level in enumerate(codewords)), strict=True)
    return like_levels(codewords, counts), like_levels(codewords, sums)


def _level_statistics(codes: jax.Array, residuals: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Counts [K] and sums [K, D] of one level's codes [M] and residuals [M, D], as a matrix product.

    In float32 at least: counts in bfloat16 would stop growing at 256.
    """
    residuals = residuals.astype(jnp.promote_types(residuals.dtype, jnp.float32))
    one_hot = jax.nn.one_hot(codes, size, dtype=residuals.dtype)
    return one_hot.sum(axis=0), jnp.matmul(one_hot.T, residuals, precision="highest")


def mask_or_ones(where: jax.Array | None, shape: tuple[int, ...]) -> jax.Array:
    """The mask, checked to have this shape; all True if None."""
    where = jnp.ones(shape, bool) if where is None else jnp.asarray(where)
    chex.assert_shape(where, shape)
    return where


def update_statistics(codebook: Codebook, counts: Levels, sums: Levels, *, decay: float) -> Codebook:
    """Moves the running statistics towards those of one step; the codewords do not change.

    `N <- decay N + (1 - decay) n`, and the same for the sums. The age of codewords that the step used
    becomes 0; the age of all other codewords grows by one.

    Args:
      codebook: K codewords at each of L levels.
      counts: [L, K], `n`, from `assignment_statistics`.
      sums: [L, K, D], from `assignment_statistics`.
      decay: share of the old statistics that is kept, in [0, 1).

    Returns:
      The codebook with new counts, sums and ages.

    Raises:
      ValueError: `decay` is outside [0, 1).

    Example:
      >>> codebook = with_codewords(jnp.array([[[0.0], [4.0]]]))
      >>> updated = update_statistics(codebook, jnp.array([[3.0, 0.0]]), jnp.zeros((1, 2, 1)), decay=0.5)
      >>> updated.counts.tolist(), updated.ages.tolist()
      ([[2.0, 0.5]], [[0.0, 1.0]])
    """
    checks.number("decay", decay, lambda share: 0 <= share < 1, "a number in [0, 1)")
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
    codeword that is never chosen fades towards zero instead of causing a division by zero (van den Oord et
    al. 2017, appendix A.1). Without smoothing, a level whose counts are all 0 keeps its codewords. Call it
    after `update_statistics`; together they are the EMA update.

    Args:
      codebook: codebook with running counts [L, K] and sums [L, K, D].
      smoothing: Laplace smoothing, in assignments, at least 0.

    Returns:
      The codebook with new codewords; everything else is unchanged.

    Raises:
      ValueError: `smoothing` is negative.

    Example:
      >>> codebook = with_codewords(jnp.array([[[0.0], [4.0]]]))
      >>> moved = update_statistics(codebook, jnp.ones((1, 2)), jnp.array([[[2.0], [4.0]]]), decay=0.5)
      >>> ema_codewords(moved).codewords.round(3).tolist()
      [[[1.0], [4.0]]]
    """
    checks.number("smoothing", smoothing, lambda given: given >= 0, "at least 0")

    def means(counts, sums, old):
        total = counts.sum(axis=-1, keepdims=True)
        whole = total + counts.shape[-1] * smoothing
        smoothed = (counts + smoothing) / jnp.where(whole > 0, whole, 1.0) * total
        return jnp.where(whole[..., None] > 0, sums / jnp.maximum(smoothed, 1e-12)[..., None], old)

    return codebook.replace(
        codewords=jax.tree.map(means, codebook.counts, codebook.sums, codebook.codewords))
