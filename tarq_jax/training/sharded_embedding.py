"""Look-ups in embedding tables whose rows are split over a mesh: only ids and rows move, never tables.

Each device holds a block of rows. With few devices, each gathers the ids of all, looks up the rows that it
owns (zeros for the rest), and a reduce-scatter returns each row to the device that asked for it. With many
devices, each sends ids only to the devices that own them (`tarq_jax.training.exchange`). Gradients go the
opposite way, and each device sums those of its own rows, so gradients are split like the table.

On GPU, scatter-add adds in any order: set `XLA_FLAGS=--xla_gpu_deterministic_ops=true` if replicas of a block
must be bitwise equal. CPU and TPU add in order.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from tarq_jax.training import exchange

Axes = tuple[str, ...]
Taken = TypeVar("Taken")


def num_devices(mesh: Mesh, axes: Axes) -> int:
    """Number of devices along some axes of a mesh."""
    return math.prod(mesh.shape[axis] for axis in axes)


class Placement(NamedTuple):
    """How a table and the ids to look up in it are split over a mesh."""

    mesh: Mesh
    table: Axes  # axes of the mesh that split the rows of the table
    batch: Axes  # axes that split the first axis of ids

    @property
    def shared(self) -> Axes:
        """Axes that split both the table and the batch."""
        return tuple(axis for axis in self.table if axis in self.batch)

    @property
    def copies(self) -> Axes:
        """Axes that split only the batch; along them, devices hold copies of the same block of the table."""
        return tuple(axis for axis in self.batch if axis not in self.table)

    def exchanges(self, num_ids: int) -> bool:
        """Whether ids are sent only to their owners: if that at least halves what is sent."""
        devices = self.size(self.shared)
        return 2 * exchange.capacity(num_ids, devices) <= num_ids

    def size(self, axes: Axes) -> int:
        """Number of devices along some axes."""
        return num_devices(self.mesh, axes)


def place(mesh: Mesh, table: Axes, batch: Axes, num_ids: int) -> Placement:
    """The placement, without axes of size 1; a batch that does not divide evenly is not split."""
    table, batch = (tuple(axis for axis in axes if mesh.shape[axis] > 1) for axes in (table, batch))
    placement = Placement(mesh, table, batch)
    return placement if num_ids % placement.size(batch) == 0 else placement._replace(batch=())


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def sharded_rows(table: jax.Array, ids: jax.Array, placement: Placement) -> jax.Array:
    """Looks up rows of a table that is split over a mesh; call it under `jit` over that mesh.

    Args:
      table: [V, D], with rows split over the axes `placement.table`; their number of devices must divide V.
      ids: [B, ...] in [0, V), split over `placement.batch`.
      placement: placement from `place`.

    Returns:
      [B, ..., D], split like the ids.
    """
    rows = PartitionSpec(placement.table or None), PartitionSpec(placement.batch or None)
    look_up = functools.partial(_look_up, placement=placement)
    return jax.shard_map(
        look_up, mesh=placement.mesh, in_specs=rows, out_specs=rows[1], check_vma=False)(table, ids)


def _forward(table, ids, placement):
    return sharded_rows(table, ids, placement), (ids, jnp.zeros((len(table), 0), table.dtype))


def _backward(placement, kept, gradients):
    """The gradient of the table [V, D], split like the table; ids have none."""
    ids, (num_rows, _) = kept[0], kept[1].shape
    split = PartitionSpec(placement.batch or None)
    scatter = jax.shard_map(
        functools.partial(_scatter, block=num_rows // placement.size(placement.table), placement=placement),
        mesh=placement.mesh, in_specs=(split, split), out_specs=PartitionSpec(placement.table or None),
        check_vma=False)
    return scatter(ids, gradients.astype(kept[1].dtype)), None


sharded_rows.defvjp(_forward, _backward)


def _look_up(table: jax.Array, ids: jax.Array, *, placement: Placement) -> jax.Array:
    """Runs on one device, with its block [V / n, D] and its ids; returns the rows for these ids."""
    shared, width = placement.shared, table.shape[-1]

    def rows_of(ids: jax.Array) -> jax.Array:
        rows, owned = _own(ids, len(table), placement.table)
        return jnp.where(owned[..., None], table.at[rows].get(mode="promise_in_bounds"), 0)

    if placement.exchanges(ids.size):
        planned, group = _plan(ids, len(table), placement)
        found = exchange.fetch(planned, rows_of, width, table.dtype, group).reshape(*ids.shape, width)
    else:
        found = rows_of(_all_gather(ids, shared))
        if shared:
            found = lax.psum_scatter(found, shared, scatter_dimension=0, tiled=True)
    others = tuple(axis for axis in placement.table if axis not in shared)
    return lax.psum(found, others) if others else found


def _scatter(ids: jax.Array, gradients: jax.Array, *, block: int, placement: Placement) -> jax.Array:
    """Runs on one device: the gradient of its block [block, D], from its ids [n...] and gradients [n..., D].

    Over the copies of a block, either the gradients of looked-up rows are gathered or the gradients of the
    block are summed, whichever moves less data.
    """
    ids, gradients = ids.reshape(-1), gradients.reshape(-1, gradients.shape[-1])
    width, devices = gradients.shape[-1], placement.size(placement.shared)
    exchanged = placement.exchanges(ids.size)
    brought = devices * (exchange.capacity(ids.size, devices) if exchanged else ids.size)
    summed = 2 * block * width < (placement.size(placement.copies) - 1) * brought * (width + 1)

    def take(total: jax.Array, rows: jax.Array, gradients: jax.Array) -> jax.Array:
        return total.at[rows].add(gradients, mode="drop")

    total = _deliver(ids, gradients, take, jnp.zeros((block, width), gradients.dtype), block=block,
                     gathered=() if summed else placement.copies, placement=placement)
    return lax.psum(total, placement.copies) if summed else total


def sum_to_owners(
    ids: jax.Array, gradients: jax.Array, num_rows: int, placement: Placement
) -> tuple[jax.Array, jax.Array]:
    """Sums the gradients of looked-up rows on the devices that own the rows; no array has all rows.

    Args:
      ids: [n] in [0, V), split over `placement.batch`; other ids are ignored.
      gradients: [n, D], split likewise.
      num_rows: V.
      placement: placement from `place`. P is the number of devices that split the table.

    Returns:
      rows [P n] and their gradients [P n, D], split like the table. A device's part has its rows in its block
      of V / P, rising and each once; the rest are V / P, with gradient zero.
    """
    split, owned = PartitionSpec(placement.batch or None), PartitionSpec(placement.table or None)
    collect = functools.partial(
        _collect, block=num_rows // placement.size(placement.table), placement=placement)
    return jax.shard_map(collect, mesh=placement.mesh, in_specs=(split, split), out_specs=(owned, owned),
                         check_vma=False)(ids, gradients)


def sum_by_row(rows: jax.Array, gradients: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """Each of the rows [n] once, rising, with the sum of its gradients [n, D]; the rest are V, with zeros.

    Rows out of [0, V) are ignored.

    Example:
      >>> rows, sums = sum_by_row(jnp.array([4, 1, 9, 4]), jnp.array([[1.0], [2.0], [7.0], [3.0]]), 5)
      >>> rows.tolist(), sums.ravel().tolist()
      ([1, 4, 5, 5], [2.0, 4.0, 0.0, 0.0])
    """
    valid = (rows >= 0) & (rows < num_rows)
    found, places = jnp.unique(
        jnp.where(valid, rows, num_rows), return_inverse=True, size=len(rows), fill_value=num_rows)
    gradients = jnp.where(valid[:, None], gradients, 0)
    return found, jnp.zeros_like(gradients).at[places].add(gradients)


def _collect(
    ids: jax.Array, gradients: jax.Array, *, block: int, placement: Placement
) -> tuple[jax.Array, jax.Array]:
    """Runs on one device: the rows of its block in the batch, with their gradients, see `sum_to_owners`."""
    size = len(ids) * placement.size(placement.batch)

    def append(taken, rows, gradients):
        """A round of the exchange brings mostly empty slots; in all, no more than `size` are not."""
        count, *lists = taken
        mine = rows < block
        places = jnp.where(mine, count + jnp.cumsum(mine) - 1, size)
        return count + jnp.sum(mine), *(
            kept.at[places].set(new, mode="drop") for kept, new in zip(lists, (rows, gradients), strict=True))

    start = (jnp.zeros((), ids.dtype), jnp.full(size, block, ids.dtype),
             jnp.zeros((size, gradients.shape[-1]), gradients.dtype))
    take = append if placement.exchanges(ids.size) else lambda taken, *brought: (taken[0], *brought)
    _, rows, gradients = _deliver(
        ids, gradients, take, start, block=block, gathered=placement.copies, placement=placement)
    return sum_by_row(rows, gradients, block)


def _deliver(
    ids: jax.Array, gradients: jax.Array, take: Callable[[Taken, jax.Array, jax.Array], Taken], taken: Taken,
    *, block: int, gathered: Axes, placement: Placement,
) -> Taken:
    """Runs on one device: takes what all devices, along `gathered` too, have for its block.

    `take` gets rows [m] and gradients [m, D], once or in every round of an exchange; a row of another block
    is given as `block`.
    """
    def own(taken: Taken, ids: jax.Array, gradients: jax.Array) -> Taken:
        ids, gradients = _all_gather(ids, gathered), _all_gather(gradients, gathered)
        rows, owned = _own(ids, block, placement.table)
        return take(taken, jnp.where(owned, rows, block), gradients)

    if placement.exchanges(ids.size):
        planned, group = _plan(ids, block, placement)
        return exchange.send(planned, gradients, own, taken, group)
    return own(taken, _all_gather(ids, placement.shared), _all_gather(gradients, placement.shared))


def _plan(ids: jax.Array, block: int, placement: Placement) -> tuple[exchange.Plan, exchange.Group]:
    """The exchange plan for the ids of this device, with the owner of each id."""
    shared, ids = placement.shared, ids.reshape(-1)
    owner, mine, places = jnp.zeros_like(ids), jnp.ones(ids.shape, bool), ids // block
    stride = 1
    for axis in reversed(placement.table):
        size = placement.mesh.shape[axis]
        places, place = places // size, places % size
        if axis in shared:
            owner, stride = owner + stride * place, stride * size
        else:  # devices along it have the same ids: each requests those in its own part
            mine &= place == lax.axis_index(axis)
    group = exchange.Group(shared, placement.size(shared), placement.mesh.axis_names)
    return exchange.plan(ids, jnp.where(mine, owner, group.devices), group.devices), group


def _own(ids: jax.Array, block: int, axes: Axes) -> tuple[jax.Array, jax.Array]:
    """Rows of the ids within this device's block, and which ids it owns; row 0 for ids it does not own."""
    rows = ids - block * (lax.axis_index(axes) if axes else 0)
    owned = (rows >= 0) & (rows < block)
    return jnp.where(owned, rows, 0), owned


def _all_gather(array: jax.Array, axes: Axes) -> jax.Array:
    return lax.all_gather(array, axes, tiled=True) if axes else array
