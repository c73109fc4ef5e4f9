"""COLD: squeeze-and-excitation over groups of features, and an MLP (arXiv 2007.16122)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from tarq_jax.models.embedding import ONE_DEVICE, Tables
from tarq_jax.models.layers import MLP, Compute
from tarq_jax.models.two_tower import InteractionOutput, TwoTower
from tarq_jax.schema import Schema
from tarq_jax.types import Batch

GROUPS = 4


class Cold(nn.Module):
    """Backbone logit plus an MLP of feature groups, each weighted by one number.

    `g = [v_user, x_item, v_item, v_user * v_item]`, `s = sigmoid(W g + b)`,
    `logit = MLP([s_1 g_1, ..., s_4 g_4]) + backbone logit`.

    After Wang et al. 2020 (arXiv 2007.16122). Its groups are embedded features, of which the weights select
    those that are worth their cost; here they are what two towers make of the features, and all are kept. It
    has no inner product beside the MLP.

    Attributes:
      schema: fields of the data.
      width: D.
      num_heads: H.
      hidden: hidden widths of all MLPs.
      compute: see `Compute`.
      tables: how embedding tables are kept and looked up.
    """

    schema: Schema
    width: int = 32
    num_heads: int = 2
    hidden: Sequence[int] = (64,)
    compute: Compute = Compute()
    tables: Tables = ONE_DEVICE

    def setup(self):
        """Creates the parts."""
        self.backbone = TwoTower(
            self.schema, self.width, self.num_heads, self.hidden, compute=self.compute, tables=self.tables)
        self.gates = nn.Dense(GROUPS, dtype=self.compute.dtype)
        self.head = MLP(self.hidden, 1, self.compute)

    def __call__(self, batch: Batch) -> InteractionOutput:
        """Scores every candidate of every request."""
        backbone = self.backbone(batch)
        items, vectors = backbone.candidates, backbone.item
        users = jnp.broadcast_to(backbone.user[:, None], vectors.shape)
        added = self.head(self.weighted(users, items, vectors, users * vectors))[..., 0]
        return InteractionOutput(logits=backbone.logits + added, backbone=backbone)

    def weighted(self, *groups: jax.Array) -> jax.Array:
        """Groups of features [..., D] each, weighted and side by side: [..., 4D]."""
        gates = nn.sigmoid(self.gates(jnp.concatenate(groups, axis=-1)))
        return jnp.concatenate([gates[..., i, None] * group for i, group in enumerate(groups)], axis=-1)
