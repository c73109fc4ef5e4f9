"""Objectives: which loss reaches which parameters, when, and with which weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tarq_jax import data, losses
from tarq_jax.config import COMPARED, MODELS
from tarq_jax.models import Tarq
from tarq_jax.models.embedding import ONE_DEVICE
from tarq_jax.training import setup
from tarq_jax.training.objectives import STUDENT, TEACHER, WITHOUT_CODEBOOK, build, tarq

STUDENT_ONLY = ("level_attention", "student_head")  # parameters that only the student has
LOSSES = ("student", "teacher", "distillation", "output_reconstruction", "alignment", "commitment",
          "codebook", "reconstruction")


def random_parameters(init, *arguments):
    """Non-zero random parameters with the shapes that `init` gives; needs no compilation."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(init, jax.random.key(0), *arguments)
    return jax.tree.map(lambda leaf: rng.normal(0.0, 0.5, leaf.shape).astype(leaf.dtype), shapes)


@pytest.fixture(scope="module")
def parts(tiny_dataset):
    """Parameters, codewords, a batch, and a function (loss weights [8], active) -> gradients."""
    module = Tarq(tiny_dataset.schema, width=4, num_heads=2, hidden=(4,), num_levels=2, aligned_share=0.5)
    batch = next(data.train_batches(
        tiny_dataset, "train", batch_size=4, seed=0, **setup.batch_shapes(tiny_dataset)))
    batch = batch.replace(weights=batch.weights * np.linspace(0.5, 2, batch.weights.size).reshape(
        batch.weights.shape).astype(np.float32))
    codewords = np.random.default_rng(1).normal(size=(2, 4, 4)).astype(np.float32)
    variables = random_parameters(module.init, batch, codewords)

    @jax.jit
    def compiled(weights, active):
        objective = tarq(module, dict(zip(LOSSES, weights, strict=True)))

        def loss(params, codewords):
            return objective.loss(params, codewords, batch, active)

        (value, aux), found = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(variables, codewords)
        return value, aux.metrics, {**found[0]["params"], "codewords": found[1]}

    def gradients(weights, active):
        return jax.device_get(compiled(np.asarray(weights, np.float32), active))

    return module, variables, codewords, batch, gradients


def size(tree) -> float:
    return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def test_before_its_start_no_loss_reaches_student_or_codebook(parts):
    gradients = parts[-1]
    _, _, found = gradients(np.ones(8), False)
    assert all(size(found[name]) == 0.0 for name in (*STUDENT_ONLY, "codewords"))
    assert all(size(found[name]) > 0.0 for name in ("teacher", "encoder", "decoder"))
    value, metrics, _ = gradients(np.ones(8), False)
    np.testing.assert_allclose(value, sum(metrics[f"loss/{name}"] for name in WITHOUT_CODEBOOK), rtol=1e-5)


def test_the_loss_is_the_weighted_sum(parts):
    weights = np.arange(1.0, 9.0)
    value, metrics, found = parts[-1](weights, True)
    assert set(metrics) == {"loss", *(f"loss/{name}" for name in LOSSES)}
    expected = np.dot(weights, [metrics[f"loss/{name}"] for name in LOSSES])
    np.testing.assert_allclose([value, metrics["loss"]], expected, rtol=1e-5)
    assert all(size(found[name]) > 0.0 for name in (*STUDENT_ONLY, "codewords", "teacher"))


def test_the_configured_weights_reach_the_loss(tiny_config, tiny_dataset):
    weights = np.arange(2.0, 10.0)
    tiny_config.loss_weights.update(dict(zip(LOSSES, weights.tolist(), strict=True)))
    objective = setup.make_objective(tiny_config, tiny_dataset, ONE_DEVICE)
    batch = next(data.train_batches(
        tiny_dataset, "train", batch_size=8, seed=0, **setup.batch_shapes(tiny_dataset)))
    codewords = np.random.default_rng(0).normal(size=(2, 4, 4)).astype(np.float32)
    params = random_parameters(objective.init, batch, codewords)
    value, aux = jax.jit(objective.loss)(params, codewords, batch, True)
    values = np.array([aux.metrics[f"loss/{name}"] for name in LOSSES])
    assert (values > 1e-3).all()
    np.testing.assert_allclose(value, np.dot(weights, values), rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_zero_weight_removes_a_loss(parts, name):
    gradients, alone = parts[-1], np.array([float(loss == name) for loss in LOSSES])
    _, _, everything = gradients(np.ones(8), True)
    _, _, without = gradients(1.0 - alone, True)
    _, _, itself = gradients(alone, True)
    assert size(itself) > 1e-6
    together = jax.tree.map(np.add, without, itself)
    for found, expected in zip(jax.tree.leaves(everything), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", sorted({*LOSSES} - {"teacher"}))
def test_only_its_own_loss_trains_the_teacher(parts, name):
    """The student does not change the teacher. (By default; the model's tests cover other settings.)"""
    _, _, found = parts[-1](np.array([float(loss == name) for loss in LOSSES]), True)
    assert size(found["teacher"]) == 0.0


@pytest.mark.parametrize(("weights", "wrong"), [
    (dict.fromkeys((*LOSSES, "aligment"), 1.0), "aligment"),
    (dict.fromkeys(LOSSES[1:], 1.0), "expected"),
    ({}, r"names \[\]"),
], ids=["unknown", "missing", "none"])
def test_wrong_names_of_losses(parts, weights, wrong):
    module, variables, codewords, batch, _ = parts
    with pytest.raises(ValueError, match=wrong) as caught:
        jax.eval_shape(lambda: tarq(module, weights).loss(variables, codewords, batch, True))
    assert all(name in str(caught.value) for name in LOSSES)


@pytest.mark.parametrize("name", MODELS)
def test_build(tiny_config, tiny_dataset, name):
    """Checks every model by shapes: parameters, loss, names of predictors, latents if it quantizes."""
    tiny_config.model.name, tiny_config.model.category = name, "item_id"
    objective = build(tiny_config.model, tiny_config.loss_weights, tiny_dataset.schema)
    batch = next(data.train_batches(
        tiny_dataset, "train", batch_size=8, seed=0, **setup.batch_shapes(tiny_dataset)))
    codewords = jnp.zeros((2, 4, 4)) if name == "tarq" else None
    params = jax.eval_shape(objective.init, jax.random.key(0), batch, codewords)
    value, aux = jax.eval_shape(objective.loss, params, codewords, batch, True)
    predictions = jax.eval_shape(objective.predict, params, codewords, batch)
    assert value.shape == () and "loss" in aux.metrics
    assert list(predictions.logits) == ([STUDENT, TEACHER] if name == "tarq" else [name])
    assert all(logits.shape == batch.labels.shape for logits in predictions.logits.values())
    if name == "tarq":
        assert aux.quantizer.codes.shape == (*batch.labels.shape, 2)
        latents = jax.eval_shape(objective.latents, params, batch)
        assert latents.shape == predictions.diagnostics.latents.shape == (*batch.labels.shape, 4)
    else:
        assert (aux.quantizer, predictions.diagnostics, objective.latents) == (None, None, None)


@pytest.mark.parametrize("order", [0, 1])
def test_quantization_settings_reach_the_model(tiny_config, tiny_dataset, order):
    """Cosine serves as it trains; balanced codes depend on the batch, so serving uses the nearest."""
    tiny_config.model.order = order
    batch = next(data.train_batches(
        tiny_dataset, "train", batch_size=8, seed=0, **setup.batch_shapes(tiny_dataset)))
    codewords = np.random.default_rng(0).normal(size=(2, 4, 4)).astype(np.float32)
    codewords *= np.array([0.3, 1.0, 2.0, 3.0], np.float32)[:, None]
    trained, served = {}, {}
    for assign in ("nearest", "cosine", "balanced"):
        tiny_config.model.assign = assign
        objective = build(tiny_config.model, tiny_config.loss_weights, tiny_dataset.schema)
        params = random_parameters(objective.init, batch, codewords)
        trained[assign] = np.asarray(objective.loss(params, codewords, batch, True)[1].quantizer.codes)
        served[assign] = np.asarray(
            objective.predict(params, codewords, batch).diagnostics.quantizer.codes)
    np.testing.assert_array_equal(trained["nearest"], served["nearest"])
    np.testing.assert_array_equal(trained["cosine"], served["cosine"])
    np.testing.assert_array_equal(served["balanced"], served["nearest"])
    assert not np.array_equal(trained["balanced"], trained["nearest"])
    assert not np.array_equal(trained["cosine"], trained["nearest"])


@pytest.mark.slow
def test_rotation_reaches_the_encoder(tiny_config, tiny_dataset):
    """The gradient of the reconstruction differs, its value does not."""
    tiny_config.model.order = 0
    batch = next(data.train_batches(
        tiny_dataset, "train", batch_size=8, seed=0, **setup.batch_shapes(tiny_dataset)))
    codewords = np.random.default_rng(0).normal(size=(2, 4, 4)).astype(np.float32)
    found = []
    for pass_through in ("straight_through", "rotation"):
        tiny_config.model.pass_through = pass_through
        objective = build(tiny_config.model, tiny_config.loss_weights, tiny_dataset.schema)
        params = random_parameters(objective.init, batch, codewords)
        value, gradient = jax.value_and_grad(
            lambda p, loss=objective.loss: loss(p, codewords, batch, True)[0])(params)
        found.append((float(value), gradient["params"]["encoder"]["Dense_0"]["kernel"]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert size(found[0][1] - found[1][1]) > 1e-4


def test_two_tower_large_is_of_tarqs_size(tiny_config, tiny_dataset):
    """At the width of the experiments, so that TARQ's advantage over it is not due to size."""
    tiny_config.model.width, tiny_config.model.hidden, tiny_config.model.num_codewords = 32, (64,), 64
    tiny_config.model.num_levels = 3
    batch = next(data.train_batches(
        tiny_dataset, "train", batch_size=1, seed=0, **setup.batch_shapes(tiny_dataset)))
    sizes = {}
    for name in COMPARED:
        tiny_config.model.name = name
        objective = build(tiny_config.model, tiny_config.loss_weights, tiny_dataset.schema)
        params = jax.eval_shape(objective.init, jax.random.key(0), batch, jnp.zeros((3, 64, 32)))
        sizes[name] = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert sizes["two_tower"] < sizes["target_attention"] < sizes["tarq"]
    assert 0.75 < sizes["two_tower_large"] / sizes["tarq"] < 1.5


def test_supervised_loss_is_the_weighted_cross_entropy(tiny_config, tiny_dataset):
    tiny_config.model.name = "two_tower"
    objective = build(tiny_config.model, tiny_config.loss_weights, tiny_dataset.schema)
    batch = next(data.train_batches(
        tiny_dataset, "train", batch_size=4, seed=0, **setup.batch_shapes(tiny_dataset)))
    batch = batch.replace(weights=np.arange(12, dtype=np.float32).reshape(4, 3))
    params = random_parameters(objective.init, batch, None)
    logits = jax.jit(objective.predict)(params, None, batch).logits["two_tower"]
    value, aux = jax.jit(objective.loss)(params, None, batch, True)
    expected = losses.weighted_mean(losses.binary_cross_entropy(logits, batch.labels), batch.weights)
    np.testing.assert_allclose([value, aux.metrics["loss"]], expected, rtol=1e-6)


def test_the_teacher_trains_as_target_attention_alone_does(tiny_config, tiny_dataset):
    """Starting from the same parameters, if the student's gradient stays in the student."""
    found = {}
    for name in ("tarq", "target_attention"):
        tiny_config.model.name = name
        objective = build(tiny_config.model, tiny_config.loss_weights, tiny_dataset.schema)
        optimizer = setup.make_optimizer(tiny_config)
        state = setup.init_state(tiny_config, objective, optimizer, tiny_dataset)
        step = setup.compile_step(tiny_config, objective, optimizer)
        batches = data.train_batches(
            tiny_dataset, "train", batch_size=8, seed=0, **setup.batch_shapes(tiny_dataset))
        for _ in range(6):
            state, _ = step(state, next(batches))
        found[name] = state.params["params"]
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5),
                 found["tarq"]["teacher"], found["target_attention"])
