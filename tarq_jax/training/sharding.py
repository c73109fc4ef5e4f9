"""Where arrays are placed: a mesh of two axes, batches split over all of it, parameters by rules.

Along the axis `data`, devices hold copies of the parameters that are split over `model`. Batches are split
over both axes, so that every device has its own part: an axis that only split tables would repeat all other
computations.
"""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import ml_collections
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tarq_jax.models.embedding import TABLE, Tables, take_rows
from tarq_jax.training.sharded_embedding import Axes, num_devices, place, sharded_rows
from tarq_jax.types import Batch

Tree = TypeVar("Tree")

DATA, MODEL = "data", "model"
BATCH = (DATA, MODEL)  # the axes that split a batch


def make_mesh(data: int = 0, model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `data` x `model` over the given devices, or all.

    Args:
      data: number of devices along the axis `data`; 0 for all that `model` leaves.
      model: number of devices along the axis `model`.
      devices: devices of the mesh; all devices of this run if None.

    Raises:
      ValueError: the product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) % model:
        raise ValueError(f"config.mesh.model is {model}, expected a divisor of the {len(devices)} devices")
    data = len(devices) // model if data == 0 else data
    if data * model != len(devices):
        raise ValueError(f"config.mesh.data is {data}, expected {len(devices) // model}: {len(devices)} "
                         f"devices, {model} along config.mesh.model")
    return jax.make_mesh((data, model), (DATA, MODEL), axis_types=(AxisType.Auto,) * 2, devices=devices)


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises ValueError unless every device gets an equal share of a batch."""
    if batch_size % mesh.size:
        raise ValueError(f"config.batch_size is {batch_size}, expected a multiple of the "
                         f"{mesh.size} devices of the mesh")


def shard_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Splits a batch by request over all devices; with several processes, each provides its own part."""
    split = NamedSharding(mesh, PartitionSpec(BATCH))
    return jax.tree.map(functools.partial(jax.make_array_from_process_local_data, split), batch)


def split_evaluation(batch: Batch, mesh: Mesh) -> Batch:
    """Splits a full batch that every process holds; a batch that does not divide evenly is replicated."""
    split = NamedSharding(mesh, PartitionSpec(BATCH if len(batch.weights) % mesh.size == 0 else None))
    return jax.tree.map(lambda leaf: jax.make_array_from_callback(leaf.shape, split, leaf.__getitem__), batch)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that puts a copy on every device of the mesh."""
    return NamedSharding(mesh, PartitionSpec())


class Rule(NamedTuple):
    """How parameters are split whose path matches a pattern."""

    pattern: str  # regular expression, for paths like `params/backbone/item_features/item_id/embedding`
    spec: PartitionSpec


def parse_rules(table: Sequence[Sequence[Any]]) -> tuple[Rule, ...]:
    """Parses `config.mesh.rules`: pairs of a pattern and, for each array axis, None or one or more mesh axes.

    Example:
      >>> [rule.spec for rule in parse_rules([["item_id", ["model"]], ["kernel", [None, ["data", "model"]]]])]
      [P('model',), P(None, ('data', 'model'))]
    """
    return tuple(
        Rule(pattern, PartitionSpec(*(
            entry if entry is None or isinstance(entry, str) else tuple(entry) for entry in spec)))
        for pattern, spec in table)


def spec_of(path: str, rules: Sequence[Rule]) -> PartitionSpec:
    """The specification of the first rule that matches the path of a parameter; replicated if none does."""
    return next((rule.spec for rule in rules if re.search(rule.pattern, path)), PartitionSpec())


def state_shardings(state: Tree, mesh: Mesh, rules: Sequence[Rule]) -> Tree:
    """A sharding for every leaf of a training state; optimizer state is split like its parameter.

    Args:
      state: arrays, or their shapes from `jax.eval_shape`.
      mesh: mesh from `make_mesh`.
      rules: rules for parameters; the first match applies.

    Raises:
      ValueError: a rule matches no parameter, has too many axes for a parameter, or splits an axis whose size
        is not a multiple of the number of devices; names the rule or the parameter.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    named = [(_parameter_path(path), leaf.shape) for path, leaf in leaves]
    shapes = {path: shape for path, shape in reversed(named) if path}  # parameters come first in a state
    for rule in rules:
        if not any(re.search(rule.pattern, path) for path in shapes):
            shown = sorted(shapes, key=lambda path: not path.endswith(f"/{TABLE}"))[:3]
            raise ValueError(f"config.mesh.rules: {rule.pattern!r} matches no parameter, expected a part of "
                             f"one of {len(shapes)} paths, such as {shown}")
    for path, shape in shapes.items():
        _check_spec(path, shape, spec_of(path, rules), mesh)
    return jax.tree.unflatten(structure, [
        NamedSharding(mesh, PartitionSpec(*spec_of(path, rules)[: len(shape)]) if path else PartitionSpec())
        for path, shape in named])


def _parameter_path(path: tuple) -> str:
    """The path of the parameter that a leaf of a state belongs to; empty if it belongs to none."""
    return jax.tree_util.keystr(path, simple=True, separator="/").partition("params/")[2]


def _check_spec(path: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> None:
    """Raises ValueError unless an array of this shape can be split by `spec`."""
    is_table = path.endswith(f"/{TABLE}")
    most = 1 if is_table else len(shape)  # tables are split only by rows
    if len(spec) > most:
        raise ValueError(f"config.mesh.rules: {path} {list(shape)} is given {spec}, expected at most {most} "
                         f"{'axis, its rows' if is_table else 'axes'}")
    for size, entry in zip(shape, spec, strict=False):
        parts = num_devices(mesh, axes_of(entry))
        if size % parts:
            raise ValueError(f"config.mesh.rules: {path} {list(shape)} is given {spec}, expected a multiple "
                             f"of {parts} instead of {size}")


def axes_of(entry: str | Sequence[str] | None) -> Axes:
    """The mesh axes that an entry of a specification names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def make_tables(config: ml_collections.ConfigDict, mesh: Mesh | None = None) -> Tables:
    """The tables of a configuration; with a mesh, those that a rule names are split over devices.

    Equal settings give the same object, so that models of equal settings are equal.
    """
    return _make_tables(parse_rules(config.mesh.rules), config.model.table_multiple, mesh)


@functools.cache
def _make_tables(rules: tuple[Rule, ...], least: int, mesh: Mesh | None) -> Tables:
    if mesh is None or not rules:
        return Tables(lambda path: least)

    def axes(path: str) -> Axes:
        return axes_of(next(iter(spec_of(path, rules)), None))

    def multiple(path: str) -> int:
        return math.lcm(least, num_devices(mesh, axes(path)))

    def lookup(path: str, table: jax.Array, ids: jax.Array) -> jax.Array:
        split = axes(path)
        return sharded_rows(table, ids, place(mesh, split, BATCH, len(ids))) if split else take_rows(
            path, table, ids)

    return Tables(multiple, lookup)
