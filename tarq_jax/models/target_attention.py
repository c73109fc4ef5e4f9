"""Target attention: every candidate attends over the user's history. The teacher of TARQ."""


import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from tarq_jax.models.layers import MLP, MultiHeadAttention
from tarq_jax.models.two_tower import OnTwoTowers, TwoTowerOutput, history_encoder
from tarq_jax.schema import ITEM_ID
from tarq_jax.types import Batch, Features


class TargetAttentionOutput(struct.PyTreeNode):
    """Logits, and the arrays that the student learns from."""

    logits: jax.Array  # [B, G]
    backbone: TwoTowerOutput
    queries: jax.Array  # [B, H, G, E], projected queries
    keys: jax.Array  # [B, H, N, E]
    values: jax.Array  # [B, H, N, E]
    history: jax.Array  # [B, N, D], H_t
    attention_output: jax.Array  # [B, G, D], o_ta


def interaction_features(attention_output: jax.Array, backbone: TwoTowerOutput) -> jax.Array:
    """`[o, x_item, o * x_item, v_user * v_item]`: [B, G, D] to [B, G, 4D]."""
    items = backbone.candidates
    towers = backbone.user[:, None] * backbone.item
    return jnp.concatenate([attention_output, items, attention_output * items, towers], axis=-1)


class AttentionModel(OnTwoTowers):
    """Base of the models in which candidates attend to an encoded history; lacks only the attention itself.

    `H_t = X + MHA(X, X, X)`; `o` is the output of some attention of the candidate over H_t;
    `logit = MLP([o, x_item, o * x_item, v_user * v_item]) + backbone logit`.
    """

    def setup(self):
        """Creates the parts."""
        super().setup()
        sizes, compute = (self.num_heads, self.width), self.compute
        self.history_encoder = self.make_history_encoder()
        self.query_tower = MLP(self.hidden, self.width, compute)
        self.attention = MultiHeadAttention(*sizes, compute)
        self.head = MLP(self.hidden, 1, compute)

    def make_history_encoder(self) -> nn.Module:
        """The module that encodes the history: (X [B, N, D], mask [B, N]) -> H_t [B, N, D]."""
        return history_encoder(self.num_heads, self.width, self.compute)

    def query(self, candidates: jax.Array) -> jax.Array:
        """Projected queries of item embeddings: [..., G, D] to [..., H, G, E]."""
        return self.attention.queries(self.query_tower(candidates))

    def score(self, attended: jax.Array, backbone: TwoTowerOutput) -> tuple[jax.Array, jax.Array]:
        """Logits [B, G] and attention output [B, G, D], from the output of each head, [B, H, G, E]."""
        attention_output = self.attention.outputs(attended)
        added = self.head(interaction_features(attention_output, backbone))[..., 0]
        return backbone.logits + added, attention_output


class TargetAttention(AttentionModel):
    """Backbone logit plus an MLP of the candidate's attention over the history (TARQ; docs/mathematics.md).

    An `AttentionModel` with `q = MLP(x_item)`, `o_ta = MHA(q, H_t, H_t)`.
    """

    def item_queries(self, items: Features) -> jax.Array:
        """Projected queries of items, from their features alone: name -> [M, ...] to [H, M, E]."""
        return self.query(self.backbone.item_features(items, items[ITEM_ID].shape))

    def __call__(self, batch: Batch) -> TargetAttentionOutput:
        """Scores every candidate of every request; the cost grows with candidates x history."""
        backbone = self.backbone(batch)
        history = self.history_encoder(backbone.history, batch.history_mask)
        queries = self.query(backbone.candidates)
        keys, values = self.attention.keys_values(history)
        attended = self.compute.attend(queries, keys, values, batch.history_mask)
        logits, attention_output = self.score(attended, backbone)
        return TargetAttentionOutput(
            logits=logits, backbone=backbone, queries=queries, keys=keys, values=values,
            history=history, attention_output=attention_output,
        )
