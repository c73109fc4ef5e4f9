"""Block records: requests in ragged columns, and their encoding in blocks for storage.

A record holds one block of up to `BLOCK` requests as flat columns, with the length of each request, so that
reading it takes only a few NumPy views. In memory, a split is one `Requests`, a single block; on disk it is
`tarq_jax.data.stored.StoredRequests`. Both are a `Split`.

Shapes: R requests, E events in all histories, C candidates of all requests.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from tarq_jax.schema import ITEM_ID, Field, Schema, Side, check_column, check_columns

SPLITS = ("train", "validation", "test")
BLOCK = 512  # requests per record
TABLE_BLOCK = 8192  # table rows per record

Columns = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Requests:
    """Requests in columns; request r owns `history[history_offsets[r]:history_offsets[r + 1]]` etc."""

    user: np.ndarray  # [R] int32, row in the user table; groups metrics
    history: np.ndarray  # [E] int32 item ids, oldest first
    history_offsets: np.ndarray  # [R + 1] int64
    candidates: np.ndarray  # [C] int32 item ids
    candidate_offsets: np.ndarray  # [R + 1] int64
    labels: np.ndarray  # [C] float32
    weights: np.ndarray  # [C] float32
    context: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # name -> [R, ...]
    event: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # name -> [E, ...]

    def __len__(self) -> int:
        return len(self.user)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of requests of each block; in memory there is one block."""
        return (len(self),)

    @property
    def longest_history(self) -> int:
        """Number of events in the longest history."""
        return int(np.diff(self.history_offsets).max(initial=0))

    @property
    def most_candidates(self) -> int:
        """The largest number of candidates of a request."""
        return int(np.diff(self.candidate_offsets).max(initial=0))

    def read(self, blocks: Sequence[int]) -> "Requests":
        """The requests of the only block."""
        del blocks
        return self


class Split(Protocol):
    """Requests in blocks, in memory or on disk."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of requests of each block."""

    @property
    def longest_history(self) -> int:
        """Number of events in the longest history."""

    @property
    def most_candidates(self) -> int:
        """The largest number of candidates of a request."""

    def __len__(self) -> int: ...

    def read(self, blocks: Sequence[int]) -> Requests:
        """The requests of the given blocks."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """All data that a model is trained and evaluated on: tables in memory, requests in memory or on disk."""

    schema: Schema
    items: Mapping[str, np.ndarray]  # name -> [V, ...]; row 0 is padding, all zeros
    users: Mapping[str, np.ndarray]  # name -> [U, ...]; row 0 is the unknown user; {} without user fields
    splits: Mapping[str, Split]
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # facts about the data, JSON
    fingerprint: str = ""  # hash of options and files, or of the arrays (`hash_of`); "" if there is none
    item_ids: np.ndarray | None = None  # [V] int64 or text, ids of the source; that of row 0 is ignored


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """The start of each ragged row, and the end of the last one: [R] -> [R + 1] int64."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def ragged_index(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Positions of the windows `[start, start + length)`, concatenated.

    Args:
      starts: [R] first position of each window.
      lengths: [R] number of positions of each window.

    Returns:
      [sum(lengths)] int64 positions.
    """
    offsets = offsets_of(lengths)
    return np.arange(offsets[-1]) + np.repeat(np.asarray(starts, np.int64) - offsets[:-1], lengths)


def make_requests(user: np.ndarray, history: np.ndarray, history_lengths: np.ndarray, candidates: np.ndarray,
                  candidate_lengths: np.ndarray, labels: np.ndarray, *, weights: np.ndarray | None = None,
                  context: Mapping[str, np.ndarray] | None = None,
                  event: Mapping[str, np.ndarray] | None = None) -> Requests:
    """`Requests` from flat columns and lengths, converted to the stored types.

    Args:
      user: [R] rows of the user table; 0 is the unknown user.
      history: [events of all requests] item ids, the oldest of each request first.
      history_lengths: [R] number of events of each request.
      candidates: [candidates of all requests] item ids.
      candidate_lengths: [R] number of candidates of each request.
      labels: [candidates of all requests], 0 or 1.
      weights: [candidates of all requests], at least 0, weights in losses and metrics; 1 if None.
      context: name of a context field -> [R, ...].
      event: name of an event field -> [events of all requests, ...].

    Raises:
      ValueError: users or items are not integers of 32 bits; names the first bad value.
    """
    labels = np.ascontiguousarray(labels, np.float32)
    return Requests(
        user=_ids("user", user),
        history=_ids("history", history),
        history_offsets=offsets_of(history_lengths),
        candidates=_ids("candidates", candidates),
        candidate_offsets=offsets_of(candidate_lengths),
        labels=labels,
        weights=np.ones_like(labels) if weights is None else np.ascontiguousarray(weights, np.float32),
        context=dict(context or {}),
        event=dict(event or {}))


def _ids(name: str, values: np.ndarray) -> np.ndarray:
    """Ids as int32; checked first, because a larger id would wrap around to another one."""
    values, limits = np.asarray(values), np.iinfo(np.int32)
    if values.size and values.dtype.kind not in "iu":
        raise ValueError(f"{name} is of type {values.dtype}, expected integers")
    fits = np.can_cast(values.dtype, np.int32)
    if not fits and (bad := np.flatnonzero((values < limits.min) | (values > limits.max))).size:
        raise ValueError(f"{name} is {values[bad[0]]} in row {bad[0]}, expected an integer of 32 bits; "
                         "tarq_jax.data.hashing.hash_ids folds larger ids")
    return np.ascontiguousarray(values, np.int32)


def column_fields(schema: Schema) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """The columns of a record: name -> (dtype, shape of one value)."""
    integers = dict.fromkeys(("block", "user", "history", "history_lengths", "candidates",
                              "candidate_lengths"), (np.dtype(np.int32), ()))
    floats = dict.fromkeys(("labels", "weights"), (np.dtype(np.float32), ()))
    fields = {f"{field.side}/{field.name}": (field.dtype, field.shape) for field in schema.fields}
    return integers | floats | fields


def full_block(schema: Schema, index: int, columns: Columns) -> Columns:
    """A full record: the given columns, and all other columns empty."""
    empty = {name: np.zeros((0, *shape), dtype) for name, (dtype, shape) in column_fields(schema).items()}
    return empty | {"block": np.array([index], np.int32)} | columns


def _request_columns(schema: Schema, requests: Requests, start: int, stop: int) -> Columns:
    """The columns of requests `start` to `stop`."""
    h_offsets, c_offsets = (o[start:stop + 1] for o in (requests.history_offsets, requests.candidate_offsets))
    events, candidates = slice(h_offsets[0], h_offsets[-1]), slice(c_offsets[0], c_offsets[-1])
    columns = {
        "user": requests.user[start:stop],
        "history": requests.history[events],
        "history_lengths": np.diff(h_offsets).astype(np.int32),
        "candidates": requests.candidates[candidates],
        "candidate_lengths": np.diff(c_offsets).astype(np.int32),
        "labels": requests.labels[candidates],
        "weights": requests.weights[candidates],
    }
    columns |= {f"context/{f.name}": requests.context[f.name][start:stop] for f in schema.side("context")}
    return columns | {f"event/{f.name}": requests.event[f.name][events] for f in schema.side("event")}


def request_block(schema: Schema, index: int, requests: Requests) -> Columns:
    """All requests as one record."""
    return full_block(schema, index, _request_columns(schema, requests, 0, len(requests)))


def request_blocks(schema: Schema, requests: Requests, block_size: int = BLOCK) -> Iterator[Columns]:
    """Splits requests into records; an empty split becomes one record without requests."""
    for index, start in enumerate(range(0, max(len(requests), 1), block_size)):
        stop = min(start + block_size, len(requests))
        yield full_block(schema, index, _request_columns(schema, requests, start, stop))


def describe_blocks(requests: Requests, block_size: int = BLOCK) -> dict[str, Any]:
    """What `StoredRequests` needs to know about the blocks of `request_blocks`, as plain objects."""
    starts = range(0, max(len(requests), 1), block_size)
    return {"sizes": [min(block_size, len(requests) - start) for start in starts],
            "longest_history": requests.longest_history, "most_candidates": requests.most_candidates}


def table_blocks(schema: Schema, side: Side, table: Mapping[str, np.ndarray],
                 block_size: int = TABLE_BLOCK) -> Iterator[Columns]:
    """Splits the item or user table into records; a table without fields becomes one empty record."""
    fields = schema.side(side)
    rows = len(table[fields[0].name]) if fields else 0
    for index, start in enumerate(range(0, max(rows, 1), block_size)):
        columns = {f"{side}/{f.name}": table[f.name][start:start + block_size] for f in fields}
        yield full_block(schema, index, columns)


def _concatenate(blocks: list[Columns], name: str, schema: Schema) -> np.ndarray:
    dtype, shape = column_fields(schema)[name]
    parts = [np.asarray(block[name], dtype).reshape(-1, *shape) for block in blocks]
    return np.concatenate(parts) if parts else np.zeros((0, *shape), dtype)


def _ordered(blocks: Iterable[Columns]) -> list[Columns]:
    """Blocks in the order in which they were generated, whatever their order in storage."""
    return sorted(blocks, key=lambda block: int(np.ravel(block["block"])[0]))


def requests_from_blocks(schema: Schema, blocks: Iterable[Columns]) -> Requests:
    """The inverse of `request_blocks`, for blocks in any order."""
    blocks = _ordered(blocks)
    names = ("user", "history", "history_lengths", "candidates", "candidate_lengths", "labels")
    columns = [_concatenate(blocks, name, schema) for name in names]
    return make_requests(
        *columns, weights=_concatenate(blocks, "weights", schema),
        context={f.name: _concatenate(blocks, f"context/{f.name}", schema) for f in schema.side("context")},
        event={f.name: _concatenate(blocks, f"event/{f.name}", schema) for f in schema.side("event")})


def table_from_blocks(schema: Schema, side: Side, blocks: Iterable[Columns]) -> Columns:
    """The inverse of `table_blocks`, for blocks in any order."""
    blocks = _ordered(blocks)
    return {f.name: _concatenate(blocks, f"{side}/{f.name}", schema) for f in schema.side(side)}


def check_dataset(dataset: Dataset) -> None:
    """Raises ValueError unless all columns fit the schema: ids in range, numbers finite, item row 0 zero.

    It also checks that every item's `item_id` is the number of its row, and that `item_ids` differ.
    """
    schema = dataset.schema
    check_columns(schema.side("item"), dict(dataset.items), "items")
    check_columns(schema.side("user"), dict(dataset.users), "users")
    for name, column in dataset.items.items():
        if len(column) != schema.num_items:
            raise ValueError(f"items: field {name!r} has {len(column)} rows, expected {schema.num_items} "
                             f"(the size of {ITEM_ID!r})")
        if np.any(column[0]):
            raise ValueError(f"items: field {name!r} is {column[0]} in row 0, expected zeros (padding)")
    ids = dataset.items[ITEM_ID]
    if (wrong := np.flatnonzero(ids != np.arange(len(ids)))).size:
        raise ValueError(f"items: field {ITEM_ID!r} is {ids[wrong[0]]} in row {wrong[0]}, expected the "
                         "number of the row, by which histories and candidates name an item")
    if dataset.item_ids is not None:
        own = np.asarray(dataset.item_ids)
        if own.shape != ids.shape or own.dtype.kind not in "iuUT":
            raise ValueError(f"item_ids: {own.dtype} of shape {own.shape}, expected whole numbers or text of "
                             f"shape {ids.shape}")
        values, counts = np.unique(own[1:], return_counts=True)
        if (bad := values[(counts > 1) | (values < 0 if own.dtype.kind in "iu" else False)]).size:
            raise ValueError(f"item_ids: {bad[0]} is negative or the id of several items, expected one id of "
                             "at least 0 for each")
    for split, requests in dataset.splits.items():
        if isinstance(requests, Requests):  # stored requests are checked when they are read
            check_requests(schema, num_users(dataset.users), requests, f"split {split!r}")


def typed(dataset: Dataset) -> Dataset:
    """The data set with every column in the type of its field, as in a prepared data set."""
    def of(table, *sides):
        fields = {field.name: field.dtype for field in dataset.schema.side(*sides)}
        return {name: np.asarray(column, fields.get(name)) for name, column in table.items()}

    splits = {name: dataclasses.replace(
        split, context=of(split.context, "context"), event=of(split.event, "event"))
        if isinstance(split, Requests) else split for name, split in dataset.splits.items()}
    return dataclasses.replace(
        dataset, items=of(dataset.items, "item"), users=of(dataset.users, "user"), splits=splits)


def hash_of(dataset: Dataset) -> str:
    """A hash of 16 hexadecimal digits over the schema and all arrays of a data set in memory."""
    tables = {"items": dataset.items, "users": dataset.users} | {
        split: {field.name: getattr(requests, field.name) for field in dataclasses.fields(requests)}
        for split, requests in dataset.splits.items() if isinstance(requests, Requests)}
    found = hashlib.sha256(dataset.schema.to_json().encode())
    for name, values in _arrays(tables):
        found.update(f"{name} {values.dtype} {values.shape}".encode())
        found.update(np.ascontiguousarray(values).data)
    return found.hexdigest()[:16]


def _arrays(values: Any, name: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Every array in nested mappings, with its path."""
    if isinstance(values, Mapping):
        for key, inner in values.items():
            yield from _arrays(inner, f"{name}/{key}")
    else:
        yield name, np.asarray(values)


def num_users(users: Mapping[str, np.ndarray]) -> int:
    """Rows of the user table; without user fields there is no table, and every id is valid."""
    return min((len(column) for column in users.values()), default=np.iinfo(np.int32).max)


def check_requests(schema: Schema, num_users: int, requests: Requests, where: str) -> None:
    """Raises ValueError unless lengths agree, ids are in range, numbers are finite and labels are 0 or 1."""
    _check_lengths(requests, where)
    for name, ids in (("history", requests.history), ("candidates", requests.candidates)):
        check_column(Field(name, "item", "categorical", schema.num_items), ids, where)
    check_column(Field("user", "user", "categorical", num_users), requests.user, where)
    check_column(Field("labels", "item", "numeric"), requests.labels, where)
    if (wrong := np.flatnonzero((requests.labels != 0) & (requests.labels != 1))).size:
        raise ValueError(f"{where}: field 'labels' is {requests.labels[wrong[0]]} in row {wrong[0]}, "
                         "expected 0 or 1")
    check_column(Field("weights", "item", "numeric"), requests.weights, where)
    if (negative := np.flatnonzero(requests.weights < 0)).size:
        raise ValueError(f"{where}: field 'weights' is {requests.weights[negative[0]]} in row {negative[0]}, "
                         "expected at least 0")
    check_columns(schema.side("context"), dict(requests.context), where)
    check_columns(schema.side("event"), dict(requests.event), where)


def _check_lengths(requests: Requests, where: str) -> None:
    """Raises ValueError unless the requests' windows tile history and candidates, and other lengths agree."""
    for name, offsets, column in (("history", requests.history_offsets, requests.history),
                                  ("candidates", requests.candidate_offsets, requests.candidates)):
        lengths = np.diff(offsets)
        if len(lengths) != len(requests) or offsets[0] or offsets[-1] != len(column) or np.any(lengths < 0):
            raise ValueError(f"{where}: {name} of {len(lengths)} requests have lengths that add up to "
                             f"{offsets[-1]}, expected {len(requests)} that add up to {len(column)}")
    for name, values, expected in (
            ("labels", requests.labels, len(requests.candidates)),
            ("weights", requests.weights, len(requests.candidates)),
            *((f"context {name!r}", values, len(requests)) for name, values in requests.context.items()),
            *((f"event {name!r}", values, len(requests.history)) for name, values in requests.event.items())):
        if len(values) != expected:
            raise ValueError(f"{where}: {name} has {len(values)} rows, expected {expected}")
