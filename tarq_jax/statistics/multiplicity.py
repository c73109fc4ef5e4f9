"""Adjusts the p-values of many tests."""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from tarq_jax import checks

METHODS = ("holm", "benjamini_hochberg")


def adjust(p_values: ArrayLike, method: Literal["holm", "benjamini_hochberg"] = "holm") -> np.ndarray:
    """Adjusted p-values, in the order given.

    Args:
      p_values: [M] in [0, 1].
      method: `holm` bounds the chance of any false finding (Holm 1979), `benjamini_hochberg` the share of
        false ones among the findings (Benjamini and Hochberg 1995).

    Returns:
      [M]; compare them directly with the chance or share of false findings that is accepted.

    Raises:
      ValueError: the method is unknown, or a p-value is not in [0, 1].
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {sorted(METHODS)}, got {method!r}")
    p_values = checks.non_negative("p_values", p_values)
    checks.rank_of("p_values", p_values, "M")
    if (p_values > 1).any():
        raise ValueError(f"p_values: expected values in [0, 1], got {p_values.max()}")
    if not len(p_values):
        return p_values
    if method == "benjamini_hochberg":
        return stats.false_discovery_control(p_values)
    from statsmodels.stats.multitest import multipletests  # imported here because it takes a second

    return multipletests(p_values, method=method)[1]
