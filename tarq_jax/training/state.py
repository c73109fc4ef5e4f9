"""Training state: everything that a step changes and a checkpoint keeps."""

from typing import Any

import jax
from flax import struct

from tarq_jax.types import Codebook


class TrainState(struct.PyTreeNode):
    """A pytree; the codebook is beside the parameters, not among them."""

    step: jax.Array  # [] int32, steps done
    params: Any  # the module's variables
    codebook: Codebook | None  # None for models that do not quantize
    opt_state: Any  # state of the optimizer, over `trainable(params, codebook)`
    rng: jax.Array  # key; every step folds its number into it


def trainable(params: Any, codebook: Codebook | None) -> dict[str, Any]:
    """The tree that the optimizer updates: parameters and codewords."""
    return {"params": params, "codewords": None if codebook is None else codebook.codewords}
