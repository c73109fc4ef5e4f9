"""Which requests make up the batch of each step: a pure function of the seed, the step and the hosts.

An epoch goes through all blocks in a random order, a window of them at a time; the requests of a window
are shuffled and cut into batches, and fewer than a batch are left out (other ones in each epoch). In memory
a split is one block, so its window is the epoch: the order is that of a permutation of all requests.

Several hosts either take their rows of every batch, which then does not depend on how many they are, or,
where there are many blocks, read blocks of their own (see `deals_blocks`).
"""

import bisect
import dataclasses
import functools
import threading
from typing import NamedTuple

import numpy as np

WINDOW = 32  # blocks that are shuffled together
MIN_BLOCKS = 16  # a host that has so many blocks of its own leaves out few requests to keep step with others


@dataclasses.dataclass(frozen=True)
class Shard:
    """One host of several."""

    index: int = 0
    count: int = 1


ONE_HOST = Shard()


class Position(NamedTuple):
    """Where a batch lies."""

    epoch: int
    window: int
    batch: int  # within the window


def deals_blocks(num_blocks: int, shard: Shard, buckets: tuple[int, ...]) -> bool:
    """Whether each host reads blocks of its own: every `count`-th one.

    With buckets the hosts have to agree on the length of each batch's histories, which only one who reads
    all of the batch can tell; reading is cheap beside gathering, and each host gathers its own rows only.
    """
    return shard.count > 1 and not buckets and num_blocks >= MIN_BLOCKS * shard.count


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
    """The order of one host."""

    sizes: tuple[int, ...]  # requests of each block
    batch_size: int  # of all hosts together
    seed: int
    shard: Shard = ONE_HOST
    dealt: bool = False  # this host reads blocks of its own
    window: int = WINDOW
    _starts: list[int] = dataclasses.field(default_factory=lambda: [0])  # first step of epochs found so far
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        """Refuses batches that an epoch might have none of.

        Raises:
          ValueError: the windows of an epoch may all be smaller than a batch.
        """
        if self.batch_size > (largest := _largest_batch(self)):
            raise ValueError(f"batch_size is {self.batch_size}, expected at most {largest}: "
                             f"{sum(self.sizes)} requests lie in {len(self.sizes)} blocks, of which "
                             f"{self.window} are shuffled together, and {self.shard.count} hosts share them")

    @property
    def rows(self) -> slice:
        """The rows of a drawn batch that are this host's."""
        if self.dealt:
            return slice(None)
        rows = self.batch_size // self.shard.count
        return slice(self.shard.index * rows, (self.shard.index + 1) * rows)

    @property
    def drawn(self) -> int:
        """Requests in a batch as this host draws it."""
        return self.batch_size // self.shard.count if self.dealt else self.batch_size


def windows(order: Order, epoch: int, host: int | None = None) -> list[np.ndarray]:
    """The blocks of each window of an epoch, for this host or, where blocks are dealt, another one."""
    host = (order.shard.index if host is None else host) if order.dealt else 0
    own = _own(order, host)
    shuffled = np.random.default_rng([order.seed, epoch, 0, host, 1]).permutation(own)
    return np.array_split(shuffled, -(-len(own) // order.window))


def _own(order: Order, host: int) -> np.ndarray:
    """The blocks that a host reads."""
    return np.arange(len(order.sizes))[host::order.shard.count if order.dealt else 1]


def _hosts(order: Order) -> range:
    """Those that have an order of their own."""
    return range(order.shard.count if order.dealt else 1)


def _largest_batch(order: Order) -> int:
    """Of all hosts together; whatever the shuffling, one window holds at least the mean of its epoch."""
    def mean(host: int) -> int:
        own = _own(order, host)
        return -(-int(np.asarray(order.sizes)[own].sum()) // -(-len(own) // order.window))

    return min(map(mean, _hosts(order))) * len(_hosts(order))


@functools.lru_cache(maxsize=8)
def _ends(order: Order, epoch: int) -> np.ndarray:
    """Batches of this host up to the end of each window of an epoch."""
    return _batches(order, epoch, order.shard.index)


def _batches(order: Order, epoch: int, host: int) -> np.ndarray:
    sizes = np.asarray(order.sizes)
    return np.cumsum([sizes[blocks].sum() // order.drawn for blocks in windows(order, epoch, host)])


def _steps(order: Order, epoch: int) -> int:
    """Steps that all hosts have in an epoch."""
    return min(int(_batches(order, epoch, host)[-1]) for host in _hosts(order))


def locate(order: Order, step: int) -> Position:
    """Where the batch of a step lies."""
    with order._lock:
        while order._starts[-1] <= step:
            order._starts.append(order._starts[-1] + _steps(order, len(order._starts) - 1))
    epoch = bisect.bisect_right(order._starts, step) - 1
    step -= order._starts[epoch]
    ends = _ends(order, epoch)
    window = int(np.searchsorted(ends, step, side="right"))
    return Position(epoch, window, step - int(ends[window - 1] if window else 0))


def draw(order: Order, epoch: int, window: int, lengths: np.ndarray, buckets: tuple[int, ...]) -> np.ndarray:
    """The requests of every batch of a window.

    Requests of one bucket come together, so that at most one batch in a window for each further bucket mixes
    two, and the batches come in a random order. Bucketing batch by batch would save little: among 64 requests
    one nearly always is long. What is left out at the end of a window is drawn before, so that long histories
    are not left out more often.

    Args:
      order: seed and sizes.
      epoch: counted from 0.
      window: of the epoch.
      lengths: [R] events in the history of each request of the window.
      buckets: rising bounds of lengths; none leaves the order alone.

    Returns:
      [batches, order.drawn] indices of requests in the window.
    """
    host = order.shard.index if order.dealt else 0
    rng = np.random.default_rng([order.seed, epoch, window, host])
    batches = len(lengths) // order.drawn
    chosen = rng.permutation(len(lengths))[:batches * order.drawn]
    if not buckets:
        return chosen.reshape(batches, order.drawn)
    bucket = np.searchsorted(buckets, lengths[chosen])
    chosen = chosen[np.argsort(bucket, kind="stable")].reshape(batches, order.drawn)
    return rng.permutation(chosen)


def spanned(offsets: np.ndarray, start: int, stop: int) -> tuple[int, ...]:
    """The blocks that hold the requests `start` to `stop` of a split, given `offsets_of` its sizes."""
    first, last = np.searchsorted(offsets, (start, stop - 1), side="right") - 1
    return tuple(range(first, last + 1))

