"""Residual quantization of latents: assignment, greedy and beam-search encoding, decoding.

Wherever codewords are taken they are `Levels`: one array [L, K, D], or L arrays [K_l, D] where levels
differ in size. How a level assigns its points is a function `(points [M, D], codewords [K, D]) -> codes
[M]`: `nearest`, `nearest_by_cosine`, `balanced`.
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from tarq_jax.types import Levels, QuantizerOutput

Assign = Callable[[jax.Array, jax.Array], jax.Array]


def negative_distances(points: jax.Array, codewords: jax.Array) -> jax.Array:
    """`-|x - c|^2` up to a constant of each point: `2<x, c> - |c|^2`.

    The dropped `-|x|^2` changes neither an argmax nor a softmax over the codewords, and without
    it no `[..., K, D]` difference is ever formed. Both terms grow with the distance from the origin
    while their difference does not: far out, subtract a common centre first.

    Args:
      points: [..., M, D].
      codewords: [..., K, D], with the same leading axes as `points` or none.

    Returns:
      [..., M, K], larger is nearer.
    """
    chex.assert_equal_shape_suffix([points, codewords], 1)
    inner = points @ jnp.swapaxes(codewords, -1, -2)
    return 2.0 * inner - jnp.sum(codewords**2, axis=-1)[..., None, :]


def argmax(scores: jax.Array) -> jax.Array:
    """Index of the largest entry of the last axis, the first one of equals: [..., K] to int32 [...].

    As two plain reductions, which vectorise on CPU, where the paired one of `jnp.argmax` does not.
    """
    size = scores.shape[-1]
    best = jnp.max(scores, axis=-1, keepdims=True)
    found = jnp.min(jnp.where(scores >= best, jnp.arange(size, dtype=jnp.int32), size), axis=-1)
    return jnp.minimum(found, size - 1)  # where every score is NaN


def nearest(points: jax.Array, codewords: jax.Array) -> jax.Array:
    """The codeword at the smallest Euclidean distance: [M, D] and [K, D] to [M]."""
    return argmax(negative_distances(points, codewords))


def nearest_by_cosine(points: jax.Array, codewords: jax.Array) -> jax.Array:
    """The codeword of the largest cosine similarity; a codeword at the origin has similarity 0."""
    norms = jnp.linalg.norm(codewords, axis=-1)
    return argmax(points @ codewords.T / jnp.where(norms > 0, norms, 1.0))


def balanced(
    points: jax.Array, codewords: jax.Array, *, temperature: float = 0.05, iterations: int = 20
) -> jax.Array:
    """Spreads the points evenly over the codewords: entropic optimal transport (Cuturi 2013; Sinkhorn).

    Each codeword takes 1 / K of the batch, at the least total squared distance; a point's code is where
    most of it goes. It depends on the batch, so this is for training, not for serving.

    Args:
      points: [M, D].
      codewords: [K, D].
      temperature: of the plan, relative to the mean distance; the lower, the nearer to a hard assignment.
      iterations: of Sinkhorn, in log space.

    Returns:
      [M].
    """
    scores = negative_distances(points, codewords) - jnp.sum(points**2, axis=-1, keepdims=True)
    scale = temperature * jnp.maximum(jnp.mean(-scores), jnp.finfo(scores.dtype).tiny)
    log_plan = jax.lax.stop_gradient(scores / scale)

    def normalise(_, log_plan):
        log_plan -= jax.nn.logsumexp(log_plan, axis=0, keepdims=True)  # codewords: equal shares
        return log_plan - jax.nn.logsumexp(log_plan, axis=1, keepdims=True)  # points: one each

    return argmax(jax.lax.fori_loop(0, iterations, normalise, log_plan))


def encode(codewords: Levels, latents: jax.Array, *, assign: Assign = nearest) -> QuantizerOutput:
    """Greedy residual quantization: each level assigns what the ones before left over.

    Args:
      codewords: [L, K, D], or L arrays [K_l, D].
      latents: [..., D].
      assign: of the points of one level.

    Returns:
      Codes [..., L], quantized latents [..., D], residuals and chosen codewords [..., L, D]; all
      but the codes are differentiable.

    Example:
      >>> codewords = jnp.array([[[0.0], [4.0]], [[-1.0], [1.0]]])
      >>> output = encode(codewords, jnp.array([[3.2]]))
      >>> output.codes.tolist(), output.quantized.tolist()
      ([[1, 0]], [[3.0]])
    """
    residual, codes = latents, []
    levels = as_levels(codewords, latents)
    residuals, chosen = [], []
    for level in levels:
        code = assign(residual.reshape(-1, residual.shape[-1]), level).reshape(residual.shape[:-1])
        residuals.append(residual)
        codes.append(code.astype(jnp.int32))
        chosen.append(level[code])
        residual = residual - chosen[-1]
    return _output(codes, residuals, chosen)


def beam_encode(codewords: Levels, latents: jax.Array, *, beam: int) -> QuantizerOutput:
    """Residual quantization that keeps the best `beam` partial sums at each level (Babenko et al. 2014).

    Never worse than `encode`, whose path is kept beside the beam; equal to it with `beam=1`. Inner
    products with all codewords are computed once and corrected by those between codewords, so that no
    level touches the D axis again.

    Args:
      codewords: [L, K, D], or L arrays [K_l, D].
      latents: [..., D].
      beam: partial sums kept.

    Returns:
      As `encode`.

    Raises:
      ValueError: `beam` is below 1.
    """
    if beam < 1:
        raise ValueError(f"beam is {beam}, expected at least 1")
    levels = as_levels(codewords, latents)
    greedy = encode(levels, latents)
    if beam == 1 or len(levels) == 1:
        return greedy
    flat = jax.lax.stop_gradient(latents.reshape(-1, latents.shape[-1]))
    found = with_codes(levels, latents, _beam_codes(levels, flat, beam).reshape(greedy.codes.shape))
    better = _squared_error(found, latents) < _squared_error(greedy, latents)
    return jax.tree.map(
        lambda new, old: jnp.where(better.reshape(better.shape + (1,) * (new.ndim - better.ndim)), new, old),
        found, greedy,
    )


def with_codes(codewords: Levels, latents: jax.Array, codes: jax.Array) -> QuantizerOutput:
    """What `encode` says of the latents [..., D] if the codes [..., L] are given."""
    levels = as_levels(codewords, latents)
    chex.assert_shape(codes, (*latents.shape[:-1], len(levels)))
    residual, residuals, chosen = latents, [], []
    for index, level in enumerate(levels):
        residuals.append(residual)
        chosen.append(level[codes[..., index]])
        residual = residual - chosen[-1]
    return _output(list(jnp.moveaxis(codes, -1, 0)), residuals, chosen)


def decode(codewords: Levels, codes: jax.Array) -> jax.Array:
    """Sums the codewords that `codes` name: [L, K, D] and int [..., L] to [..., D].

    Example:
      >>> decode(jnp.array([[[0.0], [4.0]], [[-1.0], [1.0]]]), jnp.array([1, 0])).tolist()
      [3.0]
    """
    levels = as_levels(codewords)
    chex.assert_axis_dimension(codes, -1, len(levels))
    return functools.reduce(jnp.add, (level[codes[..., index]] for index, level in enumerate(levels)))


def as_levels(codewords: Levels, latents: jax.Array | None = None) -> tuple[jax.Array, ...]:
    """The levels one by one, [K_l, D] each, of the width of the latents."""
    levels = tuple(jnp.asarray(level) for level in codewords)
    chex.assert_rank(levels, 2)
    chex.assert_equal_shape_suffix([*levels, *([] if latents is None else [latents])], 1)
    return levels


def _output(codes: list[jax.Array], residuals: list[jax.Array], chosen: list[jax.Array]) -> QuantizerOutput:
    return QuantizerOutput(
        codes=jnp.stack(codes, axis=-1),
        quantized=functools.reduce(jnp.add, chosen),
        residuals=jnp.stack(residuals, axis=-2),
        chosen=jnp.stack(chosen, axis=-2),
    )


def _squared_error(output: QuantizerOutput, latents: jax.Array) -> jax.Array:
    return jnp.sum((latents - output.quantized) ** 2, axis=-1)


def _beam_codes(levels: tuple[jax.Array, ...], latents: jax.Array, beam: int) -> jax.Array:
    """Codes [M, L] of the best path that a beam finds, for latents [M, D]."""
    scores, codes = jnp.zeros((len(latents), 1)), jnp.zeros((len(latents), 1, 0), jnp.int32)
    for index, level in enumerate(levels):
        gains = negative_distances(latents, level)[:, None]  # of adding a codeword to nothing
        for before in range(index):  # less twice what it shares with those before
            gains = gains - 2.0 * (levels[before] @ level.T)[codes[..., before]]
        totals = (scores[..., None] + gains).reshape(len(latents), -1)
        kept = 1 if index == len(levels) - 1 else min(beam, totals.shape[1])
        scores, best = _top(totals, kept)
        parent, code = jnp.divmod(best, len(level))
        codes = jnp.concatenate(
            [jnp.take_along_axis(codes, parent[..., None], axis=1), code[..., None]], axis=-1)
    return codes[:, 0]


def _top(scores: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """The largest entries of each row and where they are, [M, S] to [M, size] twice."""
    if size == 1:
        best = argmax(scores)[:, None]
        return jnp.take_along_axis(scores, best, axis=1), best
    return jax.lax.top_k(scores, size)
