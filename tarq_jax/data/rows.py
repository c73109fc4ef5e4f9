"""Parses rows of text; malformed rows are counted by reason and sampled, and too many are an error."""

import csv
import dataclasses
import io
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

NUM_SAMPLES = 5  # malformed rows shown in a report
CHUNK_BYTES = 1 << 24
TEXT_LENGTH = 120  # characters of a malformed row that are kept

T = TypeVar("T")


class BadRow(ValueError):
    """A row that cannot be used; its message is the reason under which it is counted."""


@dataclasses.dataclass(frozen=True)
class RowReport:
    """How many rows were read, how many were malformed by reason, and the first malformed ones."""

    read: int = 0
    reasons: Mapping[str, int] = dataclasses.field(default_factory=dict)
    samples: tuple[Mapping[str, Any], ...] = ()  # file, line (from 1; 0 if unknown), reason, text

    @property
    def bad(self) -> int:
        """Number of malformed rows."""
        return sum(self.reasons.values())

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "RowReport":
        """The inverse of `to_json`."""
        return cls(value["read"], value["reasons"], tuple(value["samples"]))

    def to_json(self) -> dict[str, Any]:
        """The report as plain objects, as kept in `Dataset.info["rows"]`."""
        return {"read": self.read, "bad": self.bad, "reasons": dict(self.reasons),
                "samples": [dict(sample) for sample in self.samples]}


def _sample(path: Path, line: int, reason: str, text: str) -> dict[str, Any]:
    return {"file": path.name, "line": line, "reason": reason, "text": text.rstrip("\r\n")[:TEXT_LENGTH]}


def merge_reports(reports: Iterable[RowReport]) -> RowReport:
    """One report for the rows of all reports, with the first samples."""
    reports = list(reports)
    reasons = sum((Counter(report.reasons) for report in reports), Counter())
    samples = [sample for report in reports for sample in report.samples]
    return RowReport(sum(report.read for report in reports), dict(reasons), tuple(samples[:NUM_SAMPLES]))


def _place(sample: Mapping[str, Any]) -> str:
    return f"line {sample['line']}" if sample["line"] else sample["file"]


def check_report(report: RowReport, path: Path, max_bad_fraction: float) -> None:
    """Raises ValueError if more than the allowed fraction of rows is malformed; warns if any row is."""
    if not report.bad:
        return
    samples = "; ".join(f"{_place(s)}: {s['text']!r} ({s['reason']})" for s in report.samples)
    text = f"{path}: {report.bad} of {report.read} rows are malformed {dict(report.reasons)}: {samples}"
    if report.bad > max_bad_fraction * report.read:
        raise ValueError(f"{text}: expected a fraction of at most {max_bad_fraction} "
                         f"(option max_bad_fraction)")
    logging.getLogger(__name__).warning("%s: they are left out", text)


def parse_rows(lines: Iterable[str], parse: Callable[[str], T], path: Path,
               first_line: int = 1) -> tuple[list[T], list[int], RowReport]:
    """Parses row by row.

    Args:
      lines: the rows.
      parse: returns the value of a row or raises `BadRow`; is never called with an empty row.
      path: path of the file, named in samples.
      first_line: line number of the first row.

    Returns:
      The values of good rows, their positions among `lines`, and the report.
    """
    values: list[T] = []
    positions: list[int] = []
    reasons: Counter[str] = Counter()
    samples: list[dict[str, Any]] = []
    read = 0
    for read, text in enumerate(lines, start=1):
        try:
            if not text.strip():
                raise BadRow("empty row")
            values.append(parse(text.rstrip("\r\n")))
            positions.append(read - 1)
        except BadRow as error:
            reasons[str(error)] += 1
            if len(samples) < NUM_SAMPLES:
                samples.append(_sample(path, first_line + read - 1, str(error), text))
    return values, positions, RowReport(read, dict(reasons), tuple(samples))


def read_rows(path: Path, parse: Callable[[str], T], *, max_bad_fraction: float, encoding: str = "utf-8",
              header: bool = False) -> tuple[list[T], RowReport]:
    """Reads and parses a small file row by row; see `parse_rows` and `check_report`."""
    with path.open(encoding=encoding, errors="replace", newline="\n") as file:
        if header:
            next(file, None)
        values, _, report = parse_rows(file, parse, path, first_line=2 if header else 1)
    check_report(report, path, max_bad_fraction)
    return values, report


def split_row(text: str, delimiter: str, columns: int) -> list[str]:
    """The columns of a row; `BadRow` unless there are `columns` of them."""
    return _counted(text.split(delimiter), columns)


def split_csv(text: str, delimiter: str, columns: int) -> list[str]:
    """Like `split_row`, but columns may be quoted."""
    try:
        return _counted(next(csv.reader([text], delimiter=delimiter)), columns)
    except csv.Error:
        raise BadRow("not CSV") from None


def _counted(parts: list[str], columns: int) -> list[str]:
    if len(parts) != columns:
        raise BadRow("missing columns" if len(parts) < columns else "too many columns")
    return parts


def parse_number(text: str, kind: Callable[[str], T]) -> T:
    """A number from text, by `kind`, int or float; `BadRow` if the text is no number."""
    try:
        if "_" in text or not text.isascii():  # Python would accept 1_0 as 10, and digits of any script
            raise ValueError
        return kind(text)
    except ValueError:
        raise BadRow("not a number") from None


class NumberChunk(NamedTuple):
    """Consecutive rows of numbers from a file."""

    values: np.ndarray  # [M, columns] float64, the rows that could be parsed
    positions: np.ndarray  # [M] the position of each of these rows in the text
    text: bytes
    first_line: int  # line number of the text's first row
    report: RowReport  # rows that could not be parsed


def number_chunks(path: Path, delimiter: str, columns: int, *, header: bool = False) -> Iterator[NumberChunk]:
    """Reads a big file of numbers in chunks; parses a chunk row by row only if a row in it is malformed."""
    line = 2 if header else 1
    with path.open("rb") as file:
        if header:
            file.readline()
        while text := file.read(CHUNK_BYTES):
            text += file.readline()  # complete the last row
            num_rows = text.count(b"\n") + (not text.endswith(b"\n"))
            values = _parse_block(text, delimiter, columns, num_rows)
            if values is None:
                yield _parse_block_by_row(text, delimiter, columns, path, line)
            else:
                yield NumberChunk(values, np.arange(num_rows), text, line, RowReport(num_rows))
            line += num_rows


def _parse_block(text: bytes, delimiter: str, columns: int, num_rows: int) -> np.ndarray | None:
    """Numbers [num_rows, columns]; None if a row is malformed or empty (loadtxt would skip empty rows)."""
    if not text.strip():
        return None
    if len(delimiter) > 1:
        text, delimiter = text.replace(delimiter.encode(), b"\t"), "\t"
    try:
        values = np.loadtxt(io.BytesIO(text), delimiter=delimiter, comments=None, ndmin=2)
    except ValueError:
        return None
    return values if values.shape == (num_rows, columns) else None


def _parse_block_by_row(text: bytes, delimiter: str, columns: int, path: Path, line: int) -> NumberChunk:
    def parse(row: str) -> list[float]:
        return [parse_number(part, float) for part in split_row(row, delimiter, columns)]

    rows = text.decode("latin-1").removesuffix("\n").split("\n")
    values, positions, report = parse_rows(rows, parse, path, line)
    return NumberChunk(np.array(values, np.float64).reshape(-1, columns), np.array(positions, np.int64), text,
                       line, report)


def reject_rows(chunk: NumberChunk, path: Path,
                reasons: Sequence[tuple[str, np.ndarray]]) -> tuple[np.ndarray, RowReport]:
    """Rejects rows that are well-formed but have invalid values.

    Args:
      chunk: the rows.
      path: path of the file, named in samples.
      reasons: (reason, [M] bool: rows to reject); a row is counted under the first reason that applies.

    Returns:
      [M] bool, the rows to keep, and the chunk's report with the rejected rows added.
    """
    keep = np.ones(len(chunk.values), bool)
    counts, samples = Counter(chunk.report.reasons), list(chunk.report.samples)
    rows = chunk.text.split(b"\n") if any(mask.any() for _, mask in reasons) else []
    for reason, mask in reasons:
        mask, keep = mask & keep, keep & ~mask
        counts[reason] += int(mask.sum())
        for position in chunk.positions[mask][:NUM_SAMPLES]:
            text = rows[position].decode("latin-1")
            samples.append(_sample(path, chunk.first_line + int(position), reason, text))
    samples.sort(key=lambda sample: sample["line"])
    return keep, RowReport(chunk.report.read, dict(+counts), tuple(samples[:NUM_SAMPLES]))
