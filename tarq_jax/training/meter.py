"""Measures training speed: candidate examples a second, and the share of time spent waiting for data."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax

NOTHING_COUNTED = (0.0, 0.0, 0.0)


class Meter:
    """Counts candidates against time; compilation and whatever happens while paused do not count.

    JAX returns before the device is done, so each reading waits for the last step counted.
    """

    def __init__(self, counted: Sequence[float] = NOTHING_COUNTED):
        """Starts paused: the first step, which compiles, is not counted.

        Args:
          counted: what the meter of an earlier part of the run had `counted`.
        """
        self._pending: dict[str, jax.Array] | None = None  # metrics of the last step, to wait for
        self._since: float | None = None  # when counting went on; None while paused
        self._candidates, self._seconds, self._waited = counted
        self._read = tuple(counted)  # the same at the last reading

    @property
    def counted(self) -> tuple[float, float, float]:
        """Candidates, seconds, and seconds of these that went by waiting for data."""
        self._settle()
        return self._candidates, self._seconds, self._waited

    def count(self, candidates: int, step_metrics: dict[str, jax.Array]) -> None:
        """Adds one step, or starts counting with it after a pause."""
        self._pending = step_metrics
        if self._since is None:
            jax.block_until_ready(step_metrics)
            self._since = time.perf_counter()
        else:
            self._candidates += candidates

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Times the wait for a batch."""
        before = time.perf_counter()
        yield
        if self._since is not None:
            self._waited += time.perf_counter() - before

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
        """Speed over all that was counted, and the time it took."""
        return _rates(*self.counted) | {"train_seconds": self._seconds}

    def _settle(self) -> None:
        if self._since is not None:
            jax.block_until_ready(self._pending)
            now = time.perf_counter()
            self._seconds += now - self._since
            self._since = now


def _rates(candidates: float, seconds: float, waited: float) -> dict[str, float]:
    if not seconds:
        return {"examples_per_second": float("nan"), "input_wait_share": float("nan")}
    return {"examples_per_second": candidates / seconds, "input_wait_share": waited / seconds}
