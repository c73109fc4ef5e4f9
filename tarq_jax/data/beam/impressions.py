"""Elements of logs of impressions, see `tarq_jax.data.impressions`."""

import functools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import apache_beam as beam

from tarq_jax.data.beam.forms import Event, Parts, Shown, Value
from tarq_jax.data.beam.text import read_rows
from tarq_jax.data.beam.vocabulary import stable_hash
from tarq_jax.data.impressions import ImpressionsOptions, names, read_header
from tarq_jax.data.rows import BadRow, parse_number, split_csv

MAX_TIME = 1 << 53


class Row(NamedTuple):
    """A row of either file; `columns` has all its columns by name."""

    user: str
    time: int
    item: str
    columns: Mapping[str, str]


def parse_row(text: str, header: Mapping[str, int], options: ImpressionsOptions) -> Row:
    """Splits a row, whose columns may be quoted."""
    columns = split_csv(text, options.delimiter, len(header))
    found = {name: columns[place].strip() for name, place in header.items()}
    if not (found[options.user_column] and found[options.item_column]):
        raise BadRow("empty id")
    time = parse_number(found[options.time_column], int)
    if not 0 <= time < MAX_TIME:
        raise BadRow("timestamp out of range")
    return Row(found[options.user_column], time, found[options.item_column], found)


def parse_impression(text: str, header: Mapping[str, int], options: ImpressionsOptions) -> Row:
    """`parse_row`, with a check of the label."""
    row = parse_row(text, header, options)
    if row.columns[options.label_column] not in ("0", "1"):
        raise BadRow("label other than 0 or 1")
    return row


def hash_features(row: Row, features: list[str], buckets: int) -> tuple[int, ...]:
    """Hashed ids of features, from 1; 0 for empty ones."""
    return tuple(1 + stable_hash(f"{name}={row.columns[name]}") % buckets if row.columns[name] else 0
                 for name in features)


def _shown(row: Row, options: ImpressionsOptions) -> Shown:
    context = hash_features(row, names(options.context_features), options.feature_buckets)
    return Shown(row.user, row.time, row.item, float(row.columns[options.label_column]), context)


def _event(row: Row, options: ImpressionsOptions) -> Event:
    features = names(options.event_features)
    return Event(row.user, row.time, row.item, hash_features(row, features, options.feature_buckets))


def _item_values(row: Row, features: list[str]) -> Iterator[tuple[str, Value]]:
    return ((row.item, (name, row.columns[name])) for name in features if row.columns[name])


def _user_values(row: Row, options: ImpressionsOptions) -> Iterator[tuple[str, Value]]:
    features = names(options.user_features)
    ids = hash_features(row, features, options.feature_buckets)
    return ((row.user, value) for value in zip(features, ids, strict=True) if value[1])


def parts(root: beam.Pipeline, options: ImpressionsOptions) -> Parts:
    """The elements of the logs: impressions, and behaviors or, without them, clicks."""
    shared = [options.user_column, options.time_column, options.item_column]
    features = names(",".join((options.item_features, options.user_features, options.context_features)))
    header = read_header(options.source, "source", options.delimiter,
                         [*shared, options.label_column, *features])
    rows, report = read_rows(root, options.source, functools.partial(
        parse_impression, header=header, options=options), role="impressions", header=True)
    reports = [report]
    if options.behaviors:
        header = read_header(options.behaviors, "behaviors", options.delimiter,
                             [*shared, *names(options.event_features)])
        done, report = read_rows(root, options.behaviors, functools.partial(
            parse_row, header=header, options=options), role="behaviors", header=True)
        reports.append(report)
    else:
        done = rows | "Clicks" >> beam.Filter(lambda row: row.columns[options.label_column] == "1")
    return Parts(done | "Events" >> beam.Map(_event, options), rows | "Shown" >> beam.Map(_shown, options),
                 rows | "Features of items" >> beam.FlatMap(_item_values, names(options.item_features)),
                 rows | "Features of users" >> beam.FlatMap(_user_values, options) | beam.Distinct(),
                 tuple(reports))
