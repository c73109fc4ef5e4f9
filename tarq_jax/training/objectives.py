"""The objective of each model: `Objective` bundles a module's initialisation, loss and predictions."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import ml_collections
from flax import linen as nn

from tarq_jax import losses, shards, user_code
from tarq_jax.models import Tarq
from tarq_jax.models.embedding import LOOKUPS, ONE_DEVICE, Tables
from tarq_jax.models.tarq import AttentionComparison, TarqOutput
from tarq_jax.schema import Schema
from tarq_jax.training.modules import Supervised, as_served, make_module
from tarq_jax.types import Batch, Codebook, QuantizerOutput

Tree = TypeVar("Tree")

STUDENT, TEACHER = "tarq", "tarq_teacher"  # names of TARQ's predictors


class LossOutput(NamedTuple):
    """The output of a loss besides its value."""

    metrics: dict[str, jax.Array]  # scalars that add up over micro-batches and shards
    quantizer: QuantizerOutput | None  # input of the codebook's update


class Diagnostics(NamedTuple):
    """The arrays from which the health of a codebook is computed."""

    latents: jax.Array  # [B, G, D]
    quantizer: QuantizerOutput
    student_output: jax.Array  # [B, G, D], o
    teacher_output: jax.Array  # [B, G, D], o_ta


class Predictions(NamedTuple):
    """The predictions of a model, for evaluation."""

    logits: dict[str, jax.Array]  # predictor -> [B, G]; see `own_predictor`
    diagnostics: Diagnostics | None  # None for models that do not quantize


def own_predictor(predictors: Collection[str]) -> str:
    """The predictor that is the model itself: `STUDENT` if there is one, else the only one.

    Raises:
      ValueError: there are several, and none of them is `STUDENT`.
    """
    if STUDENT in predictors:
        return STUDENT
    if len(predictors) != 1:
        raise ValueError(f"predictors are {sorted(predictors)}, expected one, or {STUDENT!r} among them")
    return next(iter(predictors))


class Objective(NamedTuple):
    """A model as the training step sees it: pure functions.

    Attributes:
      init: (rng, batch, codewords) -> params.
      loss: (params, codewords, batch, active, whole) -> (loss [], LossOutput). `active` [] bool says
        whether the codebook is in use yet. `whole` is the full batch; `batch` is a micro-batch of it (see
        `tarq_jax.training.accumulation`) or the full batch itself. Means are divided by the weights of
        `whole`, so losses, metrics and gradients of the micro-batches add up to those of the full batch. If a
        batch is split by `tarq_jax.shards`, those of the shards add up in the same way.
      predict: (params, codewords, batch) -> Predictions.
      latents: (params, batch) -> the latents to quantize, [B, G, D]; None without a codebook.
      attention: (params, codewords, batch) -> attention of student and teacher by name of a head or level;
        None without a codebook.
      fit: (rng, latents [M, D]) -> the initial codebook; None for k-means, level by level.
      module: the module in the form that predicts, for serving and conversion; None if they must refuse the
        model.
      to_method: (params as NumPy arrays, codewords) -> the `tarq_jax.serving.method.Method` that serves the
        model; None for the library's own method for the module.
      lookups: (params, codewords, batch) -> the ids that the loss looks up in tables, as the collection
        `LOOKUPS` of `tarq_jax.models.embedding`. The loss must read the tables in it by `Embedding` alone; a
        step then passes it the collection `ROWS` instead, if the optimizer is `optimizers.RowWise`. None: the
        loss gets whole tables, and their gradients are whole tables too.
    """

    init: Callable[..., Any]
    loss: Callable[..., tuple[jax.Array, LossOutput]]
    predict: Callable[..., "Predictions"]
    latents: Callable[..., jax.Array] | None = None
    attention: Callable[..., dict[str, AttentionComparison]] | None = None
    fit: Callable[[jax.Array, jax.Array], Codebook] | None = None
    module: nn.Module | None = None
    to_method: Callable[..., Any] | None = None
    lookups: Callable[..., dict[str, Any]] | None = None


# A function like `build`: (config.model, config.loss_weights, schema, tables, axis_name) -> Objective
MakeObjective = Callable[
    [ml_collections.ConfigDict, Mapping[str, float], Schema, Tables, shards.AxisName], Objective]


def in_float32(output: Tree) -> Tree:
    """A model's output in float32, for losses and metrics, whatever type its networks compute in."""
    def convert(leaf):
        return leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(convert, output)


def lookups_of(module: nn.Module) -> Callable[..., dict[str, Any]]:
    """(params, arguments of the module) -> the ids that its `__call__` looks up, see `Objective`.

    Compiled, it costs only what it takes to compute the ids.
    """
    forward = nn.apply(type(module).__call__, module, mutable=LOOKUPS)
    return lambda *arguments: forward(*arguments)[1].get(LOOKUPS, {})


def supervised(module: Supervised, name: str, axis_name: shards.AxisName = None) -> Objective:
    """The objective with binary cross-entropy on the module's logits; its predictor is called `name`."""
    forward = nn.apply(type(module).__call__, module)

    def init(rng, batch, codewords):
        del codewords
        return module.init(rng, batch)

    def loss(params, codewords, batch, active, whole=None):
        del codewords, active
        logits = forward(params, batch).logits
        value = mean_of_batch(losses.binary_cross_entropy(logits, batch.labels), batch, whole, axis_name)
        return value, LossOutput({"loss": value}, None)

    def predict(params, codewords, batch):
        del codewords
        return Predictions({name: forward(params, batch).logits}, None)

    def lookups(params, codewords, batch):
        del codewords
        return lookups_of(module)(params, batch)

    return Objective(init, loss, predict, module=module, lookups=lookups)


def mean_of_batch(
    values: jax.Array, batch: Batch, whole: Batch | None = None, axis_name: shards.AxisName = None,
    where: jax.Array | None = None,
) -> jax.Array:
    """Weighted mean [] of `values` [A, G] over the first A requests of a batch.

    For a micro-batch or a shard: its contribution to the mean of the full batch. Each of S micro-batches has
    every S-th request of `whole`, so the first A requests of all S micro-batches are the first S A requests
    of `whole`. `where` [A] says which requests count; all if None.
    """
    whole = batch if whole is None else whole
    parts = len(whole.weights) // len(batch.weights)
    where = jnp.ones(len(values), bool) if where is None else where
    weights = batch.weights[: len(values)] * where[:, None]
    of = whole.weights[: len(values) * parts] * jnp.repeat(where, parts)[:, None]
    return losses.weighted_mean(values, weights, of=of, axis_name=axis_name)


def tarq_losses(
    output: TarqOutput, codewords: jax.Array, batch: Batch, whole: Batch | None = None,
    axis_name: shards.AxisName = None,
) -> dict[str, jax.Array]:
    """Every loss of docs/mathematics.md by name, [] each, not yet weighted; see `mean_of_batch`."""
    quantizer, teacher = output.quantizer, output.teacher
    aligned, levels = output.personalized.shape[:2]
    per_candidate = {
        "student": losses.binary_cross_entropy(output.logits, batch.labels),
        "teacher": losses.binary_cross_entropy(teacher.logits, batch.labels),
        "distillation": losses.distillation(output.logits, teacher.logits),
        "output_reconstruction": losses.output_reconstruction(
            output.attention_output, teacher.attention_output
        ),
        "alignment": losses.codebook_alignment(
            output.latents[:aligned], teacher.attention_output[:aligned], codewords[:levels],
            output.personalized, quantizer.chosen[:aligned, :, :levels],
            output.attended[:aligned, :, :levels],
        ),
        "commitment": losses.commitment(output.latents, quantizer.quantized),
        "codebook": losses.codebook_loss(quantizer.chosen, quantizer.residuals),
        "reconstruction": losses.squared_error(output.reconstruction, output.decoder_target),
    }
    counted = {"alignment": output.aligned}
    return {name: mean_of_batch(value, batch, whole, axis_name, counted.get(name))
            for name, value in per_candidate.items()}


WITHOUT_CODEBOOK = ("teacher", "reconstruction")  # losses that train before the codebook is in use


def tarq(
    module: Tarq, loss_weights: Mapping[str, float], served: Tarq | None = None,
    axis_name: shards.AxisName = None,
) -> Objective:
    """The objective with the weighted sum of `tarq_losses`; its predictors are `STUDENT` and `TEACHER`.

    Args:
      module: the module to train.
      loss_weights: the weight of every loss.
      served: the module that predicts, with the same parameters; `module` if None. It differs if training
        assigns codes depending on the batch.
      axis_name: name of the axis of shards that the loss is computed on, see `tarq_jax.shards`.

    Raises:
      ValueError: when the loss is first computed, if `loss_weights` names an unknown loss or misses one.
    """
    served = module if served is None else served
    sharded = module.clone(axis_name=axis_name)
    forward, forward_served = (nn.apply(type(part).__call__, part) for part in (sharded, served))

    def init(rng, batch, codewords):
        variables = module.init(rng, batch, codewords)
        alone = module.make_teacher().init(rng, batch)  # starts like target attention trained alone
        return {**variables, "params": {**variables["params"], "teacher": alone["params"]}}

    def loss(params, codewords, batch, active, whole=None):
        output = in_float32(forward(params, batch, codewords, active))
        values = tarq_losses(output, codewords, batch, whole, axis_name)
        if set(values) != set(loss_weights):
            raise ValueError(f"loss_weights names {sorted(loss_weights)}, expected {sorted(values)}")
        total = jnp.zeros(())
        for name, value in values.items():
            on = 1.0 if name in WITHOUT_CODEBOOK else jnp.where(active, 1.0, 0.0)
            total += loss_weights[name] * on * value
        metrics = {"loss": total} | {f"loss/{name}": value for name, value in values.items()}
        return total, LossOutput(metrics, output.quantizer)

    def predict(params, codewords, batch):
        output = in_float32(forward_served(params, batch, codewords))
        diagnostics = Diagnostics(
            output.latents, output.quantizer, output.attention_output, output.teacher.attention_output
        )
        return Predictions({STUDENT: output.logits, TEACHER: output.teacher.logits}, diagnostics)

    def attention(params, codewords, batch):
        return in_float32(nn.apply(type(served).compare_attention, served)(params, batch, codewords))

    def lookups(params, codewords, batch):
        return lookups_of(sharded)(params, batch, codewords)

    return Objective(
        init, loss, predict, latents=nn.apply(type(module).candidate_latents, module), attention=attention,
        module=served, lookups=lookups)


def build(
    model: ml_collections.ConfigDict, loss_weights: Mapping[str, float], schema: Schema,
    tables: Tables = ONE_DEVICE, axis_name: shards.AxisName = None,
) -> Objective:
    """The objective that `config.model` describes: one of the library's, or the result of MODULE:FUNCTION.

    Args:
      model: `config.model`.
      loss_weights: `config.loss_weights`.
      schema: schema of the data.
      tables: how embedding tables are kept and looked up.
      axis_name: name of the axis of shards that the loss is computed on, see `tarq_jax.shards`.

    Raises:
      ValueError: the model needs a field that the data does not have, or its function is missing.
    """
    if ":" in model.name:
        return user_code.call(
            "config.model.name", model.name, Objective, model, loss_weights, schema, tables, axis_name)
    module = make_module(model, schema, tables)
    if not isinstance(module, Tarq):
        return supervised(module, model.name, axis_name)
    return tarq(module, dict(loss_weights), as_served(module, model), axis_name)

