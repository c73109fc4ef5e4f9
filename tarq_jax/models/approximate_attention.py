"""Baselines that replace only the attention of target attention, see `tarq_jax.approximate_attention`.

Backbone, history encoder and head are those of target attention, so that a comparison shows the effect of the
attention alone. SDIM, ETA and SIM also read recent events by a separate network, which is left out here.
Blocks and recomputation of attention (see `Compute`) apply to the encoders only.
"""

from collections.abc import Callable

import jax

from tarq_jax.approximate_attention import (
    activation_unit_attention,
    category_similarity,
    collision_attention,
    hash_planes,
    hash_similarity,
    linear_attention,
    searched_attention,
    select,
)
from tarq_jax.models.layers import MLP
from tarq_jax.models.target_attention import AttentionModel
from tarq_jax.models.two_tower import InteractionOutput, TwoTowerOutput
from tarq_jax.types import Batch

Similarity = Callable[[Batch, TwoTowerOutput], jax.Array]  # each candidate to each position, [B, G, N] int


class ApproximateAttention(AttentionModel):
    """Target attention with another attention, which subclasses define in `attend`."""

    def __call__(self, batch: Batch) -> InteractionOutput:
        """Scores every candidate of every request."""
        backbone = self.backbone(batch)
        history = self.history_encoder(backbone.history, batch.history_mask)
        logits, _ = self.score(self.attend(batch, backbone, history), backbone)
        return InteractionOutput(logits=logits, backbone=backbone)

    def attend(self, batch: Batch, backbone: TwoTowerOutput, history: jax.Array) -> jax.Array:
        """Every candidate's attention output [B, H, G, E] over the encoded history H_t [B, N, D]."""
        raise NotImplementedError


class LinearAttention(ApproximateAttention):
    """Linear attention with the feature map elu + 1 (Katharopoulos et al. 2020, arXiv 2006.16236).

    In the paper it is the self-attention of a transformer; here the candidates are the queries.
    """

    def attend(self, batch: Batch, backbone: TwoTowerOutput, history: jax.Array) -> jax.Array:
        """See `linear_attention`."""
        keys, values = self.attention.keys_values(history)
        return linear_attention(self.query(backbone.candidates), keys, values, batch.history_mask)


class Sdim(ApproximateAttention):
    """Attention by hash collisions (SDIM, arXiv 2205.10249).

    x_item and X are hashed. The paper also sums X; here the values of H_t are summed.

    Attributes:
      rounds: R, number of signatures per item; 16 in the paper.
      bits: T, number of bits per signature; 3 in the paper.
    """

    rounds: int = 16
    bits: int = 3

    def attend(self, batch: Batch, backbone: TwoTowerOutput, history: jax.Array) -> jax.Array:
        """See `collision_attention`."""
        planes = hash_planes(self.width, self.rounds, self.bits)
        return collision_attention(backbone.candidates, backbone.history, self.attention.values(history),
                                   batch.history_mask, planes)


def by_hash(batch: Batch, backbone: TwoTowerOutput, *, rounds: int = 16, bits: int = 3) -> jax.Array:
    """Similarity of x_item and X by `rounds` times `bits` signs (ETA, arXiv 2108.04468): [B, G, N]."""
    planes = hash_planes(backbone.user.shape[-1], rounds, bits)
    return hash_similarity(backbone.candidates, backbone.history, planes)


def by_category(batch: Batch, backbone: TwoTowerOutput, *, field: str) -> jax.Array:
    """Whether candidate and event have the same `field` (hard search of SIM, arXiv 2006.05639): [B, G, N]."""
    return category_similarity(batch.candidates[field], batch.history[field])


class HardSearch(ApproximateAttention):
    """Target attention over the positions of the history that a search selects for each candidate.

    ETA (arXiv 2108.04468) searches by hash, SIM (arXiv 2006.05639) by category. Both attend to the selected
    events themselves; here the whole history is encoded before positions are selected. SIM's time intervals
    between events and its loss on the search are left out.

    Attributes:
      similarity: `by_hash`, `by_category` or another function of this type.
      num_selected: maximal number of positions; among equally similar ones, the newest are selected.
    """

    similarity: Similarity = by_hash
    num_selected: int = 16

    def attend(self, batch: Batch, backbone: TwoTowerOutput, history: jax.Array) -> jax.Array:
        """See `select` and `searched_attention`."""
        keys, values = self.attention.keys_values(history)
        selected = select(self.similarity(batch, backbone), batch.history_mask, self.num_selected)
        return searched_attention(self.query(backbone.candidates), keys, values, selected)


class Din(ApproximateAttention):
    """Attention weights from a small network instead of a product, not normalised (DIN, arXiv 1706.06978).

    The network compares x_item and X. The paper also sums X; here the values of H_t are summed. The number of
    hidden units is the paper's; the activation is GELU instead of PReLU or Dice.
    """

    def setup(self):
        """Creates the parts."""
        super().setup()
        self.unit = MLP((36,), 1, self.compute)

    def attend(self, batch: Batch, backbone: TwoTowerOutput, history: jax.Array) -> jax.Array:
        """See `activation_unit_attention`."""
        return activation_unit_attention(
            backbone.candidates, backbone.history, self.attention.values(history), batch.history_mask,
            lambda pairs: self.unit(pairs)[..., 0])
