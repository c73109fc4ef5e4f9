"""Evaluation of a trained model on a split: ranking quality, and the health of its codebooks."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tarq_jax import metrics
from tarq_jax.reporting import replacing
from tarq_jax.training.objectives import STUDENT, TEACHER, Diagnostics, Predictions, own_predictor
from tarq_jax.types import Batch

Row = dict[str, Any]
COLUMNS = frozenset({"labels", "users", "weights"})  # of a file of scores, besides one per predictor
SCORES = "test_scores.npz"  # written if `config.save_scores` is set, see `write_scores`


def evaluate(predict: Callable[[Batch], Predictions], batches: Iterable[Batch], *,
             codewords: np.ndarray | None, recall_k: int, scores: Path | None = None) -> list[Row]:
    """Scores every batch and computes all metrics over the real candidates.

    Only labels, masks, weights, users, logits and sums of a batch are kept, not its histories or vectors.

    Args:
      predict: compiled function, batch -> predictions.
      batches: batches with NumPy leaves, as from `tarq_jax.data.eval_batches`.
      codewords: [L, K, D], if the model quantizes.
      recall_k: k of recall@k, the student's ranking against the teacher's.
      scores: file for the score of every candidate, see `write_scores`; None writes none.

    Returns:
      One row per predictor, the model itself first: `model`, `auc`, `gauc`, `log_loss`, `calibration`.
      The student's row also has the health of the codebook and the student's closeness to the teacher, of
      which `attention_error` leaves out candidates of empty histories.

    Raises:
      ValueError: there is no batch, a score is not finite, the model quantizes but `codewords` is None, or it
        is not clear which predictor is the model itself.
    """
    kept, sums = [], None
    for batch in batches:
        found = jax.device_get(predict(batch))
        kept.append((_Asked(
            labels=batch.labels, mask=batch.candidate_mask, weights=batch.weights,
            users=np.broadcast_to(batch.user_id[:, None], batch.labels.shape)), found.logits))
        if found.diagnostics is not None:
            if codewords is None:
                raise ValueError("codewords is None, expected those of the model, which quantizes")
            of_batch = _sums(found.diagnostics, batch, codewords)
            sums = of_batch if sums is None else jax.tree.map(np.add, sums, of_batch)
    if not kept:
        raise ValueError("the split to evaluate has no requests, expected at least one")
    asked, logits = jax.tree.map(lambda *parts: np.concatenate(parts), *kept)
    mask = asked.mask
    of_candidates = {name: getattr(asked, name)[mask] for name in sorted(COLUMNS)}
    own = own_predictor(logits)
    rows = [{"model": name} | _ranking(logits[name][mask], **of_candidates)
            for name in sorted(logits, key=lambda name: (name != own, name))]
    if scores is not None:
        write_scores(scores, of_candidates | {name: values[mask] for name, values in logits.items()})
    if sums is not None and codewords is not None:
        rows[0] |= _closeness(logits, sums, mask, recall_k) | _health(sums, codewords)
    return rows


class _Asked(NamedTuple):
    """The parts of a batch that are kept, [B, G] each."""

    labels: np.ndarray
    mask: np.ndarray
    weights: np.ndarray
    users: np.ndarray


class _Sums(NamedTuple):
    """Sums of the diagnostics, which are kept because the vectors of a full split may not fit into memory."""

    counts: np.ndarray
    unexplained: np.ndarray
    attention_error: np.ndarray


def _sums(found: Diagnostics, batch: Batch, codewords: np.ndarray) -> _Sums:
    """Sums over the real candidates; those of empty histories have no attention that could be off."""
    mask = batch.candidate_mask
    attends = mask & batch.history_mask.any(axis=1)[:, None]
    return _Sums(
        metrics.usage_counts(found.quantizer.codes, codewords.shape[1], mask),
        metrics.unexplained_energy(found.latents, found.quantizer, mask),
        metrics.error_energy(found.student_output, found.teacher_output, attends))


def _ranking(logits: np.ndarray, labels: np.ndarray, users: np.ndarray, weights: np.ndarray) -> Row:
    return {
        "auc": metrics.auc(labels, logits, weights),
        "gauc": metrics.grouped_auc(labels, logits, users, weights).value,
        "log_loss": metrics.log_loss(labels, logits, weights),
        "calibration": metrics.calibration(labels, logits, weights),
    }


def _closeness(logits: dict[str, np.ndarray], sums: _Sums, mask: np.ndarray, recall_k: int) -> Row:
    student, teacher = logits[STUDENT], logits[TEACHER]
    return {
        "attention_error": metrics.relative_error(sums.attention_error),
        f"recall_at_{recall_k}": metrics.recall_at_k(student, teacher, mask, recall_k),
        "rank_correlation": metrics.rank_correlation(student, teacher, mask),
    }


def _health(sums: _Sums, codewords: np.ndarray) -> Row:
    """Health by level, counted from 1; `utilisation` is the lowest, `quantization_error` that of the last."""
    health = metrics.codebook_health(codewords, sums.counts, sums.unexplained)
    levels = range(1, len(codewords) + 1)
    summary = {
        "utilisation": min(health[f"utilisation_{level}"] for level in levels),
        "quantization_error": health[f"quantization_error_{levels[-1]}"],
    }
    return summary | health


def write_scores(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Writes, atomically, the scores that paired tests of two runs on the same split need.

    Args:
      path: path of the file, in NumPy's `npz` format.
      columns: `labels`, `users`, `weights`, and the logits of each predictor under its name; [C] each, over
        the real candidates in the order of the split.
    """
    with replacing(path) as written, written.open("wb") as file:
        np.savez_compressed(file, **columns)  # type: ignore[arg-type]  # mypy cannot check the names
