"""A recurrent user tower instead of self-attention: alone, and under target attention.

    python -m examples.backbone

Overrides `user_layers` of `TwoTower`, of type (batch, X [B, N, D]) -> a list of [B, any], v_user last, with a
GRU over the history (GRU4Rec, Hidasi et al. 2016, arXiv 1511.06939). `make_backbone` puts it under target
attention. A model that shares no code needs only a `__call__(batch)` whose output has `logits` [B, G].
"""

import functools

import jax.numpy as jnp
from flax import linen as nn

from examples import small
from tarq_jax.models import TargetAttention, TwoTower
from tarq_jax.training import modules, objectives


class GruTwoTower(TwoTower):
    """`v_user = MLP([x_user; last state of a GRU over X])`."""

    def setup(self):
        """Creates the parts; the parts that they replace are never called, and so have no parameters."""
        super().setup()
        self.gru = nn.RNN(nn.GRUCell(self.width), return_carry=True)

    def user_layers(self, batch, history):
        """The output of every layer of the user tower."""
        user = self.user_features({**batch.user, **batch.context}, batch.user_id.shape)
        state, _ = self.gru(history, seq_lengths=batch.history_mask.sum(axis=-1))
        state = jnp.where(batch.history_mask.any(axis=-1, keepdims=True), state, 0.0)
        return self.user_tower.layers(jnp.concatenate([user, state], axis=-1))


class GruTargetAttention(TargetAttention):
    """Target attention on that backbone."""

    def make_backbone(self):
        """The GRU two-tower model."""
        sizes = self.schema, self.width, self.num_heads, self.hidden
        return GruTwoTower(*sizes, compute=self.compute, tables=self.tables, parent=None)


def gru(model, loss_weights, schema, tables, axis_name, *, module=GruTwoTower):
    """The model, trained on labels."""
    return objectives.supervised(module(**modules.common(model, schema, tables)), model.name, axis_name)


gru_target_attention = functools.partial(gru, module=GruTargetAttention)


def compare(config, dataset):
    """A row per model, the library's models first."""
    own = (f"examples.backbone:{name}" for name in ("gru", "gru_target_attention"))
    return small.table(config, dataset, ("two_tower", "target_attention", *own))


if __name__ == "__main__":
    small.run(compare)
