"""The health report of a real, tiny run: its page, its numbers, and calls that fail."""

import json
import re

import numpy as np
import pytest
import tiny

from tarq_jax import data
from tarq_jax.experiments import health, page
from tarq_jax.metrics import diagnosis
from tarq_jax.training import loop, setup
from tarq_jax.training.restore import load_run

pytestmark = pytest.mark.usefixtures("compiled_once", "one_device")
FIGURES = {"attention", "distances", "projection", "training", "usage"}


@pytest.fixture(scope="module", params=[0, 1], ids=["order_0", "order_1"])
def order(request):
    return request.param


@pytest.fixture(scope="module")
def workdir(order, tmp_path_factory, tiny_dataset, silent, compiled_once, one_device):
    config = tiny.make_config()
    config.model.order = order
    folder = tmp_path_factory.mktemp("run")
    loop.train(config, tiny_dataset, folder, silent)
    return folder


@pytest.fixture(scope="module")
def run(workdir, tiny_dataset):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "load_data", lambda config: tiny_dataset)
        return load_run(workdir)


@pytest.fixture(scope="module")
def observed(run):
    return health.observe(run, "test", 100)


def test_rows_are_the_health_of_the_split(run, observed):
    rows = health.level_rows(observed, run.config)
    assert [row["level"] for row in rows] == [1, 2]
    evaluated = loop.evaluate_split(run.config, run.objective, run.state, run.dataset, "test")[0]
    for row in rows:
        for name in ("utilisation", "perplexity", "dead", "quantization_error"):
            assert row[name] == pytest.approx(evaluated[f"{name}_{row['level']}"], rel=1e-4)
        assert row["verdict"].startswith(f"Level {row['level']}")


def test_as_many_requests_as_are_asked_for(run):
    first = next(data.eval_batches(run.dataset, "test", batch_size=3, **setup.batch_shapes(run.dataset)))
    assert len(health.observe(run, "test", 3).lengths) == first.candidate_mask.sum()


def test_attention_errors(run, observed, order):
    error, by_length, by_head = health.attention_errors(observed)
    evaluated = loop.evaluate_split(run.config, run.objective, run.state, run.dataset, "test")[0]
    assert error == pytest.approx(evaluated["attention_error"], rel=1e-4)
    assert list(by_head) == [f"{'head' if order else 'level'} {index}" for index in (1, 2)]
    assert all(set(lengths) == set(by_length) for lengths in by_head.values())
    assert all(0.0 <= value for lengths in by_head.values() for value in lengths.values())


def test_page_is_self_contained(run, observed, workdir):
    rows = health.level_rows(observed, run.config)
    parts = health.sections(run, observed, rows, workdir)
    assert {name for name, section in parts.items() if section.image} == FIGURES
    assert all(section.image.startswith(b"\x89PNG") for name, section in parts.items() if name in FIGURES)
    text = page.render("Health of <run>", list(parts.values()))
    assert "Health of &lt;run&gt;" in text and rows[0]["verdict"].replace("'", "&#x27;") in text
    assert text.count("data:image/png;base64,") == len(FIGURES)
    assert not re.search(r'(src|href)="(?!data:)', text)


def test_curves_begin_where_the_codebook_does(run, workdir):
    steps, curves = health.training_curves(workdir, 2, run.config.codebook.start)
    assert steps == [4, 5, 6]
    assert all(len(values) == 3 for levels in curves.values() for values in levels.values())
    assert health.training_curves(workdir / "nowhere", 2, 0)[0] == []


def test_lengths_fall_into_buckets():
    lengths = np.repeat([1, 2, 8, 9, 30], 4)
    ones = np.ones(20)
    found = health.Observed(None, None, None, ones * lengths, ones, lengths, {"head 1": 0.1 * ones})
    error, by_length, by_head = health.attention_errors(found)
    assert error == pytest.approx(np.sqrt(10.0))
    assert list(by_length) == ["1", "2 to 7", "8", "9 to 30"]
    np.testing.assert_allclose(list(by_length.values()), np.sqrt([1.0, 2.0, 8.0, 19.5]))
    assert by_head == {"head 1": dict.fromkeys(by_length, pytest.approx(0.1))}


def test_lengths_that_no_request_has_are_left_out():
    lengths = np.repeat([10, 50, 100], [8, 16, 8])
    ones = np.ones(32)
    found = health.Observed(None, None, None, ones, ones, lengths, {"head 1": ones})
    by_length = health.attention_errors(found)[1]
    assert set(by_length.values()) == {1.0} and not any(name.startswith("40") for name in by_length)


def test_a_model_without_codebook_is_refused(tiny_config, tiny_dataset, tmp_path, silent, monkeypatch):
    tiny_config.model.name = "two_tower"
    loop.train(tiny_config, tiny_dataset, tmp_path, silent)
    monkeypatch.setattr(loop, "load_data", lambda config: tiny_dataset)
    with pytest.raises(ValueError, match="'two_tower' has no codebook, expected one that has"):
        health.observe(load_run(tmp_path), "test", 10)


def test_empty_histories_have_no_error():
    """There is nothing to be off; so what is found elsewhere does not grow from 0."""
    lengths = np.repeat([0, 5, 9], 4)
    seen = (lengths > 0).astype(float)
    found = health.Observed(None, None, None, 0.01 * seen, seen, lengths, {"head 1": seen})
    error, by_length, _ = health.attention_errors(found)
    assert error == pytest.approx(0.1) and np.isnan(by_length["0 to 4"])
    assert len(diagnosis.diagnose_attention(error, by_length, 1)) == 1
    nothing = health.attention_errors(found._replace(squared_error=0 * seen, squared_norm=0 * seen))[0]
    assert diagnosis.diagnose_attention(nothing, {}, 1) == [
        "No history has an event, so that there is no attention to compare."]


def test_a_run_that_stopped_early(run, observed, workdir):
    """Before the codebook is used there is nothing to diagnose; after that it is said."""
    early = run.state.replace(step=np.int32(3))
    with pytest.raises(ValueError, match=r"is of step 3, expected one beyond config.codebook.start, 3"):
        health.observe(run._replace(state=early), "test", 10)
    rows = health.level_rows(observed, run.config)
    first = health.sections(run._replace(steps=5), observed, rows, workdir)["summary"].sentences[0]
    assert first == "The run is not finished: it stopped at step 5 of 6."


@pytest.mark.slow
def test_command(command, smoke_run, tmp_path):
    report = ("-m", "tarq_jax.experiments.health")
    done = command(*report, f"--run={smoke_run('tarq')}", f"--out={tmp_path}", f"--json={tmp_path}/rows.json")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index.html").is_file()
    assert {path.stem for path in tmp_path.glob("*.png")} == FIGURES
    assert [row["level"] for row in json.loads((tmp_path / "rows.json").read_text())] == [1, 2, 3]
    missing = command(*report, f"--run={tmp_path}/nowhere")
    assert missing.returncode == 1 and "no checkpoints in it" in missing.stderr
    assert len(missing.stderr.splitlines()) == 1
