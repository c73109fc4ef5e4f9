"""Vocabularies: map text keys to rows numbered from 1; row 0 is padding or an unknown key."""

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.pvalue import AsSingleton, PCollection

SHARES = 1024  # parts of a vocabulary, each numbered by one worker


def stable_hash(text: str) -> int:
    """A hash of 64 bits that is the same in every process, unlike `hash`."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


class Vocabulary(NamedTuple):
    """A mapping from keys to rows, by `ranked` or `hashed`."""

    size: PCollection  # one number: rows, including row 0
    table: PCollection | None  # (key, row) of every known key; None if keys are hashed
    buckets: int = 0  # number of buckets that keys are hashed into


def _share(key: str) -> int:
    return stable_hash(key) % SHARES


def _rank(element: tuple[int, Iterable[str]], sizes: dict[int, int]) -> Iterator[tuple[str, int]]:
    share, keys = element
    first = 1 + sum(size for other, size in sizes.items() if other < share)
    return ((key, first + place) for place, key in enumerate(sorted(keys)))


def ranked(name: str, keys: PCollection, min_count: int = 1) -> Vocabulary:
    """Numbers the distinct keys that occur often enough; the same on every runner.

    Keys are counted and dealt into `SHARES` shares by their hash. In each share they are sorted and numbered,
    starting after all keys of the previous shares. So no worker sees more than one share.
    """
    shared = (keys | f"Count {name}" >> beam.combiners.Count.PerElement()
              | f"Frequent {name}" >> beam.Filter(lambda counted: counted[1] >= min_count)
              | f"Share {name}" >> beam.Map(lambda counted: (_share(counted[0]), counted[0])))
    sizes = (shared | f"Shares of {name}" >> beam.Keys()
             | f"Count shares of {name}" >> beam.combiners.Count.PerElement()
             | f"Sizes of {name}" >> beam.combiners.ToDict())
    table = (shared | f"Group {name}" >> beam.GroupByKey()
             | f"Rank {name}" >> beam.FlatMap(_rank, AsSingleton(sizes)))
    size = sizes | f"Size of {name}" >> beam.Map(lambda counts: 1 + sum(counts.values()))
    return Vocabulary(size, table)


def hashed(name: str, root: beam.Pipeline, buckets: int) -> Vocabulary:
    """Rows 1 to `buckets` by hash: needs no counting and no join, but keys may share a row."""
    return Vocabulary(root | f"Size of {name}" >> beam.Create([1 + buckets]), None, buckets)


def make_vocabulary(name: str, keys: PCollection, buckets: int, min_count: int = 1) -> Vocabulary:
    """`hashed` into `buckets` buckets, or `ranked` if that is 0."""
    return hashed(name, keys.pipeline, buckets) if buckets else ranked(name, keys, min_count)


def keys_by_block(name: str, vocabulary: Vocabulary, block_size: int) -> PCollection:
    """(block number, keys of its rows in their order), from row 1; nothing if keys are hashed."""
    if vocabulary.table is None:
        return vocabulary.size.pipeline | f"No keys of {name}" >> beam.Create([])
    return (vocabulary.table
            | f"Block of {name}" >> beam.Map(lambda entry: ((entry[1] - 1) // block_size, entry[::-1]))
            | f"Block by block {name}" >> beam.GroupByKey()
            | f"Keys of {name}" >> beam.MapTuple(
                lambda block, entries: (block, [key for _, key in sorted(entries)])))


def _hash_key(element: tuple[str, Any], buckets: int) -> tuple[int, Any]:
    return 1 + stable_hash(element[0]) % buckets, element[1]


def _join(element: tuple[str, Iterable[tuple[bool, Any]]]) -> Iterator[tuple[int, Any]]:
    """Iterates twice over the values, which runners stream, and stores none: a key may be very frequent."""
    values = element[1]
    row = next((value for known, value in values if known), 0)
    return ((row, value) for known, value in values if not known)


def encode(label: str, keyed: PCollection, vocabulary: Vocabulary) -> PCollection:
    """(key, value) -> (row, value), with row 0 for an unknown key."""
    if vocabulary.table is None:
        return keyed | label >> beam.Map(_hash_key, vocabulary.buckets)
    known = vocabulary.table | f"{label}: known" >> beam.Map(lambda entry: (entry[0], (True, entry[1])))
    asked = keyed | f"{label}: asked" >> beam.Map(lambda element: (element[0], (False, element[1])))
    return ((known, asked) | f"{label}: flatten" >> beam.Flatten()
            | f"{label}: group" >> beam.GroupByKey() | label >> beam.FlatMap(_join))
