"""What a run shows and writes: tables, JSON rows, metrics per step."""

import io
import json
import math
import re

import pytest
from rich.console import Console

from tarq_jax import reporting

ROWS = [
    {"model": "two_tower", "auc": 0.65432, "parameters": 12_345, "train_seconds": 12.6, "hidden_column": 1},
    {"model": "tarq", "auc": math.nan, "parameters": 7, "train_seconds": 9.87654, "gap_recovered": 0.5,
     "utilisation": None},
]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.replace("┃", "│").strip("│\n ").split("│")]


def test_table(capsys):
    reporting.print_table(ROWS, "test split", reporting.PREDICTOR)
    title, _, header, _, *rows, _ = capsys.readouterr().out.splitlines()
    assert title.strip() == "test split"
    assert cells(header) == ["model", "auc", "gap recovered", "utilisation", "parameters", "train seconds"]
    assert [cells(row) for row in rows] == [
        ["two_tower", "0.6543", "-", "-", "12,345", "13"],
        ["tarq", "-", "0.5000", "-", "7", "9.8765"]]


def test_a_wide_table_is_not_cut(capsys):
    columns = [f"column_{place}" for place in range(60)]
    reporting.print_table([{column: 0.12345} for column in columns], "all")
    out = capsys.readouterr().out
    assert "…" not in out and out.count("0.1235") == len(columns)
    assert cells(out.splitlines()[2]) == [column.replace("_", " ") for column in columns]


def test_rows_as_json(tmp_path):
    path = tmp_path / "new" / "rows.json"
    rows = [{"model": "a", "auc": 0.5, "gauc": math.nan, "calibration": math.inf, "seed": 3, "gap": None}]
    reporting.write_rows(rows, path)
    assert json.loads(path.read_text(), parse_constant=lambda name: 1 / 0) == [
        {"model": "a", "auc": 0.5, "gauc": None, "calibration": None, "seed": 3, "gap": None}]
    reporting.write_rows([], str(path))
    assert json.loads(path.read_text()) == []


def test_metrics_by_step(tmp_path):
    for steps in ((1, 2), (3,)):  # a run, and the same run resumed
        with reporting.MetricsWriter(tmp_path / "run") as writer:
            for step in steps:
                writer.write(step, {"loss": step / 2, "speed": math.nan})
                text = (tmp_path / "run" / "metrics.jsonl").read_text()
                assert text.endswith("\n") and json.loads(text.splitlines()[-1])["step"] == step  # flushed
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, "loss": step / 2, "speed": None} for step in (1, 2, 3)]


@pytest.mark.parametrize(("torn", "kept"), [
    ('{"step": 2, "lo', [1]), ("\0\0", [1]), ('{"step": 2, "loss": 1.0}', [1, 2])])
def test_a_kill_tears_the_last_line_of_metrics(tmp_path, torn, kept):
    """The torn line is not read, and a resumed run drops it; a line may also lack only its line end."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + torn)
    assert [line["step"] for line in reporting.read_metrics(tmp_path)] == kept
    with reporting.MetricsWriter(tmp_path) as writer:
        writer.write(3, {"loss": 0.5})
    assert [line["step"] for line in reporting.read_metrics(tmp_path)] == [*kept, 3]
    assert all(json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.parametrize(("line", "words"), [
    ('{"step": 2, "lo{"step": 3}', "expected JSON"), ("[2]", "expected an object"),
    ('{"loss": 2.0}', "expected an object with a whole number 'step'")])
def test_a_bad_line_of_metrics_is_named(line, words, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 4}}\n')
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}, line 2: .*{words}"):
        reporting.read_metrics(tmp_path)


def test_one_process_writes_at_a_time(tmp_path):
    with reporting.MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
        with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}: another process is training "):
            reporting.MetricsWriter(tmp_path)
        reporting.MetricsWriter(tmp_path, enabled=False)
    with reporting.MetricsWriter(tmp_path) as writer:
        writer.write(2, {"loss": 0.5})
    assert [line["step"] for line in reporting.read_metrics(tmp_path)] == [1, 2]


def test_nothing_is_left_of_what_could_not_be_written(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt), reporting.replacing(path) as written:
        written.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(ZeroDivisionError), reporting.replacing(path):
        1 / 0  # noqa: B018 - before anything is written
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("rows.json", "before")]


def test_a_summary_has_the_columns_of_all_seeds():
    row, = reporting.summarise([{"model": "a", "seed": 0, "auc": 0.5, "gap_recovered": 1.0},
                                {"model": "a", "seed": 1, "auc": 0.5, "gauc": 0.6}])
    assert row == {"model": "a", "seeds": 2, "auc": 0.5, "auc_std": 0.0}


def test_metrics_as_tensorboard_events(tmp_path):
    from tensorboardX import event_file_writer  # noqa: F401 - checks that the writer can be imported
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    with reporting.MetricsWriter(tmp_path) as writer:
        writer.write(7, {"loss": 0.25, "speed": math.nan})
    file, = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    data, found = file.read_bytes(), []
    while data:  # each record: length, its checksum, payload, its checksum
        length = int.from_bytes(data[:8], "little")
        payload, checksum = data[12:12 + length], data[12 + length:16 + length]
        assert int.from_bytes(checksum, "little") == masked_crc32c(payload)
        event = event_pb2.Event.FromString(payload)
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        data = data[16 + length:]
    assert found == [(7, "loss", 0.25)]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_or_lines(terminal):
    console = Console(file=io.StringIO(), width=120, force_terminal=terminal)
    with reporting.progress_bar(console) as progress:
        task = progress.add_task("tarq", total=1200, note="")
        reporting.advance(progress, task, 600, "compiling")
        reporting.advance(progress, task, 1200, "loss 0.5")
    shown = console.file.getvalue()
    if terminal:
        assert "tarq" in shown and "1200/1200" in shown and "loss 0.5" in shown
    else:
        assert shown == "tarq: 600 of 1,200, compiling\ntarq: 1,200 of 1,200, loss 0.5\n"
