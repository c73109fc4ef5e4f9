"""The length of every history of a split, in a file beside its records, which is read as a memory map.

With buckets, a host needs the lengths of the requests of all hosts, but only its own requests.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np


def lengths_file(directory: Path, split: str) -> Path:
    """The file of a split in a prepared directory."""
    return directory / f"history_lengths-{split}.npy"


def write_lengths(path: Path, parts: Iterable[np.ndarray], count: int, longest: int) -> None:
    """Writes the lengths in the smallest type that holds them, one part after the other.

    Args:
      path: file to write.
      parts: arrays of lengths, in the order of requests.
      count: R, number of lengths in all parts.
      longest: the largest length.
    """
    dtype = np.min_scalar_type(longest)
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(part.astype(dtype).tobytes())


def read_lengths(path: Path) -> np.ndarray | None:
    """[R] unsigned, a memory map; None if there is no file, as in directories of the first versions.

    Raises:
      ValueError: the file is damaged.
    """
    return np.load(path, mmap_mode="r") if path.is_file() else None
