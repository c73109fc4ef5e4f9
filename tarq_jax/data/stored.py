"""Requests that stay on disk and are read block by block."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tarq_jax.data.records import Requests, check_requests, offsets_of, requests_from_blocks
from tarq_jax.schema import Schema

AT_ONCE = 4  # records that are read by one call, during which Python's lock stops all other threads


@dataclasses.dataclass(frozen=True)
class StoredRequests:
    """A `tarq_jax.data.records.Split` on disk, whose records are decoded when they are read.

    A record holds some hundreds of requests in flat columns, so decoding it takes one view of its bytes per
    column. Ids are checked against the schema, as for data in memory.
    """

    schema: Schema
    source: Sequence[Mapping[str, np.ndarray]]  # records in the order of their block numbers; can be pickled
    sizes: tuple[int, ...]  # requests of each record
    longest_history: int
    most_candidates: int
    num_users: int  # rows of the user table
    name: str = ""  # name of the split, for errors
    # [R] events in the history of each request, such as a memory map; None in data of the first versions
    history_lengths: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self):
        if len(self.source) != len(self.sizes):
            raise ValueError(f"split {self.name!r} has {len(self.source)} records, expected "
                             f"{len(self.sizes)}, as its metadata says: prepare it again")
        if self.history_lengths is not None and self.history_lengths.shape != (len(self),):
            raise ValueError(f"split {self.name!r} has {self.history_lengths.size} lengths of histories, "
                             f"expected {len(self)}, as its metadata says: prepare it again")

    def __len__(self) -> int:
        return sum(self.sizes)

    def lengths_of(self, blocks: Sequence[int]) -> np.ndarray:
        """[R] events in the histories of the given blocks, in the order of `read`, without reading them.

        Raises:
          ValueError: the data have no lengths.
        """
        if self.history_lengths is None:
            raise ValueError(f"split {self.name!r} has no lengths of histories: prepare it again")
        starts = self._starts
        return np.concatenate([self.history_lengths[starts[block]:starts[block + 1]]
                               for block in sorted(blocks)])

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        """The first request of each block."""
        return offsets_of(np.array(self.sizes))

    def read(self, blocks: Sequence[int]) -> Requests:
        """The requests of the given blocks, in the order of block numbers."""
        reader: Any = self.source
        numbers = [int(block) for block in blocks]
        records = (record for start in range(0, len(numbers), AT_ONCE)
                   for record in reader.__getitems__(numbers[start:start + AT_ONCE]))
        requests = requests_from_blocks(self.schema, records)
        expected = sum(self.sizes[block] for block in blocks)
        if len(requests) != expected:
            raise ValueError(f"split {self.name!r}: blocks {list(blocks)} hold {len(requests)} requests, "
                             f"expected {expected}, as its metadata says: prepare it again")
        if self.history_lengths is not None and not np.array_equal(
                np.diff(requests.history_offsets), self.lengths_of(numbers)):
            raise ValueError(f"split {self.name!r}: histories of blocks {numbers} have other lengths than "
                             "those stored beside them: prepare it again")
        check_requests(self.schema, self.num_users, requests, f"split {self.name!r}")
        return requests
