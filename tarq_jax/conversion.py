"""From a trained target-attention model to TARQ, without retraining (ours).

The projected queries of the items are quantized: `quantize_queries` gives an index of order 0, with one code
per item. Order 1 multiplies its Jacobian with a correction per item: `with_corrections` adds exact
corrections, `with_quantized_corrections` adds them quantized in further levels. Everything else (keys,
values, head) is the model's own.
"""

import functools
from collections.abc import Iterable

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tarq_jax import quantization
from tarq_jax.attention import multi_head_attention
from tarq_jax.corrections import correction_statistics, damping, damping_radius, fit_corrections
from tarq_jax.expansion import first_order, group_by_code

KeysValues = tuple[jax.Array, jax.Array, chex.Array]  # keys, values [B, H, N, E] and mask [B, N]


class ItemIndex(struct.PyTreeNode):
    """Items as codes: an index of one level is of order 0, one of more levels is of order 1."""

    levels: tuple[jax.Array, ...]  # L times [K_l, H, E]: level 1 for queries, further levels for corrections
    codes: jax.Array  # [V, L] int32

    @property
    def exact(self) -> bool:
        """Whether level 2 holds each item's own correction, as `with_corrections` adds it, not codewords."""
        return len(self.levels) == 2 and np.array_equal(self.codes[:, 1], np.arange(len(self.levels[1])))

    def chosen(self, items: chex.Array) -> list[jax.Array]:
        """The codewords of the given items, level by level: int [...] to L times [..., H, E]."""
        codes = self.codes[items]
        return [level[codes[..., index]] for index, level in enumerate(self.levels)]


def quantize_queries(
    rng: jax.Array, queries: jax.Array, *, num_codewords: int, weights: chex.Array | None = None
) -> ItemIndex:
    """An index of order 0: k-means on the items' queries, with all heads together.

    Args:
      rng: key for k-means.
      queries: [V, H, E], projected queries of all items.
      num_codewords: K, at most V.
      weights: [V], how often each item is a candidate; None weighs all items equally.

    Returns:
      An index of one level.

    Raises:
      ValueError: there are fewer items than codewords.
    """
    chex.assert_rank(queries, 3)
    flat = queries.reshape(len(queries), -1)
    fit = jax.jit(functools.partial(quantization.kmeans, num_codewords=num_codewords))
    codewords = fit(rng, flat, weights=weights)
    codes = quantization.encode(codewords[None], flat).codes
    return ItemIndex(levels=(codewords.reshape(-1, *queries.shape[1:]),), codes=codes)


def plain_corrections(index: ItemIndex, queries: jax.Array, calibration: Iterable[KeysValues]) -> jax.Array:
    """The residual `q - c` itself, [V, H, E]: the look-up is then the tangent at the codeword."""
    del calibration
    return queries - index.levels[0][index.codes[:, 0]]


def damped_corrections(
    index: ItemIndex, queries: jax.Array, calibration: Iterable[KeysValues], *, reach: float = 2.0
) -> jax.Array:
    """Residuals with long ones shortened; the radius is `reach` times the 90th percentile of the lengths."""
    residuals = plain_corrections(index, queries, calibration)
    return residuals * damping(residuals, radius=damping_radius(residuals, reach=reach))


def fitted_corrections(
    index: ItemIndex, queries: jax.Array, calibration: Iterable[KeysValues], *, ridge: float = 0.01
) -> jax.Array:
    """Corrections by least squares over calibration requests, see `tarq_jax.corrections`.

    Raises:
      ValueError: there is no calibration request, or `ridge` is not positive.
    """
    blocks = group_by_code(index.codes[:, 0])
    grouped = jnp.moveaxis(queries[blocks.items], 2, 0)  # [H, P, S, E]
    codewords = jnp.moveaxis(index.levels[0], 1, 0)
    measure = jax.jit(functools.partial(correction_statistics, codewords, blocks, grouped))
    total = None
    for keys, values, mask in calibration:
        found = measure(keys, values, mask)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    if total is None:
        raise ValueError("calibration has no requests, expected at least one")
    residuals = jnp.moveaxis(plain_corrections(index, queries, ())[blocks.items], 2, 0)
    fitted = jax.jit(functools.partial(fit_corrections, ridge=ridge))(*total, blocks, residuals)
    heads, width = fitted.shape[0], fitted.shape[-1]
    return jnp.swapaxes(fitted.reshape(heads, -1, width)[:, blocks.positions], 0, 1)


CORRECTIONS = {"plain": plain_corrections, "damped": damped_corrections, "fitted": fitted_corrections}


def with_corrections(index: ItemIndex, corrections: jax.Array) -> ItemIndex:
    """An index of order 1 that stores every item's exact correction [V, H, E]."""
    own = jnp.arange(len(corrections), dtype=jnp.int32)
    return ItemIndex(
        levels=(index.levels[0], jnp.asarray(corrections)), codes=jnp.stack([index.codes[:, 0], own], axis=1)
    )


def with_quantized_corrections(
    rng: jax.Array, index: ItemIndex, corrections: jax.Array, *, num_levels: int, num_codewords: int = 256
) -> ItemIndex:
    """An index of order 1 with `1 + num_levels` codes per item; corrections [V, H, E] are quantized."""
    flat = corrections.reshape(len(corrections), -1)
    fit = jax.jit(functools.partial(
        quantization.kmeans_codebook, num_levels=num_levels, num_codewords=num_codewords))
    codewords = fit(rng, flat).codewords
    codes = quantization.encode(codewords, flat).codes
    further = codewords.reshape(num_levels, -1, *corrections.shape[1:])
    return ItemIndex(
        levels=(index.levels[0], *further), codes=jnp.concatenate([index.codes[:, :1], codes], axis=1)
    )


def attend(
    index: ItemIndex, items: chex.Array, keys: jax.Array, values: jax.Array, mask: chex.Array
) -> jax.Array:
    """Attention output of the given items, as approximated by the index.

    Args:
      index: index of order 0 or 1.
      items: [B, G] int.
      keys: [B, H, N, E].
      values: [B, H, N, E].
      mask: [B, N] bool.

    Returns:
      [B, H, G, E].
    """
    centre, *further = (jnp.swapaxes(chosen, 1, 2) for chosen in index.chosen(items))

    def exactly(queries):
        return multi_head_attention(queries, keys, values, mask)

    if not further:
        return exactly(centre)
    value, changes = first_order(exactly, centre, jnp.stack(further).sum(axis=0, keepdims=True))
    return value + changes[0]


def relative_error(index: ItemIndex, corrections: jax.Array) -> float:
    """`|quantized - corrections| / |corrections|`, [V, H, E] each; the absolute error if all are 0.

    Raises:
      ValueError: the index is of order 0, which has no corrections.
    """
    if len(index.levels) == 1:
        raise ValueError("index has 1 level, expected further levels, which hold corrections")
    chex.assert_shape(corrections, (len(index.codes), *index.levels[0].shape[1:]))
    found = jnp.sum(jnp.stack(index.chosen(np.arange(len(corrections)))[1:]), axis=0)
    error, norm = jnp.linalg.norm(found - corrections), jnp.linalg.norm(corrections)
    return float(error / norm) if norm else float(error)
