"""The index that a scorer looks items up in: arrays with one row per slot, and pure functions to change it.

An index has more slots than items. Items can thus be added and removed without a change of shape, after which
programs would have to be compiled again. A new index is sorted by level-1 code. Items that are added later
take any free slots; this only costs look-ups some memory locality, so rebuild the index now and then.

All functions return a new index and leave the old one unchanged, so that a service can keep using it.
"""

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

FREE = -1  # the id of a slot without an item
SLOTS = 512  # the number of slots is a multiple of it
SPARE = 0.1  # default number of spare slots, as a share of the items


class Encoded(dict[str, np.ndarray]):
    """Items as a model encodes them, [M, ...] each, with the fingerprint of that model."""

    def __init__(self, arrays: Mapping[str, np.ndarray], fingerprint: str):
        """Keeps the arrays by name."""
        super().__init__(arrays)
        self.fingerprint = fingerprint


@dataclasses.dataclass(frozen=True)
class Index:
    """Items in C slots; each array has one row per slot."""

    ids: np.ndarray  # [C] int64, `FREE` for a slot without an item
    served: np.ndarray  # [C] bool, whether the item is a candidate; if not, it only occurs in histories
    arrays: Mapping[str, np.ndarray]  # [C, ...] each, as `encode` and `store` made them
    fingerprint: str  # of the model that made the arrays

    @property
    def capacity(self) -> int:
        """Number of slots, C."""
        return len(self.ids)

    @property
    def num_served(self) -> int:
        """Number of items that are candidates."""
        return int(self.served.sum())

    @cached_property
    def _by_id(self) -> tuple[np.ndarray, np.ndarray]:
        """The taken slots, sorted by the ids of their items, and those ids."""
        taken = np.flatnonzero(self.ids != FREE)
        slots = taken[np.argsort(self.ids[taken], kind="stable")]
        return slots, self.ids[slots]

    @cached_property
    def _table(self) -> np.ndarray | None:
        """Slot by id; None if ids are too sparse for a table."""
        slots, ids = self._by_id
        if not len(ids) or ids[-1] >= 8 * self.capacity:
            return None
        table = np.full(int(ids[-1]) + 1, FREE, np.int32)
        table[ids] = slots
        return table

    def slots_of(self, ids: np.ndarray) -> np.ndarray:
        """The slots of items: int [M] to int32 [M], `FREE` for ids that are not in the index."""
        slots, known = self._by_id
        ids = np.asarray(ids, np.int64)
        if not len(known):
            return np.full(ids.shape, FREE, np.int32)
        if self._table is not None:
            inside = (ids >= 0) & (ids < len(self._table))
            return np.where(inside, self._table[np.where(inside, ids, 0)], FREE)
        places = np.minimum(np.searchsorted(known, ids), len(known) - 1)
        return np.where(known[places] == ids, slots[places], FREE).astype(np.int32)


def make_index(
    ids: Any, arrays: Mapping[str, np.ndarray], fingerprint: str, *, capacity: int | None = None
) -> Index:
    """An index of the given items, sorted by their level-1 codes if they have codes.

    Args:
      ids: [M] different integers of at least 0.
      arrays: [M, ...] each, as `tarq_jax.serving.vectors.store` returns them.
      fingerprint: fingerprint of the model.
      capacity: C, rounded up to a multiple of `SLOTS`; by default a tenth more than there are items.

    Raises:
      ValueError: an id is negative or given twice, arrays differ in length, or items exceed the capacity.
    """
    ids = _checked_ids(ids)
    arrays = {name: np.asarray(values) for name, values in arrays.items()}
    if own := {"ids", "served"} & arrays.keys():
        raise ValueError(f"arrays: {sorted(own)[0]!r} is the index's own, expected another name")
    _check_lengths(ids, arrays)
    order = np.argsort(arrays["codes"][:, 0], kind="stable") if "codes" in arrays else slice(None)
    wanted = int(np.ceil((1 + SPARE) * len(ids))) if capacity is None else capacity
    empty = Index(
        ids=np.full(0, FREE, np.int64), served=np.zeros(0, bool), fingerprint=fingerprint,
        arrays={name: values[:0] for name, values in arrays.items()})
    return add(grow(empty, wanted), ids[order], {name: values[order] for name, values in arrays.items()})


def add(index: Index, ids: Any, arrays: Mapping[str, np.ndarray]) -> Index:
    """The index with further candidates: new items, or items that were removed before.

    Args:
      index: an index with at least as many free slots as there are new items.
      ids: [M] different integers of at least 0.
      arrays: [M, ...] each, of the same names, types and row shapes as those of the index; those that
        `Scorer.encode` returns have to be of the model of the index.

    Raises:
      ValueError: an id is already served, there are too few free slots, or arrays do not fit the index or
        are of another model.
    """
    ids = _checked_ids(ids)
    arrays = _checked_arrays(index, ids, arrays)
    slots = index.slots_of(ids)
    new = slots == FREE
    taken = ids[~new][index.served[slots[~new]]]
    if len(taken):
        raise ValueError(f"ids: {taken[0]} is in the index, expected items that are not; use `change`")
    free = np.flatnonzero(index.ids == FREE)
    if new.sum() > len(free):
        raise ValueError(f"ids: {new.sum()} new items, expected at most {len(free)}, the free slots of a "
                         f"capacity of {index.capacity}; use `grow` first, or forget removed items")
    slots[new] = free[: new.sum()]
    return _with_rows(index, slots, ids, arrays)


def change(index: Index, ids: Any, arrays: Mapping[str, np.ndarray]) -> Index:
    """The index with new arrays for items that are served.

    Raises:
      ValueError: an id is not served, or arrays do not fit the index or are of another model.
    """
    ids = _checked_ids(ids)
    arrays = _checked_arrays(index, ids, arrays)
    return _with_rows(index, _served_slots(index, ids), ids, arrays)


def remove(index: Index, ids: Any, *, forget: bool = False) -> Index:
    """The index without the given candidates. Histories may still contain them, unless they are forgotten.

    Args:
      index: an index with these items. Without `forget` they have to be served; items that were removed
        before can still be forgotten.
      ids: [M] different integers of at least 0.
      forget: also frees the items' slots; history events with these items are then skipped.

    Raises:
      ValueError: an id is not in the index, or, without `forget`, is not served.
    """
    ids = _checked_ids(ids)
    slots = index.slots_of(ids) if forget else _served_slots(index, ids)
    if (slots == FREE).any():
        raise ValueError(f"ids: {ids[slots == FREE][0]} is not in the index, expected items that are")
    served, kept = index.served.copy(), index.ids.copy()
    served[slots] = False
    if forget:
        kept[slots] = FREE
    return dataclasses.replace(index, ids=kept, served=served)


def round_up(size: int) -> int:
    """`size` rounded up to a multiple of `SLOTS`, and at least `SLOTS`."""
    return max(-(-size // SLOTS), 1) * SLOTS


def grow(index: Index, capacity: int) -> Index:
    """The index with at least `capacity` slots; programs for the new shape are compiled on first use.

    Raises:
      ValueError: the index already has more slots.
    """
    slots = round_up(capacity)
    if slots < index.capacity:
        raise ValueError(f"capacity is {capacity}, expected at least that of the index, {index.capacity}")

    def padded(values: np.ndarray, fill: int = 0) -> np.ndarray:
        further = np.full((slots - len(values), *values.shape[1:]), fill, values.dtype)
        return np.concatenate([values, further])

    return dataclasses.replace(
        index, ids=padded(index.ids, FREE), served=padded(index.served),
        arrays={name: padded(values) for name, values in index.arrays.items()})


def _with_rows(index: Index, slots: np.ndarray, ids: np.ndarray, arrays: Mapping[str, np.ndarray]) -> Index:
    def written(old: np.ndarray, new: Any) -> np.ndarray:
        copy = old.copy()
        copy[slots] = new
        return copy

    return dataclasses.replace(
        index, ids=written(index.ids, ids), served=written(index.served, True),
        arrays={name: written(values, arrays[name]) for name, values in index.arrays.items()})


def _served_slots(index: Index, ids: np.ndarray) -> np.ndarray:
    slots = index.slots_of(ids)
    missing = ids[(slots == FREE) | ~index.served[slots]]
    if len(missing):
        raise ValueError(f"ids: {missing[0]} is not served, expected items of the index")
    return slots


def _checked_ids(ids: Any) -> np.ndarray:
    values = np.asarray(ids)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise ValueError(f"ids are {values.dtype} of shape {values.shape}, expected integers [M]")
    values = values.astype(np.int64)
    if (values < 0).any():
        raise ValueError(f"ids: {values.min()} is negative, expected at least 0")
    unique, counts = np.unique(values, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"ids: {unique[counts > 1][0]} is given {counts.max()} times, expected once")
    return values


def _check_lengths(ids: np.ndarray, arrays: Mapping[str, np.ndarray]) -> None:
    for name, values in arrays.items():
        if len(values) != len(ids):
            raise ValueError(f"arrays: {name!r} has {len(values)} rows, expected {len(ids)}, one for each id")


def check_fingerprints(index: str, model: str) -> None:
    """Raises ValueError, which names both, unless the fingerprints of an index and a model are equal."""
    if index != model:
        raise ValueError(f"the index has fingerprint {index}, the model {model}, expected the same: the "
                         "index was made by another model")


def _checked_arrays(index: Index, ids: np.ndarray, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    if isinstance(arrays, Encoded):
        check_fingerprints(index.fingerprint, arrays.fingerprint)
    arrays = {name: np.asarray(values) for name, values in arrays.items()}
    if arrays.keys() != index.arrays.keys():
        raise ValueError(f"arrays are {sorted(arrays)}, expected {sorted(index.arrays)}")
    _check_lengths(ids, arrays)
    for name, values in index.arrays.items():
        found = arrays[name]
        if (found.dtype, found.shape[1:]) != (values.dtype, values.shape[1:]):
            raise ValueError(f"arrays: {name!r} is {found.dtype} {found.shape}, expected {values.dtype} "
                             f"[M, *{values.shape[1:]}]")
        finite = np.isfinite(found).all(axis=tuple(range(1, found.ndim)))
        if not finite.all():
            raise ValueError(f"arrays: {name!r} of item {ids[~finite][0]} has values that are not finite")
    return arrays
