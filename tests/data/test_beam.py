"""Single parts of the Beam pipelines, mostly without a runner."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

beam = pytest.importorskip("apache_beam", reason="Apache Beam prepares data: pip install 'tarq_jax[beam]'")

from tarq_jax.data.beam.requests import KeepLast, Rules, make_requests  # noqa: E402
from tarq_jax.data.beam.vocabulary import SHARES, _rank, stable_hash  # noqa: E402


@given(values=st.lists(st.integers(0, 20), max_size=60), num=st.integers(1, 9), parts=st.integers(1, 4))
def test_the_last_are_kept_however_they_are_bundled(values, num, parts):
    combine, accumulators = KeepLast(num), []
    for part in range(parts):
        accumulator = combine.create_accumulator()
        for value in values[part::parts]:
            accumulator = combine.add_input(accumulator, value)
            assert len(accumulator[0]) < 2 * num  # bounded, however many events the user has
        accumulators.append(accumulator)
    merged = combine.merge_accumulators([combine.create_accumulator(), *accumulators])
    assert combine.extract_output(merged) == (sorted(values)[-num:], max(len(values) - num, 0))


@given(st.sets(st.text(max_size=5), max_size=30))
def test_ranks_are_dense_and_do_not_depend_on_the_order_of_shares(keys):
    shares: dict[int, list[str]] = {}
    for key in keys:
        shares.setdefault(stable_hash(key) % SHARES, []).append(key)
    sizes = {share: len(found) for share, found in shares.items()}
    rows = dict(entry for share in shares.items() for entry in _rank(share, sizes))
    assert sorted(rows.values()) == list(range(1, len(keys) + 1)) and rows.keys() == keys


def user(events, shown):
    return "7", {"user": [3], "events": [(events, 0)], "shown": [(shown, 0)]}


@given(times=st.lists(st.integers(0, 9), max_size=12),
       asked=st.lists(st.integers(0, 9), min_size=1, max_size=5),
       length=st.integers(1, 5))
def test_no_history_holds_the_time_of_its_request_or_later(times, asked, length):
    events = sorted((time, 100 + time, (time,)) for time in times)
    shown = sorted((time, (), 200 + time, 1.0) for time in asked)
    rules = Rules(length, validation_start=4, test_start=8)
    found = list(make_requests(user(events, shown), np.zeros(0, int), rules))
    assert [r.candidates[0][0] - 200 for r in found] == sorted(set(asked))
    for request in found:
        time = request.candidates[0][0] - 200
        past = [t for _, (t,) in request.history]
        assert past == [t for t in sorted(times) if t < time][-length:]
        assert request.split == ("train" if time < 4 else "validation" if time < 8 else "test")


def test_negatives_depend_on_the_seed_and_the_request_alone():
    shown = [(5, (), 1, 1.0), (6, (), 2, 1.0)]
    pool = np.arange(50)
    first, again, other = (
        [r.candidates for r in make_requests(user([(1, 9, ())], shown), pool,
                                             Rules(5, 10, 20, num_negatives=4, seed=seed))]
        for seed in (0, 0, 1))
    assert first == again != other and first[0] != first[1]
    for candidates in first:
        items = [item for item, _ in candidates]
        assert len(set(items)) == 5 and not {0, 9} & set(items)
    few, = make_requests(user([(1, 9, ())], shown[:1]), np.array([1, 9, 4]),
                         Rules(5, 10, 20, num_negatives=4))
    assert sorted(few.candidates) == [(1, 1.0), (4, 0.0)]  # there are no more
