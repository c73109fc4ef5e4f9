"""Metrics of the codebook during training equal closed forms and the metrics of evaluation."""

import jax
import numpy as np
import pytest
import workloads

from tarq_jax import metrics, quantization
from tarq_jax.training.health import DEAD, codebook_metrics

compute = jax.jit(codebook_metrics)


@pytest.fixture(scope="module")
def measured():
    """Codebook [2, 7, 12], latents [8, 5, 12], a mask, the encoder's output, and the metrics."""
    rng = np.random.default_rng(0)
    codebook = workloads.make_codebook(0, workloads.LEVELS, workloads.CODEWORDS, workloads.WIDTH)
    latents = rng.normal(size=(8, 5, workloads.WIDTH)).astype(np.float32)
    where = rng.random((8, 5)) < 0.6
    output = quantization.encode(codebook.codewords, latents)
    return codebook, latents, where, output, jax.device_get(compute(codebook, output, where))


def test_equals_the_metrics_of_evaluation(measured):
    codebook, latents, where, output, found = measured
    batch = metrics.usage_counts(output.codes, workloads.CODEWORDS, where)
    error = metrics.quantization_error(latents, output, where)
    for level in range(workloads.LEVELS):
        expected = {
            "utilisation": metrics.utilisation(batch)[level], "quantization_error": error[level],
            "perplexity": metrics.perplexity(np.asarray(codebook.counts))[level],
        }
        for name, value in expected.items():
            assert found[f"codebook/{name}_{level + 1}"] == pytest.approx(value, rel=1e-4)


def test_dead_codewords_are_counted(measured):
    codebook, _, where, output, _ = measured
    counts = np.where(np.arange(7) < 3, 0.5 * DEAD, 1.0).astype(np.float32) * np.ones((2, 1), np.float32)
    found = compute(codebook.replace(counts=counts), output, where)
    assert found["codebook/dead_1"] == found["codebook/dead_2"] == 3


def test_nothing_to_measure_is_finite(measured):
    codebook, _, where, output, _ = measured
    empty = jax.tree.map(np.zeros_like, codebook)
    assert all(np.isfinite(value) for value in compute(empty, output, np.zeros_like(where)).values())


def test_levels_may_differ_in_size(measured):
    codebook, _, where, output, found = measured
    uneven = jax.tree.map(tuple, codebook)
    for name, value in codebook_metrics(uneven, output, where).items():
        np.testing.assert_allclose(value, found[name], rtol=1e-5)
