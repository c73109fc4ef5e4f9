"""`python train.py`, as users call it."""

import json
import math

import orbax.checkpoint as ocp
import pytest

from tarq_jax import reporting
from tarq_jax.training import checkpoint

TIMING = {"train_seconds", "examples_per_second", "input_wait_share"}
COLUMNS = {"model", "auc", "gauc", "log_loss", "calibration", "parameters", *TIMING}
HEALTH = ("utilisation", "perplexity", "dead", "quantization_error", "nearest_distance")
STUDENT_COLUMNS = {"utilisation", "quantization_error", "attention_error", "recall_at_4", "rank_correlation",
                   *(f"{name}_{level}" for level in (1, 2, 3) for name in HEALTH)}

# Runs the command itself, which gets a signal when step 8 is done.
INTERRUPTED_AT_8 = """
import os, runpy, signal, sys
from tarq_jax import reporting

write = reporting.MetricsWriter.write

def write_and_interrupt(self, step, scalars):
    write(self, step, scalars)
    if step == 8:
        os.kill(os.getpid(), signal.SIGTERM)

reporting.MetricsWriter.write = write_and_interrupt
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def train(command, tmp_path_factory):
    """Runs the smoke experiment with further flags; prepared data is shared."""
    data_dir = tmp_path_factory.mktemp("data")

    def run(workdir, *flags, code=("train.py",)):
        return command(*code, "--config=configs/synthetic.py:smoke", f"--config.data.data_dir={data_dir}",
                       f"--workdir={workdir}", *flags)

    return run


@pytest.fixture(scope="module")
def done(train, tmp_path_factory):
    """A whole run: (process, workdir)."""
    workdir = tmp_path_factory.mktemp("train") / "run"
    return train(workdir, f"--json={workdir.parent / 'rows.json'}"), workdir


def rows_of(path) -> list[dict]:
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def untimed(rows) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]


def test_ends_well_with_a_table(done):
    process, workdir = done
    assert process.returncode == 0, process.stderr
    assert f"test split, {workdir}" in process.stdout
    for text in ("bayes_auc", "tarq_teacher", "gauc", "quantization error", "examples per second",
                 "tarq: 0 of 12, compiling", "tarq: 12 of 12, loss"):
        assert text in process.stdout
    assert "Traceback" not in process.stderr


def test_rows_have_the_promised_columns(done):
    workdir = done[1]
    rows = rows_of(workdir.parent / "rows.json")
    assert rows == rows_of(workdir / "results.json")
    student, teacher = rows
    assert (student["model"], teacher["model"]) == ("tarq", "tarq_teacher")
    assert teacher.keys() == COLUMNS and student.keys() == COLUMNS | STUDENT_COLUMNS
    for row in rows:
        assert all(isinstance(value, int | float | str | None) for value in row.values())
        assert 0 <= row["auc"] <= 1 and row["examples_per_second"] > 0 and row["train_seconds"] > 0


def test_metrics_on_disk(done):
    workdir = done[1]
    lines = reporting.read_metrics(workdir)
    assert [line["step"] for line in lines] == [4, 8, 12, 12]
    for line in lines[:3]:
        assert line["examples_per_second"] > 0 and math.isfinite(line["loss"])
        assert 0 <= line["input_wait_share"] <= 1
    assert "test/tarq/auc" in lines[-1]
    events = list((workdir / "tensorboard").glob("events.out.tfevents.*"))
    assert len(events) == 1 and b"loss/student" in events[0].read_bytes()


def test_checkpoints_are_orbax(done):
    with checkpoint.manager(done[1]) as checkpoints:
        assert list(checkpoints.all_steps()) == [6, 12]
        saved = checkpoints.restore(12, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]
    assert saved["codebook"]["codewords"].shape == (3, 8, 8)
    assert saved["step"] == 12


@pytest.mark.slow
def test_interrupted_and_called_again(done, train, tmp_path):
    interrupted = train(tmp_path, code=("-c", INTERRUPTED_AT_8))
    assert interrupted.returncode == 75, interrupted.stderr
    assert interrupted.stderr.splitlines() == [
        f"error: interrupted; saved step 8 in {tmp_path}, run it again to resume"]
    assert not (tmp_path / "results.json").exists()
    resumed = train(tmp_path)
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert untimed(rows_of(tmp_path / "results.json")) == untimed(rows_of(done[1] / "results.json"))


@pytest.mark.slow
def test_a_workdir_of_another_run_is_refused(done, train):
    refused = train(done[1], "--config.seed=7")
    assert refused.returncode == 1
    line, = refused.stderr.splitlines()
    assert line.startswith("error: ") and "config.seed=0" in line and "7" in line and str(done[1]) in line


def test_a_workdir_in_use_is_refused_with_noresume(done, train):
    refused = train(done[1], "--noresume")
    assert refused.returncode == 1
    line, = refused.stderr.splitlines()
    assert line.startswith(f"error: {done[1]} holds a checkpoint of step 12, expected none with --noresume")


def test_a_learning_rate_that_blows_up(done, train, tmp_path):
    flags = "--config.model.name=two_tower", "--config.optimizer.learning_rate=1e30"
    process = train(tmp_path / "run", *flags)
    assert process.returncode == 1
    line, = process.stderr.splitlines()
    assert line.startswith("error: step 1: {'parameter_norm': inf} not finite")
    assert "config.optimizer.learning_rate" in line
    with checkpoint.manager(tmp_path / "run") as checkpoints:
        assert checkpoints.latest_step() is None
