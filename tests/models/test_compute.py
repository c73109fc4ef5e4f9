"""`Compute`: bfloat16 is close to float32; recomputation gives the same gradients in less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import workloads

from tarq_jax.config import default_config
from tarq_jax.models import Compute, TargetAttention
from tarq_jax.training.objectives import in_float32, supervised, tarq

HALF = Compute(dtype=jnp.bfloat16)


def value_and_gradients(name, compute):
    """Loss, metrics, codes and gradients of a model of `workloads`."""
    model = workloads.compiled(name)
    module = model.module.clone(compute=compute)
    weights = default_config().loss_weights.to_dict()
    objective = tarq(module, weights) if model.arguments else supervised(module, name)
    codewords = model.arguments[0] if model.arguments else None

    @jax.jit
    def compute_all(params):
        batch = workloads.make_batch()
        return jax.value_and_grad(objective.loss, has_aux=True)(params, codewords, batch, True)

    return jax.device_get(compute_all(model.params))


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("name", ["tarq_mlp", "order_1_mlp"])
def test_bfloat16_is_close_to_float32(name):
    (value, aux), gradients = value_and_gradients(name, Compute())
    (half, half_aux), half_gradients = value_and_gradients(name, HALF)
    assert half.dtype == np.float32 and half != value
    np.testing.assert_allclose(half, value, rtol=0.05)
    assert {leaf.dtype for leaf in jax.tree.leaves(half_gradients)} == {np.dtype(np.float32)}
    for output in (half_aux.quantizer.chosen, half_aux.quantizer.residuals, *half_aux.metrics.values()):
        assert output.dtype == np.float32
    one, other = flat(gradients), flat(half_gradients)
    assert one @ other > 0.95 * np.linalg.norm(one) * np.linalg.norm(other)
    mask = workloads.make_batch().candidate_mask
    assert np.mean((aux.quantizer.codes == half_aux.quantizer.codes)[mask][:, 0]) > 0.8


@pytest.mark.parametrize("name", workloads.MODELS)
def test_types_in_bfloat16(name):
    """Parameters and logits are float32, activations bfloat16; losses read only float32."""
    module = workloads.MODELS[name].clone(compute=HALF)
    arguments = workloads.compiled(name).arguments
    params = jax.eval_shape(module.init, jax.random.key(0), workloads.make_batch(), *arguments)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    output = jax.eval_shape(module.apply, params, workloads.make_batch(), *arguments)
    assert output.logits.dtype == jnp.float32
    teacher = getattr(output, "teacher", output)
    backbone = getattr(teacher, "backbone", teacher)
    assert backbone.history.dtype == backbone.user.dtype == jnp.bfloat16
    assert backbone.logits.dtype == teacher.logits.dtype == jnp.float32
    read = jax.eval_shape(in_float32, output)
    assert jnp.bfloat16 not in {leaf.dtype for leaf in jax.tree.leaves(read)}


@pytest.mark.parametrize("compute", [Compute(remat=True), Compute(remat=True, attention_block=4)])
@pytest.mark.parametrize("name", ["target_attention", "tarq_mlp", "order_1_mlp"])
def test_the_way_of_computing_changes_no_gradient(name, compute):
    (value, _), gradients = value_and_gradients(name, Compute())
    (found, _), found_gradients = value_and_gradients(name, compute)
    np.testing.assert_allclose(found, value, rtol=1e-5)
    assert jax.tree.structure(found_gradients) == jax.tree.structure(gradients)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5),
                 found_gradients, gradients)


def gradient_over_long_histories(compute, positions):
    """The loss of target attention over two long histories as a function of parameters, and their shapes."""
    module = TargetAttention(**workloads.SIZES, compute=compute)
    batch = workloads.make_batch()
    long = {"history": {name: np.repeat(values, positions // values.shape[1], axis=1)
                        for name, values in batch.history.items()},
            "history_mask": np.repeat(batch.history_mask, positions // batch.history_mask.shape[1], axis=1)}
    batch = jax.tree.map(lambda leaf: leaf[:2], batch.replace(**long))
    params = jax.eval_shape(module.init, jax.random.key(0), batch)
    return lambda params: supervised(module, "").loss(params, None, batch, True)[0], params


def bytes_kept(compute, positions):
    """The size of what the forward pass keeps for the backward pass.

    Temporary bytes of the compiled gradient would not show it: XLA does recompute, but on CPU its
    scheduler drops the barriers that delay recomputation until it is needed.
    """
    loss, params = gradient_over_long_histories(compute, positions)
    kept = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


@pytest.mark.parametrize("block", [0, 64])
def test_recomputation_keeps_less(block):
    without, with_it = (bytes_kept(Compute(remat=remat, attention_block=block), 1200)
                        for remat in (False, True))
    assert with_it < (0.1, 0.7)[block > 0] * without
    loss, params = gradient_over_long_histories(Compute(remat=True, attention_block=block), 1200)
    assert jax.jit(jax.grad(loss)).lower(params).as_text().count("optimization_barrier") >= 3


def test_a_model_over_10_000_positions_fits_in_memory():
    """Without blocks, two self-attentions of 3 heads over two histories would take 2.4 GB each."""
    loss, params = gradient_over_long_histories(Compute(attention_block=256), 9_996)
    compiled = jax.jit(jax.grad(loss)).lower(params).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 2**20
