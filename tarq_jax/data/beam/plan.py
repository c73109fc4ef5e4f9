"""The pipeline that all sources share: from their elements to the records of every split."""

import json
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.pvalue import AsSingleton, PCollection
from etils import epath

from tarq_jax.data.beam import blocks
from tarq_jax.data.beam.forms import Parts
from tarq_jax.data.beam.requests import KeepLast, Rules, make_requests
from tarq_jax.data.beam.vocabulary import Vocabulary, encode, keys_by_block, make_vocabulary, stable_hash
from tarq_jax.data.records import TABLE_BLOCK
from tarq_jax.data.sources import LogOptions, PipelineSource
from tarq_jax.schema import ITEM_ID, Schema

POOL = 1 << 17  # training candidates that negatives are drawn from


class Plan(NamedTuple):
    """The output of the pipeline, which a builder writes."""

    splits: dict[str, PCollection]  # (block number, record)
    facts: PCollection  # (name, JSON object): sizes of vocabularies, blocks of splits, reports, ids of items
    lengths: PCollection  # (name, lengths of histories), parts that are sorted by their name


def plan_source(source: PipelineSource, root: beam.Pipeline, options: LogOptions) -> Plan:
    """`plan` for a source and its options."""
    rules = Rules(**{name: getattr(options, name) for name in Rules._fields})
    return plan(source.parts(root, options), source.schema(options), rules,
                item_buckets=options.item_buckets, min_count=options.min_count,
                max_user_events=options.max_user_events)


def plan(parts: Parts, schema: Schema, rules: Rules, *, item_buckets: int, min_count: int,
         max_user_events: int) -> Plan:
    """Puts the pipeline together.

    Args:
      parts: elements of the source.
      schema: fields of the source. The pipeline finds the sizes of categorical item fields, including
        `item_id`, itself; those in the schema are ignored.
      rules: how requests are made.
      item_buckets: number of buckets that items are hashed into; 0 gives each item its own row.
      min_count: an item with fewer occurrences is unknown.
      max_user_events: how many of the last events, and of the last candidates, of a user are kept.
    """
    keys = ((parts.events | "Items of events" >> beam.Map(lambda event: event.item),
             parts.shown | "Items shown" >> beam.Map(lambda shown: shown.item)) | "Items" >> beam.Flatten())
    items = make_vocabulary("items", keys, item_buckets, min_count)
    users = make_vocabulary("users", parts.shown | "Users shown" >> beam.Map(lambda shown: shown.user), 0)
    requests = _requests(parts, items, users, rules, max_user_events)
    item_values, sizes = _item_values(parts.items, items, schema)
    user_values = encode("Rows of users", parts.users, users)
    splits = {split: blocks.request_records(split, chosen, schema)
              for split, chosen in blocks.by_split(requests)}
    single = {f"blocks-{split}": blocks.describe(split, records) for split, records in splits.items()}
    single |= {f"size-{name}": size for name, size in (sizes | {ITEM_ID: items.size}).items()}
    single |= {f"rows-{index}": report for index, report in enumerate(parts.reports)}
    facts = [fact | f"Name {name}" >> beam.Map(lambda value, name: (name, value), name)
             for name, fact in single.items()]
    facts.append(keys_by_block("items", items, TABLE_BLOCK) | "Name ids" >> beam.MapTuple(
        lambda block, ids: (f"ids-{block}", ids)))
    tables = {"items": blocks.table_records("item", item_values, items.size, schema),
              "users": blocks.table_records("user", user_values, users.size, schema)}
    lengths = [blocks.history_lengths(split, records) for split, records in splits.items()]
    return Plan(splits | tables, facts | "Facts" >> beam.Flatten(), lengths | "Lengths" >> beam.Flatten())


def _requests(parts: Parts, items: Vocabulary, users: Vocabulary, rules: Rules, max_user_events: int):
    """Replaces items by their rows, groups by user, and makes requests."""
    events = encode("Rows of events", parts.events | "Events by item" >> beam.Map(
        lambda event: (event.item, (event.user, event.time, event.values))), items)
    shown = encode("Rows of candidates", parts.shown | "Candidates by item" >> beam.Map(
        lambda one: (one.item, (one.user, one.time, one.context, one.label))), items)
    by_user = {
        "events": events | "Events by user" >> beam.Map(lambda e: (e[1][0], (e[1][1], e[0], e[1][2]))),
        "shown": shown | "Candidates by user" >> beam.Map(lambda e: (e[1][0], (*e[1][1:3], e[0], e[1][3]))),
    }
    kept = {name: found | f"Last {name}" >> beam.CombinePerKey(KeepLast(max_user_events))
            for name, found in by_user.items()}
    pool = AsSingleton(_pool(by_user["shown"], rules))
    return ({"user": users.table, **kept} | "By user" >> beam.CoGroupByKey()
            | "Requests" >> beam.FlatMap(make_requests, pool, rules))


def _pool(shown: PCollection, rules: Rules) -> PCollection:
    """One array of about `POOL` training candidates, drawn by hash, so that negatives follow popularity."""
    if not rules.num_negatives:
        return shown.pipeline | "No negatives" >> beam.Create([np.zeros(0, np.int32)])
    known = shown | "Of training" >> beam.Filter(lambda e: e[1][0] < rules.validation_start and e[1][2])
    count = known | "Count training" >> beam.combiners.Count.Globally()
    return (known | "Draw pool" >> beam.Filter(_drawn, AsSingleton(count), rules.seed)
            | "Items of pool" >> beam.Map(lambda e: e[1][2])
            | "Gather pool" >> beam.combiners.ToList()
            | "Sort pool" >> beam.Map(lambda found: np.sort(np.array(found, np.int32))))


def _drawn(element: tuple[str, tuple[Any, ...]], count: int, seed: int) -> bool:
    return stable_hash(f"{seed}/{element}") * count < POOL << 64


def _item_values(values: PCollection, items: Vocabulary, schema: Schema):
    """(item row, (field, value)), with ids for categorical values; and the sizes of their vocabularies."""
    distinct = values | "Distinct values of items" >> beam.Distinct()
    rows = encode("Rows of items", distinct, items)
    known = rows | "Values of known items" >> beam.Filter(lambda element: element[0] > 0)
    encoded, sizes = [], {}
    for field in schema.side("item"):
        if field.name == ITEM_ID:
            continue
        own = known | f"Values of {field.name}" >> beam.Filter(
            lambda element, name: element[1][0] == name, field.name)
        if field.kind == "categorical":
            texts = own | f"Texts of {field.name}" >> beam.Map(lambda e: (e[1][1], e[0]))
            vocabulary = make_vocabulary(field.name, texts | f"Keys of {field.name}" >> beam.Keys(), 0)
            sizes[field.name] = vocabulary.size
            own = encode(f"Ids of {field.name}", texts, vocabulary) | f"Back to {field.name}" >> beam.Map(
                lambda e, name: (e[1], (name, e[0])), field.name)
        encoded.append(own)
    if not encoded:
        return values.pipeline | "No values of items" >> beam.Create([]), sizes
    return encoded | "Values of items" >> beam.Flatten(), sizes


def write_fact(named: tuple[str, Any], folder: str) -> None:
    """Writes a named fact into a file beside the records, `fact-NAME.json`, for the builder."""
    name, fact = named
    (epath.Path(folder) / f"fact-{name}.json").write_text(json.dumps(fact))


def write_part(named: tuple[str, np.ndarray], folder: str) -> None:
    """Writes a named part of the lengths as its bytes, beside the records, for the builder."""
    name, lengths = named
    (epath.Path(folder) / name).write_bytes(lengths.tobytes())
