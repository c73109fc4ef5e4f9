"""A listwise loss beside the pointwise one: softmax cross-entropy over the candidates of a request.

    python -m examples.loss

Adds a loss of type (params, codewords, batch, active, whole) -> (loss, LossOutput), which takes the place of
`Objective.loss`; init and predictions stay the library's. ListNet, Cao et al. 2007. Listwise alone orders
candidates, and says nothing of how likely a click is: see the columns log loss and calibration.
"""

import functools

import jax
import jax.numpy as jnp

from examples import small
from tarq_jax.training.objectives import LossOutput, build, mean_of_batch

SHARES = (0.0, 0.5, 1.0)  # of the listwise loss in all


def listwise(logits, mask):
    """`-log softmax` over the real candidates of each request, [B, G]; weigh it by what was clicked."""
    mask = mask | ~mask.any(axis=-1, keepdims=True)  # a request without candidates: any finite number
    return -jax.nn.log_softmax(jnp.where(mask, logits, -jnp.inf))


def clicked(batch):
    """The batch with weight on clicked candidates alone."""
    return batch.replace(weights=batch.weights * batch.labels)


def make_objective(model, loss_weights, schema, tables, axis_name, *, share):
    """The library's objective with `share` of its loss listwise, for models that train on labels alone."""
    objective = build(model, loss_weights, schema, tables, axis_name)

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


def compare(config, dataset):
    """A row for each share of the listwise loss, on target attention."""
    made = {share: functools.partial(make_objective, share=share) for share in SHARES}
    return [small.table(config, dataset, {"target_attention": make})[0] | {"model": f"{share:.0%} listwise"}
            for share, make in made.items()]


if __name__ == "__main__":
    small.run(compare)
