"""The parts of a target-attention model, own forks included, that conversion needs to serve it as TARQ."""

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

    The model may be any whose logit is `head(context, attention of the item's query over the
    history's keys and values)`, with softmax attention scaled by 1 / sqrt(E) and queries that depend on
    the item alone. Its keys or values may include positions, biases or gates.

    Attributes:
      item_queries: (params, item features name -> [M, ...]) -> projected queries [H, M, E].
      keys_values: (params, batch) -> keys [B, H, N, E], values [B, H, N, E].
      context: (params, batch) -> everything else that the head reads; any pytree.
      head: (params, context, attended [B, H, G, E]) -> logits [B, G]. Fine-tuning trains the parameters
        that only the head reads.
    """

    item_queries: Callable[[Params, Features], jax.Array]
    keys_values: Callable[[Params, Batch], tuple[jax.Array, jax.Array]]
    context: Callable[[Params, Batch], Any]
    head: Callable[[Params, Any, jax.Array], jax.Array]


def with_float32(module: TargetAttention) -> TargetAttention:
    """The module with float32 activations, whose queries are quantized."""
    return module.clone(compute=module.compute._replace(dtype=jnp.float32))


def target_attention_parts(module: TargetAttention) -> AttentionParts:
    """The parts of this library's target attention, or of a subclass whose attention is still a softmax.

    Queries are those of `item_queries` and logits those of `score`. If a subclass changes either in its
    `__call__`, the parts are not those of its model, see `tarq_jax.training.conversion.check_logits`.
    """
    module = with_float32(module)
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
