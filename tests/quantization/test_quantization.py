"""Residual quantization: a brute-force reference, gradients, statistics, k-means, revival, sharding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import workloads
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding, PartitionSpec

from tarq_jax import quantization
from tarq_jax.types import Codebook, QuantizerOutput

SHAPES = [(1, 1, 3, (4,)), (1, 5, 1, (2, 3)), (2, 2, 3, (1,)), (3, 5, 2, ()), (3, 4, 3, (2, 1, 5))]
examples = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31 - 1)

# compiled once here: the library leaves that to its callers
kmeans = jax.jit(quantization.kmeans, static_argnames=("num_codewords", "iterations"))
kmeans_codebook = jax.jit(quantization.kmeans_codebook, static_argnames=("num_levels", "num_codewords"))
encode = jax.jit(quantization.encode)
revive = functools.partial(jax.jit(quantization.revive), min_usage=0.05)


@st.composite
def problems(draw):
    """Codewords [L, K, D] and latents [..., D] of small integers: exact in float32, rich in ties."""
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


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def quantized():
    """Codewords [3, 4, 5], latents [6, 5, 5] and what `encode` makes of them."""
    codewords, latents = normal(0, 3, 4, 5), normal(1, 6, 5, 5)
    return codewords, latents, encode(codewords, latents)


# Encode and decode


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


def test_negative_distances_up_to_a_constant_of_each_point():
    points, codewords = normal(0, 2, 4, 3), normal(1, 2, 5, 3)
    expected = -np.sum((points[:, :, None] - codewords[:, None]) ** 2, axis=-1)
    constant = np.sum(points**2, axis=-1, keepdims=True)
    actual = quantization.negative_distances(points, codewords) - constant
    np.testing.assert_allclose(actual, expected, rtol=1e-4)


@pytest.mark.parametrize("call", [
    lambda: quantization.encode(np.zeros((4, 5)), np.zeros((6, 5))),
    lambda: quantization.encode(np.zeros((3, 4, 5)), np.zeros((6, 1))),
    lambda: quantization.decode(np.zeros((3, 4, 5)), np.zeros((6, 2), int)),
    lambda: quantization.straight_through(np.zeros((6, 5)), np.zeros((1, 5))),
    lambda: quantization.with_codewords(np.zeros((4, 5))),
    lambda: quantization.kmeans(jax.random.key(0), np.zeros((2, 6, 5)), num_codewords=3),
])
def test_shapes_that_do_not_fit_are_refused(call):
    with pytest.raises(AssertionError):
        call()


# Gradients


def test_straight_through_value_and_gradient(quantized):
    codewords, latents, output = quantized
    passed = quantization.straight_through(latents, output.quantized)
    np.testing.assert_allclose(passed, output.quantized, rtol=1e-6, atol=1e-6)
    upstream = normal(2, *latents.shape)

    def value(codewords, latents):
        quantized = quantization.encode(codewords, latents).quantized
        return jnp.sum(upstream * quantization.straight_through(latents, quantized))

    to_codewords, to_latents = jax.jit(jax.grad(value, argnums=(0, 1)))(codewords, latents)
    np.testing.assert_array_equal(to_latents, upstream)
    np.testing.assert_array_equal(to_codewords, 0.0)


def test_gradient_of_quantized_counts_assignments(quantized):
    codewords, latents, output = quantized
    counts, _ = quantization.assignment_statistics(output, 4)
    used = np.broadcast_to(counts[..., None], codewords.shape)

    def sums(codewords):
        output = quantization.encode(codewords, latents)
        return output.quantized.sum(), output.residuals[..., -1, :].sum()

    of_quantized, of_residual = jax.jit(jax.jacrev(sums))(codewords)
    np.testing.assert_array_equal(of_quantized, used)
    np.testing.assert_array_equal(of_residual, np.where(np.arange(3)[:, None, None] < 2, -used, 0.0))


# Statistics


def test_assignment_statistics_closed_form(quantized):
    _, _, output = quantized
    codes, residuals = np.asarray(output.codes), np.asarray(output.residuals)
    mask = np.random.default_rng(3).random((6, 5)) < 0.6
    for where in (None, mask):
        counts, sums = quantization.assignment_statistics(output, 4, where)
        kept = np.ones((6, 5), bool) if where is None else where
        assert counts.shape == (3, 4) and sums.shape == (3, 4, 5)
        for level in range(3):
            for code in range(4):
                chose = kept & (codes[..., level] == code)
                assert counts[level, code] == chose.sum()
                np.testing.assert_allclose(
                    sums[level, code], residuals[chose, level].sum(axis=0), rtol=1e-5, atol=1e-5
                )


def test_assignment_statistics_add_up_over_splits(quantized):
    _, _, output = quantized
    mask = np.random.default_rng(4).random((6, 5)) < 0.6
    whole = quantization.assignment_statistics(output, 4, mask)
    parts = [
        quantization.assignment_statistics(jax.tree.map(lambda x, s=s: x[s], output), 4, mask[s])
        for s in (slice(0, 2), slice(2, 6))
    ]
    for total, first, second in zip(whole, *parts, strict=True):
        np.testing.assert_allclose(total, first + second, rtol=1e-5, atol=1e-5)


def test_statistics_refuse_a_mask_of_another_shape(quantized):
    codewords, _, output = quantized
    codebook = quantization.with_codewords(codewords)
    for mask in (np.ones(1, bool), np.ones(6, bool), np.ones(30, bool)):
        with pytest.raises(AssertionError):
            quantization.assignment_statistics(output, 4, mask)
        with pytest.raises(AssertionError):
            quantization.revive(jax.random.key(0), codebook, output.residuals, where=mask)
    with pytest.raises(AssertionError):
        quantization.revive(jax.random.key(0), codebook, np.swapaxes(output.residuals, -1, -2))


def ema_step(codebook, latents, where, sum_over_mesh=lambda statistics: statistics):
    """One EMA update from real latents."""
    output = quantization.encode(codebook.codewords, latents)
    statistics = quantization.assignment_statistics(output, codebook.counts.shape[-1], where)
    codebook = quantization.update_statistics(codebook, *sum_over_mesh(statistics), decay=0.8)
    return quantization.ema_codewords(codebook)


def test_sharded_statistics_equal_the_whole(quantized):
    """Replicas that see an eighth of the latents each arrive at the codebook of all latents."""
    codewords = quantized[0]
    latents, where = normal(5, 16, 5), np.random.default_rng(5).random(16) < 0.7
    codebook = quantization.with_codewords(codewords)
    expected = ema_step(codebook, latents, where)

    mesh, data, everywhere = workloads.mesh(), PartitionSpec("data"), PartitionSpec()
    psum = functools.partial(jax.lax.psum, axis_name="data")
    mapped = jax.shard_map(
        lambda *args: jax.tree.map(lambda x: x[None], ema_step(*args, sum_over_mesh=psum)),
        mesh=mesh, in_specs=(everywhere, data, data), out_specs=data,
    )
    replicas = jax.jit(mapped)(codebook, latents, where)
    sharded = jax.device_put((latents, where), NamedSharding(mesh, data))
    compiled = jax.jit(ema_step, out_shardings=NamedSharding(mesh, everywhere))(codebook, *sharded)
    for name in ("codewords", "counts", "sums"):
        one, copies = getattr(expected, name), np.asarray(getattr(replicas, name))
        np.testing.assert_array_equal(copies, np.broadcast_to(copies[:1], copies.shape))
        np.testing.assert_allclose(copies[0], one, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(getattr(compiled, name), one, rtol=1e-5, atol=1e-5)
        assert len(getattr(compiled, name).sharding.device_set) == workloads.DEVICES


# Running statistics


def test_random_codebook():
    codebook = quantization.random_codebook(
        jax.random.key(0), num_levels=2, num_codewords=64, width=32, scale=3.0
    )
    assert codebook.codewords.shape == codebook.sums.shape == (2, 64, 32)
    assert float(codebook.codewords.std()) == pytest.approx(3.0, rel=0.05)
    np.testing.assert_array_equal(codebook.counts, np.ones((2, 64)))
    np.testing.assert_allclose(quantization.ema_codewords(codebook).codewords, codebook.codewords, rtol=1e-5)
    assert not quantization.dead(codebook, min_usage=0.9).any()


def test_update_statistics_closed_form():
    codebook, step = workloads.make_codebook(0, 2, 3, 4), workloads.make_codebook(1, 2, 3, 4)
    updated = quantization.update_statistics(codebook, step.counts, step.sums, decay=0.75)
    np.testing.assert_array_equal(updated.codewords, codebook.codewords)
    np.testing.assert_allclose(updated.counts, 0.75 * codebook.counts + 0.25 * step.counts, rtol=1e-6)
    np.testing.assert_allclose(updated.sums, 0.75 * codebook.sums + 0.25 * step.sums, rtol=1e-5, atol=1e-6)
    with pytest.raises(AssertionError):
        quantization.update_statistics(codebook, step.counts[:1], step.sums, decay=0.75)
    with pytest.raises(AssertionError):
        quantization.update_statistics(codebook, step.counts, step.sums[:, :1], decay=0.75)


def test_ema_codewords_closed_form():
    codebook = workloads.make_codebook(0, 2, 3, 4)
    for smoothing in (1e-5, 0.5):
        updated = quantization.ema_codewords(codebook, smoothing=smoothing)
        for level in range(2):
            total = codebook.counts[level].sum()
            smoothed = (codebook.counts[level] + smoothing) / (total + 3 * smoothing) * total
            expected = codebook.sums[level] / smoothed[:, None]
            np.testing.assert_allclose(updated.codewords[level], expected, rtol=1e-5)
        np.testing.assert_array_equal(updated.counts, codebook.counts)
        np.testing.assert_array_equal(updated.sums, codebook.sums)


@pytest.mark.parametrize("counts", [[3.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
def test_never_used_codewords_stay_finite(counts):
    counts = np.array([counts], np.float32)
    sums = np.repeat(2.0 * counts[..., None], 2, axis=-1)
    codebook = Codebook(codewords=np.ones_like(sums), counts=counts, sums=sums)
    codewords = np.asarray(quantization.ema_codewords(codebook).codewords)
    expected = np.where(counts[..., None] > 0, 2.0, 0.0)
    np.testing.assert_allclose(codewords, np.broadcast_to(expected, codewords.shape), rtol=1e-4)


def test_ema_converges_to_cluster_means():
    centres = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]], np.float32)
    points = (centres[:, None] + 0.5 * normal(6, 3, 20, 2)).astype(np.float32)
    codebook = quantization.with_codewords((centres + normal(7, 3, 2))[None])
    where = np.arange(20) < np.array([20, 15, 5])[:, None]
    step = jax.jit(ema_step)
    for _ in range(80):
        codebook = step(codebook, points, where)
    means = np.stack([cluster[kept].mean(axis=0) for cluster, kept in zip(points, where, strict=True)])
    np.testing.assert_allclose(codebook.codewords[0], means, atol=1e-3)
    np.testing.assert_allclose(codebook.counts[0], where.sum(axis=1), rtol=1e-5)


# Revival


def test_dead_is_relative_to_an_even_share():
    counts = np.array([[10.0, 0.4, 0.6, 1.0], [0.1, 0.1, 0.1, 0.1]], np.float32)  # even shares 3 and 0.1
    codebook = workloads.make_codebook(0, 2, 4, 5).replace(counts=counts)
    expected = [[False, True, False, False], [False] * 4]
    np.testing.assert_array_equal(quantization.dead(codebook, min_usage=0.2), expected)


@pytest.fixture(scope="module")
def half_dead(quantized):
    """A codebook [3, 4, 5] of which some codewords are dead, residuals [6, 5, 3, 5], dead [3, 4]."""
    counts = np.full((3, 4), 5.0, np.float32)
    dead = np.array([[True, False, False, True], [False] * 4, [False, True, False, False]])
    codebook = workloads.make_codebook(8, 3, 4, 5).replace(counts=np.where(dead, np.float32(0.01), counts))
    return codebook, quantized[2].residuals, dead


@examples
@given(seeds)
def test_revive_moves_the_dead_onto_residuals_of_their_level(half_dead, seed):
    codebook, residuals, dead = half_dead
    where = np.random.default_rng(seed).random((6, 5)) < 0.2
    where[0, 0] = True
    revived = revive(jax.random.key(seed), codebook, residuals, where=where)
    for name in ("codewords", "counts", "sums"):
        np.testing.assert_array_equal(getattr(revived, name)[~dead], getattr(codebook, name)[~dead])
    for level, code in np.argwhere(dead):
        allowed = np.asarray(residuals)[where, level]
        assert (allowed == np.asarray(revived.codewords)[level, code]).all(axis=-1).any()
    even = codebook.counts.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(np.asarray(revived.counts)[dead], np.broadcast_to(even, dead.shape)[dead])
    assert not quantization.dead(revived, min_usage=0.05).any()
    means = quantization.ema_codewords(revived).codewords
    np.testing.assert_allclose(np.asarray(means)[dead], np.asarray(revived.codewords)[dead], rtol=1e-4)


def test_revive_draws_among_all_that_is_allowed(half_dead):
    codebook, residuals, dead = half_dead
    where = np.ones((6, 5), bool)
    drawn = [revive(jax.random.key(seed), codebook, residuals, where=where).codewords for seed in range(300)]
    level, code = np.argwhere(dead)[0]
    hits = np.stack(drawn)[:, level, code, None] == np.asarray(residuals)[..., level, :].reshape(-1, 5)
    share = hits.all(axis=-1).mean(axis=0)
    assert share.sum() == pytest.approx(1.0)
    assert share.min() > 0.0 and share.max() < 4 / 30
    first, second = np.stack(drawn)[:, 0, dead[0]].swapaxes(0, 1)
    assert (first == second).all(axis=-1).mean() < 4 / 30  # each codeword has a draw of its own


def test_revive_without_anything_allowed_changes_nothing(half_dead):
    codebook, residuals, _ = half_dead
    where = np.zeros((6, 5), bool)
    poisoned = np.full_like(residuals, np.nan)
    unchanged = revive(jax.random.key(0), codebook, poisoned, where=where)
    jax.tree.map(np.testing.assert_array_equal, unchanged, codebook)


def test_revive_respects_min_usage(half_dead):
    codebook, residuals, _ = half_dead
    where = np.ones((6, 5), bool)
    unchanged = revive(jax.random.key(0), codebook, residuals, where=where, min_usage=0.001)
    jax.tree.map(np.testing.assert_array_equal, unchanged, codebook)


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
    counts, sums = quantization.assignment_statistics(encode(codebook.codewords, latents), 16)
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
