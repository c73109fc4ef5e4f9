"""tfds builders: store a `Dataset` as block records and read it back. The only module that imports tfds."""

import contextlib
import dataclasses
import functools
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from tarq_jax.data import records
from tarq_jax.data.lengths import lengths_file, read_lengths, write_lengths
from tarq_jax.data.records import Dataset
from tarq_jax.data.rows import RowReport, check_report, merge_reports
from tarq_jax.data.sources import AnySource, PipelineSource, Source, fingerprint
from tarq_jax.data.stored import StoredRequests
from tarq_jax.reporting import replacing
from tarq_jax.schema import Schema, Side

# Splits that hold a table, and the side of the schema that each holds.
TABLES: dict[str, Side] = {"items": "item", "users": "user"}
LOCAL = ("--runner=FnApiRunner",)  # the runner that DirectRunner uses if it can download none


# tfds has no type annotations, so mypy does not know this keyword.
class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """What both builders share.

    The configuration is named by a fingerprint of options and files, so that a change of either is prepared
    as a new data set. Schema, info and fingerprint are in the metadata: a prepared directory describes
    itself.
    """

    code_path = None  # no checksum files beside the code; tfds would look for them with an optional package

    def __init__(self, *, data_dir: str | Path, source: AnySource, options: Any):
        """A builder for the data set that the source makes from the options, stored under `data_dir`."""
        self.source, self.options, self.name = source, options, _name(source)
        config = tfds.core.BuilderConfig(name=fingerprint(source, options), version=source.version,
                                         description=json.dumps(dataclasses.asdict(options)))
        super().__init__(data_dir=data_dir, config=config)

    def _make_info(self, schema: Schema, metadata: dict[str, Any]) -> tfds.core.DatasetInfo:
        features = {name: tfds.features.Tensor(shape=(None, *shape), dtype=dtype.type, encoding="bytes")
                    for name, (dtype, shape) in records.column_fields(schema).items()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features),
                                     description=self.source.description,
                                     disable_shuffling=True,  # keeps record n = block n
                                     metadata=tfds.core.MetadataDict(
                                         metadata, fingerprint=self.builder_config.name))

    def _generate_examples(self, blocks: Iterator[tuple[int, records.Columns]]):
        return blocks


class RequestBuilder(_Builder, skip_registration=True):  # type: ignore[call-arg]
    """Stores the data set that `Source.generate` makes from the options."""

    source: Source

    @functools.cached_property
    def contents(self) -> Dataset:
        """The generated data set."""
        dataset = self.source.generate(self.options)
        records.check_dataset(dataset)
        return dataset

    def _info(self) -> tfds.core.DatasetInfo:
        contents = self.contents
        blocks = {split: records.describe_blocks(requests.read((0,)))
                  for split, requests in contents.splits.items()}
        return self._make_info(contents.schema, {"schema": contents.schema.to_json(),
                                                 "info": dict(contents.info), "blocks": blocks,
                                                 "item_ids": _listed(contents.item_ids)})

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing is downloaded
        schema = self.contents.schema
        tables = {split: self._keyed(records.table_blocks(schema, side, getattr(self.contents, split)))
                  for split, side in TABLES.items()}
        requests = {split: self._keyed(records.request_blocks(schema, requests.read((0,))))
                    for split, requests in self.contents.splits.items()}
        return requests | tables

    def _download_and_prepare(self, *arguments: Any, **keywords: Any) -> None:
        super()._download_and_prepare(*arguments, **keywords)
        for split, requests in self.contents.splits.items():
            lengths = np.diff(requests.read((0,)).history_offsets)
            write_lengths(lengths_file(Path(self.data_path), split), [lengths], len(lengths),
                          requests.longest_history)

    def _keyed(self, blocks: Iterator[records.Columns]):
        return self._generate_examples((int(block["block"][0]), block) for block in blocks)


class PipelineBuilder(_Builder, skip_registration=True):  # type: ignore[call-arg]
    """Runs the pipeline of a `PipelineSource` on a Beam runner.

    The pipeline writes the facts that only it can find, such as sizes of vocabularies, to files beside the
    records, where workers can write in any case. The builder then moves them into the metadata. In the same
    way it joins the lengths of histories, which may be too many for the memory of one worker.
    """

    source: PipelineSource

    def _info(self) -> tfds.core.DatasetInfo:
        return self._make_info(self.source.schema(self.options), {})

    def _split_generators(self, dl_manager, pipeline):
        del dl_manager  # nothing is downloaded
        import apache_beam as beam

        from tarq_jax.data.beam.plan import plan_source, write_fact, write_part

        plan = plan_source(self.source, pipeline, self.options)
        self._facts = self.data_path
        _ = plan.facts | "Write facts" >> beam.Map(write_fact, str(self._facts))
        _ = plan.lengths | "Write lengths" >> beam.Map(write_part, str(self._facts))
        return plan.splits

    def _download_and_prepare(self, *arguments: Any, **keywords: Any) -> None:
        super()._download_and_prepare(*arguments, **keywords)
        facts: dict[str, dict[str, Any]] = {"blocks": {}, "size": {}, "rows": {}, "ids": {}}
        for path in sorted(self._facts.glob("fact-*.json")):
            _, kind, key = path.stem.split("-", 2)
            facts[kind][key] = json.loads(path.read_text())
            path.unlink()
        for split, described in facts["blocks"].items():
            self._join_lengths(split, sum(described["sizes"]), described["longest_history"])
        schema = self.source.schema(self.options)
        fields = [dataclasses.replace(field, size=facts["size"].get(field.name, field.size))
                  for field in schema.fields]
        reports = [RowReport.from_json(report) for report in facts["rows"].values()]
        for report in reports:
            check_report(report, Path(self.options.source), self.options.max_bad_fraction)
        keys = [key for block in sorted(facts["ids"], key=int) for key in facts["ids"][block]]
        self.info.metadata.update({
            "schema": Schema(tuple(fields)).to_json(), "blocks": facts["blocks"],
            "info": {"rows": merge_reports(reports).to_json()},
            "item_ids": _ids(keys)})

    def _join_lengths(self, split: str, count: int, longest: int) -> None:
        parts = sorted(self._facts.glob(f"lengths-{split}-*"))
        write_lengths(lengths_file(Path(self.data_path), split),
                      (np.frombuffer(path.read_bytes(), "<u4") for path in parts), count, longest)
        for path in parts:
            path.unlink()


def _listed(ids: np.ndarray | None) -> list[int] | None:
    return None if ids is None else np.asarray(ids).tolist()


def _ids(keys: list[str]) -> list[int] | list[str] | None:
    """Ids of all rows from the keys of rows 1 on: numbers if each key is one; None if no keys were kept."""
    if not keys:
        return None
    if all(key.isascii() and key.isdigit() and len(key) < 19 and key == str(int(key)) for key in keys):
        return [0, *map(int, keys)]
    return ["", *keys]


def _name(source: AnySource) -> str:
    return f"tarq_{source.name}"


def _is_prepared(directory: Path) -> bool:
    """tfds renames a directory to its final name only when it is complete."""
    return (directory / "dataset_info.json").is_file()


def prepare(
    source: AnySource, data_dir: str | Path, options: Any, beam_arguments: Sequence[str] = (),
) -> Path:
    """Prepares a data set unless its directory exists already, and returns the directory.

    Args:
      source: what makes the data set.
      data_dir: directory of prepared data sets.
      options: options of that source.
      beam_arguments: arguments of the runner, such as `--runner=DataflowRunner`, for a source that a pipeline
        prepares; without any, it runs in this process.

    Returns:
      `data_dir/tarq_<name>/<fingerprint>/<version>`.

    Raises:
      ValueError: too many rows are malformed, or a pipeline is needed and Beam is not installed.
    """
    root = epath.Path(data_dir).expanduser().resolve()
    directory = root / _name(source) / fingerprint(source, options) / source.version
    if not _is_prepared(directory):
        logging.getLogger(__name__).info("preparing %s in %s", source.name, directory)
        try:
            _generate(source, root, options, beam_arguments)
        except OSError:
            if not _is_prepared(directory):  # otherwise another process has prepared it meanwhile
                raise
    if isinstance(source, Source):
        _add_item_ids(Path(directory), source, options)
    return Path(directory)


def _add_item_ids(directory: Path, source: Source, options: Any) -> None:
    """Adds the ids of items to what was prepared before they were kept; all else in it is as it was."""
    path = directory / "metadata.json"
    with _readable(directory):
        metadata = json.loads(path.read_text())
        if "item_ids" in metadata:
            return
    metadata["item_ids"] = _listed(source.generate(options).item_ids)
    with replacing(path) as written:
        written.write_text(json.dumps(metadata))


def _beam_options(source: AnySource, arguments: Sequence[str]) -> Any:
    if isinstance(source, Source):
        return None
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise ValueError(f"data set {source.name!r} is prepared by Apache Beam, which is not installed: "
                         "pip install 'tarq_jax[beam]', or prepare it elsewhere and set "
                         "--config.data.prepared=DIR") from None
    return PipelineOptions(list(arguments or LOCAL))


def _generate(source: AnySource, data_dir: Path, options: Any, beam_arguments: Sequence[str]) -> None:
    """Runs a builder quietly: tfds prints to stdout, which belongs to the results of commands."""
    download = tfds.download.DownloadConfig(beam_options=_beam_options(source, beam_arguments))
    builder = RequestBuilder if isinstance(source, Source) else PipelineBuilder
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(sys.stderr):
        builder(data_dir=data_dir, source=source, options=options).download_and_prepare(
            file_format="array_record", download_config=download)


def read(directory: str | Path, *, stream: bool = False) -> Dataset:
    """Reads a prepared directory and checks every id; source files and options are not needed.

    Args:
      directory: directory that `prepare` returned.
      stream: leave requests on disk; their ids are checked as they are read.

    Raises:
      FileNotFoundError: the directory holds no prepared data set.
      ValueError: an id is out of range, or files are damaged.
    """
    directory = Path(directory)
    if not _is_prepared(directory):
        raise FileNotFoundError(f"{directory} holds no prepared data set, expected dataset_info.json in it")
    with _readable(directory):
        builder = tfds.builder_from_directory(directory)
        metadata = json.loads((directory / "metadata.json").read_text())
        schema = Schema.from_json(metadata["schema"])
        tables = {split: records.table_from_blocks(schema, side, _blocks(builder, split))
                  for split, side in TABLES.items()}
        splits: dict[str, records.Split] = {}
        for split in sorted(set(builder.info.splits) - set(TABLES)):
            if stream:
                facts = metadata["blocks"][split] | {"sizes": tuple(metadata["blocks"][split]["sizes"])}
                splits[split] = StoredRequests(schema, builder.as_data_source(split), **facts, name=split,
                                               num_users=records.num_users(tables["users"]),
                                               history_lengths=read_lengths(lengths_file(directory, split)))
            else:
                splits[split] = records.requests_from_blocks(schema, _blocks(builder, split))
        ids = metadata.get("item_ids")
        if ids is not None:
            ids = np.array(ids, np.dtypes.StringDType() if isinstance(ids[0], str) else np.int64)
        dataset = Dataset(schema, tables["items"], tables["users"], splits, metadata["info"],
                          fingerprint=metadata["fingerprint"], item_ids=ids)
    records.check_dataset(dataset)
    return dataset


@contextlib.contextmanager
def _readable(directory: Path) -> Iterator[None]:
    """Turns whatever TFDS, JSON or ArrayRecord raise for damaged files into a ValueError with the folder."""
    try:
        yield
    except (MemoryError, OSError):  # the files are not damaged; an OSError names its path
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{directory} is damaged ({type(error).__name__}: {reason}), expected a prepared "
                         "data set; delete it and prepare it again") from error


def _blocks(builder: tfds.core.DatasetBuilder, split: str) -> list[dict[str, np.ndarray]]:
    source = builder.as_data_source(split)
    return source.__getitems__(range(len(source)))
