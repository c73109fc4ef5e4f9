"""Baselines that exchange the attention of target attention alone, see `tarq_jax.approximate_attention`.

Backbone, history encoder and head are those of target attention, so that what a comparison tells is the cost
of the attention. SDIM, ETA and SIM read recent events once more, by a network of their own: left out.
Attention in blocks and its recomputation (see `Compute`) are for the encoders alone.
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

Similarity = Callable[[Batch, TwoTowerOutput], jax.Array]  # of candidates and positions, [B, G, N] int


class ApproximateAttention(AttentionModel):
    """As target attention, with what subclasses make of `attend`."""

    def __call__(self, batch: Batch) -> InteractionOutput:
        """Scores every candidate of every request."""
        backbone = self.backbone(batch)
        history = self.history_encoder(backbone.history, batch.history_mask)
        logits, _ = self.score(self.attend(batch, backbone, history), backbone)
        return InteractionOutput(logits=logits, backbone=backbone)

    def attend(self, batch: Batch, backbone: TwoTowerOutput, history: jax.Array) -> jax.Array:
        """What every candidate attends, [B, H, G, E], over the encoded history H_t [B, N, D]."""
        raise NotImplementedError


class LinearAttention(ApproximateAttention):
    """Linear attention with the feature map elu + 1 (Katharopoulos et al. 2020, arXiv 2006.16236).

    There it is self-attention of a transformer; here candidates are the queries.
    """

    def attend(self, batch: Batch, backbone: TwoTowerOutput, history: jax.Array) -> jax.Array:
        """See `linear_attention`."""
        keys, values = self.attention.keys_values(history)
        return linear_attention(self.query(backbone.candidates), keys, values, batch.history_mask)


class Sdim(ApproximateAttention):
    """Attention by hash collisions (SDIM, arXiv 2205.10249).

    x_item and X are hashed, of which the paper also sums the latter; here the values of H_t are summed.

    Attributes:
      rounds: R, signatures of an item; the paper has 16.
      bits: T of a signature; the paper has 3.
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
    """Target attention over the positions of the history that a search selects for the candidate.

    ETA (arXiv 2108.04468) searches by hash, SIM (arXiv 2006.05639) by category. Both select from events as
    they are; here what is selected was encoded with the whole history before. SIM's times between events and
    the loss on its search are left out.

    Attributes:
      similarity: `by_hash` or `by_category`, or another.
      num_selected: positions at most; of equals the newest.
    """

    similarity: Similarity = by_hash
    num_selected: int = 16

    def attend(self, batch: Batch, backbone: TwoTowerOutput, history: jax.Array) -> jax.Array:
        """See `select` and `searched_attention`."""
        keys, values = self.attention.keys_values(history)
        selected = select(self.similarity(batch, backbone), batch.history_mask, self.num_selected)
        return searched_attention(self.query(backbone.candidates), keys, values, selected)


class Din(ApproximateAttention):
    """Weights by a small network instead of a product, not normalised (DIN, arXiv 1706.06978).

    The network compares x_item and X, of which the paper also sums the latter; here the values of H_t are
    summed. Hidden units are those of the paper but for GELU in place of PReLU or Dice.
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
