"""Items that are added, changed and removed: an index compared with a dictionary."""

import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tarq_jax.serving.index import FREE, SLOTS, Index, add, change, grow, make_index, remove, round_up

IDS = st.lists(st.integers(0, 60) | st.sampled_from([10**6, 2**62]), unique=True, max_size=30)


def rows(ids, seed):
    """Arrays for the given items, different for each seed."""
    rng = np.random.default_rng(seed)
    return {"vector": rng.normal(size=(len(ids), 3)).astype(np.float32),
            "codes": rng.integers(0, 9, (len(ids), 2)).astype(np.uint8)}


def contents(index):
    """id -> (whether it is served, its row of every array)."""
    taken = np.flatnonzero(index.ids != FREE)
    return {int(index.ids[slot]): (bool(index.served[slot]), {
        name: values[slot].tolist() for name, values in index.arrays.items()}) for slot in taken}


def updated(expected, ids, arrays):
    return expected | {item: (True, {name: values[place].tolist() for name, values in arrays.items()})
                       for place, item in enumerate(ids)}


OPERATIONS = {
    "add": add,
    "change": change,
    "remove": lambda index, ids, _: remove(index, ids),
    "forget": lambda index, ids, _: remove(index, ids, forget=True),
    "grow": lambda index, *_: grow(index, index.capacity + 1),
}


@settings(deadline=None)
@given(start=IDS, steps=st.lists(st.tuples(
    st.sampled_from(sorted(OPERATIONS)), IDS), max_size=6))
def test_any_sequence_of_changes(start, steps):
    """Impossible operations are refused; possible ones are done, and leave the previous index unchanged."""
    arrays = rows(start, 0)
    index, expected = make_index(start, arrays, "f", capacity=SLOTS), updated({}, start, arrays)
    for seed, (operation, ids) in enumerate(steps, start=1):
        arrays, before = rows(ids, seed), contents(index)
        served = {item for item, (is_served, _) in expected.items() if is_served}
        known = expected if operation == "forget" else served
        refused = bool(served & set(ids)) if operation == "add" else not set(ids) <= set(known)
        if refused and operation != "grow":
            with pytest.raises(ValueError, match="ids: "):
                OPERATIONS[operation](index, ids, arrays)
            continue
        after = OPERATIONS[operation](index, ids, arrays)
        if operation in ("add", "change"):
            expected = updated(expected, ids, arrays)
        elif operation == "remove":
            expected = {item: (served and item not in ids, row) for item, (served, row) in expected.items()}
        elif operation == "forget":
            expected = {item: value for item, value in expected.items() if item not in ids}
        assert contents(index) == before
        assert contents(after) == expected
        assert after.num_served == sum(is_served for is_served, _ in expected.values())
        assert after.capacity % SLOTS == 0 and (operation == "grow") == (after.capacity > index.capacity)
        index = after
    probe = np.array([*expected, -1, 61, 2**40], np.int64)
    slots = index.slots_of(probe)
    np.testing.assert_array_equal(slots[-3:], FREE)
    np.testing.assert_array_equal(index.ids[slots[:-3]], probe[:-3])


@pytest.mark.parametrize("largest", [40, 10**12], ids=["dense", "sparse"])
def test_slots_of_ids(largest):
    """By a table if ids are dense, otherwise by binary search."""
    ids = np.array([3, largest, 0, 17])
    index = make_index(ids, rows(ids, 0), "f")
    np.testing.assert_array_equal(index.ids[index.slots_of(ids)], ids)
    missing = np.array([1, -1, largest + 1, largest - 1, 2**62])
    np.testing.assert_array_equal(index.slots_of(missing), [FREE] * 5)


def test_an_empty_index():
    index = make_index([], rows([], 0), "f")
    assert (index.capacity, index.num_served) == (SLOTS, 0)
    np.testing.assert_array_equal(index.slots_of(np.array([1, 2])), [FREE, FREE])
    assert add(index, [4], rows([4], 1)).num_served == 1


def test_the_order_is_that_of_level_1():
    ids = np.arange(200)
    index = make_index(ids, rows(ids, 0), "f", capacity=300)
    codes = index.arrays["codes"][index.served, 0]
    assert (np.diff(codes.astype(int)) >= 0).all() and len(set(codes.tolist())) == 9
    assert index.capacity == SLOTS and index.num_served == 200
    without = make_index(ids, {"vector": rows(ids, 0)["vector"]}, "f")
    np.testing.assert_array_equal(without.ids[:200], ids)


def test_a_tenth_is_spare_by_default():
    assert make_index(range(1000), rows(range(1000), 0), "f").capacity == round_up(1100) == 1536


def test_slots_of_forgotten_items_are_used_again():
    full = make_index(range(SLOTS), rows(range(SLOTS), 0), "f", capacity=SLOTS)
    with pytest.raises(ValueError, match=r"1 new items, expected at most 0, .* capacity of 512; use `grow`"):
        add(full, [1000], rows([1], 1))
    kept = remove(full, [7])
    with pytest.raises(ValueError, match="expected at most 0"):
        add(kept, [1000], rows([1], 1))  # histories still refer to item 7
    assert add(kept, [7], rows([1], 1)).num_served == SLOTS
    assert add(remove(kept, [7], forget=True), [1000], rows([1], 1)).num_served == SLOTS


@pytest.mark.parametrize(("ids", "words"), [
    ([1.5], "ids are float64"), ([[1]], r"shape \(1, 1\)"), ([-4], "-4 is negative"),
    ([2, 2], "2 is given 2 times, expected once"), (["a"], "expected integers"),
])
def test_wrong_ids(ids, words):
    with pytest.raises(ValueError, match=words):
        make_index(ids, rows(ids, 0), "f")


def test_arrays_that_do_not_fit():
    index, good = make_index([1], rows([1], 0), "f"), rows([2], 1)
    wrong = functools.partial(add, index, [2])
    with pytest.raises(ValueError, match=r"arrays are \['codes'\], expected \['codes', 'vector'\]"):
        wrong({"codes": good["codes"]})
    with pytest.raises(ValueError, match="'vector' has 2 rows, expected 1"):
        wrong(good | {"vector": np.zeros((2, 3), np.float32)})
    with pytest.raises(ValueError, match=r"'vector' is float32 \(1, 4\), expected float32 \[M, \*\(3,\)\]"):
        wrong(good | {"vector": np.zeros((1, 4), np.float32)})
    for wrong_value in (np.nan, np.inf):
        with pytest.raises(ValueError, match="'vector' of item 2 has values that are not finite"):
            wrong(good | {"vector": np.array([[0.0, wrong_value, 0.0]], np.float32)})
    with pytest.raises(ValueError, match=r"'codes' is int64 .*, expected uint8"):
        wrong(good | {"codes": good["codes"].astype(np.int64)})
    with pytest.raises(ValueError, match="capacity is 100, expected at least that of the index, 1024"):
        grow(grow(index, 600), 100)


@pytest.mark.parametrize("name", ["ids", "served"])
def test_names_that_an_index_has_itself(name):
    with pytest.raises(ValueError, match=f"arrays: '{name}' is the index's own, expected another name"):
        make_index([1, 2], {name: np.zeros((2, 1))}, "f")


def test_an_index_is_frozen():
    assert dataclasses.is_dataclass(Index)
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_index([1], rows([1], 0), "f").ids = np.zeros(1)
