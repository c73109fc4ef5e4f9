"""Block records: nothing is lost or reordered; tfds stores and restores them without TensorFlow."""

import dataclasses
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tarq_jax.data import (
    ITEM_ID,
    Dataset,
    Field,
    Requests,
    Schema,
    builders,
    check_dataset,
    load,
    load_prepared,
    records,
    synthetic,
    taobao_userbehavior,
)
from tarq_jax.data.records import (
    make_requests,
    ragged_index,
    request_blocks,
    requests_from_blocks,
    table_blocks,
    table_from_blocks,
)
from tarq_jax.data.sources import fingerprint

SCHEMA = Schema((
    Field(ITEM_ID, "item", "categorical", 20), Field("vector", "item", "vector", 3),
    Field("age", "user", "numeric"), Field("hour", "context", "categorical", 24),
    Field("place", "context", "vector", 2), Field("feedback", "event", "categorical", 3),
    Field("dwell", "event", "numeric")))
SMALL = {"num_items": 50, "num_clusters": 8, "history_length": 5, "num_candidates": 4, "train_requests": 1100,
         "validation_requests": 7, "test_requests": 0}


def random_requests(rng, history_lengths, candidate_lengths) -> Requests:
    num, events, shown = len(history_lengths), sum(history_lengths), sum(candidate_lengths)
    return make_requests(
        rng.integers(0, 9, num), rng.integers(1, 20, events), history_lengths, rng.integers(1, 20, shown),
        candidate_lengths, rng.integers(0, 2, shown), weights=rng.random(shown),
        context={"hour": rng.integers(0, 24, num).astype(np.int32),
                 "place": rng.normal(size=(num, 2)).astype(np.float32)},
        event={"feedback": rng.integers(0, 3, events).astype(np.int32),
               "dwell": rng.normal(size=events).astype(np.float32)})


def assert_same_requests(actual: Requests, expected: Requests):
    for field in dataclasses.fields(Requests):
        left, right = getattr(actual, field.name), getattr(expected, field.name)
        pairs = [(left, right)] if isinstance(left, np.ndarray) else [(left[n], right[n]) for n in right]
        for a, b in pairs:
            assert a.dtype == b.dtype and a.shape == b.shape
            assert a.tobytes() == b.tobytes()


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), max_size=12),
       block=st.integers(1, 5), seed=st.integers(0, 2**16))
def test_blocks_round_trip_bit_exactly_in_any_order(lengths, block, seed):
    rng = np.random.default_rng(seed)
    requests = random_requests(rng, [h for h, _ in lengths], [c for _, c in lengths])
    blocks = list(request_blocks(SCHEMA, requests, block))
    assert len(blocks) == max(1, -(-len(requests) // block))
    shuffled = [blocks[i] for i in rng.permutation(len(blocks))]
    assert_same_requests(requests_from_blocks(SCHEMA, shuffled), requests)


@pytest.mark.parametrize("block", [1, 3, 100])
def test_tables_round_trip(block):
    rng = np.random.default_rng(0)
    table = {ITEM_ID: np.arange(20, dtype=np.int32), "vector": rng.normal(size=(20, 3)).astype(np.float32)}
    blocks = list(table_blocks(SCHEMA, "item", table, block))[::-1]
    for name, column in table_from_blocks(SCHEMA, "item", blocks).items():
        np.testing.assert_array_equal(column, table[name])


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5)), max_size=8))
def test_ragged_index_is_a_loop_over_windows(windows):
    expected = [s + i for s, n in windows for i in range(n)]
    actual = ragged_index(np.array([s for s, _ in windows]), np.array([n for _, n in windows], np.int64))
    assert actual.tolist() == expected


def test_prepared_directory_gives_back_what_was_generated(tmp_path):
    expected = synthetic.generate(synthetic.SyntheticOptions(**SMALL))
    first = load("synthetic", data_dir=tmp_path, **SMALL)
    directory, = tmp_path.glob("tarq_synthetic/*/1.0.0")
    elsewhere = load("synthetic", data_dir=tmp_path / "nothing", prepared=str(directory))
    for dataset in (first, load_prepared(directory), elsewhere):
        assert dataset.schema == expected.schema and dataset.info == expected.info
        assert set(dataset.splits) == {"train", "validation", "test"}
        for split, requests in dataset.splits.items():
            assert_same_requests(requests, expected.splits[split])
        for name, column in expected.items.items():
            np.testing.assert_array_equal(dataset.items[name], column)


def test_streamed_blocks_are_those_in_memory(tmp_path):
    memory = load("synthetic", data_dir=tmp_path, **SMALL)
    disk = load("synthetic", data_dir=tmp_path, stream=True, **SMALL)
    for split, requests in memory.splits.items():
        other = disk.splits[split]
        assert (len(other), other.longest_history, other.most_candidates) == (
            len(requests), requests.longest_history, requests.most_candidates)
        assert_same_requests(other.read(range(len(other.sizes))), requests)
    assert disk.splits["train"].sizes == (512, 512, 76) and disk.splits["test"].sizes == (0,)
    last = disk.splits["train"].read([2])
    np.testing.assert_array_equal(last.user, memory.splits["train"].user[1024:])


def test_other_options_are_prepared_anew_and_equal_ones_are_not(tmp_path, monkeypatch):
    small = SMALL | {"train_requests": 3}
    load("synthetic", data_dir=tmp_path, **small)
    load("synthetic", data_dir=tmp_path, **small, seed=1)
    assert len(list(tmp_path.glob("tarq_synthetic/*"))) == 2
    monkeypatch.setattr(builders.RequestBuilder, "_split_generators", None)  # preparing again would fail
    load("synthetic", data_dir=tmp_path, **small)


def test_a_prepared_directory_keeps_its_fingerprint_where_it_is_copied(tmp_path):
    small = SMALL | {"train_requests": 3}
    dataset = load("synthetic", data_dir=tmp_path, **small)
    directory, = tmp_path.glob("tarq_synthetic/*/1.0.0")
    assert dataset.fingerprint == directory.parent.name == fingerprint(
        synthetic.SOURCE, synthetic.SyntheticOptions(**small))
    copied = shutil.copytree(directory, tmp_path / "mine" / "synthetic")
    assert load_prepared(copied).fingerprint == dataset.fingerprint


def test_fingerprints_tell_versions_and_keep_those_of_the_first():
    """Fingerprints distinguish runs of a study; the one here is of data prepared by the first version."""
    options = synthetic.SyntheticOptions()
    assert fingerprint(synthetic.SOURCE, options) == "849a2a7eed1ab4b4"
    versions = [dataclasses.replace(synthetic.SOURCE, version=version) for version in ("1.0.1", "2.0.0")]
    assert len({fingerprint(source, options) for source in (synthetic.SOURCE, *versions)}) == 3


@pytest.mark.parametrize("size", [10, 1 << 20, 5 << 19, (64 << 20) - 7])
def test_a_changed_byte_of_a_log_changes_the_fingerprint(size, tmp_path):
    """Wherever it is, in files of up to 64 MiB."""
    options = taobao_userbehavior.UserBehaviorOptions(source=str(tmp_path / "log.csv"))
    content = bytearray(size)
    found = set()
    for place in (None, 0, size // 3, size - 1):
        if place is not None:
            content[place] += 1
        (tmp_path / "log.csv").write_bytes(content)
        found.add(fingerprint(taobao_userbehavior.SOURCE, options))
    assert len(found) == 4


def test_interrupted_preparation_leaves_nothing_that_looks_prepared(tmp_path, monkeypatch):
    def interrupted(schema, requests, block_size=1):
        yield from list(request_blocks(schema, requests, block_size))[:1]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(builders.records, "request_blocks", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load("synthetic", data_dir=tmp_path, **SMALL)
    assert not list(tmp_path.glob("tarq_synthetic/*/1.0.0"))
    assert len(load("synthetic", data_dir=tmp_path, **SMALL).splits["train"]) == SMALL["train_requests"]


def test_unknown_names_and_folders(tmp_path):
    with pytest.raises(ValueError, match=r"data set is 'netflix', expected one of .*'movielens'"):
        load("netflix", data_dir=tmp_path)
    with pytest.raises(ValueError, match=r"no option 'num_item', expected one of \['num_items'"):
        load("synthetic", data_dir=tmp_path, num_item=3)
    with pytest.raises(ValueError, match="needs option 'source'"):
        load("movielens", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no prepared data set"):
        load_prepared(tmp_path)


def valid_dataset() -> Dataset:
    rng = np.random.default_rng(0)
    items = {ITEM_ID: np.arange(20, dtype=np.int32), "vector": np.zeros((20, 3), np.float32)}
    return Dataset(SCHEMA, items, {"age": np.zeros(9, np.float32)},
                   {"train": random_requests(rng, [2, 0], [3, 1])})


@pytest.mark.parametrize("ids, text", [
    (np.arange(19), r"item_ids: int64 of shape \(19,\), expected whole numbers or text of shape \(20,\)"),
    (np.arange(20.0), r"item_ids: float64 of shape \(20,\), expected whole numbers or text"),
    (np.arange(20) // 2, "item_ids: 1 is negative or the id of several items"),
    (np.arange(20) - 2, "item_ids: -1 is negative or the id of several items"),
    (np.array(["", *"abcdefghijklmnopqra"]), "item_ids: a is negative or the id of several items"),
])
def test_ids_that_name_no_item_or_several_are_refused(ids, text):
    dataset = valid_dataset()
    check_dataset(dataclasses.replace(dataset, item_ids=np.arange(20) * 3))
    check_dataset(dataclasses.replace(dataset, item_ids=np.array(["", *"abcdefghijklmnopqrs"])))
    with pytest.raises(ValueError, match=text):
        check_dataset(dataclasses.replace(dataset, item_ids=ids))


@pytest.mark.parametrize("column, value, text", [
    ("history", 20, r"split 'train': field 'history' is 20 in row 0, expected an id in \[0, 20\)"),
    ("candidates", -1, r"split 'train': field 'candidates' is -1 in row 0, expected an id in \[0, 20\)"),
    ("user", 9, r"split 'train': field 'user' is 9 in row 0, expected an id in \[0, 9\)"),
    ("weights", np.inf, "split 'train': field 'weights' is inf in row 0, expected a finite number"),
    ("weights", -1.0, r"split 'train': field 'weights' is -1\.0 in row 0, expected at least 0"),
])
def test_ids_outside_the_schema_are_refused(column, value, text):
    dataset = valid_dataset()
    check_dataset(dataset)
    getattr(dataset.splits["train"], column)[0] = value
    with pytest.raises(ValueError, match=text):
        check_dataset(dataset)


def test_item_table_must_fit_the_vocabulary():
    dataset = valid_dataset()
    dataset.items["vector"][0] = 1
    with pytest.raises(ValueError, match="row 0, expected zeros"):
        check_dataset(dataset)
    reversed_ids = valid_dataset()
    reversed_ids.items[ITEM_ID][1:] = np.arange(19, 0, -1)
    with pytest.raises(ValueError, match="'item_id' is 19 in row 1, expected the number of the row"):
        check_dataset(reversed_ids)
    short = {name: column[:5] for name, column in valid_dataset().items.items()}
    with pytest.raises(ValueError, match="has 5 rows, expected 20"):
        check_dataset(dataclasses.replace(dataset, items=short))


@pytest.mark.parametrize(("column", "values", "text"), [
    (0, [2**32 + 1], "user is 4294967297 in row 0, expected an integer of 32 bits"),
    (1, np.array([3, 2**40]), "history is 1099511627776 in row 1"),
    (3, [7.0], "candidates is of type float64, expected integers"),
])
def test_ids_that_would_wrap_around_are_refused(column, values, text):
    columns = [[1], [2, 3], [2], [4], [1], [1]]
    records.make_requests(*columns)
    columns[column] = values
    with pytest.raises(ValueError, match=text):
        records.make_requests(*columns)


def test_columns_of_ones_own_are_stored_in_the_type_of_their_field():
    loose = valid_dataset()
    loose = dataclasses.replace(loose, items={name: column.astype(np.float64)
                                              for name, column in loose.items.items()})
    check_dataset(loose)
    assert {name: column.dtype for name, column in records.typed(loose).items.items()} == {
        ITEM_ID: np.int32, "vector": np.float32}
    loose.items["vector"][3, 0] = 1e39
    with pytest.raises(ValueError, match=r"'vector' is 1e\+39 in row 3, .* finite number of float32"):
        check_dataset(loose)


@pytest.mark.parametrize("damaged", ["dataset_info.json", "metadata.json", "*train*"])
def test_a_damaged_directory_is_told(tmp_path, damaged):
    load("synthetic", data_dir=tmp_path, **SMALL)
    directory, = tmp_path.glob("tarq_synthetic/*/1.0.0")
    for file in directory.glob(damaged):
        file.write_bytes(b"{torn")
    with pytest.raises(ValueError, match=r"is damaged .* delete it and prepare it again"):
        load_prepared(directory)


def test_importing_is_light_and_never_imports_tensorflow(tmp_path):
    code = ("import sys, tarq_jax.data as d; assert 'tensorflow_datasets' not in sys.modules; "
            f"d.load('synthetic', data_dir={str(tmp_path)!r}, train_requests=2, validation_requests=0, "
            "test_requests=0); assert 'tensorflow_datasets' in sys.modules; "
            "assert 'tensorflow' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
