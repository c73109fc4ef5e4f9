"""Health of codebooks: how evenly codewords are used, what they leave unexplained, how far apart they are.

Runs on the host, in float64, on NumPy or JAX arrays. Axis letters are those of `tarq_jax.types`: L level,
K codeword, D width, M item. A collapsed codebook shows as low utilisation and perplexity in its level.
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy import special
from scipy.spatial import distance

from tarq_jax import checks
from tarq_jax.types import QuantizerOutput


def usage_counts(codes: ArrayLike, num_codewords: int, mask: ArrayLike | None = None) -> np.ndarray:
    """How many items chose each codeword; the counts of several batches can be added.

    Args:
      codes: [..., L] integers, in [0, K) for real items.
      num_codewords: K.
      mask: [...] bool, True where the item is real; all of them if not given.

    Returns:
      [L, K] int64.

    Raises:
      ValueError: codes are not integers, that of a real item is outside [0, K), shapes differ, or K < 1.

    >>> usage_counts([[0, 2], [1, 2]], num_codewords=3)
    array([[1, 1, 0],
           [0, 0, 2]])
    """
    codes, size = np.asarray(codes), checks.positive_int("num_codewords", num_codewords)
    if not np.issubdtype(codes.dtype, np.integer) or not codes.ndim:
        raise ValueError(f"codes: expected integers [..., L], got {codes.dtype} of shape {codes.shape}")
    codes = codes[_mask(mask, codes.shape[:-1], "codes")].astype(np.int64)  # [M, L]
    if codes.size and not 0 <= codes.min() <= codes.max() < size:
        raise ValueError(f"codes: expected values in [0, {size}), got {codes.min()} to {codes.max()}")
    levels = codes.shape[-1]
    flat = codes + size * np.arange(levels)
    return np.bincount(flat.ravel(), minlength=levels * size).reshape(levels, size)


def utilisation(counts: ArrayLike) -> np.ndarray:
    """Share of each level's codewords that were used at least once.

    Use counts of one evaluation set: moving averages of counts hardly ever reach 0.

    Args:
      counts: [L, K] >= 0, from `usage_counts`.

    Returns:
      [L] float64, in [0, 1].

    Raises:
      ValueError: counts are not [L, K], or one is negative or not finite.

    >>> utilisation([[5, 1, 0, 0], [1, 1, 1, 1]])
    array([0.5, 1. ])
    """
    return np.mean(_counts(counts) > 0, axis=1)


def dead_codewords(counts: ArrayLike) -> np.ndarray:
    """Number of each level's codewords that were never used.

    Args:
      counts: [L, K] >= 0, from `usage_counts`.

    Returns:
      [L] int64.

    Raises:
      ValueError: as `utilisation`.

    >>> dead_codewords([[5, 1, 0, 0], [1, 1, 1, 1]])
    array([2, 0])
    """
    return np.sum(_counts(counts) == 0, axis=1)


def perplexity(counts: ArrayLike) -> np.ndarray:
    """Number of evenly used codewords with the same entropy: `exp(-sum_k p_k log p_k)`, p the usage.

    Args:
      counts: [L, K] >= 0, from `usage_counts`.

    Returns:
      [L] float64, from 1 (collapsed) to K (even use); `nan` for a level without any use.

    Raises:
      ValueError: as `utilisation`.

    >>> perplexity([[5, 0, 0, 0], [1, 1, 1, 1]]).round(6)
    array([1., 4.])
    """
    counts = _counts(counts)
    with np.errstate(invalid="ignore"):  # 0 / 0 is the nan that is documented
        usage = counts / counts.sum(axis=1, keepdims=True)
    return np.exp(special.entr(usage).sum(axis=1))


def unexplained_energy(
    latents: ArrayLike, output: QuantizerOutput, mask: ArrayLike | None = None
) -> np.ndarray:
    """Energy of the latents, and what the first l levels leave of it; values of batches can be added.

    `sum_i |z|^2`, then `sum_i |r_{l+1}|^2` for l = 1 to L, with `r_{l+1}` the residual after l levels and
    `r_{L+1} = z - z_q`. Energy is taken about the origin, not about the mean: latents with a common offset
    look well quantized as soon as one codeword has learned the offset.

    Args:
      latents: [..., D], the z that were quantized; finite for real items.
      output: result of quantizing them, with codes [..., L], quantized [..., D], residuals [..., L, D].
      mask: [...] bool, True where the item is real; all of them if not given.

    Returns:
      [1 + L] float64, >= 0.

    Raises:
      ValueError: shapes differ, a real value is not finite, mask is not boolean.

    >>> from tarq_jax.quantization import encode
    >>> z = np.array([[3.0, 4.0]])
    >>> unexplained_energy(z, encode(np.array([[[3.0, 0.0]], [[0.0, 3.0]]]), z))
    array([25., 16.,  1.])
    """
    shape = np.shape(latents)
    if not shape:
        raise ValueError("latents: expected shape [..., D], got a scalar")
    mask = _mask(mask, shape[:-1], "latents")
    levels = np.shape(output.codes)[-1:]
    checks.shape_of("output.codes", output.codes, shape[:-1] + levels, "latents, with L for D")
    checks.shape_of("output.quantized", output.quantized, shape, "latents")
    residuals_shape = shape[:-1] + levels + shape[-1:]
    checks.shape_of("output.residuals", output.residuals, residuals_shape, "latents and codes")
    latents = checks.finite("latents", latents, mask[..., None])[mask]  # [M, D]
    quantized = checks.finite("output.quantized", output.quantized, mask[..., None])[mask]
    residuals = checks.finite("output.residuals", output.residuals, mask[..., None, None])[mask]
    between = np.square(residuals[:, 1:]).sum(axis=(0, 2))
    return np.array([np.square(latents).sum(), *between, np.square(latents - quantized).sum()])


def quantization_error(
    latents: ArrayLike, output: QuantizerOutput, mask: ArrayLike | None = None
) -> np.ndarray:
    """Share of the latents' energy that the first l levels leave unexplained, l = 1 to L.

    The last value is the quantizer's relative error.

    Args:
      latents: as in `unexplained_energy`, as are `output` and `mask`.
      output: result of quantizing them.
      mask: True where the item is real.

    Returns:
      [L] float64, >= 0; above 1 if levels add error; `nan` if all latents are zero or none is real.

    Raises:
      ValueError: as `unexplained_energy`.

    >>> from tarq_jax.quantization import encode
    >>> z = np.array([[3.0, 4.0]])
    >>> quantization_error(z, encode(np.array([[[3.0, 0.0]], [[0.0, 3.0]]]), z)).round(2)
    array([0.64, 0.04])
    """
    return _shares(unexplained_energy(latents, output, mask))


def pairwise_distances(codewords: ArrayLike) -> np.ndarray:
    """Euclidean distances between the codewords of each level.

    Args:
      codewords: [L, K, D], finite.

    Returns:
      [L, K, K] float64, symmetric, 0 on the diagonal.

    Raises:
      ValueError: codewords are not [L, K, D] or not finite.

    >>> pairwise_distances([[[0.0, 0.0], [3.0, 4.0]]])
    array([[[0., 5.],
            [5., 0.]]])
    """
    codewords = _codewords(codewords)
    distances = np.empty((*codewords.shape[:2], codewords.shape[1]))
    for level, points in enumerate(codewords):
        distances[level] = distance.cdist(points, points)
    return distances


def distance_summary(codewords: ArrayLike) -> dict[str, np.ndarray]:
    """Distances between different codewords of a level, in three numbers.

    Args:
      codewords: [L, K, D], finite.

    Returns:
      `minimum`, of all pairs, 0 if two codewords coincide; `nearest`, the mean over codewords of the
      distance to the nearest other one; `median`, of all pairs. Each [L] float64, `nan` for K = 1.

    Raises:
      ValueError: as `pairwise_distances`.

    >>> {name: float(value[0]) for name, value in distance_summary([[[0.0], [1.0], [5.0]]]).items()}
    {'minimum': 1.0, 'nearest': 2.0, 'median': 4.0}
    """
    distances = pairwise_distances(codewords)
    levels, size = distances.shape[:2]
    if size < 2:
        return {name: np.full(levels, np.nan) for name in ("minimum", "nearest", "median")}
    off_diagonal = distances[:, ~np.eye(size, dtype=np.bool_)].reshape(levels, size, size - 1)
    nearest = off_diagonal.min(axis=2)
    return {
        "minimum": nearest.min(axis=1),
        "nearest": nearest.mean(axis=1),
        "median": np.median(off_diagonal, axis=(1, 2)),
    }


def codebook_health(codewords: ArrayLike, counts: ArrayLike, energy: ArrayLike) -> dict[str, float]:
    """Health of all levels for one set of items, as a flat dictionary for logs; levels are counted from 1.

    Args:
      codewords: [L, K, D], finite.
      counts: [L, K], how often each codeword was chosen, from `usage_counts`.
      energy: [1 + L], from `unexplained_energy`; like `counts` a sum over batches if there are several.

    Returns:
      For each level l the keys `utilisation_l`, `perplexity_l`, `dead_l`, `quantization_error_l` (after
      levels 1 to l) and `nearest_distance_l` (mean over codewords).

    Raises:
      ValueError: as `utilisation` and `pairwise_distances`; or L or K differ, or an energy is negative.

    >>> from tarq_jax.quantization import encode
    >>> z, codewords = np.array([[1.0], [4.0]]), np.array([[[1.0], [3.0]]])
    >>> output = encode(codewords, z)
    >>> health = codebook_health(codewords, usage_counts(output.codes, 2), unexplained_energy(z, output))
    >>> for key, value in health.items():
    ...     print(key, round(value, 4))
    utilisation_1 1.0
    perplexity_1 2.0
    dead_1 0.0
    quantization_error_1 0.0588
    nearest_distance_1 2.0
    """
    codewords, counts = _codewords(codewords), _counts(counts)
    checks.shape_of("counts", counts, codewords.shape[:2], "codewords without their last axis")
    energy = checks.non_negative("energy", energy)
    checks.shape_of("energy", energy, (1 + len(codewords),), "1 + L")
    columns = {
        "utilisation": utilisation(counts),
        "perplexity": perplexity(counts),
        "dead": dead_codewords(counts),
        "quantization_error": _shares(energy),
        "nearest_distance": distance_summary(codewords)["nearest"],
    }
    return {
        f"{name}_{level}": float(value)
        for name, column in columns.items()
        for level, value in enumerate(column, start=1)
    }


def _shares(energy):
    total, unexplained = energy[0], energy[1:]
    return unexplained / total if total > 0 else np.full(unexplained.shape, np.nan)


def _mask(mask, shape, of):
    mask = np.ones(shape, np.bool_) if mask is None else checks.boolean("mask", mask)
    checks.shape_of("mask", mask, shape, f"{of} without its last axis")
    return mask


def _counts(counts):
    counts = checks.non_negative("counts", counts)
    checks.rank_of("counts", counts, "L K")
    return counts


def _codewords(codewords):
    codewords = checks.finite("codewords", codewords)
    checks.rank_of("codewords", codewords, "L K D")
    return codewords
