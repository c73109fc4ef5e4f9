"""Embedding tables and their look-up: on one device here, by shards in `tarq_jax.training`."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

EMBEDDING_INIT = nn.initializers.normal(stddev=0.05)
TABLE = "embedding"  # the name of a table's parameter, the last part of its path
UNKNOWN = 0  # the row for padding and for every id outside the vocabulary
LOOKUPS = "lookups"  # collection in which embeddings record the ids that they look up, if it is mutable
ROWS = "rows"  # collection of `TableRows`, which embeddings read instead of their tables


def any_number(path: str) -> int:
    """1: a table may have any number of rows; `path` is ignored."""
    del path
    return 1


def take_rows(path: str, table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of a table [V, D] for ids [...] in [0, V): [..., D]; `path` is ignored."""
    del path
    return jnp.asarray(table).at[ids].get(mode="promise_in_bounds")


def rows_among(known: jax.Array, rows: jax.Array, ids: jax.Array) -> jax.Array:
    """The rows for ids [...], from some rows [m, D] of a table and their ids `known` [m], which rise.

    Returns:
      [..., D]; NaN for an id that is not among `known`.

    Example:
      >>> rows_among(jnp.array([2, 5]), jnp.array([[0.2], [0.5]]), jnp.array([5, 2, 5, 3])).ravel().tolist()
      [0.5, 0.20000000298023224, 0.5, nan]
    """
    places = jnp.searchsorted(known, ids)
    found = known.at[places].get(mode="fill", fill_value=-1) == ids
    return jnp.where(found[..., None], rows.at[places].get(mode="clip"), jnp.nan)


class TableRows(struct.PyTreeNode):
    """The rows of a table that a function looks up, in place of the table.

    The gradient of `rows` has a value per row, that of the table one for every row it has.
    """

    ids: jax.Array  # [m] rising; the last may be ids that the table does not have
    rows: jax.Array  # [m, D]
    among: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] = struct.field(
        pytree_node=False, default=rows_among)  # like `rows_among`

    def __call__(self, ids: jax.Array) -> jax.Array:
        """[...] ids to [..., D]."""
        return self.among(self.ids, self.rows, ids)


@dataclasses.dataclass(frozen=True)
class Tables:
    """How a model stores and reads its tables.

    Attributes:
      multiple: path of the parameter -> what the number of rows is rounded up to a multiple of, so that rows
        can be split evenly. Rows beyond the vocabulary are zero and never read.
      lookup: (path of the parameter, table [V, D], ids [...] in [0, V)) -> rows [..., D].
    """

    multiple: Callable[[str], int] = any_number
    lookup: Callable[[str, jax.Array, jax.Array], jax.Array] = take_rows

    def rows(self, path: str, size: int) -> int:
        """Number of rows of the table at a path, for a vocabulary of `size` ids.

        Example:
          >>> Tables(multiple=lambda path: 8).rows("params/item_id/embedding", 61)
          64
        """
        multiple = self.multiple(path)
        return -(-size // multiple) * multiple


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
        ids = jnp.asarray(ids)
        ids = jnp.where((ids >= 0) & (ids < self.size), ids, UNKNOWN)
        if self.has_variable(ROWS, TABLE):
            return self.get_variable(ROWS, TABLE)(ids)
        path = "/".join(("params", *self.path, TABLE))
        table = self.param(TABLE, self._init, (self.tables.rows(path, self.size), self.width))
        lookup = take_rows  # at initialisation, whose batch need not fit a mesh
        if not self.is_initializing():
            self.sow(LOOKUPS, "ids", ids)
            lookup = self.tables.lookup
        return lookup(path, table, ids)

    def _init(self, rng: jax.Array, shape: tuple[int, int]) -> jax.Array:
        """The same rows for the vocabulary however many follow; those are zero."""
        real = jnp.arange(shape[0])[:, None] < self.size
        return jnp.where(real, EMBEDDING_INIT(rng, shape), 0.0)
