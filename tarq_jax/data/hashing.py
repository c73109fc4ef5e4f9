"""Hashes ids of any kind into the rows of an embedding table."""

import hashlib
from collections.abc import Sequence

import numpy as np

_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_STEP = 0x9E3779B97F4A7C15


def hash_ids(ids: Sequence | np.ndarray, size: int, seed: int = 0) -> np.ndarray:
    """Rows in [1, size) for ids of any size, or for strings; different ids may share a row.

    Integers are mixed by the last steps of SplitMix64 (Steele, Lea and Flood 2014), modulo 2^64: from
    `x = id + (seed + 1) * 0x9E3779B97F4A7C15`, `x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9`,
    `x = (x ^ x >> 27) * 0x94D049BB133111EB`, `x = x ^ x >> 31`; the row is `1 + x mod (size - 1)`.
    A string is first turned into an integer: the BLAKE2b digest, of 8 bytes and little-endian, of its UTF-8.
    The empty string and the id 0 are padding and stay 0. Results are the same on every machine and in every
    version.

    Args:
      ids: [...] integers (negative ones are taken modulo 2^64) or strings.
      size: rows of the table, including row 0; at least 2.
      seed: seed of the hash; with another seed, other ids collide.

    Returns:
      [...] int32.

    Raises:
      ValueError: size is below 2 or exceeds int32, or ids are neither integers nor strings.

    Example:
      >>> hash_ids([0, 1, 2, 10**18], size=1000)
      array([  0, 546, 383, 829], dtype=int32)
      >>> hash_ids(["", "user-7"], size=1000)[0]
      np.int32(0)
    """
    if not 2 <= size <= np.iinfo(np.int32).max:
        raise ValueError(f"size is {size}, expected at least 2 and at most {np.iinfo(np.int32).max}")
    array = np.asarray(ids)
    if array is not ids and array.dtype.kind not in "iu":  # NumPy would make floats of some, or cut strings
        array = np.array(ids, object)
    keys = _as_integers(array)
    with np.errstate(over="ignore"):  # NumPy warns if scalars wrap around, which is intended here
        mixed = keys + np.uint64((seed + 1) * _STEP % 2**64)
        for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * multiplier
    mixed ^= mixed >> np.uint64(31)
    rows = 1 + (mixed % np.uint64(size - 1)).astype(np.int64)
    return np.where(keys == 0, 0, rows).astype(np.int32)


def _as_integers(ids: np.ndarray) -> np.ndarray:
    """The ids as uint64."""
    if ids.dtype.kind in "iu":
        return ids.astype(np.uint64)
    kinds = {type(each) for each in ids.flat} if ids.dtype == object else set()
    if ids.dtype == object and all(issubclass(kind, int | np.integer) and kind is not bool for kind in kinds):
        return np.array([int(each) % 2**64 for each in ids.flat], np.uint64).reshape(ids.shape)  # any size
    if ids.dtype.kind == "U" or (ids.dtype == object and all(issubclass(kind, str) for kind in kinds)):
        unique, inverse = np.unique(ids, return_inverse=True)
        return np.array([_digest(text) for text in unique], np.uint64)[inverse].reshape(ids.shape)
    raise ValueError(f"ids are {ids.dtype}, expected integers or strings")


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") if text else 0
