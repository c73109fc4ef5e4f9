"""Codebooks fitted to real latents: k-means, level by level; least squares over all levels at once."""

from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp

from tarq_jax.quantization.encoding import as_levels, decode, encode, nearest
from tarq_jax.quantization.updates import assignment_statistics, like_levels, sizes_of_levels
from tarq_jax.types import Codebook, Levels, QuantizerOutput

Encode = Callable[[Levels, jax.Array], QuantizerOutput]


def kmeans(
    rng: jax.Array, points: jax.Array, *, num_codewords: int, weights: jax.Array | None = None,
    iterations: int = 20,
) -> jax.Array:
    """Lloyd's algorithm from a k-means++ start; emptied clusters take over points that are served worst.

    (Lloyd 1982; Arthur and Vassilvitskii 2007.) Points are centred first, so that their distance from
    the origin costs no precision.

    Args:
      rng: key of the start.
      points: [M, D] with M >= num_codewords.
      num_codewords: K.
      weights: [M], non-negative, how often a point counts; all once if None.
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
    weights = jnp.ones(len(points), points.dtype) if weights is None else jnp.asarray(weights)
    chex.assert_shape(weights, points.shape[:1])
    centre = points.mean(axis=0)
    points = points - centre
    weighted = points * weights[:, None]

    def lloyd(_, centroids):
        code = nearest(points, centroids)
        counts = jax.ops.segment_sum(weights, code, num_codewords)
        sums = jax.ops.segment_sum(weighted, code, num_codewords)
        errors = weights * jnp.sum((points - centroids[code]) ** 2, axis=-1)
        empty = counts <= 0
        _, worst = jax.lax.top_k(errors, num_codewords)
        spare = points[worst[jnp.cumsum(empty) - 1]]
        means = sums / jnp.where(empty, 1.0, counts)[:, None]
        return jnp.where(empty[:, None], spare, means)

    start = _kmeans_plus_plus(rng, points, weights, num_codewords)
    return jax.lax.fori_loop(0, iterations, lloyd, start) + centre


def _kmeans_plus_plus(rng: jax.Array, points: jax.Array, weights: jax.Array, num_codewords: int) -> jax.Array:
    """Starts of k-means: each next one drawn by weight times squared distance to the nearest."""

    def pick(nearest, step_rng):
        mass = weights * nearest
        logits = jnp.where(mass > 0, jnp.log(mass), -jnp.inf)
        logits = jnp.where(jnp.any(mass > 0), logits, 0.0)
        chosen = points[jax.random.categorical(step_rng, logits)]
        return jnp.minimum(nearest, jnp.sum((points - chosen) ** 2, axis=-1)), chosen

    _, chosen = jax.lax.scan(
        pick, jnp.full(len(points), jnp.finfo(points.dtype).max / len(points)),
        jax.random.split(rng, num_codewords))
    return chosen


def kmeans_codebook(
    rng: jax.Array, latents: jax.Array, *, num_levels: int, num_codewords: int | Sequence[int],
    iterations: int = 20,
) -> Codebook:
    """A codebook fitted level by level: k-means on the latents, then on what each level leaves over.

    Args:
      rng: key.
      latents: [M, D], real latents, M >= num_codewords.
      num_levels: L.
      num_codewords: K of every level, or a K for each.
      iterations: of Lloyd at each level.

    Returns:
      Codebook whose counts and sums are those of `latents`: M / K uses a codeword on average.

    Raises:
      ValueError: with fewer latents than codewords, or not as many sizes as levels.
    """
    residual, levels = jnp.asarray(latents), []
    sizes = sizes_of_levels(num_levels, num_codewords)
    for level_rng, size in zip(jax.random.split(rng, num_levels), sizes, strict=True):
        level = kmeans(level_rng, residual, num_codewords=size, iterations=iterations)
        residual = residual - level[nearest(residual, level)]
        levels.append(level)
    return fitted(like_levels(num_codewords, levels), latents)


def fitted(codewords: Levels, latents: jax.Array, *, encode: Encode = encode) -> Codebook:
    """A codebook of the given codewords, with the statistics that they have on `latents` [M, D]."""
    counts, sums = assignment_statistics(encode(codewords, latents), codewords)
    return Codebook(
        codewords=codewords, counts=counts, sums=sums, ages=jax.tree.map(jnp.zeros_like, counts))


def refine(codewords: Levels, latents: jax.Array, codes: jax.Array, *, ridge: float = 1e-3) -> Levels:
    """The codewords of all levels together that reconstruct best, with the codes as they are.

    Least squares, `argmin_C sum_i |z_i - sum_l C_l[c_il]|^2 + ridge |C - C_old|^2`, in closed form: the
    normal matrix counts how often two codewords are used together (Babenko and Lempitsky 2014).
    Codewords that are not used stay.

    Args:
      codewords: [L, K, D], or L arrays [K_l, D].
      latents: [M, D].
      codes: [M, L] int.
      ridge: in uses of a codeword.

    Returns:
      Codewords like those given.
    """
    levels = as_levels(codewords, latents)
    chex.assert_shape(codes, (len(latents), len(levels)))
    rows = [[_together(codes[:, i], codes[:, j], len(one), len(other)) for j, other in enumerate(levels)]
            for i, one in enumerate(levels)]
    normal = jnp.block(rows)
    flat = jnp.concatenate(levels)
    left = latents - decode(levels, codes)
    moments = jnp.concatenate([
        jax.ops.segment_sum(left, codes[:, index], len(level)) for index, level in enumerate(levels)])
    change = jax.scipy.linalg.solve(normal + ridge * jnp.eye(len(flat)), moments, assume_a="pos")
    ends = [sum(map(len, levels[: index + 1])) for index in range(len(levels) - 1)]
    refined = jnp.split(flat + change, ends)
    return tuple(refined) if isinstance(codewords, tuple) else jnp.stack(refined)


def _together(one: jax.Array, other: jax.Array, size: int, other_size: int) -> jax.Array:
    """How often each code of `one` [M] meets each of `other` [M]: [size, other_size]."""
    pairs = jax.ops.segment_sum(jnp.ones(len(one)), one * other_size + other, size * other_size)
    return pairs.reshape(size, other_size)


def fit_codebook(
    rng: jax.Array, latents: jax.Array, *, num_levels: int, num_codewords: int | Sequence[int],
    iterations: int = 20, rounds: int = 8, encode: Encode = encode,
) -> Codebook:
    """`kmeans_codebook`, then rounds of encoding and `refine`; keeps the best codewords that it met.

    Pass `functools.partial(beam_encode, beam=5)` as `encode` to fit codewords to beam search.

    Args:
      rng: key.
      latents: [M, D].
      num_levels: L.
      num_codewords: K of every level, or a K for each.
      iterations: of Lloyd at each level.
      rounds: of refinement; 0 is `kmeans_codebook`.
      encode: (codewords, latents) -> QuantizerOutput.

    Returns:
      Codebook, its error on `latents` under `encode` at most that of `kmeans_codebook`.
    """
    start = kmeans_codebook(
        rng, latents, num_levels=num_levels, num_codewords=num_codewords, iterations=iterations).codewords

    def error(output):
        return jnp.mean(jnp.sum((latents - output.quantized) ** 2, axis=-1))

    def improve(_, carry):
        best, lowest, codewords, codes = carry
        codewords = refine(codewords, latents, codes)
        output = encode(codewords, latents)
        found = error(output)
        better = found < lowest
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), codewords, best)
        return best, jnp.minimum(found, lowest), codewords, output.codes

    output = encode(start, latents)
    best, *_ = jax.lax.fori_loop(0, rounds, improve, (start, error(output), start, output.codes))
    return fitted(best, latents, encode=encode)
