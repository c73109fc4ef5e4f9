"""Metrics of handmade predictions equal the metrics on flat arrays, whatever the padding contains."""

import re
import weakref

import numpy as np
import pytest

from tarq_jax import metrics, quantization
from tarq_jax.training.evaluate import evaluate
from tarq_jax.training.objectives import STUDENT, TEACHER, Diagnostics, Predictions
from tarq_jax.types import Batch, QuantizerOutput

CANDIDATES, WIDTH, LEVELS, CODEWORDS, RECALL_K = 4, 3, 2, 5, 2
CODEWORD_VALUES = np.random.default_rng(9).normal(size=(LEVELS, CODEWORDS, WIDTH)).astype(np.float32)


def make_batch(lengths, seed, users) -> Batch:
    rng = np.random.default_rng(seed)
    mask = np.arange(CANDIDATES) < np.array(lengths)[:, None]
    return Batch(
        user_id=np.array(users, np.int32), user={}, context={}, history={},
        history_mask=np.ones((len(lengths), 1), bool),
        candidates={"noise": rng.normal(size=mask.shape).astype(np.float32)}, candidate_mask=mask,
        labels=rng.integers(0, 2, mask.shape).astype(np.float32) * mask,
        weights=rng.uniform(0.5, 2.0, mask.shape).astype(np.float32) * mask)


BATCHES = [make_batch((4, 3, 1), 0, (1, 2, 1)), make_batch((2, 4, 0), 1, (3, 2, 0))]


def logits_of(batch, padding: float = 0.0) -> np.ndarray:
    logits = 2.0 * batch.candidates["noise"] + batch.labels
    return np.where(batch.candidate_mask, logits, padding).astype(np.float32)


def predict_plain(batch, padding=0.0):
    return Predictions({"two_tower": logits_of(batch, padding)}, None)


def predict_quantized(batch, padding=0.0):
    rng = np.random.default_rng(int(batch.user_id[0]))
    mask = batch.candidate_mask[..., None]
    shape = (*batch.labels.shape, WIDTH)
    latents, student, teacher = (np.where(mask, rng.normal(size=shape), padding).astype(np.float32)
                                 for _ in range(3))
    quantizer = quantization.encode(CODEWORD_VALUES, latents)
    logits = {STUDENT: logits_of(batch, padding), TEACHER: np.sin(5 * logits_of(batch, padding))}
    return Predictions(logits, Diagnostics(latents, quantizer, student, teacher))


def flat(values):
    """The values of all real candidates, request by request."""
    return np.concatenate([value[batch.candidate_mask] for value, batch in zip(values, BATCHES, strict=True)])


def by_hand(logits) -> dict:
    labels, weights = (flat([getattr(b, name) for b in BATCHES]) for name in ("labels", "weights"))
    scores = flat(logits)
    users = np.concatenate([np.repeat(b.user_id, b.candidate_mask.sum(axis=1)) for b in BATCHES])
    return {"auc": metrics.auc(labels, scores, weights),
            "gauc": metrics.grouped_auc(labels, scores, users, weights).value,
            "log_loss": metrics.log_loss(labels, scores, weights),
            "calibration": metrics.calibration(labels, scores, weights)}


@pytest.mark.parametrize("padding", [0.0, 50.0])
def test_ranking_metrics_on_real_candidates_alone(padding):
    rows = evaluate(lambda batch: predict_plain(batch, padding), BATCHES, codewords=None, recall_k=RECALL_K)
    expected = by_hand([logits_of(batch) for batch in BATCHES])
    assert len(set(expected.values())) == 4 and all(np.isfinite(value) for value in expected.values())
    assert rows == [{"model": "two_tower"} | expected]


@pytest.mark.parametrize("padding", [0.0, 50.0])
def test_student_and_teacher(padding):
    student, teacher = evaluate(lambda batch: predict_quantized(batch, padding), BATCHES,
                                codewords=CODEWORD_VALUES, recall_k=RECALL_K)
    found = [predict_quantized(batch) for batch in BATCHES]
    assert teacher == {"model": TEACHER} | by_hand([p.logits[TEACHER] for p in found])
    assert by_hand([p.logits[STUDENT] for p in found]).items() <= student.items()

    diagnostics = [p.diagnostics for p in found]
    outputs = [flat([getattr(d, name) for d in diagnostics]) for name in ("student_output", "teacher_output")]
    assert student["attention_error"] == pytest.approx(
        metrics.relative_error(metrics.error_energy(*outputs)), rel=1e-12)
    mask = np.concatenate([b.candidate_mask for b in BATCHES])
    orders = [np.concatenate([p.logits[name] for p in found]) for name in (STUDENT, TEACHER)]
    assert student["recall_at_2"] == metrics.recall_at_k(*orders, mask, RECALL_K)
    assert student["rank_correlation"] == metrics.rank_correlation(*orders, mask)

    quantizer = QuantizerOutput(**{
        name: flat([np.asarray(getattr(d.quantizer, name)) for d in diagnostics])
        for name in ("codes", "quantized", "residuals", "chosen")})
    health = metrics.codebook_health(
        CODEWORD_VALUES, metrics.usage_counts(quantizer.codes, CODEWORDS),
        metrics.unexplained_energy(flat([d.latents for d in diagnostics]), quantizer))
    assert {key: student[key] for key in health} == pytest.approx(health, rel=1e-6)
    assert student["utilisation"] == min(health["utilisation_1"], health["utilisation_2"])
    assert student["quantization_error"] == pytest.approx(health["quantization_error_2"], rel=1e-6)


def test_attention_error_leaves_out_empty_histories():
    """Their outputs are those of biases; everything else counts their candidates."""
    emptied = [batch.replace(history_mask=np.array([[True], [False], [True]])) for batch in BATCHES]
    arguments = {"codewords": CODEWORD_VALUES, "recall_k": RECALL_K}
    whole, found = (evaluate(predict_quantized, batches, **arguments)[0] for batches in (BATCHES, emptied))
    masks = [batch.candidate_mask & batch.history_mask for batch in emptied]
    outputs = [predict_quantized(batch).diagnostics for batch in BATCHES]
    energy = sum(metrics.error_energy(d.student_output, d.teacher_output, mask)
                 for d, mask in zip(outputs, masks, strict=True))
    assert found["attention_error"] == pytest.approx(metrics.relative_error(energy), rel=1e-12)
    assert found["attention_error"] != pytest.approx(whole["attention_error"])
    assert whole | {"attention_error": found["attention_error"]} == found


def test_columns_are_snake_case_and_values_plain():
    rows = evaluate(predict_quantized, BATCHES, codewords=CODEWORD_VALUES, recall_k=RECALL_K)
    for row in rows:
        assert all(re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) for name in row)
        assert all(type(value) in (str, float, int) for value in row.values())


def test_a_batch_of_padding_changes_nothing():
    nothing = make_batch((0, 0, 0), 3, (0, 0, 0))
    arguments = {"codewords": CODEWORD_VALUES, "recall_k": RECALL_K}
    assert (evaluate(predict_quantized, [*BATCHES, nothing], **arguments)
            == evaluate(predict_quantized, BATCHES, **arguments))


def test_vectors_of_a_batch_are_gone_before_the_next_but_one():
    alive = []

    def predict(batch):
        assert [latents() for latents in alive[:-1]] == [None] * len(alive[:-1])
        found = predict_quantized(batch)
        alive.append(weakref.ref(found.diagnostics.latents))
        return found

    evaluate(predict, 2 * BATCHES, codewords=CODEWORD_VALUES, recall_k=RECALL_K)
    assert len(alive) == 4


def test_no_codewords_of_a_model_that_quantizes():
    with pytest.raises(ValueError, match="codewords is None, expected those of the model"):
        evaluate(predict_quantized, BATCHES, codewords=None, recall_k=RECALL_K)


def test_empty_split():
    with pytest.raises(ValueError, match="no requests, expected at least one"):
        evaluate(predict_plain, [], codewords=None, recall_k=RECALL_K)


def test_a_score_that_is_not_finite():
    def predict(batch):
        return Predictions({"two_tower": logits_of(batch) * np.float32("nan")}, None)

    with pytest.raises(ValueError, match="finite"):
        evaluate(predict, BATCHES, codewords=None, recall_k=RECALL_K)


def test_the_model_itself_comes_first():
    """Whatever the others are called."""
    rows = evaluate(lambda batch: Predictions({"another": logits_of(batch), "tarq": -logits_of(batch)}, None),
                    BATCHES, codewords=None, recall_k=RECALL_K)
    assert [row["model"] for row in rows] == ["tarq", "another"]
    assert rows[0]["auc"] == pytest.approx(1 - rows[1]["auc"])
