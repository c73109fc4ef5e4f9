"""One device or eight: the same numbers, and every replica the same bits."""

import functools

import jax
import numpy as np
import optax
import pytest
import tiny

from tarq_jax import data, quantization
from tarq_jax.training import loop, sharding
from tarq_jax.training.step import codebook_updates, train_step

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def initial(tiny_dataset):
    """Configuration, objective, optimizer and a state at step 2, on one device."""
    config = tiny.make_config()
    objective = loop.build(config.model, config.loss_weights, tiny_dataset.schema)
    optimizer = optax.sgd(0.02, momentum=0.9)  # Adam would blow up the rounding of gradients that are zero
    state = loop.init_state(config, objective, optimizer, tiny_dataset)
    return config, objective, optimizer, state.replace(step=state.step + 2)


def train(initial, dataset, devices, steps=5):
    """States and metrics of some steps over the codebook's start, on a mesh of the given devices."""
    config, objective, optimizer, state = initial
    mesh, settings = sharding.data_mesh(devices), config.codebook
    update_codebook = codebook_updates(
        mode="gradient", decay=settings.decay, revive_every=settings.revive_every,
        dead=functools.partial(quantization.dead_by_count, min_usage=settings.min_usage))
    step = jax.jit(functools.partial(
        train_step, objective=objective, optimizer=optimizer, update_codebook=update_codebook,
        codebook_start=settings.start))
    batches = data.train_batches(
        dataset, "train", batch_size=8, seed=0, start_step=2, **loop.batch_shapes(dataset))
    state, history = sharding.replicate(state, mesh), []
    for _ in range(steps):
        batch = sharding.shard_batch(next(batches), mesh)
        assert len(batch.labels.sharding.device_set) == len(devices)
        state, metrics = step(state, batch)
        history.append((state, metrics))
    return history


@pytest.fixture(scope="module")
def on_eight(initial, tiny_dataset):
    assert len(jax.devices()) == 8
    return train(initial, tiny_dataset, jax.devices())


def test_one_device_and_eight_agree(initial, tiny_dataset, on_eight):
    for (one, one_metrics), (eight, metrics) in zip(
            train(initial, tiny_dataset, jax.devices()[:1]), on_eight, strict=True):
        for name, value in one_metrics.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
                     eight.replace(rng=0), one.replace(rng=0))


def test_replicas_hold_the_same_bits(on_eight):
    state, metrics = on_eight[-1]
    leaves = jax.tree.leaves((state.replace(rng=jax.random.key_data(state.rng)), metrics))
    assert len(leaves) > 50
    for leaf in leaves:
        shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(shards) == 8 and all(shard.shape == leaf.shape for shard in shards)
        assert len({shard.tobytes() for shard in shards}) == 1


def test_those_steps_used_and_revived_the_codebook(initial, on_eight):
    """Or else the two tests above would say little."""
    start = initial[3].codebook
    first, *later = [state.codebook for state, _ in on_eight]
    np.testing.assert_array_equal(first.codewords, start.codewords)  # step 2: not in use yet
    min_usage = initial[0].codebook.min_usage
    dead = [np.asarray(quantization.dead_by_count(book, min_usage=min_usage)) for book in later]
    assert any(mask.any() for mask in dead)
    jumps = [np.abs(np.asarray(b.codewords) - np.asarray(a.codewords)).max()
             for a, b in zip([first, *later], later, strict=False)]
    assert jumps[0] > 0.5 and jumps[1] < 0.2 and jumps[2] > 0.5  # revived in steps 3 and 5, not in 4


@pytest.mark.parametrize("batch_size", [4, 12, 7])
def test_batch_size_that_does_not_divide(batch_size, tiny_config, tiny_dataset, tmp_path, silent):
    tiny_config.batch_size = batch_size
    with pytest.raises(ValueError, match=rf"config.batch_size is {batch_size}, expected .* the 8 "):
        loop.train(tiny_config, tiny_dataset, tmp_path / "run", silent)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_batch_size_that_divides(devices):
    sharding.check_batch_size(16, sharding.data_mesh(jax.devices()[:devices]))


def test_shard_batch_splits_requests(tiny_dataset):
    mesh = sharding.data_mesh()
    batch = next(data.train_batches(
        tiny_dataset, "train", batch_size=16, seed=0, **loop.batch_shapes(tiny_dataset)))
    for found, expected in zip(jax.tree.leaves(sharding.shard_batch(batch, mesh)), jax.tree.leaves(batch),
                               strict=True):
        np.testing.assert_array_equal(found, expected)
        assert {shard.data.shape for shard in found.addressable_shards} == {(2, *expected.shape[1:])}
