"""Schema: what it refuses, and its messages."""

import numpy as np
import pytest

from tarq_jax.data import ITEM_ID, Field, Schema, check_column, check_columns

SCHEMA = Schema((Field(ITEM_ID, "item", "categorical", 10), Field("genres", "item", "vector", 3),
                 Field("age", "user", "numeric"), Field("hour", "context", "categorical", 25)))


def test_json_round_trip_and_hash():
    again = Schema.from_json(SCHEMA.to_json())
    assert again == SCHEMA and hash(again) == hash(SCHEMA)


def test_sides_keep_their_order():
    assert [f.name for f in SCHEMA.side("item")] == [ITEM_ID, "genres"]
    assert [f.name for f in SCHEMA.side("context", "user")] == ["age", "hour"]
    assert SCHEMA.num_items == 10


@pytest.mark.parametrize("arguments, text", [
    (("x", "seller", "numeric"), "side is 'seller'"),
    (("x", "item", "text"), "kind is 'text'"),
    (("x", "item", "numeric", 2), "size is 2"),
    (("x", "item", "categorical", 0), "size is 0"),
    (("x", "item", "vector", 2.5), "size is 2.5 for kind 'vector', expected a whole number"),
    (("x", "item", "vector", float("nan")), "size is nan"),
    (("x", "item", "categorical", "3"), "size is '3'"),
    (("x", "item", "categorical", True), "size is True"),
])
def test_bad_field(arguments, text):
    with pytest.raises(ValueError, match=text):
        Field(*arguments)


def test_schema_needs_item_id_and_distinct_names():
    with pytest.raises(ValueError, match="expected a categorical field 'item_id'"):
        Schema((Field("age", "user", "numeric"),))
    with pytest.raises(ValueError, match="more than once"):
        Schema((*SCHEMA.fields, SCHEMA.fields[1]))
    with pytest.raises(ValueError, match="a field is named 'bias', expected another name"):
        Schema((*SCHEMA.fields, Field("bias", "user", "numeric")))


def test_fields_may_come_as_a_list():
    again = Schema(list(SCHEMA.fields))
    assert again == SCHEMA and hash(again) == hash(SCHEMA)


@pytest.mark.parametrize("values, text", [
    ([1.0, np.nan], r"is nan in row 1, expected an id in \[0, 10\)"),
    ([1.5, 2.0], r"is 1.5 in row 0, expected an id in \[0, 10\) \(1 such values\)"),
    ([np.inf], "is inf in row 0"),
    (["1", "2"], "field 'item_id' is of type <U1, expected numbers"),
    ([None, 1], "field 'item_id' is of type object, expected numbers"),
])
def test_ids_are_whole_numbers(values, text):
    check_column(SCHEMA.fields[0], np.array([0.0, 9.0]), "items")
    with pytest.raises(ValueError, match=text):
        check_column(SCHEMA.fields[0], np.array(values), "items")


def test_text_is_no_number():
    with pytest.raises(ValueError, match="field 'age' is of type <U1, expected numbers"):
        check_column(SCHEMA.fields[2], np.array(["x"]), "users")


def test_check_column_names_the_first_bad_value():
    field = SCHEMA.fields[0]
    check_column(field, np.arange(10, dtype=np.int32), "items")
    with pytest.raises(ValueError, match=r"^items: field 'item_id' is 10 in row 1, expected .*\[0, 10\)"):
        check_column(field, np.array([0, 10, -1]), "items")
    with pytest.raises(ValueError, match="field 'age' is nan in row 0, expected a finite number"):
        check_column(SCHEMA.fields[2], np.array([np.nan]), "users")
    with pytest.raises(ValueError, match="shape"):
        check_column(SCHEMA.fields[1], np.zeros((4, 2)), "items")
    with pytest.raises(ValueError, match="no column for field 'genres'"):
        check_columns(SCHEMA.side("item"), {ITEM_ID: np.zeros(2, np.int32)}, "items")
