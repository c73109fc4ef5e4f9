"""Data sets for pre-ranking: schema, sources, block records and the input pipeline.

Example::

    dataset = load("synthetic", data_dir="/tmp/data", train_requests=1000)
    for batch in train_batches(dataset, "train", batch_size=64, history_length=50, num_candidates=16, seed=0):
        ...
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tarq_jax import user_code
from tarq_jax.data import impressions, movielens, sequences, synthetic, taobao_ads, taobao_userbehavior
from tarq_jax.data.collate import collate
from tarq_jax.data.hashing import hash_ids
from tarq_jax.data.movielens import MovielensOptions
from tarq_jax.data.order import Shard
from tarq_jax.data.pipeline import Shapes, count_candidates, eval_batches, item_batches, train_batches
from tarq_jax.data.prefetching import prefetch
from tarq_jax.data.records import Dataset, Requests, Split, check_dataset, hash_of, typed
from tarq_jax.data.sequences import SequencesOptions
from tarq_jax.data.sources import AnySource, PipelineSource, Source, make_options
from tarq_jax.data.stored import StoredRequests
from tarq_jax.data.synthetic import SyntheticOptions
from tarq_jax.schema import ITEM_ID, Field, Schema, check_column, check_columns

BUILDERS: Mapping[str, AnySource] = {source.name: source for source in (
    synthetic.SOURCE, movielens.SOURCE, sequences.SOURCE, taobao_userbehavior.SOURCE, taobao_ads.SOURCE,
    impressions.SOURCE)}


def load(name: str, *, data_dir: str | Path, stream: bool = False, prepared: str = "",
         **options: Any) -> Dataset:
    """Reads a data set, and prepares it first if that has not been done.

    Args:
      name: a key of `BUILDERS`, or MODULE:FUNCTION, a function that makes a `Dataset` from its options on
        each call.
      data_dir: directory of prepared data sets; safe to share and to delete.
      stream: leave requests on disk and read them as batches are made, for data larger than memory.
      prepared: a prepared directory to read instead, as `load_prepared` does; `name` and options are ignored.
      **options: options of that data set, for example those of `SyntheticOptions`.

    Returns:
      The data set in memory; with `stream`, its requests stay on disk.

    Raises:
      ValueError: the name or an option is unknown, an option is out of range, or too many rows are malformed.
      FileNotFoundError: the source files are missing.
    """
    if ":" in name and not prepared:
        return _load_own(name, stream, options)
    return load_prepared(prepared or prepare(name, data_dir=data_dir, **options), stream=stream)


def _load_own(name: str, stream: bool, options: Mapping[str, Any]) -> Dataset:
    if stream:
        raise ValueError(f"config.data.stream is True, expected False with config.data.name={name!r}: what a "
                         "function makes is in memory")
    dataset = user_code.call("config.data.name", name, Dataset, **options)
    if missing := {"train", "test"} - dataset.splits.keys():
        raise ValueError(f"{name} gives the splits {sorted(dataset.splits)}, expected {sorted(missing)} too")
    check_dataset(dataset)
    dataset = typed(dataset)
    return dataset if dataset.fingerprint else dataclasses.replace(dataset, fingerprint=hash_of(dataset))


def prepare(name: str, *, data_dir: str | Path, beam_arguments: Sequence[str] = (), **options: Any) -> Path:
    """Prepares a data set if necessary, and returns the directory that `load_prepared` reads.

    Args:
      name: a key of `BUILDERS`.
      data_dir: directory of prepared data sets; if Beam runs on other machines, one that all of them see.
      beam_arguments: arguments of the runner, for a source that Apache Beam prepares; without any, it runs in
        this process.
      **options: options of that data set.

    Raises:
      ValueError: as for `load`, or Beam is needed and not installed.
      FileNotFoundError: the source files are missing.
    """
    if name not in BUILDERS:
        raise ValueError(f"data set is {name!r}, expected one of {sorted(BUILDERS)}; MODULE:FUNCTION of your "
                         "own needs no preparation")
    values = make_options(BUILDERS[name], options)
    from tarq_jax.data import builders  # imported here because it takes seconds

    return builders.prepare(BUILDERS[name], data_dir, values, beam_arguments)


def load_prepared(directory: str | Path, *, stream: bool = False) -> Dataset:
    """Reads a prepared directory, `data_dir/tarq_<name>/<fingerprint>/<version>`; needs no source files."""
    from tarq_jax.data import builders

    return builders.read(directory, stream=stream)


__all__ = [
    "BUILDERS",
    "ITEM_ID",
    "Dataset",
    "Field",
    "MovielensOptions",
    "PipelineSource",
    "Requests",
    "Schema",
    "SequencesOptions",
    "Shapes",
    "Shard",
    "Source",
    "Split",
    "StoredRequests",
    "SyntheticOptions",
    "check_column",
    "check_columns",
    "check_dataset",
    "collate",
    "count_candidates",
    "eval_batches",
    "hash_ids",
    "item_batches",
    "load",
    "load_prepared",
    "prefetch",
    "prepare",
    "train_batches",
]
