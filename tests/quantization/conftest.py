"""Codewords and latents that tests share."""

import jax
import pytest
from draws import normal

from tarq_jax import quantization


@pytest.fixture(scope="session")
def quantized():
    """Codewords [3, 4, 5], latents [6, 5, 5] and the output of `encode` for them."""
    codewords, latents = normal(0, 3, 4, 5), normal(1, 6, 5, 5)
    return codewords, latents, jax.jit(quantization.encode)(codewords, latents)
