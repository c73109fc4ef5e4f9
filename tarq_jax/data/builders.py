"""tfds builders: store a `Dataset` as block records, and read it back. The only module that imports tfds."""

import contextlib
import dataclasses
import json
import logging
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from tarq_jax.data import movielens, records, sequences, synthetic
from tarq_jax.data.options import Source, fingerprint
from tarq_jax.data.records import Dataset
from tarq_jax.data.schema import Schema, Side

# Extra splits, and the side of the schema that each holds.
TABLES: dict[str, Side] = {"items": "item", "users": "user"}


# tfds has no types, so mypy does not know of this keyword.
class RequestBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Stores what `SOURCE.generate` makes of the options; subclasses only name their source.

    The name of the configuration holds a fingerprint of options and files, so that a change of either is
    prepared anew. Schema and info go into the metadata: a prepared directory describes itself.
    """

    SOURCE: Source
    code_path = None  # no checksums lie beside the code; tfds looks with a package it does not require

    def __init__(self, *, data_dir: str | Path, options: Any):
        """A builder of the data set with these options, to be kept under `data_dir`."""
        self.options = options
        config = tfds.core.BuilderConfig(name=fingerprint(self.SOURCE, options),
                                         description=json.dumps(dataclasses.asdict(options)))
        super().__init__(data_dir=data_dir, config=config)

    @cached_property
    def contents(self) -> Dataset:
        """The generated data set."""
        dataset = self.SOURCE.generate(self.options)
        records.check_dataset(dataset)
        return dataset

    def _info(self) -> tfds.core.DatasetInfo:
        schema = self.contents.schema
        features = {name: tfds.features.Tensor(shape=(None, *shape), dtype=dtype.type, encoding="bytes")
                    for name, (dtype, shape) in records.column_fields(schema).items()}
        metadata = {"schema": schema.to_json(), "info": dict(self.contents.info)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features),
                                     description=self.SOURCE.description,
                                     metadata=tfds.core.MetadataDict(metadata))

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing is downloaded
        tables = {split: self._keyed(records.table_blocks(self.contents.schema, side,
                                                          getattr(self.contents, split)))
                  for split, side in TABLES.items()}
        requests = {split: self._keyed(records.request_blocks(self.contents.schema, requests))
                    for split, requests in self.contents.splits.items()}
        return requests | tables

    def _generate_examples(self, blocks: Iterator[tuple[int, records.Columns]]):
        return blocks

    def _keyed(self, blocks: Iterator[records.Columns]):
        return self._generate_examples((int(block["block"][0]), block) for block in blocks)


class TarqSynthetic(RequestBuilder):
    """`tarq_jax.data.synthetic` as a tfds data set."""

    SOURCE = synthetic.SOURCE
    VERSION = tfds.core.Version(SOURCE.version)


class TarqMovielens(RequestBuilder):
    """`tarq_jax.data.movielens` as a tfds data set."""

    SOURCE = movielens.SOURCE
    VERSION = tfds.core.Version(SOURCE.version)


class TarqSequences(RequestBuilder):
    """`tarq_jax.data.sequences` as a tfds data set."""

    SOURCE = sequences.SOURCE
    VERSION = tfds.core.Version(SOURCE.version)


_BUILDERS = {cls.SOURCE.name: cls for cls in (TarqSynthetic, TarqMovielens, TarqSequences)}


def _is_prepared(directory: Path) -> bool:
    """tfds renames a directory into place only when it is complete; interrupted ones keep another name."""
    return (directory / "dataset_info.json").is_file()


def prepare(name: str, data_dir: str | Path, options: Any) -> Path:
    """The directory of the prepared data set, which is generated first unless it is there.

    Args:
      name: a key of `tarq_jax.data.BUILDERS`.
      data_dir: where prepared data sets are kept.
      options: options of that source.

    Returns:
      `data_dir/tarq_<name>/<fingerprint>/<version>`.
    """
    cls = _BUILDERS[name]
    data_dir = Path(data_dir).expanduser().resolve()
    directory = data_dir / cls.name / fingerprint(cls.SOURCE, options) / str(cls.VERSION)
    if not _is_prepared(directory):
        logging.getLogger(__name__).info("preparing %s in %s", cls.name, directory)
        try:
            _generate(cls, data_dir, options)
        except OSError:
            if not _is_prepared(directory):  # else another process was faster
                raise
    return directory


def _generate(cls: type[RequestBuilder], data_dir: Path, options: Any) -> None:
    """Runs a builder quietly: tfds prints to stdout, which belongs to the results of commands."""
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(sys.stderr):
        cls(data_dir=data_dir, options=options).download_and_prepare(file_format="array_record")


def read(directory: str | Path) -> Dataset:
    """Reads a prepared directory, which needs neither its source nor its options; checks every id."""
    directory = Path(directory)
    if not _is_prepared(directory):
        raise FileNotFoundError(f"{directory} holds no prepared data set, expected dataset_info.json in it")
    builder = tfds.builder_from_directory(directory)
    metadata = json.loads((directory / "metadata.json").read_text())
    schema = Schema.from_json(metadata["schema"])
    splits = {split: _blocks(builder, split) for split in builder.info.splits}
    tables = {split: records.table_from_blocks(schema, side, splits.pop(split))
              for split, side in TABLES.items()}
    requests = {split: records.requests_from_blocks(schema, splits[split]) for split in sorted(splits)}
    dataset = Dataset(schema, tables["items"], tables["users"], requests, metadata["info"])
    records.check_dataset(dataset)
    return dataset


def _blocks(builder: tfds.core.DatasetBuilder, split: str) -> list[dict[str, np.ndarray]]:
    source = builder.as_data_source(split)
    return [source[index] for index in range(len(source))]
