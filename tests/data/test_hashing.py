"""Hashed ids: they never change, are spread evenly, and keep padding."""

import numpy as np
import pytest

from tarq_jax.data import hash_ids

MASK = 2**64 - 1


def by_hand(number: int, size: int, seed: int) -> int:
    """The documented formula with Python's integers."""
    if number == 0:
        return 0
    x = (number + (seed + 1) * 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK
    return 1 + (x ^ x >> 31) % (size - 1)


@pytest.mark.parametrize(("size", "seed"), [(2, 0), (1000, 0), (1000, 7), (2**31 - 1, 3)])
def test_the_formula(size, seed):
    ids = np.array([0, 1, 2, 12345, 2**31, 2**62, -1], np.int64)
    found = hash_ids(ids, size, seed)
    assert found.dtype == np.int32
    assert found.tolist() == [by_hand(int(number) & MASK, size, seed) for number in ids]


def test_numbers_that_data_on_disk_depends_on():
    assert hash_ids([1, 2, 10**18], 1000).tolist() == [546, 383, 829]
    assert hash_ids([["user-7"], ["b"]], 1000).tolist() == [[917], [106]]


def test_spread_and_padding():
    rows = hash_ids(np.arange(1, 50001), 101)
    counts = np.bincount(rows, minlength=101)
    assert counts[0] == 0 and counts[1:].min() > 400 and counts[1:].max() < 600  # 500, standard deviation 22
    assert hash_ids(["", "a", ""], 9)[[0, 2]].tolist() == [0, 0] and hash_ids("a", 9).shape == ()


def test_seeds_fold_other_ids_together():
    ids = np.arange(1, 2001)
    one, other = hash_ids(ids, 1001), hash_ids(ids, 1001, seed=1)
    assert np.mean(one == other) < 0.01


def test_strings_by_any_array():
    texts = ["x", "yy", "x", "ÿ"]
    np.testing.assert_array_equal(hash_ids(texts, 50), hash_ids(np.array(texts, object), 50))


@pytest.mark.parametrize("size", [1, 0, -5, 2**31])
def test_sizes_out_of_range(size):
    with pytest.raises(ValueError, match=rf"size is {size}, expected at least 2"):
        hash_ids([1], size)


@pytest.mark.parametrize("ids", [[1.5], [None, "a"], [True]])
def test_neither_integers_nor_strings(ids):
    with pytest.raises(ValueError, match=r"ids are .*, expected integers or strings"):
        hash_ids(ids, 10)


def test_lists_of_integers_of_any_size():
    ids = [1, 2**63, 2**64 + 7, -1]
    same = np.array([1, 2**63, 7, 2**64 - 1], np.uint64)
    np.testing.assert_array_equal(hash_ids(ids, 1000), hash_ids(same, 1000))
    assert hash_ids([], 1000).shape == (0,)
    assert hash_ids(["a\0"], 10**6) != hash_ids(["a"], 10**6)
