"""Fitting codebooks: k-means with its start, weights and precision; least squares over all levels."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from hypothesis import given, settings
from hypothesis import strategies as st

from tarq_jax import quantization
from tarq_jax.quantization import fitting

examples = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31 - 1)

# compiled once here, as the library leaves that to its callers
kmeans = jax.jit(quantization.kmeans, static_argnames=("num_codewords", "iterations"))
kmeans_codebook = jax.jit(quantization.kmeans_codebook, static_argnames=("num_levels", "num_codewords"))
encode = jax.jit(quantization.encode)


# k-means


@examples
@given(seeds)
def test_kmeans_recovers_far_clusters(seed):
    rng = np.random.default_rng(seed)
    centres = 1000.0 * np.stack([np.cos(np.arange(5)), np.sin(np.arange(5))], axis=-1)
    labels = rng.permutation(np.repeat(np.arange(5), 8))
    points = (centres[labels] + rng.normal(size=(40, 2))).astype(np.float32)
    centroids = np.asarray(kmeans(jax.random.key(seed), points, num_codewords=5))
    means = np.stack([points[labels == label].mean(axis=0) for label in range(5)])
    order = np.argmin(np.linalg.norm(means[:, None] - centroids, axis=-1), axis=1)
    np.testing.assert_allclose(centroids[order], means, rtol=1e-5, atol=1e-2)


def test_kmeans_is_a_function_of_its_key():
    points = normal(0, 40, 2)
    first, again, other = (kmeans(jax.random.key(seed), points, num_codewords=5) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_kmeans_reaches_a_fixed_point():
    """After enough iterations every centroid is the mean of the points nearest to it."""
    points = normal(0, 40, 2)
    centroids = np.asarray(kmeans(jax.random.key(0), points, num_codewords=5))
    nearest = np.argmin(np.linalg.norm(points[:, None] - centroids, axis=-1), axis=1)
    means = np.stack([points[nearest == code].mean(axis=0) for code in range(5)])
    np.testing.assert_allclose(centroids, means, rtol=1e-4, atol=1e-5)


def test_kmeans_needs_as_many_points_as_codewords():
    for fit in (
        functools.partial(quantization.kmeans, num_codewords=5),
        functools.partial(quantization.kmeans_codebook, num_levels=2, num_codewords=5),
    ):
        with pytest.raises(ValueError, match=r"(?s)4.*5"):
            fit(jax.random.key(0), np.zeros((4, 3), np.float32))


@pytest.mark.parametrize("size", [0, -1])
def test_kmeans_needs_a_codeword(size):
    with pytest.raises(ValueError, match=f"num_codewords is {size}, expected at least 1"):
        quantization.kmeans(jax.random.key(0), np.zeros((4, 3), np.float32), num_codewords=size)


@pytest.mark.parametrize("dtype", [np.int32, bool])
def test_kmeans_takes_weights_of_any_type(dtype):
    weights = (np.arange(40) % 3).astype(dtype)
    found, expected = (kmeans(jax.random.key(0), normal(0, 40, 2), num_codewords=5, weights=weights)
                       for weights in (weights, weights.astype(np.float32)))
    np.testing.assert_array_equal(found, expected)


def test_kmeans_of_duplicates_is_finite():
    same = np.full((40, 2), 3.0, np.float32)
    np.testing.assert_array_equal(kmeans(jax.random.key(0), same, num_codewords=5), same[:5])
    two = np.where(np.arange(40)[:, None] < 30, same, -same)
    centroids = np.asarray(kmeans(jax.random.key(0), two, num_codewords=5))
    np.testing.assert_array_equal(np.unique(np.round(centroids, 4), axis=0), [[-3.0, -3.0], [3.0, 3.0]])


def test_kmeans_traces_with_numpy_points():
    fit = functools.partial(quantization.kmeans, points=normal(0, 6, 2), num_codewords=3)
    assert jax.eval_shape(fit, jax.random.key(0)).shape == (3, 2)


@pytest.fixture(scope="module")
def fitted():
    """Latents [400, 6] in uneven clusters, normalised like the model's, and a codebook fitted to them."""
    rng = np.random.default_rng(9)
    latents = rng.normal(size=(12, 6))[rng.integers(0, 12, 400) ** 2 // 12] + 0.4 * rng.normal(size=(400, 6))
    latents = (latents / np.sqrt(np.mean(latents**2, axis=-1, keepdims=True))).astype(np.float32)
    return latents, kmeans_codebook(jax.random.key(0), latents, num_levels=2, num_codewords=16)


def errors_by_level(codewords, latents):
    """Mean squared error of the latents after 0, 1, ... L levels."""
    chosen = np.asarray(encode(codewords, latents).chosen)
    sums = np.concatenate([np.zeros_like(chosen[:, :1]), np.cumsum(chosen, axis=1)], axis=1)
    return np.mean(np.sum((latents[:, None] - sums) ** 2, axis=-1), axis=0)


def test_kmeans_codebook_has_the_statistics_of_the_latents(fitted):
    latents, codebook = fitted
    assert codebook.codewords.shape == (2, 16, 6)
    counts, sums = quantization.assignment_statistics(encode(codebook.codewords, latents), codebook.codewords)
    np.testing.assert_array_equal(codebook.counts, counts)
    np.testing.assert_allclose(codebook.sums, sums, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(codebook.counts.sum(axis=-1), 400)


def test_kmeans_codebook_uses_all_codewords(fitted):
    assert fitted[1].counts.min() > 0


def test_kmeans_codebook_error_falls_with_levels(fitted):
    latents, codebook = fitted
    errors = errors_by_level(codebook.codewords, latents)
    assert (np.diff(errors) < 0).all()
    assert errors[-1] < 0.3 * errors_by_level(normal(0, 2, 16, 6), latents)[-1]


def test_kmeans_counts_points_by_weight():
    """A point of weight 3 counts as three points, a point of weight 0 does not count."""
    points, weights = normal(0, 40, 2), np.random.default_rng(1).integers(0, 4, 40)
    weights = weights.astype(np.float32)
    centroids = np.asarray(kmeans(jax.random.key(0), points, num_codewords=5, weights=weights))
    nearest = np.argmin(np.linalg.norm(points[:, None] - centroids, axis=-1), axis=1)
    owned = [(points[nearest == code], weights[nearest == code]) for code in range(5)]
    means = [np.average(own, axis=0, weights=counts) for own, counts in owned]
    np.testing.assert_allclose(centroids, means, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-6, 1e30])
def test_kmeans_takes_weights_of_any_scale(scale):
    points, weights = normal(0, 40, 2), normal(1, 40) ** 2
    expected = kmeans(jax.random.key(0), points, num_codewords=5, weights=weights)
    found = kmeans(jax.random.key(0), points, num_codewords=5, weights=np.float32(scale) * weights)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_kmeans_ignores_what_points_of_no_weight_hold():
    points, weights = normal(0, 40, 2), (np.arange(40) % 3 > 0).astype(np.float32)
    expected = kmeans(jax.random.key(0), points, num_codewords=5, weights=weights)
    poisoned = np.where(weights[:, None] > 0, points, np.nan)
    found = kmeans(jax.random.key(0), poisoned, num_codewords=5, weights=weights)
    np.testing.assert_array_equal(found, expected)


def test_kmeans_starts_on_different_points_of_weight():
    """Without iterations the centroids are the start: distinct points of positive weight if possible."""
    points, weights = normal(0, 40, 2), (np.arange(40) < 6).astype(np.float32)
    start = np.asarray(kmeans(
        jax.random.key(0), points, num_codewords=5, weights=weights, iterations=0))
    distance = np.linalg.norm(points[:6, None] - start, axis=-1)
    np.testing.assert_allclose(distance.min(axis=0), 0.0, atol=1e-5)
    assert len(set(distance.argmin(axis=0))) == 5


def test_kmeans_finds_all_of_many_clusters():
    """Greedy draws rarely miss a cluster; single draws would miss some in every run."""
    rng = np.random.default_rng(0)
    centres = 20.0 * rng.normal(size=(30, 4))
    points = (centres[np.arange(600) % 30] + rng.normal(size=(600, 4))).astype(np.float32)
    missed = []
    for seed in range(5):
        centroids = np.asarray(kmeans(jax.random.key(seed), points, num_codewords=30))
        missed.append(np.sum(np.linalg.norm(centres[:, None] - centroids, axis=-1).min(axis=1) > 3.0))
    assert sum(missed) <= 1


def test_empty_clusters_take_over_what_is_served_worst():
    points = np.array([[0.0], [1.0], [2.0], [50.0], [90.0]], np.float32)
    centroids = np.array([[1.0], [1000.0], [1001.0]], np.float32)
    moved = fitting._lloyd(points, np.ones(5, np.float32), centroids)
    np.testing.assert_allclose(moved, [[np.mean(points)], [90.0], [50.0]])


def test_one_codeword_is_the_mean():
    points = normal(0, 40, 2)
    np.testing.assert_allclose(
        kmeans(jax.random.key(0), points, num_codewords=1), [points.mean(axis=0)], rtol=1e-4, atol=1e-6)


def test_kmeans_far_from_the_origin_loses_no_precision():
    points = normal(0, 40, 2)
    near = kmeans(jax.random.key(0), points, num_codewords=5)
    far = kmeans(jax.random.key(0), points + np.float32(1000.0), num_codewords=5)
    np.testing.assert_allclose(far - np.float32(1000.0), near, atol=1e-3)


def test_kmeans_codebook_of_given_sizes(fitted):
    codebook = kmeans_codebook(jax.random.key(0), fitted[0], num_levels=2, num_codewords=(8, 3))
    assert [level.shape for level in codebook.codewords] == [(8, 6), (3, 6)]
    assert all(level.sum() == 400 for level in codebook.counts)


def test_statistics_of_more_than_a_block():
    codewords, latents = normal(0, 2, 4, 3), normal(1, fitting.BLOCK + 100, 3)
    codebook = jax.jit(quantization.fitted)(codewords, latents)
    counts, sums = quantization.assignment_statistics(encode(codewords, latents), codewords)
    np.testing.assert_array_equal(codebook.counts, counts)
    np.testing.assert_allclose(codebook.sums, sums, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(codebook.codewords, codewords)
    assert not np.any(codebook.ages)


@pytest.mark.parametrize("sequence", [list, tuple])
def test_statistics_of_levels_given_one_by_one(sequence):
    codewords, latents = normal(0, 2, 4, 3), normal(1, 40, 3)
    even, uneven = (quantization.fitted(levels, latents) for levels in (codewords, sequence(codewords)))
    for name in ("codewords", "counts", "sums", "ages"):
        assert isinstance(getattr(uneven, name), tuple)
        np.testing.assert_array_equal(np.stack(getattr(uneven, name)), getattr(even, name))


def test_statistics_of_bfloat16_blocks_are_exact():
    num = 3 * fitting.BLOCK + 101
    codewords = jnp.array([[[0.0], [4.0]]], jnp.bfloat16)
    latents = jnp.where(jnp.arange(num) < 301, 1.0, 5.0)[:, None].astype(jnp.bfloat16)
    codebook = quantization.fitted(codewords, latents)
    np.testing.assert_array_equal(codebook.counts, [[301.0, num - 301.0]])
    np.testing.assert_array_equal(codebook.sums, [[[301.0], [5.0 * (num - 301.0)]]])
    assert {leaf.dtype for leaf in (codebook.counts, codebook.sums, codebook.ages)} == {jnp.dtype("float32")}


# Least squares over all levels


def mean_error(output, latents):
    return float(np.mean(np.sum((latents - np.asarray(output.quantized)) ** 2, axis=-1)))


def test_refine_equals_least_squares(fitted):
    """Compared with NumPy's solver; its design matrix has a one where a latent uses a codeword."""
    latents, codebook = fitted
    codes = np.asarray(encode(codebook.codewords, latents).codes)
    design = np.concatenate([np.eye(16)[codes[:, level]] for level in range(2)], axis=1)
    solution = np.linalg.lstsq(design, latents.astype(np.float64), rcond=None)[0]
    refined = jax.jit(quantization.refine)(codebook.codewords, latents, codes)
    found = np.sum((latents - np.asarray(quantization.decode(refined, codes))) ** 2)
    assert found == pytest.approx(np.sum((latents - design @ solution) ** 2), rel=1e-4)
    before = np.sum((latents - np.asarray(quantization.decode(codebook.codewords, codes))) ** 2)
    assert found < 0.99 * before


@pytest.mark.parametrize("sequence", [list, tuple])
def test_refine_keeps_codewords_that_are_not_used(fitted, sequence):
    latents, codebook = fitted
    codes = np.asarray(encode(codebook.codewords, latents).codes) % 15  # the last codeword is never used
    refined = quantization.refine(codebook.codewords, latents, codes)
    np.testing.assert_allclose(refined[:, 15], codebook.codewords[:, 15], atol=1e-5)
    uneven = quantization.refine(sequence(codebook.codewords), latents, codes)
    assert isinstance(uneven, tuple)
    np.testing.assert_array_equal(np.stack(uneven), refined)


def test_refine_of_many_latents_stays_well_conditioned():
    """Few codewords, each used a hundred thousand times: a ridge of fixed size would be lost in rounding."""
    codewords, latents = normal(0, 3, 4, 2), np.tile(normal(1, 2000, 2), (200, 1))
    codes = np.asarray(encode(codewords, latents).codes)
    design = np.concatenate([np.eye(4)[codes[:2000, level]] for level in range(3)], axis=1)
    expected = latents[:2000] - design @ np.linalg.lstsq(design, latents[:2000], rcond=None)[0]
    refined = jax.jit(quantization.refine)(codewords, latents, codes)
    found = latents[:2000] - np.asarray(quantization.decode(refined, codes[:2000]))
    assert np.mean(found**2) == pytest.approx(np.mean(expected**2), rel=1e-3)


@pytest.mark.parametrize("encoder", [
    pytest.param(quantization.encode, id="greedy"),
    pytest.param(functools.partial(quantization.beam_encode, beam=4), id="beam", marks=pytest.mark.slow)])
def test_more_rounds_never_raise_the_error(fitted, encoder):
    latents, start = fitted
    fit = functools.partial(quantization.fit_codebook, num_levels=2, num_codewords=16, encode=encoder)
    errors = [mean_error(encoder(start.codewords, latents), latents)]
    for rounds in (0, 1, 2, 4):
        codebook = jax.jit(functools.partial(fit, rounds=rounds))(jax.random.key(0), latents)
        output = encoder(codebook.codewords, latents)
        errors.append(mean_error(output, latents))
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)  # zero rounds equal k-means
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.99 * errors[0]
    counts, _ = quantization.assignment_statistics(output, codebook.codewords)
    np.testing.assert_array_equal(codebook.counts, counts)


def test_fit_codebook_of_given_sizes(fitted):
    codebook = quantization.fit_codebook(
        jax.random.key(0), fitted[0], num_levels=2, num_codewords=(8, 3), rounds=1)
    assert [level.shape for level in codebook.codewords] == [(8, 6), (3, 6)]


@pytest.mark.parametrize("call", [
    lambda: quantization.with_codewords(np.zeros((4, 5))),
    lambda: quantization.kmeans(jax.random.key(0), np.zeros((2, 6, 5)), num_codewords=3),
    lambda: quantization.kmeans(jax.random.key(0), np.zeros((6, 5)), num_codewords=3, weights=np.ones(5)),
    lambda: quantization.refine(np.zeros((2, 3, 5)), np.zeros((6, 5)), np.zeros((6, 3), int)),
])
def test_shapes_that_do_not_fit_are_refused(call):
    with pytest.raises(AssertionError):
        call()
