"""A small world to serve: items and requests of the workloads' schema, and a method for every model."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import workloads

from tarq_jax import conversion
from tarq_jax.data import Dataset
from tarq_jax.models import FirstOrderTarq
from tarq_jax.models.parts import target_attention_parts
from tarq_jax.serving import methods
from tarq_jax.types import Batch

ITEMS = workloads.SCHEMA.num_items  # row 0 is padding
LENGTHS = (4, 0, 6, 1)  # lengths of the requests' histories
CONVERTED = ("converted_0", "converted_1", "converted_levels")  # order 0; 1; 1, quantized
FURTHER = 2  # levels of corrections of the last one
METHODS = (*workloads.SERVED, "order_1_dot", *CONVERTED)


class World(NamedTuple):
    """What is served; requests as dictionaries; and a batch of them whose candidates are all items."""

    dataset: Dataset
    requests: list[dict[str, Any]]
    batch: Batch


@functools.cache
def world() -> World:
    """Four requests, one of which has no history."""
    rng = np.random.default_rng(0)
    items = workloads.features(rng, ("item",), np.arange(ITEMS) > 0)
    items["item_id"] = np.arange(ITEMS, dtype=np.int32)
    shape = (len(LENGTHS), workloads.POSITIONS)
    mask = np.arange(shape[1]) < np.array(LENGTHS)[:, None]
    real = np.ones(len(LENGTHS), bool)
    sides = {side: workloads.features(rng, (side,), real) for side in ("user", "context")}
    history_ids = rng.integers(1, ITEMS, shape) * mask
    events = workloads.features(rng, ("event",), mask)
    candidates = np.broadcast_to(np.arange(1, ITEMS), (len(LENGTHS), ITEMS - 1))
    nothing = np.zeros(candidates.shape, np.float32)
    batch = Batch(
        user_id=np.zeros(len(LENGTHS), np.int32), **sides, history_mask=mask,
        history={name: values[history_ids] for name, values in items.items()} | events,
        candidates={name: values[candidates] for name, values in items.items()},
        candidate_mask=nothing == 0, labels=nothing, weights=nothing)
    requests = [
        {side: {name: values[row].item() for name, values in columns.items()}
         for side, columns in sides.items()}
        | {"history": {"item_id": history_ids[row, :length].tolist()}
           | {name: values[row, :length].tolist() for name, values in events.items()}}
        for row, length in enumerate(LENGTHS)]
    return World(Dataset(workloads.SCHEMA, items, {}, {}), requests, batch)


@functools.cache
def trained(name: str) -> workloads.Compiled:
    """The model that the method of this name serves."""
    if name == "order_1_dot":
        module = FirstOrderTarq(**workloads.SIZES, num_levels=workloads.LEVELS, head="dot")
        arguments = (workloads.make_codewords(), True)
        shapes = jax.eval_shape(module.init, jax.random.key(0), workloads.make_batch(), *arguments)
        return workloads.Compiled(module, workloads.make_params(shapes), arguments, jax.jit(module.apply))
    return workloads.compiled("target_attention" if name in CONVERTED else name)


@functools.cache
def item_index(name: str) -> conversion.ItemIndex:
    """The index of the converted target-attention model; corrections are fitted to one batch of histories."""
    model = trained("target_attention")
    parts = target_attention_parts(model.module)
    queries = item_queries()
    index = conversion.quantize_queries(jax.random.key(0), queries, num_codewords=workloads.CODEWORDS)
    if name == "converted_0":
        return index
    seen = [(*parts.keys_values(model.params, world().batch), world().batch.history_mask)]
    corrections = conversion.fitted_corrections(index, queries, seen)
    if name == "converted_1":
        return conversion.with_corrections(index, corrections)
    return conversion.with_quantized_corrections(
        jax.random.key(1), index, corrections, num_levels=FURTHER, num_codewords=workloads.CODEWORDS)


def item_queries() -> np.ndarray:
    """Projected queries of all items of the target-attention model, [V, H, E]."""
    model = trained("target_attention")
    queries = target_attention_parts(model.module).item_queries(model.params, world().dataset.items)
    return np.swapaxes(queries, 0, 1)


def method_of(name: str) -> methods.Method:
    """The method that serves a model."""
    model = trained(name)
    if name in CONVERTED:
        return methods.converted(model.module, model.params, item_index(name))
    return methods.from_module(model.module, model.params, *model.arguments[:1])


def trained_anew(method: methods.Method) -> methods.Method:
    """The same method with other weights."""
    def other(weights):
        return jax.tree.map(lambda leaf: leaf * 1.1 if leaf.dtype.kind == "f" else leaf, weights)

    return method._replace(user_weights=other(method.user_weights), item_weights=other(method.item_weights),
                           encode_weights=other(method.encode_weights))


@functools.cache
def expected(name: str) -> np.ndarray:
    """The training code's logits [B, V - 1] of all items for each request."""
    model, batch = trained(name), world().batch
    if name not in CONVERTED:
        return model.logits(batch)["model"]
    parts = target_attention_parts(model.module)
    keys, values = parts.keys_values(model.params, batch)
    found = conversion.attend(
        item_index(name), batch.candidates["item_id"], keys, values, batch.history_mask)
    return np.asarray(parts.head(model.params, parts.context(model.params, batch), found))
