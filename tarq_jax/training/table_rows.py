"""Training on the rows of tables that a batch looks up, instead of whole tables.

A step reads few rows of a large table, but the table's gradient, its norm and an optimizer's update pass over
all rows. With an optimizer that is `RowWise`, the rows that the step reads are enough:

1. `find` computes which rows the loss will look up.
2. `fetch` puts these rows in the place of their tables, and the loss looks up ids among them (`for_loss`). So
   autodiff gives a gradient of these rows alone.
3. `total` sums the gradients over devices, on the devices that keep the rows.
4. `take` takes the rows from the tables and from the optimizer's state; the optimizer updates them as if they
   were tables; `put` writes them back. A compiled step does so in place if it reuses the memory of its state.

Trees "with rows" have an array [m, D] of rows in the place of a table [V, D], for the tables in a `RowsOf`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from tarq_jax import shards
from tarq_jax.models.embedding import ROWS, TableRows, rows_among
from tarq_jax.training.sharded_embedding import Placement, place, sharded_rows, sum_by_row, sum_to_owners
from tarq_jax.training.sharding import BATCH, TABLE, Rule, axes_of, spec_of
from tarq_jax.types import Batch

Tree = Any
PARAMS = "params"  # the key of parameters in a module's variables, and of these in `trainable`


class Devices(NamedTuple):
    """The devices that a step runs on."""

    mesh: Mesh | None = None  # of a step under `jit`; None for one device
    rules: Sequence[Rule] = ()  # how tables are split over the mesh
    axis_name: shards.AxisName = None  # of a step under `pmap`


class Rows(NamedTuple):
    """Which rows of a table stand in its place."""

    ids: jax.Array  # [m] rising; the last may be out of range, which stands for no row
    num_rows: int  # V
    placement: Placement | None  # of the table on a mesh; None if it is not on one


RowsOf = dict[str, Rows]  # by the path of a table in `trainable`, like `params/params/item_id/embedding`


def find(
    lookups: Callable[[Batch], dict[str, Any]], params: Tree, batch: Batch, num: int, devices: Devices
) -> RowsOf:
    """The rows that a loss looks up, for tables of which a device keeps many more rows than that.

    Args:
      lookups: micro-batch -> ids that the loss looks up in it, see `Objective`.
      params: the module's variables.
      batch: the full batch.
      num: number of micro-batches.
      devices: the devices that the step runs on.

    Returns:
      Rows by table. On a mesh they are split over the batch: each device has those that it looks up.
    """
    found: dict[tuple[str, ...], list[jax.Array]] = {}
    of_micro_batches = lax.map(lookups, shards.deal(batch, num))
    for path, ids in traverse_util.flatten_dict(of_micro_batches).items():
        found.setdefault((PARAMS, *path[:-1], TABLE), []).extend(ids)  # each [num, B / num, ...]
    tables, rows = traverse_util.flatten_dict(params), {}
    for path, ids in found.items():
        num_rows, placement = len(tables[path]), _placement("/".join(path), devices)
        if _fewer(ids, num_rows, placement, devices.axis_name):
            rows["/".join((PARAMS, *path))] = Rows(_distinct(ids, num_rows, placement), num_rows, placement)
    return rows


def fetch(trainable: Tree, rows: RowsOf) -> Tree:
    """`trainable` with the rows from `find`."""
    def fetched(table: jax.Array, of: Rows) -> jax.Array:
        return sharded_rows(table, of.ids, of.placement) if of.placement else _take(table, of.ids)

    return _map_tables(fetched, rows, trainable)


def for_loss(params: Tree, rows: RowsOf) -> Tree:
    """The variables that a loss gets: `params` with rows, these as `TableRows` in the collection `ROWS`."""
    if not rows:
        return params
    others, found = traverse_util.flatten_dict(params, keep_empty_nodes=True), {}
    for path, of in rows.items():
        key = tuple(path.split("/"))[1:]  # in `params`
        among = functools.partial(_rows_among, placement=of.placement) if of.placement else rows_among
        found[key[1:]] = TableRows(of.ids, others.pop(key), among)
    return {**traverse_util.unflatten_dict(others), ROWS: traverse_util.unflatten_dict(found)}


def total(gradients: Tree, rows: RowsOf, axis_name: shards.AxisName = None) -> tuple[Tree, RowsOf]:
    """Sums gradients with rows from `find` over all devices.

    Returns:
      The sums, bitwise equal on all devices that keep the same rows; and the rows that they have, each once.
      On a mesh, these are split like the table, and counted from the start of a device's block.
    """
    summed: RowsOf = {}

    def sum_up(path: tuple, gradient: jax.Array) -> jax.Array:
        if (name := _name(path)) not in rows:
            return shards.total(gradient, axis_name)
        ids, num_rows, placement = rows[name]
        if placement is not None:
            ids, gradient = sum_to_owners(ids, gradient, num_rows, placement)
        elif axis_name is not None:
            ids, gradient = lax.all_gather((ids, gradient), axis_name, tiled=True)
            ids, gradient = sum_by_row(ids, gradient, num_rows)
        summed[name] = Rows(ids, num_rows, placement)
        return gradient

    return jax.tree_util.tree_map_with_path(sum_up, gradients), summed


def take(tree: Tree, rows: RowsOf) -> Tree:
    """`tree`, which is `trainable` or an optimizer's state over it, with rows from `total`."""
    return _map_tables(lambda table, of: _on_owners(_take, of, table, of.ids), rows, tree)


def put(tree: Tree, rows: RowsOf, updated: Tree) -> Tree:
    """`updated`, a tree with rows from `total`, with whole tables: those of `tree`, with these rows set."""
    def set_rows(table: jax.Array, of: Rows, new: jax.Array) -> jax.Array:
        return _on_owners(_set, of, table, of.ids, new)

    return _map_tables(set_rows, rows, tree, updated)


def _placement(path: str, devices: Devices) -> Placement | None:
    if devices.mesh is None or devices.mesh.size == 1:
        return None
    spec = spec_of(path, devices.rules)
    return place(devices.mesh, axes_of(spec[0]) if len(spec) else (), BATCH, devices.mesh.size)


def _fewer(
    ids: Sequence[jax.Array], num_rows: int, placement: Placement | None, axis_name: shards.AxisName
) -> bool:
    """Whether all devices together look up at most half as many ids as a device keeps rows.

    With more, to sort ids and to copy rows takes longer than to pass over all. `ids` are as for `_distinct`.
    """
    num_ids = sum(each.size for each in ids)
    if placement is None:
        return 2 * num_ids * (1 if axis_name is None else lax.axis_size(axis_name)) <= num_rows
    splits = all(each.ndim > 1 and each.shape[1] % placement.size(placement.batch) == 0 for each in ids)
    return splits and 2 * num_ids <= num_rows // placement.size(placement.table)


def _distinct(ids: Sequence[jax.Array], num_rows: int, placement: Placement | None) -> jax.Array:
    """[m] rising: each id that a device looks up once, then V; `ids` are [num, B / num, ...] each."""
    def of_device(ids: Sequence[jax.Array]) -> jax.Array:
        joined = jnp.concatenate([each.ravel() for each in ids])
        return jnp.unique(joined, size=len(joined), fill_value=num_rows)

    if placement is None:
        return of_device(ids)
    return jax.shard_map(of_device, mesh=placement.mesh, in_specs=PartitionSpec(None, placement.batch),
                         out_specs=PartitionSpec(placement.batch), check_vma=False)(ids)


def _rows_among(known: jax.Array, rows: jax.Array, ids: jax.Array, *, placement: Placement) -> jax.Array:
    """`rows_among` on a mesh: each device looks up its ids among its rows."""
    split = PartitionSpec(placement.batch)
    return jax.shard_map(rows_among, mesh=placement.mesh, in_specs=(split,) * 3, out_specs=split,
                         check_vma=False)(known, rows, ids)


def _on_owners(function: Callable[..., jax.Array], of: Rows, *arrays: jax.Array) -> jax.Array:
    """Applies a function to each device's part of arrays that are split like the table."""
    if of.placement is None:
        return function(*arrays)
    split = PartitionSpec(of.placement.table or None)
    return jax.shard_map(function, mesh=of.placement.mesh, in_specs=(split,) * len(arrays), out_specs=split,
                         check_vma=False)(*arrays)


def _take(table: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.asarray(table).at[ids].get(mode="fill", fill_value=0)  # zero where an id is out of range


def _set(table: jax.Array, ids: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.asarray(table).at[ids].set(rows, mode="drop")


def _map_tables(function: Callable[..., jax.Array], rows: RowsOf, tree: Tree, *others: Tree) -> Tree:
    """`function(leaf, rows, *leaves of others)` for the leaves of tables; of others, the last tree's leaf.

    A leaf belongs to a table if its path ends with that of the table.
    """
    def map_leaf(path: tuple, *leaves: jax.Array) -> jax.Array:
        name = _name(path)
        table = next((table for table in rows if f"/{name}".endswith(f"/{table}")), None)
        return leaves[-1] if table is None else function(leaves[0], rows[table], *leaves[1:])

    return jax.tree_util.tree_map_with_path(map_leaf, tree, *others)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
