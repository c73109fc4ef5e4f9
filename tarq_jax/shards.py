"""How a function sees the whole batch where each device runs it on a shard of its own.

Under `jit`, over a mesh or not, arrays are those of the whole batch: the axis is None, and everything
here is the identity. Under `pmap` it is the name of the mapped axis. Requests are dealt to the n shards
like cards, request r to row r // n of shard r % n, so that any share of the batch is spread evenly.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")
AxisName = str | None


def total(tree: Tree, axis_name: AxisName = None) -> Tree:
    """The sum over shards of every leaf; the same bits on all of them."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def gather(tree: Tree, axis_name: AxisName = None) -> Tree:
    """Leaves of all shards in the order of the whole batch: [B / n, ...] to [B, ...]."""
    if axis_name is None:
        return tree
    return undeal(jax.lax.all_gather(tree, axis_name))


def first(share: float, rows: int, axis_name: AxisName = None) -> jax.Array:
    """Which of a shard's first rows are among the first `share` of the whole batch's requests, at least one.

    Args:
      share: of the requests, in (0, 1].
      rows: of this shard.
      axis_name: of the shards.

    Returns:
      [A] bool, with the same A on every shard; all True where the batch is whole.

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
