"""Rows sent between devices by owner: each asks each for its own ids, and no device sees a whole batch.

What a device sends does not grow with the number of devices, as it would if all ids were gathered. For
shapes that are fixed, each asks each for at most `capacity` different ids a round; rounds go on until all
are served. Ids spread evenly, as hashes do, need one round. Functions here run within `shard_map`.

Axis letters: n ids of a device, P devices that exchange, C the capacity.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

SLACK = 2.0  # capacity over the share of an owner, were all ids different and spread evenly


def capacity(num_ids: int, devices: int) -> int:
    """C: different ids that a device asks another one for in a round.

    Example:
      >>> capacity(num_ids=1000, devices=8)
      250
    """
    return math.ceil(SLACK * num_ids / devices)


class Way(NamedTuple):
    """Who exchanges."""

    axes: tuple[str, ...]  # of the mesh, along which P devices exchange
    devices: int  # P
    everyone: tuple[str, ...]  # axes of all devices, which take as many rounds as each other


class Plan(NamedTuple):
    """What a device asks for: its different ids, in the order of their owners."""

    ids: jax.Array  # [n], each once; then anything
    owners: jax.Array  # [n] rising, in [0, P); P for what nobody is asked for
    turn: jax.Array  # [n] place among those of the same owner
    place: jax.Array  # [n], of each id as it was given: where it is here

    def slots(self, turn: jax.Array, devices: int, size: int) -> jax.Array:
        """[n]: where each is in the P x C entries of a round; P x C for those that have another round."""
        now = (self.turn // size == turn) & (self.owners < devices)
        return jnp.where(now, self.owners * size + self.turn % size, devices * size)

    def asked(self, slots: jax.Array, num_slots: int) -> jax.Array:
        """[num_slots]: the ids in these slots, -1 in empty ones."""
        return jnp.full(num_slots, -1, self.ids.dtype).at[slots].set(self.ids, mode="drop")


def plan(ids: jax.Array, owners: jax.Array, devices: int) -> Plan:
    """Ids given [n] and who owns them [n], P where nobody is to be asked."""
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
    planned: Plan, rows_of: Callable[[jax.Array], jax.Array], width: int, dtype: jnp.dtype, way: Way
) -> jax.Array:
    """The rows of the ids of a plan, from their owners.

    Args:
      planned: of this device.
      rows_of: ids [m] to rows [m, D] that this device owns; -1 is no id.
      width: D.
      dtype: of rows.
      way: of the exchange.

    Returns:
      [n, D] in the order in which ids were given; zero for those that nobody was asked for.
    """
    num = len(planned.ids)
    size = capacity(num, way.devices)

    def one(turn: jax.Array, found: jax.Array) -> jax.Array:
        slots = planned.slots(turn, way.devices, size)
        rows = rows_of(_exchange(planned.asked(slots, way.devices * size), way))
        return found + _exchange(rows, way).at[slots].get(mode="fill", fill_value=0)

    found = lax.fori_loop(0, _rounds(planned, size, way), one, jnp.zeros((num, width), dtype))
    return found[planned.place]


def send(
    planned: Plan, values: jax.Array, take: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    taken: jax.Array, way: Way,
) -> jax.Array:
    """Values of ids, summed where an id is given more than once, to the owners of these ids.

    Args:
      planned: of this device.
      values: [n, D], in the order in which ids were given.
      take: (taken, ids [m], values [m, D]) -> taken, as this device takes what it is sent; -1 is no id.
      taken: what there is before.
      way: of the exchange.

    Returns:
      What `take` made of it in the last round.
    """
    num, width = values.shape
    size = capacity(num, way.devices)
    summed = jnp.zeros_like(values).at[planned.place].add(values)

    def one(turn: jax.Array, taken: jax.Array) -> jax.Array:
        slots = planned.slots(turn, way.devices, size)
        sent = jnp.zeros((way.devices * size, width), values.dtype).at[slots].set(summed, mode="drop")
        return take(taken, _exchange(planned.asked(slots, len(sent)), way), _exchange(sent, way))

    return lax.fori_loop(0, _rounds(planned, size, way), one, taken)


def _rounds(planned: Plan, size: int, way: Way) -> jax.Array:
    most = jnp.max(jnp.where(planned.owners < way.devices, planned.turn, -1))
    return lax.pmax(most // size + 1, way.everyone)


def _exchange(array: jax.Array, way: Way) -> jax.Array:
    """[P x C, ...], the C of device p in the p-th part, to what the others had for this one."""
    return lax.all_to_all(array, way.axes, split_axis=0, concat_axis=0, tiled=True)
