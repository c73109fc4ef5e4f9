"""The health report of a real, tiny run: its page, its numbers, and calls that fail."""

import json
import re

import jax
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
    rows = health.level_rows(run, observed)
    assert [row["level"] for row in rows] == [1, 2]
    evaluated = loop.evaluate_split(run.config, run.objective, run.state, run.dataset, "test")[0]
    for row in rows:
        for name in ("utilisation", "perplexity", "dead", "quantization_error"):
            assert row[name] == pytest.approx(evaluated[f"{name}_{row['level']}"], rel=1e-4)
        assert row["verdict"].startswith(f"Level {row['level']}")


def test_as_many_requests_as_are_asked_for(run):
    first = next(data.eval_batches(run.dataset, "test", batch_size=3, **setup.batch_shapes(run.dataset)))
    assert len(health.observe(run, "test", 3).lengths) == first.candidate_mask.sum()


def test_few_requests_do_not_blame_the_codewords(run):
    """The first request has three candidates for four codewords; the data have sixty items."""
    few = health.observe(run, "test", 1)
    for row in health.level_rows(run, few):
        assert "were looked at, too few to judge 4 codewords. What helps: raise --requests" in row["verdict"]
        assert "num_codewords" not in row["verdict"] and "never used" not in row["verdict"]


def test_attention_errors(run, observed, order):
    """Two heads, or two levels; the output after the last level is the output of all."""
    errors = health.attention_errors(observed)
    evaluated = loop.evaluate_split(run.config, run.objective, run.state, run.dataset, "test")[0]
    assert errors.total == pytest.approx(evaluated["attention_error"], rel=1e-4)
    parts = [f"{'head' if order else 'level'} {index}" for index in (1, 2)]
    assert (list(errors.outputs), list(errors.weights)) == ([health.ALL, *parts], parts)
    by_length = errors.outputs[health.ALL]
    for lengths in (*errors.outputs.values(), *errors.weights.values()):
        assert set(lengths) == set(by_length) and all(0.0 < value for value in lengths.values())
    if not order:
        assert errors.outputs["level 2"] == pytest.approx(by_length, rel=1e-4)


def test_page_is_self_contained(run, observed, workdir):
    rows = health.level_rows(run, observed)
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


def seen_with(lengths, squared_error, squared_norm, variation):
    """What is seen of candidates with these histories, errors and norms [M] of all heads and of one."""
    error = health.OutputError(squared_error, squared_norm)
    return health.Observed(None, None, None, None, lengths, {health.ALL: error, "head 1": error},
                           {"head 1": variation})


def test_lengths_fall_into_buckets():
    lengths = np.repeat([1, 2, 8, 9, 30], 4)
    ones = np.ones(20)
    errors = health.attention_errors(seen_with(lengths, ones * lengths, ones, 0.1 * ones))
    assert errors.total == pytest.approx(np.sqrt(10.0))
    by_length = errors.outputs[health.ALL]
    assert list(by_length) == ["1", "2 to 7", "8", "9 to 30"] and errors.outputs["head 1"] == by_length
    np.testing.assert_allclose(list(by_length.values()), np.sqrt([1.0, 2.0, 8.0, 19.5]))
    assert errors.weights == {"head 1": dict.fromkeys(by_length, pytest.approx(0.1))}


def test_lengths_that_no_request_has_are_left_out():
    lengths = np.repeat([10, 50, 100], [8, 16, 8])
    ones = np.ones(32)
    by_length = health.attention_errors(seen_with(lengths, ones, ones, ones)).outputs[health.ALL]
    assert set(by_length.values()) == {1.0} and not any(name.startswith("40") for name in by_length)


def test_a_model_without_codebook_is_refused(tiny_config, tiny_dataset, tmp_path, silent, monkeypatch):
    tiny_config.model.name = "two_tower"
    loop.train(tiny_config, tiny_dataset, tmp_path, silent)
    monkeypatch.setattr(loop, "load_data", lambda config: tiny_dataset)
    with pytest.raises(ValueError, match="'two_tower' has no codebook, expected one that has"):
        health.observe(load_run(tmp_path), "test", 10)


@pytest.mark.parametrize("of_empty", [0.0, 1.0])
def test_empty_histories_have_no_error(of_empty):
    """There is nothing to be off, whatever their output; so what is found elsewhere does not grow from 0."""
    lengths = np.repeat([0, 5, 9], 4)
    errors = health.attention_errors(seen_with(
        lengths, *(np.where(lengths > 0, value, of_empty) for value in (0.01, 1.0, 0.5))))
    by_length = errors.outputs[health.ALL]
    assert errors.total == pytest.approx(0.1) and np.isnan(by_length["0 to 4"])
    weights = errors.weights["head 1"]
    assert np.isnan(weights["0 to 4"]) and weights["5 to 9"] == 0.5
    assert len(diagnosis.diagnose_attention(errors.total, by_length, 1)) == 1
    ones = np.ones(4)
    nothing = health.attention_errors(seen_with(0 * ones, ones, ones, ones)).total
    assert diagnosis.diagnose_attention(nothing, {}, 1) == [
        "No history has an event, so that there is no attention to compare."]


def test_empty_histories_of_a_model_with_biases(run, monkeypatch):
    """The output projection's bias is an output that no history caused, of the teacher or of the student."""
    def biased(path, leaf):
        return leaf + 1.0 if "output_projection']['bias" in jax.tree_util.keystr(path) else leaf

    def with_lengths(*arguments, **options):
        for batch in data_batches(*arguments, **options):
            lengths = np.resize([0, 2, 5], len(batch.user_id))[:, None]
            yield batch.replace(history_mask=batch.history_mask & (np.arange(5) < lengths))

    data_batches = data.eval_batches
    monkeypatch.setattr(data, "eval_batches", with_lengths)
    state = run.state.replace(params=jax.tree_util.tree_map_with_path(biased, run.state.params))
    observed = health.observe(run._replace(state=state), "test", 100)
    seen = observed.lengths > 0
    every = observed.outputs[health.ALL]
    assert (every.squared_norm[~seen] > 0.1).all() and 0 < seen.sum() < len(seen)
    errors = health.attention_errors(observed)
    assert errors.total == pytest.approx(
        np.sqrt(every.squared_error[seen].sum() / every.squared_norm[seen].sum()))
    evaluated = loop.evaluate_split(run.config, run.objective, state, run.dataset, "test")[0]
    assert errors.total == pytest.approx(evaluated["attention_error"], rel=1e-4)
    for by_length in (*errors.outputs.values(), *errors.weights.values()):
        assert list(by_length) == ["0 to 1", "2 to 5"]
        assert np.isnan(by_length["0 to 1"]) and by_length["2 to 5"] > 0


def test_a_run_that_stopped_early(run, observed, workdir):
    """Before the codebook is used there is nothing to diagnose; after that it is said."""
    early = run.state.replace(step=np.int32(3))
    with pytest.raises(ValueError, match=r"is of step 3, expected one beyond config.codebook.start, 3"):
        health.observe(run._replace(state=early), "test", 10)
    rows = health.level_rows(run, observed)
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
