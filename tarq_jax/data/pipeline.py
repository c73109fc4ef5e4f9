"""Makes batches from a data set in memory or on disk; any step's directly, so that resuming is exact."""

import functools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypedDict

import numpy as np

from tarq_jax.data.collate import collate, lookup
from tarq_jax.data.order import ONE_HOST, WINDOW, Order, Shard, deals_blocks, spanned
from tarq_jax.data.records import Dataset, Requests, Split, offsets_of
from tarq_jax.data.stored import StoredRequests
from tarq_jax.data.windows import TrainBatches, with_read_ahead
from tarq_jax.types import Batch


class Shapes(TypedDict):
    """The sizes that the batches of a run are padded to."""

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
    """The lengths that the histories of a batch may be padded to: the buckets below N, and N.

    Raises:
      ValueError: the buckets are not positive and rising.
    """
    if any(second <= first for first, second in zip((0, *buckets), buckets, strict=False)):
        raise ValueError(f"buckets is {tuple(buckets)}, expected rising positive lengths")
    return (*(length for length in buckets if length < history_length), history_length)


def train_batches(dataset: Dataset, split: str, *, batch_size: int, history_length: int, num_candidates: int,
                  seed: int, start_step: int = 0, buckets: Sequence[int] = (), shard: Shard = ONE_HOST,
                  readers: int = 0, window: int = WINDOW) -> Iterator[Batch]:
    """Endless batches; that of step s is a pure function of (seed, s, hosts), so that resuming is exact.

    See `tarq_jax.data.order` for the order. While the batches of one window are used, a thread reads the next
    window, so at most two windows are in memory. With `readers`, Grain makes batches in several threads.
    Grain's own shuffling is not used: NumPy's permutations define the order, which existing runs depend on.

    Args:
      dataset: the data.
      split: name of the split.
      batch_size: B, requests per batch, over all hosts.
      history_length: N.
      num_candidates: G.
      seed: seed of the order, at least 0.
      start_step: the step of the first batch.
      buckets: rising lengths below N. Requests are grouped by them, and the histories of a batch are padded
        to the smallest bucket that holds all of them, or to N. So there is one shape per bucket, plus one.
      shard: the index of this host and the number of hosts; this host gets B / count requests per batch.
      readers: threads that make batches, in order, each up to one batch ahead; with 0, a batch is made when
        it is requested. Windows are read ahead in any case.
      window: number of blocks that are shuffled together, for a split on disk. Memory holds two windows.

    Returns:
      An iterator over `Batch` with NumPy leaves. An error of reading ahead is raised where a batch needs what
      could not be read.

    Raises:
      ValueError: the split is unknown, the split or every window of an epoch may have fewer requests than a
        batch, the number of hosts does not divide the batch, or the buckets do not rise.
    """
    requests = _split(dataset, split)
    _check_sizes(batch_size=batch_size, history_length=history_length, num_candidates=num_candidates,
                 window=window)
    _check_shard(shard, batch_size)
    lengths = padded_lengths(buckets, history_length)
    if len(requests) < batch_size:
        raise ValueError(f"split {split!r} has {len(requests)} requests, expected at least one batch "
                         f"(batch_size {batch_size})")
    blocks, lengths_of = len(requests.sizes), _lengths_of(requests)
    dealt = deals_blocks(blocks, shard, lengths[:-1], lengths_of is not None)
    if not dealt and deals_blocks(blocks, shard, ()):
        _say_that_all_is_read(split)
    order = Order(requests.sizes, batch_size, seed, shard, dealt, window,
                  aligned=dealt and len(lengths) > 1)
    batches = TrainBatches(dataset, requests, order, lengths, num_candidates, lengths_of)
    steps = range(start_step, sys.maxsize)
    made = _in_threads(batches, start_step, readers) if readers else map(batches.__getitem__, steps)
    return with_read_ahead(batches, zip(steps, made, strict=False))


def same_order(dataset: Dataset, split: str, hosts: Sequence[int], *, history_length: int,
               buckets: Sequence[int] = ()) -> bool:
    """Whether `train_batches` has the same order of the requests with each of these numbers of hosts."""
    requests, lengths = _split(dataset, split), padded_lengths(buckets, history_length)
    return len(set(hosts)) == 1 or not any(
        deals_blocks(len(requests.sizes), Shard(0, count), lengths[:-1], lengths_known(requests))
        for count in hosts)


def lengths_known(split: Split) -> bool:
    """Whether the lengths of a split's histories can be read without the histories."""
    return _lengths_of(split) is not None


def _lengths_of(split: Split) -> Callable[[Sequence[int]], np.ndarray] | None:
    if isinstance(split, StoredRequests) and split.history_lengths is not None:
        return split.lengths_of
    return None


@functools.cache  # once per process
def _say_that_all_is_read(split: str) -> None:
    logging.getLogger(__name__).warning(
        "split %r was prepared without the lengths of its histories, so with buckets every host reads all of "
        "it; prepare it again for each host to read its own blocks", split)


def _in_threads(batches: TrainBatches, start_step: int, readers: int) -> Iterator[Batch]:
    import grain  # imported here because it imports JAX

    steps = grain.MapDataset.range(start_step, sys.maxsize).map(batches.__getitem__)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=readers,
                                                        prefetch_buffer_size=2 * readers)))


def _padded_ranges(start: int, stop: int, size: int) -> Iterator[np.ndarray]:
    """The numbers from `start` to `stop` in arrays of `size`, the last one filled up with -1."""
    for first in range(start, stop, size):
        index = np.arange(first, first + size)
        yield np.where(index < stop, index, -1)


def eval_batches(dataset: Dataset, split: str, *, batch_size: int, history_length: int, num_candidates: int,
                 shard: Shard = ONE_HOST) -> Iterator[Batch]:
    """All requests of a split, once and in order; fully masked requests fill up the last batch.

    Args:
      dataset: the data.
      split: name of the split.
      batch_size: B, requests per batch, over all hosts.
      history_length: N.
      num_candidates: G.
      shard: the index of this host and the number of hosts; this host gets its B / count rows of every batch.

    Returns:
      An iterator over `Batch` with NumPy leaves; empty for an empty split.

    Raises:
      ValueError: the split is unknown, or the number of hosts does not divide the batch.
    """
    requests = _split(dataset, split)
    _check_sizes(batch_size=batch_size, history_length=history_length, num_candidates=num_candidates)
    _check_shard(shard, batch_size)
    rows = batch_size // shard.count
    own = slice(shard.index * rows, (shard.index + 1) * rows)
    return (collate(dataset, part, indices[own], history_length, num_candidates)
            for part, indices in _in_order(requests, batch_size))


def _in_order(split: Split, batch_size: int) -> Iterator[tuple[Requests, np.ndarray]]:
    """For each batch, the blocks that it touches, and the positions of its requests in them, or -1."""
    offsets = offsets_of(np.array(split.sizes))
    read = functools.lru_cache(maxsize=1)(split.read)  # consecutive batches read the same block
    for indices in _padded_ranges(0, len(split), batch_size):
        blocks = spanned(offsets, int(indices[0]), int(indices.max()) + 1)
        yield read(blocks), np.where(indices < 0, -1, indices - offsets[blocks[0]])


def item_batches(dataset: Dataset, batch_size: int) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """The features of all real items (ids 1 to V - 1) in order, for encoding an index.

    Args:
      dataset: the data.
      batch_size: M, items per batch.

    Returns:
      An iterator over (features, mask): name -> [M, ...], and [M] bool, which is False where item 0 fills up
      the last batch.
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
