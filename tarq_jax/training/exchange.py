"""Exchange of table rows between devices: each device requests its ids from the devices that own them.

The amount that a device sends does not grow with the number of devices, as it would if all ids were gathered.
Shapes must be static, so per round each device requests at most `capacity` distinct ids from every other
device; rounds repeat until all ids are served. Ids that are spread evenly, like hashes, need one round.
Functions here run within `shard_map`.

Axis letters: n ids of a device, P devices that exchange, C the capacity.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

Taken = TypeVar("Taken")
SLACK = 2.0  # capacity / ids per owner if all ids are distinct and spread evenly


def capacity(num_ids: int, devices: int) -> int:
    """C: how many distinct ids a device can request from another one per round.

    Example:
      >>> capacity(num_ids=1000, devices=8)
      250
    """
    return math.ceil(SLACK * num_ids / devices)


class Group(NamedTuple):
    """The devices that exchange."""

    axes: tuple[str, ...]  # axes of the mesh along which P devices exchange
    devices: int  # P
    everyone: tuple[str, ...]  # axes of all devices, which must run the same number of rounds


class Plan(NamedTuple):
    """The requests of a device: its distinct ids, sorted by owner."""

    ids: jax.Array  # [n], each distinct id once; the rest is arbitrary
    owners: jax.Array  # [n] rising, in [0, P); P for ids that are not requested
    turn: jax.Array  # [n] position among the ids of the same owner
    place: jax.Array  # [n], for each given id: its position in `ids`

    def slots(self, turn: jax.Array, devices: int, size: int) -> jax.Array:
        """[n]: slot of each id in the P x C entries of round `turn`; P x C for ids of other rounds."""
        now = (self.turn // size == turn) & (self.owners < devices)
        return jnp.where(now, self.owners * size + self.turn % size, devices * size)

    def asked(self, slots: jax.Array, num_slots: int) -> jax.Array:
        """[num_slots]: the ids in the slots, -1 in empty slots."""
        return jnp.full(num_slots, -1, self.ids.dtype).at[slots].set(self.ids, mode="drop")


def plan(ids: jax.Array, owners: jax.Array, devices: int) -> Plan:
    """Plans the requests for `ids` [n] with `owners` [n]; an id with owner P is not requested."""
    num = len(ids)
    given = jnp.arange(num)
    by_owner, by_id, given = lax.sort((owners, ids, given), num_keys=2)
    new = jnp.append(True, (by_owner[1:] != by_owner[:-1]) | (by_id[1:] != by_id[:-1]))
    group = jnp.cumsum(new) - 1
    different = jnp.zeros_like(ids).at[group].set(by_id)
    owners = jnp.full(num, devices, owners.dtype).at[group].set(by_owner)
    turn = jnp.arange(num) - jnp.searchsorted(owners, owners)
    return Plan(different, owners, turn, jnp.zeros_like(group).at[given].set(group))


def fetch(
    planned: Plan, rows_of: Callable[[jax.Array], jax.Array], width: int, dtype: jnp.dtype, group: Group
) -> jax.Array:
    """Fetches the rows for the ids of a plan from their owners.

    Args:
      planned: plan of this device.
      rows_of: ids [m] -> rows [m, D] of the part that this device owns; id -1 marks an empty slot.
      width: D.
      dtype: type of the rows.
      group: the devices that exchange.

    Returns:
      [n, D] in the order in which the ids were given; zero for ids that were not requested.
    """
    num = len(planned.ids)
    size = capacity(num, group.devices)

    def one(turn: jax.Array, found: jax.Array) -> jax.Array:
        slots = planned.slots(turn, group.devices, size)
        rows = rows_of(_exchange(planned.asked(slots, group.devices * size), group))
        return found + _exchange(rows, group).at[slots].get(mode="fill", fill_value=0)

    found = lax.fori_loop(0, _rounds(planned, size, group), one, jnp.zeros((num, width), dtype))
    return found[planned.place]


def send(
    planned: Plan, values: jax.Array, take: Callable[[Taken, jax.Array, jax.Array], Taken], taken: Taken,
    group: Group,
) -> Taken:
    """Sends values to the owners of their ids; values of an id that is given more than once are summed first.

    Args:
      planned: plan of this device.
      values: [n, D], in the order in which the ids were given.
      take: (taken, ids [m], values [m, D]) -> taken; accumulates what this device receives in a round. Id -1
        marks an empty slot.
      taken: initial value of the accumulator, a pytree.
      group: the devices that exchange.

    Returns:
      The accumulator after the last round.
    """
    num, width = values.shape
    size = capacity(num, group.devices)
    summed = jnp.zeros_like(values).at[planned.place].add(values)

    def one(turn: jax.Array, taken: Taken) -> Taken:
        slots = planned.slots(turn, group.devices, size)
        sent = jnp.zeros((group.devices * size, width), values.dtype).at[slots].set(summed, mode="drop")
        return take(taken, _exchange(planned.asked(slots, len(sent)), group), _exchange(sent, group))

    return lax.fori_loop(0, _rounds(planned, size, group), one, taken)


def _rounds(planned: Plan, size: int, group: Group) -> jax.Array:
    most = jnp.max(jnp.where(planned.owners < group.devices, planned.turn, -1))
    return lax.pmax(most // size + 1, group.everyone)


def _exchange(array: jax.Array, group: Group) -> jax.Array:
    """[P x C, ...]: sends the p-th C entries to device p; returns what the devices sent to this one."""
    return lax.all_to_all(array, group.axes, split_axis=0, concat_axis=0, tiled=True)
