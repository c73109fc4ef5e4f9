"""How benchmarks measure: medians with their spread, on results that are really there."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np


class Timing(NamedTuple):
    """Seconds of one call."""

    median: float
    spread: float  # from the lower to the upper quartile


def measure(call: Callable[[], Any], *, repeats: int = 9, warm_up: int = 1) -> Timing:
    """Calls until results are ready, `repeats` times after `warm_up` calls that do not count."""
    for _ in range(warm_up):
        jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    lower, median, upper = np.quantile(seconds, [0.25, 0.5, 0.75])
    return Timing(float(median), float(upper - lower))
