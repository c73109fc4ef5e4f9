"""Optimizers for tables, compared with loops over rows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tarq_jax.training import optimizers

V, D, STEPS = 7, 3, 6
TABLE = np.random.default_rng(0).normal(size=(V, D)).astype(np.float32)


def gradients(seed=1):
    """Gradients of each step, with a few non-zero rows; row 6 is never non-zero."""
    rng = np.random.default_rng(seed)
    for _ in range(STEPS):
        found = np.zeros((V, D), np.float32)
        rows = rng.choice(V - 1, 3, replace=False)
        found[rows] = rng.normal(size=(3, D))
        yield found


def run(transformation, tree=lambda table: {"embedding": table}):
    """The updates of all steps and the last state."""
    update, found = jax.jit(transformation.update), []
    state = transformation.init(tree(jnp.asarray(TABLE)))
    for gradient in gradients():
        updates, state = update(tree(gradient), state, tree(TABLE))
        found.append(np.asarray(jax.tree.leaves(updates)[0]))
    return np.array(found), state


def test_row_adagrad_by_hand():
    updates, state = run(optimizers.scale_by_row_adagrad(eps=1e-6))
    squares = np.zeros(V)
    for gradient, update in zip(gradients(), updates, strict=True):
        for row in range(V):
            squares[row] += np.mean(gradient[row] ** 2)
            np.testing.assert_allclose(update[row], gradient[row] / (np.sqrt(squares[row]) + 1e-6), rtol=1e-5)
    assert state.squares["embedding"].shape == (V,)
    np.testing.assert_allclose(state.squares["embedding"], squares, rtol=1e-5)


def test_lazy_adam_is_adam_on_the_steps_that_touch_a_row():
    updates, state = run(optimizers.scale_by_lazy_adam())
    adam = optax.scale_by_adam()
    steps = list(gradients())
    for row in range(V):
        touched = [step for step, gradient in enumerate(steps) if gradient[row].any()]
        kept = adam.init(TABLE[row])
        for step in range(STEPS):
            expected = np.zeros(D)
            if step in touched:
                expected, kept = adam.update(steps[step][row], kept)
            np.testing.assert_allclose(updates[step, row], expected, rtol=1e-4)
        np.testing.assert_allclose(state.mu["embedding"][row], kept.mu, rtol=1e-5)
        assert state.touched["embedding"][row] == len(touched)
    assert 0 < state.touched["embedding"][0] < STEPS and not updates[:, 6].any()


def test_lazy_adam_equals_adam_where_every_row_is_touched():
    dense = np.random.default_rng(3).normal(size=(V, D)).astype(np.float32)
    lazy, adam = optimizers.scale_by_lazy_adam(), optax.scale_by_adam()
    states = [each.init(TABLE) for each in (lazy, adam)]
    for scale in (1.0, -0.5, 2.0):
        found = [each.update(dense * scale, state) for each, state in zip((lazy, adam), states, strict=True)]
        np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
        states = [state for _, state in found]


@pytest.mark.parametrize("name", ["rowwise_adagrad", "lazy_adam"])
def test_the_configuration_reaches_tables_alone(name, tiny_config):
    tiny_config.optimizer.table, tiny_config.optimizer.weight_decay = name, 0.5
    optimizer = optimizers.make_optimizer(tiny_config)
    tiny_config.optimizer.table = "adamw"
    adamw = optimizers.make_optimizer(tiny_config)

    def variables(table, kernel, codewords):
        params = {"item_id": {"embedding": table}, "kernel": kernel}
        return {"params": {"params": params}, "codewords": codewords}

    before = variables(jnp.asarray(TABLE), jnp.ones(2), jnp.ones(2))
    gradient = variables(next(gradients()), jnp.array([1.0, -1.0]), jnp.array([0.5, 0.0]))
    found, expected = (each.update(gradient, each.init(before), before)[0] for each in (optimizer, adamw))
    for path in (("params", "params", "kernel"), ("codewords",)):
        one, other = found, expected
        for key in path:
            one, other = one[key], other[key]
        np.testing.assert_array_equal(one, other)
    table = found["params"]["params"]["item_id"]["embedding"]
    scale = optimizers.OF_TABLES[name]()
    gradient = gradient["params"]["params"]["item_id"]["embedding"]
    step, _ = scale.update(gradient, scale.init(TABLE))
    touched = gradient.any(axis=-1, keepdims=True)
    rate = tiny_config.optimizer.learning_rate
    np.testing.assert_allclose(table, -rate * (step + 0.5 * TABLE * touched), rtol=1e-5, atol=1e-8)
