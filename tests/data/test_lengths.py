"""Lengths beside the records: with buckets, hosts agree on shapes though each reads its own blocks alone."""

import dataclasses
import itertools
import logging

import numpy as np
import pytest

from tarq_jax.data import ITEM_ID, Dataset, Field, Schema, Shard, StoredRequests, load, load_prepared
from tarq_jax.data import train_batches as make_batches
from tarq_jax.data.lengths import lengths_file, read_lengths, write_lengths
from tarq_jax.data.order import MIN_BLOCKS
from tarq_jax.data.pipeline import _say_that_all_is_read, lengths_known, same_order
from tarq_jax.data.records import describe_blocks, make_requests, offsets_of, request_blocks

SCHEMA = Schema((Field(ITEM_ID, "item", "categorical", 9),))
LONGEST, BUCKETS, SIZE, HOSTS = 20, (2, 5), 3, 2
NUM = SIZE * MIN_BLOCKS * HOSTS + 1
OPTIONS = {"batch_size": 8, "history_length": LONGEST, "num_candidates": 1, "seed": 3, "buckets": BUCKETS}
SMALL = {"num_items": 50, "num_clusters": 8, "history_length": 5, "num_candidates": 4, "train_requests": 1100,
         "validation_requests": 7, "test_requests": 0}


class Records(list):
    """Records with the interface of a data source, which keeps the numbers of those that are read."""

    def __init__(self, records):
        super().__init__(records)
        self.read = []

    def __getitems__(self, blocks):
        self.read.extend(blocks)
        return [self[block] for block in blocks]


def make_requests_of(lengths):
    """Requests with their number as user."""
    ones = np.ones(len(lengths), int)
    return make_requests(np.arange(len(lengths)), np.ones(lengths.sum(), int), lengths, ones, ones, ones)


LENGTHS = np.minimum(np.random.default_rng(0).exponential(4, NUM).astype(int), LONGEST)


def stored(known=True, lengths=LENGTHS) -> Dataset:
    """The data set on disk, with or without lengths beside the records."""
    requests = make_requests_of(lengths)
    facts = describe_blocks(requests, SIZE)
    split = StoredRequests(SCHEMA, Records(request_blocks(SCHEMA, requests, SIZE)), tuple(facts.pop("sizes")),
                           **facts, num_users=NUM, name="train",
                           history_lengths=lengths.astype(np.uint8) if known else None)
    return Dataset(SCHEMA, {ITEM_ID: np.arange(9, dtype=np.int32)}, {}, {"train": split})


def batches_of(dataset, steps, **options):
    return list(itertools.islice(make_batches(dataset, "train", **OPTIONS | options), steps))


def test_hosts_read_their_own_blocks_and_agree_on_shapes():
    steps, datasets = 40, [stored() for _ in range(HOSTS)]
    runs = [batches_of(dataset, steps, shard=Shard(index, HOSTS), window=5)
            for index, dataset in enumerate(datasets)]
    for index, dataset in enumerate(datasets):
        assert set(np.array(dataset.splits["train"].source.read) % HOSTS) == {index}
    shapes = [[batch.history_mask.shape for batch in run] for run in runs]
    assert all(found == shapes[0] for found in shapes)
    assert {shape[1] for shape in shapes[0]} == {*BUCKETS, LONGEST}
    for batches in zip(*runs, strict=True):  # no history is cut
        for batch in batches:
            np.testing.assert_array_equal(batch.history_mask.sum(axis=1), LENGTHS[batch.user_id])
    users = np.array([[batch.user_id for batch in run] for run in runs])  # [hosts, steps, rows]
    epoch = users[:, :NUM // 8 - 3].ravel()
    assert len(np.unique(epoch)) == len(epoch)
    owners = np.searchsorted(offsets_of(np.array(datasets[0].splits["train"].sizes)), users, side="right") - 1
    assert (owners % HOSTS == np.arange(HOSTS)[:, None, None]).all()


@pytest.mark.parametrize("readers", [0, 2])
@pytest.mark.parametrize("start", [1, 7, 19])
def test_resuming_is_exact(start, readers):
    options = {"shard": Shard(1, HOSTS), "window": 5, "readers": readers}
    resumed = batches_of(stored(), 9, start_step=start, **options)
    for left, right in zip(batches_of(stored(), start + 9, **options)[start:], resumed, strict=True):
        assert left.history_mask.shape == right.history_mask.shape
        np.testing.assert_array_equal(left.user_id, right.user_id)


@pytest.mark.parametrize("options", [{}, {"buckets": ()}, {"buckets": (), "shard": Shard(1, 2)}])
def test_lengths_change_nothing_with_one_host_or_without_buckets(options):
    runs = (batches_of(stored(known), 30, **options) for known in (True, False))
    for left, right in zip(*runs, strict=True):
        assert left.history_mask.shape == right.history_mask.shape
        np.testing.assert_array_equal(left.user_id, right.user_id)


def test_without_lengths_every_host_reads_all_and_says_so_once(caplog):
    _say_that_all_is_read.cache_clear()
    dataset, whole = stored(known=False), batches_of(stored(known=False), 12)
    with caplog.at_level(logging.WARNING):
        parts = [batches_of(dataset, 12, shard=Shard(index, HOSTS)) for index in range(HOSTS)]
    for batch, *own in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(np.concatenate([part.user_id for part in own]), batch.user_id)
    assert set(dataset.splits["train"].source.read) == set(range(len(dataset.splits["train"].sizes)))
    said, = (record.getMessage() for record in caplog.records)
    assert "'train' was prepared without the lengths of its histories" in said and "again" in said


def test_nothing_is_said_where_lengths_would_not_help(caplog):
    _say_that_all_is_read.cache_clear()
    with caplog.at_level(logging.WARNING):
        batches_of(stored(known=False), 1)
        batches_of(stored(known=False), 1, shard=Shard(0, 2), buckets=())
        batches_of(stored(known=False), 1, shard=Shard(0, 4))  # too few blocks for four
        batches_of(stored(), 1, shard=Shard(0, 2))
    assert not caplog.records


@pytest.mark.parametrize("known", [True, False])
def test_the_order_depends_on_hosts_with_buckets_if_lengths_are_known(known):
    shapes = {"history_length": LONGEST, "buckets": BUCKETS}
    dataset = stored(known)
    assert lengths_known(dataset.splits["train"]) == known
    assert same_order(dataset, "train", (1, 2), **shapes) == (not known)
    assert same_order(dataset, "train", (2, 2), **shapes)
    assert same_order(dataset, "train", (1, 4), **shapes)  # too few blocks for four
    users = [np.sort(np.concatenate([batch.user_id for index in range(hosts) for batch in batches_of(
        dataset, 1, shard=Shard(index, hosts))])) for hosts in (1, 2)]
    assert np.array_equal(*users) == (not known)


def test_lengths_that_are_not_those_of_the_records_are_refused():
    split = stored().splits["train"]
    with pytest.raises(ValueError, match=f"'train' has 7 lengths of histories, expected {NUM}"):
        dataclasses.replace(split, history_lengths=split.history_lengths[:7])
    wrong = dataclasses.replace(split, history_lengths=split.history_lengths + np.uint8(1))
    with pytest.raises(ValueError, match=r"'train': histories of blocks \[4, 1\] have other lengths than"):
        wrong.read([4, 1])
    with pytest.raises(ValueError, match="'train' has no lengths of histories: prepare it again"):
        stored(known=False).splits["train"].lengths_of([0])


def test_lengths_come_in_the_order_of_the_blocks_that_are_read():
    split = stored().splits["train"]
    for blocks in ([3], [7, 0, 2], range(len(split.sizes))):
        np.testing.assert_array_equal(split.lengths_of(blocks), np.diff(split.read(blocks).history_offsets))


@pytest.mark.parametrize(("longest", "dtype"), [(0, np.uint8), (255, np.uint8), (256, np.uint16),
                                                (65_536, np.uint32)])
def test_the_file_is_a_small_array_read_as_a_map(tmp_path, longest, dtype):
    path, lengths = lengths_file(tmp_path, "train"), np.array([0, longest, longest // 2, 1 if longest else 0])
    assert read_lengths(path) is None
    write_lengths(path, [lengths[:3], lengths[3:]], 4, longest)
    found = read_lengths(path)
    assert isinstance(found, np.memmap) and found.dtype == dtype
    np.testing.assert_array_equal(found, lengths)
    write_lengths(path, [lengths[:0]], 0, 0)
    assert read_lengths(path).shape == (0,)


def test_a_prepared_directory_has_lengths_and_one_of_the_first_versions_has_none(tmp_path):
    memory, disk = (load("synthetic", data_dir=tmp_path, stream=stream, **SMALL) for stream in (False, True))
    directory, = tmp_path.glob("tarq_synthetic/*/1.0.0")
    for name, split in disk.splits.items():
        np.testing.assert_array_equal(split.history_lengths, np.diff(memory.splits[name].history_offsets))
        lengths_file(directory, name).unlink()
    old = load_prepared(directory, stream=True)
    for name, split in old.splits.items():
        assert split.history_lengths is None
        assert len(split.read(range(len(split.sizes)))) == len(memory.splits[name])


def test_a_damaged_file_is_told(tmp_path):
    load("synthetic", data_dir=tmp_path, **SMALL)
    directory, = tmp_path.glob("tarq_synthetic/*/1.0.0")
    lengths_file(directory, "train").write_bytes(b"{torn")
    with pytest.raises(ValueError, match=r"is damaged .* delete it and prepare it again"):
        load_prepared(directory, stream=True)
