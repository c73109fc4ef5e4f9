"""Requests and tables as block records, numbered so that the n-th record of a split is block n."""

from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.pvalue import AsSingleton, PCollection

from tarq_jax.data import records
from tarq_jax.data.beam.requests import Request
from tarq_jax.data.beam.vocabulary import stable_hash
from tarq_jax.schema import ITEM_ID, Field, Schema, Side

Numbered = tuple[int, records.Columns]
PART = 1024  # blocks whose lengths of histories are written together: megabytes


def _num_blocks(count: int, size: int) -> int:
    return max(1, -(-count // size))


def request_records(name: str, requests: PCollection, schema: Schema) -> PCollection:
    """The records of a split, as (block number, record).

    The hash of a request decides its block and its place in the block. So the result is the same on every
    runner, and requests are shuffled over the entire split: in training it is enough to shuffle a few blocks
    together. Blocks hold about `records.BLOCK` requests; block 0 exists even if the split is empty.
    """
    count = (requests | f"Count {name}" >> beam.combiners.Count.Globally()
             | f"Blocks of {name}" >> beam.Map(_num_blocks, records.BLOCK))
    dealt = requests | f"Deal {name}" >> beam.Map(
        lambda request, blocks: (stable_hash(request.key) % blocks, request), AsSingleton(count))
    first = requests.pipeline | f"First block of {name}" >> beam.Create([(0, None)])
    return ((dealt, first) | f"All of {name}" >> beam.Flatten() | f"Group {name}" >> beam.GroupByKey()
            | f"Records of {name}" >> beam.Map(_request_record, schema))


def _request_record(element: tuple[int, Iterable[Request | None]], schema: Schema) -> Numbered:
    block, found = element
    requests = sorted((request for request in found if request), key=lambda r: (stable_hash(r.key), r.key))
    history = [event for request in requests for event in request.history]
    candidates = [candidate for request in requests for candidate in request.candidates]
    context = _columns(schema.side("context"), [request.context for request in requests])
    event = _columns(schema.side("event"), [values for _, values in history])
    columns = records.make_requests(
        np.array([request.user for request in requests]), np.array([item for item, _ in history]),
        np.array([len(request.history) for request in requests], np.int64),
        np.array([item for item, _ in candidates]),
        np.array([len(request.candidates) for request in requests], np.int64),
        np.array([label for _, label in candidates]), context=context, event=event)
    return block, records.request_block(schema, block, columns)


def _columns(fields: tuple[Field, ...], rows: list[tuple[int, ...]]) -> records.Columns:
    """Turns rows of values, which are in the order of the fields, into columns."""
    return {field.name: np.array([row[place] for row in rows], field.dtype)
            for place, field in enumerate(fields)}


def describe(name: str, blocks: PCollection) -> PCollection:
    """What `StoredRequests` needs to know about the blocks of a split, as one object."""
    return (blocks | f"Size up {name}" >> beam.Map(_sizes)
            | f"Gather sizes of {name}" >> beam.combiners.ToList()
            | f"Describe {name}" >> beam.Map(_description))


def _sizes(element: Numbered) -> tuple[int, int, int, int]:
    block, columns = element
    return (block, len(columns["user"]), int(columns["history_lengths"].max(initial=0)),
            int(columns["candidate_lengths"].max(initial=0)))


def _description(sizes: list[tuple[int, int, int, int]]) -> dict[str, Any]:
    sizes = sorted(sizes)
    return {"sizes": [size for _, size, _, _ in sizes],
            "longest_history": max(longest for _, _, longest, _ in sizes),
            "most_candidates": max(most for _, _, _, most in sizes)}


def history_lengths(name: str, blocks: PCollection) -> PCollection:
    """The lengths of the histories of a split, as (name, [requests of `PART` blocks] uint32)."""
    return (blocks | f"Lengths of {name}" >> beam.Map(_numbered_lengths)
            | f"Group lengths of {name}" >> beam.GroupByKey()
            | f"Join lengths of {name}" >> beam.Map(_part, name))


def _numbered_lengths(element: Numbered) -> tuple[int, tuple[int, np.ndarray]]:
    block, columns = element
    return block // PART, (block, columns["history_lengths"])


def _part(element: tuple[int, Iterable[tuple[int, np.ndarray]]], name: str) -> tuple[str, np.ndarray]:
    part, found = element
    lengths = [lengths for _, lengths in sorted(found, key=lambda numbered: numbered[0])]
    return f"lengths-{name}-{part:08}", np.concatenate(lengths).astype("<u4")


def table_records(side: Side, values: PCollection, size: PCollection, schema: Schema) -> PCollection:
    """The records of the item or user table, as (block number, record).

    Args:
      side: "item" or "user".
      values: (row, (field, value)). If the data has several values for one row and field, the greatest is
        used; missing values are 0.
      size: one number, the number of rows.
      schema: the fields.
    """
    size = size if schema.side(side) else values.pipeline | f"No {side} table" >> beam.Create([0])
    keyed = values | f"Block of {side}" >> beam.Map(
        lambda element: (element[0] // records.TABLE_BLOCK, element))
    every = size | f"Blocks of {side}" >> beam.FlatMap(
        lambda rows: [(block, None) for block in range(_num_blocks(rows, records.TABLE_BLOCK))])
    return ((keyed, every) | f"All of {side}" >> beam.Flatten() | f"Group {side}" >> beam.GroupByKey()
            | f"Records of {side}" >> beam.Map(_table_record, AsSingleton(size), side, schema))


def _table_record(element: tuple[int, Iterable[Any]], size: int, side: Side, schema: Schema) -> Numbered:
    block, found = element
    first = block * records.TABLE_BLOCK
    rows = min(records.TABLE_BLOCK, size - first)
    columns = {f.name: np.zeros((rows, *f.shape), f.dtype) for f in schema.side(side)}
    if ITEM_ID in columns:
        columns[ITEM_ID][:] = np.arange(first, first + rows)
    for row, (field, value) in sorted(entry for entry in found if entry is not None):
        if row and field in columns:
            columns[field][row - first] = value
    return block, records.full_block(schema, block, {f"{side}/{name}": c for name, c in columns.items()})


def by_split(requests: PCollection) -> Iterator[tuple[str, PCollection]]:
    """The requests of each split."""
    chosen = requests | "Split by time" >> beam.Partition(
        lambda request, num: records.SPLITS.index(request.split), len(records.SPLITS))
    return zip(records.SPLITS, chosen, strict=True)
