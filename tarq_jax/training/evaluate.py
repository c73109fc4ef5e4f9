"""Evaluation of a trained model on a split: ranking quality, and the health of its codebooks."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tarq_jax import metrics
from tarq_jax.reporting import replacing
from tarq_jax.training.objectives import STUDENT, TEACHER, Diagnostics, Predictions
from tarq_jax.types import Batch

Row = dict[str, Any]
SCORES = "test_scores.npz"  # of a run whose configuration asks for it, see `write_scores`


def evaluate(predict: Callable[[Batch], Predictions], batches: Iterable[Batch], *,
             codewords: np.ndarray | None, recall_k: int, scores: Path | None = None) -> list[Row]:
    """Scores every batch and computes all metrics over the real candidates.

    Args:
      predict: compiled, batch -> predictions.
      batches: with NumPy leaves, as of `tarq_jax.data.eval_batches`.
      codewords: [L, K, D], where the model quantizes.
      recall_k: k of recall@k of the student's order against the teacher's.
      scores: file for the score of every candidate, see `write_scores`.

    Returns:
      A row a predictor: `model`, `auc`, `gauc`, `log_loss`, `calibration`; the student's has the
      codebook's health and its closeness to the teacher besides.

    Raises:
      ValueError: there is no batch, a score is not finite, or the model quantizes but `codewords` is None.
    """
    kept = [(batch, jax.device_get(predict(batch))) for batch in batches]
    if not kept:
        raise ValueError("the split to evaluate has no requests, expected at least one")
    labels, mask, weights = (
        np.concatenate([getattr(batch, name) for batch, _ in kept])
        for name in ("labels", "candidate_mask", "weights")
    )
    users = np.concatenate([np.broadcast_to(b.user_id[:, None], b.labels.shape) for b, _ in kept])
    predictions = jax.tree.map(lambda *parts: np.concatenate(parts), *(found for _, found in kept))
    rows = [
        {"model": name} | _ranking(labels[mask], logits[mask], users[mask], weights[mask])
        for name, logits in predictions.logits.items()
    ]
    if scores is not None:
        write_scores(scores, {"labels": labels[mask], "users": users[mask], "weights": weights[mask]}
                     | {name: logits[mask] for name, logits in predictions.logits.items()})
    if (found := predictions.diagnostics) is not None:
        if codewords is None:
            raise ValueError("codewords is None, expected those of the model, which quantizes")
        rows[0] |= _closeness(predictions.logits, found, mask, recall_k) | _health(found, mask, codewords)
    return rows


def _ranking(labels: np.ndarray, logits: np.ndarray, users: np.ndarray, weights: np.ndarray) -> Row:
    return {
        "auc": metrics.auc(labels, logits, weights),
        "gauc": metrics.grouped_auc(labels, logits, users, weights).value,
        "log_loss": metrics.log_loss(labels, logits, weights),
        "calibration": metrics.calibration(labels, logits, weights),
    }


def _closeness(logits: dict[str, jax.Array], found: Diagnostics, mask: np.ndarray, recall_k: int) -> Row:
    student, teacher = logits[STUDENT], logits[TEACHER]
    return {
        "attention_error": metrics.relative_error(found.student_output, found.teacher_output, mask),
        f"recall_at_{recall_k}": metrics.recall_at_k(student, teacher, mask, recall_k),
        "rank_correlation": metrics.rank_correlation(student, teacher, mask),
    }


def _health(found: Diagnostics, mask: np.ndarray, codewords: np.ndarray) -> Row:
    """Level by level, counted from 1; `utilisation` is the lowest of all, `quantization_error` the last."""
    health = metrics.codebook_health(codewords, found.latents, found.quantizer, mask)
    levels = range(1, len(codewords) + 1)
    summary = {
        "utilisation": min(health[f"utilisation_{level}"] for level in levels),
        "quantization_error": health[f"quantization_error_{levels[-1]}"],
    }
    return summary | health


def write_scores(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Keeps what paired tests of two runs on the same split need, atomically.

    Args:
      path: of the file, as NumPy's `npz`.
      columns: `labels`, `users`, `weights` and the logits of each predictor under its name, [C] each over the
        real candidates in the order of the split.
    """
    with replacing(path) as written, written.open("wb") as file:
        np.savez_compressed(file, **columns)  # type: ignore[arg-type]  # names are not known to it
