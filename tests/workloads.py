"""Small workloads that the tests of the core share: a schema with every kind of field, batches, models.

All sizes differ, so that a confusion of two axes is noticed.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh

from tarq_jax.models import (
    Cold,
    Din,
    FirstOrderTarq,
    HardSearch,
    IntTower,
    LinearAttention,
    Sdim,
    TargetAttention,
    Tarq,
    TwoTower,
)
from tarq_jax.models.approximate_attention import by_category, by_hash
from tarq_jax.schema import Field, Schema
from tarq_jax.types import Batch, Codebook

DEVICES = 8  # virtual CPU devices that `conftest` requests
REQUESTS, CANDIDATES, POSITIONS, WIDTH, HEADS, LEVELS, CODEWORDS = 8, 5, 6, 12, 3, 2, 7
HISTORY_LENGTHS = (4, 0, 1, 3, 4, 2, 0, 4)  # at most 4 of the 6 positions; two histories are empty
NUM_CANDIDATES = (5, 4, 0, 1, 5, 2, 0, 3)  # two requests have no candidate

SCHEMA = Schema((
    Field("item_id", "item", "categorical", 23),
    Field("item_vector", "item", "vector", 3),
    Field("item_price", "item", "numeric"),
    Field("user_group", "user", "categorical", 9),
    Field("user_age", "user", "numeric"),
    Field("hour", "context", "numeric"),
    Field("event_type", "event", "categorical", 4),
))

SIZES = {"schema": SCHEMA, "width": WIDTH, "num_heads": HEADS, "hidden": (16,)}
HEADS_OF_TARQ = ("scalar", "dot", "mlp")
SERVED = {
    "two_tower": TwoTower(**SIZES),
    "two_tower_large": TwoTower(**SIZES, num_encoders=2),
    "target_attention": TargetAttention(**SIZES),
    **{f"tarq_{head}": Tarq(**SIZES, num_levels=LEVELS, head=head) for head in HEADS_OF_TARQ},
    "order_1_scalar": FirstOrderTarq(**SIZES, num_levels=LEVELS, head="scalar"),
    "order_1_mlp": FirstOrderTarq(**SIZES, num_levels=LEVELS, head="mlp"),
}
BASELINES = {
    "cold": Cold(**SIZES),
    "inttower": IntTower(**SIZES, num_vectors=2),
    "linear_attention": LinearAttention(**SIZES),
    "sdim": Sdim(**SIZES, rounds=5, bits=2),
    "eta": HardSearch(**SIZES, similarity=functools.partial(by_hash, rounds=5, bits=2), num_selected=2),
    "sim": HardSearch(
        **SIZES, similarity=functools.partial(by_category, field="item_id"), num_selected=2),
    "din": Din(**SIZES),
}
MODELS = SERVED | BASELINES


def features(rng: np.random.Generator, sides: tuple[str, ...], mask: np.ndarray) -> dict[str, np.ndarray]:
    """Random values of the fields of `sides` where `mask` is True, padding elsewhere."""
    columns = {}
    for field in SCHEMA.side(*sides):
        shape = (*mask.shape, *field.shape)
        if field.kind == "categorical":
            values = rng.integers(1, field.size, shape)
        else:
            values = rng.normal(size=shape)
        values = values * mask.reshape(*mask.shape, *(1,) * len(field.shape))
        columns[field.name] = values.astype(field.dtype)
    return columns


def make_batch(seed: int = 0) -> Batch:
    """A batch with ragged masks: empty histories, requests without candidates, padding."""
    rng = np.random.default_rng(seed)
    real = np.ones(REQUESTS, bool)
    history_mask = np.arange(POSITIONS) < np.array(HISTORY_LENGTHS)[:, None]
    candidate_mask = np.arange(CANDIDATES) < np.array(NUM_CANDIDATES)[:, None]
    weights = rng.uniform(0.5, 2.0, candidate_mask.shape) * candidate_mask
    return Batch(
        user_id=rng.integers(1, 100, REQUESTS).astype(np.int32),
        user=features(rng, ("user",), real),
        context=features(rng, ("context",), real),
        history=features(rng, ("item", "event"), history_mask),
        history_mask=history_mask,
        candidates=features(rng, ("item",), candidate_mask),
        candidate_mask=candidate_mask,
        labels=(rng.integers(0, 2, candidate_mask.shape) * candidate_mask).astype(np.float32),
        weights=weights.astype(np.float32),
    )


def refill(batch: Batch, seed: int = 1) -> Batch:
    """The batch with other values where its masks are False."""
    rng = np.random.default_rng(seed)

    def fill(columns, sides, mask):
        other = features(rng, sides, np.ones_like(mask))
        return {
            name: np.where(mask.reshape(*mask.shape, *(1,) * (values.ndim - 2)), values, other[name])
            for name, values in columns.items()
        }

    return batch.replace(
        history=fill(batch.history, ("item", "event"), batch.history_mask),
        candidates=fill(batch.candidates, ("item",), batch.candidate_mask),
    )


def make_codewords(seed: int = 0) -> np.ndarray:
    """Codewords [L, K, D] of about the length of latents, [`LEVELS`, `CODEWORDS`, `WIDTH`]."""
    return np.random.default_rng(seed).normal(size=(LEVELS, CODEWORDS, WIDTH)).astype(np.float32)


def make_codebook(seed: int, levels: int, codewords: int, width: int) -> Codebook:
    """A codebook with random running statistics."""
    rng = np.random.default_rng(seed)
    shape = (levels, codewords, width)
    return Codebook(
        codewords=rng.normal(size=shape).astype(np.float32),
        counts=rng.uniform(0.5, 3.0, shape[:2]).astype(np.float32),
        sums=rng.normal(size=shape).astype(np.float32),
        ages=rng.integers(0, 9, shape[:2]).astype(np.float32),
    )


class Compiled(NamedTuple):
    """A model with parameters and its compiled forward pass."""

    module: nn.Module
    params: Any  # as `apply` takes them; every entry differs from its initial value
    arguments: tuple[Any, ...]  # arguments after the batch: the codewords of TARQ
    forward: Callable[..., Any]  # (params, batch, *arguments) -> output

    def __call__(self, batch: Batch) -> Any:
        """The model's output."""
        return self.forward(self.params, batch, *self.arguments)

    def logits(self, batch: Batch) -> dict[str, np.ndarray]:
        """Logits [B, G] by name of the predictor; TARQ has a student and a teacher."""
        output = self(batch)
        logits = {"model": output.logits}
        if hasattr(output, "teacher"):
            logits["teacher"] = output.teacher.logits
        return jax.tree.map(np.asarray, logits)


@functools.cache
def compiled(name: str) -> Compiled:
    """The model of that name in `MODELS`, compiled once for all tests."""
    module = MODELS[name]
    arguments = (make_codewords(), True) if isinstance(module, Tarq) else ()
    shapes = jax.eval_shape(module.init, jax.random.key(0), make_batch(), *arguments)
    return Compiled(module, make_params(shapes), arguments, jax.jit(module.apply))


def make_params(shapes: Any, seed: int = 0) -> Any:
    """Random parameters of the given shapes, biases included, that keep activations of order one."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        inputs = np.prod(leaf.shape[:-1]) if len(leaf.shape) == 2 else WIDTH
        return (rng.normal(size=leaf.shape) / np.sqrt(max(inputs, 1))).astype(np.float32)

    return jax.tree.map(draw, shapes)


def mesh() -> Mesh:
    """A mesh of all virtual devices with one axis, `data`."""
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:DEVICES])
