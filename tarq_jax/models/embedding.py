"""Embedding tables and their look-up: on one device here, by shards in `tarq_jax.training`."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

EMBEDDING_INIT = nn.initializers.normal(stddev=0.05)
UNKNOWN = 0  # the row for padding and for every id outside the vocabulary


def take_rows(path: str, table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of a table [V, D] for ids [...] in [0, V): [..., D]; `path` is ignored."""
    del path
    return jnp.asarray(table).at[ids].get(mode="promise_in_bounds")


@dataclasses.dataclass(frozen=True)
class Tables:
    """How a model stores and reads its tables.

    Attributes:
      multiple: the number of rows is rounded up to a multiple of this, so that rows can be split evenly.
        Rows beyond the vocabulary are never read.
      lookup: (path of the parameter, table [V, D], ids [...] in [0, V)) -> rows [..., D].
    """

    multiple: int = 1
    lookup: Callable[[str, jax.Array, jax.Array], jax.Array] = take_rows

    def rows(self, size: int) -> int:
        """Number of rows of a table for a vocabulary of `size` ids.

        Example:
          >>> Tables(multiple=8).rows(61)
          64
        """
        return -(-size // self.multiple) * self.multiple


ONE_DEVICE = Tables()


class Embedding(nn.Module):
    """A table with one vector per id. An id outside [0, size) reads row 0, the row of unknown ids.

    Attributes:
      size: V, number of ids in the vocabulary, 0 included.
      width: D.
      tables: how the table is stored and looked up.
    """

    size: int
    width: int
    tables: Tables = ONE_DEVICE

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """[...] integers to [..., D]."""
        table = self.param("embedding", EMBEDDING_INIT, (self.tables.rows(self.size), self.width))
        ids = jnp.asarray(ids)
        ids = jnp.where((ids >= 0) & (ids < self.size), ids, UNKNOWN)
        lookup = take_rows if self.is_initializing() else self.tables.lookup  # no mesh at initialisation
        return lookup("/".join(("params", *self.path, "embedding")), table, ids)
