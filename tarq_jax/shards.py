"""How a function sees the whole batch where each device runs it on a shard of its own.

Under `jit`, over a mesh or not, arrays are those of the whole batch: the axis is None, and everything
here is the identity. Under `pmap` it is the name of the mapped axis. Requests are dealt to the n shards
like cards, request r to row r // n of shard r % n, so that any share of the batch is spread evenly.
"""

from typing import Any, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np

Tree = TypeVar("Tree")
AxisName = str | None


def total(tree: Tree, axis_name: AxisName = None) -> Tree:
    """The sum over shards of every leaf; the same bits on all of them."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def gather(tree: Tree, axis_name: AxisName = None) -> Tree:
    """Leaves of all shards in the order of the whole batch: [B / n, ...] to [B, ...]."""
    if axis_name is None:
        return tree

    def undeal(array: jax.Array) -> jax.Array:
        return jax.lax.all_gather(array, axis_name, axis=1).reshape(-1, *array.shape[1:])

    return jax.tree.map(undeal, tree)


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


def deal(tree: Any, num_shards: int) -> Any:
    """Leaves [B, ...] on the host to [n, B / n, ...], a row a shard; n has to divide B.

    Example:
      >>> deal(np.arange(6), 2).tolist()
      [[0, 2, 4], [1, 3, 5]]
    """

    def split(array: chex.Array) -> np.ndarray:
        return np.swapaxes(np.reshape(array, (-1, num_shards, *np.shape(array)[1:])), 0, 1)

    return jax.tree.map(split, tree)
