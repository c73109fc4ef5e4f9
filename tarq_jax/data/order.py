"""Which requests make up the batch of each step: a pure function of the seed, the step and the hosts.

An epoch goes through all blocks in a random order, one window of blocks at a time. The requests of a window
are shuffled and cut into batches; the rest, less than a batch, is left out (other requests in each epoch).
A split in memory is one block, so its window is the epoch and its order a permutation of all requests.

With several hosts there are two ways. Either each host takes its rows of every batch, and batches do not
depend on the number of hosts; or, if there are many blocks, each host reads its own (see `deals_blocks`).
In the second way, with buckets of lengths, hosts go through their windows in step: the n-th window has the
same number of batches on all hosts, and a step has histories of about the same lengths on all of them.
"""

import bisect
import dataclasses
import functools
import threading
from typing import NamedTuple

import numpy as np

WINDOW = 32  # blocks that are shuffled together
MIN_BLOCKS = 16  # per host: with so many, few requests are left out to give all hosts equally many steps


@dataclasses.dataclass(frozen=True)
class Shard:
    """One host of several."""

    index: int = 0
    count: int = 1


ONE_HOST = Shard()


class Position(NamedTuple):
    """The place of a batch in the order."""

    epoch: int
    window: int
    batch: int  # index within the window


def deals_blocks(num_blocks: int, shard: Shard, buckets: tuple[int, ...],
                 lengths_known: bool = False) -> bool:
    """Whether each host reads its own blocks, every `count`-th one, instead of all blocks.

    With buckets, the hosts must agree on the length of each batch's histories. So a host must know the
    lengths of all requests: either they are stored apart from the histories, or it reads all blocks, and
    gathers only its own rows.
    """
    return (shard.count > 1 and num_blocks >= MIN_BLOCKS * shard.count
            and (lengths_known or not buckets))


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
    """The order of batches on one host."""

    sizes: tuple[int, ...]  # requests of each block
    batch_size: int  # requests per batch, of all hosts together
    seed: int
    shard: Shard = ONE_HOST
    dealt: bool = False  # each host reads its own blocks
    window: int = WINDOW
    aligned: bool = False  # hosts that read their own blocks have the same number of batches in each window
    _starts: list[int] = dataclasses.field(default_factory=lambda: [0])  # first step of known epochs
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        """Refuses a batch size with which an epoch might have no batch.

        Raises:
          ValueError: the windows of an epoch may all be smaller than a batch.
        """
        if self.batch_size > (largest := _largest_batch(self)):
            raise ValueError(f"batch_size is {self.batch_size}, expected at most {largest}: "
                             f"{sum(self.sizes)} requests lie in {len(self.sizes)} blocks, of which "
                             f"{self.window} are shuffled together, and {self.shard.count} hosts share them")

    @functools.cached_property
    def _sizes(self) -> np.ndarray:
        return np.asarray(self.sizes)  # takes a tenth of a second for a billion requests

    @property
    def rows(self) -> slice:
        """The rows of a drawn batch that belong to this host."""
        if self.dealt:
            return slice(None)
        rows = self.batch_size // self.shard.count
        return slice(self.shard.index * rows, (self.shard.index + 1) * rows)

    @property
    def drawn(self) -> int:
        """Number of requests in a batch as this host draws it."""
        return self.batch_size // self.shard.count if self.dealt else self.batch_size


def windows(order: Order, epoch: int, host: int | None = None) -> list[np.ndarray]:
    """The blocks of each window of an epoch, for this host or, if hosts read their own blocks, `host`."""
    host = (order.shard.index if host is None else host) if order.dealt else 0
    own = _own(order, host)
    shuffled = np.random.default_rng([order.seed, epoch, 0, host, 1]).permutation(own)
    return np.array_split(shuffled, _num_windows(order, host))


def _num_windows(order: Order, host: int) -> int:
    if order.aligned:
        host = order.shard.count - 1  # it has the fewest blocks: no host has an empty window
    return -(-len(_own(order, host)) // order.window)


def _own(order: Order, host: int) -> np.ndarray:
    """The blocks that a host reads."""
    return np.arange(len(order.sizes))[host::order.shard.count if order.dealt else 1]


def _hosts(order: Order) -> range:
    """The hosts that have an order of their own."""
    return range(order.shard.count if order.dealt else 1)


def _largest_batch(order: Order) -> int:
    """Largest safe batch of all hosts: however blocks are shuffled, some window holds at least the mean."""
    if order.aligned:
        return _largest_aligned(order)

    def mean(host: int) -> int:
        return -(-int(order._sizes[_own(order, host)].sum()) // _num_windows(order, host))

    return min(map(mean, _hosts(order))) * len(_hosts(order))


def _largest_aligned(order: Order) -> int:
    """Largest batch for which some window of an epoch surely has one on all hosts.

    That is so if every window has, even one of the smallest blocks; or if there are more windows than blocks
    that are too small, as a window can only lack requests if it has a block smaller than its share of them.
    """
    num, hosts = _num_windows(order, 0), _hosts(order)
    rising = [np.sort(order._sizes[_own(order, host)]) for host in hosts]
    smallest = min(int(own[:len(own) // num].sum()) for own in rising)
    shares = np.sort(np.concatenate([own * (len(own) // num) for own in rising]))
    return max(smallest, int(shares[num - 1])) * len(hosts)


@functools.lru_cache(maxsize=8)
def _ends(order: Order, epoch: int) -> np.ndarray:
    """The number of batches of this host up to the end of each window of an epoch."""
    if order.aligned:
        return np.cumsum(np.min([_batches(order, epoch, host) for host in _hosts(order)], axis=0))
    return np.cumsum(_batches(order, epoch, order.shard.index))


def _batches(order: Order, epoch: int, host: int) -> np.ndarray:
    """The number of batches that each window of a host has requests for."""
    return np.array([order._sizes[blocks].sum() // order.drawn for blocks in windows(order, epoch, host)])


def _steps(order: Order, epoch: int) -> int:
    """The number of steps in an epoch, limited by the host with the fewest batches."""
    if order.aligned:
        return int(_ends(order, epoch)[-1])
    return min(int(_batches(order, epoch, host).sum()) for host in _hosts(order))


def locate(order: Order, step: int) -> Position:
    """The place of the batch of a step."""
    with order._lock:
        while order._starts[-1] <= step:
            order._starts.append(order._starts[-1] + _steps(order, len(order._starts) - 1))
    epoch = bisect.bisect_right(order._starts, step) - 1
    step -= order._starts[epoch]
    ends = _ends(order, epoch)
    window = int(np.searchsorted(ends, step, side="right"))
    return Position(epoch, window, step - int(ends[window - 1] if window else 0))


def window_end(order: Order, step: int) -> int:
    """The first step after `step` whose batch is in another window."""
    epoch, window, _ = locate(order, step)
    start, end = order._starts[epoch:epoch + 2]
    return min(start + int(_ends(order, epoch)[window]), end)


def draw(order: Order, epoch: int, window: int, lengths: np.ndarray, buckets: tuple[int, ...],
         host: int | None = None) -> np.ndarray:
    """The requests of every batch of a window, for this host or, if hosts read their own blocks, `host`.

    Requests of the same bucket are placed together, so only batches at the border of two buckets mix them;
    then the batches are put in a random order. Choosing a bucket per shuffled batch instead would save
    little, because one of 64 requests is nearly always long. The requests that a window leaves out are chosen
    before the grouping, so that long histories are not left out more often. Aligned hosts put their batches
    in the same random order, so that at the same step they have batches of the same rank by length.

    Args:
      order: seed and sizes.
      epoch: epoch, counted from 0.
      window: window of the epoch, counted from 0.
      lengths: [R] events in the history of each request of the window.
      buckets: rising bounds of lengths; if empty, requests are not grouped.
      host: the host whose window it is; this host if None.

    Returns:
      [batches, order.drawn] indices of requests in the window.
    """
    host = (order.shard.index if host is None else host) if order.dealt else 0
    rng = np.random.default_rng([order.seed, epoch, window, host])
    batches = len(lengths) // order.drawn
    if order.aligned:
        ends = _ends(order, epoch)
        batches = int(ends[window] - (ends[window - 1] if window else 0))
    chosen = rng.permutation(len(lengths))[:batches * order.drawn]
    if not buckets:
        return chosen.reshape(batches, order.drawn)
    bucket = np.searchsorted(buckets, lengths[chosen])
    chosen = chosen[np.argsort(bucket, kind="stable")].reshape(batches, order.drawn)
    if order.aligned:
        rng = np.random.default_rng([order.seed, epoch, window, 0, 2])  # that of no host
    return rng.permutation(chosen)


def spanned(offsets: np.ndarray, start: int, stop: int) -> tuple[int, ...]:
    """The blocks that hold the requests `start` to `stop` of a split; `offsets` is `offsets_of(sizes)`."""
    first, last = np.searchsorted(offsets, (start, stop - 1), side="right") - 1
    return tuple(range(first, last + 1))

