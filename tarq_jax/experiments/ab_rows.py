"""Rows of an A/B test: reading them from CSV or Parquet, checking them, and simulating some."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tarq_jax import reporting
from tarq_jax.data.rows import NUM_SAMPLES, RowReport, check_report

KEYS = ("user", "arm")
COUNTS = ("impressions", "clicks", "orders", "revenue")
USERS = "users"  # that a row counts; 1 where the column is missing
BEFORE = tuple(f"pre_{name}" for name in COUNTS)  # of the same users, before the test
MOST_USERS = 2**40  # of a row, so that sums of all rows are exact
LONGEST_TEXT = 200  # characters of a row in a report
TORN = "columns are not those of the header"


class Table(NamedTuple):
    """Good rows, one per user or bucket."""

    arms: tuple[str, ...]  # names, sorted
    arm: np.ndarray  # [U] index of each user's arm
    columns: Mapping[str, np.ndarray]  # `COUNTS`, `USERS`, and what the file has of `BEFORE`: [U] float64

    def of(self, arm: int) -> dict[str, np.ndarray]:
        """The columns of one arm's users."""
        chosen = self.arm == arm
        return {name: values[chosen] for name, values in self.columns.items()}


def read(path: Path, *, max_bad_fraction: float = 0.0) -> tuple[Table, RowReport]:
    """Reads a file with a header and one row per user or bucket.

    A row is bad if a key is empty, if a number is missing, not finite or negative, if it counts no user or a
    fraction of one, or if its columns are not those of the header. A row with more clicks than impressions is
    not bad: clicks can arrive a day later.

    Args:
      path: Parquet if it ends in `.parquet`, else CSV.
      max_bad_fraction: largest share of bad rows, which are left out.

    Returns:
      The good rows, and the report on all rows.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file cannot be read or is empty, a column is missing or there twice, a user is there
        twice, there are fewer than two arms, or too many rows are bad; names the file and the cause.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: expected rows of an A/B test in CSV or Parquet")
    table, torn = _parquet(path) if path.suffix == ".parquet" else _csv(path)
    missing = [name for name in (*KEYS, *COUNTS) if name not in table.column_names]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]!r}, expected {', '.join((*KEYS, *COUNTS))}; it "
                         f"has {', '.join(table.column_names)}")
    _check_names(path, table.column_names)
    if not table.num_rows:
        raise ValueError(f"{path} has no rows, expected one a user")
    names = [*COUNTS, *(name for name in (USERS, *BEFORE) if name in table.column_names)]
    keys = {name: _text(path, name, table[name]) for name in KEYS}
    reasons = np.full(table.num_rows, "", dtype=object)
    for name in KEYS:
        reasons[(keys[name] == "") & (reasons == "")] = f"{name} is empty"
    columns = {}
    for name in names:
        columns[name] = _numbers(table[name])
        reasons[~np.isfinite(columns[name]) & (reasons == "")] = f"{name} is not a finite number"
        reasons[(columns[name] < 0) & (reasons == "")] = f"{name} is negative"
    users = columns.setdefault(USERS, np.ones(table.num_rows))
    countable = (users >= 1) & (users <= MOST_USERS) & (users == np.floor(users))
    reasons[~countable & (reasons == "")] = f"{USERS} is not a positive whole number"
    report = _report(table, path, reasons, torn)
    check_report(report, path, max_bad_fraction)
    good = reasons == ""
    _check_users(path, keys["user"][good])
    arms, arm = np.unique(keys["arm"][good].astype(str), return_inverse=True)
    if len(arms) < 2:
        raise ValueError(f"{path}: column 'arm' has {list(map(str, arms))}, expected at least two arms")
    return Table(tuple(map(str, arms)), arm, {name: values[good] for name, values in columns.items()}), report


def _check_names(path: Path, names: Sequence[str]) -> None:
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise ValueError(f"{path} has more than one column {twice[0]!r}, expected one of each name")


def _parquet(path: Path) -> tuple[Any, list[str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        _check_names(path, pq.read_schema(path).names)  # the reader would refuse them in other words
        return pq.read_table(path), []
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error


def _csv(path: Path) -> tuple[Any, list[str]]:
    """The table with all columns as text, and the rows that have more or fewer columns than the header."""
    import pyarrow as pa
    from pyarrow import csv

    torn: list[str] = []

    def skip(row: Any) -> str:
        torn.append(row.text or "")
        return "skip"

    try:
        with path.open(encoding="utf-8-sig") as file:
            header = next(iter(file), "").rstrip("\r\n").split(",")
        as_text = csv.ConvertOptions(column_types={name.strip('"'): pa.string() for name in header})
        # An Arrow thread that still held `skip` at the end of the interpreter would abort the process.
        table = csv.read_csv(path, parse_options=csv.ParseOptions(invalid_row_handler=skip),
                             read_options=csv.ReadOptions(use_threads=False), convert_options=as_text)
    except (OSError, UnicodeDecodeError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path} cannot be read as CSV: {error}") from error
    return table, torn


def _text(path: Path, name: str, column: Any) -> np.ndarray:
    """[R] strings, empty where a value is missing."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        return pc.utf8_trim_whitespace(pc.fill_null(column.cast(pa.string()), "")).to_numpy(
            zero_copy_only=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"{path}: column {name!r} is of type {column.type}, expected text or whole numbers: "
                         f"{error}") from error


def _numbers(column: Any) -> np.ndarray:
    """[R] float64, nan where there is no number."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        number = r"^[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?$"
        column = pc.utf8_trim_whitespace(column)
        column = pc.if_else(pc.match_substring_regex(column, number), column, None)
    try:
        values = column.cast(pa.float64(), safe=False)  # rounds whole numbers above 2^53
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # the column's type holds no numbers
        return np.full(len(column), np.nan)
    return pc.fill_null(values, np.nan).to_numpy(zero_copy_only=False)


def _report(table: Any, path: Path, reasons: np.ndarray, torn: Sequence[str]) -> RowReport:
    bad = np.flatnonzero(reasons != "")
    counts = Counter(reasons[bad])
    samples = [(str(reasons[row]), str(table.slice(int(row), 1).to_pylist()[0])) for row in bad[:NUM_SAMPLES]]
    if torn:
        counts[TORN] = sum(1 + text.count("\n") for text in torn)  # an unclosed quote takes many lines
        samples += [(TORN, text) for text in torn[:NUM_SAMPLES]]
    shown = tuple({"file": path.name, "line": 0, "reason": reason, "text": text[:LONGEST_TEXT]}
                  for reason, text in samples[:NUM_SAMPLES])
    return RowReport(table.num_rows + counts[TORN], dict(counts), shown)


def _check_users(path: Path, users: np.ndarray) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    counts = pc.value_counts(pa.array(users))
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        user, rows = twice[0]["values"].as_py(), twice[0]["counts"].as_py()
        raise ValueError(f"{path}: user {user!r} is in {rows} rows, expected one row a user; {len(twice)} "
                         f"users are in several")


def simulate(path: Path, users: int, lifts: Mapping[str, float], *, seed: int = 0) -> None:
    """Writes rows of two arms, `control` and `treatment`, with a period before and known relative lifts.

    An existing file may hold the data of a real test, so it is never overwritten.

    Args:
      path: file to write; Parquet if it ends in `.parquet`, else CSV.
      users: number of users of both arms together.
      lifts: relative lifts of `ctr`, of `cvr` and of `revenue` per order.
      seed: seed of all draws.

    Raises:
      FileExistsError: the file exists.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists, expected a new file to make up rows in; leave out --simulate "
                              "to analyse it")
    import pyarrow as pa
    import pyarrow.parquet as pq
    from pyarrow import csv

    rng = np.random.default_rng(seed)
    treated = rng.random(users) < 0.5
    taste, activity = rng.lognormal(0, 0.5, users), rng.lognormal(2.5, 0.8, users)
    columns: dict[str, Any] = {"user": np.arange(users), "arm": np.where(treated, "treatment", "control")}
    for prefix, on in (("", treated), ("pre_", np.zeros(users, bool))):
        rates = {name: np.where(on, 1 + lift, 1.0) for name, lift in lifts.items()}
        impressions = rng.poisson(activity)
        clicks = rng.binomial(impressions, np.minimum(0.04 * taste * rates["ctr"], 1.0))
        orders = rng.binomial(clicks, np.minimum(0.08 * rates["cvr"], 1.0))
        revenue = np.round(orders * rng.lognormal(3.0, 1.0, users) * rates["revenue"], 2)
        columns |= {f"{prefix}{name}": values for name, values in zip(
            COUNTS, (impressions, clicks, orders, revenue), strict=True)}
    table = pa.table(columns)
    write = pq.write_table if path.suffix == ".parquet" else csv.write_csv
    with reporting.replacing(path) as written:
        write(table, written)
