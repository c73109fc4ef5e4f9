"""Two-tower backbone: a user vector and an item vector meet in one inner product."""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from tarq_jax.models.embedding import ONE_DEVICE, Tables
from tarq_jax.models.layers import MLP, Compute, FeatureEncoder, MultiHeadAttention
from tarq_jax.schema import Schema
from tarq_jax.types import Batch


class TwoTowerOutput(struct.PyTreeNode):
    """Logits, and the vectors that the other models build on."""

    logits: jax.Array  # [B, G]
    user: jax.Array  # [B, D], v_user
    item: jax.Array  # [B, G, D], v_item
    candidates: jax.Array  # [B, G, D], x_item
    history: jax.Array  # [B, N, D], X


class InteractionOutput(struct.PyTreeNode):
    """Logits of a model that adds a term to the logits of two towers."""

    logits: jax.Array  # [B, G]
    backbone: TwoTowerOutput


class HistoryEncoder(nn.Module):
    """`H = X + MHA(X, X, X)`: self-attention over the history, around a residual connection."""

    num_heads: int
    width: int
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, history: jax.Array, mask: chex.Array) -> jax.Array:
        """[B, N, D] with mask [B, N] to [B, N, D]."""
        return history + MultiHeadAttention(self.num_heads, self.width, self.compute)(history, history, mask)


def history_encoder(num_heads: int, width: int, compute: Compute) -> HistoryEncoder:
    """A `HistoryEncoder`; with `compute.remat`, only its inputs are kept for the backward pass."""
    encoder = nn.remat(HistoryEncoder) if compute.remat else HistoryEncoder
    return encoder(num_heads, width, compute._replace(remat=False))  # attention is recomputed already


class TwoTower(nn.Module):
    """`logit = <v_user, v_item> / sqrt(D) + bias` (TARQ; docs/mathematics.md).

    `H_u = X + MHA(X, X, X)`, `h_u = MHA(x_user, H_u, H_u)`, `v_user = MLP([x_user; h_u])`,
    `v_item = MLP(x_item)`.

    Attributes:
      schema: fields of the data.
      width: D.
      num_heads: H.
      hidden: hidden widths of both towers.
      num_encoders: number of history encoders in the user tower. A second one gives a two-tower the
        sequence encoder and attention that target attention adds, without its interaction.
      compute: see `Compute`.
      tables: how embedding tables are stored and looked up.
    """

    schema: Schema
    width: int = 32
    num_heads: int = 2
    hidden: Sequence[int] = (64,)
    num_encoders: int = 1
    compute: Compute = Compute()
    tables: Tables = ONE_DEVICE

    def setup(self):
        """Creates the parts."""
        event, user = self.schema.side("event"), self.schema.side("user", "context")
        self.item_features = FeatureEncoder(self.schema.side("item"), self.width, self.tables)
        self.event_features = FeatureEncoder(event, self.width, self.tables) if event else None
        self.user_features = FeatureEncoder(user, self.width, self.tables)
        sizes, encoders = (self.num_heads, self.width, self.compute), range(self.num_encoders)
        self.history_encoder = [history_encoder(*sizes) for _ in encoders]
        self.history_attention = [MultiHeadAttention(*sizes) for _ in encoders]
        self.user_tower = MLP(self.hidden, self.width, self.compute)
        self.item_tower = MLP(self.hidden, self.width, self.compute)
        self.bias = self.param("bias", nn.initializers.zeros, ())

    def __call__(self, batch: Batch) -> TwoTowerOutput:
        """Scores every candidate of every request."""
        candidates, history = self.embed(batch)
        return self.score(self.user_vector(batch, history), candidates, history)

    def embed(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """x_item [B, G, D] and the history X [B, N, D]."""
        candidates = self.item_features(batch.candidates, batch.candidate_mask.shape)
        history = self.with_events(batch, self.item_features(batch.history, batch.history_mask.shape))
        return candidates.astype(self.compute.dtype), history.astype(self.compute.dtype)

    def score(self, user: jax.Array, candidates: jax.Array, history: jax.Array) -> TwoTowerOutput:
        """Scores x_item [B, G, D] against v_user [B, D]; the history X [B, N, D] is passed through."""
        item = self.item_tower(candidates)
        logits = jnp.einsum("bd,bgd->bg", user, item, preferred_element_type=jnp.float32)
        logits = logits / jnp.sqrt(self.width) + self.bias
        return TwoTowerOutput(logits=logits, user=user, item=item, candidates=candidates, history=history)

    def with_events(self, batch: Batch, items: jax.Array) -> jax.Array:
        """Adds the embedded event fields to the embeddings of a history's items: X, [B, N, D]."""
        if self.event_features is None:
            return items
        return items + self.event_features(batch.history, batch.history_mask.shape)

    def user_vector(self, batch: Batch, history: jax.Array) -> jax.Array:
        """v_user [B, D], from the history X [B, N, D] and the batch's user and context fields."""
        return self.user_layers(batch, history)[-1]

    def user_layers(self, batch: Batch, history: jax.Array) -> list[jax.Array]:
        """The outputs of every layer of the user tower: [B, any] each, v_user last."""
        parts = [self.user_features({**batch.user, **batch.context}, batch.user_id.shape)]
        for encode, attend in zip(self.history_encoder, self.history_attention, strict=True):
            encoded = encode(history, batch.history_mask)
            parts.append(attend(parts[0][:, None], encoded, batch.history_mask)[:, 0])
        return self.user_tower.layers(jnp.concatenate(parts, axis=-1))


class OnTwoTowers(nn.Module):
    """Base of the models that add a term to the logit of two towers, their `backbone`.

    Attributes:
      schema: fields of the data.
      width: D.
      num_heads: H.
      hidden: hidden widths of all MLPs.
      compute: see `Compute`.
      tables: how embedding tables are stored and looked up.
    """

    schema: Schema
    width: int = 32
    num_heads: int = 2
    hidden: Sequence[int] = (64,)
    compute: Compute = Compute()
    tables: Tables = ONE_DEVICE

    def setup(self):
        """Creates the backbone; subclasses add their own parts."""
        self.backbone = self.make_backbone()

    def make_backbone(self) -> TwoTower:
        """The two towers underneath, as a separate model."""
        sizes = self.schema, self.width, self.num_heads, self.hidden
        return TwoTower(*sizes, compute=self.compute, tables=self.tables, parent=None)
