"""Gathers requests, with the features of their items and users, into padded batches; NumPy only."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from tarq_jax.data.records import Dataset, Requests
from tarq_jax.schema import Field
from tarq_jax.types import Batch


class _Windows(NamedTuple):
    """Positions in a flat column of the entries of each padded row."""

    positions: np.ndarray  # [B, N] int64; arbitrary where the mask is False
    mask: np.ndarray  # [B, N] bool


def _windows(offsets: np.ndarray, rows: np.ndarray, real: np.ndarray, width: int) -> _Windows:
    """The last `width` entries of the ragged rows `rows` [B], left-aligned; none if `real` [B] is False."""
    stops = offsets[rows + 1]
    lengths = np.where(real, np.minimum(stops - offsets[rows], width), 0)
    steps = np.arange(width)
    return _Windows((stops - lengths)[:, None] + steps, steps < lengths[:, None])


def _gather(column: np.ndarray, index: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`column[index]` where `mask`, zeros elsewhere; index and mask have equal shapes."""
    if not len(column):
        return np.zeros(index.shape + column.shape[1:], column.dtype)
    values = column.take(np.where(mask, index, 0), axis=0)
    if not mask.all():
        values[~mask] = 0
    return values


def lookup(fields: tuple[Field, ...], table: Mapping[str, np.ndarray],
            ids: np.ndarray) -> dict[str, np.ndarray]:
    """The given fields in the given rows of a table."""
    return {field.name: table[field.name].take(ids, axis=0) for field in fields}


def collate(dataset: Dataset, split_requests: Requests, indices: np.ndarray, history_length: int,
            num_candidates: int) -> Batch:
    """Gathers requests and the features of their user, history and candidates into one padded batch.

    Real entries come first in each row. A history longer than `history_length` keeps its most recent
    events. Index -1 gives a padding request: fully masked, with user 0 and weights 0.

    Args:
      dataset: tables and schema.
      split_requests: the requests to choose from.
      indices: [B] rows of `split_requests`, or -1.
      history_length: N.
      num_candidates: G, at least the number of candidates of every chosen request.

    Returns:
      A `Batch` with NumPy leaves.

    Raises:
      ValueError: an index is out of range, or a request has more than `num_candidates` candidates.
    """
    schema, requests = dataset.schema, split_requests
    indices = np.asarray(indices, np.int64)
    if indices.size and (indices.min() < -1 or indices.max() >= len(requests)):
        raise ValueError(f"indices are in [{indices.min()}, {indices.max()}], expected [-1, {len(requests)})")
    real = indices >= 0
    rows = np.where(real, indices, 0) if len(requests) else np.zeros_like(indices)
    empty = np.zeros(2, np.int64)
    events = _windows(requests.history_offsets if len(requests) else empty, rows, real, history_length)
    offsets = requests.candidate_offsets if len(requests) else empty
    most = int(((offsets[rows + 1] - offsets[rows]) * real).max(initial=0))
    if most > num_candidates:
        raise ValueError(f"num_candidates is {num_candidates}, but a request has {most} candidates")
    shown = _windows(offsets, rows, real, num_candidates)

    item_fields = schema.side("item")
    user = _gather(requests.user, rows, real)
    history = lookup(item_fields, dataset.items, _gather(requests.history, *events))
    history |= {f.name: _gather(requests.event[f.name], *events) for f in schema.side("event")}
    return Batch(
        user_id=user,
        user=lookup(schema.side("user"), dataset.users, user),
        context={f.name: _gather(requests.context[f.name], rows, real) for f in schema.side("context")},
        history=history,
        history_mask=events.mask,
        candidates=lookup(item_fields, dataset.items, _gather(requests.candidates, *shown)),
        candidate_mask=shown.mask,
        labels=_gather(requests.labels, *shown),
        weights=_gather(requests.weights, *shown))
