"""A user's own data set, made by a function that the configuration names."""

import dataclasses

import numpy as np
import pytest
import tiny

from tarq_jax import data


def made(*, factor=1.0, rows=None, fingerprint=""):
    """The data set of `tiny` with its features multiplied by a number."""
    dataset = tiny.make_dataset()
    items = {**dataset.items, "features": factor * dataset.items["features"][:rows]}
    return dataclasses.replace(dataset, items=items, fingerprint=fingerprint)


def not_made():
    return {}


def untested():
    """The data set without a test split."""
    dataset = tiny.make_dataset()
    return dataclasses.replace(dataset, splits={"train": dataset.splits["train"]})


def load(function="made", **options):
    return data.load(f"{__name__}:{function}", data_dir="nowhere", **options)


def test_it_is_what_the_function_makes():
    found, expected = load(factor=2.0), made(factor=2.0)
    assert found.schema == expected.schema
    np.testing.assert_array_equal(found.items["features"], expected.items["features"])
    np.testing.assert_array_equal(found.splits["test"].labels, expected.splits["test"].labels)


def test_its_fingerprint_is_of_its_contents_unless_it_has_one():
    fingerprints = [load().fingerprint, load().fingerprint, load(factor=2.0).fingerprint]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2] and len(fingerprints[0]) == 16
    assert load(fingerprint="of my own").fingerprint == "of my own"


@pytest.mark.parametrize(("function", "options", "message"), [
    ("made", {"scale": 2.0}, r"config.data.name is .*, expected .* options \['scale'\]: .*'scale'"),
    ("untested", {}, r"gives the splits \['train'\], expected \['test'\] too"),
    ("made", {"rows": 9}, "items: field 'features' has 9 rows, expected 61"),
    ("made", {"stream": True}, "config.data.stream is True, expected False with config.data.name="),
    ("not_made", {}, "gives a dict, expected a tarq_jax.data.records.Dataset"),
    ("nothing", {}, "expected a function of .*, which has no 'nothing'"),
])
def test_mistakes(function, options, message):
    with pytest.raises(ValueError, match=message):
        load(function, **options)


@pytest.mark.parametrize("name", ["nowhere:made", ":made", "json:"])
def test_no_such_module(name):
    with pytest.raises(ValueError, match=f"config.data.name is '{name}', expected MODULE:FUNCTION of"):
        data.load(name, data_dir="nowhere")


@pytest.mark.parametrize(("column", "change", "message"), [
    ("history_offsets", lambda x: x - (x == x[-1]), "history of .* requests have lengths that add up to"),
    ("candidate_offsets", lambda x: x[:-1], "candidates of 4 requests have lengths that add up to .*, exp"),
    ("candidate_offsets", lambda x: np.append(x[:1], x[1:][::-1]), "candidates of .* requests have lengths"),
    ("labels", lambda x: x[:-1], "labels has 7 rows, expected 8"),
    ("labels", lambda x: 3 * x, "field 'labels' is 3.0 in row 1, expected 0 or 1"),
    ("weights", lambda x: np.append(x, x), "weights has 16 rows, expected 8"),
])
def test_columns_that_do_not_fit_together(column, change, message):
    """Five requests; handmade requests that do not fit are refused before batches are cut from them."""
    made_of = data.records.make_requests(
        np.zeros(5, int), np.ones(6, int), np.array([2, 0, 1, 2, 1]),
        np.ones(8, int), np.array([2, 1, 2, 1, 2]), np.array([0, 1, 0, 0, 1, 0, 0, 0]))
    schema = tiny.make_dataset().schema
    data.records.check_requests(schema, 1, made_of, "split 'train'")
    changed = dataclasses.replace(made_of, **{column: change(getattr(made_of, column))})
    with pytest.raises(ValueError, match=f"split 'train': {message}"):
        data.records.check_requests(schema, 1, changed, "split 'train'")


def test_it_needs_no_preparation():
    with pytest.raises(ValueError, match=r"expected one of .*; MODULE:FUNCTION of your own needs no prep"):
        data.prepare(f"{__name__}:made", data_dir="nowhere")
