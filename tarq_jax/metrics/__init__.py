"""Metrics on the host: ranking quality, closeness to full target attention, health of the codebooks."""

from tarq_jax.metrics.codebook import (
    codebook_health,
    dead_codewords,
    distance_summary,
    pairwise_distances,
    perplexity,
    quantization_error,
    unexplained_energy,
    usage_counts,
    utilisation,
)
from tarq_jax.metrics.ranking import (
    GroupedAuc,
    auc,
    calibration,
    error_energy,
    gap_recovered,
    grouped_auc,
    log_loss,
    rank_correlation,
    recall_at_k,
    relative_error,
)

__all__ = [
    "GroupedAuc",
    "auc",
    "calibration",
    "codebook_health",
    "dead_codewords",
    "distance_summary",
    "error_energy",
    "gap_recovered",
    "grouped_auc",
    "log_loss",
    "pairwise_distances",
    "perplexity",
    "quantization_error",
    "rank_correlation",
    "recall_at_k",
    "relative_error",
    "unexplained_energy",
    "usage_counts",
    "utilisation",
]
