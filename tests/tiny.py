"""The smallest experiment that covers everything, for tests of the training layer and the commands.

This is a module, not only fixtures, because processes that tests start need it too.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest

from tarq_jax import reporting
from tarq_jax.config import default_config, smoke
from tarq_jax.data import Dataset, SyntheticOptions, synthetic
from tarq_jax.training import sharding
from tarq_jax.types import Codebook

SIZES = {"num_items": 60, "num_clusters": 8, "history_length": 5, "num_candidates": 3, "max_interests": 5,
         "train_requests": 40, "validation_requests": 16, "test_requests": 24}  # steps of milliseconds


def make_config() -> ml_collections.ConfigDict:
    """TARQ with 6 steps: the codebook starts at step 3, epochs have 5 steps, revival finds dead codewords."""
    config = smoke(default_config())
    config.steps, config.log_every, config.checkpoint_every, config.eval_batch_size = 6, 1, 2, 16
    config.model.width, config.model.hidden = 4, (4,)
    config.model.num_levels, config.model.num_codewords = 2, 4
    config.codebook.start, config.codebook.init_latents = 3, 64
    config.codebook.revive_every, config.codebook.decay, config.codebook.min_usage = 2, 0.5, 0.6
    config.recall_k = 2
    return config


def moved(codebook: Codebook, other: Codebook) -> np.ndarray:
    """Which codewords of two codebooks differ, [L, K]."""
    return np.abs(codebook.codewords - other.codewords).max(axis=-1) > 1e-3


def make_dataset() -> Dataset:
    """A synthetic data set of these sizes."""
    return synthetic.generate(SyntheticOptions(**SIZES))


def losses(workdir: Path) -> list[float]:
    """The losses that a run logged."""
    return [line["loss"] for line in reporting.read_metrics(workdir) if "loss" in line]


@contextlib.contextmanager
def one_device() -> Iterator[None]:
    """Trains on one device, however many there are."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda *_, **__: mesh)
        yield
