"""Dead codewords and their revival, also over a mesh."""

import itertools

import jax
import numpy as np
import pytest
import workloads
from draws import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from tarq_jax import quantization

examples = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31 - 1)
NONE_DEAD = np.zeros((3, 4), bool)
NAMES = ("codewords", "counts", "sums", "ages")

encode = jax.jit(quantization.encode)  # compiled once here, as the library leaves that to its callers
revive = jax.jit(quantization.revive)


# Which codewords are dead


def test_dead_by_count_is_relative_to_an_even_share():
    counts = np.array([[10.0, 0.4, 0.6, 1.0], [0.1, 0.1, 0.1, 0.1]], np.float32)  # even shares 3 and 0.1
    codebook = workloads.make_codebook(0, 2, 4, 5).replace(counts=counts)
    expected = [[False, True, False, False], [False] * 4]
    np.testing.assert_array_equal(quantization.dead_by_count(codebook, min_usage=0.2), expected)


def test_dead_by_age_is_above_the_age():
    ages = np.array([[0.0, 2.0, 3.0, 1.0]], np.float32)
    codebook = workloads.make_codebook(0, 1, 4, 5).replace(ages=ages)
    np.testing.assert_array_equal(
        quantization.dead_by_age(codebook, max_age=2), [[False, False, True, False]])
    assert not quantization.dead_by_age(codebook, max_age=3).any()


# Revival


@pytest.fixture(scope="module")
def half_dead():
    """A codebook [3, 4, 5] with some dead codewords, residuals [6, 5, 3, 5], dead [3, 4]."""
    dead = np.array([[True, False, False, True], [False] * 4, [False, True, False, False]])
    counts = np.where(dead, 0.01, 5.0).astype(np.float32)
    residuals = encode(normal(0, 3, 4, 5), normal(1, 6, 5, 5)).residuals
    return workloads.make_codebook(8, 3, 4, 5).replace(counts=counts), np.asarray(residuals), dead


@examples
@given(seeds)
def test_revive_moves_the_dead_onto_residuals_of_their_level(half_dead, seed):
    codebook, residuals, dead = half_dead
    where = np.random.default_rng(seed).random((6, 5)) < 0.2
    where[:2, 0] = True
    revived = revive(jax.random.key(seed), codebook, residuals, dead, where=where)
    for name in NAMES:
        np.testing.assert_array_equal(getattr(revived, name)[~dead], getattr(codebook, name)[~dead])
    for level, code in np.argwhere(dead):
        allowed = residuals[where, level]
        assert (allowed == np.asarray(revived.codewords)[level, code]).all(axis=-1).any()
    even = np.broadcast_to(codebook.counts.mean(axis=1, keepdims=True), dead.shape)
    np.testing.assert_allclose(np.asarray(revived.counts)[dead], even[dead], rtol=1e-6)
    assert not np.asarray(revived.ages)[dead].any()
    assert not quantization.dead_by_count(revived, min_usage=0.05).any()
    means = quantization.ema_codewords(revived).codewords
    np.testing.assert_allclose(np.asarray(means)[dead], np.asarray(revived.codewords)[dead], rtol=1e-4)


def test_revive_draws_by_squared_distance_one_after_the_other(half_dead):
    """The first draw uses distances to the living codewords, the second also those to the first draw."""
    codebook, residuals, dead = half_dead
    points, living = residuals[..., 0, :].reshape(-1, 5), np.asarray(codebook.codewords)[0, ~dead[0]]
    draw = jax.jit(jax.vmap(lambda key: quantization.revive(key, codebook, residuals, dead).codewords))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))[:, 0, dead[0]]  # [4000, 2, D]
    hits = (drawn[:, :, None] == points).all(axis=-1)  # [4000, 2, 30]
    assert (hits.sum(axis=-1) == 1).all() and hits.sum(axis=1).max() == 1
    before = np.sum((points[:, None] - living) ** 2, axis=-1).min(axis=-1)
    first = before / before.sum()
    after = np.minimum(before, np.sum((points[:, None] - points) ** 2, axis=-1))  # [drawn first, M]
    second = first @ (after / after.sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(hits.mean(axis=0), [first, second], atol=0.02)


def test_every_level_draws_by_itself(half_dead):
    """Also where codewords, residuals and what is dead are the same at all levels."""
    codebook, dead = jax.tree.map(lambda leaf: np.stack([leaf[0]] * 3), (half_dead[0], half_dead[2]))
    residuals = np.stack([half_dead[1][..., 0, :]] * 3, axis=-2)
    drawn = [revive(jax.random.key(seed), codebook, residuals, dead).codewords for seed in range(5)]
    for one, other in itertools.combinations(range(3), 2):
        assert any((codewords[one] != codewords[other]).any() for codewords in drawn)


def test_revive_puts_no_two_codewords_on_the_same_spot(half_dead):
    """Latents repeat within a batch: with 2 distinct latents, only 2 of 4 dead codewords are revived."""
    codebook, residuals, _ = half_dead
    repeated = np.tile(residuals[0, :2], (8, 1, 1))
    revived = revive(jax.random.key(0), codebook, repeated, np.ones((3, 4), bool))
    moved = (np.asarray(revived.codewords) != codebook.codewords).any(axis=-1)
    np.testing.assert_array_equal(moved, [[True, True, False, False]] * 3)
    assert all(len(np.unique(level[:2], axis=0)) == 2 for level in np.asarray(revived.codewords))


def test_revive_draws_nothing_that_a_codeword_stands_on(half_dead):
    codebook, _, dead = half_dead
    standing = np.asarray(codebook.codewords)[:, 2]  # alive at every level
    revived = revive(jax.random.key(0), codebook, np.tile(standing, (8, 1, 1)), dead)
    jax.tree.map(np.testing.assert_array_equal, revived, codebook)


def test_revive_leaves_codewords_for_which_nothing_is_left(half_dead):
    codebook, residuals, _ = half_dead
    dead, where = np.ones((3, 4), bool), np.zeros((6, 5), bool)
    where[2, 1] = where[4, 4] = True
    revived = revive(jax.random.key(0), codebook, residuals, dead, where=where)
    moved = (np.asarray(revived.codewords) != codebook.codewords).any(axis=-1)
    np.testing.assert_array_equal(moved, [[True, True, False, False]] * 3)
    np.testing.assert_array_equal(np.asarray(revived.counts)[~moved], codebook.counts[~moved])


def test_revive_without_anything_allowed_changes_nothing(half_dead):
    codebook, residuals, _ = half_dead
    where = np.zeros((6, 5), bool)
    poisoned = np.full_like(residuals, np.nan)
    unchanged = revive(jax.random.key(0), codebook, poisoned, half_dead[2], where=where)
    jax.tree.map(np.testing.assert_array_equal, unchanged, codebook)


def test_revive_without_residuals_changes_nothing(half_dead):
    codebook, residuals, dead = half_dead
    unchanged = revive(jax.random.key(0), codebook, residuals[:0], dead)
    jax.tree.map(np.testing.assert_array_equal, unchanged, codebook)


def test_revive_ignores_what_is_not_allowed(half_dead):
    codebook, residuals, dead = half_dead
    where = np.random.default_rng(0).random((6, 5)) < 0.5
    poisoned = np.where(where[..., None, None], residuals, np.nan)
    expected = revive(jax.random.key(0), codebook, residuals, dead, where=where)
    found = revive(jax.random.key(0), codebook, poisoned, dead, where=where)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_revive_never_draws_what_is_not_finite(half_dead, value):
    codebook, residuals, dead = half_dead
    where = np.arange(30).reshape(6, 5) != 7
    poisoned = residuals.copy()
    poisoned[1, 2, :, 3] = value
    expected = revive(jax.random.key(0), codebook, residuals, dead, where=where)
    jax.tree.map(np.testing.assert_array_equal, revive(jax.random.key(0), codebook, poisoned, dead), expected)


def test_revive_without_dead_changes_nothing(half_dead):
    codebook, residuals, _ = half_dead
    unchanged = revive(jax.random.key(0), codebook, residuals, NONE_DEAD, where=np.ones((6, 5), bool))
    jax.tree.map(np.testing.assert_array_equal, unchanged, codebook)


@pytest.fixture(scope="module")
def on_the_mesh(half_dead):
    """Residuals [32, 3, 5] to be split over the mesh, a mask for them, and one device's revived codebook."""
    codebook, residuals, dead = half_dead
    residuals = np.concatenate([residuals.reshape(30, 3, 5), normal(2, 2, 3, 5)])
    where = np.random.default_rng(1).random(32) < 0.7
    return residuals, where, revive(jax.random.key(3), codebook, residuals, dead, where=where)


def same_on_every_device(found, expected):
    for name in NAMES:
        copies = [np.asarray(shard.data) for shard in getattr(found, name).addressable_shards]
        assert len(copies) == workloads.DEVICES and all((copy == copies[0]).all() for copy in copies)
        np.testing.assert_allclose(
            copies[0].reshape(getattr(expected, name).shape), getattr(expected, name), rtol=1e-5)


def test_revive_under_jit_gives_the_same_on_every_device(half_dead, on_the_mesh):
    codebook, _, dead = half_dead
    residuals, where, expected = on_the_mesh
    mesh = workloads.mesh()
    split = jax.device_put((residuals, where), NamedSharding(mesh, PartitionSpec("data")))
    compiled = jax.jit(quantization.revive, out_shardings=NamedSharding(mesh, PartitionSpec()))
    same_on_every_device(compiled(jax.random.key(3), codebook, split[0], dead, where=split[1]), expected)


def test_revive_under_shard_map_gives_the_same_on_every_device(half_dead, on_the_mesh):
    codebook, _, dead = half_dead
    residuals, where, expected = on_the_mesh

    def of_a_shard(residuals, where):
        gathered = jax.lax.all_gather((residuals, where), "data", tiled=True)
        revived = quantization.revive(jax.random.key(3), codebook, gathered[0], dead, where=gathered[1])
        return jax.tree.map(lambda leaf: leaf[None], revived)

    data = PartitionSpec("data")
    mapped = jax.shard_map(of_a_shard, mesh=workloads.mesh(), in_specs=(data, data), out_specs=data)
    same_on_every_device(jax.jit(mapped)(residuals, where), expected)


def test_uneven_levels_revive_each_by_itself(half_dead):
    """A level of another size does not change the revival of the other levels."""
    codebook, residuals, dead = half_dead
    uneven = jax.tree.map(lambda leaf: (leaf[0], leaf[1][:3], leaf[2]), codebook)
    found = revive(jax.random.key(0), uneven, residuals, (dead[0], dead[1][:3], dead[2]))
    expected = revive(jax.random.key(0), codebook, residuals, dead)
    for name in NAMES:
        leaves = getattr(found, name)
        assert [len(leaf) for leaf in leaves] == [4, 3, 4]
        for index in (0, 2):
            np.testing.assert_allclose(leaves[index], getattr(expected, name)[index], rtol=1e-6)


@pytest.mark.parametrize("change", [
    {"residuals": np.zeros((6, 5, 5, 3))}, {"residuals": np.zeros((6, 5, 2, 5))}, {"dead": NONE_DEAD[:2]},
    {"dead": NONE_DEAD[:, :1]}, {"where": np.ones(1, bool)}, {"where": np.ones(30, bool)},
])
def test_shapes_that_do_not_fit_are_refused(half_dead, change):
    arguments = {"residuals": half_dead[1], "dead": NONE_DEAD, "where": None} | change
    with pytest.raises(AssertionError):
        quantization.revive(jax.random.key(0), half_dead[0], **arguments)
