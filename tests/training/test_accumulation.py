"""Micro-batches: the step equals that of the whole batch, and nothing moves between devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from tarq_jax import data
from tarq_jax.shards import deal, undeal
from tarq_jax.training import setup, sharding

close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)


@pytest.fixture(scope="module")
def problem(tiny_dataset):
    """A step by its number of micro-batches, a state with its codebook in use, and uneven batches of 8.

    Revival is due in the second of the steps.
    """
    config = tiny.make_config()
    objective = setup.build(config.model, config.loss_weights, tiny_dataset.schema)
    optimizer = optax.sgd(0.05, momentum=0.9)
    state = setup.init_state(config, objective, optimizer, tiny_dataset)
    state = state.replace(step=state.step + config.codebook.start + 1)

    @functools.cache
    def step(accumulate, revive_every=config.codebook.revive_every):
        config.accumulate, config.codebook.revive_every = accumulate, revive_every
        return setup.compile_step(config, objective, optimizer)

    batches = data.train_batches(
        tiny_dataset, "train", batch_size=8, seed=0, **setup.batch_shapes(tiny_dataset))
    rng = np.random.default_rng(0)

    def uneven(batch):
        real = rng.random(batch.weights.shape) < 0.7  # some candidates are missing, and weights differ
        weights = rng.uniform(0.1, 3.0, real.shape) * real
        return batch.replace(candidate_mask=real, weights=weights.astype(np.float32))

    return step, state, [uneven(next(batches)) for _ in range(3)]


def run(step, state, batches):
    """State and metrics after each step."""
    found, state = [], jax.tree.map(jnp.copy, state)
    for batch in batches:
        state, metrics = step(jax.tree.map(jnp.copy, state), batch)
        found.append((state.replace(rng=jax.random.key_data(state.rng)), metrics))
    return jax.device_get(found)


@pytest.mark.parametrize("num", [2])
def test_equals_the_step_on_the_whole_batch(problem, num):
    """Losses, all gradients, statistics, EMA and revival agree over three steps; the second one revives."""
    step, state, batches = problem
    whole, parts = run(step(1), state, batches), run(step(num), state, batches)
    for (expected, metrics), (found, found_metrics) in zip(whole, parts, strict=True):
        jax.tree.map(close, found, expected)
        assert found_metrics.keys() == metrics.keys()
        for name, value in metrics.items():
            close(found_metrics[name], value, rtol=1e-3, err_msg=name)
    never = run(step(1, revive_every=0), state, batches[:2])
    first, second = (tiny.moved(one.codebook, other.codebook)
                     for (one, _), (other, _) in zip(whole, never, strict=False))
    assert not first.any()
    assert second.any() and not second.all()  # the dead ones, by revival


def test_dealing_keeps_rows_on_their_device():
    """Dealing rows on 8 devices into micro-batches compiles without a collective; `undeal` undoes it."""
    mesh, rows = sharding.make_mesh(), np.arange(32, dtype=np.float32).reshape(32, 1)
    placed = jax.device_put(rows, jax.NamedSharding(mesh, jax.P("data")))
    compiled = jax.jit(lambda x: jax.lax.map(lambda part: 2 * part, deal(x, 2))).lower(placed).compile()
    assert not re.search("all-gather|all-to-all|collective-permute|all-reduce", compiled.as_text())
    found = compiled(placed)
    assert {shard.data.shape for shard in found.addressable_shards} == {(2, 2, 1)}
    np.testing.assert_array_equal(undeal(np.asarray(found)), 2 * rows)


@pytest.mark.parametrize("num", [1, 2, 6])
def test_undeal_undoes_deal(num):
    tree = {"a": np.arange(24).reshape(12, 2), "b": np.arange(12)}
    parts = deal(tree, num)
    assert parts["a"].shape == (num, 12 // num, 2)
    np.testing.assert_array_equal(parts["b"][0], np.arange(0, 12, num))
    jax.tree.map(np.testing.assert_array_equal, undeal(parts), tree)


@pytest.mark.slow
def test_micro_batches_take_less_memory(problem, tiny_dataset):
    """Temporary bytes of the compiled step, on a batch of 256."""
    step, state, _ = problem
    batch = next(data.train_batches(
        tiny_dataset, "train", batch_size=32, seed=0, **setup.batch_shapes(tiny_dataset)))
    batch = jax.tree.map(lambda leaf: np.tile(leaf, (8,) + (1,) * (leaf.ndim - 1)), batch)
    whole, parts = (
        step(num).lower(state, batch).compile().memory_analysis().temp_size_in_bytes for num in (1, 16))
    assert parts < 0.5 * whole
