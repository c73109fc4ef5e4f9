"""Codebook health: closed forms, an independent quantizer as reference, properties, extremes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tarq_jax import metrics, quantization
from tarq_jax.types import QuantizerOutput

examples = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def quantize(codewords, latents):
    """Greedy residual quantization in NumPy, the reference for `quantization.encode`."""
    codes, residuals, chosen = [], [], []
    residual = latents
    for level in codewords:
        code = np.argmin(np.sum((residual[..., None, :] - level) ** 2, axis=-1), axis=-1)
        codes.append(code)
        residuals.append(residual)
        chosen.append(level[code])
        residual = residual - level[code]
    return QuantizerOutput(np.stack(codes, -1), sum(chosen), np.stack(residuals, -2), np.stack(chosen, -2))


def problem(seed, items=30, levels=3, size=4, width=5):
    """Codewords [L, K, D], latents [M, D], the output of their quantization, and a mask [M]."""
    rng = np.random.default_rng(seed)
    codewords, latents = rng.normal(size=(levels, size, width)), rng.normal(size=(items, width))
    return codewords, latents, quantize(codewords, latents), rng.random(items) < 0.7


# Usage


@examples
@given(seeds)
def test_usage_counts(seed):
    _, _, output, mask = problem(seed)
    counts = metrics.usage_counts(output.codes, 4, mask)
    for level in range(3):
        for code in range(4):
            assert counts[level, code] == np.sum(output.codes[mask, level] == code)
    np.testing.assert_array_equal(counts.sum(axis=1), mask.sum())
    np.testing.assert_array_equal(counts, metrics.usage_counts(output.codes[mask], 4))
    np.testing.assert_array_equal(
        metrics.usage_counts(output.codes, 4),
        metrics.usage_counts(output.codes[:11], 4) + metrics.usage_counts(output.codes[11:], 4),
    )
    np.testing.assert_array_equal(
        counts, metrics.usage_counts(output.codes.reshape(5, 6, 3), 4, mask.reshape(5, 6))
    )
    order = np.random.default_rng(seed).permutation(len(mask))
    np.testing.assert_array_equal(counts, metrics.usage_counts(output.codes[order], 4, mask[order]))


def test_usage_counts_of_any_integer_type_and_of_padding():
    for dtype in (np.uint8, np.uint64, np.int32):
        codes = np.array([[255, 255], [255, 0]], dtype=dtype)
        assert metrics.usage_counts(codes, 256)[:, 255].tolist() == [2, 1]
    assert metrics.usage_counts([[0], [-1]], 2, np.array([True, False])).tolist() == [[1, 0]]
    assert metrics.usage_counts(np.zeros((0, 2), int), 3).tolist() == [[0, 0, 0]] * 2


@examples
@given(seeds)
def test_usage_summaries(seed):
    counts = np.random.default_rng(seed).integers(0, 4, (3, 6))
    counts[:, 0] += 1
    np.testing.assert_allclose(metrics.utilisation(counts), 1 - metrics.dead_codewords(counts) / 6)
    np.testing.assert_allclose(metrics.perplexity(counts), np.exp(stats.entropy(counts, axis=1)))
    np.testing.assert_allclose(metrics.perplexity(5 * counts), metrics.perplexity(counts))
    assert np.all(metrics.perplexity(counts) <= 6 * metrics.utilisation(counts) + 1e-9)


def test_usage_summaries_closed_form():
    counts = np.array([[8, 0, 0, 0], [2, 2, 2, 2], [2, 1, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(metrics.utilisation(counts), [0.25, 1.0, 0.75, 0.0])
    np.testing.assert_array_equal(metrics.dead_codewords(counts), [3, 0, 1, 4])
    np.testing.assert_allclose(metrics.perplexity(counts), [1.0, 4.0, 2**1.5, np.nan])
    np.testing.assert_allclose(metrics.perplexity([[1e15, 1.0]]), [1.0])


# Quantization error


@examples
@given(seeds)
def test_quantization_error(seed):
    codewords, latents, output, mask = problem(seed)
    error = metrics.quantization_error(latents, output, mask)
    for level in range(3):
        left = (latents - output.chosen[:, : level + 1].sum(axis=1))[mask]
        assert error[level] == pytest.approx(np.sum(left**2) / np.sum(latents[mask] ** 2))
    scaled = quantize(9 * codewords, 9 * latents)
    np.testing.assert_allclose(metrics.quantization_error(9 * latents, scaled, mask), error)
    padded = np.where(mask[:, None], latents, np.nan)
    np.testing.assert_allclose(metrics.quantization_error(padded, output, mask), error)


def test_quantization_error_of_leading_axes():
    codewords, latents, output, mask = problem(0)
    grid = quantize(codewords, latents.reshape(5, 6, -1))
    np.testing.assert_allclose(
        metrics.quantization_error(latents.reshape(5, 6, -1), grid, mask.reshape(5, 6)),
        metrics.quantization_error(latents, output, mask),
    )


def test_quantization_error_closed_form():
    latents = np.array([[2.0], [4.0]])
    error = metrics.quantization_error(latents, quantize(np.array([[[3.0]], [[1.0]], [[0.0]]]), latents))
    np.testing.assert_allclose(error, np.array([2.0, 4.0, 4.0]) / 20)
    exact = quantize(np.array([[[2.0], [4.0]]]), latents)
    assert metrics.quantization_error(latents, exact).tolist() == [0.0]


def test_quantization_error_of_nothing_is_nan():
    codewords, latents, output, mask = problem(0)
    assert np.isnan(metrics.quantization_error(latents, output, np.zeros_like(mask))).all()
    assert np.isnan(metrics.quantization_error(0 * latents, quantize(codewords, 0 * latents))).all()


# Distances


@examples
@given(seeds, st.integers(2, 7))
def test_distances(seed, size):
    codewords = np.random.default_rng(seed).normal(size=(2, size, 3))
    distances = metrics.pairwise_distances(codewords)
    expected = np.linalg.norm(codewords[:, :, None] - codewords[:, None, :], axis=-1)
    np.testing.assert_allclose(distances, expected, atol=1e-12)
    summary = metrics.distance_summary(codewords)
    for level in range(2):
        pairs = distances[level][np.triu_indices(size, 1)]
        others = distances[level] + np.where(np.eye(size), np.inf, 0.0)
        assert summary["minimum"][level] == pytest.approx(pairs.min())
        assert summary["nearest"][level] == pytest.approx(others.min(axis=1).mean())
        assert summary["median"][level] == pytest.approx(np.median(pairs))


def test_distances_extremes():
    assert metrics.distance_summary([[[1.0], [1.0], [3.0]]])["minimum"].tolist() == [0.0]
    of_one = metrics.distance_summary([[[1.0, 2.0]]])
    assert all(np.isnan(value).tolist() == [True] for value in of_one.values())


# Everything


def health_of(codewords, latents, output, mask=None):
    return metrics.codebook_health(codewords, metrics.usage_counts(output.codes, codewords.shape[1], mask),
                                   metrics.unexplained_energy(latents, output, mask))


def test_batches_add_up():
    codewords, latents, output, mask = problem(3)
    whole = health_of(codewords, latents, output, mask)
    halves = [(latents[part], jax.tree.map(lambda x, part=part: x[part], output), mask[part])
              for part in (slice(0, 7), slice(7, None))]
    added = metrics.codebook_health(
        codewords, sum(metrics.usage_counts(found.codes, 4, where) for _, found, where in halves),
        sum(metrics.unexplained_energy(z, found, where) for z, found, where in halves))
    assert added == pytest.approx(whole, rel=1e-12)


def test_codebook_health_of_encode():
    codewords, latents, expected, mask = problem(3)
    output = quantization.encode(jnp.asarray(codewords), jnp.asarray(latents))
    health = health_of(codewords, latents, output, mask)
    names = ("utilisation", "perplexity", "dead", "quantization_error", "nearest_distance")
    assert list(health) == [f"{name}_{level}" for name in names for level in (1, 2, 3)]
    assert all(type(value) is float for value in health.values())
    assert health == pytest.approx(health_of(codewords, latents, expected, mask), rel=1e-4)
    counts = metrics.usage_counts(expected.codes, 4, mask)
    assert health["perplexity_2"] == pytest.approx(metrics.perplexity(counts)[1])
    assert health["dead_3"] == metrics.dead_codewords(counts)[2]
    assert health["nearest_distance_1"] == pytest.approx(metrics.distance_summary(codewords)["nearest"][0])


def test_codebook_health_shows_a_collapse():
    rng = np.random.default_rng(0)
    codewords = np.concatenate([np.zeros((1, 1, 2)), 50 + rng.normal(size=(1, 7, 2))], axis=1)
    latents = rng.normal(size=(100, 2))
    health = health_of(codewords, latents, quantize(codewords, latents))
    assert (health["utilisation_1"], health["perplexity_1"], health["dead_1"]) == (0.125, 1.0, 7.0)
    assert health["quantization_error_1"] == 1.0


def test_codebook_health_without_items():
    codewords, latents, output, mask = problem(0)
    health = health_of(codewords, latents, output, np.zeros_like(mask))
    assert (health["utilisation_1"], health["dead_1"]) == (0.0, 4.0)
    assert math.isnan(health["perplexity_1"]) and math.isnan(health["quantization_error_1"])


# Mistakes


@pytest.mark.parametrize(
    ("codes", "size", "mask", "message"),
    [
        ([[0.0]], 2, None, "codes: expected integers .* got float64"),
        (3, 2, None, r"codes: expected integers \[\.\.\., L\]"),
        ([[0, 2]], 2, None, r"codes: expected values in \[0, 2\), got 0 to 2"),
        ([[-1, 1]], 2, None, r"codes: expected values in \[0, 2\), got -1 to 1"),
        ([[0, 1]], 0, None, "num_codewords: expected an integer >= 1, got 0"),
        ([[0, 1]], 2, [[True, True]], r"mask: expected shape \(1,\), that of codes without its last axis"),
        ([[0, 1]], 2, [1], "mask: expected a boolean mask"),
    ],
)
def test_refuses_bad_codes(codes, size, mask, message):
    with pytest.raises(ValueError, match=message):
        metrics.usage_counts(codes, size, mask)


@pytest.mark.parametrize("metric", [metrics.utilisation, metrics.dead_codewords, metrics.perplexity])
def test_refuses_bad_counts(metric):
    for counts, message in (
        ([1, 2], r"counts: expected shape \[L, K\], got \(2,\)"),
        ([[1, -2]], "counts: expected values >= 0, got -2"),
        ([[1, np.nan]], "counts: expected finite values, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            metric(counts)


def test_refuses_bad_quantizer_output():
    codewords, latents, output, mask = problem(0)
    for change, message in (
        ({"codes": output.codes[:5]}, r"output\.codes: expected shape \(30, 3\)"),
        ({"quantized": output.quantized[0]}, r"output\.quantized: expected shape \(30, 5\)"),
        ({"residuals": output.residuals[:, :2]}, r"output\.residuals: expected shape \(30, 3, 5\)"),
        ({"quantized": output.quantized * np.nan}, r"output\.quantized: expected finite values, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            metrics.quantization_error(latents, dataclasses.replace(output, **change))
    with pytest.raises(ValueError, match=r"latents: expected shape \[\.\.\., D\]"):
        metrics.quantization_error(1.0, output)
    with pytest.raises(ValueError, match=r"counts: expected shape \(2, 4\), that of codewords"):
        health_of(codewords[:2], latents, output, mask)
    with pytest.raises(ValueError, match=r"energy: expected shape \(4,\), that of 1 \+ L, got \(3,\)"):
        metrics.codebook_health(codewords, np.ones((3, 4)), np.ones(3))


def test_refuses_bad_codewords():
    with pytest.raises(ValueError, match=r"codewords: expected shape \[L, K, D\], got \(2, 2\)"):
        metrics.pairwise_distances(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="codewords: expected finite values, got inf"):
        metrics.distance_summary([[[np.inf]]])
