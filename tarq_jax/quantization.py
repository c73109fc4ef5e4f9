"""Residual quantization as pure functions on a `Codebook`.

Encoding is greedy: `r_1 = z`, `c_l = argmin_k |r_l - C_l[k]|^2`, `r_{l+1} = r_l - C_l[c_l]`, and
`z_q = sum_l C_l[c_l]` (TARQ, arXiv 2509.16931; RQ-VAE, arXiv 2203.01941).

Nothing here changes a codebook behind the caller's back: `update_statistics`, `ema_codewords`,
`revive` and `kmeans_codebook` take what they need and return a new `Codebook`. Given statistics
summed over a mesh (see `assignment_statistics`), replicas stay equal. Shapes that do not fit are an
AssertionError of chex.
"""

import chex
import jax
import jax.numpy as jnp

from tarq_jax.types import Codebook, QuantizerOutput


def negative_distances(points: jax.Array, codewords: jax.Array) -> jax.Array:
    """`-|x - c|^2` up to a constant of each point: `2<x, c> - |c|^2`.

    The dropped `-|x|^2` changes neither an argmax nor a softmax over the codewords, and without
    it no `[..., K, D]` difference is ever formed.

    Args:
      points: [..., M, D].
      codewords: [..., K, D], with the same leading axes as `points` or none.

    Returns:
      [..., M, K], larger is nearer.
    """
    chex.assert_equal_shape_suffix([points, codewords], 1)
    inner = points @ jnp.swapaxes(codewords, -1, -2)
    return 2.0 * inner - jnp.sum(codewords**2, axis=-1)[..., None, :]


def encode(codewords: jax.Array, latents: jax.Array) -> QuantizerOutput:
    """Greedy residual quantization.

    Args:
      codewords: [L, K, D].
      latents: [..., D].

    Returns:
      Codes [..., L], quantized latents [..., D], residuals and chosen codewords [..., L, D]; all
      but the codes are differentiable.

    Example:
      >>> codewords = jnp.array([[[0.0], [4.0]], [[-1.0], [1.0]]])
      >>> output = encode(codewords, jnp.array([[3.2]]))
      >>> output.codes.tolist(), output.quantized.tolist()
      ([[1, 0]], [[3.0]])
    """
    chex.assert_rank(codewords, 3)
    chex.assert_equal_shape_suffix([codewords, latents], 1)
    residual, codes, residuals, chosen = latents, [], [], []
    for level in jnp.asarray(codewords):
        flat = residual.reshape(-1, residual.shape[-1])
        code = jnp.argmax(negative_distances(flat, level), axis=-1).reshape(residual.shape[:-1])
        residuals.append(residual)
        codes.append(code.astype(jnp.int32))
        chosen.append(level[code])
        residual = residual - chosen[-1]
    return QuantizerOutput(
        codes=jnp.stack(codes, axis=-1),
        quantized=sum(chosen),
        residuals=jnp.stack(residuals, axis=-2),
        chosen=jnp.stack(chosen, axis=-2),
    )


def decode(codewords: jax.Array, codes: jax.Array) -> jax.Array:
    """Sums the codewords that `codes` name: [L, K, D] and int [..., L] to [..., D].

    Example:
      >>> decode(jnp.array([[[0.0], [4.0]], [[-1.0], [1.0]]]), jnp.array([1, 0])).tolist()
      [3.0]
    """
    chex.assert_rank(codewords, 3)
    chex.assert_axis_dimension(codes, -1, codewords.shape[0])
    return sum(level[codes[..., index]] for index, level in enumerate(jnp.asarray(codewords)))


def straight_through(latents: jax.Array, quantized: jax.Array) -> jax.Array:
    """The quantized value with the latent's gradient: `z + sg(z_q - z)` (van den Oord et al. 2017).

    Args:
      latents: [..., D], `z`.
      quantized: [..., D], `z_q`.

    Returns:
      [..., D], equal to `quantized` up to rounding.
    """
    chex.assert_equal_shape([latents, quantized])
    return latents + jax.lax.stop_gradient(quantized - latents)


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
