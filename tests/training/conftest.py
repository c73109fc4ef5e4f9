"""Shared by the tests of the training loop: one finished run, and exact comparisons."""

import contextlib
import copy
import dataclasses
import os

import jax
import numpy as np
import pytest
import tiny

from tarq_jax.training import loop

TIMING = ("examples_per_second", "input_wait_share", "train_seconds")


def named_bits(tree) -> dict[str, bytes]:
    """Every array of a pytree by its path, as bytes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(_data(leaf)).tobytes() for path, leaf in leaves}


def _data(leaf):
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


@pytest.fixture(scope="session")
def same_bits():
    """Asserts that two pytrees are equal to the bit."""

    def check(found, expected):
        found, expected = named_bits(found), named_bits(expected)
        assert len(expected) > 10 and found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == []

    return check


@pytest.fixture(scope="session")
def untimed():
    """The rows without the columns that differ from run to run."""
    return lambda rows: [{key: value for key, value in row.items() if key not in TIMING} for row in rows]


@pytest.fixture(scope="session")
def short_histories(tiny_dataset):
    """The data of `tiny`, but the histories of training have from none to five events."""
    train, ends = tiny_dataset.splits["train"], np.cumsum(np.arange(40) % 6)
    short = dataclasses.replace(train, history=train.history[:ends[-1]], history_offsets=np.append(0, ends))
    return dataclasses.replace(tiny_dataset, splits={**tiny_dataset.splits, "train": short})


@pytest.fixture
def at_step(monkeypatch):
    """`with at_step(5, action): ...` runs the action in the loop as soon as step 5 is done."""

    @contextlib.contextmanager
    def arrange(step, action):
        write = loop.MetricsWriter.write

        def write_and_act(self, done, scalars):
            write(self, done, scalars)
            if done == step and "loss" in scalars:
                action()

        with monkeypatch.context() as patch:
            patch.setattr(loop.MetricsWriter, "write", write_and_act)
            yield

    return arrange


@pytest.fixture
def send(at_step):
    """`with send(signal, 5): ...` sends this process a signal as soon as step 5 is done."""
    return lambda number, step: at_step(step, lambda: os.kill(os.getpid(), number))


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tiny_dataset, silent, compiled_once):
    """An uninterrupted run of `tiny_config`: (workdir, result). Copy the workdir before you change it."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    result = loop.train(tiny.make_config(), tiny_dataset, workdir, silent)
    return workdir, result._replace(rows=copy.deepcopy(result.rows))
