"""From a trained target-attention model to TARQ, with nothing retrained (ours).

The projected queries of the items are quantized: `quantize_queries` gives an index of order 0, one code
an item. `with_corrections` adds what order 1 multiplies its Jacobian with, exactly or quantized in
further levels. Everything else (keys, values, head) stays the model's own.
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
    """Items as codes; of order 0 with one level, of order 1 with more."""

    levels: tuple[jax.Array, ...]  # L times [K_l, H, E]: level 1 of queries, further ones of corrections
    codes: jax.Array  # [V, L] int32

    @property
    def exact(self) -> bool:
        """Whether level 2 holds each item's own correction, as of `with_corrections`, and no codewords."""
        return len(self.levels) == 2 and np.array_equal(self.codes[:, 1], np.arange(len(self.levels[1])))

    def chosen(self, items: chex.Array) -> list[jax.Array]:
        """Each level's codeword of the given items: int [...] to L times [..., H, E]."""
        codes = self.codes[items]
        return [level[codes[..., index]] for index, level in enumerate(self.levels)]


def quantize_queries(
    rng: jax.Array, queries: jax.Array, *, num_codewords: int, weights: chex.Array | None = None
) -> ItemIndex:
    """Codes of order 0: k-means on the items' queries, all heads together.

    Args:
      rng: key.
      queries: [V, H, E], projected queries of all items.
      num_codewords: K, at most V.
      weights: [V], how often an item is a candidate; even if None.

    Returns:
      An index of one level.

    Raises:
      ValueError: with fewer items than codewords.
    """
    chex.assert_rank(queries, 3)
    flat = queries.reshape(len(queries), -1)
    fit = jax.jit(functools.partial(quantization.kmeans, num_codewords=num_codewords))
    codewords = fit(rng, flat, weights=weights)
    codes = quantization.encode(codewords[None], flat).codes
    return ItemIndex(levels=(codewords.reshape(-1, *queries.shape[1:]),), codes=codes)


def plain_corrections(index: ItemIndex, queries: jax.Array, calibration: Iterable[KeysValues]) -> jax.Array:
    """The tangent: the residual `q - c` itself, [V, H, E]."""
    del calibration
    return queries - index.levels[0][index.codes[:, 0]]


def damped_corrections(
    index: ItemIndex, queries: jax.Array, calibration: Iterable[KeysValues], *, reach: float = 2.0
) -> jax.Array:
    """Residuals, the longer ones shortened; the radius is `reach` times their 90th percentile."""
    residuals = plain_corrections(index, queries, calibration)
    return residuals * damping(residuals, radius=damping_radius(residuals, reach=reach))


def fitted_corrections(
    index: ItemIndex, queries: jax.Array, calibration: Iterable[KeysValues], *, ridge: float = 0.01
) -> jax.Array:
    """Least squares over calibration requests, see `tarq_jax.corrections`.

    Raises:
      ValueError: there is no calibration request.
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
    """An index of order 1 that keeps every item's correction [V, H, E] as it is."""
    own = jnp.arange(len(corrections), dtype=jnp.int32)
    return ItemIndex(
        levels=(index.levels[0], jnp.asarray(corrections)), codes=jnp.stack([index.codes[:, 0], own], axis=1)
    )


def with_quantized_corrections(
    rng: jax.Array, index: ItemIndex, corrections: jax.Array, *, num_levels: int, num_codewords: int = 256
) -> ItemIndex:
    """An index of order 1 of `1 + num_levels` codes an item: corrections [V, H, E] residual-quantized."""
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
    """Attention output of the given items as the index approximates it.

    Args:
      index: of order 0 or 1.
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
    """Norm of what the further levels leave of the corrections [V, H, E], relative to the corrections."""
    found = jnp.sum(jnp.stack(index.chosen(np.arange(len(corrections)))[1:]), axis=0)
    return float(jnp.linalg.norm(found - corrections) / jnp.linalg.norm(corrections))
