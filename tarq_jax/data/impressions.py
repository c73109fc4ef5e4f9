"""Logs of impressions with named columns, from any system; also the way to read the paper's own data.

The data set published with arXiv 2509.16931 (zyody/TARQ_dataset on Hugging Face) was not accessible when
this module was written, so its columns and encoding are unknown here, and nothing below claims to be its
form. The module supports a form into which that data set, like most logs, can be brought by renaming columns:
text files with a header,

- impressions: user, time (seconds), item, label (0 or 1), and any further columns as features. Rows with the
  same user, time and context form a request.
- behaviors, optional: user, time, item, and further columns as features of history events. Without them,
  the impressions with label 1 are the history.

Options name the columns. All features are categorical and read as text; an empty feature is unknown. Item
features get one row per value; user, request and event features are hashed into `feature_buckets`.
"""

import csv
import dataclasses
from pathlib import Path
from typing import Any

from tarq_jax.data.sources import (
    LogOptions,
    PipelineSource,
    matching_files,
    path_option,
    require,
    require_at_least,
)
from tarq_jax.schema import ITEM_ID, Field, Schema


@dataclasses.dataclass(frozen=True)
class ImpressionsOptions(LogOptions):
    """Paths of the data and names of its columns; several names are separated by commas."""

    behaviors: str = path_option(default="")  # file or pattern; "": clicked impressions are the history
    delimiter: str = ","
    user_column: str = "user_id"
    time_column: str = "timestamp"
    item_column: str = "item_id"
    label_column: str = "label"
    item_features: str = ""  # columns of impressions
    user_features: str = ""  # columns of impressions
    context_features: str = ""  # columns of impressions
    event_features: str = ""  # columns of behaviors
    feature_buckets: int = 10_000

    def __post_init__(self):
        super().__post_init__()
        require_at_least(self, feature_buckets=1)
        require(len(self.delimiter) == 1, "delimiter", self.delimiter, "one character")
        require(bool(self.behaviors) or not self.event_features, "event_features", self.event_features,
                "'' without behaviors")


def names(text: str) -> list[str]:
    """The names in an option, which separates them by commas."""
    return [name for name in text.split(",") if name]


def make_schema(options: ImpressionsOptions) -> Schema:
    """The fields: item features have vocabularies; all other features are hashed into buckets."""
    fields = [Field(name, "item", "categorical") for name in (ITEM_ID, *names(options.item_features))]
    size = 1 + options.feature_buckets
    fields += [Field(name, "user", "categorical", size) for name in names(options.user_features)]
    fields += [Field(name, "context", "categorical", size) for name in names(options.context_features)]
    return Schema((*fields, *(Field(f"event_{name}", "event", "categorical", size)
                              for name in names(options.event_features))))


def read_header(pattern: str, option: str, delimiter: str, needed: list[str]) -> dict[str, int]:
    """The position of each column by name, from the header of the files, which must be the same in all.

    Raises:
      ValueError: a column in `needed` is missing, or the headers differ; an empty file needs no header.
    """
    path, *others = matching_files(pattern, option, "text with a header").values()
    columns = _columns(path, delimiter)
    missing = [name for name in needed if name not in columns]
    if missing:
        raise ValueError(f"{path}: no column {missing[0]!r} in its first line, found {columns}; options of "
                         "the data set, such as item_column, name the columns")
    for other in others:
        found = _columns(other, delimiter)
        if found and found != columns:
            raise ValueError(f"{other}: the columns in its first line are {found}, expected those of "
                             f"{path.name}, {columns}")
    return {name: place for place, name in enumerate(columns)}


def _columns(path: Path, delimiter: str) -> list[str]:
    with path.open("r", encoding="utf-8") as file:
        return [name.strip() for name in next(csv.reader([file.readline()], delimiter=delimiter))]


def _files(options: ImpressionsOptions):
    files = matching_files(options.source, "source", "impressions as text with a header")
    if options.behaviors:
        files |= {f"behaviors/{name}": path for name, path in matching_files(
            options.behaviors, "behaviors", "behaviors as text with a header").items()}
    return files


def _parts(root: Any, options: ImpressionsOptions) -> Any:
    from tarq_jax.data.beam import impressions  # imported here because Beam is an extra

    return impressions.parts(root, options)


SOURCE = PipelineSource("impressions", ImpressionsOptions, make_schema, _parts, _files,
                        description="Impressions and behaviors from text files with named columns.")
