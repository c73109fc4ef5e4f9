"""A hierarchical teacher: events attend within sessions, sessions to one another, candidates to events.

    python -m examples.hierarchical_teacher

Adds `SessionEncoder` of type (X [B, N, D], mask [B, N]) -> H_t [B, N, D], for `make_history_encoder`. As
candidates attend by softmax, it can be converted without retraining; or it teaches TARQ by `make_teacher`.
"""

import jax.numpy as jnp
from flax import linen as nn

from examples import small
from tarq_jax.models import TargetAttention, parts, two_tower
from tarq_jax.training import conversion, modules, objectives


class SessionEncoder(nn.Module):
    """Encodes sessions of `window` events: N x window + (N / window)^2 pairs instead of N^2."""

    num_heads: int
    window: int = 4

    @nn.compact
    def __call__(self, history, mask):
        """[B, N, D] with mask [B, N] to [B, N, D]."""
        (batch, positions, width), more = history.shape, -mask.shape[1] % self.window
        real = jnp.pad(mask, ((0, 0), (0, more))).reshape(-1, self.window)
        events = jnp.pad(history, ((0, 0), (0, more), (0, 0))).reshape(*real.shape, width)
        events = two_tower.HistoryEncoder(self.num_heads, width)(events, real)
        share = real / jnp.maximum(real.sum(axis=1, keepdims=True), 1)
        means = jnp.einsum("swd,sw->sd", events, share).reshape(batch, -1, width)
        sessions = two_tower.HistoryEncoder(self.num_heads, width)(means, real.any(1).reshape(batch, -1))
        return (events + sessions.reshape(-1, 1, width)).reshape(batch, -1, width)[:, :positions]


class SessionAttention(TargetAttention):
    """Target attention over events that are encoded with their session."""

    def make_history_encoder(self):
        """The encoder of the history."""
        return SessionEncoder(self.num_heads)


def hierarchical(model, loss_weights, schema, tables, axis_name):
    """The teacher alone, trained on labels."""
    module = SessionAttention(**modules.common(model, schema, tables))
    return objectives.supervised(module, model.name, axis_name)


def compare(config, dataset):
    """One row for the trained model, and one after its conversion to TARQ of order 1."""
    trained, = small.train_each(config, dataset, ["examples.hierarchical_teacher:hierarchical"]).values()
    module = SessionAttention(**modules.common(config.model, dataset.schema))
    model = conversion.trained_model(parts.target_attention_parts(module), trained.state.params, dataset)
    index = conversion.fit_index(model, num_codewords=config.model.num_codewords, order=1)
    return [trained.rows[0], conversion.evaluate_index(model, index, recall_k=4)[0] | {"model": "converted"}]


if __name__ == "__main__":
    small.run(compare)
