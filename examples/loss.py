"""A listwise loss in addition to the pointwise one: softmax cross-entropy over a request's candidates.

    python -m examples.loss

Adds a loss of type (params, codewords, batch, active, whole) -> (loss, LossOutput), which replaces
`Objective.loss`; the library initialises and predicts as before. ListNet, Cao et al. 2007. A listwise loss
alone orders candidates but does not give click probabilities: see the columns log loss and calibration.
"""

import functools

import jax
import jax.numpy as jnp

from examples import small
from tarq_jax.models import TargetAttention
from tarq_jax.training.modules import common
from tarq_jax.training.objectives import LossOutput, mean_of_batch, supervised


def listwise(logits, mask):
    """`-log softmax` over the real candidates of each request, [B, G]; to be weighted by clicks."""
    mask = mask | ~mask.any(axis=-1, keepdims=True)  # without candidates: any finite number
    return -jax.nn.log_softmax(jnp.where(mask, logits, -jnp.inf))


def clicked(batch):
    """The batch with weights only on clicked candidates."""
    return batch.replace(weights=batch.weights * batch.labels)


def listwise_only(model, loss_weights, schema, tables, axis_name, *, share=1.0):
    """Target attention whose loss is listwise with weight `share`, else pointwise."""
    module = TargetAttention(**common(model, schema, tables))
    objective = supervised(module, model.name, axis_name)

    def loss(params, codewords, batch, active, whole=None):
        whole = batch if whole is None else whole
        logits = objective.predict(params, codewords, batch).logits[model.name]
        values = listwise(logits, batch.candidate_mask)
        ordered = mean_of_batch(values, clicked(batch), clicked(whole), axis_name)
        pointwise, _ = objective.loss(params, codewords, batch, active, whole)
        total = (1.0 - share) * pointwise + share * ordered
        metrics = {"loss": total, "loss/pointwise": pointwise, "loss/listwise": ordered}
        return total, LossOutput(metrics, None)

    return objective._replace(loss=loss)


half_listwise = functools.partial(listwise_only, share=0.5)


def compare(config, dataset):
    """One row each for a loss that is not, half or fully listwise."""
    own = ("examples.loss:half_listwise", "examples.loss:listwise_only")
    return small.table(config, dataset, ("target_attention", *own))


if __name__ == "__main__":
    small.run(compare)
