"""The module that the settings in `config.model` describe; a table by name."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import ml_collections

from tarq_jax import quantization
from tarq_jax.models import (
    Cold,
    Compute,
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
from tarq_jax.models.approximate_attention import ApproximateAttention, by_category, by_hash
from tarq_jax.models.embedding import ONE_DEVICE, Tables
from tarq_jax.models.tarq import encode_batch
from tarq_jax.schema import Schema

Supervised = TwoTower | TargetAttention | ApproximateAttention | Cold | IntTower  # trained on labels alone
Model = Supervised | Tarq
Common = dict[str, Any]  # attributes that all modules have

TARQ_OF_ORDER = {0: Tarq, 1: FirstOrderTarq}
ASSIGN = {
    "nearest": quantization.nearest,
    "cosine": quantization.nearest_by_cosine,
    "balanced": quantization.balanced,
}
SERVED_ASSIGN = ASSIGN | {"balanced": quantization.nearest}  # a served code must not depend on the batch
PASS_THROUGH = {"straight_through": quantization.straight_through, "rotation": quantization.rotate}


def make_module(model: ml_collections.ConfigDict, schema: Schema, tables: Tables = ONE_DEVICE) -> Model:
    """The module that `config.model` describes, in the form that is trained.

    Raises:
      ValueError: the model needs a field that the data does not have.
    """
    return MODULES[model.name](model, common(model, schema, tables))


def common(model: ml_collections.ConfigDict, schema: Schema, tables: Tables = ONE_DEVICE) -> Common:
    """The attributes of all modules from `config.model`; a model of your own can use them too."""
    return {
        "schema": schema, "width": model.width, "num_heads": model.num_heads, "hidden": tuple(model.hidden),
        "compute": Compute(jnp.dtype(model.dtype), model.remat, model.attention_block), "tables": tables}


def of_tarq(model: ml_collections.ConfigDict) -> dict[str, Any]:
    """The further attributes of `Tarq` and `FirstOrderTarq`."""
    return {
        "num_levels": model.num_levels, "head": model.head, "decoded": model.decoded,
        "aligned_share": model.aligned_share, "student_gradient": model.student_gradient,
        "encode": functools.partial(encode_batch, assign=ASSIGN[model.assign]),
        "pass_through": PASS_THROUGH[model.pass_through]}


def as_served(module: Tarq, model: ml_collections.ConfigDict) -> Tarq:
    """The module with the code assignment that predictions use, see `SERVED_ASSIGN`."""
    return module.clone(encode=functools.partial(encode_batch, assign=SERVED_ASSIGN[model.assign]))


def _two_tower_large(model: ml_collections.ConfigDict, common: Common) -> TwoTower:
    """The two-tower with everything that TARQ adds except its codebooks.

    It has a second history encoder and attention, and hidden layers four times as wide, which replace TARQ's
    further networks.
    """
    return TwoTower(**common | {"hidden": tuple(4 * size for size in model.hidden)}, num_encoders=2)


def _sdim(model: ml_collections.ConfigDict, common: Common) -> Sdim:
    return Sdim(**common, rounds=model.hash_rounds, bits=model.hash_bits)


def _eta(model: ml_collections.ConfigDict, common: Common) -> HardSearch:
    similarity = functools.partial(by_hash, rounds=model.hash_rounds, bits=model.hash_bits)
    return HardSearch(**common, similarity=similarity, num_selected=model.num_selected)


def _sim(model: ml_collections.ConfigDict, common: Common) -> HardSearch:
    items = common["schema"].side("item")
    fields = tuple(field.name for field in items if field.kind == "categorical")
    if model.category not in fields:
        raise ValueError(f"config.model.category is {model.category!r}, expected a categorical field of the "
                         f"data's items, one of {fields}, with config.model.name='sim'")
    similarity = functools.partial(by_category, field=model.category)
    return HardSearch(**common, similarity=similarity, num_selected=model.num_selected)


MODULES: Mapping[str, Callable[[ml_collections.ConfigDict, Common], Model]] = {
    "two_tower": lambda model, common: TwoTower(**common),
    "two_tower_large": _two_tower_large,
    "target_attention": lambda model, common: TargetAttention(**common),
    "tarq": lambda model, common: TARQ_OF_ORDER[model.order](**common, **of_tarq(model)),
    "cold": lambda model, common: Cold(**common),
    "inttower": lambda model, common: IntTower(**common, num_vectors=model.num_vectors),
    "linear_attention": lambda model, common: LinearAttention(**common),
    "sdim": _sdim,
    "eta": _eta,
    "sim": _sim,
    "din": lambda model, common: Din(**common),
}
