"""How benchmarks measure time: in turns, until the results are ready."""

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

Name = TypeVar("Name", bound=Hashable)

SHORT = 0.25  # seconds; a shorter call is made twice per turn, the first time uncounted


def in_turns(
    calls: Mapping[Name, Callable[[], Any]], *, seconds: float, least: int = 5, most: int = 100,
) -> dict[Name, np.ndarray]:
    """Seconds of each call, measured in turns, so that other work of the machine affects all calls equally.

    Each is called for about `seconds`, at least `least` and at most `most` times, spread evenly over the
    turns. Each call is preceded by an uncounted one, which brings its data into the cache, as if nothing else
    ran, unless it takes so long that no cache helps.
    """
    counts, short = {}, {}
    for name, call in calls.items():
        jax.block_until_ready(call())  # compiles, or touches memory for the first time
        once = min(seconds_of(call) for _ in range(3))
        counts[name] = int(np.clip(seconds / max(once, 1e-9), least, most))
        short[name] = once < SHORT
    turns = max(counts.values(), default=0)
    found: dict[Name, list[float]] = {name: [] for name in calls}
    for turn in range(turns):
        for name, call in calls.items():
            if (turn + 1) * counts[name] // turns > turn * counts[name] // turns:
                if short[name]:
                    jax.block_until_ready(call())
                found[name].append(seconds_of(call))
    return {name: np.array(values) for name, values in found.items()}


def seconds_of(call: Callable[[], Any]) -> float:
    """Seconds of one call, until its results are ready."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start
