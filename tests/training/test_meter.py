"""The meter, with a clock that only the test moves."""

import math

import jax.numpy as jnp
import pytest

from tarq_jax.training import meter
from tarq_jax.training.meter import Meter

METRICS = {"loss": jnp.zeros(())}


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
    return clock


def step(measured: Meter, clock, candidates: int, wait: float, work: float) -> None:
    with measured.waiting():
        clock.sleep(wait)
    clock.sleep(work)
    measured.count(candidates, METRICS)


def test_the_first_step_does_not_count(clock):
    measured = Meter()
    step(measured, clock, 1000, 5.0, 60.0)  # includes compilation
    step(measured, clock, 30, 0.5, 1.5)
    step(measured, clock, 50, 0.5, 1.5)
    assert measured.total() == {"examples_per_second": 20.0, "input_wait_share": 0.25, "train_seconds": 4.0}


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
