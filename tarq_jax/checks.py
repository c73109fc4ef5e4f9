"""Argument checks: they raise an error that says what is wrong.

Those of arrays, for metrics and statistics, return NumPy arrays. Those of numbers, for functions that may be
traced, look only at Python numbers.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def shape_of(name: str, values: ArrayLike, expected: tuple[int, ...], of: str) -> None:
    """Raises ValueError unless `values` has the shape `expected`, which the message calls that of `of`."""
    if np.shape(values) != expected:
        raise ValueError(f"{name}: expected shape {expected}, that of {of}, got {np.shape(values)}")


def rank_of(name: str, values: np.ndarray, axes: str) -> None:
    """Raises ValueError unless `values` has one axis for each letter of `axes`, such as "B G"."""
    if values.ndim != len(axes.split()):
        raise ValueError(f"{name}: expected shape [{', '.join(axes.split())}], got {values.shape}")


def finite(name: str, values: ArrayLike, where: np.ndarray | None = None) -> np.ndarray:
    """`values` as float64; ValueError at the first that is not finite, among those where `where` is True."""
    values = np.asarray(values, dtype=np.float64)
    bad = ~np.isfinite(values)
    if where is not None:
        bad &= where
    _refuse(name, values, bad, "finite values")
    return values


def binary(name: str, values: ArrayLike) -> np.ndarray:
    """`values` as booleans; ValueError at the first that is neither 0 nor 1."""
    values = np.asarray(values)
    if values.dtype == np.bool_:
        return values
    positive = values == 1
    _refuse(name, values, ~(positive | (values == 0)), "labels in {0, 1}")
    return positive


def non_negative(name: str, values: ArrayLike) -> np.ndarray:
    """`values` as float64; ValueError at the first that is negative or not finite."""
    values = finite(name, values)
    _refuse(name, values, values < 0, "values >= 0")
    return values


def boolean(name: str, values: ArrayLike) -> np.ndarray:
    """`values` as a boolean mask; ValueError for another dtype, which might be weights or indices."""
    values = np.asarray(values)
    if values.dtype != np.bool_:
        raise ValueError(f"{name}: expected a boolean mask, got dtype {values.dtype}")
    return values


def positive_int(name: str, value: int) -> int:
    """`value` as an int; ValueError unless it is a whole number of at least 1."""
    return int_from(name, value, least=1)


def int_from(name: str, value: int, *, least: int) -> int:
    """`value` as an int; ValueError unless it is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")
    return int(value)


def number(name: str, value: Any, fits: Callable[[Any], bool], expected: str) -> None:
    """Raises ValueError if a Python number does not fit; an array, which may be traced, is not looked at."""
    if isinstance(value, int | float) and not fits(value):
        raise ValueError(f"{name} is {value}, expected {expected}")


def positive(name: str, value: Any) -> None:
    """`number` for values above 0; infinity is one."""
    number(name, value, lambda given: given > 0, "a number above 0")


def _refuse(name: str, values: np.ndarray, bad: np.ndarray, expected: str) -> None:
    if bad.any():
        index = tuple(int(i) for i in np.unravel_index(np.argmax(bad), bad.shape))
        raise ValueError(f"{name}: expected {expected}, got {values[index]} at index {index}")
