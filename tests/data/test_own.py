"""A data set that a function of one's own makes, named by the configuration."""

import dataclasses

import numpy as np
import pytest
import tiny

from tarq_jax import data


def made(*, factor=1.0, rows=None, fingerprint=""):
    """The data set of `tiny`, its features times a number."""
    dataset = tiny.make_dataset()
    items = {**dataset.items, "features": factor * dataset.items["features"][:rows]}
    return dataclasses.replace(dataset, items=items, fingerprint=fingerprint)


def not_made():
    return {}


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
    ("made", {"scale": 2.0}, r"config.data has the options \['scale'\] for .*:made: .*'scale'"),
    ("made", {"rows": 9}, "items: field 'features' has 9 rows, expected 61"),
    ("made", {"stream": True}, "config.data.stream is True, expected False with config.data.name="),
    ("not_made", {}, "gives a dict, expected a tarq_jax.data.Dataset"),
    ("nothing", {}, "expected a function of .*, which has no 'nothing'"),
])
def test_mistakes(function, options, message):
    with pytest.raises(ValueError, match=message):
        load(function, **options)


@pytest.mark.parametrize("name", ["nowhere:made", ":made", "json:"])
def test_no_such_module(name):
    with pytest.raises(ValueError, match=f"config.data.name is '{name}', expected MODULE:FUNCTION of"):
        data.load(name, data_dir="nowhere")


def test_it_needs_no_preparation():
    with pytest.raises(ValueError, match=r"expected one of .*; MODULE:FUNCTION of your own needs no prep"):
        data.prepare(f"{__name__}:made", data_dir="nowhere")
