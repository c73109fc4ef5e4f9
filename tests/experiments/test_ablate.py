"""Ablations: one row per run, and nothing runs twice, even after failures in between."""

import json
import shutil

import ml_collections
import numpy as np
import pytest
import tiny

from configs import ablation
from tarq_jax import reporting
from tarq_jax.cli import Interrupted
from tarq_jax.config import variants_of
from tarq_jax.experiments import ablate as ablation_command
from tarq_jax.experiments import run_table
from tarq_jax.training import loop, provenance, seeds
from tarq_jax.training.evaluate import SCORES, write_scores

pytestmark = pytest.mark.usefixtures("compiled_once", "one_device")

SEEDS = (4, 2)
COMMAND = "python -m tarq_jax.experiments.ablate"
CHANGES = {"tarq": {}, "again": {}, "two_tower": {"model": {"name": "two_tower"}}}
COLD = {"model": {"name": "cold"}}
CHEAP = {"tarq": COLD, "again": COLD, "two_tower": CHANGES["two_tower"]}  # if the model is irrelevant


def make_variants(changes=CHANGES):
    return variants_of(ml_collections.ConfigDict(
        {"base": tiny.make_config(), "reference": "tarq", "variants": changes}))


@pytest.fixture
def ablate(tiny_dataset, silent, monkeypatch):
    """Runs variants on the data of `tiny`; `ablate.trained` lists the runs that were trained."""
    train = seeds.train

    def counted(config, dataset, folders, console):
        run.trained.append((config.model.name, *folders))
        return train(config, dataset, folders, console)

    def run(variants, chosen, workdir):
        run.trained = []
        return ablation_command.ablate(variants, chosen, workdir, silent)

    monkeypatch.setattr(loop, "load_data", lambda config: tiny_dataset)
    monkeypatch.setattr(seeds, "train", counted)
    return run


@pytest.fixture(scope="module")
def study(tmp_path_factory, tiny_dataset, silent, compiled_once, one_device):
    """Rows of a whole study, and its folder."""
    workdir = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "load_data", lambda config: tiny_dataset)
        return ablation_command.ablate(make_variants(), SEEDS, workdir, silent, command=COMMAND), workdir


def test_a_row_for_each_run(study, tiny_dataset):
    rows, workdir = study
    users = len(np.unique(tiny_dataset.splits["test"].user))
    assert [(row["variant"], row["seed"]) for row in rows] == [(v, s) for v in CHANGES for s in SEEDS]
    assert rows == run_table.read(workdir / run_table.FILE)
    for row in rows:
        assert {"auc", "gauc", "log_loss", "parameters", "device", *run_table.COLUMNS} <= row.keys()
        assert "version_jax" in row and row["command"] == COMMAND and len(row["influence"]) == users
        assert ("teacher_auc" in row) == (row["model"] == "tarq")
    assert len({row["auc"] for row in rows}) == 4


def test_what_is_the_same_is_run_once(study):
    rows, workdir = study
    assert not list(workdir.glob("again-*"))
    for first, second in zip(rows[:2], rows[2:4], strict=True):
        assert second == {**first, "variant": "again"}


def test_a_row_never_claims_settings_that_its_run_did_not_have(study, ablate, tmp_path):
    """Those too that a run may go on with after a change; nor does it forget a revision."""
    rows, workdir = study
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    variants = {"two_tower": make_variants()["two_tower"]}
    variants["two_tower"].accumulate = 2
    with pytest.raises(ValueError, match=r"two_tower-4: saved with config.accumulate=1, this run has 2; use"):
        ablate(variants, SEEDS[:1], tmp_path)
    assert run_table.read(tmp_path / run_table.FILE) == rows

    (tmp_path / run_table.FILE).unlink()
    for seed in SEEDS:
        path = tmp_path / f"two_tower-{seed}" / provenance.FILE
        entry, = json.loads(path.read_text())
        path.write_text(json.dumps([entry | {"revision": "earlier"}, entry | {"revision": "later"}]))
    found = ablate({"two_tower": make_variants()["two_tower"]}, SEEDS, tmp_path)
    assert {tuple(row["revision"].split(", "))[:2] for row in found} == {("earlier", "later")}
    assert {row["version_jax"] for row in found} == {row["version_jax"] for row in rows}
    assert [row["auc"] for row in found] == [row["auc"] for row in rows[-2:]]


def test_rows_are_those_of_runs_on_their_own(study, tiny_config, tiny_dataset, tmp_path, silent):
    tiny_config.seed, tiny_config.model.name = 2, "two_tower"
    row, = loop.train(tiny_config, tiny_dataset, tmp_path, silent).rows
    found, = (found for found in study[0] if (found["variant"], found["seed"]) == ("two_tower", 2))
    for name in ("auc", "gauc", "log_loss", "calibration", "parameters"):
        assert found[name] == pytest.approx(row[name], rel=1e-3)


def test_calling_again_trains_what_is_missing(ablate, tmp_path):
    rows = ablate(make_variants(CHEAP), SEEDS, tmp_path)
    assert ablate.trained == [("cold", *SEEDS), ("two_tower", *SEEDS)]
    assert ablate(make_variants(CHEAP), SEEDS, tmp_path) == rows
    assert ablate.trained == []
    more = ablate(make_variants(CHEAP), (4, 3), tmp_path)
    assert ablate.trained == [("cold", 3), ("two_tower", 3)]
    assert [row["seed"] for row in more] == [4, 3] * 3
    assert len(run_table.read(tmp_path / run_table.FILE)) == 9
    changed = make_variants({"tarq": {"model": {"name": "cold", "width": 8}}})
    with pytest.raises(ValueError, match=r"saved with config.model.width=4, this run has 8"):
        ablate(changed, (4,), tmp_path)


def test_a_run_of_another_length_is_not_taken_for_this_one(ablate, tmp_path):
    cold = make_variants({"tarq": COLD})
    ablate(cold, (4,), tmp_path)
    shorter = make_variants({"tarq": COLD})
    shorter["tarq"].steps -= 1
    with pytest.raises(ValueError, match=r"saved with config\.steps=\d+, this run has"):
        ablate(shorter, (4,), tmp_path)


def test_rows_that_another_process_added_meanwhile_stay(ablate, tmp_path, monkeypatch):
    row, = ablate(make_variants({"tarq": CHANGES["two_tower"]}), (4,), tmp_path / "other")
    counted, path = seeds.train, tmp_path / run_table.FILE

    def train(*arguments):
        run_table.add(path, [row | {"variant": "elsewhere"}])
        return counted(*arguments)

    monkeypatch.setattr(seeds, "train", train)
    ablate(make_variants({"tarq": COLD}), (4,), tmp_path)
    assert {row["variant"] for row in run_table.read(path)} == {"tarq", "elsewhere"}


def test_an_interruption_loses_nothing(ablate, tmp_path, monkeypatch):
    counted = seeds.train

    def interrupted(config, *rest):
        if config.model.name == "two_tower":
            raise Interrupted("interrupted")
        return counted(config, *rest)

    monkeypatch.setattr(seeds, "train", interrupted)
    with pytest.raises(Interrupted):
        ablate(make_variants(CHEAP), SEEDS, tmp_path)
    before = run_table.read(tmp_path / run_table.FILE)
    assert len(before) == 4
    monkeypatch.setattr(seeds, "train", counted)
    rows = ablate(make_variants(CHEAP), SEEDS, tmp_path)
    assert ablate.trained == [("two_tower", *SEEDS)]
    assert rows[:4] == before and len(rows) == 6


def test_a_variant_that_diverges_leaves_the_others(ablate, tmp_path, monkeypatch):
    def diverging(config, dataset, folders, console):
        if config.optimizer.learning_rate > 1:
            raise FloatingPointError("seed 4, step 3: loss not finite")
        for folder in folders.values():
            write_scores(folder / SCORES, {"labels": np.arange(4) % 2, "users": np.arange(4),
                                           "weights": np.ones(4), config.model.name: np.arange(4) % 2})
        return {seed: [{"model": config.model.name, "auc": 1.0}] for seed in folders}

    monkeypatch.setattr(seeds, "train", diverging)
    variants = make_variants({"bad": {"optimizer": {"learning_rate": 1e9}}, **CHANGES})
    with pytest.raises(FloatingPointError, match="1 of 4 variants diverged; bad: seed 4, step 3: loss"):
        ablate(variants, SEEDS, tmp_path)
    assert {row["variant"] for row in run_table.read(tmp_path / run_table.FILE)} == CHANGES.keys()


def test_what_tells_runs_apart():
    config = tiny.make_config()
    same, other = tiny.make_config(), tiny.make_config()
    same.seed, same.log_every, same.data.data_dir = 9, 77, "elsewhere"
    other.optimizer.learning_rate = 0.5
    streamed = tiny.make_config()
    streamed.data.stream = not streamed.data.get("stream", False)  # requests come in another order
    assert run_table.settings_hash(config) == run_table.settings_hash(same)
    assert len({run_table.settings_hash(each) for each in (config, other, streamed)}) == 3


def test_summary_is_of_each_variant(study):
    summary = reporting.summarise([ablation_command.scalars(row) for row in study[0]], by="variant")
    assert [row["variant"] for row in summary] == list(CHANGES)
    first, second = (row["auc"] for row in study[0][:2])
    assert summary[0]["auc"] == pytest.approx((first + second) / 2) and summary[0]["seeds"] == 2


@pytest.mark.parametrize("content", [b"", b"PAR1 but damaged", b"x" * 100])
def test_a_damaged_table_is_named(content, tmp_path):
    path = tmp_path / run_table.FILE
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{run_table.FILE} cannot be read as Parquet"):
        run_table.read(path)
    assert path.read_bytes() == content


def test_another_table_is_named(tmp_path):
    path = tmp_path / run_table.FILE
    run_table.write(path, [{"user": 1, "auc": 0.5}])
    with pytest.raises(ValueError, match=r"has no columns .*'variant'"):
        run_table.read(path)


@pytest.mark.parametrize("mode", ["", "smoke", *ablation.BASES, "lastfm,smoke"])
def test_the_study_of_the_repository(mode):
    study = ablation.get_config(mode)
    variants = variants_of(study)
    assert study.is_locked and study.reference == "tarq"
    assert variants["tarq"].to_dict() == study.base.to_dict()
    different = {run_table.settings_hash(config) for config in variants.values()}
    assert len(variants) > 25 and len(different) >= len(variants) - 1  # Beauty has 256 codewords anyway


@pytest.mark.parametrize("mode", ["nowhere", "lastfm,beauty", "smoke,nowhere"])
def test_modes_that_do_not_exist(mode):
    with pytest.raises(ValueError, match=f"mode is '{mode}', expected one of"):
        ablation.get_config(mode)


@pytest.mark.slow
def test_the_command(command, tmp_path):
    arguments = ("-m", "tarq_jax.experiments.ablate", "--config=configs/ablation.py:smoke", "--seeds=0,1",
                 "--variant=two_tower", "--variant=cold", f"--workdir={tmp_path / 'runs'}",
                 f"--config.base.data.data_dir={tmp_path / 'data'}")
    done = command(*arguments, f"--json={tmp_path / 'rows.json'}")
    assert done.returncode == 0, done.stderr
    assert "variant 2 of 2, cold: 2 of 2 seeds to train" in done.stdout
    assert "mean over seeds 0, 1, test split" in done.stdout
    rows = run_table.read(tmp_path / "runs" / run_table.FILE)
    assert [(row["variant"], row["seed"]) for row in rows] == [
        ("two_tower", 0), ("two_tower", 1), ("cold", 0), ("cold", 1)]
    assert all(row["data"] and row["revision"] != "" for row in rows)
    assert (tmp_path / "rows.json").exists()


@pytest.mark.parametrize(("argument", "named"), [
    ("--variant=tarqq", "--variant is 'tarqq', expected one of ["),
    ("--seeds=1,1", "--seeds is '1,1', expected different whole numbers"),
    ("--config.variants.order_0.model.order=7", "config.variants.order_0: config.model.order is 7"),
    ("--config.base.steps=0", "config.base: config.steps is 0"),
])
def test_wrong_calls(argument, named, wrong_call, tmp_path):
    line = wrong_call("-m", "tarq_jax.experiments.ablate", "--config=configs/ablation.py:smoke", argument,
                      f"--workdir={tmp_path / 'runs'}")
    assert named in line
    assert not (tmp_path / "runs").exists()
