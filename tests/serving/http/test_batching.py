"""Micro-batching and admission in virtual time: closed-form cases, and properties for any arrivals."""

import asyncio
import math
import random
import selectors
from concurrent.futures import Executor, Future

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("starlette", reason="the extra [serve] is not installed")

from tarq_jax.serving.http.batching import (
    BURST,
    FULL,
    MEMORY,
    Batcher,
    Load,
    Refused,
    ServiceTimes,
    default_budget,
    useful_sizes,
    whole_seconds,
)
from tarq_jax.serving.http.metrics import Metrics

SECONDS = {1: 1.0, 2: 1.5, 4: 2.0}


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop that does not wait: its clock jumps to the time of the next event."""

    def __init__(self):
        self.now = 0.0
        selector = selectors.SelectSelector()
        super().__init__(selector)
        ready = selector.select

        def select(timeout=None):
            assert timeout is not None, "nothing will ever happen"
            self.now += max(timeout, 0.0)
            return ready(0)

        selector.select = select

    def time(self):
        return self.now


class VirtualExecutor(Executor):
    """Runs the function after a virtual time of `seconds(size of the batch)`."""

    def __init__(self, loop, seconds):
        self.loop, self.seconds, self.batches = loop, seconds, []

    def submit(self, function, batch):
        future = Future()
        self.batches.append((self.loop.time(), list(batch)))

        def done():
            try:
                future.set_result(function(batch))
            except Exception as error:
                future.set_exception(error)

        self.loop.call_later(self.seconds(len(batch)), done)
        return future


def simulate(arrivals, *, run=lambda batch: [10 * item for item in batch], seconds=None, patience=None,
             times=SECONDS, **changes):
    """Submits item i at arrivals[i]; returns the outcomes (time, result or exception), and the batches."""
    options = {"largest": 4, "delay": 0.5, "budget": 100.0, "timeout": math.inf, "limit": 1000} | changes
    padded = ServiceTimes(times).estimate

    async def main():
        loop = asyncio.get_running_loop()
        executor = VirtualExecutor(loop, seconds or padded)
        batcher = Batcher(run, executor, ServiceTimes(times), Load(loop.time()), clock=loop.time,
                          **options)

        async def submit(item, when):
            await asyncio.sleep(when)
            try:
                async with asyncio.timeout(patience):
                    result = await batcher.submit(item)
            except Exception as error:
                result = error
            return loop.time(), result

        outcomes = await asyncio.gather(*(submit(item, when) for item, when in enumerate(arrivals)))
        await batcher.drained()
        assert batcher.waiting == 0
        return outcomes, executor.batches

    return in_virtual_time(main())


def in_virtual_time(coroutine):
    """The result of the coroutine."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(coroutine)
    finally:
        loop.close()


def reasons(outcomes):
    return [result.reason if isinstance(result, Refused) else result for _, result in outcomes]


def test_a_lone_item_waits_for_the_delay():
    assert simulate([0.0]) == ([(1.5, 0)], [(0.5, [0])])


def test_a_full_batch_does_not_wait():
    outcomes, batches = simulate([0.0, 0.1, 0.2, 0.3])
    assert batches == [(pytest.approx(0.3), [0, 1, 2, 3])]
    assert outcomes == [(pytest.approx(2.3), 10 * item) for item in range(4)]


def test_without_delay_it_starts_at_once():
    assert simulate([0.0], delay=0.0) == ([(1.0, 0)], [(0.0, [0])])


def test_a_batch_fills_while_another_runs():
    """Items that arrive from 0.6 to 1.0 wait only for the first batch to end, not for the delay after it."""
    outcomes, batches = simulate([0.0, 0.6, 0.8, 1.0])
    assert batches == [(0.5, [0]), (1.5, [1, 2, 3])]
    assert [time for time, _ in outcomes] == [1.5, 3.5, 3.5, 3.5]


def test_metrics_tell_how_long_the_first_of_a_batch_waited():
    """The same arrivals: one item waits 0.5 and runs 1.0, three of which the first waits 0.9 run 2.0."""
    metrics = Metrics()
    simulate([0.0, 0.6, 0.8, 1.0], on_batch=metrics.batch)
    value = metrics.registry.get_sample_value
    for name, total in (("tarq_wait_seconds", 1.4), ("tarq_batch_seconds", 3.0), ("tarq_batch_size", 4.0)):
        assert (value(f"{name}_count"), value(f"{name}_sum")) == (2.0, pytest.approx(total))
    assert [value("tarq_wait_seconds_bucket", {"le": le}) for le in ("0.25", "0.5", "1.0")] == [0.0, 1.0, 2.0]


def test_late_comers_still_get_their_delay():
    _, batches = simulate([0.0, 1.4])
    assert batches == [(0.5, [0]), (pytest.approx(1.9), [1])]


def test_more_than_fits_goes_on_in_order():
    _, batches = simulate([0.0] * 10)
    assert [items for _, items in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [start for start, _ in batches] == [0.0, 2.0, 4.0]


def test_errors_reach_those_whom_they_concern():
    def run(batch):
        if 2 in batch:
            raise RuntimeError("all of it")
        return [ValueError(item) if item == 1 else item for item in batch]

    results = [result for _, result in simulate([0.0, 0.0, 9.0, 9.0, 20.0], run=run)[0]]
    assert results[0] == 0 and results[4] == 4
    assert isinstance(results[1], ValueError) and all(isinstance(r, RuntimeError) for r in results[2:4])


def test_a_full_queue_refuses():
    """One runs, two wait, and the next is refused immediately with the time when the queue will be done."""
    outcomes, _ = simulate([0.0, 0.6, 0.7, 0.8], limit=2)
    assert reasons(outcomes) == [0, 10, 20, "full"]
    assert outcomes[3][0] == 0.8
    assert outcomes[3][1].retry_after == pytest.approx(0.7 + 2.0)


def test_what_would_take_too_long_is_refused_at_once():
    """The first ends at 1.5; four items of 0.6 end at 3.5, as their batch is full; the fifth ends at 5.5."""
    arrivals = [0.0] + [0.6] * 5
    assert reasons(simulate(arrivals, budget=3.0)[0]) == [0, 10, 20, 30, 40, "slow"]
    assert reasons(simulate(arrivals, budget=2.8)[0]) == [0] + ["slow"] * 5
    assert reasons(simulate(arrivals, budget=4.95)[0]) == [0, 10, 20, 30, 40, 50]


@pytest.mark.parametrize("budget", [None, 100.0])
def test_what_would_come_after_the_time_out_is_refused_at_once(budget):
    """A first batch ends at 2.0 and a second one would at 4.0, however long the budget is."""
    outcomes, _ = simulate([0.0] * 10, budget=budget, timeout=3.0)
    assert reasons(outcomes) == [0, 10, 20, 30] + ["slow"] * 6
    assert all(when == 0.0 for when, _ in outcomes[4:])


def test_a_batch_that_failed_tells_nothing_about_times():
    """Three take long and fail; after the fourth, four items still fit the budget."""
    def run(batch):
        if min(batch) < 3:
            raise RuntimeError("the device")
        return [10 * item for item in batch]

    failing = iter([30.0] * 3)
    outcomes, _ = simulate([0.0, 40.0, 80.0, 120.0, 120.6, 120.61, 120.62, 120.63, 120.64], budget=3.0,
                           run=run, seconds=lambda size: next(failing, ServiceTimes(SECONDS).estimate(size)))
    assert all(isinstance(error, RuntimeError) for _, error in outcomes[:3])
    assert reasons(outcomes)[3:] == [30, 40, 50, 60, 70, "slow"]


def test_where_nothing_runs_everything_is_tried():
    """They are accepted however slow the last one was; otherwise a recovery would never be noticed."""
    outcomes, _ = simulate([0.0, 40.0, 80.0], budget=0.1, seconds=lambda size: 30.0)
    assert reasons(outcomes) == [0, 10, 20]


def test_slower_batches_than_expected():
    """An item that has waited too long when its turn comes is dropped, except the last one."""
    outcomes, batches = simulate([0.0] + [0.6] * 4, budget=3.0, seconds=lambda size: 10.0)
    assert reasons(outcomes) == [0, "late", "late", "late", 40]
    assert [items for _, items in batches] == [[0], [4]]


def test_who_gave_up_is_not_computed():
    outcomes, batches = simulate([0.0, 0.6, 0.7], patience=0.85)
    assert [type(result) for _, result in outcomes] == [TimeoutError, TimeoutError, TimeoutError]
    assert [items for _, items in batches] == [[0], [2]]


@settings(deadline=None, max_examples=150)
@given(st.lists(st.floats(0.001, 3.0), max_size=40), st.sampled_from([1, 2, 4]), st.floats(0.0, 2.0),
       st.floats(1.0, 4.0))
@example([1.9275827096990719, 0.5, 0.25], 4, 0.9, 1.0)  # whose end is its budget's, but for rounding
def test_any_arrivals(gaps, largest, delay, slack):
    """If batches take the measured time, every accepted item is answered, in order, within the budget."""
    arrivals, now = [], 0.0
    for gap in gaps:
        arrivals.append(now := now + gap)
    budget = delay + slack * SECONDS[largest]
    outcomes, batches = simulate(arrivals, largest=largest, delay=delay, budget=budget)
    answered = [item for item, (_, result) in enumerate(outcomes) if not isinstance(result, Exception)]
    assert [item for _, batch in batches for item in batch] == answered
    assert all(len(batch) <= largest for _, batch in batches)
    assert {r for r in reasons(outcomes) if isinstance(r, str)} <= {"slow"}
    for item in answered:
        time, result = outcomes[item]
        assert result == 10 * item and time <= arrivals[item] + budget + 1e-9
    end = -1.0
    for start, batch in batches:  # no item waits without a reason
        full = arrivals[batch[-1]] if len(batch) == largest else float("inf")
        assert start <= max(end, min(full, arrivals[batch[0]] + delay)) + 1e-9
        end = start + ServiceTimes(SECONDS).estimate(len(batch))


def poisson(rate, seconds, seed):
    rng, now, times = random.Random(seed), 0.0, []
    while (now := now + rng.expovariate(rate)) < seconds:
        times.append(now)
    return times


@pytest.mark.parametrize(("slower", "own"), [(1.0, True), (3.0, True), (1.0, False), (3.0, False)])
def test_twice_the_load_that_it_can_hold(slower, own):
    """Answers keep their latency, most of the capacity is used, and the other requests are refused.

    Batches take up to 1.1 times the measured time, or three times that, which the batcher has to discover.
    With the default budget, the first arrivals may be a burst or the start of an overload.
    """
    rng = random.Random(0)
    capacity = 4 / (2.0 * slower)
    arrivals = poisson(2 * capacity, 2000, seed=1)
    times, delay = {1: 1.6, 4: 2.0}, 0.5
    budget = default_budget(1.1 * slower * times[1], delay)

    def seconds(size):
        return times[1 if size == 1 else 4] * slower * rng.uniform(0.9, 1.1)

    outcomes, _ = simulate(arrivals, times=times, budget=budget if own else None, seconds=seconds)
    waited = [(arrival, time - arrival) for arrival, (time, result) in zip(arrivals, outcomes, strict=True)
              if not isinstance(result, Exception)]
    told = 0.0 if own else 1.5 * MEMORY * 2.0 * slower
    later = sorted(seconds for arrival, seconds in waited if arrival >= told)
    assert later[int(0.99 * len(later))] <= 1.05 * budget
    assert max(seconds for _, seconds in waited) <= 1.2 * (1 + BURST) * budget
    assert len(waited) > 0.85 * capacity * 2000
    assert reasons(outcomes).count("late") < 0.05 * len(arrivals)


@pytest.mark.parametrize("largest", [1, 4])
def test_the_capacity_is_used_though_batches_vary(largest):
    """Under twice the load, with batches of one and a half times the median and more."""
    rng, times = random.Random(0), {1: 1.6, 4: 2.0}
    capacity = largest / times[largest]
    arrivals = poisson(2 * capacity, 2000, seed=1)

    def seconds(size):
        return times[1 if size == 1 else 4] * rng.lognormvariate(-0.045, 0.3)

    outcomes, _ = simulate(arrivals, times=times, largest=largest, budget=None, seconds=seconds)
    answered = sum(not isinstance(result, Exception) for _, result in outcomes)
    assert answered > 0.85 * capacity * 2000


@pytest.mark.parametrize("budget", [None, 3.0])
def test_no_patience_under_overload(budget):
    async def main():
        now = asyncio.get_running_loop().time
        batcher = Batcher(lambda batch: batch, None, ServiceTimes(SECONDS), Load(now()), largest=4, delay=0.5,
                          budget=budget, timeout=math.inf, limit=10, clock=now)
        found = []  # load, and what patience adds to the budget then
        for _ in range(300):
            before, batcher.patience = batcher.budget, 7.0
            found.append((batcher.load.of(now(), 2.0), batcher.budget - before))
            batcher.patience = 0.0
            batcher.count()
        return found

    found = in_virtual_time(main())
    assert {round(extra, 6) for load, extra in found if load < FULL} == {7.0}
    assert {extra for load, extra in found if load >= FULL} == {0.0}


def refused_at(load, budget=None, seconds=None):
    """Share of random arrivals that is refused, if items are computed one at a time."""
    arrivals = poisson(load, 3000, seed=1)
    outcomes, _ = simulate(arrivals, times={1: 1.0}, largest=1, delay=0.0, budget=budget, seconds=seconds)
    return sum(isinstance(result, Refused) for _, result in outcomes) / len(arrivals)


def test_bursts_are_answered_at_loads_that_it_can_hold():
    """A budget that is set explicitly is kept, and then many are refused."""
    fixed = default_budget(1.0, delay=0.0)
    assert refused_at(0.25) == 0.0 and refused_at(0.25, fixed) > 0.02
    assert refused_at(0.5) < 0.005 and refused_at(0.5, fixed) > 0.08
    assert refused_at(0.75) < 0.04 and refused_at(0.75, fixed) > 0.15
    rng = random.Random(0)
    assert refused_at(0.75, seconds=lambda _: rng.uniform(0.5, 1.5)) < 0.06  # their mean is what counts


@given(st.lists(st.floats(0.0, 20.0), min_size=1, max_size=60), st.sampled_from([1, 4]), st.floats(0.1, 4.0))
def test_the_load_is_the_work_that_came_forgotten_exponentially(gaps, largest, batch):
    load, now, arrivals = Load(0.0), 0.0, []
    for gap in gaps:
        arrivals.append(now := now + gap)
        load.arrive(now, batch, largest)
    kept = [math.exp((arrival - now - 1.0) / (MEMORY * batch)) for arrival in arrivals]
    assert load.of(now + 1.0, batch) == pytest.approx(sum(kept) / (MEMORY * largest))


def test_a_hiccup_is_forgotten():
    times = ServiceTimes({1: 1.0})
    times.observe(1, 1000.0)
    assert times.estimate(1) < 4.0
    for _ in range(40):
        times.observe(1, 1.0)
    assert times.estimate(1) == pytest.approx(1.0, abs=0.05)


def test_a_trend_is_followed():
    times = ServiceTimes({1: 1.0, 4: 2.0})
    for _ in range(60):
        times.observe(4, 20.0)
    assert times.estimate(1) == pytest.approx(10.0, rel=0.1)


@pytest.mark.parametrize(("seconds", "budget", "sizes"), [
    ({1: 1.0, 2: 1.2, 4: 1.5}, 10.0, [1, 2, 4]),
    ({1: 1.0, 2: 1.2, 4: 1.5}, 2.5, [1, 2]),  # two batches of 4 would not fit
    ({1: 1.0, 2: 2.0, 4: 4.0}, 100.0, [1]),  # no gain
    ({1: 1.0, 2: 2.0, 4: 2.4}, 100.0, [1, 4]),
    ({4: 9.0}, 1.0, [4]),
])
def test_useful_sizes(seconds, budget, sizes):
    assert useful_sizes(seconds, budget) == sizes


def test_whole_seconds():
    assert [whole_seconds(seconds) for seconds in (0.0, 0.2, 1.0, 1.2)] == [1, 1, 1, 2]
