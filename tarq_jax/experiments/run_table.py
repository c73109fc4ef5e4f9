"""The table of a study: one row per run, in a Parquet file that is written anew with each addition.

A row holds all that a study keeps of a run: the columns that identify it (`SAME`), its metrics, what a report
draws (`MEASURED`), and where its numbers come from. To move a study, copy the file; rows of two tables can be
joined.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_collections

from tarq_jax.config import WITHOUT_EFFECT, own_code
from tarq_jax.reporting import lock, replacing

Row = Mapping[str, Any]

FILE = "runs.parquet"
KEYS = ("variant", "seed")
SAME = ("settings", "data", "seed")  # runs that agree in these are the same run
# [U] each user's influence on the AUC, validation AUC by step, and the configuration as JSON.
MEASURED = ("influence", "curve_step", "curve_auc", "config")
COLUMNS = {*KEYS, *SAME, "model", "auc", *MEASURED}  # that every row has


def has_effect(name: str) -> bool:
    """Whether a setting, such as `model.width`, can change what is trained; the seed is kept apart."""
    return name != "seed" and name not in WITHOUT_EFFECT


def settings_hash(config: ml_collections.ConfigDict) -> str:
    """A short hash of what a run's numbers depend on, beside seed and data: settings and own code."""
    settings = {key: value for key, value in described(config).items() if has_effect(key)}
    settings |= own_code(config)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def described(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The configuration as a row stores it: all settings except where and how data are read."""
    settings = json.loads(config.to_json())
    settings["data"] = {key: value for key, value in settings["data"].items() if has_effect(f"data.{key}")}
    return settings


def read(path: Path) -> list[dict[str, Any]]:
    """All rows; none if there is no file.

    Raises:
      ValueError: the file is damaged, or no table of a study.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.exists():
        return []
    try:
        rows = pq.read_table(path, page_checksum_verification=True).to_pylist()
    except (OSError, pa.ArrowException, ValueError) as error:  # ValueError: bytes that are no valid text
        raise ValueError(f"{path} cannot be read as Parquet: {error}; move it away to begin anew") from error
    if rows and (missing := COLUMNS - rows[0].keys()):
        raise ValueError(f"{path} has no columns {sorted(missing)}, expected the table of a study")
    return [{key: value for key, value in row.items() if value is not None} for row in rows]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keeps other processes from writing the table meanwhile, if the system has file locks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as file:
        lock(file, wait=True)
        yield


def add(path: Path, rows: Sequence[Row]) -> None:
    """Adds rows to the table; a new row replaces one of the same variant and seed."""
    with _locked(path):
        new = {tuple(row[key] for key in KEYS) for row in rows}
        write(path, [row for row in read(path) if tuple(row[key] for key in KEYS) not in new] + list(rows))


def write(path: Path, rows: Sequence[Row]) -> None:
    """Replaces the table; its columns are all that any row has."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = dict.fromkeys(key for row in rows for key in row)
    with replacing(path) as written:
        table = pa.Table.from_pylist([{key: row.get(key) for key in columns} for row in rows])
        split: list[str] = []  # columns with nearly all of the bytes; splitting these saves a third of them
        if "influence" in columns:
            place = table.schema.get_field_index("influence")
            table = table.set_column(place, "influence", table["influence"].cast(pa.list_(pa.float32())))
            split = ["influence.list.element"]
        pq.write_table(table, written, compression="zstd", use_dictionary=False, use_byte_stream_split=split,
                       write_page_checksum=True)


def same(row: Row) -> tuple[Any, ...]:
    """The values that identify a run, whatever its variant is called."""
    return tuple(row[key] for key in SAME)


def find(rows: Sequence[Row], like: Row) -> Row | None:
    """The row of the same run as `like`; None if there is none."""
    return next((row for row in rows if same(row) == same(like)), None)
