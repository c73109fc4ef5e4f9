"""The pipeline: batches equal a slow loop, resuming is exact, every request comes once."""

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
    collate,
    eval_batches,
    item_batches,
    prefetch,
    train_batches,
)
from tarq_jax.data.records import make_requests

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


def slow_collate(dataset, requests, indices, length, candidates):
    """One value at a time: {column: array}."""
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


@pytest.mark.parametrize("start", [0, 1, 4, 5, 13])
def test_resuming_is_exact(start):
    dataset = make_dataset()
    run = train_batches(dataset, "train", batch_size=4, seed=3, **SIZES)
    resumed = train_batches(dataset, "train", batch_size=4, seed=3, start_step=start, **SIZES)
    for a, b in zip(itertools.islice(run, start, start + 7), resumed, strict=False):
        assert_same_batch(a, b)


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
    assert 4 <= len(drawn) <= 5  # one given, three in the buffer, one waiting for room
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
