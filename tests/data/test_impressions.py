"""Impressions with named columns through a real Beam runner, with hashed items."""

import csv
import glob

import logs
import numpy as np
import pytest

from tarq_jax.data import load_prepared, prepare
from tarq_jax.data.impressions import ImpressionsOptions
from tarq_jax.data.rows import BadRow

beam = pytest.importorskip("apache_beam", reason="Apache Beam prepares this: pip install 'tarq_jax[beam]'")

BUCKETS = 1 << 20  # so many that the few keys do not collide


def hashed(key: str, buckets: int) -> int:
    from tarq_jax.data.beam.vocabulary import stable_hash

    return 1 + stable_hash(key) % buckets


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("impressions")
    options = logs.write_impressions(folder) | {
        "history_length": 4, "item_buckets": BUCKETS, "max_bad_fraction": 0.05}
    with open(folder / "impressions-0.csv", "a") as file:
        file.write("u1,5,i1,yes,c1,f,home\n,5,i1,1,c1,f,home\nu1,5,i1,1\nu1,-5,i1,1,c1,f,home\n")
    return options, load_prepared(prepare("impressions", data_dir=folder / "data", **options))


def read(pattern):
    for path in sorted(glob.glob(pattern)):
        with open(path) as file:
            yield from csv.DictReader(file)


def test_requests_are_those_of_the_definition(prepared):
    options, dataset = prepared
    rows = [row for row in read(options["source"])
            if row["clicked"] in ("0", "1") and row["who"] and int(row["when"]) > 0]
    done = list(read(options["behaviors"]))
    found = {"train": [], "validation": [], "test": []}
    for user, time in sorted({(row["who"], int(row["when"])) for row in rows}):
        past = sorted((int(row["when"]), hashed(row["what"], BUCKETS)) for row in done
                      if row["who"] == user and int(row["when"]) < time)[-options["history_length"]:]
        if past:
            shown = sorted((hashed(row["what"], BUCKETS), float(row["clicked"])) for row in rows
                           if (row["who"], int(row["when"])) == (user, time))
            part = ("train" if time < options["validation_start"] else
                    "validation" if time < options["test_start"] else "test")
            found[part].append(([item for _, item in past], shown))
    for part, expected in found.items():
        requests = dataset.splits[part]
        h, c = requests.history_offsets, requests.candidate_offsets
        actual = [(requests.history[h[r]:h[r + 1]].tolist(), sorted(zip(
            requests.candidates[c[r]:c[r + 1]].tolist(), requests.labels[c[r]:c[r + 1]].tolist(),
            strict=True))) for r in range(len(requests))]
        assert sorted(actual) == sorted(expected) and expected


def test_features(prepared):
    options, dataset = prepared
    assert dataset.schema.num_items == BUCKETS + 1 and dataset.item_ids is None
    assert {f.name: f.size for f in dataset.schema.fields if f.name != "item_id"} == {
        "category": 4, "gender": 10_001, "page": 10_001, "event_kind": 10_001}
    shown = {row["what"] for row in read(options["source"])}
    assert all(dataset.items["category"][hashed(item, BUCKETS)] for item in shown)
    assert (dataset.items["category"] > 0).sum() == len(shown)
    train = dataset.splits["train"]
    assert set(train.context["page"].tolist()) == {hashed("page=home", 10_000)}
    assert set(train.event["event_kind"].tolist()) == {hashed("kind=click", 10_000)}
    genders = set(dataset.users["gender"].tolist())
    assert genders <= {0, hashed("gender=f", 10_000), hashed("gender=m", 10_000)} and len(genders) > 1


def test_malformed_rows(prepared):
    _, dataset = prepared
    assert dataset.info["rows"]["reasons"] == {
        "label other than 0 or 1": 1, "empty id": 1, "missing columns": 1, "timestamp out of range": 1}


def test_rows_that_are_not_csv():
    from tarq_jax.data.beam.impressions import parse_row

    options = ImpressionsOptions("x")
    header = {"user_id": 0, "timestamp": 1, "item_id": 2}
    assert parse_row('u,5,"a,b"', header, options).item == "a,b"
    for text in ("u,5,a\rb", "u,5," + "i" * (csv.field_size_limit() + 1)):
        with pytest.raises(BadRow, match="not CSV"):
            parse_row(text, header, options)


def test_columns_have_to_be_there(tmp_path):
    options = logs.write_impressions(tmp_path) | {"item_features": "category,colour"}
    with pytest.raises(ValueError, match=r"impressions-0.csv: no column 'colour' in its first line"):
        prepare("impressions", data_dir=tmp_path / "data", **options)


@pytest.mark.parametrize("option, value", [("delimiter", "::"), ("feature_buckets", 0),
                                           ("event_features", "kind")])
def test_options_out_of_range(option, value):
    with pytest.raises(ValueError, match=rf"config\.data\.{option} is {value!r}"):
        ImpressionsOptions("x", **{option: value})


def test_lengths_of_histories_lie_beside_the_records(tmp_path, monkeypatch):
    """In the order of the blocks, though parts of several blocks are written, here of two."""
    from tarq_jax.data import records
    from tarq_jax.data.beam import blocks

    monkeypatch.setattr(records, "BLOCK", 3)
    monkeypatch.setattr(blocks, "PART", 2)
    options = logs.write_impressions(tmp_path) | {"history_length": 4}
    directory = prepare("impressions", data_dir=tmp_path / "data", **options)
    dataset, stored = load_prepared(directory), load_prepared(directory, stream=True)
    assert len(stored.splits["train"].sizes) > 4
    for name, split in stored.splits.items():
        lengths = np.diff(dataset.splits[name].history_offsets)
        np.testing.assert_array_equal(split.history_lengths, lengths)
        np.testing.assert_array_equal(np.diff(split.read(range(len(split.sizes))).history_offsets), lengths)
    assert not list(directory.glob("lengths-*"))
