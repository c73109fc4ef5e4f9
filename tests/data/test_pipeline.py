"""The pipeline: batches equal a slow loop, resuming is exact, every request comes once."""

import dataclasses
import itertools
import threading
import time

import jax
import numpy as np
import pytest

from tarq_jax.data import (
    ITEM_ID,
    Dataset,
    Field,
    Schema,
    Shard,
    collate,
    eval_batches,
    item_batches,
    prefetch,
    train_batches,
)
from tarq_jax.data.order import MIN_BLOCKS
from tarq_jax.data.pipeline import padded_lengths, same_order
from tarq_jax.data.records import describe_blocks, make_requests, request_blocks
from tarq_jax.data.stored import StoredRequests

SCHEMA = Schema((
    Field(ITEM_ID, "item", "categorical", 20), Field("vector", "item", "vector", 3),
    Field("age", "user", "numeric"), Field("hour", "context", "categorical", 24),
    Field("feedback", "event", "categorical", 3)))
SIZES = {"history_length": 4, "num_candidates": 5}


def make_dataset(num=23, seed=0, longest=7) -> Dataset:
    rng = np.random.default_rng(seed)
    history_lengths, shown = rng.integers(0, longest + 1, num), rng.integers(0, 6, num)
    items = {ITEM_ID: np.arange(20, dtype=np.int32), "vector": rng.normal(size=(20, 3)).astype(np.float32)}
    items["vector"][0] = 0
    requests = make_requests(
        np.arange(num) % 8 + 1, rng.integers(1, 20, history_lengths.sum()), history_lengths,
        rng.integers(1, 20, shown.sum()), shown, rng.integers(0, 2, shown.sum()),
        weights=rng.random(shown.sum()),
        context={"hour": np.arange(num, dtype=np.int32) % 23 + 1},
        event={"feedback": rng.integers(1, 3, history_lengths.sum()).astype(np.int32)})
    users = {"age": np.arange(9, dtype=np.float32) / 3}
    return Dataset(SCHEMA, items, users, {"train": requests, "none": make_dataset(0).splits["train"]}
                   if num else {"train": requests})


class Records(list):
    """Records with the interface of a data source."""

    def __getitems__(self, blocks):
        return [self[block] for block in blocks]


def stored(dataset: Dataset, block_size: int) -> Dataset:
    """The data set, with `block_size` requests per record."""
    splits = {}
    for name, split in dataset.splits.items():
        facts = describe_blocks(split, block_size)
        splits[name] = StoredRequests(
            SCHEMA, Records(request_blocks(SCHEMA, split, block_size)), tuple(facts.pop("sizes")), **facts,
            num_users=9, name=name)
    return dataclasses.replace(dataset, splits=splits)


def slow_collate(dataset, requests, indices, length, candidates):
    """Collates one value at a time: {column: array}."""
    num = len(indices)
    out = {"user_id": np.zeros(num), "age": np.zeros(num), "hour": np.zeros(num),
           "h_id": np.zeros((num, length)), "h_vector": np.zeros((num, length, 3)),
           "feedback": np.zeros((num, length)), "h_mask": np.zeros((num, length), bool),
           "c_id": np.zeros((num, candidates)), "c_vector": np.zeros((num, candidates, 3)),
           "c_mask": np.zeros((num, candidates), bool), "labels": np.zeros((num, candidates)),
           "weights": np.zeros((num, candidates))}
    for b, r in enumerate(indices):
        out["age"][b] = dataset.users["age"][0]
        if r < 0:
            continue
        out["user_id"][b], out["hour"][b] = requests.user[r], requests.context["hour"][r]
        out["age"][b] = dataset.users["age"][requests.user[r]]
        events = list(range(requests.history_offsets[r], requests.history_offsets[r + 1]))[-length:]
        for n, e in enumerate(events):
            out["h_id"][b, n], out["feedback"][b, n] = requests.history[e], requests.event["feedback"][e]
            out["h_vector"][b, n], out["h_mask"][b, n] = dataset.items["vector"][requests.history[e]], True
        for g, c in enumerate(range(requests.candidate_offsets[r], requests.candidate_offsets[r + 1])):
            out["c_id"][b, g], out["c_mask"][b, g] = requests.candidates[c], True
            out["c_vector"][b, g] = dataset.items["vector"][requests.candidates[c]]
            out["labels"][b, g], out["weights"][b, g] = requests.labels[c], requests.weights[c]
    return out


def columns(batch):
    return {"user_id": batch.user_id, "age": batch.user["age"], "hour": batch.context["hour"],
            "h_id": batch.history[ITEM_ID], "h_vector": batch.history["vector"],
            "feedback": batch.history["feedback"], "h_mask": batch.history_mask,
            "c_id": batch.candidates[ITEM_ID], "c_vector": batch.candidates["vector"],
            "c_mask": batch.candidate_mask, "labels": batch.labels, "weights": batch.weights}


def assert_same_batch(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("seed, longest, length", [(0, 7, 4), (1, 7, 50), (2, 0, 3), (3, 2, 1)])
def test_collate_is_a_slow_loop(seed, longest, length):
    dataset = make_dataset(seed=seed, longest=longest)
    indices = np.random.default_rng(seed).integers(-1, 23, 40)
    batch = collate(dataset, dataset.splits["train"], indices, length, 5)
    expected = slow_collate(dataset, dataset.splits["train"], indices, length, 5)
    for name, column in columns(batch).items():
        np.testing.assert_array_equal(column, expected[name].astype(column.dtype), err_msg=name)
        assert column.dtype in (np.int32, np.float32, bool)
    assert set(batch.candidates) == {ITEM_ID, "vector"}


def test_collate_refuses_what_does_not_fit():
    dataset = make_dataset()
    with pytest.raises(ValueError, match="num_candidates is 2, but a request has 5 candidates"):
        collate(dataset, dataset.splits["train"], np.arange(23), 4, 2)
    with pytest.raises(ValueError, match=r"expected \[-1, 23\)"):
        collate(dataset, dataset.splits["train"], np.array([23]), 4, 5)


WAYS = {
    "memory": (lambda dataset: dataset, {}),
    "disk": (lambda dataset: stored(dataset, 5), {"window": 2}),
    "buckets": (lambda dataset: stored(dataset, 5), {"window": 3, "buckets": (1, 3)}),
    "threads": (lambda dataset: stored(dataset, 5), {"window": 2, "readers": 3}),
    "host": (lambda dataset: stored(dataset, 5), {"shard": Shard(1, 2)}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("start", [0, 1, 4, 5, 13])
def test_resuming_is_exact(start, way):
    kept, options = WAYS[way]
    dataset, options = kept(make_dataset()), {"batch_size": 4, "seed": 3, **SIZES, **options}
    run = train_batches(dataset, "train", **options)
    resumed = train_batches(dataset, "train", start_step=start, **options)
    for a, b in zip(itertools.islice(run, start, start + 7), resumed, strict=False):
        assert_same_batch(a, b)


@pytest.mark.parametrize("block_size", [1, 5, 100])
def test_evaluation_from_disk_is_that_from_memory(block_size):
    dataset = make_dataset()
    disk = eval_batches(stored(dataset, block_size), "train", batch_size=4, **SIZES)
    for a, b in zip(eval_batches(dataset, "train", batch_size=4, **SIZES), disk, strict=True):
        assert_same_batch(a, b)
    assert list(eval_batches(stored(dataset, block_size), "none", batch_size=4, **SIZES)) == []


def test_one_window_of_blocks_is_the_order_of_memory():
    dataset = make_dataset()
    options = {"batch_size": 4, "seed": 3, **SIZES}
    disk = train_batches(stored(dataset, 5), "train", **options)
    memory = train_batches(dataset, "train", **options)
    for a, b in itertools.islice(zip(memory, disk, strict=False), 12):
        assert_same_batch(a, b)


@pytest.mark.parametrize("readers", [1, 4])
def test_threads_change_nothing(readers):
    dataset, options = stored(make_dataset(), 3), {"batch_size": 4, "seed": 0, "window": 2, **SIZES}
    alone = train_batches(dataset, "train", **options)
    threads = train_batches(dataset, "train", readers=readers, **options)
    for a, b in itertools.islice(zip(alone, threads, strict=False), 40):
        assert_same_batch(a, b)


@pytest.mark.parametrize("kept", [lambda dataset: dataset, lambda dataset: stored(dataset, 5)])
def test_hosts_share_every_batch(kept):
    dataset, options = kept(make_dataset()), {"batch_size": 4, "seed": 0, "buckets": (2,), **SIZES}
    whole = train_batches(dataset, "train", **options)
    hosts = [train_batches(dataset, "train", shard=Shard(index, 2), **options) for index in range(2)]
    for batch, *parts in itertools.islice(zip(whole, *hosts, strict=False), 10):
        assert all(len(part.user_id) == 2 for part in parts)
        assert_same_batch(jax.tree.map(lambda *rows: np.concatenate(rows), *parts), batch)
    parts = [list(eval_batches(dataset, "train", batch_size=4, shard=Shard(index, 2), **SIZES))
             for index in range(2)]
    labels = np.concatenate([np.concatenate([b.labels[b.candidate_mask] for b in pair])
                             for pair in zip(*parts, strict=True)])
    np.testing.assert_array_equal(labels, make_dataset().splits["train"].labels)


def test_hosts_with_many_blocks_see_other_requests():
    dataset = stored(make_dataset(num=2 * MIN_BLOCKS), 1)
    users = make_dataset(num=2 * MIN_BLOCKS).splits["train"].context["hour"]
    seen = [np.concatenate([b.context["hour"] for b in itertools.islice(train_batches(
        dataset, "train", batch_size=4, seed=0, shard=Shard(index, 2), **SIZES), 8)]) for index in range(2)]
    for index in range(2):
        np.testing.assert_array_equal(np.sort(seen[index]), np.sort(users[index::2]))


def test_the_order_depends_on_the_number_of_hosts_where_blocks_are_dealt():
    dataset = stored(make_dataset(num=2 * MIN_BLOCKS), 1)
    assert same_order(dataset, "train", (2, 2), history_length=9)
    assert not same_order(dataset, "train", (1, 2), history_length=9)
    assert same_order(dataset, "train", (1, 4), history_length=9)  # too few blocks for four
    assert same_order(dataset, "train", (1, 2), history_length=9, buckets=(4,))
    assert same_order(make_dataset(), "train", (1, 2), history_length=9)


def test_buckets_give_few_shapes_and_lose_nothing():
    dataset = make_dataset(num=200, longest=40)
    options = {"batch_size": 4, "seed": 0, "history_length": 40, "num_candidates": 5}
    batches = list(itertools.islice(train_batches(dataset, "train", buckets=(8, 20), **options), 50))
    shapes = [batch.history_mask.shape[1] for batch in batches]
    assert set(shapes) == {8, 20, 40} and np.mean(shapes) < 30
    lengths = np.concatenate([batch.history_mask.sum(1) for batch in batches])
    np.testing.assert_array_equal(np.sort(lengths), np.sort(np.diff(dataset.splits["train"].history_offsets)))


@pytest.mark.parametrize("buckets, expected", [
    ((), (9,)), ((4,), (4, 9)), ((4, 9), (4, 9)), ((4, 20), (4, 9))])
def test_padded_lengths(buckets, expected):
    assert padded_lengths(buckets, 9) == expected


@pytest.mark.parametrize("change, message", [
    ({"buckets": (4, 4)}, r"buckets is \(4, 4\), expected rising positive lengths"),
    ({"buckets": (0,)}, r"buckets is \(0,\), expected rising"),
    ({"shard": Shard(2, 2)}, r"expected an index in \[0, 2\)"),
    ({"shard": Shard(0, 3)}, "batch_size is 4, expected a multiple of the 3 hosts"),
    ({"window": 0}, "window is 0"),
])
def test_wrong_calls(change, message):
    options: dict = {"batch_size": 4, "seed": 0, **SIZES} | change
    with pytest.raises(ValueError, match=message):
        train_batches(make_dataset(), "train", **options)


def test_records_that_are_not_those_of_the_metadata_are_refused():
    split = stored(make_dataset(), 5).splits["train"]
    with pytest.raises(ValueError, match="'train' has 5 records, expected 4"):
        dataclasses.replace(split, sizes=split.sizes[:4])
    wrong = dataclasses.replace(split, sizes=(4, *split.sizes[1:]))
    with pytest.raises(ValueError, match=r"blocks \[0\] hold 5 requests, expected 4"):
        wrong.read([0])
    with pytest.raises(ValueError, match=r"'train': field 'user' is \d in row .*id in \[0, 3\)"):
        dataclasses.replace(split, num_users=3).read([0, 1])


def test_an_epoch_holds_no_request_twice_and_seeds_differ():
    dataset = make_dataset()
    hours = {seed: [b.context["hour"] for b in itertools.islice(
        train_batches(dataset, "train", batch_size=4, seed=seed, **SIZES), 10)] for seed in (0, 1)}
    for epoch in (hours[0][:5], hours[0][5:]):
        assert len(np.unique(np.concatenate(epoch))) == 20  # 23 requests, 3 dropped
    assert not np.array_equal(hours[0][:5], hours[0][5:])
    assert not np.array_equal(hours[0], hours[1])


def test_training_needs_a_batch_and_a_known_split():
    dataset = make_dataset()
    with pytest.raises(ValueError, match="'train' has 23 requests, expected at least one batch"):
        train_batches(dataset, "train", batch_size=24, seed=0, **SIZES)
    with pytest.raises(ValueError, match="'none' has 0 requests"):
        train_batches(dataset, "none", batch_size=1, seed=0, **SIZES)
    with pytest.raises(ValueError, match=r"split is 'tset', expected one of \['none', 'train'\]"):
        eval_batches(dataset, "tset", batch_size=1, **SIZES)
    with pytest.raises(ValueError, match="batch_size is 0"):
        eval_batches(dataset, "train", batch_size=0, **SIZES)


def test_evaluation_covers_each_request_once():
    dataset = make_dataset()
    batches = list(eval_batches(dataset, "train", batch_size=5, **SIZES))
    assert len(batches) == 5 and all(len(b.user_id) == 5 for b in batches)
    requests = dataset.splits["train"]
    labels = np.concatenate([b.labels[b.candidate_mask] for b in batches])
    np.testing.assert_array_equal(labels, requests.labels)
    last = batches[-1]
    assert last.context["hour"].tolist()[3:] == [0, 0]
    for column in (last.candidate_mask, last.history_mask, last.weights):
        assert not column[3:].any()
    assert list(eval_batches(dataset, "none", batch_size=5, **SIZES)) == []


def test_item_batches_cover_the_real_items():
    dataset = make_dataset()
    batches = list(item_batches(dataset, 8))
    ids = np.concatenate([features[ITEM_ID][mask] for features, mask in batches])
    np.testing.assert_array_equal(ids, np.arange(1, 20))
    assert all(len(mask) == 8 for _, mask in batches)
    features, mask = batches[-1]
    assert not features["vector"][~mask].any()
    np.testing.assert_array_equal(features["vector"][mask], dataset.items["vector"][17:])


def test_prefetch_keeps_order_and_transfers_in_a_thread():
    names = []

    def transfer(value):
        names.append(threading.current_thread().name)
        return value * 10

    assert list(prefetch(range(20), 3, transfer)) == list(range(0, 200, 10))
    assert threading.current_thread().name not in names


@pytest.mark.parametrize("where", ["iterator", "transfer"])
def test_prefetch_raises_at_the_consumer_in_its_place(where):
    def numbers():
        yield from (1, 2)
        if where == "iterator":
            raise RuntimeError("broken")
        yield 3

    def transfer(value):
        if value == 3:
            raise RuntimeError("broken")
        return value

    ready = prefetch(numbers(), 4, transfer)
    assert [next(ready), next(ready)] == [1, 2]
    with pytest.raises(RuntimeError, match="broken"):
        next(ready)


def test_prefetch_stays_ahead_by_its_size_and_closes():
    drawn, threads = [], threading.active_count()

    def numbers():
        for value in itertools.count():
            drawn.append(value)
            yield value

    ready = prefetch(numbers(), 3)
    assert next(ready) == 0
    time.sleep(0.1)
    assert 4 <= len(drawn) <= 5  # one returned, three in the buffer, one waiting for room
    ready.close()
    assert threading.active_count() == threads
    with pytest.raises(ValueError, match="size is 0"):
        prefetch(range(3), 0)


def test_prefetch_feeds_the_device():
    dataset = make_dataset()
    host = train_batches(dataset, "train", batch_size=4, seed=0, **SIZES)
    ready = prefetch(train_batches(dataset, "train", batch_size=4, seed=0, **SIZES), 2, jax.device_put)
    for expected, actual in zip(itertools.islice(host, 3), ready, strict=False):
        assert isinstance(actual.labels, jax.Array)
        assert_same_batch(actual, expected)
    ready.close()
