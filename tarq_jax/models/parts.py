"""A target-attention model taken apart: what conversion needs to serve it as TARQ, forks included."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from tarq_jax.models.target_attention import TargetAttention
from tarq_jax.types import Batch, Features

Params = Any


class AttentionParts(NamedTuple):
    """The protocol of conversion: four pure functions of a trained model's parameters.

    The model may be anything whose logit is `head(context, attention of the item's query over the
    history's keys and values)`, with softmax attention scaled by 1 / sqrt(E) and queries that depend on
    the item alone. Positions, biases or gates that are added to the keys or the values fit in.

    Attributes:
      item_queries: (params, item features name -> [M, ...]) -> projected queries [H, M, E].
      keys_values: (params, batch) -> keys [B, H, N, E], values [B, H, N, E].
      context: (params, batch) -> whatever else the head reads; any pytree.
      head: (params, context, attended [B, H, G, E]) -> logits [B, G]. Fine-tuning trains those of
        `params` that only the head reads.
    """

    item_queries: Callable[[Params, Features], jax.Array]
    keys_values: Callable[[Params, Batch], tuple[jax.Array, jax.Array]]
    context: Callable[[Params, Batch], Any]
    head: Callable[[Params, Any, jax.Array], jax.Array]


def target_attention_parts(module: TargetAttention) -> AttentionParts:
    """The parts of this library's target attention, or of a subclass whose attention is still a softmax."""
    module = module.clone(compute=module.compute._replace(dtype=jnp.float32))  # what is quantized is float32
    kind = type(module)
    forward = nn.apply(kind.__call__, module)

    def keys_values(params, batch):
        output = forward(params, batch)
        return output.keys, output.values

    return AttentionParts(
        item_queries=nn.apply(kind.item_queries, module),
        keys_values=keys_values,
        context=lambda params, batch: forward(params, batch).backbone,
        head=lambda params, backbone, attended: nn.apply(kind.score, module)(
            params, attended, backbone)[0],
    )
