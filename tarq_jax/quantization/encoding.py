"""Residual quantization of latents: assignment, greedy and beam-search encoding, decoding.

Codewords are always passed as `Levels`: one array [L, K, D], or L arrays [K_l, D] if levels differ in
size. A level assigns its points by a function `(points [M, D], codewords [K, D]) -> codes [M]`:
`nearest`, `nearest_by_cosine` or `balanced`. A function that looks at all points together, as `balanced`
does, also takes a keyword `where` [M] bool, which marks the real points.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import chex
import jax
import jax.numpy as jnp

from tarq_jax import checks
from tarq_jax.blockwise import MASKED, best_block, check_block, split_blocks
from tarq_jax.distances import central, centred, inner_products, negative_distances
from tarq_jax.kernels import Implementation, pick
from tarq_jax.types import Levels, QuantizerOutput

LANES = 16  # least width, and most parts, that `argmax` cuts a row into on a CPU
SHORT = 48  # longest row along which `argmax` compares number by number on a CPU
SEARCHED = 4  # `_top` searches a row directly if it has at most this many entries per entry to find
Assign = Callable[..., jax.Array]  # (points, codewords) -> codes, perhaps with `where`
Tree = TypeVar("Tree")


def argmax(scores: jax.Array, axis: int = -1) -> jax.Array:
    """Index of the largest entry along `axis`, the first among equals: [..., K] to int32 [...].

    XLA vectorises the comparisons here on CPU, which it does not do with the paired reduction of
    `jnp.argmax`. A row of NaN gives its last index; one with some NaN, any.
    """
    size, axis = scores.shape[axis], axis % scores.ndim
    width = size
    if axis == scores.ndim - 1 and jax.default_backend() == "cpu":
        if size <= SHORT:
            return _argmax_by_column(scores)
        width = LANES * math.ceil(size / LANES**2)
    best = jnp.max(scores, axis=axis, keepdims=True)
    found: jax.Array | float = size
    for start in (*range(size - width, 0, -width), 0):  # backwards: the first among equals stays
        part = jax.lax.slice_in_dim(scores, start, start + width, axis=axis)
        indices = start + jax.lax.broadcasted_iota(jnp.float32, part.shape, axis)  # exact up to 2^24
        found = jnp.where(part >= best, indices, found)
    return jnp.minimum(jnp.min(found, axis=axis), size - 1).astype(jnp.int32)  # `size` if `best` is NaN


def _argmax_by_column(scores: jax.Array) -> jax.Array:
    """`argmax` along short rows: one pass, which compares a column of all rows after the other."""
    best, found = scores[..., 0], jnp.zeros(scores.shape[:-1], jnp.int32)
    for index in range(1, scores.shape[-1]):
        column = scores[..., index]
        best, found = jnp.maximum(best, column), jnp.where(column > best, index, found)
    return jnp.where(jnp.isnan(best), scores.shape[-1] - 1, found)


def nearest(points: jax.Array, codewords: jax.Array) -> jax.Array:
    """Index of the codeword at the smallest Euclidean distance: [M, D] and [K, D] to [M]."""
    return argmax(_half_scores(*centred(points, codewords)))


def _half_scores(points: jax.Array, codewords: jax.Array) -> jax.Array:
    """Half of `negative_distances`; `-|c|^2 / 2` is one more column of the product, which saves a pass."""
    ones = jnp.ones((*points.shape[:-1], 1), points.dtype)
    offsets = -0.5 * jnp.sum(codewords**2, axis=-1, keepdims=True)
    return inner_products(
        jnp.concatenate([points, ones], axis=-1), jnp.concatenate([codewords, offsets], axis=-1))


def nearest_by_cosine(points: jax.Array, codewords: jax.Array) -> jax.Array:
    """Index of the codeword with the largest cosine similarity; a codeword at the origin has similarity 0."""
    norms = jnp.linalg.norm(codewords, axis=-1)
    return argmax(inner_products(points, codewords) / jnp.where(norms > 0, norms, 1.0))


def balanced(
    points: jax.Array, codewords: jax.Array, *, temperature: float = 0.05, iterations: int = 20,
    where: jax.Array | None = None,
) -> jax.Array:
    """Spreads the points evenly over the codewords: entropic optimal transport (Cuturi 2013; Sinkhorn).

    Each codeword takes 1 / K of the points, so that the total squared distance is smallest. A point's code
    is the codeword that takes most of it. The codes depend on the batch: use this for training, not for
    serving.

    Args:
      points: [M, D].
      codewords: [K, D].
      temperature: entropy weight of the transport plan, relative to the mean squared distance; the lower
        it is, the nearer the plan is to a hard assignment.
      iterations: number of Sinkhorn iterations, in log space.
      where: [M] bool, points to spread; None spreads all. The values of the other points do not change
        the codes of these.

    Returns:
      [M].

    Raises:
      ValueError: `temperature` is not positive, or `iterations` is below 1.
    """
    checks.positive("temperature", temperature)
    checks.positive_int("iterations", iterations)
    points, codewords = centred(points, codewords)
    scores = negative_distances(points, codewords) - jnp.sum(points**2, axis=-1, keepdims=True)
    where = jnp.ones(len(points), bool) if where is None else jnp.asarray(where)
    chex.assert_shape(where, points.shape[:1])
    spread = where[:, None]
    mean = jnp.sum(-scores, where=spread) / jnp.maximum(jnp.sum(where) * len(codewords), 1)
    scale = temperature * mean
    log_plan = jax.lax.stop_gradient(scores / jnp.where(scale > 0, scale, 1.0))

    def normalise(_, log_plan):
        shares = jnp.where(spread, log_plan, MASKED)
        log_plan -= jax.nn.logsumexp(shares, axis=0, keepdims=True)  # codewords take equal shares
        return log_plan - jax.nn.logsumexp(log_plan, axis=1, keepdims=True)  # each point sums to one

    return argmax(jax.lax.fori_loop(0, iterations, normalise, log_plan))


def bind_where(function: Callable[..., Tree], where: jax.Array | None) -> Callable[..., Tree]:
    """`function` with the mask `where` of real points bound, if it has such a keyword; else unchanged."""
    if where is None or "where" not in inspect.signature(function).parameters:
        return function
    return functools.partial(function, where=where)


def encode(
    codewords: Levels, latents: jax.Array, *, assign: Assign = nearest, where: jax.Array | None = None,
    block: int | None = None, implementation: Implementation = None,
) -> QuantizerOutput:
    """Greedy residual quantization: each level quantizes the residual of the levels before it.

    Args:
      codewords: [L, K, D], or L arrays [K_l, D].
      latents: [..., D].
      assign: assigns the points of one level to its codewords.
      where: [...] bool, latents that are real; passed on to an `assign` that has such a keyword. None if
        all are real.
      block: most latents that go through all levels together, so that their distances stay in the
        cache. 0 encodes all latents together: right if `jit` splits them over devices, which would exchange
        blocks, and required if `assign` has `where`, because it depends on the batch. None chooses, see
        `tarq_jax.blockwise.best_block`.
      implementation: see `tarq_jax.kernels`; the kernel chooses its own blocks.

    Returns:
      Codes [..., L], quantized latents [..., D], residuals and chosen codewords [..., L, D]; all
      but the codes are differentiable.

    Raises:
      NotImplementedError: `implementation` is "pallas", and no kernel supports these arguments.
      ValueError: `block` is no whole number or negative, or set with an `assign` that has `where`; or
        `implementation` is unknown.

    Example:
      >>> codewords = jnp.array([[[0.0], [4.0]], [[-1.0], [1.0]]])
      >>> output = encode(codewords, jnp.array([[3.2]]))
      >>> output.codes.tolist(), output.quantized.tolist()
      ([[1, 0]], [[3.0]])
    """
    levels = as_levels(codewords, latents)
    if where is not None:
        chex.assert_shape(where, latents.shape[:-1])
        assign = bind_where(assign, jnp.ravel(where))
    refusal = f"assign is {assign}, expected nearest" if assign is not nearest else None
    kernel = pick("encode", implementation, levels, latents, refusal=refusal)
    if kernel:
        codes_of = functools.partial(kernel, jax.lax.stop_gradient(levels))
        return _encode_by(codes_of, levels, latents, block=0)
    check_block(block)
    if wide := _in_float32(levels, latents):
        codes = encode(*wide, assign=assign, block=block, implementation="xla").codes
        return with_codes(levels, latents, codes)
    if block is None and "where" not in inspect.signature(assign).parameters:
        block = best_block(math.prod(latents.shape[:-1]), max(map(len, levels)), 2048)
    if block:
        if "where" in inspect.signature(assign).parameters:
            raise ValueError(f"block is {block}, expected 0 with assign={assign}, which looks at all latents")
        def greedy_codes(points):
            return encode(levels, points, assign=assign, block=0, implementation="xla").codes

        return _encode_by(greedy_codes, levels, latents, block)

    def assigned(_, residual, level):
        return assign(residual.reshape(-1, residual.shape[-1]), level).reshape(residual.shape[:-1])

    return _descend(levels, latents, assigned)


def beam_encode(
    codewords: Levels, latents: jax.Array, *, beam: int, block: int | None = None
) -> QuantizerOutput:
    """Residual quantization that keeps the best `beam` partial sums at each level (Babenko et al. 2014).

    The error is never larger than that of `encode`: where the beam finds nothing nearer, the greedy codes
    are kept. With `beam=1` it equals `encode`. Takes memory for the products of all pairs of codewords of
    two levels, K_l x K_m numbers.

    Args:
      codewords: [L, K, D], or L arrays [K_l, D].
      latents: [..., D].
      beam: number of partial sums kept.
      block: most latents searched together, so that memory is bounded and scores stay in the cache;
        512 is fastest on CPU. 0 searches all together, with [M, beam, K] scores: right if `jit` splits
        latents over devices. None chooses, as for `encode`.

    Returns:
      As `encode`.

    Raises:
      ValueError: `beam` is below 1, or `block` is no whole number or negative.
    """
    checks.positive_int("beam", beam)
    check_block(block)
    levels = as_levels(codewords, latents)
    if beam == 1 or len(levels) == 1 or not latents.size:
        return encode(levels, latents, block=block)
    if wide := _in_float32(levels, latents):
        return with_codes(levels, latents, beam_encode(*wide, beam=beam, block=block).codes)
    if block is None:
        block = best_block(math.prod(latents.shape[:-1]), beam * max(map(len, levels)), 512)
    fixed = jax.lax.stop_gradient(levels)
    codes_of = functools.partial(_best_codes, levels=fixed, products=_products(fixed), beam=beam)
    return _encode_by(codes_of, levels, latents, block)


def _in_float32(
    levels: tuple[jax.Array, ...], latents: jax.Array
) -> tuple[tuple[jax.Array, ...], jax.Array] | None:
    """Both in float32, if they are of a smaller type: codes depend on small differences."""
    dtype = jnp.result_type(latents, *levels)
    wide = jnp.promote_types(dtype, jnp.float32)
    if dtype == wide:
        return None
    return tuple(level.astype(wide) for level in levels), jnp.asarray(latents).astype(wide)


def _encode_by(
    codes_of: Callable[[jax.Array], jax.Array], levels: tuple[jax.Array, ...], latents: jax.Array,
    block: int,
) -> QuantizerOutput:
    """Codes by `codes_of` ([M, D] to [M, L]), block by block; the rest of the output needs no blocks."""
    flat = jax.lax.stop_gradient(latents.reshape(-1, latents.shape[-1]))
    codes = _in_blocks(codes_of, flat, block)
    return with_codes(levels, latents, codes.reshape(*latents.shape[:-1], len(levels)))


def with_codes(codewords: Levels, latents: jax.Array, codes: jax.Array) -> QuantizerOutput:
    """The output of `encode` for latents [..., D] whose codes [..., L] are given."""
    levels = as_levels(codewords, latents)
    chex.assert_shape(codes, (*latents.shape[:-1], len(levels)))
    return _descend(levels, latents, lambda index, *_: codes[..., index])


def _descend(
    levels: tuple[jax.Array, ...], latents: jax.Array,
    code_of: Callable[[int, jax.Array, jax.Array], jax.Array],
) -> QuantizerOutput:
    """The output for codes by `code_of`, a function of (index of the level, residual, codewords)."""
    residual, codes, residuals, chosen = jnp.asarray(latents), [], [], []
    for index, level in enumerate(levels):
        codes.append(code_of(index, residual, level).astype(jnp.int32))
        residuals.append(residual)
        chosen.append(level[codes[-1]])
        residual = residual - chosen[-1]
    return QuantizerOutput(
        codes=jnp.stack(codes, axis=-1), quantized=functools.reduce(jnp.add, chosen),
        residuals=jnp.stack(residuals, axis=-2), chosen=jnp.stack(chosen, axis=-2))


def decode(codewords: Levels, codes: jax.Array) -> jax.Array:
    """Sums the codewords of the given codes: [L, K, D] and int [..., L], below K, to [..., D].

    Larger codes are clipped to K - 1, as JAX clips indices.

    Example:
      >>> decode(jnp.array([[[0.0], [4.0]], [[-1.0], [1.0]]]), jnp.array([1, 0])).tolist()
      [3.0]
    """
    levels = as_levels(codewords)
    chex.assert_axis_dimension(codes, -1, len(levels))
    return functools.reduce(jnp.add, (level[codes[..., index]] for index, level in enumerate(levels)))


def as_levels(codewords: Levels, latents: jax.Array | None = None) -> tuple[jax.Array, ...]:
    """The levels as a tuple of arrays [K_l, D], checked to have the width of the latents.

    Raises:
      ValueError: there is no level, or one without a codeword.
    """
    levels = tuple(jnp.asarray(level) for level in codewords)
    chex.assert_rank(levels, 2)
    if not levels or not all(map(len, levels)):
        raise ValueError(f"codewords: {len(levels)} levels of {[*map(len, levels)]} codewords, expected at "
                         f"least one level, and one codeword in each")
    chex.assert_equal_shape_suffix([*levels, *([] if latents is None else [latents])], 1)
    return levels


def _squared_error(output: QuantizerOutput, latents: jax.Array) -> jax.Array:
    return jnp.sum((latents - output.quantized) ** 2, axis=-1)


def _in_blocks(function: Callable[[jax.Array], Tree], points: jax.Array, block: int) -> Tree:
    """Applies `function`, from [M, D] to a tree of [M, ...], to one block of points after the other."""
    size = points.shape[0]
    if block and not isinstance(size, int):
        raise ValueError(f"block is {block}, expected 0 or None for a number of latents that is symbolic")
    if not block or block >= size:
        return function(points)
    found = jax.lax.map(function, split_blocks(points, block, 0))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:size], found)


def _best_codes(
    latents: jax.Array, levels: tuple[jax.Array, ...], products: Sequence[Sequence[jax.Array]], beam: int,
) -> jax.Array:
    """Codes [M, L] found by a beam, or the greedy codes where the beam's are not nearer; latents [M, D]."""
    greedy = encode(levels, latents, block=0, implementation="xla")
    found = with_codes(levels, latents, _beam_codes(latents, levels, products, beam))
    better = _squared_error(found, latents) < _squared_error(greedy, latents)
    return jnp.where(better[:, None], found.codes, greedy.codes)


def _products(levels: tuple[jax.Array, ...]) -> list[list[jax.Array]]:
    """For each level, `<b, c>` for the codewords b of each level before it and its own c: [K_b, K_c]."""
    levels = (levels[0] - central(levels[0]), *levels[1:])  # as in `_beam_codes`
    return [[inner_products(before, level) for before in levels[:index]]
            for index, level in enumerate(levels)]


def _beam_codes(
    latents: jax.Array, levels: tuple[jax.Array, ...], products: Sequence[Sequence[jax.Array]], beam: int,
) -> jax.Array:
    """Codes [M, L] of the best path that a beam finds, for latents x [M, D].

    Codeword c adds `<x - b_1 - ... - b_l, c> - |c|^2 / 2` to half the negative squared error of a path
    `b_1, ..., b_l`. Products of codewords come from `products`, so that those with x serve all paths.
    """
    latents, first = centred(latents, levels[0])
    codes: list[jax.Array] = []  # codes of the paths that are kept, [M, beam] per level
    scores = jnp.zeros((latents.shape[0], 1))  # scores of these paths: half the negative squared error
    for index, level in enumerate((first, *levels[1:])):
        taken = sum(pairs[code] for pairs, code in zip(products[index], codes, strict=True))
        totals = (scores[..., None] + _half_scores(latents, level)[:, None] - taken).reshape(
            latents.shape[0], scores.shape[1] * len(level))
        kept = 1 if index == len(levels) - 1 else min(beam, totals.shape[1])
        scores, best = _top(totals, kept)
        parents, code = jnp.divmod(best, len(level))
        codes = [jnp.take_along_axis(code, parents, axis=1) for code in codes] + [code]
    return jnp.concatenate(codes, axis=1)


def _top(scores: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """The largest `size` entries of each row [M, S] and their indices, [M, size] twice: `jax.lax.top_k`.

    For a small `size` it takes a tenth to a third of that function's time on CPU. The entries are all in the
    `size` groups with the largest maxima, so only these groups are searched; the groups are found by the
    same function.
    """
    width = scores.shape[1]
    if size == 1 or width <= SEARCHED * size:
        return _top_by_argmax(scores, size)
    group = 2 ** round(math.log2(width / size) / 2)  # then groups and entries to search are about as many
    padded = jnp.pad(scores, ((0, 0), (0, -width % group)), constant_values=-jnp.inf)
    grouped = padded.reshape(scores.shape[0], padded.shape[1] // group, group)
    _, groups = _top(grouped.max(axis=-1), size)
    searched = jnp.take_along_axis(grouped, groups[..., None], axis=1).reshape(scores.shape[0], size * group)
    values, found = _top(searched, size)
    return values, jnp.take_along_axis(groups, found // group, axis=1) * group + found % group


def _top_by_argmax(scores: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """As `_top`, one entry after the other.

    Scores are transposed, so that each pass is over all rows: passes along short rows do not vectorise.
    """
    if size == 1:
        where = argmax(scores)[:, None]
        return jnp.take_along_axis(scores, where, axis=1), where
    found: list[jax.Array] = []
    left = scores.T
    positions = jax.lax.broadcasted_iota(jnp.int32, left.shape, 0)
    for _ in range(size):
        found.append(argmax(left, axis=0))
        left = jnp.where(positions == found[-1], -jnp.inf, left)
    where = jnp.stack(found, axis=-1)
    return jnp.take_along_axis(scores, where, axis=1), where
