"""Random arrays for tests."""

import numpy as np


def normal(seed, *shape):
    """Standard normal float32; the same for the same seed."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)
