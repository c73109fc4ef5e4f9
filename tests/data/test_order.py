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
