"""What all data sources share: options, their validation, files to read, and the fingerprint."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tarq_jax.data.records import Dataset
from tarq_jax.schema import Schema

FIRST_VERSION = "1.0.0"  # first version of a source; fingerprints include only later versions
MOST_SAMPLES = 64  # of a file, of 1 MiB each, whose hash tells whether it changed
FORMAT = 2  # of prepared directories; raise it if the same data are stored in another way


@dataclasses.dataclass(frozen=True)
class Source:
    """A kind of data set that is made in memory: a function from its options to a `Dataset`."""

    name: str
    options: type  # frozen dataclass of options; its __post_init__ validates them
    generate: Callable[[Any], Dataset]  # options -> Dataset, deterministic in options and files
    files: Callable[[Any], Mapping[str, Path]]  # options -> files that are read, by role
    version: str = FIRST_VERSION  # raise it if the same options give other data than before
    description: str = ""


@dataclasses.dataclass(frozen=True)
class PipelineSource:
    """A kind of data set that Apache Beam prepares; its size is not limited by memory."""

    name: str
    options: type  # a subclass of `LogOptions`
    schema: Callable[[Any], Schema]  # options -> fields; sizes that the pipeline will find are 1
    parts: Callable[[Any, Any], Any]  # (beam.Pipeline, options) -> beam.forms.Parts
    files: Callable[[Any], Mapping[str, Path]]  # options -> files that are read, by role
    version: str = FIRST_VERSION  # raise it if the same options give other data than before
    description: str = ""


AnySource = Source | PipelineSource


def path_option(**keywords: Any) -> Any:
    """A dataclass field for a path; it says where the data is, so fingerprints leave it out."""
    return dataclasses.field(metadata={"path": True}, **keywords)


def require(valid: bool, option: str, value: Any, expected: str) -> None:
    """Raises ValueError unless `valid`; names the option as a setting, its value and what was expected."""
    if not valid:
        raise ValueError(f"config.data.{option} is {value!r}, expected {expected}")


def require_at_least(options: Any, **minimum: int) -> None:
    """`require` for integer options with a minimum, for example `require_at_least(options, seed=0)`."""
    for name, smallest in minimum.items():
        value = getattr(options, name)
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        require(is_integer and value >= smallest, name, value, f"an integer of at least {smallest}")


def require_fraction(options: Any, *names: str) -> None:
    """`require` for options in [0, 1)."""
    for name in names:
        value = getattr(options, name)
        require(isinstance(value, int | float) and 0 <= value < 1, name, value, "a number in [0, 1)")


@dataclasses.dataclass(frozen=True)
class LogOptions:
    """Options of every source that a pipeline prepares from a log of events."""

    source: str = path_option()  # file or pattern of files; a folder if there are several kinds of files
    history_length: int = 50
    validation_start: int = 0  # seconds; requests before it are training
    test_start: int = 0  # seconds; requests from then on are test, those before it validation
    min_history: int = 1  # requests with fewer events before them are left out
    num_negatives: int = 0  # negatives per request, drawn by popularity in training
    item_buckets: int = 0  # buckets that items are hashed into; 0 gives each item its own row
    min_count: int = 1  # an item with fewer occurrences is unknown
    max_user_events: int = 10_000  # how many of a user's last events are kept
    seed: int = 0
    max_bad_fraction: float = 0.01  # malformed rows allowed per kind of file, as a fraction

    def __post_init__(self):
        require_at_least(self, history_length=1, min_history=0, num_negatives=0, item_buckets=0, min_count=1,
                         max_user_events=1, seed=0, test_start=0)
        require(self.validation_start <= self.test_start, "test_start", self.test_start,
                f"at least config.data.validation_start, {self.validation_start}")
        require_fraction(self, "max_bad_fraction")


def make_options(source: AnySource, values: Mapping[str, Any]) -> Any:
    """The options of `source` with these values.

    Raises:
      ValueError: a name is unknown, a value is missing, or a value is not the text that it should be: flags
        of options that a configuration does not set are read as Python literals.
    """
    types = {field.name: field.type for field in dataclasses.fields(source.options)}
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"data set {source.name!r} has no option {name!r}, expected one of "
                             f"{list(types)}")
        if types[name] is str and not isinstance(value, str | os.PathLike):
            raise ValueError(f"config.data.{name} is {value!r}, expected text, for example by "
                             f"--config.data.{name}='\"{value}\"'")
    missing = [field.name for field in dataclasses.fields(source.options)
               if field.default is dataclasses.MISSING and field.name not in values]
    if missing:
        raise ValueError(f"data set {source.name!r} needs option {missing[0]!r}, "
                         f"to be set by --config.data.{missing[0]}=...")
    return source.options(**values)


def require_file(path: str | Path, option: str, expected: str) -> Path:
    """`path` if it is a file; else FileNotFoundError with what was expected and how to set it."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: expected {expected}; set it by --config.data.{option}=FILE")
    return path


def matching_files(pattern: str, option: str, expected: str) -> dict[str, Path]:
    """The files of a path or glob, local or remote, by name; FileNotFoundError if there are none."""
    from etils import epath

    path = epath.Path(pattern).expanduser()
    files = {found.name: found for found in sorted(path.parent.glob(path.name))}
    if not files:
        raise FileNotFoundError(f"no file {pattern}: expected {expected}; "
                                f"set it by --config.data.{option}=FILE")
    return files


def fingerprint(source: AnySource, options: Any) -> str:
    """A name for prepared data: a hash of the source's version, the options and the contents of the files.

    Paths are not part of it, so a moved folder is not prepared again. For files that a pipeline reads, which
    may be huge, only the size and `MOST_SAMPLES` samples are hashed, which are all of a file up to 64 MiB.
    """
    mark: Callable[[Path], Any] = _file_hash if isinstance(source, Source) else _file_samples
    files = {role: mark(path) for role, path in sorted(source.files(options).items())}
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)
              if not field.metadata.get("path")}
    version = [] if source.version == FIRST_VERSION else [source.version]
    text = json.dumps([FORMAT, source.name, values, files, *version], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_samples(path: Path, size: int = 1 << 20) -> list[Any]:
    """The length of a file and a hash of evenly spaced samples of `size` bytes, its two ends among them."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        length = file.seek(0, os.SEEK_END)
        for start in np.linspace(0, max(length - size, 0), min(-(-length // size), MOST_SAMPLES)):
            file.seek(int(start))
            digest.update(file.read(size))
    return [length, digest.hexdigest()]
