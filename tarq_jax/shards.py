"""How a function that runs on one shard per device computes results over the full batch.

Under `jit`, with or without a mesh, arrays hold the full batch: the axis name is None, and `total` and
`gather` are the identity. Under `pmap` the axis name is that of the mapped axis. Requests are dealt to the
n shards like cards: request r becomes row r // n of shard r % n, so that the first requests of the batch are
spread evenly over the shards.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")
AxisName = str | None


def total(tree: Tree, axis_name: AxisName = None) -> Tree:
    """The sum of every leaf over the shards; bitwise equal on all of them."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def gather(tree: Tree, axis_name: AxisName = None) -> Tree:
    """Leaves of all shards in the order of the full batch: [B / n, ...] to [B, ...]."""
    if axis_name is None:
        return tree
    return undeal(jax.lax.all_gather(tree, axis_name))


def first(share: float, rows: int, axis_name: AxisName = None) -> jax.Array:
    """Which of a shard's first rows are among the first `share` of the full batch's requests.

    Args:
      share: share of the requests of the full batch, in (0, 1]; it selects at least one request.
      rows: number of rows of this shard.
      axis_name: name of the axis of shards; None without shards.

    Returns:
      [A] bool, with the same A on every shard; all True without shards.

    Example:
      >>> first(0.5, 6).tolist()
      [True, True, True]
    """
    num_shards, shard = (1, 0) if axis_name is None else (
        jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name))
    requests = max(1, round(share * rows * num_shards))
    return jnp.arange(-(-requests // num_shards)) * num_shards + shard < requests


def deal(tree: Tree, num: int) -> Tree:
    """Leaves [B, ...] to [n, B / n, ...], whose row s has the rows s, s + n, s + 2n, ...; n must divide B.

    Micro-batches are dealt likewise: a device that holds consecutive rows of a batch then holds a share of
    every micro-batch, and no row moves to another device, if `num` divides its number of rows.

    Example:
      >>> deal(jnp.arange(6), 2).tolist()
      [[0, 2, 4], [1, 3, 5]]
    """
    return jax.tree.map(lambda leaf: leaf.reshape(-1, num, *leaf.shape[1:]).swapaxes(0, 1), tree)


def undeal(tree: Tree) -> Tree:
    """The inverse of `deal`: [n, B / n, ...] to [B, ...]."""
    return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1).reshape(-1, *leaf.shape[2:]), tree)
