"""One battery of properties for all quantizers; a table says which of them treat each point independently."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import workloads
from draws import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from tarq_jax import quantization
from tarq_jax.types import QuantizerOutput

M, D, SIZES = 16, 5, (4, 3, 6)  # M, D: number and width of latents; SIZES: number of codewords per level
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


class Quantizer(NamedTuple):
    """One way to quantize."""

    encode: Callable[..., QuantizerOutput]
    pointwise: bool = True  # a latent's code does not depend on the other latents


QUANTIZERS = {
    "nearest": Quantizer(quantization.encode),
    "cosine": Quantizer(functools.partial(quantization.encode, assign=quantization.nearest_by_cosine)),
    "balanced": Quantizer(
        functools.partial(quantization.encode, assign=quantization.balanced), pointwise=False),
    "beam": Quantizer(functools.partial(quantization.beam_encode, beam=3)),
}
GRADIENTS = {"straight_through": quantization.straight_through, "rotation": quantization.rotate}


def even(seed):
    return normal(seed, 3, 4, D)


def uneven(seed):
    return tuple(normal(seed + index, size, D) for index, size in enumerate(SIZES))


@pytest.fixture(scope="module", params=QUANTIZERS)
def quantizer(request):
    return QUANTIZERS[request.param]


@pytest.fixture(scope="module")
def compiled(quantizer):
    """The quantizer, compiled once for all examples of a shape."""
    return jax.jit(quantizer.encode)


@pytest.fixture(params=[even, uneven], ids=["even", "uneven"])
def levels(request):
    return request.param


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-3, 1.0, 1e3]))
@pytest.mark.parametrize("make", [even, uneven], ids=["even", "uneven"])
def test_output_is_consistent(compiled, make, seed, scale):
    codewords, latents = make(seed), np.float32(scale) * normal(seed + 9, M, D)
    output = compiled(codewords, latents)
    sizes = np.array([len(level) for level in codewords])
    assert output.codes.shape == (M, 3) and output.codes.dtype == np.int32
    assert ((0 <= output.codes) & (output.codes < sizes)).all()
    np.testing.assert_array_equal(quantization.decode(codewords, output.codes), output.quantized)
    for index, level in enumerate(codewords):
        np.testing.assert_array_equal(output.chosen[:, index], level[np.asarray(output.codes)[:, index]])
    np.testing.assert_array_equal(output.residuals[:, 0], latents)
    left = np.asarray(output.residuals - output.chosen)
    np.testing.assert_array_equal(output.residuals[:, 1:], left[:, :-1])
    np.testing.assert_allclose(left[:, -1], latents - output.quantized, rtol=1e-4, atol=1e-5 * max(scale, 1))


def test_jit_equals_eager(quantizer, compiled, levels):
    codewords, latents = levels(0), normal(1, M, D)
    eager, found = quantizer.encode(codewords, latents), compiled(codewords, latents)
    np.testing.assert_array_equal(found.codes, eager.codes)
    jax.tree.map(close, found, eager)


def test_leading_axes_are_only_a_shape(quantizer, levels):
    codewords, latents = levels(0), normal(1, M, D)
    flat = quantizer.encode(codewords, latents)
    shaped = quantizer.encode(codewords, latents.reshape(2, 8, D))
    jax.tree.map(lambda one, other: close(one, other.reshape(one.shape)), flat, shaped)


def test_points_are_independent_where_the_table_says_so(quantizer, compiled, levels):
    """vmap = loop, and each latent has the code that it would have alone."""
    codewords, latents = levels(0), normal(1, M, D)
    together = compiled(codewords, latents)
    alone = [quantizer.encode(codewords, latents[None, index]).codes[0] for index in range(M)]
    assert np.array_equal(together.codes, np.stack(alone)) == quantizer.pointwise
    if quantizer.pointwise:
        batched = jax.vmap(quantizer.encode, in_axes=(None, 0))(codewords, latents)
        np.testing.assert_array_equal(batched.codes, together.codes)
        jax.tree.map(close, batched, together)


def test_masked_statistics_equal_truncated(compiled, levels):
    codewords, latents = levels(0), normal(1, M, D)
    output = compiled(codewords, latents)
    masked = quantization.assignment_statistics(output, codewords, np.arange(M) < 11)
    truncated = quantization.assignment_statistics(jax.tree.map(lambda x: x[:11], output), codewords)
    jax.tree.map(close, masked, truncated)
    assert all(level.sum() == 11 for level in masked[0])


def test_gradients_equal_those_of_the_codes(quantizer, levels):
    """Choosing a code has no gradient; the gradient is that of the sum of the chosen codewords."""
    codewords, latents, upstream = levels(0), normal(1, M, D), normal(2, M, D)
    codes = quantizer.encode(codewords, latents).codes

    def through(make):
        return jax.grad(lambda codewords, z: jnp.sum(upstream * make(codewords, z)), argnums=(0, 1))(
            codewords, latents)

    found = through(lambda codewords, z: quantizer.encode(codewords, z).quantized)
    expected = through(lambda codewords, z: quantization.decode(codewords, codes) + 0.0 * z)
    jax.tree.map(close, found, expected)


@pytest.mark.parametrize("trick", GRADIENTS.values(), ids=GRADIENTS)
def test_gradient_tricks(quantizer, levels, trick):
    """The value is the quantized one; codewords get no gradient, latents get a finite one."""
    codewords, latents, upstream = levels(0), normal(1, M, D), normal(2, M, D)

    def passed(codewords, latents):
        return trick(latents, quantizer.encode(codewords, latents).quantized)

    np.testing.assert_array_equal(
        passed(codewords, latents), quantizer.encode(codewords, latents).quantized)
    to_codewords, to_latents = jax.grad(
        lambda *args: jnp.sum(upstream * passed(*args)), argnums=(0, 1))(codewords, latents)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(to_codewords))
    assert np.isfinite(to_latents).all() and np.any(to_latents)


def test_sharding_is_preserved(quantizer, compiled):
    """Latents split over 8 devices give the same codes, which are split in the same way."""
    codewords, latents = even(0), normal(1, M, D)
    split = NamedSharding(workloads.mesh(), PartitionSpec("data"))
    output = compiled(codewords, jax.device_put(latents, split))
    np.testing.assert_array_equal(output.codes, compiled(codewords, latents).codes)
    if quantizer.pointwise:
        assert output.codes.sharding.is_equivalent_to(split, 2)
        assert output.quantized.sharding.is_equivalent_to(split, 2)
