"""What a run shows to people: progress, metrics on disk, tables in the terminal and as JSON."""

import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, TextIO

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

Row = Mapping[str, Any]

METRICS = "metrics.jsonl"


class MetricsWriter:
    """Writes scalars to `metrics.jsonl` and as TensorBoard events; use as a context manager."""

    def __init__(self, workdir: Path, *, enabled: bool = True):
        """Appends to the metrics in `workdir`, without a torn last line; writes nothing unless `enabled`.

        Raises:
          ValueError: another process writes there, that is, trains the same run.
        """
        self._enabled = enabled
        if not enabled:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        self._lines = (workdir / METRICS).open("a")
        try:
            _lock(self._lines, workdir)
        except ValueError:
            self._lines.close()
            raise
        _mend(workdir / METRICS)
        from tensorboardX import SummaryWriter  # imports PyTorch if it is installed, which takes seconds

        self._events = SummaryWriter(str(workdir / "tensorboard"))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one JSON line, and one event per scalar; a value that is not finite: null, and no event."""
        if not self._enabled:
            return
        finite = _finite(scalars)
        self._lines.write(json.dumps({"step": step} | finite) + "\n")
        self._lines.flush()
        for name, value in finite.items():
            if value is not None:
                self._events.add_scalar(name, value, step)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._enabled:
            self._lines.close()
            self._events.close()


def _lock(lines: TextIO, workdir: Path) -> None:
    """Keeps other processes from training there until the file is closed."""
    try:
        lock(lines, wait=False)
    except BlockingIOError:
        raise ValueError(f"{workdir}: another process is training there, expected one at a time") from None
    except OSError:  # a file system without locks
        return


def lock(file: IO[Any], *, wait: bool) -> None:
    """Locks a file against other processes until it is closed, if the system has file locks.

    Raises:
      BlockingIOError: another process holds the lock, and `wait` is False.
      OSError: the file system has no locks.
    """
    try:
        import fcntl
    except ImportError:
        return
    fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def percent(level: float) -> str:
    """A share such as 95% or 99.9%."""
    return f"{100 * level:g}%"


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines that `MetricsWriter` wrote, if any; a last line that a kill left incomplete is left out.

    Raises:
      ValueError: another line is not a JSON object with a step; names the file and the line.
    """
    path = workdir / METRICS
    if not path.is_file():
        return []
    *lines, last = path.read_text(errors="replace").split("\n")
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)] + (
        [json.loads(last)] if _is_whole(last) else [])


def _parse(line: str, place: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: {line[:80]!r}, expected JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("step"), int):
        raise ValueError(f"{place}: {line[:80]!r}, expected an object with a whole number 'step'")
    return found


def _is_whole(line: str | bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _mend(path: Path) -> None:
    """Lets the next line start as a new one: cuts off an incomplete last line, or ends a complete one."""
    data = path.read_bytes() if path.is_file() else b""
    last = data[data.rfind(b"\n") + 1:]
    if last and _is_whole(last):
        with path.open("ab") as file:
            file.write(b"\n")
    elif last:
        os.truncate(path, len(data) - len(last))


def progress_bar(console: Console) -> Progress:
    """A bar with its task's description, a count, the time that remains and a note; see `advance`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.fields[note]}"))
    return Progress(*columns, console=console, disable=not console.is_terminal)


def advance(progress: Progress, task: TaskID, completed: int, note: str) -> None:
    """Moves a bar of `progress_bar`; where there is no terminal for it, as in a log, prints a line."""
    progress.update(task, completed=completed, note=note)
    if progress.disable:
        bar = progress.tasks[task]
        progress.console.print(f"{bar.description}: {completed:,} of {bar.total:,.0f}, {note}", markup=False)


# Columns of a predictor that a terminal has room for; files hold every column.
PREDICTOR = (
    "model", "seed", "seeds", "auc", "auc_std", "gauc", "log_loss", "calibration", "gap_recovered",
    "auc_difference", "fine_tuned", "utilisation", "quantization_error", "correction_error",
    "attention_error", "parameters", "train_seconds", "examples_per_second",
)


def print_table(rows: Sequence[Row], title: str, columns: Sequence[str] | None = None) -> None:
    """Prints one line per row, with those of `columns` that any row has; None shows all columns."""
    present = dict.fromkeys(column for row in rows for column in row)
    columns = list(present) if columns is None else [column for column in columns if column in present]
    console = Console()
    if not console.is_terminal:
        console = Console(width=4000)
    table = Table(title=escape(title), title_justify="left")
    for column in columns:
        justify: Literal["left", "right"] = "left" if column == "model" else "right"
        table.add_column(escape(column.replace("_", " ")), justify=justify)
    for row in rows:
        table.add_row(*(escape(_cell(row.get(column))) for column in columns))
    console.print(table)


def summarise(rows: Sequence[Mapping[str, Any]], by: str = "model") -> list[dict[str, Any]]:
    """Mean and standard deviation (ddof 1) over seeds of the numbers that all seeds have.

    Args:
      rows: one per run, with `seed`; columns of text are left out.
      by: the column to group by; each of its values gets one row.

    Example:
      >>> summarise([{"model": "a", "seed": 0, "auc": 0.5}, {"model": "a", "seed": 1, "auc": 0.7}])
      [{'model': 'a', 'seeds': 2, 'auc': 0.6, 'auc_std': 0.14142135623730948}]
    """
    summary = []
    for group in dict.fromkeys(row[by] for row in rows):
        runs = [row for row in rows if row[by] == group]
        combined = {by: group, "seeds": len(runs)}
        for key, value in runs[0].items():
            if key in (by, "seed") or isinstance(value, str) or not all(key in run for run in runs):
                continue
            values = np.array([run[key] for run in runs], dtype=float)
            combined[key] = float(values.mean())
            if len(runs) > 1:
                combined[f"{key}_std"] = float(values.std(ddof=1))
        summary.append(combined)
    return summary


def write_rows(rows: Sequence[Row], path: str | Path) -> None:
    """The rows as a JSON list of flat objects, atomically; a value that is not finite becomes null."""
    with replacing(Path(path)) as written:
        written.write_text(json.dumps([_finite(row) for row in rows], indent=1) + "\n")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields another name in the same folder; the file written there then replaces `path` atomically.

    If the body raises, that file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield written
        written.replace(path)
    except BaseException:
        written.unlink(missing_ok=True)
        raise


def _finite(row: Row) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()}


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10 else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
