"""Encoding: a brute-force reference, assignments, beam search, levels that differ in size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax import export

from tarq_jax import quantization
from tarq_jax.quantization import encoding
from tarq_jax.types import QuantizerOutput

SHAPES = [(1, 1, 3, (4,)), (1, 5, 1, (2, 3)), (2, 2, 3, (1,)), (3, 5, 2, ()), (3, 4, 3, (2, 1, 5))]
examples = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31 - 2)

# compiled once here, as the library leaves that to its callers
encode = jax.jit(quantization.encode)
encode_by_cosine = jax.jit(functools.partial(quantization.encode, assign=quantization.nearest_by_cosine))
beam_encode = jax.jit(quantization.beam_encode, static_argnames="beam")


@st.composite
def problems(draw):
    """Codewords [L, K, D] and latents [..., D] of small integers: exact in float32, with many ties."""
    levels, size, width, leading = draw(st.sampled_from(SHAPES))
    small = st.integers(-6, 6).map(float)
    codewords = draw(hnp.arrays(np.float32, (levels, size, width), elements=small))
    return codewords, draw(hnp.arrays(np.float32, (*leading, width), elements=small))


def brute_force(codewords, latents):
    """Greedy residual quantization, one latent, one level and one codeword at a time."""
    leading = latents.shape[:-1]
    codes = np.zeros((*leading, len(codewords)), np.int32)
    residuals = np.zeros((*leading, len(codewords), latents.shape[-1]))
    chosen = np.zeros_like(residuals)
    for index in np.ndindex(leading):
        residual = latents[index].astype(np.float64)
        for number, level in enumerate(codewords):
            distances = [np.sum((residual - codeword) ** 2) for codeword in level]
            codes[(*index, number)] = best = int(np.argmin(distances))
            residuals[(*index, number)], chosen[(*index, number)] = residual, level[best]
            residual = residual - level[best]
    return QuantizerOutput(codes, chosen.sum(axis=-2), residuals, chosen)


# Encode and decode


@pytest.mark.parametrize("function", [
    encode, encode_by_cosine, functools.partial(beam_encode, beam=2),
    jax.jit(functools.partial(quantization.encode, assign=quantization.balanced)),
    jax.jit(lambda codewords, latents: quantization.kmeans(
        jax.random.key(0), latents.reshape(-1, latents.shape[-1]), num_codewords=len(codewords[0])))])
def test_products_have_full_precision_on_every_device(function, quantized):
    text = jax.jit(function).lower(*quantized[:2]).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert products and all("precision = [HIGHEST, HIGHEST]" in line for line in products)


@examples
@given(problems())
def test_encode_equals_brute_force(problem):
    codewords, latents = problem
    output, expected = encode(codewords, latents), brute_force(codewords, latents)
    assert output.codes.dtype == jnp.int32
    jax.tree.map(np.testing.assert_array_equal, output, expected)


def test_encode_real_numbers_equals_brute_force(quantized):
    codewords, latents, output = quantized
    expected = brute_force(codewords, latents)
    np.testing.assert_array_equal(output.codes, expected.codes)
    for name in ("quantized", "residuals", "chosen"):
        np.testing.assert_allclose(getattr(output, name), getattr(expected, name), rtol=1e-5, atol=1e-6)


def test_output_is_consistent(quantized):
    codewords, latents, output = quantized
    np.testing.assert_array_equal(quantization.decode(codewords, output.codes), output.quantized)
    np.testing.assert_array_equal(output.residuals[..., 0, :], latents)
    np.testing.assert_array_equal(
        output.residuals[..., 1:, :], output.residuals[..., :-1, :] - output.chosen[..., :-1, :]
    )
    np.testing.assert_allclose(output.chosen.sum(axis=-2), output.quantized, rtol=1e-6, atol=1e-6)
    left = output.residuals[..., -1, :] - output.chosen[..., -1, :]
    np.testing.assert_allclose(left, latents - output.quantized, rtol=1e-5, atol=1e-6)


def test_jit_and_vmap_equal_eager(quantized):
    codewords, latents, output = quantized
    eager = quantization.encode(codewords, latents)
    batched = jax.vmap(quantization.encode, in_axes=(None, 0))(codewords, latents)
    loop = [quantization.encode(codewords, row) for row in latents]
    for other in (eager, batched, jax.tree.map(lambda *rows: np.stack(rows), *loop)):
        np.testing.assert_array_equal(output.codes, other.codes)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), output, other)


def test_sums_of_far_codewords_are_reconstructed():
    codewords = np.array([64.0, 8.0, 1.0], np.float32)[:, None, None] * np.array([[-1, 0], [1, 0], [0, 1]])
    codes = np.stack(np.meshgrid(*[np.arange(3)] * 3, indexing="ij"), axis=-1)
    latents = quantization.decode(codewords, codes)
    output = quantization.encode(codewords, latents)
    np.testing.assert_array_equal(output.codes, codes)
    np.testing.assert_array_equal(output.quantized, latents)


@pytest.mark.parametrize("encoder", [encode, jax.jit(functools.partial(quantization.beam_encode, beam=3))],
                         ids=["greedy", "beam"])
def test_codes_do_not_depend_on_the_distance_from_the_origin(encoder):
    """Entries are multiples of 1/16 near 2^18: exact in float32, but their squares are not."""
    rng = np.random.default_rng(11)
    latents, level_1, level_2 = (rng.integers(-64, 64, (size, 3)) / 16 for size in (200, 8, 8))
    near = encoder(np.stack([level_1, level_2 / 4]).astype(np.float32), latents.astype(np.float32))
    far = encoder(np.stack([level_1 + 2.0**18, level_2 / 4]).astype(np.float32),
                  (latents + 2.0**18).astype(np.float32))
    np.testing.assert_array_equal(far.codes, near.codes)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_a_codeword_far_from_all_others_changes_no_code(implementation):
    codewords, latents = normal(0, 3, 8, 6), normal(1, 500, 6)
    expected = encode(codewords, latents).codes
    far = np.concatenate([np.full((3, 1, 6), 1e5, np.float32), codewords], axis=1)
    found = quantization.encode(far, latents, implementation=implementation).codes
    np.testing.assert_array_equal(found, expected + 1)


@pytest.mark.parametrize("call", [
    lambda: quantization.encode(np.zeros((4, 5)), np.zeros((6, 5))),
    lambda: quantization.encode(np.zeros((3, 4, 5)), np.zeros((6, 1))),
    lambda: quantization.decode(np.zeros((3, 4, 5)), np.zeros((6, 2), int)),
    lambda: quantization.encode((np.zeros((4, 5)), np.zeros((4, 6))), np.zeros((6, 5))),
    lambda: quantization.beam_encode(np.zeros((4, 5)), np.zeros((6, 5)), beam=2),
    lambda: quantization.with_codes(np.zeros((3, 4, 5)), np.zeros((6, 5)), np.zeros((6, 2), int)),
])
def test_shapes_that_do_not_fit_are_refused(call):
    with pytest.raises(AssertionError):
        call()


# Assignments


def test_cosine_equals_numpy():
    points = normal(0, 40, 3)
    codewords = normal(1, 7, 3) * np.linspace(0.1, 9, 7, dtype=np.float32)[:, None]
    cosine = points @ codewords.T / np.linalg.norm(codewords, axis=1)  # cosine times the length of the point
    np.testing.assert_array_equal(quantization.nearest_by_cosine(points, codewords), cosine.argmax(axis=1))
    by_cosine = encode_by_cosine(codewords[None], points)
    np.testing.assert_array_equal(by_cosine.codes[:, 0], cosine.argmax(axis=1))
    assert (by_cosine.codes != encode(codewords[None], points).codes).any()


def test_cosine_of_nothing_is_defined():
    codewords = np.array([[-1.0, 0.0], [0.0, 0.0], [0.0, -1.0]], np.float32)
    np.testing.assert_array_equal(quantization.nearest_by_cosine(np.ones((1, 2)), codewords), [1])
    np.testing.assert_array_equal(quantization.nearest_by_cosine(np.zeros((1, 2)), codewords), [0])


def test_balanced_evens_out_usage():
    """Nine tenths of the points are at one codeword, but each codeword still takes an equal share."""
    rng = np.random.default_rng(0)
    codewords = 4.0 * np.eye(5, dtype=np.float32)
    points = codewords[np.where(rng.random(500) < 0.9, 0, rng.integers(0, 5, 500))] + normal(1, 500, 5)
    greedy = np.bincount(quantization.nearest(points, codewords), minlength=5)
    even = np.bincount(jax.jit(quantization.balanced)(points, codewords), minlength=5)
    assert greedy.max() > 400 and greedy.min() < 30
    assert even.max() < 140 and even.min() > 60


def test_balanced_does_not_depend_on_the_distance_from_the_origin():
    points, codewords = (np.random.default_rng(seed).integers(-64, 64, (40, 3)) / 16 for seed in (0, 1))
    near = quantization.balanced(points.astype(np.float32), codewords[:8].astype(np.float32))
    far = quantization.balanced(*((x + 2.0**18).astype(np.float32) for x in (points, codewords[:8])))
    np.testing.assert_array_equal(far, near)


def test_balanced_keeps_an_even_assignment():
    codewords = 10.0 * np.eye(4, dtype=np.float32)
    points = np.repeat(codewords, 6, axis=0) + normal(0, 24, 4)
    np.testing.assert_array_equal(quantization.balanced(points, codewords), np.repeat(np.arange(4), 6))


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e15])
def test_balanced_does_not_depend_on_the_scale(scale):
    codewords = np.float32(scale) * normal(0, 4, 3)
    np.testing.assert_array_equal(quantization.balanced(codewords[[2, 0, 3, 1]], codewords), [2, 0, 3, 1])


@pytest.mark.parametrize("value", [0.0, 2.0, -1e4])
def test_balanced_without_any_distance_takes_the_first(value):
    points = np.full((6, 3), value, np.float32)
    np.testing.assert_array_equal(quantization.balanced(points, points[:4]), np.zeros(6))


@pytest.mark.parametrize("scale", [3e-19, 1e-19, 1e-25])
def test_balanced_where_distances_underflow_takes_the_first(scale):
    """The squared distances, or their product with the temperature, are below what float32 holds."""
    points = np.float32(scale) * np.array([[0.0], [0.0], [1.0], [1.0]], np.float32)
    np.testing.assert_array_equal(quantization.balanced(points, points[1:3]), np.zeros(4))


@pytest.mark.parametrize("padding", [0.0, 1e4, np.nan])
def test_balanced_spreads_real_points_alone(padding):
    codewords, points = normal(0, 2, 4, 3), normal(1, 5, 6, 3)
    real = np.random.default_rng(2).random((5, 6)) < 0.5
    balanced = functools.partial(quantization.encode, assign=quantization.balanced)
    padded = np.where(real[..., None], points, np.float32(padding))
    found = balanced(codewords, padded, where=real).codes[real]
    np.testing.assert_array_equal(found, balanced(codewords, points[real]).codes)
    assert (found != balanced(codewords, padded).codes[real]).any()
    nothing = quantization.balanced(points[0], codewords[0], where=np.zeros(6, bool))
    np.testing.assert_array_equal(nothing, np.zeros(6))


@pytest.mark.parametrize("wrong", [np.ones(6, bool), np.ones((1, 5), bool), np.ones((6, 5, 1), bool)])
def test_masks_that_do_not_fit_are_refused(wrong):
    with pytest.raises(AssertionError):
        quantization.encode(normal(0, 2, 4, 3), normal(1, 6, 5, 3), where=wrong)


def test_argmax_takes_the_first_of_equals():
    scores = np.array([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [-np.inf, -np.inf, -5.0], [np.nan] * 3], np.float32)
    np.testing.assert_array_equal(encoding.argmax(scores), [1, 0, 2, 2])


@pytest.mark.parametrize("size", [1, 7, 16, 17, 40, 48, 49, 300])  # from 49 on in parts
def test_argmax_of_rows(size):
    scores = np.random.default_rng(0).integers(-3, 3 + size // 5, (200, size)).astype(np.float32)  # with ties
    scores[0], scores[1], scores[2] = -np.inf, np.nan, 5.0
    scores[3, :-1] = -np.inf
    expected = np.where(np.isnan(scores[:, 0]), size - 1, scores.argmax(axis=1))
    np.testing.assert_array_equal(encoding.argmax(scores), expected)
    np.testing.assert_array_equal(encoding.argmax(scores.T, axis=0), expected)


# Beam search


def squared_errors(output, latents):
    return np.sum((latents - np.asarray(output.quantized)) ** 2, axis=-1)


def test_beam_of_one_is_greedy(quantized):
    codewords, latents, output = quantized
    jax.tree.map(np.testing.assert_array_equal, quantization.beam_encode(codewords, latents, beam=1), output)


def test_full_beam_finds_the_optimum(quantized):
    codewords, latents, _ = quantized
    found = beam_encode(codewords, latents, beam=16)
    every = np.stack(np.meshgrid(*[np.arange(4)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    sums = np.asarray(quantization.decode(codewords, every))
    errors = np.sum((latents[..., None, :] - sums) ** 2, axis=-1)
    np.testing.assert_allclose(squared_errors(found, latents), errors.min(axis=-1), rtol=1e-4)
    np.testing.assert_array_equal(found.codes, every[errors.argmin(axis=-1)])


@examples
@given(seeds)
def test_beam_is_never_worse_than_greedy(seed):
    codewords, latents = normal(seed, 3, 4, 5), 2.0 * normal(seed + 1, 6, 5, 5)
    greedy, found = encode(codewords, latents), beam_encode(codewords, latents, beam=3)
    assert (squared_errors(found, latents) <= squared_errors(greedy, latents) + 1e-5).all()
    np.testing.assert_array_equal(quantization.decode(codewords, found.codes), found.quantized)


def test_beam_lowers_the_error(quantized):
    codewords, latents, greedy = quantized
    assert squared_errors(beam_encode(codewords, latents, beam=16), latents).sum() < 0.98 * squared_errors(
        greedy, latents).sum()


@pytest.mark.parametrize("block", [0, 1, 7, 30, 64])
def test_greedy_in_blocks_is_the_same(quantized, block):
    codewords, latents, *_ = quantized
    found = quantization.encode(codewords, latents, block=block)
    expected = quantization.encode(codewords, latents)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, expected)
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_allclose(found.residuals, expected.residuals, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("block", [0, 1, 7, 30, 64])
def test_beam_in_blocks_is_the_same(quantized, block):
    codewords, latents, _ = quantized
    whole = quantization.beam_encode(codewords, latents, beam=3)
    found = quantization.beam_encode(codewords, latents, beam=3, block=block)
    jax.tree.map(np.testing.assert_array_equal, found, whole)


@pytest.mark.parametrize("encoder, block", [
    (quantization.encode, 2048), (functools.partial(quantization.beam_encode, beam=2), 512)])
def test_blocks_are_chosen_by_size(encoder, block):
    """2^20 logits are encoded together on a CPU; more go through in blocks."""
    def text(count, **options):
        return str(jax.make_jaxpr(functools.partial(encoder, **options))(
            jnp.zeros((2, 256, 3)), jnp.zeros((2, count, 3))))

    paths = 2 if block == 512 else 1
    assert text(2048 // paths) == text(2048 // paths, block=0)
    assert text(2049) == text(2049, block=block) and "scan" in text(2049)
    assert "scan" not in text(2049, block=0)
    if paths == 1:  # all latents together where one's code depends on the others
        assert text(2049, assign=quantization.balanced) == text(2049, assign=quantization.balanced, block=0)


@examples
@given(seeds)
def test_top_equals_sorting(seed):
    """With many groups of entries, of which fewer are selected, and with ties."""
    scores = np.round(3.0 * normal(seed, 5, 203))
    values, found = encoding._top(scores, 4)
    np.testing.assert_array_equal(values, -np.sort(-scores, axis=1)[:, :4])
    np.testing.assert_array_equal(np.take_along_axis(scores, np.asarray(found), axis=1), values)
    assert all(len(set(row)) == 4 for row in np.asarray(found).tolist())


@pytest.mark.parametrize("encoder", [
    quantization.encode, functools.partial(quantization.beam_encode, beam=2)])
@pytest.mark.parametrize("block", [-1, 1.5, True, "a"])
def test_blocks_that_are_no_number_of_latents_are_refused(quantized, encoder, block):
    with pytest.raises(ValueError, match=f"block: expected an integer >= 0, got {block!r}"):
        encoder(*quantized[:2], block=block)


@pytest.mark.parametrize("encoder", [
    quantization.encode, functools.partial(quantization.beam_encode, beam=2)])
def test_one_program_for_every_number_of_latents(quantized, encoder):
    codewords, latents, _ = quantized
    every, = export.symbolic_shape("m")
    spec = jax.ShapeDtypeStruct((every, latents.shape[-1]), jnp.float32)
    program = export.export(jax.jit(lambda found: encoder(codewords, found).codes))(spec)
    flat = latents.reshape(-1, latents.shape[-1])
    for size in (1, 5):
        np.testing.assert_array_equal(program.call(flat[:size]), encoder(codewords, flat[:size]).codes)
    with pytest.raises(ValueError, match="block is 3, expected 0 or None for a number of latents"):
        export.export(jax.jit(lambda found: encoder(codewords, found, block=3).codes))(spec)


def test_codes_that_depend_on_all_latents_have_no_blocks():
    with pytest.raises(ValueError, match="block is 2, expected 0 with assign="):
        quantization.encode(np.zeros((1, 3, 2)), np.zeros((4, 2)), assign=quantization.balanced, block=2)


@pytest.mark.parametrize("beam", [1, 3])
def test_nothing_to_encode(beam):
    output = quantization.beam_encode(np.zeros((2, 4, 5)), np.zeros((0, 5)), beam=beam)
    assert output.codes.shape == (0, 2) and output.quantized.shape == (0, 5)


@pytest.mark.parametrize("beam", [0, 1.5, "2"])
def test_beams_that_are_no_number_of_sums_are_refused(quantized, beam):
    with pytest.raises(ValueError, match=f"beam: expected an integer >= 1, got {beam!r}"):
        quantization.beam_encode(*quantized[:2], beam=beam)


@pytest.mark.parametrize("codewords, complaint", [
    ([], r"codewords: 0 levels of \[\] codewords, expected at least one level"),
    (np.zeros((2, 0, 3)), r"codewords: 2 levels of \[0, 0\] codewords, expected at least one level"),
])
def test_levels_without_codewords_are_refused(codewords, complaint):
    for call in (lambda: quantization.encode(codewords, np.zeros((4, 3))),
                 lambda: quantization.decode(codewords, np.zeros((4, len(codewords)), int))):
        with pytest.raises(ValueError, match=complaint):
            call()


# Levels that differ in size


@pytest.mark.parametrize("sequence", [list, tuple])
@pytest.mark.parametrize("encoder", [encode, functools.partial(beam_encode, beam=3)])
def test_levels_of_equal_size_may_come_one_by_one(quantized, encoder, sequence):
    codewords, latents, _ = quantized
    one_by_one = encoder(sequence(codewords), latents)
    jax.tree.map(np.testing.assert_array_equal, one_by_one, encoder(codewords, latents))


def test_uneven_levels_equal_brute_force():
    levels, latents = (normal(0, 6, 5), normal(1, 2, 5), normal(2, 3, 5)), normal(3, 8, 5)
    output, expected = quantization.encode(levels, latents), brute_force(levels, latents)
    np.testing.assert_array_equal(output.codes, expected.codes)
    np.testing.assert_allclose(output.quantized, expected.quantized, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(quantization.decode(levels, output.codes), output.quantized)
    found = quantization.beam_encode(levels, latents, beam=12)
    assert (found.codes < np.array([6, 2, 3])).all()
    assert squared_errors(found, latents).sum() <= squared_errors(output, latents).sum()
