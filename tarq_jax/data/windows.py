"""Windows of blocks, which are read one ahead, and the batches of their requests."""

import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from tarq_jax.data.collate import collate
from tarq_jax.data.order import Order, draw, locate, window_end, windows
from tarq_jax.data.records import Dataset, Requests, Split
from tarq_jax.types import Batch


class _Window(NamedTuple):
    """The part of one window of an epoch that is kept in memory."""

    requests: Requests
    batches: np.ndarray  # [batches, order.drawn] indices of requests
    lengths: np.ndarray  # [batches] lengths that histories are padded to, on all hosts


@dataclasses.dataclass(frozen=True)
class TrainBatches:
    """The batch of any step, as `batches[step]`; safe to use from several threads.

    Two windows are kept, as threads may need both, or as the second one is read while the first one is used.
    """

    dataset: Dataset
    split: Split
    order: Order
    lengths: tuple[int, ...]  # lengths that histories may be padded to
    num_candidates: int
    lengths_of: Callable[[Sequence[int]], np.ndarray] | None = None  # of histories in blocks of other hosts
    _windows: dict[tuple[int, int], Future[_Window]] = dataclasses.field(default_factory=dict)
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)  # of `_windows`
    _reading: threading.Lock = dataclasses.field(default_factory=threading.Lock)  # one window at a time

    def __getitem__(self, step: int) -> Batch:
        epoch, window, batch = locate(self.order, step)
        requests, batches, lengths = self._window((epoch, window))
        rows, length = batches[batch, self.order.rows], int(lengths[batch])
        return collate(self.dataset, requests, rows, length, self.num_candidates)

    def read_ahead(self, step: int) -> None:
        """Starts to read the window of a step in a thread, unless that window or a later one is kept.

        An error is raised when a batch of that window is requested. The thread ends when the window is read;
        the interpreter does not wait for it at its exit.
        """
        epoch, window, _ = locate(self.order, step)
        key, found = (epoch, window), Future[_Window]()
        with self._lock:
            if self._windows and max(self._windows) >= key:
                return
            threading.Thread(target=self._read, args=(key, found), name="read-ahead", daemon=True).start()
            self._keep(key, found)

    def _window(self, key: tuple[int, int]) -> _Window:
        """The requests of a window and their batches, which another thread may be reading."""
        with self._lock:
            if kept := self._windows.get(key):
                found = kept
            else:
                self._keep(key, found := Future())
        if not kept:
            self._read(key, found)
        if (error := found.exception()) is not None:
            with self._lock:
                if self._windows.get(key) is found:  # the next request of this window reads it anew
                    del self._windows[key]
            raise error
        return found.result()

    def _keep(self, key: tuple[int, int], window: Future[_Window]) -> None:
        """Keeps a window that is going to be read, and forgets the older one of two."""
        while len(self._windows) > 1:
            self._windows.pop(next(iter(self._windows)))
        self._windows[key] = window

    def _read(self, key: tuple[int, int], found: Future[_Window]) -> None:
        try:
            with self._reading:
                found.set_result(self._draw(*key))
        except BaseException as error:  # whoever waits for the window must see every error
            found.set_exception(error)

    def _draw(self, epoch: int, window: int) -> _Window:
        requests = self.split.read(windows(self.order, epoch)[window].tolist())
        lengths = np.diff(requests.history_offsets)
        batches = draw(self.order, epoch, window, lengths, self.lengths[:-1])
        return _Window(requests, batches, self._padded(epoch, window, lengths[batches]))

    def _padded(self, epoch: int, window: int, lengths: np.ndarray) -> np.ndarray:
        """The padded length of each batch of a window, [batches]; `lengths` are those of its histories."""
        longest = lengths.max(axis=1)
        if self.order.aligned and self.lengths_of is not None:
            for host in set(range(self.order.shard.count)) - {self.order.shard.index}:
                there = self.lengths_of(windows(self.order, epoch, host)[window].tolist())
                drawn = draw(self.order, epoch, window, there, self.lengths[:-1], host)
                longest = np.maximum(longest, there[drawn].max(axis=1))
        return np.array(self.lengths)[np.searchsorted(self.lengths[:-1], longest)]


def with_read_ahead(batches: TrainBatches, made: Iterable[tuple[int, Batch]]) -> Iterator[Batch]:
    """The batches of rising steps; while those of one window are used, the next window is read.

    It is read once the second batch of a window is requested: then no batch of the window before is still to
    be made, which can be forgotten, and whoever needs a single batch reads a single window.
    """
    end = 0
    for step, batch in made:
        yield batch
        if step >= end:
            end = window_end(batches.order, step)
            batches.read_ahead(end)
