"""Gradient accumulation: computes the gradients of a full batch from micro-batches, one after the other."""

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
    """A loss's output for a batch and its gradient by the variables, in the memory of a micro-batch.

    Args:
      loss: (variables, micro-batch) -> (loss, LossOutput). The losses and metrics of the micro-batches must
        add up to those of the full batch.
      variables: pytree.
      batch: the full batch; `num` must divide its number of requests.
      num: number of micro-batches; 1 computes the batch in one piece.

    Returns:
      LossOutput of the full batch, with the quantizer's output in the order of the batch; and the gradient.
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
