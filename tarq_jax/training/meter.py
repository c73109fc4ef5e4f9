"""Measures training speed: candidate examples per second, and the share of time spent waiting for data."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import jax

NOTHING_COUNTED = (0.0, 0.0, 0.0)


class Meter:
    """Counts candidates and time; time for compilation and time while paused are not counted.

    JAX returns before the device is done, so each reading waits for the last counted step, and a thread looks
    when each step ends: the device waits for data from then on, not from when the host asks for them.
    """

    def __init__(self, counted: Sequence[float] = NOTHING_COUNTED):
        """Starts paused: the first step, which compiles, is not counted.

        Args:
          counted: `counted` of the meter of an earlier part of the run.
        """
        self._thread = ThreadPoolExecutor(1)
        self._ends: deque[Future[float]] = deque(maxlen=2)  # of the last two steps
        self._since: float | None = None  # start of the time not yet added; None while paused
        self._candidates, self._seconds, self._waited = counted
        self._read = tuple(counted)  # these three at the last reading

    @property
    def counted(self) -> tuple[float, float, float]:
        """Candidates, seconds, and how many of these seconds were spent waiting for data."""
        self._settle()
        return self._candidates, self._seconds, self._waited

    def count(self, candidates: int, step_metrics: dict[str, jax.Array]) -> None:
        """Adds one step; after a pause, starts counting when the step is done."""
        self._ends.append(self._thread.submit(_end_of, step_metrics))
        if self._since is None:
            self._ends[-1].result()
            self._since = time.perf_counter()
        else:
            self._candidates += candidates

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Times the wait for a batch while no step runs; first waits for the step before the last to end.

        So one step at most is queued behind the one that runs.
        """
        if len(self._ends) > 1:
            self._ends[0].result()
        before = time.perf_counter()
        yield
        if self._since is not None and self._ends[-1].done():
            self._waited += max(time.perf_counter() - max(before, self._ends[-1].result()), 0.0)

    def pause(self) -> None:
        """Stops the clock until the next step."""
        self._settle()
        self._since = None

    def read(self) -> dict[str, float]:
        """Speed since the last reading."""
        now = self.counted
        rates = _rates(*(new - old for new, old in zip(now, self._read, strict=True)))
        self._read = now
        return rates

    def total(self) -> dict[str, float]:
        """Speed over everything that was counted, and the total time."""
        return _rates(*self.counted) | {"train_seconds": self._seconds}

    def _settle(self) -> None:
        if self._since is not None:
            self._ends[-1].result()
            now = time.perf_counter()
            self._seconds += now - self._since
            self._since = now


def _end_of(step_metrics: dict[str, jax.Array]) -> float:
    jax.block_until_ready(step_metrics)
    return time.perf_counter()


def _rates(candidates: float, seconds: float, waited: float) -> dict[str, float]:
    if not seconds:
        return {"examples_per_second": float("nan"), "input_wait_share": float("nan")}
    return {"examples_per_second": candidates / seconds, "input_wait_share": waited / seconds}
