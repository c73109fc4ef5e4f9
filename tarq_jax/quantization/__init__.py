"""Residual quantization as pure functions on a `Codebook`.

Encoding is greedy: `r_1 = z`, `c_l = argmin_k |r_l - C_l[k]|^2`, `r_{l+1} = r_l - C_l[c_l]`, and
`z_q = sum_l C_l[c_l]` (TARQ, arXiv 2509.16931; RQ-VAE, arXiv 2203.01941).

No function changes a codebook in place: `update_statistics`, `ema_codewords`, `revive` and
`fit_codebook` take their inputs as arguments and return a new `Codebook`. Replicas stay equal if their
statistics are summed over the mesh (see `assignment_statistics`). Shapes that do not fit raise chex's
AssertionError.
"""

from tarq_jax.quantization.encoding import (
    as_levels,
    balanced,
    beam_encode,
    decode,
    encode,
    nearest,
    nearest_by_cosine,
    with_codes,
)
from tarq_jax.quantization.fitting import fit_codebook, fitted, kmeans, kmeans_codebook, refine
from tarq_jax.quantization.gradients import rotate, straight_through
from tarq_jax.quantization.revival import dead_by_age, dead_by_count, revive
from tarq_jax.quantization.updates import (
    assignment_statistics,
    ema_codewords,
    random_codebook,
    update_statistics,
    with_codewords,
)

__all__ = [
    "as_levels",
    "assignment_statistics",
    "balanced",
    "beam_encode",
    "dead_by_age",
    "dead_by_count",
    "decode",
    "ema_codewords",
    "encode",
    "fit_codebook",
    "fitted",
    "kmeans",
    "kmeans_codebook",
    "nearest",
    "nearest_by_cosine",
    "random_codebook",
    "refine",
    "revive",
    "rotate",
    "straight_through",
    "update_statistics",
    "with_codes",
    "with_codewords",
]
