"""Requests as plain dictionaries, checked against the schema and padded into arrays.

    {"user": {"user_group": 3}, "context": {"hour": 0.4},
     "history": {"item_id": [17, 4, 256], "event_type": [1, 1, 2]}}

`user` and `context` hold one value per field. `history` holds one list per field, oldest event first; its
`item_id` holds ids of the index. All fields of the schema are required. A side without fields may be left
out, and so may `history` if the user has none.
"""

import itertools
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tarq_jax.schema import ITEM_ID, Field, Schema, check_column
from tarq_jax.serving.index import FREE, Index

SIDES = ("user", "context", "history")


class Request(NamedTuple):
    """A request that has passed all checks."""

    user: dict[str, np.ndarray]  # name -> [...]
    context: dict[str, np.ndarray]
    items: np.ndarray  # [N] int64 ids of the history
    events: dict[str, np.ndarray]  # name -> [N, ...]


class Padded(NamedTuple):
    """A batch of requests as arrays of fixed shape."""

    request: dict[str, Any]  # `user`, `context`, `events` and `mask` of `tarq_jax.serving.method`
    slots: np.ndarray  # [B, N] int32, slots of the history's items, 0 on padding
    skipped: list[int]  # for each request, the number of events whose items are not in the index


def check_accepts(schema: Schema, before: Schema, where: str) -> None:
    """Raises ValueError unless `schema` accepts every request that `before` accepts."""
    for side in ("user", "context", "event"):
        found, expected = ({field.name: field for field in each.side(side)} for each in (schema, before))
        if found.keys() != expected.keys():
            raise ValueError(f"{where} takes the {side} fields {sorted(found)}, expected {sorted(expected)}, "
                             "which requests have")
        for name, field in expected.items():
            least = field.size if field.kind == "categorical" else found[name].size
            if found[name].kind != field.kind or found[name].shape != field.shape or found[name].size < least:
                raise ValueError(f"{where} takes the {side} field {name!r} as {found[name].kind} of size "
                                 f"{found[name].size}, expected {field.kind} of size {field.size}, which "
                                 "requests have")


def check_request(schema: Schema, request: Any, where: str = "request") -> Request:
    """Checks a request and converts it to the types of the schema.

    Raises:
      ValueError: the request is invalid; names the field, its value and what was expected.
    """
    if not isinstance(request, Mapping):
        raise ValueError(f"{where} is {shown(request)}, expected an object with {list(SIDES)}")
    _refuse_others(request, SIDES, where)
    parts = {side: request.get(side, {}) for side in SIDES}
    for side, part in parts.items():
        if not isinstance(part, Mapping):
            raise ValueError(f"{where}: {side!r} is {shown(part)}, expected an object, field -> value")
    user, context = ({name: column[0] for name, column in _columns(
        schema.side(side), {name: [value] for name, value in parts[side].items()}, f"{where}: {side!r}"
    ).items()} for side in ("user", "context"))
    return Request(user, context, *_history(schema, parts["history"], f"{where}: 'history'"))


def _history(schema: Schema, history: Mapping[str, Any], where: str) -> tuple[np.ndarray, dict[str, Any]]:
    fields = schema.side("event")
    if not history:
        history = {field.name: [] for field in fields} | {ITEM_ID: []}
    if ITEM_ID not in history:
        raise ValueError(f"{where} has no field {ITEM_ID!r}, expected a list of ids")
    items = check_ids(history[ITEM_ID], f"{where}: field {ITEM_ID!r}")
    events = _columns(fields, history, where, besides=(ITEM_ID,))
    for name, values in events.items():
        if len(values) != len(items):
            raise ValueError(f"{where}: field {name!r} has {len(values)} values, expected {len(items)}, as "
                             f"many as {ITEM_ID!r}")
    return items, events


def check_ids(values: Any, where: str) -> np.ndarray:
    """Item ids as [M] int64; ValueError unless `values` is a list of integers."""
    ids = _array(values, where, "a list of integers")
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"{where} is {shown(values)}, expected a list of integers")
    if ids.size and ids.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{where} is {ids.max()}, expected at most {np.iinfo(np.int64).max}")
    return ids.astype(np.int64)


def check_columns(fields: Sequence[Field], columns: Any, where: str) -> dict[str, np.ndarray]:
    """Columns [M, ...] of exactly the given fields, converted to the types of the schema.

    Raises:
      ValueError: a column is invalid; names the field, its value and what was expected.
    """
    if not isinstance(columns, Mapping):
        raise ValueError(f"{where} is {shown(columns)}, expected an object, field -> values")
    return _columns(fields, columns, where)


def _columns(fields: Sequence[Field], columns: Mapping[str, Any], where: str, besides: Sequence[str] = ()
             ) -> dict[str, np.ndarray]:
    _refuse_others(columns, [*besides, *(field.name for field in fields)], where)
    missing = [field.name for field in fields if field.name not in columns]
    if missing:
        raise ValueError(f"{where} has no field {missing[0]!r}, expected {[f.name for f in fields]}")
    return {field.name: _column(field, columns[field.name], where) for field in fields}


def _column(field: Field, values: Any, where: str) -> np.ndarray:
    categorical = field.kind == "categorical"
    expected = "integers" if categorical else "numbers"
    array = _array(values, f"{where}: field {field.name!r}", expected, depth=len(field.shape))
    if not array.ndim:
        raise ValueError(f"{where}: field {field.name!r} is {shown(values)}, expected a list of values")
    if array.ndim == 1 and not array.size:
        array = np.zeros((0, *field.shape), field.dtype)
    if array.dtype.kind not in ("iu" if categorical else "iuf"):
        raise ValueError(f"{where}: field {field.name!r} is {shown(values)}, expected {expected}")
    check_column(field, array, where)
    return array.astype(field.dtype)


def _array(values: Any, where: str, expected: str, depth: int = 0) -> np.ndarray:
    """`values`, numbers in lists that are nested `depth` times, as an array of any type of numbers."""
    kinds = _kinds(values, depth)
    if isinstance(values, list) and kinds & {str, list}:  # NumPy would pad each text to the longest
        raise ValueError(f"{where} is {shown(values)}, expected {expected}")
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError):  # for example, lists of different lengths
        raise ValueError(f"{where} is {shown(values)}, expected an array of numbers") from None
    if array.dtype.kind in "iuf" and bool in kinds:
        raise ValueError(f"{where} is {shown(values)}, expected numbers and no booleans")
    return array


def _kinds(values: Any, depth: int) -> set[type]:
    """The types of the values in nested lists, and `list`, without a look inside, below `depth`.

    A body may hold a million lists, and the service answers nobody while they are looked at.
    """
    if not isinstance(values, list):
        return {type(values)}
    kinds = set(map(type, values))
    if list in kinds and depth:
        deeper = (_kinds(value, depth - 1) for value in values if isinstance(value, list))
        kinds = (kinds - {list}).union(*deeper)
    return kinds


def _refuse_others(found: Mapping[str, Any], expected: Sequence[str], where: str) -> None:
    others = [name for name in found if name not in expected]
    if others:
        raise ValueError(f"{where} has {shown(others[0])}, expected {list(expected) or 'no fields'}")


class _Short(reprlib.Repr):
    def __init__(self):
        super().__init__()
        self.maxlist = self.maxtuple = self.maxdict = 16
        self.maxstring = self.maxother = 60

    def repr_dict(self, x: dict, level: int) -> str:
        return super().repr_dict(dict(itertools.islice(x.items(), self.maxdict + 1)), level)  # which sorts


def shown(value: Any) -> str:
    """`repr(value)` in at most 60 characters; long values are cut before they are written.

    Example:
      >>> shown(list(range(1_000_000)))
      '[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, ...]'
    """
    text = _Short().repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def pad(
    schema: Schema, index: Index, requests: Sequence[Request], *, batch: int, lengths: Sequence[int]
) -> Padded:
    """Arrays of `batch` requests, with histories padded to the shortest of `lengths` that holds them all.

    Events whose items are not in the index are skipped. A history that is longer than all `lengths` keeps
    its newest events.
    """
    slots = [index.slots_of(request.items) for request in requests]
    kept = [np.flatnonzero(found != FREE)[-lengths[-1]:] for found in slots]
    longest = max(map(len, kept), default=0)
    length = next(length for length in lengths if length >= longest)
    events = [{name: values[places] for name, values in request.events.items()}
              for request, places in zip(requests, kept, strict=True)]
    history = np.zeros((batch, length), np.int32)
    mask = np.zeros((batch, length), bool)
    for row, (found, places) in enumerate(zip(slots, kept, strict=True)):
        history[row, :len(places)] = found[places]
        mask[row, :len(places)] = True
    columns = {
        "user": _stacked(schema.side("user"), [request.user for request in requests], batch),
        "context": _stacked(schema.side("context"), [request.context for request in requests], batch),
        "events": _stacked(schema.side("event"), events, batch, length), "mask": mask}
    return Padded(columns, history, [int((found == FREE).sum()) for found in slots])


def _stacked(
    fields: Sequence[Field], requests: Sequence[Mapping[str, np.ndarray]], batch: int, *length: int
) -> dict[str, np.ndarray]:
    """One row per request; zeros fill further rows and, in columns with a `length`, the end of each row."""
    columns = {field.name: np.zeros((batch, *length, *field.shape), field.dtype) for field in fields}
    for name, column in columns.items():
        for row, request in enumerate(requests):
            column[(row, slice(len(request[name]))) if length else row] = request[name]
    return columns
