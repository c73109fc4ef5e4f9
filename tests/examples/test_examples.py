"""The examples: each runs, does what it claims, is short, and uses nothing private of the library."""

import ast
import contextlib
import csv
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal

from examples import (
    attention,
    backbone,
    dataset,
    head,
    hierarchical_teacher,
    loss,
    product_quantization,
    small,
)
from tarq_jax import conversion as indexing
from tarq_jax import data, losses, quantization, reporting
from tarq_jax.attention import multi_head_attention
from tarq_jax.models import Tarq
from tarq_jax.models.embedding import ONE_DEVICE
from tarq_jax.models.parts import target_attention_parts
from tarq_jax.training import conversion, objectives, setup

pytestmark = pytest.mark.usefixtures("one_device")
FOLDER = Path(small.__file__).parent
PARTS = [path for path in FOLDER.glob("*.py") if path.stem != "notebook"]
TRAINED = {  # for each example, a model to train that needs everything that the example adds
    "product_quantization": "product", "hierarchical_teacher": "hierarchical", "head": "cross",
    "attention": "random_features", "loss": "half_listwise", "backbone": "gru_target_attention",
    "dataset": "two_tower",
}
LONG = ("product_quantization", "hierarchical_teacher", "head")  # compiling TARQ takes a while
STEPS = 40
close = np.testing.assert_allclose


def random_parameters(init, *arguments):
    shapes = jax.eval_shape(init, jax.random.key(0), *arguments)
    return jax.tree.map(lambda leaf: 0.7 * normal(leaf.size, *leaf.shape), shapes)


@pytest.fixture(scope="module")
def batch(tiny_dataset):
    shapes = setup.batch_shapes(tiny_dataset)
    found = next(data.train_batches(tiny_dataset, "train", batch_size=8, seed=0, **shapes))
    kept = np.arange(found.history_mask.shape[1]) < np.array([5, 0, 3, 5, 1, 2, 4, 5])[:, None]
    return found.replace(history_mask=found.history_mask & kept)


def objective_of(config, schema, name):
    config.model.name = name
    return objectives.build(config.model, config.loss_weights, schema, ONE_DEVICE, None)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in TRAINED])
def test_runs_and_learns(name, tiny_config, tiny_dataset, tmp_path, monkeypatch):
    """At tiny size, one of the compared models has finite metrics and a falling loss."""
    example, model, train_each = importlib.import_module(f"examples.{name}"), TRAINED[name], small.train_each
    monkeypatch.setattr(small.tempfile, "TemporaryDirectory", lambda: contextlib.nullcontext(tmp_path))
    monkeypatch.setattr(small, "train_each", lambda config, dataset, models: train_each(
        config, dataset, [one for one in models if one.rpartition(":")[2] == model]))
    tiny_config.steps = tiny_config.checkpoint_every = STEPS
    tiny_config.optimizer.learning_rate = 0.02
    used = dataset.read(dataset.made_up_log(users=8, times=5)) if name == "dataset" else tiny_dataset
    rows = example.compare(tiny_config, used)
    assert rows and all(np.isfinite([row["auc"], row["log_loss"]]).all() for row in rows)
    assert len({row["model"] for row in rows}) == len(rows)
    lines = [line for line in reporting.read_metrics(tmp_path / model) if "loss" in line]
    values = [line.get("loss/student", line["loss"]) for line in lines]
    assert len(values) == STEPS and np.mean(values[-8:]) < np.mean(values[:8])


@pytest.mark.parametrize("path", sorted(PARTS), ids=lambda path: path.stem)
def test_examples_are_short_and_need_nothing_private(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 60
    assert path.stem in ("__init__", "small") or f"python -m examples.{path.stem}\n" in ast.get_docstring(
        ast.parse(text))
    names: list[str] = []  # names that are imported, read as attributes, or overridden
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names += [getattr(node, "module", ""), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Attribute | ast.FunctionDef):
            names.append(node.attr if isinstance(node, ast.Attribute) else node.name)
    private = {part for name in names for part in name.split(".") if part.startswith("_")}
    assert private <= {"__call__", "_replace"}  # `_replace` of named tuples is public


def test_every_example_is_tried():
    assert {path.stem for path in PARTS} == {*TRAINED, "__init__", "small"}


# Product quantization.


def test_product_codes():
    """Each level finds the nearest codeword in its own slice; everything else follows from the codes."""
    codewords = normal(0, 3, 5, 7) * np.asarray(product_quantization.slices(3, 7))[:, None]
    latents = normal(1, 11, 7)
    output = product_quantization.encode(codewords, latents)
    for level, own in enumerate((slice(0, 3), slice(3, 5), slice(5, 7))):
        distances = np.sum((latents[:, None, own] - codewords[level, :, own]) ** 2, axis=-1)
        np.testing.assert_array_equal(output.codes[:, level], distances.argmin(axis=-1))
        for found in (output.chosen, output.residuals):
            assert not np.any(np.delete(found[:, level], own, axis=-1))
        close(output.residuals[:, level, own], latents[:, own], rtol=1e-6)
    close(quantization.decode(codewords, output.codes), output.quantized, rtol=1e-6)


def test_product_codebook_stays_on_its_slices():
    """Codewords stay on their slices when fitted, updated by EMA and revived; and the fit is a good one."""
    latents, own = normal(2, 200, 6), np.asarray(product_quantization.slices(2, 6))

    @jax.jit
    def go_through(key):
        codebook = product_quantization.fit(key, latents, levels=2, size=8)
        output = product_quantization.encode(codebook.codewords, latents)
        counts, sums = quantization.assignment_statistics(output, codebook.codewords)
        moved = quantization.ema_codewords(quantization.update_statistics(codebook, counts, sums, decay=0.5))
        revived = quantization.revive(key, moved, output.residuals, jnp.ones((2, 8), bool))
        return output, [found.codewords for found in (codebook, moved, revived)]

    output, codebooks = go_through(jax.random.key(0))
    for codewords in codebooks:
        assert np.abs(codewords).max() > 0.5 and not np.any(codewords * (1 - own[:, None]))
    assert np.sum((latents - output.quantized) ** 2) < 0.5 * np.sum(latents**2)


def test_product_gradients():
    """The codebook loss pulls each used codeword towards its slice of the latent, and does nothing else."""
    latents, codewords = normal(4, 90, 4), normal(3, 2, 4, 4)

    def codebook_loss(codewords):
        output = product_quantization.encode(codewords, latents)
        return losses.codebook_loss(output.chosen, output.residuals).sum(), output.codes

    slopes, codes = jax.grad(codebook_loss, has_aux=True)(codewords)
    own = np.asarray(product_quantization.slices(2, 4))[:, None]
    assert not np.any(slopes * (1 - own))
    for level in range(2):
        np.testing.assert_array_equal(np.any(slopes[level], axis=-1), np.isin(np.arange(4), codes[:, level]))


# The hierarchical teacher.


@pytest.fixture(scope="module")
def teacher(tiny_dataset, batch):
    module = hierarchical_teacher.SessionAttention(tiny_dataset.schema, width=4, num_heads=2, hidden=(4,))
    return module, random_parameters(module.init, batch)


def test_converted_teacher_is_exact_where_codewords_are_queries(teacher, batch, tiny_dataset):
    module, params = teacher
    model = conversion.trained_model(target_attention_parts(module), params, tiny_dataset)
    index = indexing.ItemIndex(levels=(model.queries,), codes=jnp.arange(len(model.queries))[:, None])

    @jax.jit
    def both(params):
        exact, found = conversion.exact_and_approximate(model, index, batch)
        logits = model.parts.head(params, model.parts.context(params, batch), found)
        return (found, logits), (exact, module.apply(params, batch).logits)

    for found, expected in zip(*both(params), strict=True):
        close(found, expected, rtol=1e-4, atol=1e-4)


def test_sessions_hear_of_one_another_but_not_of_padding():
    history, mask = normal(5, 2, 7, 4), np.arange(7) < np.array([6, 3])[:, None]
    module = hierarchical_teacher.SessionEncoder(num_heads=2)
    params = random_parameters(module.init, history, mask)
    encode = jax.jit(lambda history: module.apply(params, history, mask))
    found = encode(history)
    padded = encode(np.where(mask[..., None], history, 9.0))
    close(padded[mask], found[mask], rtol=1e-5, atol=1e-6)
    changed = history.copy()
    changed[0, 5] += 1.0  # an event of the second session
    assert np.abs(encode(changed) - found)[0, :4].max() > 1e-4


def test_teacher_of_tarq(batch, tiny_dataset, teacher):
    """The student's teacher is the hierarchical one: all its parameters have the same shapes."""

    class Student(Tarq):
        def make_teacher(self):
            sizes = self.schema, self.width, self.num_heads, self.hidden
            return hierarchical_teacher.SessionAttention(*sizes, tables=self.tables, parent=None)

    module = Student(tiny_dataset.schema, width=4, num_heads=2, hidden=(4,), num_levels=2)
    params = jax.eval_shape(module.init, jax.random.key(0), batch, normal(0, 2, 4, 4))
    expected = jax.tree.map(jnp.shape, teacher[1]["params"])
    assert jax.tree.map(jnp.shape, params["params"]["teacher"]) == expected


# Attention, head, loss, backbone.


def test_random_features_tend_to_softmax_attention(batch):
    queries, keys, values = normal(6, 8, 2, 3, 4), normal(7, 8, 2, 5, 4), normal(8, 8, 2, 5, 4)
    mask = batch.history_mask
    exact = multi_head_attention(queries, keys, values, mask)
    errors = []
    for draws in (16, 256, 4096):
        found = attention.random_feature_attention(queries, keys, values, mask, normal(draws, draws, 4))
        assert not np.any(found[~mask.any(axis=1)])
        errors.append(float(np.linalg.norm(found - exact) / np.linalg.norm(exact)))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.05


def test_cross_head(batch, tiny_config, tiny_dataset):
    """Without crosses it is linear in the interaction features; and it has parameters of its own."""
    objective = objective_of(tiny_config, tiny_dataset.schema, "examples.head:cross")
    params = random_parameters(objective.init, batch, normal(9, 2, 4, 4))["params"]
    assert {"crosses_0", "crosses_1", "cross_output"} < params.keys() and "student_head" not in params
    module = head.CrossTarq(tiny_dataset.schema, width=4, num_heads=2, hidden=(4,), num_levels=2)
    for name in ("crosses_0", "crosses_1"):
        params[name] = jax.tree.map(np.zeros_like, params[name])
    output = jax.jit(module.apply)({"params": params}, batch, normal(9, 2, 4, 4))
    backbone_output = output.teacher.backbone
    features = head.interaction_features(output.attention_output, backbone_output)
    added = features @ params["cross_output"]["kernel"] + params["cross_output"]["bias"]
    close(output.logits, backbone_output.logits + added[..., 0], rtol=1e-4, atol=1e-4)


def test_codes_that_are_served_do_not_depend_on_the_batch(tiny_config, tiny_dataset):
    tiny_config.model.assign = "balanced"
    objective = objective_of(tiny_config, tiny_dataset.schema, "examples.head:cross")
    assert objective.module.encode.keywords == {"assign": quantization.nearest, "block": 0}


def test_listwise_loss():
    """Closed form; only differences within a request count, and padding does not."""
    logits = np.array([[1.0, 0.0, 5.0], [2.0, 2.0, 2.0], [3.0, 1.0, 2.0]], np.float32)
    mask = np.array([[True, True, False], [True, True, True], [False, False, False]])
    found = loss.listwise(logits, mask)
    close(found[0, :2], [np.log1p(np.exp(-1.0)), np.log1p(np.exp(1.0))], rtol=1e-5)
    close(found[1], np.log(3.0), rtol=1e-5)
    close(loss.listwise(logits + 7.0, mask)[:2], found[:2], rtol=1e-5)
    weights = np.where(mask, [1.0, 0.0, 1.0], 0.0).astype(np.float32)
    slopes = jax.grad(lambda logits: losses.weighted_mean(loss.listwise(logits, mask), weights))(logits)
    assert np.isfinite(slopes).all() and not np.any(slopes[~mask])
    close(slopes.sum(axis=1), 0.0, atol=1e-6)


def test_recurrent_backbone(batch, tiny_config, tiny_dataset):
    """It depends on the order of its history and not on padding; also under target attention."""
    module = backbone.GruTwoTower(tiny_dataset.schema, width=4, num_heads=2, hidden=(4,))
    params = random_parameters(module.init, batch)
    forward = jax.jit(lambda history: module.apply(params, batch.replace(history=history)).logits)
    found = forward(batch.history)
    real = {1: batch.history_mask, 2: batch.history_mask[..., None]}
    padded = jax.tree.map(lambda values: np.where(real[values.ndim - 1], values, 1), batch.history)
    close(forward(padded), found, rtol=1e-5, atol=1e-6)
    turned = jax.tree.map(lambda values: np.flip(values, axis=1), batch.history)
    full = batch.history_mask.all(axis=1)
    assert np.abs(forward(turned) - found)[full].max() > 1e-4
    above = backbone.GruTargetAttention(tiny_dataset.schema, width=4, num_heads=2, hidden=(4,))
    shapes = jax.eval_shape(above.init, jax.random.key(0), batch)["params"]["backbone"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params["params"])


# Data.


def test_requests_of_a_log():
    """Every impression is a candidate once, and a history holds the clicks before its request."""
    lines = list(dataset.made_up_log(users=5, times=10, items=9))
    found, rows = dataset.read(lines), list(csv.DictReader(lines))
    data.check_dataset(found)
    train, test = found.splits["train"], found.splits["test"]
    assert len(train) == 5 * 8 and len(test) == 5 * 2
    assert len(train.labels) + len(test.labels) == len(rows)
    assert train.labels.sum() + test.labels.sum() == sum(row["clicked"] == "1" for row in rows)
    prices = found.items["price"]
    for request, (time, user) in enumerate((time, user) for time in (8, 9) for user in range(5)):
        before = [float(row["price"]) for row in rows if int(row["user"]) == user and row["clicked"] == "1"
                  and int(row["time"]) < time][-20:]
        own = slice(*test.history_offsets[request:request + 2])
        close(prices[test.history[own]], before, rtol=1e-6)


@pytest.mark.slow
def test_the_notebook(command):
    done = command("-m", "examples.notebook")
    assert done.returncode == 0 and "on the frontier are two_tower, tarq" in done.stdout, done.stderr
