"""TARQ: personalised codebooks, the three heads, and which loss changes which parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import workloads

from tarq_jax import losses, quantization
from tarq_jax.attention import look_up

B, G, D = workloads.REQUESTS, workloads.CANDIDATES, workloads.WIDTH
L, K, N = workloads.LEVELS, workloads.CODEWORDS, workloads.POSITIONS
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def batch():
    return workloads.make_batch()


@pytest.fixture(scope="module", params=workloads.HEADS_OF_TARQ)
def head(request):
    return request.param


@pytest.fixture(scope="module")
def model(head):
    return workloads.compiled(f"tarq_{head}")


@pytest.fixture(scope="module")
def output(model, batch):
    return model(batch)


# Forward


def test_shapes(output):
    assert output.latents.shape == output.attention_output.shape == output.reconstruction.shape == (B, G, D)
    assert output.personalized.shape == (B, L, K, D)
    assert output.attended.shape == output.quantizer.chosen.shape == (B, G, L, D)
    assert output.quantizer.codes.shape == (B, G, L)


def test_latents_are_normalised_encodings_of_items(model, output, batch):
    raw = reference.mlp(model.params["params"]["encoder"], np.asarray(output.teacher.backbone.candidates))
    close(output.latents, raw / np.sqrt(np.mean(raw**2, axis=-1, keepdims=True)), rtol=1e-3)
    close(model.module.apply(model.params, batch, method="candidate_latents"), output.latents)


def test_personalized_codebook_equals_reference(model, output, batch):
    codewords = np.broadcast_to(model.arguments[0], (B, L, K, D))
    expected = reference.level_attention(
        model.params["params"]["level_attention"], codewords, np.asarray(output.teacher.history),
        batch.history_mask,
    )
    close(output.personalized, expected, rtol=1e-3)
    empty = ~batch.history_mask.any(axis=1)
    assert empty.any() and not np.any(np.asarray(output.personalized)[empty])


def test_personalize_serves_what_training_sees(model, output, batch):
    personalized = model.module.apply(
        model.params, model.arguments[0], output.teacher.history, batch.history_mask, method="personalize"
    )
    close(personalized, output.personalized)


def test_attended_equals_look_up(output):
    """In training, candidates attend with their own codewords; in serving, they look up."""
    codes = output.quantizer.codes
    close(output.attention_output, look_up(output.personalized, codes))
    for level in range(L):
        alone = slice(level, level + 1)
        close(output.attended[:, :, level], look_up(output.personalized[:, alone], codes[..., alone]))


def test_head_closed_form(head, model, output):
    """The student's logit computed from only the personalised codebook and the backbone."""
    params, backbone = model.params["params"], output.teacher.backbone
    user, item, candidates = (np.asarray(getattr(backbone, name)) for name in ("user", "item", "candidates"))
    codes = np.asarray(output.quantizer.codes)
    attended = np.asarray(look_up(output.personalized, codes))
    if head == "scalar":
        added = np.zeros((B, G))
        for level in range(L):
            entries = np.asarray(output.personalized[:, level])
            codewords = np.broadcast_to(model.arguments[0][level], entries.shape)
            inputs = np.concatenate([entries, codewords], axis=-1)
            scores = reference.mlp(params[f"level_scores_{level}"], inputs)[..., 0]  # [B, K], per request
            added += np.take_along_axis(scores, codes[..., level], axis=1)
    elif head == "dot":
        projected = attended @ params["student_head"]["kernel"] + params["student_head"]["bias"]
        added = np.sum(projected * item, axis=-1) / np.sqrt(D)
    else:
        inputs = reference.interactions(attended, user, item, candidates)
        added = reference.mlp(params["student_head"], inputs)[..., 0]
    assert np.abs(added).max() > 0.01
    close(output.logits, backbone.logits + added, rtol=1e-3, atol=1e-4)


def test_teacher_is_target_attention(model, output, batch):
    expected = reference.target_attention(model.params["params"]["teacher"], workloads.SCHEMA, batch, D)
    for field, values in zip(("logits", "attention_output", "history"), expected, strict=True):
        close(getattr(output.teacher, field), values, rtol=1e-3, atol=1e-4)


def test_quantize_says_what_the_decoder_gets(model, output, batch):
    decoder, codewords = model.params["params"]["decoder"], model.arguments[0]
    close(output.reconstruction, reference.mlp(decoder, np.asarray(output.quantizer.quantized)), rtol=1e-3)
    warming_up = model.forward(model.params, batch, codewords, False)
    close(warming_up.reconstruction, reference.mlp(decoder, np.asarray(output.latents)), rtol=1e-3)
    close(warming_up.logits, output.logits)


def test_decoder_target(model, output, batch):
    """The target is the teacher's projected query, with its heads concatenated, or the item's embedding."""
    assert model.module.decoded == "query"
    projection = model.params["params"]["teacher"]["attention"]["query_projection"]
    queries = reference.mlp(
        model.params["params"]["teacher"]["query_tower"], np.asarray(output.teacher.backbone.candidates)
    )
    queries = np.einsum("bgd,dhe->bghe", queries, projection["kernel"]) + projection["bias"]
    close(output.decoder_target, queries.reshape(B, G, D), rtol=1e-3)
    module = model.module.clone(decoded="item")
    shown = jax.jit(lambda *args: module.apply(*args).decoder_target)(model.params, batch, model.arguments[0])
    close(shown, output.teacher.backbone.candidates)


@pytest.mark.parametrize(("share", "count"), [(1.0, B), (0.5, B // 2), (0.3, 2), (0.01, 1)])
def test_first_requests_get_a_whole_personalized_codebook(batch, share, count):
    model = workloads.compiled("tarq_mlp")
    module = model.module.clone(aligned_share=share)
    shapes = jax.eval_shape(module.apply, model.params, batch, *model.arguments)
    assert shapes.personalized.shape == (count, L, K, D) and shapes.logits.shape == (B, G)
    if share == 0.5:
        part = jax.jit(lambda *args: module.apply(*args).personalized)(model.params, batch, *model.arguments)
        close(part, model(batch).personalized[:count])


@pytest.mark.parametrize(("changed", "message"), [
    ({"head": "cosine"}, r"head is 'cosine'.*scalar.*dot.*mlp"),
    ({"decoded": "user"}, r"decoded is 'user'.*query.*item"),
    ({"student_gradient": "all"}, r"student_gradient is 'all'.*student.*backbone.*teacher"),
    ({"aligned_share": 0.0}, r"aligned_share is 0.0, expected a share in \(0, 1\]"),
    ({"aligned_share": 1.5}, "aligned_share is 1.5"),
    ({"aligned_share": float("nan")}, "aligned_share is nan"),
])
def test_unknown_options_are_refused(batch, changed, message):
    module = workloads.MODELS["tarq_mlp"].clone(**changed)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(module.init, jax.random.key(0), batch, workloads.make_codewords())


@pytest.mark.parametrize("name", ["tarq_mlp", "order_1_mlp"])
@pytest.mark.parametrize("levels", [L - 1, L + 1])
def test_codewords_of_another_number_of_levels_are_refused(batch, name, levels):
    model, codewords = workloads.compiled(name), np.zeros((levels, K, D), np.float32)
    with pytest.raises(ValueError, match=f"codewords: {levels} levels, expected num_levels={L}"):
        jax.eval_shape(model.module.apply, model.params, batch, codewords)


@pytest.mark.parametrize("name", ["tarq_dot", "order_1_scalar"])
def test_padding_has_no_say_in_balanced_codes(batch, name):
    """An encoder without a keyword `where` gets no mask, and its codes depend on the padding."""
    model, real = workloads.compiled(name), batch.candidate_mask
    balanced = functools.partial(quantization.encode, assign=quantization.balanced)

    def before_and_after(encode):
        forward = jax.jit(model.module.clone(encode=encode).apply)
        for candidates in (batch, workloads.refill(batch)):
            output = forward(model.params, candidates, *model.arguments)
            yield np.asarray(output.quantizer.codes)[real], np.asarray(output.logits)[real]

    np.testing.assert_equal(*before_and_after(balanced))
    before, after = before_and_after(lambda codewords, latents: balanced(codewords, latents))
    assert (before[0] != after[0]).any()


# Gradients

QUICK = {"xla_backend_optimization_level": 0}  # compiles in half the time
STUDENT = {"level_attention", "student_head", "codewords"}
MOVED = {  # loss -> groups of parameters that it changes, if the student's gradient stays in the student
    "student": STUDENT,
    "distillation": STUDENT,
    "teacher": {"item", "events", "towers", "history_encoder", "teacher_attention"},
    "output_reconstruction": {"level_attention", "codewords"},
    "alignment": {"encoder", "level_attention", "codewords"},
    "commitment": {"encoder"},
    "codebook": {"codewords"},
    "reconstruction": {"encoder", "decoder"},
}
BACKBONE = {"item", "events", "towers"}
REACHED = {  # how far the student's gradient reaches -> loss -> further groups that it changes
    "student": {},
    "backbone": {"student": BACKBONE, "distillation": BACKBONE},
    "teacher": {
        "student": BACKBONE | {"history_encoder"},
        "distillation": BACKBONE | {"history_encoder"},
        "output_reconstruction": {"item", "events", "history_encoder"},
        "alignment": {"item", "events", "history_encoder"},
        "commitment": {"item"},
        "reconstruction": {"item"},
    },
}


def values_of_losses(output, codewords, batch):
    """Losses of docs/mathematics.md by name, [] each."""
    quantizer, teacher = output.quantizer, output.teacher
    per_candidate = {
        "student": losses.binary_cross_entropy(output.logits, batch.labels),
        "distillation": losses.distillation(output.logits, teacher.logits),
        "teacher": losses.binary_cross_entropy(teacher.logits, batch.labels),
        "output_reconstruction": losses.output_reconstruction(
            output.attention_output, teacher.attention_output
        ),
        "alignment": losses.codebook_alignment(
            output.latents, teacher.attention_output, codewords, output.personalized, quantizer.chosen,
            output.attended,
        ),
        "commitment": losses.commitment(output.latents, quantizer.quantized),
        "codebook": losses.codebook_loss(quantizer.chosen, quantizer.residuals),
        "reconstruction": losses.squared_error(output.reconstruction, output.decoder_target),
    }
    return {name: losses.weighted_mean(values, batch.weights) for name, values in per_candidate.items()}


@functools.cache
def gradients(head, reach):
    """Gradients of the losses: loss -> (for the parameters, for the codewords).

    All losses for the `mlp` head; for the other heads only the losses that depend on the head.
    """
    model, batch = workloads.compiled(f"tarq_{head}"), workloads.make_batch()
    module = model.module.clone(student_gradient=reach)
    names = list(MOVED) if head == "mlp" else ["student", "distillation"]

    @functools.partial(jax.jit, compiler_options=QUICK)
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(params, codewords, select):
        values = values_of_losses(module.apply(params, batch, codewords), codewords, batch)
        return select @ jnp.stack([values[name] for name in names])

    rows = zip(names, np.eye(len(names), dtype=np.float32), strict=True)
    return {name: gradient(model.params, model.arguments[0], row) for name, row in rows}


def moved_groups(params, codewords):
    """Names of the groups of parameters whose gradient is not exactly zero."""
    params = dict(params["params"])
    teacher = dict(params.pop("teacher"))
    backbone = dict(teacher.pop("backbone"))
    groups = {
        "item": backbone.pop("item_features"),
        "events": backbone.pop("event_features"),
        "towers": backbone,
        "history_encoder": teacher.pop("history_encoder"),
        "teacher_attention": teacher,  # includes its query tower and its head
        "encoder": params.pop("encoder"),
        "decoder": params.pop("decoder"),
        "level_attention": params.pop("level_attention"),
        "student_head": params,
        "codewords": codewords,
    }
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(groups))
    return {name for name, group in groups.items() if any(np.any(leaf) for leaf in jax.tree.leaves(group))}


def test_student_gradient_stays_with_the_student_by_default(head):
    assert workloads.MODELS[f"tarq_{head}"].student_gradient == "student"
    for loss, gradient in gradients(head, "student").items():
        assert moved_groups(*gradient) == MOVED[loss], loss


@pytest.mark.parametrize("reach", ["backbone", "teacher"])
def test_student_gradient_reaches_as_far_as_it_is_let(reach):
    for loss, gradient in gradients("mlp", reach).items():
        assert moved_groups(*gradient) == MOVED[loss] | REACHED[reach].get(loss, set()), loss


def test_codebook_loss_draws_codewords_to_their_residuals(batch):
    output = workloads.compiled("tarq_mlp")(batch)
    codes, weights = np.asarray(output.quantizer.codes), batch.weights / batch.weights.sum()
    pull = 2 * weights[..., None, None] * np.asarray(output.quantizer.chosen - output.quantizer.residuals)
    expected = np.zeros((L, K, D))
    for request, candidate, level in np.ndindex(B, G, L):
        expected[level, codes[request, candidate, level]] += pull[request, candidate, level]
    close(gradients("mlp", "student")["codebook"][1], expected)


def test_reconstruction_trains_the_encoder_straight_through(batch):
    """The encoder's gradient is the decoder's gradient at the quantized value, passed to the latent."""
    model = workloads.compiled("tarq_mlp")
    output = model(batch)
    params = model.params["params"]

    def loss(quantized):
        decoded = model.module.apply(model.params, quantized, method=lambda module, x: module.decoder(x))
        return losses.weighted_mean(losses.squared_error(decoded, output.decoder_target), batch.weights)

    to_latents = jax.grad(loss)(output.quantizer.quantized)

    def latents(encoder):
        variables = {"params": {**params, "encoder": encoder}}
        return model.module.apply(variables, output.teacher, method="latents")

    expected = jax.vjp(latents, params["encoder"])[1](to_latents)[0]
    actual = gradients("mlp", "student")["reconstruction"][0]["params"]["encoder"]
    jax.tree.map(close, actual, expected)
