"""From a data set, in memory or on disk, to batches: any step's at once, so that resuming is exact."""

import dataclasses
import functools
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np

from tarq_jax.data.collate import collate, lookup
from tarq_jax.data.order import ONE_HOST, WINDOW, Order, Shard, deals_blocks, draw, locate, spanned, windows
from tarq_jax.data.records import Dataset, Requests, Split, offsets_of
from tarq_jax.types import Batch


class Shapes(TypedDict):
    """What the batches of a run are padded to."""

    history_length: int  # N
    num_candidates: int  # G


def _split(dataset: Dataset, split: str) -> Split:
    if split not in dataset.splits:
        raise ValueError(f"split is {split!r}, expected one of {sorted(dataset.splits)}")
    return dataset.splits[split]


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}, expected at least 1")


def _check_shard(shard: Shard, batch_size: int) -> None:
    if not 0 <= shard.index < shard.count:
        raise ValueError(f"shard is {shard}, expected an index in [0, {shard.count})")
    if batch_size % shard.count:
        raise ValueError(f"batch_size is {batch_size}, expected a multiple of the {shard.count} hosts")


def padded_lengths(buckets: Sequence[int], history_length: int) -> tuple[int, ...]:
    """The lengths that histories of a batch may be padded to: the buckets below N, and N.

    Raises:
      ValueError: buckets are not positive and rising.
    """
    if any(second <= first for first, second in zip((0, *buckets), buckets, strict=False)):
        raise ValueError(f"buckets is {tuple(buckets)}, expected rising positive lengths")
    return (*(length for length in buckets if length < history_length), history_length)


class _Window(NamedTuple):
    """What is kept in memory of one window of an epoch."""

    requests: Requests
    batches: np.ndarray  # [batches, order.drawn] indices of requests


@dataclasses.dataclass(frozen=True)
class TrainBatches:
    """The batch of any step, by `batches[step]`; safe to call from several threads."""

    dataset: Dataset
    split: Split
    order: Order
    lengths: tuple[int, ...]  # that histories are padded to
    num_candidates: int
    _windows: dict[tuple[int, int], _Window] = dataclasses.field(default_factory=dict)
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def __getitem__(self, step: int) -> Batch:
        epoch, window, batch = locate(self.order, step)
        requests, batches = self._window(epoch, window)
        drawn = batches[batch]
        lengths = np.diff(requests.history_offsets)[drawn] if len(self.lengths) > 1 else ()
        length = self.lengths[np.searchsorted(self.lengths[:-1], max(lengths, default=0))]
        return collate(self.dataset, requests, drawn[self.order.rows], int(length), self.num_candidates)

    def _window(self, epoch: int, window: int) -> _Window:
        """The requests of a window and their batches; the last two stay, as threads may be in both."""
        key = epoch, window
        if (found := self._windows.get(key)) is not None:
            return found
        with self._lock:
            if key not in self._windows:
                requests = self.split.read(windows(self.order, epoch)[window].tolist())
                lengths = np.diff(requests.history_offsets)
                drawn = draw(self.order, epoch, window, lengths, self.lengths[:-1])
                while len(self._windows) > 1:
                    self._windows.pop(next(iter(self._windows)))
                self._windows[key] = _Window(requests, drawn)
            return self._windows[key]


def train_batches(dataset: Dataset, split: str, *, batch_size: int, history_length: int, num_candidates: int,
                  seed: int, start_step: int = 0, buckets: Sequence[int] = (), shard: Shard = ONE_HOST,
                  readers: int = 0, window: int = WINDOW) -> Iterator[Batch]:
    """Batches without end; that of step s is a pure function of (seed, s, hosts), so resuming is exact.

    See `tarq_jax.data.order` for the order. Grain reads ahead and in several threads; its own shuffling is
    not used, as present runs are defined by NumPy's permutations.

    Args:
      dataset: the data.
      split: name of the split.
      batch_size: B, requests a batch, of all hosts together.
      history_length: N.
      num_candidates: G.
      seed: of the order, at least 0.
      start_step: first step to give.
      buckets: rising lengths below N. Requests are grouped by them, and histories of a batch are padded to
        the smallest that holds all of it, or N: as many shapes as there are buckets, and one.
      shard: which of how many hosts this is; it gets B / count requests a batch.
      readers: threads that make batches, in order, each up to one batch ahead; 0 makes them when asked for.
      window: blocks shuffled together, where the split is on disk.

    Returns:
      An iterator over `Batch` with NumPy leaves.

    Raises:
      ValueError: the split is unknown, it or a window of it has fewer requests than a batch, hosts do not
        divide the batch, or buckets do not rise.
    """
    requests = _split(dataset, split)
    _check_sizes(batch_size=batch_size, history_length=history_length, num_candidates=num_candidates,
                 window=window)
    _check_shard(shard, batch_size)
    lengths = padded_lengths(buckets, history_length)
    if len(requests) < batch_size:
        raise ValueError(f"split {split!r} has {len(requests)} requests, expected at least one batch "
                         f"(batch_size {batch_size})")
    dealt = deals_blocks(len(requests.sizes), shard, lengths[:-1])
    order = Order(requests.sizes, batch_size, seed, shard, dealt, window)
    batches = TrainBatches(dataset, requests, order, lengths, num_candidates)
    if readers:
        return _in_threads(batches, start_step, readers)
    return map(batches.__getitem__, range(start_step, sys.maxsize))


def _in_threads(batches: TrainBatches, start_step: int, readers: int) -> Iterator[Batch]:
    import grain  # only here: it imports JAX

    steps = grain.MapDataset.range(start_step, sys.maxsize).map(batches.__getitem__)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=readers,
                                                        prefetch_buffer_size=2 * readers)))


def _padded_ranges(start: int, stop: int, size: int) -> Iterator[np.ndarray]:
    """`start` to `stop` in arrays of `size`, the last one filled up with -1."""
    for first in range(start, stop, size):
        index = np.arange(first, first + size)
        yield np.where(index < stop, index, -1)


def eval_batches(dataset: Dataset, split: str, *, batch_size: int, history_length: int, num_candidates: int,
                 shard: Shard = ONE_HOST) -> Iterator[Batch]:
    """All requests of a split once and in order, the last batch filled up with fully masked requests.

    Args:
      dataset: the data.
      split: name of the split.
      batch_size: B, requests a batch, of all hosts together.
      history_length: N.
      num_candidates: G.
      shard: which of how many hosts this is; it gets its B / count rows of every batch.

    Returns:
      An iterator over `Batch` with NumPy leaves; empty for an empty split.

    Raises:
      ValueError: the split is unknown, or hosts do not divide the batch.
    """
    requests = _split(dataset, split)
    _check_sizes(batch_size=batch_size, history_length=history_length, num_candidates=num_candidates)
    _check_shard(shard, batch_size)
    rows = batch_size // shard.count
    own = slice(shard.index * rows, (shard.index + 1) * rows)
    return (collate(dataset, part, indices[own], history_length, num_candidates)
            for part, indices in _in_order(requests, batch_size))


def _in_order(split: Split, batch_size: int) -> Iterator[tuple[Requests, np.ndarray]]:
    """The blocks that each batch touches, and its requests in them, or -1."""
    offsets = offsets_of(np.array(split.sizes))
    read = functools.lru_cache(maxsize=1)(split.read)  # a block holds several batches
    for indices in _padded_ranges(0, len(split), batch_size):
        blocks = spanned(offsets, int(indices[0]), int(indices.max()) + 1)
        yield read(blocks), np.where(indices < 0, -1, indices - offsets[blocks[0]])


def item_batches(dataset: Dataset, batch_size: int) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """The features of all real items (ids 1 to V - 1) in order, for encoding an index.

    Args:
      dataset: the data.
      batch_size: M, items a batch.

    Returns:
      An iterator over (features, mask): name -> [M, ...] and [M] bool, False where the last batch is filled
      up with item 0.
    """
    _check_sizes(batch_size=batch_size)
    fields = dataset.schema.side("item")
    return ((lookup(fields, dataset.items, np.maximum(ids, 0)), ids >= 0)
            for ids in _padded_ranges(1, dataset.schema.num_items, batch_size))


def count_candidates(dataset: Dataset, split: str) -> np.ndarray:
    """How often each item is a candidate in a split: [V] int64."""
    requests = _split(dataset, split)
    counts: Any = np.zeros(dataset.schema.num_items, np.int64)
    for block in range(len(requests.sizes)):
        counts += np.bincount(requests.read((block,)).candidates, minlength=len(counts))
    return counts
