"""The meter, with a clock that only the test moves, and a device whose steps take the time that it says."""

import math
import time
from typing import Any, NamedTuple

import jax.numpy as jnp
import pytest

from tarq_jax.training import meter
from tarq_jax.training.meter import Meter


class End(NamedTuple):
    """The end of a step: a `Future` for which one waits by moving the clock."""

    clock: Any
    time: float

    def done(self) -> bool:
        return self.clock.now >= self.time

    def result(self) -> float:
        self.clock.now = max(self.clock.now, self.time)
        return self.time


class Device:
    """In place of the thread that waits for steps; the "metrics" of a step are the seconds that it takes."""

    def __init__(self, clock):
        self.clock, self.free = clock, 0.0

    def submit(self, _, seconds: float) -> End:
        self.free = max(self.free, self.clock.now) + seconds
        return End(self.clock, self.free)


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

        def __call__(self) -> float:
            return self.now

        def sleep(self, seconds: float) -> None:
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(meter.time, "perf_counter", clock)
    monkeypatch.setattr(meter, "ThreadPoolExecutor", lambda threads: Device(clock))
    return clock


def step(measured: Meter, clock, candidates: int, wait: float, work: float) -> None:
    with measured.waiting():
        clock.sleep(wait)
    clock.sleep(work)
    measured.count(candidates, 0.0)


def test_the_first_step_does_not_count(clock):
    measured = Meter()
    step(measured, clock, 1000, 5.0, 60.0)  # includes compilation
    step(measured, clock, 30, 0.5, 1.5)
    step(measured, clock, 50, 0.5, 1.5)
    assert measured.total() == {"examples_per_second": 20.0, "input_wait_share": 0.25, "train_seconds": 4.0}


@pytest.mark.parametrize(("every", "share"), [(25.0, 0.0), (36.0, 0.0), (50.0, 0.28), (360.0, 0.9)])
def test_only_what_the_device_waits_is_waiting(every, share, clock):
    """Steps of 36 seconds; a batch is ready every so many, while the host does nothing but wait."""
    measured, ends, first = Meter(), [], clock.now
    for step in range(102):
        with measured.waiting():
            assert len(ends) < 2 or ends[-2] <= clock.now  # one step is queued at most
            clock.now = max(clock.now, first + every * step)
        measured.count(1, 36.0)
        ends.append(measured._ends[-1].time)
    assert measured.total()["input_wait_share"] == pytest.approx(share, abs=0.01)
    assert measured.total()["train_seconds"] == pytest.approx(101 * max(every, 36.0))


def test_the_end_of_a_step_is_that_of_the_device():
    assert meter._end_of({"loss": jnp.zeros(())}) <= time.perf_counter()


def test_pause_excludes_what_follows_up_to_the_next_step(clock):
    measured = Meter()
    step(measured, clock, 10, 0.0, 1.0)
    step(measured, clock, 10, 0.0, 1.0)
    measured.pause()
    clock.sleep(1000.0)  # evaluation
    step(measured, clock, 99, 7.0, 7.0)
    step(measured, clock, 30, 1.0, 2.0)
    assert measured.total() == {"examples_per_second": 10.0, "input_wait_share": 0.25, "train_seconds": 4.0}
    measured.pause()
    measured.pause()
    clock.sleep(1000.0)
    assert measured.total()["train_seconds"] == 4.0


def test_a_pause_counts_the_work_before_it(clock):
    measured = Meter()
    step(measured, clock, 10, 0.0, 1.0)
    step(measured, clock, 10, 0.0, 1.0)
    clock.sleep(1.0)  # the device is still working when the pause begins
    measured.pause()
    assert measured.total()["train_seconds"] == 2.0


def test_reading_covers_what_came_since_the_last(clock):
    measured = Meter()
    step(measured, clock, 10, 0.0, 1.0)
    step(measured, clock, 10, 0.0, 1.0)
    assert measured.read()["examples_per_second"] == 10.0
    step(measured, clock, 40, 1.0, 1.0)
    assert measured.read() == {"examples_per_second": 20.0, "input_wait_share": 0.5}
    assert measured.total()["train_seconds"] == 3.0


def test_nothing_counted_is_not_a_number(clock):
    measured = Meter()
    assert all(math.isnan(value) for value in measured.read().values())
    step(measured, clock, 10, 0.0, 1.0)
    measured.pause()
    assert math.isnan(measured.total()["examples_per_second"]) and measured.total()["train_seconds"] == 0.0


def test_goes_on_from_what_was_counted_before(clock):
    measured = Meter((100.0, 10.0, 1.0))
    assert measured.total() == {"examples_per_second": 10.0, "input_wait_share": 0.1, "train_seconds": 10.0}
    step(measured, clock, 77, 3.0, 3.0)
    step(measured, clock, 100, 0.0, 10.0)
    assert measured.counted == (200.0, 20.0, 1.0)
    assert measured.read() == {"examples_per_second": 10.0, "input_wait_share": 0.0}  # of this run alone
