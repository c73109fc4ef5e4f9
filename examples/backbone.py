"""A recurrent user tower in place of self-attention: the backbone alone, and under target attention.

    python -m examples.backbone

Overrides `user_layers` of the two towers, of type (batch, X [B, N, D]) -> a list of [B, any], v_user last: a
GRU over the history (GRU4Rec, Hidasi et al. 2016, arXiv 1511.06939). `make_backbone` puts it under target
attention. A model that shares nothing needs no more than a `__call__(batch)` with `logits` [B, G].
"""

import jax.numpy as jnp
from flax import linen as nn

from examples import small
from tarq_jax.models import TargetAttention, TwoTower
from tarq_jax.training.objectives import supervised


class GruTwoTower(TwoTower):
    """`v_user = MLP([x_user; last state of a GRU over X])`."""

    def setup(self):
        """Creates the parts; what they replace is never called, and so has no parameters."""
        super().setup()
        self.gru = nn.RNN(nn.GRUCell(self.width), return_carry=True)

    def user_layers(self, batch, history):
        """What every layer of the user tower gives."""
        user = self.user_features({**batch.user, **batch.context}, batch.user_id.shape)
        state, _ = self.gru(history, seq_lengths=batch.history_mask.sum(axis=-1))
        state = jnp.where(batch.history_mask.any(axis=-1, keepdims=True), state, 0.0)
        return self.user_tower.layers(jnp.concatenate([user, state], axis=-1))


class GruTargetAttention(TargetAttention):
    """Target attention on that backbone."""

    def make_backbone(self):
        """The two towers below."""
        return GruTwoTower(
            self.schema, self.width, self.num_heads, self.hidden, tables=self.tables, parent=None)


MODULES = {"gru": GruTwoTower, "gru_target_attention": GruTargetAttention}


def make_objective(model, loss_weights, schema, tables, axis_name):
    """The model of that name, on labels."""
    module = MODULES[model.name](*small.sizes(model, schema), tables=tables)
    return supervised(module, model.name, axis_name)


def compare(config, dataset):
    """A row a model, those of the library first."""
    made = {"two_tower": None, "target_attention": None, **dict.fromkeys(MODULES, make_objective)}
    return small.table(config, dataset, made)


if __name__ == "__main__":
    small.run(compare)
