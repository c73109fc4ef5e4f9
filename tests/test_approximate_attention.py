"""Attention that is not a softmax over the whole history: plain loops, closed forms, masks, gradients."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from draws import normal

from tarq_jax import approximate_attention as approximate

B, H, G, N, D, E = 3, 2, 4, 6, 5, 3
ROUNDS, BITS = 7, 2


MASK = np.array([[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 1, 0]], bool)
HEADS = normal(0, B, H, G, E), normal(1, B, H, N, E), normal(2, B, H, N, E)  # queries, keys, values
VECTORS = normal(3, B, G, D), normal(4, B, N, D)  # vectors to hash
PLANES = approximate.hash_planes(D, ROUNDS, BITS)
UNIT = normal(5, 4 * E)


def unit(pairs):
    """An activation unit without hidden layers: its weights are linear in the four parts of its input."""
    return pairs @ UNIT


def by_unit(queries, keys, values, mask):
    """Uses the first head's queries and keys for all heads."""
    return approximate.activation_unit_attention(queries[:, 0], keys[:, 0], values, mask, unit)


def by_hash(queries, keys, values, mask):
    return approximate.collision_attention(queries[:, 0], keys[:, 0], values, mask, PLANES[:E])


def by_search(queries, keys, values, mask):
    similarity = approximate.hash_similarity(queries[:, 0], keys[:, 0], PLANES[:E])
    return approximate.searched_attention(queries, keys, values, approximate.select(similarity, mask, 2))


ATTENTIONS = {
    "linear": approximate.linear_attention,
    "collisions": by_hash,
    "search": by_search,
    "unit": by_unit,
}


@pytest.fixture(scope="module", params=ATTENTIONS)
def attention(request):
    """The attention, and a function for its output and the gradients of its inputs, compiled once."""
    attend = ATTENTIONS[request.param]

    @jax.jit
    def both(queries, keys, values, mask):
        def loss(*arrays):
            output = attend(*arrays, mask)
            return jnp.sum(output**2), output

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(queries, keys, values)

    return request.param, attend, both


# What all of them have in common


def test_shape_and_empty_history(attention):
    _, _, both = attention
    gradients, output = both(*HEADS, MASK)
    assert output.shape == (B, H, G, E) and output.dtype == np.float32
    assert not output[1].any() and np.abs(output).max() > 0.1
    for gradient in gradients:
        assert np.isfinite(gradient).all() and not gradient[1].any()
    assert gradients[2].any()


@pytest.mark.parametrize("size", [1e3, 1e15])
def test_masked_positions_do_not_show(attention, size):
    """Finite values of any size at masked positions change neither the output nor a gradient."""
    _, _, both = attention
    masked, sign = ~MASK[:, None, :, None], np.sign(normal(6, B, H, N, E))
    queries, keys, values = HEADS
    keys, values = np.where(masked, size * sign, keys), np.where(masked, -size * sign, values)
    poisoned = both(queries, keys, values, MASK)
    for found, expected in zip(jax.tree.leaves(poisoned), jax.tree.leaves(both(*HEADS, MASK)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_positions_come_in_any_order_and_number(attention):
    """It equals attention over only the real positions; in bfloat16 it is close."""
    _, attend, both = attention
    real = MASK[2]
    queries, keys, values = (array[2:] for array in HEADS)
    expected = attend(queries, keys[:, :, real], values[:, :, real], np.ones((1, real.sum()), bool))
    np.testing.assert_allclose(both(*HEADS, MASK)[1][2:], expected, rtol=1e-5, atol=1e-6)
    half = attend(*(jnp.asarray(array, jnp.bfloat16) for array in HEADS), MASK)
    assert half.dtype == jnp.bfloat16


@pytest.mark.parametrize("wrong", [
    (HEADS[0], HEADS[1], HEADS[2][:, :, 1:], MASK),
    (HEADS[0], HEADS[1], HEADS[2], MASK[:, 1:]),
    (HEADS[0], HEADS[1], HEADS[2], MASK[:1]),
    (HEADS[0][:1], HEADS[1], HEADS[2], MASK),
    (HEADS[0][..., 1:], HEADS[1], HEADS[2], MASK),
])
def test_shapes_that_do_not_fit(attention, wrong):
    with pytest.raises(AssertionError):
        jax.eval_shape(attention[1], *wrong)


# Linear attention


def test_linear_attention_equals_a_plain_loop():
    queries, keys, values = (array.astype(np.float64) for array in HEADS)

    def positive(x):
        return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))

    expected = np.zeros((B, H, G, E))
    for b, h, g in np.ndindex(B, H, G):
        weights = [positive(queries[b, h, g]) @ positive(keys[b, h, n]) for n in range(N) if MASK[b, n]]
        if weights:
            expected[b, h, g] = weights @ values[b, h, MASK[b]] / np.sum(weights)
    found = approximate.linear_attention(*HEADS, MASK)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [-1e4, 1e4])
def test_linear_attention_of_extreme_inputs(size):
    """Features that underflow to zero give no gradient that is not finite."""
    queries, keys, values = HEADS
    gradients = jax.grad(lambda *arrays: approximate.linear_attention(*arrays, MASK).sum(), argnums=(0, 1, 2))
    for gradient in gradients(queries + size, keys + size, values):
        assert np.isfinite(gradient).all()


# Hashes and collisions


def angles(queries, keys):
    """Angles between every candidate and every position, [B, G, N]."""
    products = np.einsum("bgd,bnd->bgn", queries, keys)
    lengths = np.linalg.norm(queries, axis=-1)[:, :, None] * np.linalg.norm(keys, axis=-1)[:, None]
    return np.arccos(products / lengths)


def test_planes_come_from_their_seed():
    assert PLANES.shape == (D, ROUNDS, BITS)
    np.testing.assert_array_equal(PLANES, approximate.hash_planes(D, ROUNDS, BITS))
    assert not np.array_equal(PLANES, approximate.hash_planes(D, ROUNDS, BITS, seed=1))


@hypothesis.given(st.floats(1e-3, 1e3), st.integers(0, 100))
@hypothesis.settings(max_examples=20, deadline=None)
def test_signatures_know_directions_alone(scale, seed):
    vectors = normal(seed, 4, D)
    signature = np.asarray(approximate.signatures(vectors, PLANES))
    np.testing.assert_array_equal(approximate.signatures(np.float32(scale) * vectors, PLANES), signature)
    np.testing.assert_array_equal(approximate.signatures(-vectors, PLANES), ~signature)


def test_collision_attention_equals_a_plain_loop():
    queries, keys = VECTORS
    values = HEADS[2]
    candidate, position = (np.asarray(approximate.signatures(x, PLANES)) for x in VECTORS)
    expected = np.zeros((B, H, G, E))
    for b, g in np.ndindex(B, G):
        collisions = np.all(candidate[b, g] == position[b], axis=-1).sum(axis=-1) * MASK[b]
        expected[b, :, g] = collisions @ values[b] / max(collisions.sum(), 1)
    found = approximate.collision_attention(queries, keys, values, MASK, PLANES)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_collision_attention_converges_to_its_expectation():
    """The weights are `(1 - angle / pi)^T`; the error falls with the square root of the number of rounds."""
    weights = (1 - angles(*VECTORS) / np.pi) ** BITS * MASK[:, None]
    totals = np.maximum(weights.sum(axis=-1), 1e-9)[:, None, :, None]
    expected = np.einsum("bgn,bhne->bhge", weights, HEADS[2]) / totals
    errors = []
    for rounds in (20, 5000):
        planes = approximate.hash_planes(D, rounds, BITS)
        found = approximate.collision_attention(*VECTORS, HEADS[2], MASK, planes)
        errors.append(np.sqrt(np.mean(np.square(found - expected))))
    assert errors[1] < 0.02 and errors[1] < errors[0] / 5


def test_hash_similarity_is_bits_less_the_hamming_distance():
    candidate, position = (np.asarray(approximate.signatures(x, PLANES)).reshape(B, -1, ROUNDS * BITS)
                           for x in VECTORS)
    expected = (candidate[:, :, None] == position[:, None]).sum(axis=-1)
    found = np.asarray(approximate.hash_similarity(*VECTORS, PLANES))
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected)
    many = approximate.hash_similarity(*VECTORS, approximate.hash_planes(D, 5000, BITS)) / (5000 * BITS)
    np.testing.assert_allclose(many, 1 - angles(*VECTORS) / np.pi, atol=0.03)


@pytest.mark.parametrize(("function", "shapes"), [
    (approximate.signatures, [(B, D), (D + 1, ROUNDS, BITS)]),
    (approximate.signatures, [(B, D), (D, ROUNDS)]),
    (approximate.hash_similarity, [(1, G, D), (B, N, D), (D, ROUNDS, BITS)]),
    (approximate.hash_similarity, [(B, G, D), (B, N, D - 1), (D, ROUNDS, BITS)]),
    (approximate.category_similarity, [(1, G), (B, N)]),
    (approximate.category_similarity, [(B, G, 1), (B, N)]),
])
def test_comparisons_refuse_other_shapes(function, shapes):
    with pytest.raises(AssertionError):
        jax.eval_shape(function, *map(np.ones, shapes))


# Search


@hypothesis.given(st.integers(0, 2**32 - 1), st.integers(1, N + 2))
@hypothesis.settings(max_examples=30, deadline=None)
def test_selected_are_the_most_similar_and_of_equals_the_newest(seed, num_selected):
    rng = np.random.default_rng(seed)
    similarity, mask = rng.integers(-1, 4, (B, G, N)), rng.random((B, N)) < 0.7
    selected = approximate.select(similarity, mask, num_selected)
    for b, g in np.ndindex(B, G):
        eligible = [n for n in range(N) if mask[b, n] and similarity[b, g, n] >= 0]
        best = sorted(eligible, key=lambda n, b=b, g=g: (similarity[b, g, n], n))[-num_selected:]
        assert np.flatnonzero(selected[b, g]).tolist() == sorted(best)


@pytest.mark.parametrize("positions", [0, N])
def test_nothing_is_selected_of_nothing(positions):
    similarity, mask = jnp.zeros((B, G, positions), int), jnp.ones((B, positions), bool)
    selected = approximate.select(similarity, mask, 2 if positions == 0 else 0)
    assert selected.shape == (B, G, positions) and not selected.any()


def test_similar_positions_are_told_apart_up_to_2_to_the_24():
    similarity = 2**24 - np.array([[[2, 1, 2, 1, 2, 3]]])
    selected = [np.flatnonzero(approximate.select(similarity, MASK[:1], size)) for size in (1, 2, 3, 5)]
    assert [found.tolist() for found in selected] == [[3], [1, 3], [1, 3, 4], [0, 1, 2, 3, 4]]


def test_nothing_is_sorted_to_select():
    """On CPU, XLA has a top-k for floats that takes a tenth of the time of its sort of integers."""
    shapes = jax.ShapeDtypeStruct((B, G, 100), jnp.int32), jax.ShapeDtypeStruct((B, 100), bool)
    compiled = jax.jit(approximate.select, static_argnums=2).lower(*shapes, 16).compile().as_text()
    assert "TopK" in compiled and "sort(" not in compiled


@pytest.mark.parametrize("num_selected", [N, N + 3])
def test_search_of_all_positions_is_full_attention(num_selected):
    selected = approximate.select(approximate.hash_similarity(*VECTORS, PLANES), MASK, num_selected)
    found = approximate.searched_attention(*HEADS, selected)
    np.testing.assert_allclose(found, reference.attention(*HEADS, MASK), rtol=1e-4, atol=1e-5)


def test_search_by_category_attends_within_it():
    queries, keys, values = HEADS
    candidates = np.array([[1, 2, 9, 0]] * B)
    history = np.array([[1, 2, 1, 2, 1, 0]] * B)
    selected = approximate.select(approximate.category_similarity(candidates, history), MASK, 2)
    found = np.asarray(approximate.searched_attention(*HEADS, selected))
    np.testing.assert_array_equal(np.flatnonzero(selected[0, 0]), [2, 4])
    np.testing.assert_array_equal(np.flatnonzero(selected[2, 1]), [1])
    assert not selected[:, 2:].any() and not found[:, :, 2:].any()  # a category that no event has, and none
    mask = np.isin(np.arange(N), [2, 4])[None]
    expected = reference.attention(queries[:1, :, :1], keys[:1], values[:1], mask)
    np.testing.assert_allclose(found[:1, :, :1], expected, rtol=1e-4, atol=1e-5)


# The activation unit


def test_activation_unit_by_hand():
    """Two positions: the weights are sums of the unit's inputs, and are not normalised."""
    query, keys, values = (np.array(rows, np.float32)[None] for rows in (
        [[2, 1]], [[1, 3], [0, 5]], [[1, 10], [2, 20]]))
    seen = []

    def sums(pairs):
        seen.append(pairs)
        return pairs.sum(axis=-1)

    mask = np.ones((1, 2), bool)
    found = approximate.activation_unit_attention(query, keys, values[:, None], mask, sums)
    np.testing.assert_array_equal(seen[0][0, 0], [
        [2, 1, 1, 3, 2, 3, 1, -2], [2, 1, 0, 5, 0, 5, 2, -4]])
    np.testing.assert_allclose(found, [[[[11 * 1 + 11 * 2, 11 * 10 + 11 * 20]]]])


def test_activation_unit_adds_up_over_positions():
    alone = [by_unit(*HEADS, MASK & (np.arange(N) == n)) for n in range(N)]
    np.testing.assert_allclose(by_unit(*HEADS, MASK), sum(alone), rtol=1e-4, atol=1e-5)
