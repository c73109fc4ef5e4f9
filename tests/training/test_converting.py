"""Conversion of a target-attention model: its parts, calibration, evaluation, fine-tuning."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tarq_jax import conversion as indexing
from tarq_jax import data, losses
from tarq_jax.models import TargetAttention
from tarq_jax.models.parts import target_attention_parts
from tarq_jax.training import conversion, setup


@pytest.fixture(scope="module")
def batch(tiny_dataset):
    return next(data.eval_batches(tiny_dataset, "test", batch_size=8, **setup.batch_shapes(tiny_dataset)))


@pytest.fixture(scope="module")
def module(tiny_dataset):
    return TargetAttention(tiny_dataset.schema, width=4, num_heads=2, hidden=(4,))


@pytest.fixture(scope="module")
def model(module, tiny_dataset, batch):
    """A model with random parameters, large enough that attention is not uniform."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), batch)
    params = jax.tree.map(lambda leaf: rng.normal(0.0, 0.8, leaf.shape).astype(leaf.dtype), shapes)
    return conversion.trained_model(target_attention_parts(module), params, tiny_dataset)


@pytest.fixture(scope="module")
def coarse(model):
    return indexing.quantize_queries(jax.random.key(0), model.queries, num_codewords=4)


def test_parts_are_the_model(module, model, batch):
    """Item queries, keys, values and head together give the model's own logits."""
    output = jax.jit(module.apply)(model.params, batch)
    items = batch.candidates[data.ITEM_ID]
    real = np.broadcast_to(batch.candidate_mask[:, None, :, None], output.queries.shape)
    queries = np.swapaxes(np.asarray(model.queries)[items], 1, 2)
    np.testing.assert_allclose(queries[real], np.asarray(output.queries)[real], rtol=1e-4, atol=1e-5)
    exact, _ = conversion.exact_and_approximate(
        model, indexing.with_corrections(*_nothing(model)), batch)
    logits = model.parts.head(model.params, model.parts.context(model.params, batch), exact)
    np.testing.assert_allclose(
        np.asarray(logits)[batch.candidate_mask], np.asarray(output.logits)[batch.candidate_mask],
        rtol=1e-4, atol=1e-5)


class OwnScore(TargetAttention):
    def score(self, attended, backbone):
        logits, output = super().score(2 * attended, backbone)
        return logits + 1, output


class OwnQueries(TargetAttention):
    def query(self, candidates):
        return 2 * super().query(candidates)


class AddsAfterwards(TargetAttention):
    def __call__(self, batch):
        output = super().__call__(batch)
        return output.replace(logits=output.logits + output.backbone.item[..., 0])


class ScalesInCall(TargetAttention):
    def __call__(self, batch):
        output = super().__call__(batch)
        attended = self.compute.attend(2 * output.queries, output.keys, output.values, batch.history_mask)
        return output.replace(logits=self.score(attended, output.backbone)[0])


def of_fork(fork, module, model):
    """The fork, with the parameters of the model."""
    forked = fork(module.schema, module.width, module.num_heads, module.hidden)
    return forked, conversion.trained_model(target_attention_parts(forked), model.params, model.dataset)


@pytest.mark.parametrize("fork", [TargetAttention, OwnScore, OwnQueries])
def test_forks_that_their_parts_describe(fork, module, model):
    forked, converted = of_fork(fork, module, model)
    conversion.check_logits(converted, forked)


@pytest.mark.parametrize("fork", [AddsAfterwards, ScalesInCall])
def test_forks_that_compute_something_else_than_their_parts(fork, module, model):
    forked, converted = of_fork(fork, module, model)
    words = f"{fork.__name__}: the logits of its parts differ by up to .* from those of __call__, expected at"
    with pytest.raises(ValueError, match=words):
        conversion.check_logits(converted, forked)


def _nothing(model):
    """An index whose codewords are the queries themselves, and corrections of zero."""
    codes = np.arange(len(model.queries))[:, None]
    return indexing.ItemIndex(levels=(model.queries,), codes=codes), np.zeros_like(model.queries)


def test_an_exact_index_scores_like_the_model(model):
    index = indexing.with_corrections(*_nothing(model))
    converted, exact = conversion.evaluate_index(model, index, recall_k=2, batch_size=16)
    assert converted["auc"] == pytest.approx(exact["auc"], abs=1e-6)
    assert converted["attention_error"] < 1e-5 and converted["recall_at_2"] == 1.0
    assert converted["quantization_error"] < 1e-10


def test_evaluation_tells_what_is_lost(model, coarse):
    calibration = list(conversion.calibration(model, requests=16))
    corrections = indexing.fitted_corrections(coarse, model.queries, calibration)
    order_0, exact = conversion.evaluate_index(model, coarse, recall_k=2, batch_size=16)
    order_1, _ = conversion.evaluate_index(
        model, indexing.with_corrections(coarse, corrections), recall_k=2, batch_size=16)
    assert 0.0 < order_1["attention_error"] < order_0["attention_error"] < 1.0
    assert order_0["utilisation"] == 1.0 and 0.0 < order_0["quantization_error"] < 1.0
    assert order_1["model"] != exact["model"]


def test_counts_of_candidates(model, tiny_dataset):
    assert model.counts.shape == (tiny_dataset.schema.num_items,) and model.counts[0] == 0
    assert model.counts.sum() == (tiny_dataset.splits["train"].candidates > 0).sum()


def test_more_codewords_than_items_that_training_shows(model):
    """The others weigh nothing in k-means, so that codewords would be there twice."""
    few = model._replace(counts=np.where(np.arange(len(model.counts)) <= 5, model.counts, 0))
    index = conversion.fit_index(few, num_codewords=5, order=0)
    assert len(np.unique(index.codes[1:])) == 5
    with pytest.raises(ValueError, match="6 codewords are asked for, expected at most 5, one for each item"):
        conversion.fit_index(few, num_codewords=6, order=0)


def test_calibration_is_of_training_requests(model):
    sizes = [len(mask) for _, _, mask in conversion.calibration(model, requests=20)]
    assert sizes == [8, 8, 8]
    batch = next(data.train_batches(
        model.dataset, "train", batch_size=3, seed=5, **setup.batch_shapes(model.dataset)))
    keys, values, mask = next(conversion.calibration(model, requests=3, seed=5))
    assert keys.shape == values.shape == (3, 2, mask.shape[1], 2)
    for found, expected in zip((keys, values), model.parts.keys_values(model.params, batch), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(mask, batch.history_mask)


def test_fewer_training_requests_than_a_calibration_batch(model):
    train = model.dataset.splits["train"]
    three = dataclasses.replace(train, user=train.user[:3], history_offsets=train.history_offsets[:4],
                                candidate_offsets=train.candidate_offsets[:4])
    splits = {**model.dataset.splits, "train": three}
    few = model._replace(dataset=dataclasses.replace(model.dataset, splits=splits))
    assert [len(mask) for _, _, mask in conversion.calibration(few, requests=5)] == [3, 3]


@pytest.mark.parametrize(("settings", "words"), [
    ({"order": 2}, "order is 2, expected 0 or 1"),
    ({"order": 1, "correction": "best"}, "correction is 'best', expected one of .'damped', 'fitted'"),
    ({"order": 1, "requests": 0}, "requests: expected an integer >= 1, got 0"),
])
def test_indices_that_cannot_be_fitted(model, settings, words):
    with pytest.raises(ValueError, match=words):
        conversion.fit_index(model, num_codewords=4, **settings)


def test_only_exact_corrections_are_quantized(model, coarse):
    with pytest.raises(ValueError, match="index has no corrections, expected the exact ones"):
        conversion.quantize_corrections(coarse, num_levels=1)
    exact = indexing.with_corrections(coarse, indexing.plain_corrections(coarse, model.queries, ()))
    quantized = conversion.quantize_corrections(exact, num_levels=1)
    with pytest.raises(ValueError, match="index has quantized corrections, expected the exact ones"):
        conversion.quantize_corrections(quantized, num_levels=1)
    with pytest.raises(ValueError, match="num_levels: expected an integer >= 1, got 0"):
        conversion.quantize_corrections(exact, num_levels=0)


def test_random_candidates(tiny_dataset, batch):
    rng = np.random.default_rng(0)
    wider = conversion.with_random_candidates(rng, batch, tiny_dataset, 5)
    own = batch.labels.shape[1]
    for name in ("labels", "weights", "candidate_mask"):
        assert getattr(wider, name).shape == (8, own + 5)
        np.testing.assert_array_equal(getattr(wider, name)[:, :own], getattr(batch, name))
    ids = wider.candidates[data.ITEM_ID]
    assert wider.candidate_mask[:, own:].all() and (ids[:, own:] > 0).all()
    for name, column in wider.candidates.items():
        np.testing.assert_array_equal(column[:, own:], tiny_dataset.items[name][ids[:, own:]])


def test_fine_tuning_brings_the_student_nearer(model, coarse):
    """The distillation loss falls; codes, keys and values stay; only the parameters of the head change."""
    steps = []
    tuned, index = conversion.fine_tune(
        model, coarse, steps=60, batch_size=16, num_random=8, level_rate=0.03, learning_rate=0.01,
        progress=steps.append)
    assert steps == [50, 60]
    np.testing.assert_array_equal(index.codes, coarse.codes)
    assert not np.array_equal(index.levels[0], coarse.levels[0])
    moved = {name for name, leaf in tuned["params"].items() if any(
        not np.array_equal(new, old) for new, old in
        zip(jax.tree.leaves(leaf), jax.tree.leaves(model.params["params"][name]), strict=True))}
    assert moved == {"head", "attention"}  # only the output projection of the attention

    def divergence(params, index):
        total = 0.0
        batches = data.eval_batches(model.dataset, "test", batch_size=8, **setup.batch_shapes(model.dataset))
        for batch in itertools.islice(batches, 3):
            context = model.parts.context(model.params, batch)
            exact, found = conversion.exact_and_approximate(model, index, batch)
            total += losses.weighted_mean(losses.distillation(
                model.parts.head(params, context, found), model.parts.head(model.params, context, exact)),
                batch.weights)
        return float(total)

    assert divergence(tuned, index) < divergence(model.params, coarse)


def test_no_step_of_fine_tuning_is_refused(model, coarse):
    with pytest.raises(ValueError, match="steps: expected an integer >= 1, got 0"):
        conversion.fine_tune(model, coarse, steps=0)


def test_parameters_without_a_derivative_stay(model, coarse):
    constants = {"steps": jnp.int32(7)}
    counted = model._replace(params=model.params | {"constants": constants})
    tuned, _ = conversion.fine_tune(counted, coarse, steps=1, batch_size=16, num_random=8)
    assert tuned["constants"] == constants and tuned["constants"]["steps"].dtype == jnp.int32
    heads = (jax.tree.leaves(params["params"]["head"]) for params in (tuned, model.params))
    assert not all(map(np.array_equal, *heads))
