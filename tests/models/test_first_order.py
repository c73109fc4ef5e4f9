"""TARQ of order 1: the teacher's attention expanded around codewords; which loss changes what."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import workloads

from tarq_jax import expansion, losses
from tarq_jax.corrections import damping

B, G, D, H = workloads.REQUESTS, workloads.CANDIDATES, workloads.WIDTH, workloads.HEADS
L, K, N = workloads.LEVELS, workloads.CODEWORDS, workloads.POSITIONS
E = D // H
close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def batch():
    return workloads.make_batch()


@pytest.fixture(scope="module")
def model():
    return workloads.compiled("order_1_mlp")


@pytest.fixture(scope="module")
def output(model, batch):
    return model(batch)


def heads(flat):
    """[..., G, D] to [..., H, G, E]."""
    return jnp.swapaxes(flat.reshape(*flat.shape[:-1], H, E), -3, -2)


def test_latents_are_the_teachers_queries(model, output, batch):
    close(output.latents, jnp.swapaxes(output.teacher.queries, 1, 2).reshape(B, G, D))
    close(model.module.apply(model.params, batch, method="candidate_latents"), output.latents)
    np.testing.assert_array_equal(output.decoder_target, output.latents)


def test_output_equals_the_look_up(model, output, batch):
    """As in serving: expand every codeword of level 1, look up, multiply by the damped residual, project."""
    teacher, params, level_1 = output.teacher, model.params["params"], heads(model.arguments[0][0])
    expanded = expansion.expand(level_1, teacher.keys, teacher.values, batch.history_mask)
    residual = heads(output.quantizer.chosen[:, :, 1:].sum(axis=2))
    residual *= damping(residual, radius=np.exp(params["log_radius"]))
    found = expansion.look_up_expansion(expanded, output.quantizer.codes[..., 0], residual)
    projection = params["teacher"]["attention"]["output_projection"]
    expected = np.einsum("bhge,hed->bgd", found, projection["kernel"]) + projection["bias"]
    close(output.attention_output, expected)
    close(output.attended.sum(axis=2), expected)
    means = np.einsum("bhke,hed->bkd", expanded.means, projection["kernel"]) + projection["bias"]
    close(output.personalized[:, 0], means)


def test_exact_where_codewords_are_the_queries(model, output, batch):
    """With one codeword per candidate, equal to its query, and no residual, the output is the teacher's."""
    level_1 = np.asarray(output.latents).reshape(-1, D)
    codewords = np.stack([level_1, np.zeros_like(level_1)])
    exact = jax.jit(lambda codewords: model.module.apply(model.params, batch, codewords))(codewords)
    close(exact.attention_output, output.teacher.attention_output)
    head = {"params": {**model.params["params"], "student_head": model.params["params"]["teacher"]["head"]}}
    logits = jax.jit(lambda codewords: model.module.apply(head, batch, codewords).logits)(codewords)
    close(logits, output.teacher.logits)


def test_one_level_is_refused(batch):
    module = workloads.MODELS["order_1_mlp"].clone(num_levels=1)
    with pytest.raises(ValueError, match="num_levels is 1, expected at least 2"):
        jax.eval_shape(module.init, jax.random.key(0), batch, workloads.make_codewords()[:1])


def test_attention_of_student_and_teacher(model, output, batch):
    parts = jax.jit(lambda *args: model.module.apply(*args, method="compare_attention"))(
        model.params, batch, model.arguments[0])
    assert list(parts) == [f"head {index + 1}" for index in range(H)]
    real = batch.history_mask.any(axis=1)
    projection = model.params["params"]["teacher"]["attention"]["output_projection"]
    for side, whole in (("student", output), ("teacher", output.teacher)):
        attended = []
        for index, (name, part) in enumerate(parts.items()):
            weights = getattr(part, f"{side}_weights")
            assert weights.shape == (B, G, N), name
            close(np.asarray(weights).sum(axis=-1), np.broadcast_to(real[:, None], (B, G)))
            assert not np.any(np.asarray(weights)[np.broadcast_to(~batch.history_mask[:, None], (B, G, N))])
            attended.append(np.einsum("bgn,bne->bge", weights, output.teacher.values[:, index]))
            close(getattr(part, f"{side}_output"), attended[-1])
        expected = np.einsum("hbge,hed->bgd", np.stack(attended), projection["kernel"]) + projection["bias"]
        close(whole.attention_output, expected)


def test_only_its_head_radius_and_codewords_learn_from_the_student(model, batch):
    def value(params, codewords):
        output = model.module.apply(params, batch, codewords)
        per_candidate = losses.binary_cross_entropy(output.logits, batch.labels)
        per_candidate += losses.output_reconstruction(
            output.attention_output, output.teacher.attention_output)
        return losses.weighted_mean(per_candidate, batch.weights)

    gradient, to_codewords = jax.jit(jax.grad(value, argnums=(0, 1)))(model.params, model.arguments[0])
    moved = {name for name, group in gradient["params"].items()
             if any(np.any(leaf) for leaf in jax.tree.leaves(group))}
    assert moved == {"student_head", "log_radius"}
    assert np.any(to_codewords[0]) and np.any(to_codewords[1])


def test_alignment_moves_codewords_alone(model, batch):
    """The alignment loss therefore has no effect if moving averages set the codewords."""
    def value(params, codewords):
        output = model.module.apply(params, batch, codewords)
        per_candidate = losses.codebook_alignment(
            output.latents, output.teacher.attention_output, codewords[:1], output.personalized,
            output.quantizer.chosen[:, :, :1], output.attended[:, :, :1])
        return losses.weighted_mean(per_candidate, batch.weights)

    gradient, to_codewords = jax.jit(jax.grad(value, argnums=(0, 1)))(model.params, model.arguments[0])
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))
    assert np.any(to_codewords[0])
