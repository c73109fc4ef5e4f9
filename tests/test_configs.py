"""Every experiment in `configs/` is valid, gives its command, and, shrunk, runs from data to table."""

import importlib
import json
from pathlib import Path

import logs
import numpy as np
import pytest

from tarq_jax.config import default_config, validate
from tarq_jax.data import BUILDERS, PipelineSource
from tarq_jax.training import loop

ROOT = Path(__file__).resolve().parents[1]
STUDIES = ("ablation",)  # studies contain several experiments, see tests/experiments/test_ablate.py
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py")
               if path.stem not in ("__init__", *STUDIES))
COLUMNS = {"auc", "gauc", "log_loss", "calibration", "parameters", "train_seconds", "examples_per_second"}
STUDENT_COLUMNS = {"utilisation", "quantization_error", "attention_error", "recall_at_4", "rank_correlation"}


@pytest.fixture(params=NAMES)
def experiment(request, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module(f"configs.{request.param}")


def write_movielens(folder: Path) -> dict[str, str]:
    """Writes files in the `.inter/.item/.user` form; returns options of the data."""
    rng = np.random.default_rng(0)
    lines = {
        "inter": ["user_id:token\titem_id:token\trating:float\ttimestamp:float",
                  *(f"{user}\t{item}\t{rng.integers(1, 6)}\t{time}" for user in range(1, 31)
                    for time, item in enumerate(rng.permutation(40)[:20] + 1))],
        "item": ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq",
                 *(f"{item}\tFilm {item}\t{1950 + item}\tDrama Comedy" for item in range(1, 41))],
        "user": ["user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token",
                 *(f"{user}\t{20 + user}\tF\twriter\t12345" for user in range(1, 31))],
    }
    for ending, text in lines.items():
        (folder / f"ml-100k.{ending}").write_text("\n".join(text) + "\n")
    return {"source": str(folder)}


def write_sequences(folder: Path) -> dict[str, str]:
    """Writes a file of sequences and a file of attributes; returns options of the data."""
    rng = np.random.default_rng(0)
    users = [f"{user} {' '.join(map(str, rng.permutation(50)[:9] + 1))}" for user in range(1, 31)]
    (folder / "users.txt").write_text("\n".join(users) + "\n")
    attributes = {str(item): sorted({int(a) for a in rng.integers(1, 40, 4)}) for item in range(1, 51)}
    (folder / "attributes.json").write_text(json.dumps(attributes))
    return {"source": str(folder / "users.txt"), "attributes": str(folder / "attributes.json")}


WRITERS = {"movielens": write_movielens, "sequences": write_sequences, "synthetic": lambda folder: {},
           "taobao_userbehavior": logs.write_userbehavior, "taobao_ads": logs.write_ads,
           "impressions": logs.write_impressions}


def test_there_are_experiments():
    assert {"synthetic", "synthetic_order_0", "movielens_100k", "lastfm", "beauty"} <= set(NAMES)


@pytest.mark.parametrize("mode", ["", "smoke"])
def test_is_valid(experiment, mode):
    config = experiment.get_config(mode)
    validate(config)
    assert config.is_locked
    assert config.codebook.start < config.steps
    if mode == "smoke":
        full = experiment.get_config()
        assert config.steps <= 20 < full.steps and not config.baselines
        for name in ("name", "order", "student_gradient", "head", "num_levels"):  # it is the same experiment
            assert config.model[name] == full.model[name]
        assert config.loss_weights.to_dict() == full.loss_weights.to_dict()
        for name in ("init", "learning", "decay"):
            assert config.codebook[name] == full.codebook[name]


def test_tells_its_command(experiment):
    name = experiment.__name__.removeprefix("configs.")
    assert f"python train.py --config=configs/{name}.py --workdir=runs/" in experiment.__doc__
    assert experiment.get_config.__doc__


def test_defaults_are_not_shared(experiment):
    shrunk = experiment.get_config("smoke")
    assert experiment.get_config("smoke") is not shrunk
    assert experiment.get_config().steps > shrunk.steps < default_config().steps


@pytest.mark.usefixtures("one_device")
def test_runs_when_shrunk(experiment, tmp_path_factory, tmp_path, silent):
    """Uses made-up data in the form of the real data; the tests of the data read the real data."""
    config = experiment.get_config("smoke")
    if isinstance(BUILDERS[config.data.name], PipelineSource):
        pytest.importorskip("apache_beam", reason="Apache Beam prepares this: pip install 'tarq_jax[beam]'")
    config.data.data_dir = str(tmp_path_factory.getbasetemp() / "prepared")  # shared by the experiments
    config.data.update(WRITERS[config.data.name](tmp_path))
    dataset = loop.load_data(config)
    rows = loop.train(config, dataset, tmp_path / "run", silent).rows
    assert [row["model"] for row in rows] == ["tarq", "tarq_teacher"]
    assert all(row.keys() >= COLUMNS and np.isfinite(row["auc"]) for row in rows)
    assert rows[0].keys() >= STUDENT_COLUMNS and 0 < rows[0]["utilisation"] <= 1
    assert json.loads((tmp_path / "run" / "results.json").read_text())


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("name", ["inttower", "sim"])
def test_baselines_run_by_name(name, tiny_config, tiny_dataset, tmp_path, silent):
    """As with `--config.model.name=NAME`; test_objectives covers the other baselines."""
    tiny_config.model.name, tiny_config.model.category = name, "item_id"
    row, = loop.train(tiny_config, tiny_dataset, tmp_path, silent).rows
    assert row["model"] == name and row.keys() >= COLUMNS and np.isfinite(row["auc"])
