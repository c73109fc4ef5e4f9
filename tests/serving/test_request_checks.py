"""Requests are checked against the schema, and padded."""

import numpy as np
import pytest
import served
import workloads
from hypothesis import given, settings
from hypothesis import strategies as st

from tarq_jax.schema import Field, Schema
from tarq_jax.serving.index import make_index
from tarq_jax.serving.request_checks import check_accepts, check_request, pad

GOOD = {"user": {"user_group": 3, "user_age": 0.5}, "context": {"hour": 2},
        "history": {"item_id": [4, 5], "event_type": [1, 2]}}


def changed(side, **values):
    part = {name: value for name, value in (GOOD[side] | values).items() if value is not None}
    return GOOD | {side: part}


def schema_with(*fields, without=()):
    """The workloads' schema with other fields of these names."""
    named = {field.name: field for field in (*workloads.SCHEMA.fields, *fields) if field.name not in without}
    return Schema(tuple(named.values()))


@pytest.mark.parametrize("schema", [
    workloads.SCHEMA, schema_with(Field("user_group", "user", "categorical", 12)),
    schema_with(Field("item_vector", "item", "vector", 4), Field("item_id", "item", "categorical", 10))],
    ids=["the same", "a larger vocabulary", "other items"])
def test_schemas_that_accept_the_requests_of_another(schema):
    check_accepts(schema, workloads.SCHEMA, "new")
    assert check_request(schema, GOOD).items.tolist() == [4, 5]


@pytest.mark.parametrize(("schema", "words"), [
    (schema_with(without=["hour"]), r"new takes the context fields \[\], expected \['hour'\], which"),
    (schema_with(Field("day", "context", "numeric")), r"takes the context fields \['day', 'hour'\]"),
    (schema_with(Field("user_group", "user", "categorical", 8)),
     "the user field 'user_group' as categorical of size 8, expected categorical of size 9"),
    (schema_with(Field("user_age", "user", "vector", 1)), "'user_age' as vector of size 1, expected numeric"),
    (schema_with(Field("event_type", "event", "numeric")), "event field 'event_type' as numeric of size 1"),
])
def test_schemas_that_do_not(schema, words):
    with pytest.raises(ValueError, match=words):
        check_accepts(schema, workloads.SCHEMA, "new")


def test_vectors_have_to_be_as_long():
    before = schema_with(Field("place", "user", "vector", 2))
    with pytest.raises(ValueError, match="'place' as vector of size 3, expected vector of size 2"):
        check_accepts(schema_with(Field("place", "user", "vector", 3)), before, "new")


def test_a_good_request():
    request = check_request(workloads.SCHEMA, GOOD)
    assert request.user["user_group"].dtype == np.int32 and request.context["hour"] == np.float32(2)
    assert request.items.dtype == np.int64 and request.items.tolist() == [4, 5]
    assert request.events["event_type"].tolist() == [1, 2]
    for given_request, checked in zip(served.world().requests, map(
            lambda request: check_request(workloads.SCHEMA, request), served.world().requests), strict=True):
        assert checked.items.tolist() == given_request["history"]["item_id"]


@pytest.mark.parametrize(("wrong", "words"), [
    ([1], r"request 2 is \[1\], expected an object with"),
    (GOOD | {"item": {}}, r"request 2 has 'item', expected \['user', 'context', 'history'\]"),
    (GOOD | {"user": 4}, "request 2: 'user' is 4, expected an object"),
    (GOOD | {"user": {}}, "request 2: 'user' has no field 'user_group'"),
    (GOOD | {"user": None}, "request 2: 'user' is None, expected an object"),
    (GOOD | {"history": 0}, "request 2: 'history' is 0, expected an object"),
    (GOOD | {"history": []}, r"request 2: 'history' is \[\], expected an object"),
    (changed("user", user_age=None), "request 2: 'user' has no field 'user_age'"),
    (changed("user", age=1), r"request 2: 'user' has 'age', expected \['user_group', 'user_age'\]"),
    (changed("user", user_group=9), r"field 'user_group' is 9 in row 0, expected an id in \[0, 9\)"),
    (changed("user", user_group=-1), "field 'user_group' is -1"),
    (changed("user", user_group=2**40), f"field 'user_group' is {2**40}"),
    (changed("user", user_group=1.0), r"field 'user_group' is \[1.0\], expected integers"),
    (changed("user", user_group=True), r"field 'user_group' is \[True\], expected integers"),
    (changed("history", item_id=[4, True]), r"'item_id' is \[4, True\], expected numbers and no booleans"),
    (changed("user", user_age="old"), r"field 'user_age' is \['old'\], expected numbers"),
    (changed("user", user_age=float("nan")), "field 'user_age' is nan"),
    (changed("user", user_age=1e300), r"field 'user_age' is 1e\+300"),
    (changed("user", user_age=[1.0, 2.0]), r"field 'user_age' is \[\[1.0, 2.0\]\], expected numbers"),
    (changed("user", user_age=[[1.0], [2.0, 3.0]]), "field 'user_age' is .* expected numbers"),
    (changed("history", item_id=None), "'history' has no field 'item_id'"),
    (changed("history", event_type=None), "'history' has no field 'event_type'"),
    (changed("history", item_id=[1, 2, 3]), "field 'event_type' has 2 values, expected 3"),
    (changed("history", item_id=["4", "5"]), r"field 'item_id' is \['4', '5'\], expected a list of integers"),
    (changed("history", item_id=4), "field 'item_id' is 4, expected a list of integers"),
    (changed("history", event_type=[1, 4]), "field 'event_type' is 4 in row 1"),
    (changed("history", event_type="12"), "field 'event_type' is '12', expected a list of values"),
    (changed("history", event_type=2), "field 'event_type' is 2, expected a list of values"),
    (changed("history", event_type=99), "field 'event_type' is 99, expected a list of values"),
], ids=str)
def test_what_is_wrong_is_named(wrong, words):
    with pytest.raises(ValueError, match=words):
        check_request(workloads.SCHEMA, wrong, "request 2")


@pytest.mark.parametrize("nested", [lambda text: [text], lambda text: [[[[[text]]]]]])
def test_a_long_text_among_many_does_not_take_memory_for_all(nested):
    """As a text array it would take 800 GB, as every entry would take the space of the longest."""
    texts = nested("x" * 1_000_000) + [""] * 200_000
    for side in (changed("history", event_type=texts), changed("history", item_id=texts)):
        with pytest.raises(ValueError, match=r"is \[.*\.\.\., expected (a list of )?integers"):
            check_request(workloads.SCHEMA, side, "request 2")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["user", "context", "history", "item_id", "event_type", "user_age", "hour", "x"]),
        inner, max_size=4), max_leaves=12)


@settings(deadline=None, max_examples=300)
@given(JSON | st.builds(lambda side, value: GOOD | {side: value}, st.sampled_from(list(GOOD)), JSON)
       | st.builds(lambda value: changed("history", item_id=value), JSON)
       | st.builds(lambda value: changed("history", event_type=value), JSON)
       | st.builds(lambda value: changed("user", user_age=value), JSON))
def test_anything_is_accepted_or_a_value_error(anything):
    try:
        check_request(workloads.SCHEMA, anything)
    except ValueError as error:
        assert "expected" in str(error)


def test_padding():
    schema = Schema((Field("item_id", "item", "categorical", 9), Field("kind", "event", "categorical", 4),
                     Field("place", "context", "vector", 2)))
    ids = np.array([11, 12, 13, 14])
    index = make_index(ids, {"vector": np.zeros((4, 1), np.float32)}, "f")
    requests = [check_request(schema, {"context": {"place": [0.5, 1.5]}, "history": {
        "item_id": items, "kind": kinds}}) for items, kinds in (
            ([11, 99, 13], [1, 2, 3]), ([14, 13, 12, 11, 98], [1, 2, 3, 1, 2]))]
    padded = pad(schema, index, requests, batch=3, lengths=(2, 3))
    assert padded.skipped == [1, 1]
    np.testing.assert_array_equal(padded.request["mask"], [[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    np.testing.assert_array_equal(padded.request["events"]["kind"], [[1, 3, 0], [2, 3, 1], [0, 0, 0]])
    np.testing.assert_array_equal(
        index.ids[padded.slots] * padded.request["mask"], [[11, 13, 0], [13, 12, 11], [0, 0, 0]])
    np.testing.assert_array_equal(padded.request["context"]["place"], [[0.5, 1.5], [0.5, 1.5], [0, 0]])
    assert padded.request["user"] == {}
    short = pad(schema, index, [], batch=1, lengths=(2, 3))
    assert short.slots.shape == (1, 2) and not short.request["mask"].any()
