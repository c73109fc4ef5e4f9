"""Artefacts of the small world, written and loaded once for all tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
import served

from tarq_jax.serving import Scorer, build


@pytest.fixture(scope="session")
def artefact(tmp_path_factory) -> Callable[..., Path]:
    """The folder of a method's artefact: 22 items in 1024 slots, history lengths 2 and 6."""
    written: dict[tuple[str, str], Path] = {}

    def write(name: str = "tarq_scalar", vectors: str = "float32") -> Path:
        if (name, vectors) not in written:
            folder = written[name, vectors] = tmp_path_factory.mktemp("artefact")
            build.write(served.method_of(name), served.world().dataset, folder, histories=(2, 6),
                        vectors=vectors, capacity=600)
        return written[name, vectors]

    return write


@pytest.fixture(scope="session")
def scorer(artefact) -> Callable[..., Scorer]:
    """A scorer of a method, for batches of 1 and 3 requests."""
    loaded: dict[tuple[str, str], Scorer] = {}

    def load(name: str = "tarq_scalar", vectors: str = "float32") -> Scorer:
        if (name, vectors) not in loaded:
            loaded[name, vectors] = Scorer.load(
                artefact(name, vectors), batch_sizes=(1, 3), candidate_sizes=(512,), top_k=5)
        return loaded[name, vectors]

    return load
