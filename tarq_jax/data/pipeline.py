"""From requests to padded batches: pure NumPy gathers, resumable order, background transfer."""

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from tarq_jax.data.records import Dataset, Requests
from tarq_jax.data.schema import Field
from tarq_jax.types import Batch


class _Windows(NamedTuple):
    """Where the entries of each padded row lie in a flat column."""

    positions: np.ndarray  # [B, N] int64; anything where the mask is False
    mask: np.ndarray  # [B, N] bool


def _windows(offsets: np.ndarray, rows: np.ndarray, real: np.ndarray, width: int) -> _Windows:
    """The last `width` entries of the ragged `rows` [B], left-aligned; none where `real` [B] is False."""
    stops = offsets[rows + 1]
    lengths = np.where(real, np.minimum(stops - offsets[rows], width), 0)
    steps = np.arange(width)
    return _Windows((stops - lengths)[:, None] + steps, steps < lengths[:, None])


def _gather(column: np.ndarray, index: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`column[index]` where `mask`, zeros elsewhere; index and mask have equal shapes."""
    if not len(column):
        return np.zeros(index.shape + column.shape[1:], column.dtype)
    values = column.take(np.where(mask, index, 0), axis=0)
    if not mask.all():
        values[~mask] = 0
    return values


def _lookup(fields: tuple[Field, ...], table: Mapping[str, np.ndarray],
            ids: np.ndarray) -> dict[str, np.ndarray]:
    """Fields of the given rows of a table."""
    return {field.name: table[field.name].take(ids, axis=0) for field in fields}


def collate(dataset: Dataset, split_requests: Requests, indices: np.ndarray, history_length: int,
            num_candidates: int) -> Batch:
    """Gathers requests and the features of their user, history and candidates into one padded batch.

    Real entries come first in each row; a history longer than `history_length` keeps its most recent
    events. Index -1 is a padding request: everything masked, user 0, weights 0.

    Args:
      dataset: tables and schema.
      split_requests: the requests to choose from.
      indices: [B] rows of `split_requests`, or -1.
      history_length: N.
      num_candidates: G, at least the number of candidates of every chosen request.

    Returns:
      A `Batch` with NumPy leaves.

    Raises:
      ValueError: an index is out of range, or a request has more than `num_candidates` candidates.
    """
    schema, requests = dataset.schema, split_requests
    indices = np.asarray(indices, np.int64)
    if indices.size and (indices.min() < -1 or indices.max() >= len(requests)):
        raise ValueError(f"indices are in [{indices.min()}, {indices.max()}], expected [-1, {len(requests)})")
    real = indices >= 0
    rows = np.where(real, indices, 0) if len(requests) else np.zeros_like(indices)
    empty = np.zeros(2, np.int64)
    events = _windows(requests.history_offsets if len(requests) else empty, rows, real, history_length)
    offsets = requests.candidate_offsets if len(requests) else empty
    most = int(((offsets[rows + 1] - offsets[rows]) * real).max(initial=0))
    if most > num_candidates:
        raise ValueError(f"num_candidates is {num_candidates}, but a request has {most} candidates")
    shown = _windows(offsets, rows, real, num_candidates)

    item_fields = schema.side("item")
    user = _gather(requests.user, rows, real)
    history = _lookup(item_fields, dataset.items, _gather(requests.history, *events))
    history |= {f.name: _gather(requests.event[f.name], *events) for f in schema.side("event")}
    return Batch(
        user_id=user,
        user=_lookup(schema.side("user"), dataset.users, user),
        context={f.name: _gather(requests.context[f.name], rows, real) for f in schema.side("context")},
        history=history,
        history_mask=events.mask,
        candidates=_lookup(item_fields, dataset.items, _gather(requests.candidates, *shown)),
        candidate_mask=shown.mask,
        labels=_gather(requests.labels, *shown),
        weights=_gather(requests.weights, *shown))


def _split(dataset: Dataset, split: str) -> Requests:
    if split not in dataset.splits:
        raise ValueError(f"split is {split!r}, expected one of {sorted(dataset.splits)}")
    return dataset.splits[split]


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}, expected at least 1")


def train_batches(dataset: Dataset, split: str, *, batch_size: int, history_length: int, num_candidates: int,
                  seed: int, start_step: int = 0) -> Iterator[Batch]:
    """Batches without end; the batch of step s is a pure function of (seed, s), so resuming is exact.

    Each epoch is a permutation of the split drawn from (seed, epoch); the requests left over at its end,
    fewer than `batch_size`, are dropped (other ones in each epoch).

    Args:
      dataset: the data.
      split: name of the split.
      batch_size: B, requests a batch.
      history_length: N.
      num_candidates: G.
      seed: of the order, at least 0.
      start_step: first step to give.

    Returns:
      An iterator over `Batch` with NumPy leaves.

    Raises:
      ValueError: the split is unknown or has fewer requests than a batch.
    """
    requests = _split(dataset, split)
    _check_sizes(batch_size=batch_size, history_length=history_length, num_candidates=num_candidates)
    if len(requests) < batch_size:
        raise ValueError(f"split {split!r} has {len(requests)} requests, expected at least one batch "
                         f"(batch_size {batch_size})")
    steps = _train_indices(len(requests), batch_size, seed, start_step)
    return (collate(dataset, requests, indices, history_length, num_candidates) for indices in steps)


def _train_indices(num_requests: int, batch_size: int, seed: int, start_step: int) -> Iterator[np.ndarray]:
    """Indices [B] of each step from `start_step` on."""
    steps = num_requests // batch_size
    epoch, step = divmod(start_step, steps)
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(num_requests)
        for first in range(step * batch_size, steps * batch_size, batch_size):
            yield order[first:first + batch_size]
        epoch, step = epoch + 1, 0


def _padded_ranges(start: int, stop: int, size: int) -> Iterator[np.ndarray]:
    """`start` to `stop` in arrays of `size`, the last one filled up with -1."""
    for first in range(start, stop, size):
        index = np.arange(first, first + size)
        yield np.where(index < stop, index, -1)


def eval_batches(dataset: Dataset, split: str, *, batch_size: int, history_length: int,
                 num_candidates: int) -> Iterator[Batch]:
    """All requests of a split once and in order, the last batch filled up with fully masked requests.

    Args:
      dataset: the data.
      split: name of the split.
      batch_size: B, requests a batch.
      history_length: N.
      num_candidates: G.

    Returns:
      An iterator over `Batch` with NumPy leaves; empty for an empty split.

    Raises:
      ValueError: the split is unknown.
    """
    requests = _split(dataset, split)
    _check_sizes(batch_size=batch_size, history_length=history_length, num_candidates=num_candidates)
    return (collate(dataset, requests, indices, history_length, num_candidates)
            for indices in _padded_ranges(0, len(requests), batch_size))


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
    return ((_lookup(fields, dataset.items, np.maximum(ids, 0)), ids >= 0)
            for ids in _padded_ranges(1, dataset.schema.num_items, batch_size))


def prefetch(iterator: Iterable[Any], size: int,
             transfer: Callable[[Any], Any] = lambda element: element) -> Generator[Any, None, None]:
    """Keeps `size` transferred elements ready, made by a background thread.

    The thread starts with the first element asked for and ends with the iterator, or as soon as this one
    is closed or garbage-collected. What the iterator or `transfer` raises is raised at the consumer, in its
    place in the order.

    Args:
      iterator: what to draw from.
      size: elements kept ahead, at least 1.
      transfer: applied to each element in the thread, e.g. `jax.device_put`.

    Returns:
      A generator of `transfer(element)`.

    Raises:
      ValueError: size is below 1.
    """
    _check_sizes(size=size)
    return _consume(iterator, queue.Queue(size), transfer)


def _consume(iterator: Iterable[Any], buffer: queue.Queue,
             transfer: Callable[[Any], Any]) -> Generator[Any, None, None]:
    stop = threading.Event()
    thread = threading.Thread(target=_produce, args=(iterator, buffer, transfer, stop), daemon=True)
    thread.start()
    try:
        while (message := buffer.get()) is not None:
            element, error = message
            if error is not None:
                raise error
            yield element
    finally:
        stop.set()
        while not buffer.empty():  # frees a producer that waits for room
            buffer.get_nowait()
        thread.join()


def _produce(iterator: Iterable[Any], buffer: queue.Queue, transfer: Callable[[Any], Any],
             stop: threading.Event) -> None:
    """Puts (element, None) for each element, (None, error) if one fails, then None; quits when stopped."""
    try:
        for element in iterator:
            if stop.is_set():
                return
            buffer.put((transfer(element), None))
            if stop.is_set():
                return
        buffer.put(None)
    except BaseException as error:  # whatever it is, the consumer must see it
        buffer.put((None, error))
