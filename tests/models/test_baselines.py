"""The baselines: compared with NumPy copies, with target attention where they must equal it, and trained."""

import jax
import numpy as np
import pytest
import reference
import workloads

from tarq_jax import approximate_attention as approximate
from tarq_jax.models import HardSearch
from tarq_jax.models.approximate_attention import by_category
from tarq_jax.models.inttower import late_interaction
from tarq_jax.training.objectives import supervised

B, G, N, D = workloads.REQUESTS, workloads.CANDIDATES, workloads.POSITIONS, workloads.WIDTH
BATCH = workloads.make_batch()
MASK = BATCH.history_mask


@pytest.mark.parametrize("name", workloads.BASELINES)
def test_every_parameter_is_trained(name):
    """Every parameter has a finite gradient, though some histories are empty. Hash planes are fixed."""
    model = workloads.compiled(name)
    objective = supervised(model.module, name)
    gradients = jax.jit(jax.grad(lambda params: objective.loss(params, None, BATCH, True)[0]))(model.params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        path = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all(), path
        one_at_most = name == "sim" and ("query" in path or "key_projection" in path)
        assert np.any(leaf) or one_at_most, path  # no choice if only one event has the item


# Approximations of target attention


def heads_of_linear(params, candidates, history, project):
    query = project("query", reference.mlp(params["query_tower"], candidates))
    return approximate.linear_attention(query, project("key"), project("value"), MASK)


def heads_of_sdim(params, candidates, history, project):
    planes = approximate.hash_planes(D, 5, 2)
    hashed = (np.float32(vectors) for vectors in (candidates, history))
    return approximate.collision_attention(*hashed, project("value"), MASK, planes)


def heads_of_eta(params, candidates, history, project):
    bits = [np.asarray(approximate.signatures(np.float32(vectors), approximate.hash_planes(D, 5, 2)))
            for vectors in (candidates, history)]
    agreeing = np.sum(bits[0][:, :, None] == bits[1][:, None], axis=(-1, -2))
    query = project("query", reference.mlp(params["query_tower"], candidates))
    return approximate.searched_attention(
        query, project("key"), project("value"), approximate.select(agreeing, MASK, 2))


def heads_of_din(params, candidates, history, project):
    value = project("value")
    heads = np.zeros((B, value.shape[1], G, value.shape[-1]))
    for b, g in np.ndindex(B, G):
        for n in np.flatnonzero(MASK[b]):
            q, k = candidates[b, g], history[b, n]
            weight = reference.mlp(params["unit"], np.concatenate([q, k, q * k, q - k]))
            heads[b, :, g] += weight * value[b, :, n]
    return heads


@pytest.mark.parametrize(("name", "heads_of"), [
    ("linear_attention", heads_of_linear), ("sdim", heads_of_sdim), ("eta", heads_of_eta),
    ("din", heads_of_din)])
def test_logits_are_those_of_target_attention_but_for_the_attention(name, heads_of):
    model = workloads.compiled(name)
    params = model.params["params"]
    logits, user, item, candidates, history = reference.two_tower(
        params["backbone"], workloads.SCHEMA, BATCH, D)
    encoded = reference.encode_history(params["history_encoder"], history, MASK)

    def project(which, inputs=encoded):
        weights = params["attention"][f"{which}_projection"]
        heads = np.einsum("bnd,dhe->bhne", inputs, weights["kernel"]) + weights["bias"][:, None]
        return heads.astype(np.float32)

    heads = heads_of(params, candidates, history, project)
    projection = params["attention"]["output_projection"]
    output = np.einsum("bhge,hed->bgd", heads, projection["kernel"]) + projection["bias"]
    features = reference.interactions(output, user, item, candidates)
    expected = logits + reference.mlp(params["head"], features)[..., 0]
    np.testing.assert_allclose(model(BATCH).logits, expected, rtol=1e-3, atol=1e-4)


def test_a_search_that_selects_everything_is_target_attention():
    """It equals target attention with the same parameters, for any search."""
    exact = workloads.compiled("target_attention")
    whole = HardSearch(**workloads.SIZES, num_selected=N)
    found = jax.jit(whole.apply)(exact.params, BATCH).logits
    np.testing.assert_allclose(found, exact(BATCH).logits, rtol=1e-4, atol=1e-5)


def test_categories_are_those_of_the_batch():
    found = by_category(BATCH, None, field="item_id")
    same = BATCH.candidates["item_id"][:, :, None] == BATCH.history["item_id"][:, None]
    real = BATCH.candidate_mask[:, :, None] & MASK[:, None]
    np.testing.assert_array_equal((found == 0) & real, same & real)
    assert (same & real).any()


# COLD and IntTower


def test_cold_equals_a_numpy_copy():
    model = workloads.compiled("cold")
    params = model.params["params"]
    logits, user, item, candidates, _ = reference.two_tower(params["backbone"], workloads.SCHEMA, BATCH, D)
    groups = np.stack(np.broadcast_arrays(user[:, None], candidates, item, user[:, None] * item), axis=2)
    products = groups.reshape(B, G, -1) @ params["gates"]["kernel"] + params["gates"]["bias"]
    weighted = groups / (1 + np.exp(-products))[..., None]
    expected = logits + reference.mlp(params["head"], weighted.reshape(B, G, -1))[..., 0]
    np.testing.assert_allclose(model(BATCH).logits, expected, rtol=1e-3, atol=1e-4)


def test_inttower_equals_a_numpy_copy():
    """Its user vectors are projections of the hidden layer and of v_user."""
    model = workloads.compiled("inttower")
    params = model.params["params"]
    output = model(BATCH)
    tower = params["backbone"]["user_tower"]
    layers = model.module.apply(
        model.params, BATCH, output.backbone.history,
        method=lambda module, batch, history: module.backbone.user_layers(batch, history))
    assert [layer.shape for layer in layers] == [(B, 16), (B, D)]
    np.testing.assert_allclose(
        layers[0] @ tower["Dense_1"]["kernel"] + tower["Dense_1"]["bias"], layers[1], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(layers[1], output.backbone.user, rtol=1e-4, atol=1e-5)

    def project(name, inputs):
        return np.tensordot(inputs, params[name]["kernel"], axes=1) + params[name]["bias"]

    added = np.zeros((B, G))
    items = project("item_vectors", output.backbone.item)
    for b, g in np.ndindex(B, G):
        for layer, inputs in enumerate(layers):
            for vector in project(f"user_vectors_{layer}", inputs)[b]:
                added[b, g] += max(items[b, g] @ vector) / np.sqrt(D)
    np.testing.assert_allclose(output.logits, output.backbone.logits + added, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("items", [(B, G, 2, D + 1), (B + 1, G, 2, D), (B, G, D)])
def test_late_interaction_refuses_other_shapes(items):
    with pytest.raises(AssertionError):
        late_interaction(np.ones((B, 3, D)), np.ones(items))
