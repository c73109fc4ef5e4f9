"""Conversion of a trained run: queries of its items, calibration on its data, evaluation, fine-tuning."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tarq_jax import checks, conversion, data, losses
from tarq_jax.attention import multi_head_attention
from tarq_jax.conversion import ItemIndex, KeysValues
from tarq_jax.data import ITEM_ID
from tarq_jax.models.parts import AttentionParts, with_float32
from tarq_jax.models.target_attention import TargetAttention
from tarq_jax.training import setup
from tarq_jax.training.evaluate import Row, evaluate
from tarq_jax.training.objectives import STUDENT, TEACHER, Diagnostics, Predictions
from tarq_jax.types import Batch, QuantizerOutput

ITEM_BATCH = 4096  # items per batch when queries are projected
CALIBRATION_BATCH = 8  # requests per batch that all items attend over
TOLERANCE = 1e-3  # between float32 logits that are computed in two ways, relative to the largest


class TrainedModel(NamedTuple):
    """The model to convert, in parts, with its data."""

    parts: AttentionParts
    params: Any
    dataset: data.Dataset
    queries: jax.Array  # [V, H, E], projected queries of all items
    counts: np.ndarray  # [V] float32, how often each item is a training candidate; 0 for padding


def trained_model(parts: AttentionParts, params: Any, dataset: data.Dataset) -> TrainedModel:
    """A `TrainedModel` with the projected queries of all items; row 0, padding, is zero."""
    compute = jax.jit(parts.item_queries)
    with jax.default_matmul_precision("highest"):
        found = [np.swapaxes(compute(params, features), 0, 1)[mask]
                 for features, mask in data.item_batches(dataset, ITEM_BATCH)]
    queries = np.concatenate([np.zeros_like(found[0][:1]), *found])
    counts = data.count_candidates(dataset, "train").astype(np.float32)
    counts[0] = 0.0
    return TrainedModel(parts, params, dataset, jnp.asarray(queries), counts)


def check_logits(model: TrainedModel, module: TargetAttention) -> None:
    """Compares the parts, with exact attention, with the module that they were taken from, on one batch.

    Raises:
      ValueError: their logits differ by more than `TOLERANCE`.
    """
    each = ItemIndex(levels=(model.queries,), codes=jnp.arange(len(model.queries))[:, None])
    module = with_float32(module)

    @jax.jit
    def logits(batch):
        _, attended = exact_and_approximate(model, each, batch)
        composed = model.parts.head(model.params, model.parts.context(model.params, batch), attended)
        output: Any = module.apply(model.params, batch)
        return composed, output.logits

    batch = next(_training_batches(model, CALIBRATION_BATCH, seed=0))
    with jax.default_matmul_precision("highest"):
        composed, own = (np.asarray(found)[batch.candidate_mask] for found in logits(batch))
    difference = np.max(np.abs(composed - own), initial=0.0)
    most = TOLERANCE * np.max(np.abs(own), initial=1.0)
    if not difference <= most:  # nor if it is NaN
        raise ValueError(f"{type(module).__name__}: the logits of its parts differ by up to {difference:.3g} "
                         f"from those of __call__, expected at most {most:.3g}: its queries must be those of "
                         f"item_queries, its logits those of score")


def _training_batches(model: TrainedModel, size: int, seed: int) -> Iterator[Batch]:
    """Endless batches of `size` training requests, or of all if there are fewer."""
    return data.train_batches(
        model.dataset, "train", batch_size=min(size, len(model.dataset.splits["train"])), seed=seed,
        **setup.batch_shapes(model.dataset))


def calibration(model: TrainedModel, *, requests: int, seed: int = 0) -> Iterator[KeysValues]:
    """Keys, values and masks of about `requests` training requests, `CALIBRATION_BATCH` at a time.

    Raises:
      ValueError: `requests` is below 1.
    """
    checks.positive_int("requests", requests)
    compute = jax.jit(model.parts.keys_values)
    size = min(CALIBRATION_BATCH, requests, len(model.dataset.splits["train"]))
    batches = itertools.islice(_training_batches(model, size, seed), -(-requests // size))
    return ((*compute(model.params, batch), batch.history_mask) for batch in batches)


def check_codewords(model: TrainedModel, num_codewords: int) -> None:
    """Raises ValueError if more codewords are requested than items are candidates in training."""
    if num_codewords > (items := np.count_nonzero(model.counts)):
        raise ValueError(f"{num_codewords} codewords are asked for, expected at most {items}, one for each "
                         f"item that is a candidate in the training split")


def fit_index(
    model: TrainedModel, *, num_codewords: int, order: int, correction: str = "fitted", requests: int = 512,
    seed: int = 0,
) -> ItemIndex:
    """An index of the model's items: of order 0, or of order 1 with exact (not quantized) corrections.

    Args:
      model: model to convert.
      num_codewords: K of level 1.
      order: 0 or 1.
      correction: how the correction of an item is found, a key of `tarq_jax.conversion.CORRECTIONS`.
      requests: number of training requests that fitted corrections use.
      seed: seed of k-means and of the order of the data.

    Raises:
      ValueError: fewer items are candidates in training than there are codewords, `order` or `correction`
        is none of those above, or `requests` is below 1.
    """
    if order not in (0, 1):
        raise ValueError(f"order is {order}, expected 0 or 1")
    if correction not in conversion.CORRECTIONS:
        raise ValueError(f"correction is {correction!r}, expected one of {sorted(conversion.CORRECTIONS)}")
    check_codewords(model, num_codewords)
    seen = calibration(model, requests=requests, seed=seed)
    index = conversion.quantize_queries(
        jax.random.key(seed), model.queries, num_codewords=num_codewords,
        weights=model.counts)
    if order == 0:
        return index
    return conversion.with_corrections(index, conversion.CORRECTIONS[correction](index, model.queries, seen))


def quantize_corrections(index: ItemIndex, *, num_levels: int, seed: int = 0) -> ItemIndex:
    """Quantizes the exact corrections of an index in levels of at most 256 codewords, one byte per item each.

    Args:
      index: index of order 1 from `fit_index`.
      num_levels: number of levels for the corrections.
      seed: seed of k-means.

    Raises:
      ValueError: the index is of order 0, its corrections are quantized, or `num_levels` is below 1.
    """
    if not index.exact:
        kind = "quantized corrections" if len(index.levels) > 1 else "no corrections"
        raise ValueError(f"index has {kind}, expected the exact ones of fit_index(order=1)")
    rng = jax.random.fold_in(jax.random.key(seed), 1)
    return conversion.with_quantized_corrections(
        rng, index, index.levels[1], num_levels=num_levels, num_codewords=min(256, len(index.codes)))


def exact_and_approximate(
    model: TrainedModel, index: ItemIndex, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Attention output of a batch's candidates, [B, H, G, E] twice: exact, and by the index."""
    items, mask = batch.candidates[ITEM_ID], batch.history_mask
    keys, values = model.parts.keys_values(model.params, batch)
    queries = jnp.swapaxes(model.queries[items], 1, 2)
    exact = multi_head_attention(queries, keys, values, mask)
    return exact, conversion.attend(index, items, keys, values, mask)


def evaluate_index(
    model: TrainedModel, index: ItemIndex, tuned: Any = None, *, recall_k: int, split: str = "test",
    batch_size: int = 128,
) -> list[Row]:
    """Rows for the converted model and for the exact one, on the same requests.

    Args:
      model: the model that was converted.
      index: index of its items.
      tuned: parameters from `fine_tune`; those of the model if None.
      recall_k: see `tarq_jax.training.evaluate`.
      split: name of the split.
      batch_size: requests per batch.

    Returns:
      Two rows; the codebook health in the first is that of level 1, in the space of queries.
    """

    @jax.jit
    def predict(batch):
        context = model.parts.context(model.params, batch)
        exact, found = exact_and_approximate(model, index, batch)
        logits = {
            STUDENT: model.parts.head(model.params if tuned is None else tuned, context, found),
            TEACHER: model.parts.head(model.params, context, exact),
        }
        items = batch.candidates[ITEM_ID]
        latents, centres = (
            heads.reshape(*items.shape, -1) for heads in (model.queries[items], index.chosen(items)[0]))
        level_1 = QuantizerOutput(
            codes=index.codes[items][..., :1], quantized=centres, residuals=latents[..., None, :],
            chosen=centres[..., None, :])
        return Predictions(logits, Diagnostics(latents, level_1, _flat(found), _flat(exact)))

    shapes = setup.batch_shapes(model.dataset)
    batches = data.eval_batches(model.dataset, split, batch_size=batch_size, **shapes)
    codewords = np.asarray(index.levels[0]).reshape(1, len(index.levels[0]), -1)
    return evaluate(predict, batches, codewords=codewords, recall_k=recall_k)


def fine_tune(
    model: TrainedModel, index: ItemIndex, *, steps: int, batch_size: int = 64, num_random: int = 48,
    learning_rate: float = 1e-3, level_rate: float = 2e-2, seed: int = 0,
    progress: Callable[[int], None] = lambda step: None,
) -> tuple[Any, ItemIndex]:
    """Trains codewords, corrections and head for a few hundred steps; codes, keys and values stay fixed.

    Distils the exact model's probabilities on each request's candidates and on random items. Labels
    are not used: the model was trained on them, and a head that is fitted to them again overfits.

    Args:
      model: the model that was converted.
      index: index of its items.
      steps: steps of Adam, under a cosine schedule.
      batch_size: requests per step; at most the number of training requests is used.
      num_random: random items per request, added to its candidates.
      learning_rate: learning rate of the head.
      level_rate: learning rate of the levels, relative to the root mean square of their entries.
      seed: seed of the order of the data and of the random items.
      progress: called with the step every 50 steps and after the last one.

    Returns:
      The model's tree of parameters, in which only those of the head have changed, and the index with new
      levels.

    Raises:
      FloatingPointError: the loss is not finite; names the step.
      ValueError: `steps` is below 1.
    """
    checks.positive_int("steps", steps)
    rates = {"params": learning_rate, "levels": level_rate}
    optimizer = optax.multi_transform(
        {name: optax.adam(optax.cosine_decay_schedule(rate, steps)) for name, rate in rates.items()},
        {name: name for name in rates},
    )
    sizes = jax.tree.map(lambda level: jnp.sqrt(jnp.mean(level**2)), index.levels)

    def loss(variables, batch):
        exact, found = exact_and_approximate(model, index.replace(levels=variables["levels"]), batch)
        context = model.parts.context(model.params, batch)
        logits = model.parts.head(_with_trained(model.params, variables["params"]), context, found)
        target = model.parts.head(model.params, context, exact)
        return losses.weighted_mean(losses.distillation(logits, target), batch.weights)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(variables, opt_state, batch):
        value, gradients = jax.value_and_grad(loss)(variables, batch)
        updates, opt_state = optimizer.update(gradients, opt_state)
        updates["levels"] = jax.tree.map(jnp.multiply, updates["levels"], sizes)
        return optax.apply_updates(variables, updates), opt_state, value

    batches = _training_batches(model, batch_size, seed)
    rng = np.random.default_rng(seed)
    variables = jax.tree.map(jnp.copy, {"params": _trainable(model.params), "levels": index.levels})
    opt_state = optimizer.init(variables)
    for step, batch in enumerate(itertools.islice(batches, steps), start=1):
        batch = with_random_candidates(rng, batch, model.dataset, num_random)
        variables, opt_state, value = update(variables, opt_state, batch)
        if step % 50 == 0 or step == steps:
            if not np.isfinite(value):
                raise FloatingPointError(f"step {step}: loss is {value}, expected a lower learning_rate")
            progress(step)
    return _with_trained(model.params, variables["params"]), index.replace(levels=variables["levels"])


def _trainable(params: Any) -> Any:
    """The tree of parameters with None for those that have no derivative, such as integers."""
    return jax.tree.map(lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.inexact) else None, params)


def _with_trained(params: Any, trained: Any) -> Any:
    """The parameters with those of `_trainable` replaced."""
    return jax.tree.map(lambda own, new: own if new is None else new, params, trained)


def with_random_candidates(
    rng: np.random.Generator, batch: Batch, dataset: data.Dataset, num_random: int
) -> Batch:
    """The batch with further candidates, drawn uniformly from all items, with weight 1 and label 0."""
    ids = rng.integers(1, dataset.schema.num_items, (len(batch.user_id), num_random))
    drawn = {field.name: dataset.items[field.name][ids] for field in dataset.schema.side("item")}
    further = {"candidate_mask": np.ones(ids.shape, bool), "labels": np.zeros(ids.shape, np.float32),
               "weights": np.ones(ids.shape, np.float32), "candidates": drawn}
    return batch.replace(**{
        name: jax.tree.map(lambda own, new: np.concatenate([own, new], axis=1), getattr(batch, name), values)
        for name, values in further.items()
    })


def _flat(heads: jax.Array) -> jax.Array:
    """[B, H, G, E] to [B, G, H * E]."""
    return jnp.swapaxes(heads, 1, 2).reshape(heads.shape[0], heads.shape[2], -1)
