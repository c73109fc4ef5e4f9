"""One battery of properties for all models: what a pre-ranker may depend on, and what not."""

import jax
import numpy as np
import pytest
import workloads
from jax.sharding import NamedSharding, PartitionSpec

from tarq_jax.models import Tarq

B, G = workloads.REQUESTS, workloads.CANDIDATES
LENGTHS = np.array(workloads.HISTORY_LENGTHS)


@pytest.fixture(scope="module")
def batch():
    return workloads.make_batch()


@pytest.fixture(scope="module", params=workloads.MODELS)
def model(request):
    return workloads.compiled(request.param)


@pytest.fixture(scope="module")
def logits(model, batch):
    """Logits [B, G] by name of the predictor."""
    return model.logits(batch)


def assert_equal(actual, expected, where=None):
    """Asserts that both dictionaries of logits agree where `where` is True."""
    where = np.ones((B, G), bool) if where is None else where
    for name, values in expected.items():
        np.testing.assert_allclose(actual[name][where], values[where], rtol=1e-4, atol=1e-5, err_msg=name)


def assert_differ(actual, expected, where):
    """Asserts that the logits of every predictor differ where `where` is True."""
    for name, values in expected.items():
        moved = np.abs(actual[name] - values) > 1e-4
        np.testing.assert_array_equal(moved & where, where, err_msg=name)


def other(field, values):
    """Another value of a field, for every entry."""
    return values % (field.size - 1) + 1 if field.kind == "categorical" else values + np.float32(1.0)


# Shapes and scale


def test_logits_are_finite_everywhere(logits):
    """Logits are finite, also for empty histories, requests without candidates and padding."""
    for values in logits.values():
        assert values.shape == (B, G) and values.dtype == np.float32
        assert np.isfinite(values).all()


def test_initial_parameters(model, batch):
    arguments = (batch, *model.arguments)
    shapes = jax.eval_shape(model.module.init, jax.random.key(0), *arguments)
    assert set(shapes) == {"params"}
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) > 1000
    assert jax.tree.map(np.shape, shapes) == jax.tree.map(np.shape, model.params)


def test_jit_equals_eager(model, batch, logits):
    output = model.module.apply(model.params, batch, *model.arguments)
    np.testing.assert_allclose(output.logits, logits["model"], rtol=1e-4, atol=1e-5)


# What a logit depends on


def test_a_candidate_moves_its_own_logit_alone(model, batch, logits):
    columns = {}
    for field in workloads.SCHEMA.side("item"):
        values = columns[field.name] = batch.candidates[field.name].copy()
        values[0, 2] = other(field, values[0, 2])
    where = np.zeros((B, G), bool)
    where[0, 2] = True
    changed = model.logits(batch.replace(candidates=columns))
    assert_equal(changed, logits, ~where)
    assert_differ(changed, logits, where)


def test_candidates_come_in_any_order(model, batch, logits):
    order = np.array([3, 0, 4, 1, 2])
    permuted = batch.replace(
        candidates={name: values[:, order] for name, values in batch.candidates.items()},
        candidate_mask=batch.candidate_mask[:, order],
    )
    assert_equal(model.logits(permuted), {name: values[:, order] for name, values in logits.items()})


def test_requests_do_not_see_each_other(model, batch, logits):
    order = np.array([3, 0, 4, 7, 6, 1, 2, 5])
    permuted = jax.tree.map(lambda values: values[order], batch)
    assert_equal(model.logits(permuted), {name: values[order] for name, values in logits.items()})


def test_padding_is_not_read(model, batch, logits):
    refilled = workloads.refill(batch)
    assert not np.array_equal(refilled.history["item_id"], batch.history["item_id"])
    assert_equal(model.logits(refilled), logits, batch.candidate_mask)


def test_masked_equals_truncated(model, batch, logits):
    longest = LENGTHS.max()
    assert longest < workloads.POSITIONS
    truncated = batch.replace(
        history={name: values[:, :longest] for name, values in batch.history.items()},
        history_mask=batch.history_mask[:, :longest],
    )
    assert_equal(model.logits(truncated), logits)


def test_mask_anywhere_in_the_history(model, batch, logits):
    """Real events at the end of a row score like real events at its start."""
    columns = {name: np.roll(values, 2, axis=1) for name, values in batch.history.items()}
    rolled = batch.replace(history=columns, history_mask=np.roll(batch.history_mask, 2, axis=1))
    assert_equal(model.logits(rolled), logits)


def test_labels_weights_and_user_ids_are_not_features(model, batch, logits):
    changed = batch.replace(
        user_id=batch.user_id + 1, labels=1.0 - batch.labels, weights=batch.weights + np.float32(1.0)
    )
    assert_equal(model.logits(changed), logits)


def test_every_field_reaches_the_logits(model, batch, logits):
    everywhere, with_history = np.ones((B, G), bool), np.repeat(LENGTHS[:, None] > 0, G, axis=1)
    readers = {
        "user": [("user", everywhere)], "context": [("context", everywhere)],
        "item": [("candidates", batch.candidate_mask), ("history", with_history)],
        "event": [("history", with_history)],
    }
    for field in workloads.SCHEMA.fields:
        for part, where in readers[field.side]:
            columns = dict(getattr(batch, part))
            columns[field.name] = other(field, columns[field.name])
            changed = model.logits(batch.replace(**{part: columns}))
            for name, values in logits.items():  # one logit may stay by chance, hardly all of a request
                moved = np.abs(changed[name] - values).max(axis=1) > 1e-4
                assert moved[where.any(axis=1)].all(), (field.name, part, name)
            assert_equal(changed, logits, ~where & batch.candidate_mask)


# Refusals and sharding


@pytest.mark.parametrize("name", workloads.MODELS)
def test_heads_have_to_divide_the_width(name):
    module = workloads.MODELS[name].clone(num_heads=5)
    arguments = (workloads.make_codewords(),) if isinstance(module, Tarq) else ()
    with pytest.raises(ValueError, match=r"num_heads is 5.*12"):
        jax.eval_shape(module.init, jax.random.key(0), workloads.make_batch(), *arguments)


def test_requests_split_over_a_mesh(batch):
    model = workloads.compiled("tarq_mlp")
    mesh = workloads.mesh()
    sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    params = jax.device_put(model.params, NamedSharding(mesh, PartitionSpec()))
    logits = model.forward(params, sharded, *model.arguments).logits
    assert len(logits.sharding.device_set) == workloads.DEVICES
    assert {shard.data.shape for shard in logits.addressable_shards} == {(B // workloads.DEVICES, G)}
    np.testing.assert_allclose(logits, model.logits(batch)["model"], rtol=1e-4, atol=1e-5)
