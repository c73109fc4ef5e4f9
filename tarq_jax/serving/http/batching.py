"""Micro-batching with admission control: pure asyncio around a function that takes a batch.

One batch runs at a time. The next one starts when the last has ended and either the largest batch is full or
its first request has waited for `delay`; so nobody waits for company while the machine is free for longer
than that, and under load batches fill while the one before runs. A request that is not expected to be
answered within `budget` of its arrival is refused at once, or, if batches turn out slower than expected, when
its turn comes: under overload what is accepted keeps its latency, and the queue stays short by itself.

A burst is no overload: the less has come of late, the longer is the default budget, so that what comes
together by chance is answered later rather than refused. A budget that was set is kept to.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Generic, NamedTuple, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

GAIN = 0.1  # that a larger batch has to bring a request
LARGEST_JUMP = 4  # of one observed time over their mean: a hiccup is not a trend
FULL = 1.25  # of what a service should be able to take: from this load on it is overload, not a burst
BURST = 5.0  # budgets that are added where nothing has come of late, and in proportion in between
MEMORY = 32  # of the largest batches: the time over which the load is taken


class Refused(Exception):
    """A request was not taken, or given up before it was computed.

    Attributes:
      reason: "full" (the queue), "slow" (its turn would come too late) or "late" (it came too late).
      retry_after: seconds after which another attempt makes sense.
    """

    def __init__(self, reason: str, retry_after: float):
        super().__init__(reason)
        self.reason, self.retry_after = reason, retry_after


class ServiceTimes:
    """How long a batch takes: seconds measured once for each size, times how much slower batches are of late.

    It is one factor for all sizes, lest those go stale that are not in use. As in TCP's retransmission timer
    (RFC 6298) it is a running mean plus a multiple of the running deviation.
    """

    def __init__(self, seconds: Mapping[int, float]):
        """Takes seconds by size; a batch is padded to the next of these sizes."""
        self._seconds = dict(sorted(seconds.items()))
        self._mean, self._deviation = 1.0, 0.0

    def estimate(self, count: int) -> float:
        """Seconds that a batch of `count` should not exceed.

        Example:
          >>> ServiceTimes({1: 0.5, 8: 2.0}).estimate(3)
          2.0
        """
        return self._padded(count) * (self._mean + 2 * self._deviation)

    def observe(self, count: int, seconds: float) -> None:
        """Takes note of what a batch of `count` took."""
        factor = min(seconds / self._padded(count), LARGEST_JUMP * self._mean)
        self._deviation += (abs(factor - self._mean) - self._deviation) / 4
        self._mean += (factor - self._mean) / 8

    def _padded(self, count: int) -> float:
        return next(seconds for size, seconds in self._seconds.items() if size >= count)


class Load:
    """Work that comes a second, in seconds of the largest batches: a running mean over `MEMORY` of them.

    What is refused counts too, so that an overload is told from a machine that is just busy. A batch is said
    to take what it should not exceed: the more its time varies, the less is taken for a burst.
    """

    def __init__(self, now: float):
        """Nothing has come so far."""
        self._load, self._since = 0.0, now

    def arrive(self, now: float, batch: float, largest: int) -> None:
        """One item more, where a batch of `largest` takes `batch` seconds.

        Example:
          >>> load = Load(0.0)
          >>> for number in range(1, 1001):
          ...     load.arrive(number * 0.5, batch=2.0, largest=4)
          >>> round(load.of(500.0, batch=2.0), 1)  # of as much as it can take
          1.0
        """
        self._load, self._since = self.of(now, batch) + 1.0 / (MEMORY * largest), now

    def of(self, now: float, batch: float) -> float:
        """The load as of now."""
        return self._load * math.exp((self._since - now) / (MEMORY * batch))


def useful_sizes(seconds: Mapping[int, float], budget: float) -> list[int]:
    """The sizes of batches that are worth it: faster a request than smaller ones, and two fit the budget.

    Two, because a request may come just after a batch has started. The smallest size is always one.

    Example:
      >>> useful_sizes({1: 1.0, 2: 1.9, 4: 2.0, 8: 6.0}, budget=10.0)
      [1, 4]
    """
    smallest, *larger = sorted(seconds)
    kept = [smallest]
    for size in larger:
        faster = seconds[size] / size <= (1 - GAIN) * seconds[kept[-1]] / kept[-1]
        if faster and 2 * seconds[size] <= budget:
            kept.append(size)
    return kept


def default_budget(seconds: float, delay: float) -> float:
    """Twice what an item takes without load, which is the delay and a batch of one, and the delay again.

    Example:
      >>> default_budget(1.0, delay=0.25)
      2.75
    """
    return 2 * (delay + seconds) + delay


class _Waiting(NamedTuple, Generic[Item, Result]):
    item: Item
    arrived: float  # by the loop's clock
    budget: float  # that it was taken with
    answer: "asyncio.Future[Result]"


class Batcher(Generic[Item, Result]):
    """See the module. Made and used within a running event loop.

    Attributes:
      largest: items of a batch.
      load: of all that came.
      patience: seconds on top of the budget; may be set at any time.
      waiting: items in the queue.
    """

    def __init__(
        self, run: Callable[[Sequence[Item]], Sequence[Result | Exception]], executor: Executor,
        times: ServiceTimes, load: Load, *, largest: int, delay: float, budget: float | None, limit: int,
        on_batch: Callable[[int, float, float], None] = lambda size, waited, seconds: None,
    ):
        """Starts nothing.

        Args:
          run: computes a batch in the executor: a result for each item, or the exception it is to raise.
          executor: with one thread, which other batchers may share.
          times: of batches.
          load: of the loop's clock, which other batchers may share.
          largest: items of a batch.
          delay: seconds to wait for more items while nothing runs.
          budget: seconds from arrival to answer; None for those of `default_budget`, which follow `times`,
            and more for bursts.
          limit: items that may wait, whatever their expected time.
          on_batch: told of each batch its size, how long its first item waited, and how long it ran.
        """
        self._run, self._executor, self._times, self.load = run, executor, times, load
        self.largest, self.patience = largest, 0.0
        self._delay, self._budget, self._limit = delay, budget, limit
        self._on_batch = on_batch
        self._loop = asyncio.get_running_loop()
        self._queue: deque[_Waiting[Item, Result]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._expected_end: float | None = None  # of the batch that runs
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def least_budget(self) -> float:
        """Seconds from arrival to answer under overload."""
        return default_budget(self._times.estimate(1), self._delay) if self._budget is None else self._budget

    @property
    def budget(self) -> float:
        """Seconds from arrival to answer, as of now."""
        load = self.load.of(self._loop.time(), self._times.estimate(self.largest))
        room = 0.0 if self._budget is not None else max(0.0, 1.0 - load / FULL)
        return self.least_budget * (1.0 + BURST * room) + self.patience

    @property
    def waiting(self) -> int:
        """Items in the queue."""
        return len(self._queue)

    def count(self) -> None:
        """Takes note of an item that has come; `check` and `submit` do so themselves."""
        self.load.arrive(self._loop.time(), self._times.estimate(self.largest), self.largest)

    def check(self, arrived: float) -> None:
        """Raises Refused if an item that arrived then would be refused now.

        What is expected is not asked while nothing runs or waits: if it were wrong, nothing would correct it.
        """
        end, now = self._expected_answer(arrived), self._loop.time()
        seconds = end - now
        full = len(self._queue) >= self._limit
        if full or arrived + self.budget < (now if self._idle.is_set() else end):
            self.count()
            raise Refused("full" if full else "slow", seconds)

    async def submit(self, item: Item, arrived: float | None = None) -> Result:
        """The result of an item, whose time counts from `arrived`, or now.

        Raises:
          Refused: it was not computed.
        """
        arrived = self._loop.time() if arrived is None else arrived
        self.check(arrived)
        self.count()
        waiting = _Waiting(item, arrived, self.budget, self._loop.create_future())
        self._queue.append(waiting)
        self._idle.clear()
        self._advance()
        return await waiting.answer

    async def drained(self) -> None:
        """Returns once nothing waits or runs."""
        await self._idle.wait()

    def _expected_answer(self, arrived: float) -> float:
        """When a further item would be answered, if its batch fills up."""
        now, seconds = self._loop.time(), self._times.estimate(self.largest)
        # What is late already is taken to be late for as long again.
        remaining = 0.0 if self._expected_end is None else abs(self._expected_end - now)
        batches, place = divmod(len(self._queue), self.largest)
        first = self._queue[-place].arrived if place else arrived
        return max(now + remaining + batches * seconds, first + self._delay) + seconds

    def _advance(self) -> None:
        """Starts the next batch, unless one runs, or more items may come before the first has to go."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._expected_end is not None:
            return
        now = self._loop.time()
        self._drop_late(now)
        if not self._queue:
            self._idle.set()
            return
        hold = self._queue[0].arrived + self._delay - now
        if hold > 0 and len(self._queue) < self.largest:
            self._timer = self._loop.call_later(hold, self._advance)
            return
        batch = [self._queue.popleft() for _ in range(min(len(self._queue), self.largest))]
        self._expected_end = now + self._times.estimate(len(batch))
        running = self._loop.run_in_executor(self._executor, self._run, [entry.item for entry in batch])
        running.add_done_callback(lambda done: self._finish(batch, now, done))

    def _drop_late(self, now: float) -> None:
        """Refuses what can no longer be answered in time; the last one is always tried."""
        self._queue = deque(entry for entry in self._queue if not entry.answer.done())  # those who gave up
        while len(self._queue) > 1:
            seconds = self._times.estimate(min(len(self._queue), self.largest))
            first = self._queue[0]
            if now + seconds <= first.arrived + max(first.budget, self.budget):
                return
            self._queue.popleft().answer.set_exception(Refused("late", seconds))

    def _finish(self, batch: Sequence[_Waiting[Item, Result]], started: float,
                done: "asyncio.Future[Sequence[Result | Exception]]") -> None:
        seconds = self._loop.time() - started
        self._times.observe(len(batch), seconds)
        self._on_batch(len(batch), started - batch[0].arrived, seconds)
        error = done.exception()
        results = [error] * len(batch) if error is not None else done.result()
        for entry, result in zip(batch, results, strict=True):
            if entry.answer.done():
                continue
            if isinstance(result, BaseException):
                entry.answer.set_exception(result)
            else:
                entry.answer.set_result(result)
        self._expected_end = None
        self._advance()


def whole_seconds(seconds: float) -> int:
    """For a Retry-After header: rounded up, at least 1."""
    return max(math.ceil(seconds), 1)
