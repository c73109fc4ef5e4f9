"""Sizes and arguments of operations, for both benchmarks and tests.

Axis letters are those of `tarq_jax.types`. An array is described by its axes and what it holds: "BHNE" holds
numbers, "BGL<K" codes below K, "BN?" a mask of histories of different lengths. If there are several
histories, the last is empty.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SCALE = 0.5  # standard deviation of numbers, with which attention is neither flat nor saturated


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
        """The shape of an array with these axes."""
        lengths = self._asdict() | {"E": self.D // self.H}
        return tuple(lengths[axis] for axis in axes)


WORKLOADS: Mapping[str, Sizes] = {
    # A typical request to pre-ranking.
    "paper": Sizes(B=1, G=10_000, L=3, K=256, D=64, H=4, N=1000),
    # A batch of `configs/synthetic.py`.
    "config": Sizes(B=64, G=16, L=3, K=64, D=32, H=2, N=50),
    # Extremes: all candidates of a large index, a long history, a single item.
    "many": Sizes(B=1, G=50_000, L=3, K=256, D=64, H=4, N=50),
    "long": Sizes(B=1, G=1000, L=3, K=256, D=64, H=4, N=10_000),
    "single": Sizes(B=1, G=1, L=2, K=2, D=2, H=1, N=1),
    # For tests: all lengths differ, and none is a multiple of a block.
    "odd": Sizes(B=2, G=37, L=3, K=20, D=24, H=3, N=45),
    "blocks": Sizes(B=1, G=530, L=2, K=13, D=16, H=2, N=1030),  # G and N exceed a kernel's block
}


def spec(description: str, sizes: Sizes, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """Shape and type of what `make` returns, without making it.

    Example:
      >>> spec("BGL<K", WORKLOADS["odd"])
      ShapeDtypeStruct(shape=(2, 37, 3), dtype=int32)
    """
    axes, _, below = description.partition("<")
    kind = jnp.int32 if below else jnp.bool_ if axes.endswith("?") else dtype
    return jax.ShapeDtypeStruct(sizes.shape(axes.removesuffix("?")), kind)


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
