"""Micro-batching with admission control: pure asyncio around a function that computes a batch.

One batch runs at a time. The next one starts when the last has ended and either the largest batch is full or
its first request has waited for `delay`. While the machine is free, a request thus waits for others at most
that long; under load, batches fill while the previous one runs. A request that is not expected to be answered
within `budget` of its arrival is refused immediately, or, if batches turn out slower than expected, when its
turn comes. Under overload, accepted requests thus keep their latency, and the queue stays short.

A burst is not an overload: the lower the load has been recently, the longer is the default budget, so that
requests that arrive together by chance are answered late rather than refused. A given budget has no such
bonus.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Generic, NamedTuple, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

GAIN = 0.1  # share of the time per request that a larger batch has to save
LARGEST_JUMP = 4  # most that one observed time counts for, in multiples of the mean: a hiccup is not a trend
EXPECTED = 2.0  # deviations from the mean that a batch is expected not to exceed
PROMISED = 1.0  # deviations that the default budget allows for: with more, answers under load are late
FULL = 1.25  # load, as a multiple of what a service should manage, from which on it is overload, not a burst
BURST = 5.0  # budgets that are added at no load; from there to `FULL` the bonus falls linearly to none
ROUNDING = 1e-6  # seconds, by which sums of times may differ that should be equal
MEMORY = 32  # batches of the largest size over whose duration the load is averaged


class Refused(Exception):
    """A request was not accepted, or was dropped before it was computed.

    Attributes:
      reason: "full" (the queue is full), "slow" (the answer would be late) or "late" (it waited too long).
      retry_after: seconds after which another attempt makes sense.
    """

    def __init__(self, reason: str, retry_after: float):
        super().__init__(reason)
        self.reason, self.retry_after = reason, retry_after


class ServiceTimes:
    """How long a batch takes: seconds measured once for each size, times how much slower recent batches were.

    That factor is the same for all sizes, so that sizes not in use do not go stale. As in TCP's
    retransmission timer (RFC 6298) it is a running mean plus a multiple of the running deviation.
    """

    def __init__(self, seconds: Mapping[int, float]):
        """Starts from measured `seconds` by size; a batch is padded to the next of these sizes."""
        self._seconds = dict(sorted(seconds.items()))
        self._mean, self._deviation = 1.0, 0.0

    def estimate(self, count: int, deviations: float = EXPECTED) -> float:
        """Seconds that a batch of `count` should not exceed: the mean plus so many mean deviations.

        Example:
          >>> ServiceTimes({1: 0.5, 8: 2.0}).estimate(3)
          2.0
        """
        return self._padded(count) * (self._mean + deviations * self._deviation)

    def usual(self, count: int) -> float:
        """Seconds that a batch of `count` takes on average."""
        return self.estimate(count, 0.0)

    def observe(self, count: int, seconds: float) -> None:
        """Records that a batch of `count` took `seconds`."""
        factor = min(seconds / self._padded(count), LARGEST_JUMP * self._mean)
        self._deviation += (abs(factor - self._mean) - self._deviation) / 4
        self._mean += (factor - self._mean) / 8

    def _padded(self, count: int) -> float:
        return next(seconds for size, seconds in self._seconds.items() if size >= count)


class Load:
    """Work that arrives per second, in seconds of the largest batches: a running mean over `MEMORY` of them.

    Refused requests count too, so that overload can be distinguished from a merely busy machine.
    """

    def __init__(self, now: float):
        """Starts without load."""
        self._load, self._since = 0.0, now

    def arrive(self, now: float, batch: float, largest: int) -> None:
        """Adds one item, when a batch of `largest` items takes `batch` seconds.

        Example:
          >>> load = Load(0.0)
          >>> for number in range(1, 1001):
          ...     load.arrive(number * 0.5, batch=2.0, largest=4)
          >>> round(load.of(500.0, batch=2.0), 1)  # of as much as it can take
          1.0
        """
        self._load, self._since = self.of(now, batch) + 1.0 / (MEMORY * largest), now

    def of(self, now: float, batch: float) -> float:
        """The load at time `now`, when the largest batch takes `batch` seconds."""
        return self._load * math.exp((self._since - now) / (MEMORY * batch))


def fits(seconds: float, budget: float) -> bool:
    """Whether two batches fit the budget, as a request may arrive just after a batch has started."""
    return 2 * seconds <= budget


def useful_sizes(seconds: Mapping[int, float], budget: float) -> list[int]:
    """The batch sizes that pay off: faster per request than smaller ones, and two batches fit the budget.

    The smallest size is always included.

    Example:
      >>> useful_sizes({1: 1.0, 2: 1.9, 4: 2.0, 8: 6.0}, budget=10.0)
      [1, 4]
    """
    smallest, *larger = sorted(seconds)
    kept = [smallest]
    for size in larger:
        faster = seconds[size] / size <= (1 - GAIN) * seconds[kept[-1]] / kept[-1]
        if faster and fits(seconds[size], budget):
            kept.append(size)
    return kept


def default_budget(seconds: float, delay: float) -> float:
    """Twice the time of an item without load, which is the delay and a batch of one, plus the delay.

    Example:
      >>> default_budget(1.0, delay=0.25)
      2.75
    """
    return 2 * (delay + seconds) + delay


def least_budget(seconds: float, *, delay: float, budget: float | None, timeout: float) -> float:
    """`budget`, or the default one if it is None, but not beyond the time-out."""
    return min(default_budget(seconds, delay) if budget is None else budget, timeout)


class _Waiting(NamedTuple, Generic[Item, Result]):
    item: Item
    arrived: float  # by the loop's clock
    budget: float  # at its arrival
    answer: "asyncio.Future[Result]"


class Batcher(Generic[Item, Result]):
    """Batches items, see the module. Made and used within a running event loop.

    Attributes:
      failures: batches that have failed since the last one that did not.
      largest: most items in a batch.
      load: load of all items that have arrived.
      patience: seconds on top of the budget, except under overload, when no patience would let all items be
        answered; may be set at any time.
      running: seconds for which the batch that runs has run; 0 if none runs.
      waiting: number of items in the queue.
    """

    def __init__(
        self, run: Callable[[Sequence[Item]], Sequence[Result | Exception]], executor: Executor,
        times: ServiceTimes, load: Load, *, largest: int, delay: float, budget: float | None, timeout: float,
        limit: int, on_batch: Callable[[int, float, float], None] = lambda size, waited, seconds: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Starts nothing.

        Args:
          run: computes a batch in the executor: a result for each item, or the exception to raise for it. If
            it raises itself, the batch has failed.
          executor: an executor with one thread, which other batchers may share.
          times: estimated times of batches.
          load: load by the same clock, which other batchers may share.
          largest: most items in a batch.
          delay: seconds to wait for more items while nothing runs.
          budget: seconds from arrival to answer; None for `default_budget`, which follows `times`, with a
            bonus for bursts.
          timeout: seconds after which nobody waits for an answer any more; no budget is longer.
          limit: most items that may wait, whatever their expected time.
          on_batch: called after each batch with its size, the wait of its first item, and how long it ran.
          clock: seconds, at the pace of the loop's clock, which may be coarse: that of uvloop counts
            milliseconds.
        """
        self._run, self._executor, self._times, self.load = run, executor, times, load
        self.largest, self.patience, self.failures = largest, 0.0, 0
        self._delay, self._budget, self._timeout, self._limit = delay, budget, timeout, limit
        self._on_batch, self._clock = on_batch, clock
        self._loop = asyncio.get_running_loop()
        self._queue: deque[_Waiting[Item, Result]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._started = 0.0  # when the last batch was started
        self._expected_end: float | None = None  # of the running batch
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def least_budget(self) -> float:
        """Seconds from arrival to answer under overload."""
        return least_budget(self._times.estimate(1, PROMISED), delay=self._delay, budget=self._budget,
                            timeout=self._timeout)

    @property
    def budget(self) -> float:
        """Seconds from arrival to answer, at the present load."""
        load = self.load.of(self._clock(), self._times.usual(self.largest))
        room = max(0.0, 1.0 - load / FULL)
        bonus = 0.0 if self._budget is not None else BURST * room * self.least_budget
        return min(self.least_budget + bonus + (self.patience if room else 0.0), self._timeout)

    @property
    def running(self) -> float:
        """Seconds for which the batch that runs has run; 0 if none runs."""
        return 0.0 if self._expected_end is None else self._clock() - self._started

    @property
    def waiting(self) -> int:
        """Number of items in the queue."""
        return len(self._queue)

    def count(self) -> None:
        """Adds an arrived item to the load; `submit` does so itself, and `check` if it refuses the item."""
        self.load.arrive(self._clock(), self._times.usual(self.largest), self.largest)

    def check(self, arrived: float) -> None:
        """Raises Refused if an item that arrived then would be refused now.

        While nothing runs or waits, the expected time of the answer is ignored. Only running batches correct
        the estimate, so one that is too high would otherwise refuse every request for ever.
        """
        end, now = self._expected_answer(arrived), self._clock()
        seconds = end - now
        full = len(self._queue) >= self._limit
        if full or arrived + self.budget < (now if self._idle.is_set() else end):
            self.count()
            raise Refused("full" if full else "slow", seconds)

    async def submit(self, item: Item, arrived: float | None = None) -> Result:
        """Queues an item and returns its result; its time counts from `arrived`, by default from now.

        Raises:
          Refused: the item was not computed.
        """
        arrived = self._clock() if arrived is None else arrived
        self.check(arrived)
        self.count()
        waiting = _Waiting(item, arrived, self.budget, self._loop.create_future())
        self._queue.append(waiting)
        self._idle.clear()
        self._advance()
        return await waiting.answer

    async def drained(self) -> None:
        """Returns when nothing waits or runs any more."""
        await self._idle.wait()

    def _expected_answer(self, arrived: float) -> float:
        """When a further item would be answered, if its batch fills up."""
        now, seconds = self._clock(), self._times.estimate(self.largest)
        # A batch that is overdue is expected to take as long again as it is overdue.
        remaining = 0.0 if self._expected_end is None else abs(self._expected_end - now)
        batches, place = divmod(len(self._queue), self.largest)
        first = self._queue[-place].arrived if place else arrived
        return max(now + remaining + batches * seconds, first + self._delay) + seconds

    def _advance(self) -> None:
        """Starts the next batch, unless one runs, or the first item may still wait for others."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._expected_end is not None:
            return
        now = self._clock()
        self._drop_late(now)
        if not self._queue:
            self._idle.set()
            return
        hold = self._queue[0].arrived + self._delay - now
        if hold > 0 and len(self._queue) < self.largest:
            self._timer = self._loop.call_later(hold, self._advance)
            return
        batch = [self._queue.popleft() for _ in range(min(len(self._queue), self.largest))]
        self._started, self._expected_end = now, now + self._times.estimate(len(batch))
        running = self._loop.run_in_executor(self._executor, self._run, [entry.item for entry in batch])
        running.add_done_callback(lambda done: self._finish(batch, now, done))

    def _drop_late(self, now: float) -> None:
        """Refuses items that can no longer be answered in time; the last one is always tried."""
        self._queue = deque(entry for entry in self._queue if not entry.answer.done())  # some were cancelled
        while len(self._queue) > 1:
            seconds = self._times.estimate(min(len(self._queue), self.largest))
            first = self._queue[0]
            if now + seconds <= first.arrived + max(first.budget, self.budget) + ROUNDING:
                return
            self._queue.popleft().answer.set_exception(Refused("late", seconds))

    def _finish(self, batch: Sequence[_Waiting[Item, Result]], started: float,
                done: "asyncio.Future[Sequence[Result | Exception]]") -> None:
        seconds, error = self._clock() - started, done.exception()
        if error is None:
            self._times.observe(len(batch), seconds)
        self.failures = 0 if error is None else self.failures + 1
        self._on_batch(len(batch), started - batch[0].arrived, seconds)
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
    """Seconds for a Retry-After header: rounded up, at least 1."""
    return max(math.ceil(seconds), 1)
