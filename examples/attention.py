"""Softmax attention with random features (Performer, Choromanski et al. 2020, arXiv 2009.14794).

    python -m examples.attention

Overrides `attend` of `ApproximateAttention`, of type (batch, backbone, H_t [B, N, D]) -> [B, H, G, E]. The
history is summed once into M x E numbers per head. A candidate costs as many products, whatever the history.
"""

import jax.numpy as jnp
import numpy as np

from examples import small
from tarq_jax.models.approximate_attention import ApproximateAttention
from tarq_jax.training.modules import common
from tarq_jax.training.objectives import supervised


def features(vectors, draws, axes):
    """`exp(<w_m, x> - |x|^2 / 2)` up to a factor shared over `axes`: [..., E] and [M, E] to [..., M]."""
    logs = vectors @ draws.T - jnp.sum(vectors**2, axis=-1, keepdims=True) / 2
    return jnp.exp(logs - logs.max(axis=axes, keepdims=True))


def random_feature_attention(queries, keys, values, mask, draws):
    """Approximates `multi_head_attention`, the better the more normal draws w, [M, E], there are."""
    queries, keys = (x / x.shape[-1] ** 0.25 for x in (queries, keys))
    of_keys = jnp.where(mask[:, None, :, None], features(keys, draws, (-2, -1)), 0.0)
    of_queries = features(queries, draws, -1)
    totals = of_queries @ of_keys.sum(axis=-2)[..., None]
    sums = of_queries @ (jnp.swapaxes(of_keys, -1, -2) @ values)
    return sums / jnp.maximum(totals, 1e-9)  # zero where the history is empty


class RandomFeatureAttention(ApproximateAttention):
    """Target attention with M = `num_features` random features."""

    num_features: int = 64

    def attend(self, batch, backbone, history):
        """See `random_feature_attention`."""
        queries, (keys, values) = self.query(backbone.candidates), self.attention.keys_values(history)
        draws = np.random.default_rng(0).normal(size=(self.num_features, keys.shape[-1])).astype(np.float32)
        return random_feature_attention(queries, keys, values, batch.history_mask, draws)


def random_features(model, loss_weights, schema, tables, axis_name):
    """The model, trained on labels."""
    module = RandomFeatureAttention(**common(model, schema, tables))
    return supervised(module, model.name, axis_name)


def compare(config, dataset):
    """One row each for exact, linear and random-feature attention."""
    own = "examples.attention:random_features"
    return small.table(config, dataset, ("target_attention", "linear_attention", own))


if __name__ == "__main__":
    small.run(compare)
