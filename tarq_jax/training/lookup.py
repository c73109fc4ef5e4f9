"""Look-ups in embedding tables whose rows are split over a mesh: ids and rows travel, tables never do.

Each device holds a block of rows. Devices that split a batch between them and a table too show each
other their ids; each gathers the rows that it owns, zeros elsewhere; a reduce-scatter adds these up and
brings every row to the device that asked. The gradient goes the other way: ids and gradients of rows are
gathered, and each device adds up those of its own rows, so that the gradient is split as the table is.

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
    width = gradients.shape[-1]
    block = num_rows // placement.size(placement.table)
    combine = _summed if _dense_is_smaller(placement, ids.size, width, block) else _gathered
    split = PartitionSpec(placement.batch or None)
    scatter = jax.shard_map(
        functools.partial(combine, block=block, placement=placement), mesh=placement.mesh,
        in_specs=(split, split), out_specs=PartitionSpec(placement.table or None), check_vma=False)
    return scatter(ids, gradients.astype(kept[1].dtype)), None


sharded_rows.defvjp(_forward, _backward)


def _look_up(table: jax.Array, ids: jax.Array, *, placement: Placement) -> jax.Array:
    """On one device: its block [V / n, D] and its ids; returns the rows of these ids."""
    shared = placement.shared
    ids = _all_gather(ids, shared)
    rows, owned = _own(ids, len(table), placement.table)
    found = jnp.where(owned[..., None], table.at[rows].get(mode="promise_in_bounds"), 0)
    if shared:
        found = lax.psum_scatter(found, shared, scatter_dimension=0, tiled=True)
    others = tuple(axis for axis in placement.table if axis not in shared)
    return lax.psum(found, others) if others else found


def _gathered(ids: jax.Array, gradients: jax.Array, *, block: int, placement: Placement) -> jax.Array:
    """On one device: the gradient of its block, from ids and gradients of the whole batch."""
    ids, gradients = _all_gather(ids, placement.batch), _all_gather(gradients, placement.batch)
    return _scatter(ids, gradients, block, placement)


def _summed(ids: jax.Array, gradients: jax.Array, *, block: int, placement: Placement) -> jax.Array:
    """The same, with blocks summed over the devices that hold copies of one."""
    ids, gradients = _all_gather(ids, placement.shared), _all_gather(gradients, placement.shared)
    return lax.psum(_scatter(ids, gradients, block, placement), _replicas(placement))


def _dense_is_smaller(placement: Placement, num_ids: int, width: int, block: int) -> bool:
    """Whether summing blocks moves fewer numbers than gathering the gradients of all rows looked up."""
    copies = placement.size(_replicas(placement))
    sparse = num_ids * (width + 1)
    return copies > 1 and sparse / copies + 2 * block * width < sparse


def _replicas(placement: Placement) -> Axes:
    """Axes that split the batch, along which a block of the table is repeated."""
    return tuple(axis for axis in placement.batch if axis not in placement.table)


def _scatter(ids: jax.Array, gradients: jax.Array, block: int, placement: Placement) -> jax.Array:
    rows, owned = _own(ids, block, placement.table)
    rows = jnp.where(owned, rows, block)  # beyond the end: dropped
    zeros = jnp.zeros((block, gradients.shape[-1]), gradients.dtype)
    return zeros.at[rows].add(gradients, mode="drop")


def _own(ids: jax.Array, block: int, axes: Axes) -> tuple[jax.Array, jax.Array]:
    """Rows of the ids within this device's block, and which ids it owns; row 0 for all others."""
    rows = ids - block * (lax.axis_index(axes) if axes else 0)
    owned = (rows >= 0) & (rows < block)
    return jnp.where(owned, rows, 0), owned


def _all_gather(array: jax.Array, axes: Axes) -> jax.Array:
    return lax.all_gather(array, axes, tiled=True) if axes else array
