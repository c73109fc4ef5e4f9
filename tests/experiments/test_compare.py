"""The comparison: every model and seed is trained once, and all are in one table."""

import json
import math

import numpy as np
import pytest
import tiny

from tarq_jax import metrics, reporting
from tarq_jax.config import COMPARED
from tarq_jax.experiments import compare as comparison
from tarq_jax.training import loop, setup

RUNS = ("two_tower", "target_attention")
SEEDS = (0, 1)

# Run the command itself with a replacement for training: AUC by model and seed.
COMMAND = """
import runpy, sys
import tiny
from tarq_jax.config import COMPARED
from tarq_jax.training import loop

def train(config, dataset, workdir, console):
    auc = 0.6 + 0.05 * COMPARED.index(config.model.name) + 0.01 * config.seed
    print("trains", config.model.name, config.seed, config.steps, workdir.name, file=sys.stderr)
    return loop.Result([{"model": config.model.name, "auc": auc}], None)

loop.train, loop.load_data = train, lambda config: tiny.make_dataset()
sys.argv[0] = "compare"
runpy.run_module("tarq_jax.experiments.compare", run_name="__main__")
"""


pytestmark = pytest.mark.usefixtures("compiled_once", "one_device")


@pytest.fixture(scope="module")
def compared(tmp_path_factory, tiny_dataset, silent, compiled_once, one_device):
    """Rows of a comparison, and the folder of its runs."""
    workdir = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "load_data", lambda config: tiny_dataset)
        rows = comparison.compare(tiny.make_config(), RUNS, SEEDS, workdir, silent)
    return rows, workdir


def same(left, right) -> bool:
    return left == right or (math.isnan(left) and math.isnan(right))


def test_a_row_for_each_seed_and_model(compared):
    rows, workdir = compared
    assert [(row["seed"], row["model"]) for row in rows] == [(s, m) for s in SEEDS for m in RUNS]
    assert {path.name for path in workdir.iterdir()} == {f"{m}-{s}" for m in RUNS for s in SEEDS}
    assert len({row["auc"] for row in rows}) == 4
    for row in rows:
        assert {"auc", "gauc", "log_loss", "calibration", "parameters", "train_seconds"} <= row.keys()
    for two_tower, attention in (rows[:2], rows[2:]):
        ends = two_tower["auc"], attention["auc"]
        assert same(two_tower["gap_recovered"], metrics.gap_recovered(ends[0], *ends))
        assert same(attention["gap_recovered"], metrics.gap_recovered(ends[1], *ends))


def test_calling_again_trains_nothing(compared, tiny_config, tiny_dataset, silent, monkeypatch):
    rows, workdir = compared
    before = {path: path.stat().st_mtime_ns for path in workdir.glob("*/checkpoints/**/*")}
    assert before

    def compile_step(*_):
        def step(*_):
            raise AssertionError("a step was taken")
        return step

    monkeypatch.setattr(setup, "compile_step", compile_step)
    monkeypatch.setattr(loop, "load_data", lambda config: tiny_dataset)
    again = comparison.compare(tiny_config, RUNS, SEEDS, workdir, silent)
    np.testing.assert_equal(again, rows)
    assert {path: path.stat().st_mtime_ns for path in workdir.glob("*/checkpoints/**/*")} == before


def test_the_configuration_given_stays_as_it_is(tiny_config, tiny_dataset, tmp_path, silent, monkeypatch):
    seen = []

    def train(config, *_):
        seen.append((config.model.name, config.seed))
        return loop.Result([{"model": config.model.name, "auc": 0.5}], None)

    monkeypatch.setattr(loop, "load_data", lambda config: tiny_dataset)
    monkeypatch.setattr(loop, "train", train)
    comparison.compare(tiny_config, ("two_tower", "tarq"), (4, 2), tmp_path, silent)
    assert seen == [("two_tower", 4), ("tarq", 4), ("two_tower", 2), ("tarq", 2)]
    assert (tiny_config.model.name, tiny_config.seed) == ("tarq", 0)


def test_summary_is_mean_and_deviation(compared):
    rows, _ = compared
    summary = reporting.summarise(rows)
    assert [row["model"] for row in summary] == list(RUNS)
    for row in summary:
        runs = [r for r in rows if r["model"] == row["model"]]
        assert row["seeds"] == 2 and "seed" not in row
        for key in runs[0].keys() - {"model", "seed"}:
            first, second = (run[key] for run in runs)
            np.testing.assert_allclose(row[key], (first + second) / 2, rtol=1e-12)
            np.testing.assert_allclose(row[f"{key}_std"], abs(first - second) / math.sqrt(2), atol=1e-12)


def test_one_seed_has_no_deviation():
    row, = reporting.summarise([{"model": "a", "seed": 3, "auc": 0.5, "utilisation": None}])
    assert (row["auc"], row["seeds"]) == (0.5, 1) and math.isnan(row["utilisation"])
    assert not any(key.endswith("_std") for key in row)


def test_the_command(command, tmp_path):
    json_file = tmp_path / "new" / "rows.json"
    done = command("-c", COMMAND, "--config=configs/synthetic.py:smoke", "--seeds=3,5", "--config.steps=9",
                   f"--workdir={tmp_path / 'runs'}", f"--json={json_file}")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        f"trains {model} {seed} 9 {model}-{seed}" for seed in (3, 5) for model in COMPARED]
    rows = json.loads(json_file.read_text())
    assert json.loads((tmp_path / "runs" / "results.json").read_text()) == rows
    assert [(row.get("seed"), row["model"]) for row in rows] == [
        *((seed, model) for seed in (3, 5) for model in COMPARED), *((None, model) for model in COMPARED)]
    tarq = rows[-1]
    assert tarq["auc"] == pytest.approx(0.79) and tarq["auc_std"] == pytest.approx(0.01 * math.sqrt(2))
    assert tarq["gap_recovered"] == pytest.approx(1.5)
    assert "each seed, test split" in done.stdout and "mean over seeds 3, 5" in done.stdout
    assert "gap recovered" in done.stdout and "0.7900" in done.stdout


@pytest.mark.parametrize("seeds", ["x", "0,x", "", "-1", "0,0", "1,01", "1.5"])
def test_wrong_seeds(wrong_call, tmp_path, seeds):
    line = wrong_call("-m", "tarq_jax.experiments.compare", "--config=configs/synthetic.py:smoke",
                      f"--seeds={seeds}", f"--workdir={tmp_path / 'runs'}")
    assert f"--seeds is {seeds!r}, expected different whole numbers" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("argument", "named"), [
    ("--config=configs/nowhere.py", "configs/nowhere.py"), ("--config.steps=0", "config.steps is 0"),
    ("--model=no:one", "each has to be one of"), ("--config.model.name=no:one", "model.name is 'no:one'")])
def test_wrong_configurations(wrong_call, argument, named):
    arguments = [argument] if "nowhere" in argument else ["--config=configs/synthetic.py:smoke", argument]
    assert named in wrong_call("-m", "tarq_jax.experiments.compare", *arguments)


@pytest.mark.slow
def test_models_of_ones_own(command, tmp_path):
    """The user's own model is in one table with the library's, and is a variant of a study."""
    own, other = "examples.backbone:gru", "examples.attention:random_features"
    done = command("-m", "tarq_jax.experiments.compare", "--config=configs/synthetic.py:smoke", "--seeds=0",
                   f"--model={own}", "--model=two_tower", f"--workdir={tmp_path / 'compared'}",
                   f"--config.data.data_dir={tmp_path / 'data'}", f"--json={tmp_path / 'rows.json'}")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["model"] for row in rows] == 2 * [own, "two_tower"]
    study = tmp_path / "own_study.py"
    study.write_text("from configs import ablation\n\n\ndef get_config(mode=''):\n"
                     "    study = ablation.get_config('smoke')\n"
                     "    with study.unlocked():\n"
                     f"        study.variants = {{'tarq': {{'model': {{'name': '{own}'}}}},\n"
                     f"                          'other': {{'model': {{'name': '{other}'}}}}}}\n"
                     "    return study\n")
    done = command("-m", "tarq_jax.experiments.ablate", f"--config={study}", "--seeds=0,1",
                   f"--workdir={tmp_path / 'study'}", f"--config.base.data.data_dir={tmp_path / 'data'}",
                   f"--json={tmp_path / 'study.json'}")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "study.json").read_text())
    assert [row["variant"] for row in rows] == ["tarq", "tarq", "other", "other"]
