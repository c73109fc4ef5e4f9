"""COLD: squeeze-and-excitation over groups of features, and an MLP (arXiv 2007.16122)."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from tarq_jax.models.layers import MLP
from tarq_jax.models.two_tower import InteractionOutput, OnTwoTowers
from tarq_jax.types import Batch

GROUPS = 4


class Cold(OnTwoTowers):
    """Backbone logit plus an MLP of feature groups, each scaled by one weight that depends on all.

    `g = [v_user, x_item, v_item, v_user * v_item]`, `s = sigmoid(W g + b)`,
    `logit = MLP([s_1 g_1, ..., s_4 g_4]) + backbone logit`.

    After Wang et al. 2020 (arXiv 2007.16122). The paper's groups are embedded features, and its weights
    select those that are worth their cost; here the groups come from the two towers, and all are kept. The
    paper adds no inner product to the MLP.
    """

    def setup(self):
        """Creates the parts."""
        super().setup()
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
        """Scales each group of features [..., D] by its weight and concatenates them: [..., 4D]."""
        gates = nn.sigmoid(self.gates(jnp.concatenate(groups, axis=-1)))
        return jnp.concatenate([gates[..., i, None] * group for i, group in enumerate(groups)], axis=-1)
