"""Containers shared by every layer of the library.

Axis legend, used in every shape comment:

    B request          G candidate of a request      N history position
    L level            K codeword of a level         D width
    H head             E = D / H, width of a head    M any flat set of items

All containers are frozen pytrees: `replace` returns a new one. Masks are boolean, True for real
entries. Features are dictionaries from field name to array, see `tarq_jax.schema`.
"""

from collections.abc import Mapping, Sequence

import chex
import jax
from flax import struct

Features = Mapping[str, chex.Array]
# Values per level: one array [L, K, ...], or L arrays [K_l, ...] if levels differ in size.
Levels = jax.Array | Sequence[jax.Array]


class Batch(struct.PyTreeNode):
    """Requests, each with one history and up to G candidates.

    `history` holds the item-side and event-side fields of past events, `candidates` the item-side
    fields. Entries whose mask is False are padding: id 0 (or 0.0), with zero weight. Leaves are NumPy
    arrays when they come from the pipeline, and JAX arrays on devices.
    """

    user_id: chex.Array  # [B] int32, groups metrics by user; not a feature
    user: Features  # [B, ...] user-side fields
    context: Features  # [B, ...] request-side fields
    history: Features  # [B, N, ...] item-side and event-side fields, oldest first
    history_mask: chex.Array  # [B, N] bool
    candidates: Features  # [B, G, ...] item-side fields
    candidate_mask: chex.Array  # [B, G] bool
    labels: chex.Array  # [B, G] float32 in {0, 1}
    weights: chex.Array  # [B, G] float32, weight of a candidate's label; 0 for padding


class Codebook(struct.PyTreeNode):
    """Codewords of a residual quantizer with their running statistics.

    Leaves are arrays [L, K, ...], or tuples of L arrays [K_l, ...] if levels differ in size. The
    codebook is kept apart from the network's parameters, so that every change to it is an explicit
    function `codebook -> codebook` in `tarq_jax.quantization`.
    """

    codewords: Levels  # [L, K, D] float32
    counts: Levels  # [L, K] float32, exponential moving average of assignments per step
    sums: Levels  # [L, K, D] float32, moving average of the sum of assigned residuals
    ages: Levels  # [L, K] float32, steps since a codeword was last chosen


class QuantizerOutput(struct.PyTreeNode):
    """The result of residual quantization of latents with leading axes `...`."""

    codes: jax.Array  # [..., L] int32
    quantized: jax.Array  # [..., D], sum of the chosen codewords over levels
    residuals: jax.Array  # [..., L, D], the input of each level (r_1 = latent)
    chosen: jax.Array  # [..., L, D], the codeword chosen at each level


class Expansion(struct.PyTreeNode):
    """First-order expansion of attention over a user's history at each codeword; see `tarq_jax.expansion`."""

    means: jax.Array  # [B, H, K, E], attention output at the codeword
    jacobians: jax.Array  # [B, H, K, E, E], derivative of the output (first E) by the query (second E)
