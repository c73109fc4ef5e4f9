"""Residual quantization as pure functions on a `Codebook`.

Encoding is greedy: `r_1 = z`, `c_l = argmin_k |r_l - C_l[k]|^2`, `r_{l+1} = r_l - C_l[c_l]`, and
`z_q = sum_l C_l[c_l]` (TARQ, arXiv 2509.16931; RQ-VAE, arXiv 2203.01941).

Nothing here changes a codebook behind the caller's back: `update_statistics`, `ema_codewords`,
`revive` and `kmeans_codebook` take what they need and return a new `Codebook`. Given statistics
summed over a mesh (see `assignment_statistics`), replicas stay equal. Shapes that do not fit are an
AssertionError of chex.
"""

from tarq_jax.quantization.encoding import decode, encode, negative_distances
from tarq_jax.quantization.fitting import kmeans, kmeans_codebook
from tarq_jax.quantization.gradients import straight_through
from tarq_jax.quantization.updates import (
    assignment_statistics,
    dead,
    ema_codewords,
    random_codebook,
    revive,
    update_statistics,
    with_codewords,
)

__all__ = [
    "assignment_statistics",
    "dead",
    "decode",
    "ema_codewords",
    "encode",
    "kmeans",
    "kmeans_codebook",
    "negative_distances",
    "random_codebook",
    "revive",
    "straight_through",
    "update_statistics",
    "with_codewords",
]
