"""Settings that would give NaN or a collapsed codebook are refused; traced values are not looked at."""

import math

import jax
import numpy as np
import pytest
from draws import normal

from tarq_jax import quantization

CODEBOOK = quantization.with_codewords(normal(0, 1, 4, 3))
POINTS, CODES = normal(1, 6, 3), np.zeros((6, 1), np.int32)


def balanced(**settings):
    return quantization.balanced(POINTS, CODEBOOK.codewords[0], **settings)


def refine(**settings):
    return quantization.refine(CODEBOOK.codewords, POINTS, CODES, **settings)


def update_statistics(**settings):
    return quantization.update_statistics(CODEBOOK, CODEBOOK.counts, CODEBOOK.sums, **settings)


def ema_codewords(**settings):
    return quantization.ema_codewords(CODEBOOK, **settings)


@pytest.mark.parametrize(("function", "name", "values", "expected"), [
    (balanced, "temperature", (0, -0.1, math.nan), "a number above 0"),
    (refine, "ridge", (0, -1e-3), "a number above 0"),
    (update_statistics, "decay", (1, -0.1, 1.5), r"a number in \[0, 1\)"),
    (ema_codewords, "smoothing", (-1e-5,), "at least 0"),
])
def test_values_out_of_range(function, name, values, expected):
    for value in values:
        with pytest.raises(ValueError, match=f"{name} is {value}, expected {expected}"):
            function(**{name: value})


@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_numbers_of_iterations_are_whole_and_positive(value):
    with pytest.raises(ValueError, match=f"iterations: expected an integer >= 1, got {value}"):
        balanced(iterations=value)


@pytest.mark.parametrize("function", [
    lambda **sizes: quantization.random_codebook(jax.random.key(0), width=3, **sizes),
    lambda **sizes: quantization.kmeans_codebook(jax.random.key(0), POINTS, **sizes),
    lambda **sizes: quantization.fit_codebook(jax.random.key(0), POINTS, **sizes)])
@pytest.mark.parametrize("value", [0, -1])
def test_numbers_of_levels_are_positive(function, value):
    with pytest.raises(ValueError, match=f"num_levels: expected an integer >= 1, got {value}"):
        function(num_levels=value, num_codewords=4)


def test_limits_are_within_range():
    balanced(iterations=1)
    assert np.isfinite(ema_codewords(smoothing=0).codewords).all()
    np.testing.assert_array_equal(update_statistics(decay=0).counts, CODEBOOK.counts)


def test_traced_values():
    found = jax.jit(lambda decay: update_statistics(decay=decay).sums)(0.5)
    np.testing.assert_allclose(found, CODEBOOK.sums, rtol=1e-6)
