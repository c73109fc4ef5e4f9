"""The order of requests: each once per epoch, as a pure function of seed, step and hosts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tarq_jax.data.order import MIN_BLOCKS, Order, Position, Shard, deals_blocks, draw, locate, windows
from tarq_jax.data.records import offsets_of

SIZES = (7, 3, 9, 1, 6, 8, 2, 5)


def walk(order: Order, steps: int) -> list[tuple[Position, np.ndarray]]:
    """For each step, its position and its requests, numbered over the whole split."""
    offsets, found = offsets_of(np.array(order.sizes)), []
    for step in range(steps):
        at = locate(order, step)
        blocks = np.sort(windows(order, at.epoch)[at.window])
        numbers = np.concatenate([np.arange(offsets[b], offsets[b + 1]) for b in blocks])
        chosen = draw(order, at.epoch, at.window, np.zeros(len(numbers), int), ())[at.batch]
        found.append((at, numbers[chosen[order.rows]]))
    return found


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=9), batch=st.integers(1, 4),
       window=st.integers(1, 4), seed=st.integers(0, 2**40))
def test_an_epoch_has_no_request_twice_and_leaves_out_less_than_a_batch_a_window(sizes, batch, window, seed):
    if batch > (largest := -(-sum(sizes) // -(-len(sizes) // window))):
        with pytest.raises(ValueError, match=f"batch_size is {batch}, expected at most {largest}: "):
            Order(tuple(sizes), batch, seed, window=window)
        return
    order = Order(tuple(sizes), batch, seed, window=window)
    epochs: dict[int, list] = {}
    for at, requests in walk(order, 60):
        epochs.setdefault(at.epoch, []).append((at, requests))
    assert sorted(epochs) == list(range(len(epochs)))
    epochs.popitem()  # the last epoch is incomplete
    for epoch, steps in epochs.items():
        drawn = np.concatenate([requests for _, requests in steps])
        assert len(np.unique(drawn)) == len(drawn) and drawn.max() < sum(sizes)
        lost = sum(sum(sizes[b] for b in blocks) % batch for blocks in windows(order, epoch))
        assert len(drawn) == sum(sizes) - lost


def test_one_block_is_the_permutation_of_an_epoch():
    order = Order((23,), 4, seed=3)
    expected = np.concatenate([np.random.default_rng([3, epoch]).permutation(23)[:20] for epoch in range(3)])
    np.testing.assert_array_equal(np.concatenate([r for _, r in walk(order, 15)]), expected)


def test_any_step_is_found_without_those_before():
    straight = walk(Order(SIZES, 4, seed=1, window=3), 50)
    for step in (49, 0, 17, 33):
        fresh = Order(SIZES, 4, seed=1, window=3)
        assert locate(fresh, step) == straight[step][0]


@pytest.mark.parametrize("count", [2, 4])
def test_hosts_that_share_blocks_take_rows_of_the_same_batches(count):
    whole = walk(Order(SIZES, 4, seed=1, window=3), 20)
    parts = [walk(Order(SIZES, 4, 1, Shard(index, count), window=3), 20) for index in range(count)]
    for step, (_, requests) in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([part[step][1] for part in parts]), requests)


def test_hosts_with_blocks_of_their_own_never_meet_and_keep_step():
    sizes = tuple(np.random.default_rng(0).integers(1, 9, 50).tolist())
    hosts = [Order(sizes, 6, 1, Shard(index, 3), dealt=True, window=4) for index in range(3)]
    runs = [walk(order, 80) for order in hosts]
    offsets = offsets_of(np.array(sizes))
    for index, run in enumerate(runs):
        owners = np.searchsorted(offsets, np.concatenate([r for _, r in run]), side="right") - 1
        assert set(owners % 3) == {index}
        assert all(len(requests) == 2 for _, requests in run)
        assert [at.epoch for at, _ in run] == [at.epoch for at, _ in runs[0]]


def test_blocks_are_dealt_where_there_are_many_and_no_buckets():
    many = 4 * MIN_BLOCKS
    assert deals_blocks(many, Shard(0, 4), ())
    assert not deals_blocks(many - 1, Shard(0, 4), ())
    assert not deals_blocks(many, Shard(0, 4), (16,))
    assert not deals_blocks(many, Shard(), ())


def test_blocks_are_dealt_with_buckets_where_lengths_are_known():
    many = 4 * MIN_BLOCKS
    assert deals_blocks(many, Shard(0, 4), (16,), lengths_known=True)
    assert not deals_blocks(many - 1, Shard(0, 4), (16,), lengths_known=True)
    assert not deals_blocks(many, Shard(), (16,), lengths_known=True)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), hosts=st.integers(2, 4), window=st.integers(1, 5), seed=st.integers(0, 2**40))
def test_aligned_hosts_have_the_same_steps_and_never_meet(data, hosts, window, seed):
    num = data.draw(st.integers(hosts, 6 * hosts))
    sizes = tuple(data.draw(st.lists(st.integers(0, 9), min_size=num, max_size=num)))
    batch = hosts * data.draw(st.integers(1, 12))
    orders = []
    try:
        orders = [Order(sizes, batch, seed, Shard(index, hosts), True, window, aligned=True)
                  for index in range(hosts)]
    except ValueError as error:
        assert f"batch_size is {batch}, expected at most " in str(error)
        return
    runs = [walk(order, 30) for order in orders]  # does not end if epochs may have no step
    offsets = offsets_of(np.array(sizes))
    epochs: dict[int, list] = {}
    for index, run in enumerate(runs):
        assert [at for at, _ in run] == [at for at, _ in runs[0]]
        for at, requests in run:
            assert len(requests) == batch // hosts
            assert set((np.searchsorted(offsets, requests, side="right") - 1) % hosts) == {index}
            epochs.setdefault(at.epoch, []).append(requests)
    for drawn in map(np.concatenate, epochs.values()):
        assert len(np.unique(drawn)) == len(drawn)


@pytest.mark.parametrize(("sizes", "window", "largest"), [
    ((4,) * 12, 2, 2 * 8),  # every window has two blocks
    ((4,) * 14, 3, 2 * 8),  # seven blocks of a host in three windows: of two at least
    ((1, 4, 4, 4, 4, 4, 4, 4), 1, 2 * 4),  # at most one of four windows lacks requests
    ((1, 1, 4, 4, 4, 4, 4, 4), 1, 2 * 4),
    ((1, 1, 1, 1, 4, 4, 4, 4), 1, 2 * 1)])  # each window might have a small block, on one host or the other
def test_the_largest_batch_of_aligned_hosts_is_in_every_epoch(sizes, window, largest):
    with pytest.raises(ValueError, match=f"batch_size is {largest + 2}, expected at most {largest}: "):
        Order(sizes, largest + 2, 0, Shard(0, 2), True, window, aligned=True)
    order = Order(sizes, largest, 0, Shard(0, 2), True, window, aligned=True)
    assert {at.epoch for at, _ in walk(order, 200)} == set(range(1 + locate(order, 199).epoch))


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_aligned_hosts_pad_little_more_than_one(hosts):
    sizes, batch, buckets = (128,) * 256, 64, (8, 16, 32)
    drawn = 1 + np.random.default_rng(0).exponential(17, sum(sizes))
    lengths = np.minimum(drawn, 50).astype(int).reshape(len(sizes), -1)

    def padding(count: int) -> float:
        orders = [Order(sizes, batch, 0, Shard(index, count), count > 1, aligned=count > 1)
                  for index in range(count)]
        padded = 0
        for window in range(len(windows(orders[0], 0))):
            longest = []
            for order in orders:
                there = lengths[np.sort(windows(order, 0)[window])].ravel()
                longest.append(there[draw(order, 0, window, there, buckets)].max(axis=1))
            padded += np.array([*buckets, 50])[np.searchsorted(buckets, np.max(longest, axis=0))].sum()
        return 1 - lengths.sum() / (padded * batch)

    assert padding(hosts) < padding(1) + 0.03
    assert padding(1) < 0.3 < 0.5 < 1 - lengths.mean() / 50  # that of one padded length


def test_buckets_group_requests_and_lose_none_by_length():
    lengths = np.random.default_rng(0).integers(0, 100, 1003)
    order = Order((1003,), 10, seed=0)
    grouped, plain = (draw(order, 0, 0, lengths, buckets) for buckets in ((10, 50), ()))
    assert sorted(grouped.ravel()) == sorted(plain.ravel()) and grouped.shape == (100, 10)
    buckets = np.searchsorted((10, 50), lengths[grouped])
    assert (buckets.min(1) != buckets.max(1)).sum() <= 2
    assert (np.diff(buckets.max(1)) < 0).any()  # batches are not ordered from short to long
    padded = np.array([10, 50, 100])[buckets.max(1)].sum() * 10
    assert padded < 0.8 * 100 * 1000  # compared with padding every history to the longest


@pytest.mark.parametrize(("batch", "largest", "count"), [(20, 6, 1), (8, 6, 1), (12, 10, 2)])
def test_a_batch_that_an_epoch_may_have_none_of_is_refused(batch, largest, count):
    """Refused although some epochs have one: windows of two blocks of (1, 1, 2) hold 3 or 2 requests."""
    with pytest.raises(ValueError, match=f"batch_size is {batch}, expected at most {largest}: 41 requests"):
        Order(SIZES, batch, seed=0, shard=Shard(0, count), dealt=count > 1, window=1)
    with pytest.raises(ValueError, match="batch_size is 3, expected at most 2"):
        Order((1, 1, 2), 3, seed=0, window=2)


def test_the_largest_batch_is_found_in_every_epoch():
    order = Order(SIZES, 6, seed=0, window=1)
    assert {at.epoch for at, _ in walk(order, 400)} == set(range(1 + locate(order, 399).epoch))
