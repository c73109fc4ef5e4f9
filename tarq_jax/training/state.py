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
    opt_state: Any  # state of the optimizer, over `trainable`
    rng: jax.Array  # key; every step folds its number into it

    @property
    def codewords(self) -> Any:
        """The codewords of the codebook (`Levels`); None for models that do not quantize."""
        return None if self.codebook is None else self.codebook.codewords

    @property
    def trainable(self) -> dict[str, Any]:
        """The tree that the optimizer updates: parameters and codewords."""
        return {"params": self.params, "codewords": self.codewords}
