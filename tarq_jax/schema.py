"""Schema: which fields a data set has, on which side, and of which kind."""

import dataclasses
import json
from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np

Side = Literal["user", "item", "context", "event"]
Kind = Literal["categorical", "numeric", "vector"]

ITEM_ID = "item_id"  # the item-side categorical field that every data set has
TAKEN = "bias"  # name of a parameter that is not a field's, see `tarq_jax.models.layers.FeatureEncoder`


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of the data: a column.

    Sides: `user` and `item` fields are looked up in a table by user or item; `context` fields
    belong to a request; `event` fields belong to a history event (such as a rating) and are unknown
    for candidates.

    Kinds: `categorical` holds int32 ids in [0, size), where 0 means padding or unknown;
    `numeric` holds one float32 (size 1); `vector` holds `size` float32.

    Raises:
      ValueError: the side or kind is unknown, or the size is invalid for the kind.
    """

    name: str
    side: Side
    kind: Kind
    size: int = 1

    def __post_init__(self):
        for what, allowed in (("side", get_args(Side)), ("kind", get_args(Kind))):
            value = getattr(self, what)
            if value not in allowed:
                raise ValueError(f"field {self.name!r}: {what} is {value!r}, expected one of {allowed}")
        whole = isinstance(self.size, int | np.integer) and not isinstance(self.size, bool)
        if not whole or self.size < 1 or (self.kind == "numeric" and self.size != 1):
            raise ValueError(f"field {self.name!r}: size is {self.size!r} for kind {self.kind!r}, expected "
                             f"{'1' if self.kind == 'numeric' else 'a whole number from 1 on'}")

    @property
    def dtype(self) -> np.dtype:
        """The type of the stored column."""
        return np.dtype(np.int32 if self.kind == "categorical" else np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one value: (size,) for a vector, () otherwise."""
        return (self.size,) if self.kind == "vector" else ()


@dataclasses.dataclass(frozen=True)
class Schema:
    """The fields of a data set. Hashable, so that models can hold it as a static attribute.

    Raises:
      ValueError: two fields have the same name, a field is named `bias`, or there is no categorical field
        `item_id` on the item side.
    """

    fields: tuple[Field, ...]

    def __post_init__(self):
        object.__setattr__(self, "fields", tuple(self.fields))  # a list is not hashable
        names = [field.name for field in self.fields]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"schema: field names {repeated} are given more than once")
        if TAKEN in names:
            raise ValueError(f"schema: a field is named {TAKEN!r}, expected another name: a parameter has it")
        item_id = next((f for f in self.fields if f.name == ITEM_ID), None)
        if item_id is None or (item_id.side, item_id.kind) != ("item", "categorical"):
            raise ValueError(f"schema: fields are {names}, expected a categorical field {ITEM_ID!r} on the "
                             "item side")

    def side(self, *sides: Side) -> tuple[Field, ...]:
        """The fields of the given sides, in the schema's order."""
        return tuple(field for field in self.fields if field.side in sides)

    @property
    def num_items(self) -> int:
        """Size of the item vocabulary, including the reserved id 0."""
        return next(field.size for field in self.fields if field.name == ITEM_ID)

    def to_json(self) -> str:
        """The schema as a JSON list of fields."""
        return json.dumps([dataclasses.asdict(field) for field in self.fields])

    @classmethod
    def from_json(cls, text: str) -> "Schema":
        """The inverse of `to_json`."""
        return cls(tuple(Field(**field) for field in json.loads(text)))


def check_column(field: Field, values: np.ndarray, where: str) -> None:
    """Raises ValueError unless `values` [M, ...] fit `field`; names the field and the first bad value."""
    if values.shape[1:] != field.shape:
        raise ValueError(f"{where}: field {field.name!r} has shape {values.shape}, "
                         f"expected [M, *{field.shape}]")
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{where}: field {field.name!r} is of type {values.dtype}, expected numbers")
    if field.kind == "categorical":
        bad = ~((values >= 0) & (values < field.size))  # NaN fails both comparisons
        if values.dtype.kind == "f":
            bad |= values != np.floor(values)
        expected = f"an id in [0, {field.size})"
    else:
        with np.errstate(over="ignore"):
            bad = ~np.isfinite(values.astype(field.dtype, copy=False))
        expected = f"a finite number of {field.dtype}"
    if bad.any():
        row = int(np.argwhere(bad)[0, 0])
        raise ValueError(f"{where}: field {field.name!r} is {values[bad][0]} in row {row}, "
                         f"expected {expected} ({int(bad.sum())} such values)")


def check_columns(fields: Iterable[Field], columns: dict[str, np.ndarray], where: str) -> None:
    """`check_column` for every field; a missing column is a ValueError too."""
    for field in fields:
        if field.name not in columns:
            raise ValueError(f"{where}: no column for field {field.name!r}, found {sorted(columns)}")
        check_column(field, columns[field.name], where)
