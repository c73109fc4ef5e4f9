"""Corrections, which an order-1 codebook multiplies by its Jacobian: improved residuals of queries (ours).

The tangent `J_c (q - c)` overshoots if the query is far from its codeword, and more so if the attention is
sharp. There are two remedies; both are free at serving time, as an item's correction is computed offline.
`damping` shortens long residuals; `fit_corrections` replaces each residual by the least-squares solution over
calibration histories, the secant that fits them best.

Axis letters are those of `tarq_jax.types`. There are M items, in P blocks of S that share a codeword.
"""

import chex
import jax
import jax.numpy as jnp

from tarq_jax import checks
from tarq_jax.attention import multi_head_attention
from tarq_jax.expansion import Blocks, expand

TOGETHER = 256  # blocks of items whose exact attention is in memory at the same time


def damping(residuals: jax.Array, *, radius: float | jax.Array) -> jax.Array:
    """Factor that shortens long residuals: `1 / (1 + (|r| / radius)^2)`.

    Residuals much shorter than `radius` keep their length; no damped residual is longer than `radius / 2`.

    Args:
      residuals: [..., E], one head each.
      radius: length in the units of the query, above 0, broadcastable to [..., 1]; infinity damps nothing.

    Returns:
      [..., 1], to multiply with the residuals, or with each of the levels whose sum they are.

    Raises:
      ValueError: `radius` is not positive.

    Example:
      >>> damping(jnp.array([[3.0, 4.0]]), radius=5.0).tolist()
      [[0.5]]
    """
    checks.positive("radius", radius)
    return 1.0 / (1.0 + jnp.sum(residuals**2, axis=-1, keepdims=True) / jnp.square(radius))


def damping_radius(residuals: jax.Array, *, reach: float = 2.0) -> jax.Array:
    """Radii per head for `damping`: `reach` times the 90th percentile of lengths, [M, H, E] to [H, 1]."""
    lengths = jnp.linalg.norm(residuals, axis=-1)
    smallest = jnp.sqrt(jnp.finfo(lengths.dtype).tiny)  # its square is not zero
    return reach * jnp.quantile(lengths, 0.9, axis=0)[:, None] + smallest


def correction_statistics(
    codewords: jax.Array, blocks: Blocks, queries: jax.Array, keys: jax.Array, values: jax.Array,
    mask: chex.Array,
) -> tuple[jax.Array, jax.Array]:
    """Normal equations of every item's correction, summed over the given requests.

    For an item with query q and codeword c, summed over requests b: `sum_b J_bc^T J_bc` and
    `sum_b J_bc^T (o_b(q) - m_bc)`. Add the results up over calibration batches.

    Args:
      codewords: [H, K, E], codewords of level 1.
      blocks: from `group_by_code`, for the items' codes of level 1.
      queries: [H, P, S, E], projected queries of the items, in the order of `blocks.items`.
      keys: [B, H, N, E].
      values: [B, H, N, E].
      mask: [B, N] bool.

    Returns:
      [H, K, E, E] and [H, P, S, E].
    """
    chex.assert_shape(queries, (keys.shape[1], *blocks.items.shape, keys.shape[-1]))
    expansion = expand(codewords, keys, values, mask)
    normal = jnp.einsum("bhkef,bhkeg->hkfg", expansion.jacobians, expansion.jacobians)

    def moments(block):
        code, queries = block  # [], [H, S, E]
        exact = multi_head_attention(
            jnp.broadcast_to(queries, (len(keys), *queries.shape)), keys, values, mask)
        missing = exact - expansion.means[:, :, code, None]
        return jnp.einsum("bhef,bhse->hsf", expansion.jacobians[:, :, code], missing)

    in_blocks = jnp.asarray(blocks.codes), jnp.moveaxis(queries, 1, 0)
    return normal, jnp.moveaxis(jax.lax.map(moments, in_blocks, batch_size=TOGETHER), 0, 1)


def fit_corrections(
    normal: jax.Array, moments: jax.Array, blocks: Blocks, residuals: jax.Array, *, ridge: float = 0.01,
    reach: float = 2.0,
) -> jax.Array:
    """Corrections that minimise the squared error of the attention output over the calibration requests.

    `argmin_x sum_b |o_b(q) - m_bc - J_bc x|^2 + ridge * t |x - r|^2`, with t the mean eigenvalue of the
    normal matrix. In directions that the requests hardly determine, x stays equal to the residual r. If a
    codeword's attention is saturated in all requests, its Jacobians vanish, and the best x has no bound. It
    is therefore shortened to `reach` times the length of r; otherwise the error for another request could be
    large.

    Args:
      normal: [H, K, E, E], from `correction_statistics`, summed over batches.
      moments: [H, P, S, E], likewise.
      blocks: from `group_by_code`.
      residuals: [H, P, S, E], `q - c`.
      ridge: strength of the ridge, relative to the normal matrix; above 0, as that matrix may be singular.
      reach: maximal length of a correction, relative to the length of its residual.

    Returns:
      [H, P, S, E].

    Raises:
      ValueError: `ridge` is not positive.
    """
    checks.positive("ridge", ridge)
    chex.assert_equal_shape([moments, residuals])
    width = residuals.shape[-1]
    size = jnp.trace(normal, axis1=-2, axis2=-1) / width
    size = jnp.where(size > 0, size, 1.0)  # without data the residual stays
    inverse = jnp.linalg.inv(normal / size[..., None, None] + ridge * jnp.eye(width))
    pulled = moments / size[:, blocks.codes, None, None] + ridge * residuals
    fitted = jnp.einsum("hpfg,hpsg->hpsf", inverse[:, blocks.codes], pulled)
    length, longest = (jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (fitted, reach * residuals))
    return fitted * jnp.where(length > longest, longest / jnp.where(length > 0, length, 1.0), 1.0)
