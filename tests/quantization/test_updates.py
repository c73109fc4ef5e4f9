"""Updates of codebooks: statistics and EMA, also over a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import workloads
from draws import normal
from jax.sharding import NamedSharding, PartitionSpec

from tarq_jax import quantization
from tarq_jax.types import Codebook

# Statistics


def test_assignment_statistics_closed_form(quantized):
    codewords, _, output = quantized
    codes, residuals = np.asarray(output.codes), np.asarray(output.residuals)
    mask = np.random.default_rng(3).random((6, 5)) < 0.6
    for where in (None, mask):
        counts, sums = quantization.assignment_statistics(output, codewords, where)
        kept = np.ones((6, 5), bool) if where is None else where
        assert counts.shape == (3, 4) and sums.shape == (3, 4, 5)
        for level in range(3):
            for code in range(4):
                chose = kept & (codes[..., level] == code)
                assert counts[level, code] == chose.sum()
                np.testing.assert_allclose(
                    sums[level, code], residuals[chose, level].sum(axis=0), rtol=1e-5, atol=1e-5
                )


def test_statistics_of_bfloat16_are_exact():
    """1000 latents: bfloat16 has no whole numbers between 256 and 258."""
    codewords = jnp.array([[[0.0], [4.0]]], jnp.bfloat16)
    latents = jnp.where(jnp.arange(1000) < 301, 1.0, 5.0)[:, None].astype(jnp.bfloat16)
    counts, sums = quantization.assignment_statistics(quantization.encode(codewords, latents), codewords)
    assert counts.dtype == sums.dtype == jnp.float32
    np.testing.assert_array_equal(counts, [[301.0, 699.0]])
    np.testing.assert_array_equal(sums, [[[301.0], [3495.0]]])


def test_assignment_statistics_add_up_over_splits(quantized):
    codewords, _, output = quantized
    mask = np.random.default_rng(4).random((6, 5)) < 0.6
    whole = quantization.assignment_statistics(output, codewords, mask)
    parts = [
        quantization.assignment_statistics(jax.tree.map(lambda x, s=s: x[s], output), codewords, mask[s])
        for s in (slice(0, 2), slice(2, 6))
    ]
    for total, first, second in zip(whole, *parts, strict=True):
        np.testing.assert_allclose(total, first + second, rtol=1e-5, atol=1e-5)


def test_statistics_refuse_a_mask_of_another_shape(quantized):
    codewords, _, output = quantized
    for mask in (np.ones(1, bool), np.ones(6, bool), np.ones(30, bool)):
        with pytest.raises(AssertionError):
            quantization.assignment_statistics(output, codewords, mask)
    with pytest.raises(AssertionError):
        quantization.assignment_statistics(output, codewords[:2])


def test_statistics_ignore_what_is_not_counted(quantized):
    codewords, _, output = quantized
    mask = np.random.default_rng(6).random((6, 5)) < 0.5
    poisoned = output.replace(residuals=np.where(mask[..., None, None], output.residuals, np.nan))
    expected = quantization.assignment_statistics(output, codewords, mask)
    found = quantization.assignment_statistics(poisoned, codewords, mask)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def ema_step(codebook, latents, where, sum_over_mesh=lambda statistics: statistics):
    """One EMA update with real latents."""
    output = quantization.encode(codebook.codewords, latents)
    statistics = quantization.assignment_statistics(output, codebook.codewords, where)
    codebook = quantization.update_statistics(codebook, *sum_over_mesh(statistics), decay=0.8)
    return quantization.ema_codewords(codebook)


def test_sharded_statistics_equal_the_whole(quantized):
    """Replicas that each see an eighth of the latents arrive at the same codebook as with all latents."""
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
    for name in ("codewords", "counts", "sums", "ages"):
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
    assert (codebook.codewords[0] != codebook.codewords[1]).all()
    np.testing.assert_array_equal(codebook.counts, np.ones((2, 64)))
    np.testing.assert_allclose(quantization.ema_codewords(codebook).codewords, codebook.codewords, rtol=1e-5)
    assert not quantization.dead_by_count(codebook, min_usage=0.9).any()


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
    codebook = Codebook(codewords=np.ones_like(sums), counts=counts, sums=sums, ages=0.0 * counts)
    codewords = np.asarray(quantization.ema_codewords(codebook).codewords)
    expected = np.where(counts[..., None] > 0, 2.0, 0.0)
    np.testing.assert_allclose(codewords, np.broadcast_to(expected, codewords.shape), rtol=1e-4)


@pytest.mark.parametrize("sequence", [np.stack, tuple])
def test_without_smoothing_a_level_without_counts_keeps_its_codewords(sequence):
    counts, sums = np.float32([[0.0, 0.0], [3.0, 0.0]]), np.float32([[[0.0], [0.0]], [[6.0], [0.0]]])
    codebook = Codebook(codewords=sequence(np.full_like(sums, 7.0)), counts=sequence(counts),
                        sums=sequence(sums), ages=sequence(0.0 * counts))
    codewords = quantization.ema_codewords(codebook, smoothing=0).codewords
    np.testing.assert_array_equal(np.stack(codewords), [[[7.0], [7.0]], [[2.0], [0.0]]])


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


# Ages


def test_ages_count_steps_without_use(quantized):
    codewords = quantized[0]
    codebook = quantization.with_codewords(codewords)
    assert not np.any(codebook.ages)
    used = np.array([[1, 0, 0, 0], [0, 2, 0, 0], [1, 1, 1, 1]], np.float32)
    for _ in range(3):
        codebook = quantization.update_statistics(codebook, used, np.zeros_like(codewords), decay=0.9)
    np.testing.assert_array_equal(codebook.ages, np.where(used > 0, 0.0, 3.0))
    others = np.float32(used == 0)
    codebook = quantization.update_statistics(codebook, others, np.zeros_like(codewords), decay=0.9)
    np.testing.assert_array_equal(codebook.ages, np.float32(used > 0))


# Levels that differ in size


@pytest.mark.parametrize("sequence", [list, tuple])
def test_uneven_levels_equal_even_ones(quantized, sequence):
    """With codewords given level by level, every update gives the same values, level by level."""
    codewords, _, output = quantized
    results = []
    for levels in (codewords, sequence(codewords)):
        codebook = quantization.with_codewords(levels)
        counts, sums = quantization.assignment_statistics(output, levels)
        codebook = quantization.update_statistics(codebook, counts, sums, decay=0.5)
        codebook = quantization.ema_codewords(codebook)
        dead = quantization.dead_by_count(codebook, min_usage=0.9)
        results.append(quantization.revive(jax.random.key(0), codebook, output.residuals, dead))
    even, uneven = results
    for name in ("codewords", "counts", "sums", "ages"):
        assert isinstance(getattr(uneven, name), tuple)
        np.testing.assert_array_equal(np.stack(getattr(uneven, name)), getattr(even, name))


def test_random_levels_of_given_sizes():
    codebook = quantization.random_codebook(jax.random.key(0), num_levels=3, num_codewords=(4, 2, 7), width=5)
    assert [level.shape for level in codebook.codewords] == [(4, 5), (2, 5), (7, 5)]
    assert [level.shape for level in codebook.ages] == [(4,), (2,), (7,)]
    with pytest.raises(ValueError, match=r"num_codewords is \(4, 2\), expected .* 3 levels"):
        quantization.random_codebook(jax.random.key(0), num_levels=3, num_codewords=(4, 2), width=5)
