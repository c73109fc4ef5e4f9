"""Updates of a `Codebook` during training: statistics, EMA, revival of dead codewords."""

import chex
import jax
import jax.numpy as jnp

from tarq_jax.types import Codebook, QuantizerOutput


def random_codebook(
    rng: jax.Array, *, num_levels: int, num_codewords: int, width: int, scale: float = 1.0
) -> Codebook:
    """Codewords [L, K, D] drawn from a normal of standard deviation `scale`, see `with_codewords`."""
    codewords = scale * jax.random.normal(rng, (num_levels, num_codewords, width))
    return with_codewords(codewords)


def with_codewords(codewords: jax.Array) -> Codebook:
    """A codebook of the given codewords [L, K, D], with statistics as if each had been used once."""
    chex.assert_rank(codewords, 3)
    return Codebook(codewords=codewords, counts=jnp.ones(codewords.shape[:2]), sums=jnp.copy(codewords))


def assignment_statistics(
    output: QuantizerOutput, num_codewords: int, where: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Per codeword: how many latents chose it, and the sum of the residuals they had there.

    Args:
      output: of `encode`, with leading axes `...`.
      num_codewords: K.
      where: [...] bool, latents to count; None counts all.

    Returns:
      Counts [L, K] and sums [L, K, D]. Both add up over shards: under `shard_map` or `pmap` sum
      them with `jax.lax.psum`; under `jit` over a mesh they are global already.
    """
    chex.assert_equal_shape_prefix([output.codes, output.residuals], output.codes.ndim)
    codes = output.codes.reshape(-1, output.codes.shape[-1])
    residuals = output.residuals.reshape(-1, *output.residuals.shape[-2:])
    one_hot = jax.nn.one_hot(codes, num_codewords, dtype=residuals.dtype)
    if where is not None:
        chex.assert_shape(where, output.codes.shape[:-1])
        one_hot = one_hot * where.reshape(-1, 1, 1)
    return one_hot.sum(axis=0), jnp.einsum("mlk,mld->lkd", one_hot, residuals)


def update_statistics(codebook: Codebook, counts: jax.Array, sums: jax.Array, *, decay: float) -> Codebook:
    """Moves the running statistics towards those of one step; the codewords stay as they are.

    `N <- decay N + (1 - decay) n`, and the same for the sums.

    Args:
      codebook: with K codewords at each of L levels.
      counts: [L, K], `n` of `assignment_statistics`.
      sums: [L, K, D], likewise.
      decay: share of the old statistics that is kept, in [0, 1).

    Returns:
      The codebook with new counts and sums.
    """
    chex.assert_equal_shape([codebook.counts, counts])
    chex.assert_equal_shape([codebook.sums, sums])
    return codebook.replace(
        counts=decay * codebook.counts + (1.0 - decay) * counts,
        sums=decay * codebook.sums + (1.0 - decay) * sums,
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
      The codebook with new codewords; its counts and sums stay as they are.
    """
    total = codebook.counts.sum(axis=-1, keepdims=True)
    num_codewords = codebook.counts.shape[-1]
    smoothed = (codebook.counts + smoothing) / (total + num_codewords * smoothing) * total
    return codebook.replace(codewords=codebook.sums / jnp.maximum(smoothed, 1e-12)[..., None])


def dead(codebook: Codebook, *, min_usage: float) -> jax.Array:
    """[L, K] bool: codewords whose running count is under `min_usage` of an even share of their level."""
    even_share = codebook.counts.mean(axis=-1, keepdims=True)
    return codebook.counts < min_usage * even_share


def revive(
    rng: jax.Array,
    codebook: Codebook,
    residuals: jax.Array,
    *,
    where: jax.Array | None = None,
    min_usage: float = 0.05,
) -> Codebook:
    """Moves each dead codeword onto a residual drawn from those its level has to quantize (ours).

    A revived codeword starts with an even share of the level's count, so that it has time to win
    assignments before it can be found dead again.

    Args:
      rng: key of the draw.
      codebook: with running statistics.
      residuals: [..., L, D], of `encode` on real latents.
      where: [...] bool, residuals that may be drawn; all of them if None. If none may be drawn
        the codebook is returned unchanged.
      min_usage: a codeword is dead below this share of an even share of its level.

    Returns:
      The codebook with codewords, counts and sums of the dead ones replaced.
    """
    num_levels, num_codewords, width = codebook.codewords.shape
    chex.assert_shape(residuals, (..., num_levels, width))
    where = jnp.ones(residuals.shape[:-2], bool) if where is None else where
    chex.assert_shape(where, residuals.shape[:-2])
    flat, allowed = jnp.asarray(residuals).reshape(-1, num_levels, width), where.reshape(-1)
    logits = jnp.where(allowed, 0.0, -jnp.inf)
    picks = jax.random.categorical(rng, logits, shape=(num_levels, num_codewords))
    drawn = jax.vmap(lambda level, pick: flat[pick, level])(jnp.arange(num_levels), picks)
    replaced = dead(codebook, min_usage=min_usage) & allowed.any()
    counts = jnp.where(replaced, codebook.counts.mean(axis=-1, keepdims=True), codebook.counts)
    return Codebook(
        codewords=jnp.where(replaced[..., None], drawn, codebook.codewords),
        counts=counts,
        sums=jnp.where(replaced[..., None], drawn * counts[..., None], codebook.sums),
    )
