"""A user's own model, named by the configuration: what it may be, and what is refused before training."""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest

from tarq_jax import quantization, user_code
from tarq_jax.config import validate
from tarq_jax.models import FirstOrderTarq, TwoTower
from tarq_jax.training import loop, provenance, restore, setup
from tarq_jax.training.modules import common, of_tarq
from tarq_jax.training.objectives import STUDENT, TEACHER, Predictions, build, supervised, tarq

pytestmark = pytest.mark.usefixtures("one_device")


def own_tarq(model, loss_weights, schema, tables, axis_name):
    """The library's TARQ, but its codebook is made of the first latents."""
    module = FirstOrderTarq(**common(model, schema, tables), **of_tarq(model))
    return tarq(module, loss_weights, axis_name=axis_name)._replace(
        fit=lambda rng, latents: quantization.with_codewords(latents[:8].reshape(2, 4, 4)))


def own_towers(model, loss_weights, schema, tables, axis_name):
    return supervised(TwoTower(**common(model, schema, tables)), model.name, axis_name)


def other_student(*arguments):
    objective = own_tarq(*arguments)

    def predict(*inputs):
        found = objective.predict(*inputs)
        return found._replace(logits={"mine": found.logits[STUDENT], TEACHER: found.logits[TEACHER]})

    return objective._replace(predict=predict)


def two_names(*arguments):
    objective = own_towers(*arguments)

    def predict(*inputs):
        logits, = objective.predict(*inputs).logits.values()
        return Predictions({"one": logits, "other": logits}, None)

    return objective._replace(predict=predict)


def scores_as_weights(model, loss_weights, schema, tables, axis_name):
    return supervised(TwoTower(**common(model, schema, tables)), "weights", axis_name)


def of_two(model, loss_weights):
    """Takes too few arguments."""


def nothing(*arguments):
    """Returns None."""


@pytest.fixture
def named(tiny_config):
    """The configuration with a function of this file as its model."""
    def name(function):
        tiny_config.model.name = f"{__name__}:{function}"
        validate(tiny_config)
        return tiny_config

    return name


def test_its_own_fit_takes_the_place_of_k_means(named, tiny_dataset):
    config = named("own_tarq")
    parts = setup.set_up(config, tiny_dataset)
    assert isinstance(parts.objective.module, FirstOrderTarq)
    latents = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    fitted = setup.codebook_fit(config, parts.objective)(jax.random.key(0), latents)
    np.testing.assert_array_equal(fitted.codewords, latents[:8].reshape(2, 4, 4))


def test_it_is_trained_as_the_librarys_are(named, tiny_config, tiny_dataset, tmp_path, silent):
    """Both names of the same two towers give the same numbers, and the run records the file."""
    measured = ("auc", "log_loss", "calibration", "parameters")
    library = loop.with_model(tiny_config, "two_tower")
    expected, = loop.train(library, tiny_dataset, tmp_path / "a", silent).rows
    config = named("own_towers")
    found, = loop.train(config, tiny_dataset, tmp_path / "b", silent).rows
    assert found["model"] == config.model.name
    assert {name: found[name] for name in measured} == {name: expected[name] for name in measured}
    entry, = provenance.read(tmp_path / "b")
    assert entry["own"] == {config.model.name: user_code.source_of(config.model.name)}


def test_a_run_whose_file_changed_is_not_loaded(tiny_config, tiny_dataset, tmp_path, silent, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "elsewhere.py").write_text(f"from {__name__} import own_towers")
    monkeypatch.setattr(loop, "load_data", lambda config: tiny_dataset)
    tiny_config.model.name, tiny_config.steps = "elsewhere:own_towers", 1
    loop.train(tiny_config, tiny_dataset, tmp_path / "run", silent)
    assert restore.load_run(tmp_path / "run").steps == 1
    (tmp_path / "elsewhere.py").write_text(f"from {__name__} import own_towers  # changed")
    with pytest.raises(ValueError, match="was trained with the file of elsewhere:own_towers as"):
        restore.load_run(tmp_path / "run")


def test_rows_in_a_table_of_several():
    rows = [{"model": STUDENT, "auc": 0.7}, {"model": TEACHER, "auc": 0.8}]
    assert loop.named("tarq", rows) == rows
    assert [row["model"] for row in loop.named("a:b", rows)] == ["a:b, tarq", "a:b, tarq_teacher"]
    assert [row["model"] for row in loop.named("a:b", [{"model": "a:b"}])] == ["a:b"]


@pytest.mark.parametrize(("name", "message"), [
    ("json:lodas", "config.model.name is 'json:lodas', expected a function of json, which has no 'lodas'"),
    (f"{__name__}:of_two", "expected a function of 5 arguments and of options .*too many positional"),
    (f"{__name__}:nothing", "gives a NoneType, expected a tarq_jax.training.objectives.Objective"),
    ("nowhere:make", "config.model.name is 'nowhere:make', expected MODULE:FUNCTION of a module that Python"),
])
def test_functions_that_make_no_objective(name, message, tiny_config, tiny_dataset):
    tiny_config.model.name = name
    with pytest.raises(ValueError, match=message):
        build(tiny_config.model, tiny_config.loss_weights, tiny_dataset.schema)


@pytest.mark.parametrize(("function", "message"), [
    ("other_student", r"predicts \['mine', 'tarq_teacher'\], expected 'tarq' and 'tarq_teacher'"),
    ("two_names", r"predictors are \['one', 'other'\], expected one, or 'tarq' among them"),
    ("scores_as_weights", r"predicts \['weights'\], expected other names: files of scores have these"),
])
def test_predictors_that_evaluation_would_not_know(function, message, named, tiny_dataset):
    with pytest.raises(ValueError, match=message):
        setup.set_up(named(function), tiny_dataset)


def test_rules_of_codebooks_are_for_models_that_have_one(named, tiny_dataset):
    config = named("own_towers")
    config.codebook.start = config.steps
    setup.set_up(config, tiny_dataset)
    with pytest.raises(ValueError, match=r"config.codebook.start is 6, expected less than config.steps, 6"):
        setup.set_up(named("own_tarq"), tiny_dataset)


def test_a_validation_split_that_is_not_there(tiny_config, tiny_dataset):
    tiny_config.eval_every = 2
    splits = {name: split for name, split in tiny_dataset.splits.items() if name != "validation"}
    with pytest.raises(ValueError, match=r"config.eval_every is 2, expected 0 with data that has no split"):
        setup.set_up(tiny_config, dataclasses.replace(tiny_dataset, splits=splits))


def test_hash_of_a_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "made_up.py").write_text("def make(): ...\n")
    before = user_code.source_of("made_up:make")
    (tmp_path / "made_up.py").write_text("def make(): return 1\n")
    assert len(before) == 16 and before != user_code.source_of("made_up:make")
    session = "from tarq_jax import user_code; print(user_code.source_of('__main__:make'), end='')"
    done = subprocess.run([sys.executable, "-c", session], capture_output=True, text=True, check=True)
    assert done.stdout == ""  # code typed in a session is in no file
    assert user_code.source_of("nowhere:make") == user_code.source_of("sys:exit") == ""
    assert user_code.source_of("json:loads")
