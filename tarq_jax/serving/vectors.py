"""How an index stores its vectors: float32, bfloat16, or int8 with a scale per row.

Codes are stored in the smallest integer type that holds them. An int8 array `name` has a companion
`name_scale` with one float32 for each row of its last axis.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

Storage = Literal["float32", "bfloat16", "int8"]

SCALE = "_scale"
LARGEST = 127  # largest int8; -128 is not used


def store(
    arrays: Mapping[str, np.ndarray], storage: Storage, num_codewords: int | Sequence[int]
) -> dict[str, np.ndarray]:
    """The arrays as an index stores them, on the host.

    The error of an entry is at most 2^-9 of its value in bfloat16, and 1/254 of the row's largest absolute
    value in int8.

    Args:
      arrays: floats [M, ..., D], and integers, which are codes.
      storage: number format of the floats.
      num_codewords: codes are in [0, num_codewords), and stored in the smallest integer type for these; one
        number for all levels, or one for each.

    Raises:
      ValueError: `storage` is unknown, or an integer is not a code in this range.
    """
    if storage not in get_args(Storage):
        raise ValueError(f"vectors is {storage!r}, expected one of {get_args(Storage)}")
    stored: dict[str, np.ndarray] = {}
    for name, values in arrays.items():
        if values.dtype.kind != "f":
            check_codes(name, values, num_codewords)
            stored[name] = values.astype(np.min_scalar_type(np.max(num_codewords) - 1))
        elif storage == "float32":
            stored[name] = values
        elif storage == "bfloat16":
            stored[name] = values.astype(ml_dtypes.bfloat16)
        else:
            scale = np.abs(values).max(axis=-1) / LARGEST
            rounded = np.rint(values / np.where(scale > 0, scale, 1.0)[..., None])
            stored |= {name: rounded.astype(np.int8), name + SCALE: scale.astype(np.float32)}
    return stored


def check_codes(name: str, codes: np.ndarray, num_codewords: int | Sequence[int]) -> None:
    """Raises ValueError unless integers [M, L] are codes below `num_codewords`, as `store` takes it."""
    if isinstance(num_codewords, Sequence) and codes.shape[1:] != (len(num_codewords),):
        raise ValueError(f"{name!r} has shape {codes.shape}, expected [M, {len(num_codewords)}], a code of "
                         f"each level")
    if ((codes < 0) | (codes >= np.asarray(num_codewords))).any():
        raise ValueError(f"{name!r} has integers from {codes.min()} to {codes.max()}, expected codes from 0 "
                         f"to below num_codewords, {num_codewords}")


def read(arrays: Mapping[str, jax.Array], name: str) -> jax.Array:
    """An array in float32, whatever format it is stored in.

    Example:
      >>> read(store({"x": np.array([[0.5, -1.0]], np.float32)}, "int8", 0), "x").round(2).tolist()
      [[0.5, -1.0]]
    """
    values = jnp.asarray(arrays[name]).astype(jnp.float32)
    scale = arrays.get(name + SCALE)
    return values if scale is None else values * scale[..., None]


def rows(table: jax.Array, indices: jax.Array) -> jax.Array:
    """Rows of a table [V, ...] for indices [...] in [-V, V): [..., ...]."""
    return jnp.asarray(table).at[indices].get(mode="promise_in_bounds")


def parts(arrays: Mapping[str, jax.Array], name: str) -> dict[str, jax.Array]:
    """The entries that `read` needs for one array: the array itself, and its scales if it has some."""
    return {key: arrays[key] for key in (name, name + SCALE) if key in arrays}
