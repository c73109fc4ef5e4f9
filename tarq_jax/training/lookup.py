"""Look-ups in embedding tables whose rows are split over a mesh: ids and rows travel, tables never do.

Each device holds a block of rows. Few devices that split a batch between them and a table too show each
other all their ids; each gathers the rows that it owns, zeros elsewhere; a reduce-scatter adds these up and
brings every row to the device that asked. Many ask owners alone, see `tarq_jax.training.exchange`. Gradients
go the other way, and each device adds up those of its own rows, so that they are split as the table is.

On GPU, scatter-add adds in any order: set `XLA_FLAGS=--xla_gpu_deterministic_ops=true` where replicas
of a block have to agree to the bit. CPU and TPU add in order.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from tarq_jax.training import exchange

Axes = tuple[str, ...]


def num_devices(mesh: Mesh, axes: Axes) -> int:
    """Devices along some axes of a mesh."""
    return math.prod(mesh.shape[axis] for axis in axes)


class Placement(NamedTuple):
    """Where a table and the ids to look up in it lie."""

    mesh: Mesh
    table: Axes  # axes of the mesh that split the rows of the table
    batch: Axes  # axes that split the first axis of ids

    @property
    def shared(self) -> Axes:
        """Axes over which both are split."""
        return tuple(axis for axis in self.table if axis in self.batch)

    @property
    def copies(self) -> Axes:
        """Axes that split the batch, along which a block of the table is repeated."""
        return tuple(axis for axis in self.batch if axis not in self.table)

    def exchanges(self, num_ids: int) -> bool:
        """Whether owners are asked for a device's ids: that has to halve what is sent, at least."""
        devices = self.size(self.shared)
        return 2 * exchange.capacity(num_ids, devices) <= num_ids

    def size(self, axes: Axes) -> int:
        """Devices along some axes."""
        return num_devices(self.mesh, axes)


def place(mesh: Mesh, table: Axes, batch: Axes, num_ids: int) -> Placement:
    """The placement without axes of one device; ids that do not divide evenly are not split."""
    table, batch = (tuple(axis for axis in axes if mesh.shape[axis] > 1) for axes in (table, batch))
    placement = Placement(mesh, table, batch)
    return placement if num_ids % placement.size(batch) == 0 else placement._replace(batch=())


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def sharded_rows(table: jax.Array, ids: jax.Array, placement: Placement) -> jax.Array:
    """Rows of a table that is split over a mesh; under `jit` over that mesh.

    Args:
      table: [V, D], with rows split over the axes `placement.table`; their devices have to divide V.
      ids: [B, ...] in [0, V), split over `placement.batch`.
      placement: of `place`.

    Returns:
      [B, ..., D], split as the ids are.
    """
    rows = PartitionSpec(placement.table or None), PartitionSpec(placement.batch or None)
    look_up = functools.partial(_look_up, placement=placement)
    return jax.shard_map(
        look_up, mesh=placement.mesh, in_specs=rows, out_specs=rows[1], check_vma=False)(table, ids)


def _forward(table, ids, placement):
    return sharded_rows(table, ids, placement), (ids, jnp.zeros((len(table), 0), table.dtype))


def _backward(placement, kept, gradients):
    """Of the table [V, D], split as it is; ids have none."""
    ids, (num_rows, _) = kept[0], kept[1].shape
    split = PartitionSpec(placement.batch or None)
    scatter = jax.shard_map(
        functools.partial(_scatter, block=num_rows // placement.size(placement.table), placement=placement),
        mesh=placement.mesh, in_specs=(split, split), out_specs=PartitionSpec(placement.table or None),
        check_vma=False)
    return scatter(ids, gradients.astype(kept[1].dtype)), None


sharded_rows.defvjp(_forward, _backward)


def _look_up(table: jax.Array, ids: jax.Array, *, placement: Placement) -> jax.Array:
    """On one device: its block [V / n, D] and its ids; returns the rows of these ids."""
    shared, width = placement.shared, table.shape[-1]

    def rows_of(ids: jax.Array) -> jax.Array:
        rows, owned = _own(ids, len(table), placement.table)
        return jnp.where(owned[..., None], table.at[rows].get(mode="promise_in_bounds"), 0)

    if placement.exchanges(ids.size):
        planned, way = _plan(ids, len(table), placement)
        found = exchange.fetch(planned, rows_of, width, table.dtype, way).reshape(*ids.shape, width)
    else:
        found = rows_of(_all_gather(ids, shared))
        if shared:
            found = lax.psum_scatter(found, shared, scatter_dimension=0, tiled=True)
    others = tuple(axis for axis in placement.table if axis not in shared)
    return lax.psum(found, others) if others else found


def _scatter(ids: jax.Array, gradients: jax.Array, *, block: int, placement: Placement) -> jax.Array:
    """On one device: the gradient of its block [block, D], from its ids [n...] and gradients [n..., D].

    Gradients of looked-up rows are gathered over the copies of a block, or blocks are summed over them,
    whichever moves less.
    """
    ids, gradients = ids.reshape(-1), gradients.reshape(-1, gradients.shape[-1])
    width, devices = gradients.shape[-1], placement.size(placement.shared)
    exchanged = placement.exchanges(ids.size)
    brought = devices * (exchange.capacity(ids.size, devices) if exchanged else ids.size)
    summed = 2 * block * width < (placement.size(placement.copies) - 1) * brought * (width + 1)
    gathered = () if summed else placement.copies

    def take(total: jax.Array, ids: jax.Array, gradients: jax.Array) -> jax.Array:
        ids, gradients = _all_gather(ids, gathered), _all_gather(gradients, gathered)
        rows, owned = _own(ids, block, placement.table)
        return total.at[jnp.where(owned, rows, block)].add(gradients, mode="drop")  # `block`: beyond the end

    total = jnp.zeros((block, width), gradients.dtype)
    if exchanged:
        planned, way = _plan(ids, block, placement)
        total = exchange.send(planned, gradients, take, total, way)
    else:
        total = take(total, _all_gather(ids, placement.shared), _all_gather(gradients, placement.shared))
    return lax.psum(total, placement.copies) if summed else total


def _plan(ids: jax.Array, block: int, placement: Placement) -> tuple[exchange.Plan, exchange.Way]:
    """Ids by the device that owns them, of those that this one exchanges with."""
    shared, ids = placement.shared, ids.reshape(-1)
    owner, mine, places = jnp.zeros_like(ids), jnp.ones(ids.shape, bool), ids // block
    stride = 1
    for axis in reversed(placement.table):
        size = placement.mesh.shape[axis]
        places, place = places // size, places % size
        if axis in shared:
            owner, stride = owner + stride * place, stride * size
        else:  # devices along it have the same ids: each asks for those of its own part
            mine &= place == lax.axis_index(axis)
    way = exchange.Way(shared, placement.size(shared), placement.mesh.axis_names)
    return exchange.plan(ids, jnp.where(mine, owner, way.devices), way.devices), way


def _own(ids: jax.Array, block: int, axes: Axes) -> tuple[jax.Array, jax.Array]:
    """Rows of the ids within this device's block, and which ids it owns; row 0 for all others."""
    rows = ids - block * (lax.axis_index(axes) if axes else 0)
    owned = (rows >= 0) & (rows < block)
    return jnp.where(owned, rows, 0), owned


def _all_gather(array: jax.Array, axes: Axes) -> jax.Array:
    return lax.all_gather(array, axes, tiled=True) if axes else array
