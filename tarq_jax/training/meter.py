"""Measures training speed: candidate examples a second, and the share of time spent waiting for data."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax


class Meter:
    """Counts candidates against time; compilation and whatever happens while paused do not count.

    JAX returns before the device is done, so each reading waits for the last step counted.
    """

    def __init__(self):
        """Starts paused: the first step, which compiles, is not counted."""
        self._pending = None  # metrics of the last step, to wait for
        self._since = None  # when counting went on; None while paused
        self._candidates = self._seconds = self._waited = 0.0
        self._read = (0.0, 0.0, 0.0)  # the same at the last reading

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
        self._settle()
        now = (self._candidates, self._seconds, self._waited)
        rates = _rates(*(new - old for new, old in zip(now, self._read, strict=True)))
        self._read = now
        return rates

    def total(self) -> dict[str, float]:
        """Speed over all that was counted, and the time it took."""
        self._settle()
        return _rates(self._candidates, self._seconds, self._waited) | {"train_seconds": self._seconds}

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
