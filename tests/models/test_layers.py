"""Layers: each equals its NumPy copy; initial scales; refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import workloads
from draws import normal

from tarq_jax.attention import multi_head_attention
from tarq_jax.models.layers import MLP, FeatureEncoder, LevelAttention, MultiHeadAttention
from tarq_jax.models.two_tower import HistoryEncoder

D, H, L = workloads.WIDTH, workloads.HEADS, workloads.LEVELS
REQUESTS, POSITIONS = workloads.REQUESTS, workloads.POSITIONS


def with_params(module, *args, **kwargs):
    """Random parameters of a module, and its output for the arguments."""
    shapes = jax.eval_shape(lambda rng: module.init(rng, *args, **kwargs), jax.random.key(0))
    params = workloads.make_params(shapes)
    return params.get("params", {}), module.apply(params, *args, **kwargs)


@pytest.mark.parametrize("sides", [("item",), ("item", "event"), ("user", "context"), ()])
def test_feature_encoder(sides):
    mask = np.ones((3, 4), bool)
    fields = workloads.SCHEMA.side(*sides)
    columns = workloads.features(np.random.default_rng(0), sides, mask)
    params, encoded = with_params(FeatureEncoder(fields, D), columns, leading=(3, 4))
    assert encoded.shape == (3, 4, D)
    expected = np.broadcast_to(reference.encode_features(params, fields, columns), (3, 4, D))
    np.testing.assert_allclose(encoded, expected, rtol=1e-4, atol=1e-5)


def test_feature_encoder_refuses_other_shapes():
    encoder = FeatureEncoder(workloads.SCHEMA.side("user"), D)
    columns = workloads.features(np.random.default_rng(0), ("user",), np.ones(3, bool))
    with pytest.raises(AssertionError):
        with_params(encoder, columns, leading=(4,))
    with pytest.raises(KeyError, match="user_group"):
        with_params(encoder, {"user_age": columns["user_age"]}, leading=(3,))


@pytest.mark.parametrize("hidden", [(), (5,), (5, 7)])
def test_mlp(hidden):
    inputs = normal(0, 3, 4, 6)
    params, outputs = with_params(MLP(hidden, D), inputs)
    assert outputs.shape == (3, 4, D)
    np.testing.assert_allclose(outputs, reference.mlp(params, inputs), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def history():
    """Positions [B, N, D] with their mask [B, N]."""
    return normal(1, REQUESTS, POSITIONS, D), workloads.make_batch().history_mask


def test_multi_head_attention(history):
    queries = normal(2, REQUESTS, 5, D)
    params, outputs = with_params(MultiHeadAttention(H, D), queries, *history)
    assert params["query_projection"]["kernel"].shape == (D, H, D // H)
    expected = reference.multi_head_attention(params, queries, *history)
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)


def test_history_encoder(history):
    params, outputs = with_params(HistoryEncoder(H, D), *history)
    np.testing.assert_allclose(outputs, reference.encode_history(params, *history), rtol=1e-4, atol=1e-5)


def test_level_attention_keeps_levels_apart(history):
    module, positions, mask = LevelAttention(L, H, D), *history
    inputs = normal(2, REQUESTS, L, 5, D)

    def attend(layer, inputs, positions):
        return layer.outputs(multi_head_attention(layer.queries(inputs), *layer.keys_values(positions), mask))

    params, outputs = with_params(module, inputs, positions, method=attend)
    assert outputs.shape == inputs.shape
    expected = reference.level_attention(params, inputs, positions, mask)
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("module", [MultiHeadAttention(5, D), LevelAttention(L, 5, D)])
def test_heads_have_to_divide_the_width(module):
    with pytest.raises(ValueError, match=r"num_heads is 5.*12"):
        with_params(module, normal(0, 1, 1, D), method="keys_values")


def test_level_attention_starts_at_the_scale_of_its_inputs():
    width = 64
    module = LevelAttention(3, 4, width)
    params = jax.jit(lambda rng: module.init(rng, jnp.zeros((1, 1, width)), method="keys_values"))(
        jax.random.key(0)
    )["params"]
    for name in ("query_kernel", "key_kernel", "value_kernel", "output_kernel"):
        assert float(params[name].std()) == pytest.approx(width**-0.5, rel=0.05), name
    np.testing.assert_array_equal(params["value_bias"], 0.0)
