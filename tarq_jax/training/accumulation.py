"""Gradient accumulation: a batch in micro-batches, one after the other, with the gradients of the whole."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tarq_jax import shards
from tarq_jax.training.objectives import LossOutput
from tarq_jax.types import Batch


def accumulate_gradients(
    loss: Callable[[Any, Batch], tuple[jax.Array, LossOutput]], variables: Any, batch: Batch, num: int
) -> tuple[LossOutput, Any]:
    """What a loss says of a batch, and its gradient by the variables, with the memory of a micro-batch.

    Args:
      loss: (variables, micro-batch) -> (loss, LossOutput), both adding up to those of the batch.
      variables: pytree.
      batch: of a number of requests that `num` divides.
      num: micro-batches; 1 looks at the batch at once.

    Returns:
      LossOutput of the whole batch, its quantizer's output in the order of the batch, and the gradient.
    """
    gradients_of = jax.grad(loss, has_aux=True)
    if num == 1:
        gradients, output = gradients_of(variables, batch)
        return output, gradients

    def add(total, micro_batch):
        gradients, output = gradients_of(variables, micro_batch)
        return jax.tree.map(jnp.add, total, (output.metrics, gradients)), output.quantizer

    micro_batches = shards.deal(batch, num)
    first = jax.tree.map(lambda leaf: leaf[0], micro_batches)
    gradients, output = jax.eval_shape(gradients_of, variables, first)
    start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (output.metrics, gradients))
    (metrics, gradients), quantizer = jax.lax.scan(add, start, micro_batches)
    return LossOutput(metrics, shards.undeal(quantizer)), gradients
