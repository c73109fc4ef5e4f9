"""Functions of a batch in shards: together they equal the function of the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tarq_jax import losses, shards

N, ROWS = 4, 3  # number of shards, and of requests per shard
WHOLE = np.random.default_rng(0).normal(size=(N * ROWS, 2)).astype(np.float32)


def on_shards(function, *arrays):
    """The result of each shard."""
    run = jax.pmap(function, axis_name="s", devices=jax.devices()[:N])
    return run(*shards.deal(arrays, N))


def test_deal_and_gather_are_inverse():
    for copy in on_shards(lambda x: shards.gather(x, "s"), WHOLE):
        np.testing.assert_array_equal(copy, WHOLE)


def test_total():
    found = on_shards(lambda x: shards.total({"a": x.sum(axis=0)}, "s"), WHOLE)["a"]
    np.testing.assert_allclose(found, np.tile(WHOLE.sum(axis=0), (N, 1)), rtol=1e-5)
    assert len({row.tobytes() for row in np.asarray(found)}) == 1


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.6, 1.0])
def test_first_requests_of_the_whole_batch(share):
    count = max(1, round(share * N * ROWS))
    requests = np.arange(N * ROWS)

    def chosen(requests):
        mask = shards.first(share, len(requests), "s")
        return jnp.where(mask, requests[: len(mask)], -1)

    found = np.asarray(on_shards(chosen, requests)).ravel()
    assert sorted(found[found >= 0]) == list(range(count))
    whole = shards.first(share, N * ROWS)
    assert whole.all() and len(whole) == count


def test_parts_of_a_weighted_mean_add_up_with_their_gradients():
    weights = np.abs(WHOLE)
    weights[::4] = 0.0  # the first shard has no weight at all

    def part(values, weights):
        return jax.value_and_grad(
            lambda values: losses.weighted_mean(values**2, weights, axis_name="s"))(values)

    parts, gradients = on_shards(part, WHOLE, weights)
    value, gradient = jax.value_and_grad(lambda values: losses.weighted_mean(values**2, weights))(WHOLE)
    np.testing.assert_allclose(parts.sum(), value, rtol=1e-5)
    np.testing.assert_allclose(gradients, shards.deal(np.asarray(gradient), N), rtol=1e-5)


def test_without_an_axis_nothing_changes():
    assert shards.total(WHOLE) is WHOLE and shards.gather(WHOLE) is WHOLE
