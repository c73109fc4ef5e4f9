"""Fitting codebooks: k-means with its start, weights and precision; least squares over all levels."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tarq_jax import quantization

examples = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31 - 1)

# compiled once here: the library leaves that to its callers
kmeans = jax.jit(quantization.kmeans, static_argnames=("num_codewords", "iterations"))
kmeans_codebook = jax.jit(quantization.kmeans_codebook, static_argnames=("num_levels", "num_codewords"))
encode = jax.jit(quantization.encode)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


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
    """After enough iterations every centroid is the mean of the points that are nearest to it."""
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
    """Latents [400, 6] in uneven clusters, normalised as the model's are, and a codebook fitted to them."""
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
    """A point of weight 3 counts as three points, one of weight 0 as none."""
    points, weights = normal(0, 40, 2), np.random.default_rng(1).integers(0, 4, 40)
    weights = weights.astype(np.float32)
    centroids = np.asarray(kmeans(jax.random.key(0), points, num_codewords=5, weights=weights))
    nearest = np.argmin(np.linalg.norm(points[:, None] - centroids, axis=-1), axis=1)
    owned = [(points[nearest == code], weights[nearest == code]) for code in range(5)]
    means = [np.average(own, axis=0, weights=counts) for own, counts in owned]
    np.testing.assert_allclose(centroids, means, rtol=1e-4, atol=1e-5)


def test_kmeans_far_from_the_origin_loses_no_precision():
    points = normal(0, 40, 2)
    near = kmeans(jax.random.key(0), points, num_codewords=5)
    far = kmeans(jax.random.key(0), points + np.float32(1000.0), num_codewords=5)
    np.testing.assert_allclose(far - np.float32(1000.0), near, atol=1e-3)


def test_kmeans_codebook_of_given_sizes(fitted):
    codebook = kmeans_codebook(jax.random.key(0), fitted[0], num_levels=2, num_codewords=(8, 3))
    assert [level.shape for level in codebook.codewords] == [(8, 6), (3, 6)]
    assert all(level.sum() == 400 for level in codebook.counts)


# Least squares over all levels


def mean_error(output, latents):
    return float(np.mean(np.sum((latents - np.asarray(output.quantized)) ** 2, axis=-1)))


def test_refine_equals_least_squares(fitted):
    """NumPy's solver on the design matrix of ones where a latent uses a codeword."""
    latents, codebook = fitted
    codes = np.asarray(encode(codebook.codewords, latents).codes)
    design = np.concatenate([np.eye(16)[codes[:, level]] for level in range(2)], axis=1)
    solution = np.linalg.lstsq(design, latents.astype(np.float64), rcond=None)[0]
    refined = jax.jit(quantization.refine)(codebook.codewords, latents, codes)
    found = np.sum((latents - np.asarray(quantization.decode(refined, codes))) ** 2)
    assert found == pytest.approx(np.sum((latents - design @ solution) ** 2), rel=1e-4)
    before = np.sum((latents - np.asarray(quantization.decode(codebook.codewords, codes))) ** 2)
    assert found < 0.99 * before


def test_refine_keeps_codewords_that_are_not_used(fitted):
    latents, codebook = fitted
    codes = np.asarray(encode(codebook.codewords, latents).codes) % 15  # never the last
    refined = quantization.refine(codebook.codewords, latents, codes)
    np.testing.assert_allclose(refined[:, 15], codebook.codewords[:, 15], atol=1e-5)
    uneven = quantization.refine(tuple(codebook.codewords), latents, codes)
    np.testing.assert_array_equal(np.stack(uneven), refined)


@pytest.mark.parametrize("encoder", [
    quantization.encode, functools.partial(quantization.beam_encode, beam=4)], ids=["greedy", "beam"])
def test_fit_codebook_improves_on_kmeans(fitted, encoder):
    latents, start = fitted
    fit = functools.partial(
        quantization.fit_codebook, num_levels=2, num_codewords=16, rounds=4, encode=encoder)
    codebook = jax.jit(fit)(jax.random.key(0), latents)
    found = mean_error(encoder(codebook.codewords, latents), latents)
    assert found < 0.99 * mean_error(encoder(start.codewords, latents), latents)
    counts, _ = quantization.assignment_statistics(encoder(codebook.codewords, latents), codebook.codewords)
    np.testing.assert_array_equal(codebook.counts, counts)


@pytest.mark.parametrize("call", [
    lambda: quantization.with_codewords(np.zeros((4, 5))),
    lambda: quantization.kmeans(jax.random.key(0), np.zeros((2, 6, 5)), num_codewords=3),
    lambda: quantization.kmeans(jax.random.key(0), np.zeros((6, 5)), num_codewords=3, weights=np.ones(5)),
    lambda: quantization.refine(np.zeros((2, 3, 5)), np.zeros((6, 5)), np.zeros((6, 3), int)),
])
def test_shapes_that_do_not_fit_are_refused(call):
    with pytest.raises(AssertionError):
        call()
