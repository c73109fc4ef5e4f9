"""Sizes and arguments of operations, for benchmarks and tests alike.

Axis letters are those of `tarq_jax.types`. An array is described by its axes and what it holds: "BHNE"
numbers, "BGL<K" codes below K, "BN?" a mask of histories of different lengths, of which the last is empty
where there are several.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SCALE = 0.5  # standard deviation of numbers: attention is neither flat nor saturated


class Sizes(NamedTuple):
    """Lengths of axes; E, the width of a head, is D / H."""

    B: int  # requests
    G: int  # candidates of a request
    L: int  # levels
    K: int  # codewords of a level
    D: int  # width
    H: int  # heads
    N: int  # positions of the history

    def shape(self, axes: str) -> tuple[int, ...]:
        """Of an array with these axes."""
        lengths = self._asdict() | {"E": self.D // self.H}
        return tuple(lengths[axis] for axis in axes)


WORKLOADS: Mapping[str, Sizes] = {
    # A request as pre-ranking gets it.
    "paper": Sizes(B=1, G=10_000, L=3, K=256, D=64, H=4, N=1000),
    # A batch of `configs/synthetic.py`.
    "config": Sizes(B=64, G=16, L=3, K=64, D=32, H=2, N=50),
    # Extremes: all candidates of a large index, a long history, a single item.
    "many": Sizes(B=1, G=50_000, L=3, K=256, D=64, H=4, N=50),
    "long": Sizes(B=1, G=1000, L=3, K=256, D=64, H=4, N=10_000),
    "single": Sizes(B=1, G=1, L=2, K=2, D=2, H=1, N=1),
    # For tests: every length another, none a multiple of anything.
    "odd": Sizes(B=2, G=37, L=3, K=20, D=24, H=3, N=45),
    "blocks": Sizes(B=1, G=530, L=2, K=13, D=16, H=2, N=1030),  # more of everything than a block of a kernel
}


def make(description: str, sizes: Sizes, rng: np.random.Generator, dtype: Any = jnp.float32) -> jax.Array:
    """A random array.

    Example:
      >>> codes = make("BGL<K", WORKLOADS["odd"], np.random.default_rng(0))
      >>> codes.shape, int(codes.max()) < 20
      ((2, 37, 3), True)
    """
    axes, _, below = description.partition("<")
    if below:
        return jnp.asarray(rng.integers(0, sizes.shape(below)[0], sizes.shape(axes), dtype=np.int32))
    if description.endswith("?"):
        requests, positions = sizes.shape(description[:-1])
        lengths = rng.integers((positions + 1) // 2, positions + 1, requests)
        lengths[1:][-1:] = 0
        return jnp.asarray(np.arange(positions) < lengths[:, None])
    return jnp.asarray(SCALE * rng.standard_normal(sizes.shape(axes), np.float32), dtype)
