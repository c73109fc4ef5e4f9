"""Attention in blocks equals attention without blocks, with all derivatives, in bounded memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from draws import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export

from tarq_jax import attention, expansion, quantization
from tarq_jax.blockwise import best_block

close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)
LONG, BLOCK, MEGABYTE = 10_000, 256, 2**20


def make_inputs(queries=11, positions=23, seed=0):
    """Queries [3, 2, Q, 4], keys and values [3, 2, N, 4], a mask [3, N] with an empty and a full history."""
    mask = np.random.default_rng(seed).random((3, positions)) < 0.5
    mask[1], mask[2] = False, True
    keys, values = normal(seed + 1, 3, 2, positions, 4), normal(seed + 2, 3, 2, positions, 4)
    return normal(seed + 3, 3, 2, queries, 4), keys, values, mask


def attend(block):
    return jax.jit(functools.partial(attention.multi_head_attention, block=block))


# Values


@settings(max_examples=8, deadline=None)
@given(queries=st.integers(1, 9), positions=st.integers(1, 13), block=st.integers(1, 14))
def test_equals_naive_attention_for_odd_sizes(queries, positions, block):
    inputs = make_inputs(queries, positions, seed=queries + positions)
    found = attend(block)(*inputs)
    close(found, reference.attention(*inputs))
    assert not np.any(found[1])


def test_histories_no_longer_than_a_block_give_the_same_bits():
    inputs = make_inputs()
    np.testing.assert_array_equal(attend(23)(*inputs), attend(0)(*inputs))


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_extreme_logits(scale):
    queries, keys, values, mask = make_inputs()
    extreme = queries * scale, keys * scale, values, mask
    close(attend(5)(*extreme), attend(0)(*extreme), atol=1e-3)


@pytest.mark.parametrize("size", [1e3, 3e38])
def test_masked_positions_do_not_leak(size):
    queries, keys, values, mask = make_inputs()
    masked = ~mask[:, None, :, None]
    poisoned = queries, np.where(masked, size, keys), np.where(masked, -size, values), mask
    np.testing.assert_array_equal(attend(5)(*poisoned), attend(5)(queries, keys, values, mask))


def test_a_codebook_attends_in_blocks():
    queries, (_, _, _, mask) = normal(0, 2, 2, 9, 4), make_inputs()
    keys, values = normal(1, 3, 2, 2, 23, 4), normal(2, 3, 2, 2, 23, 4)
    plain, blocks = (jax.jit(functools.partial(attention.personalized_codebook, block=block))(
        queries, keys, values, mask) for block in (0, 5))
    close(blocks, plain)


def test_an_expansion_in_blocks():
    codewords, (_, *history) = normal(0, 2, 9, 4), make_inputs()
    plain, blocks = (jax.jit(functools.partial(expansion.expand, block=block))(codewords, *history)
                     for block in (0, 5))
    jax.tree.map(close, blocks, plain)
    assert not np.any(blocks.jacobians[1])


@pytest.mark.parametrize("block", [0, 5])
def test_a_history_without_positions_gives_zero(block):
    queries, keys, values, mask = make_inputs(positions=0)

    def attend(queries, keys, values):
        return attention.multi_head_attention(queries, keys, values, mask, block=block)

    found, pull = jax.vjp(attend, queries, keys, values)
    assert found.shape == queries.shape and not np.any(found) and not np.any(pull(found + 1.0)[0])
    expanded = expansion.expand(queries[0], keys, values, mask, block=block)
    assert expanded.means.shape == queries.shape and not any(map(np.any, jax.tree.leaves(expanded)))


def test_negative_blocks_are_refused():
    with pytest.raises(ValueError, match="block: expected an integer >= 0, got -5"):
        attention.multi_head_attention(*make_inputs(), block=-5)


@pytest.mark.parametrize("options", [{"block": 0}, {"block": 5}, {"implementation": "pallas"}])
def test_queries_of_another_width_are_refused(options):
    queries, *history = make_inputs()
    with pytest.raises(AssertionError):
        attention.multi_head_attention(queries[..., 1:], *history, **options)


# Derivatives


def derivatives(block, *inputs):
    """Gradients of attention, of its changes along residuals, and of an expansion, for all inputs."""
    *arrays, mask = inputs

    def loss(queries, keys, values, residuals):
        def attend(queries):
            return attention.multi_head_attention(queries, keys, values, mask, block=block)

        value, changes = expansion.first_order(attend, queries, residuals)
        expanded = expansion.expand(queries[0], keys, values, mask, block=block)
        squares = (jnp.sum(x**2) for x in (attend(queries), *jax.tree.leaves(expanded)))
        return sum(squares) + jnp.sum(value * changes) + jnp.sum(changes**2)

    residuals = normal(9, 2, *arrays[0].shape)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(*arrays, residuals)


@pytest.mark.parametrize("block", [4, 12])
def test_derivatives_equal_those_of_attention_at_once(block):
    inputs = make_inputs()
    (value, found), (expected, gradients) = derivatives(block, *inputs), derivatives(0, *inputs)
    close(value, expected)
    for one, other in zip(found, gradients, strict=True):
        assert np.any(other) and np.isfinite(one).all()
        close(one, other, rtol=1e-3, atol=1e-4)
    assert not np.any(found[1][1])  # the empty history


def test_types_are_kept():
    inputs = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), make_inputs()[:3])
    mask = make_inputs()[3]
    found = attend(5)(*inputs, mask)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float32), reference.attention(*make_inputs()), atol=0.05)


@pytest.mark.parametrize("platform, rows, columns, block", [
    ("cpu", 2**10, 2**10, 0), ("cpu", 2**10 + 1, 2**10, 512), ("cpu", 0, 2**10, 0),
    ("tpu", 2**14, 2**10, 0), ("tpu", 2**15, 2**10, 2**14), ("gpu", 2**15, 2**20, 512),
])
def test_blocks_fit_the_cache_of_a_cpu_or_bound_memory(monkeypatch, platform, rows, columns, block):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert best_block(rows, columns, 512) == block


def test_programs_for_every_size_have_no_blocks():
    items, = export.symbolic_shape("m")
    specs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 4, 3), (items, 3))]
    exported = export.export(jax.jit(lambda *given: quantization.encode(*given).codes))(*specs)
    assert exported.call(jnp.zeros((2, 4, 3)), jnp.zeros((5, 3))).tolist() == [[0, 0]] * 5


# Memory of compiled programs, which do not run


def temporary_bytes(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    mask = jax.ShapeDtypeStruct((1, LONG), jnp.bool_)
    return jax.jit(function).lower(*arguments, mask).compile().memory_analysis().temp_size_in_bytes


def squared_attention(queries, keys, values, mask):
    return jnp.sum(attention.multi_head_attention(queries, keys, values, mask, block=BLOCK) ** 2)


def squared_changes(queries, keys, values, residuals, mask):
    def attend(queries):
        return attention.multi_head_attention(queries, keys, values, mask, block=BLOCK)

    return sum(jnp.sum(x**2) for x in expansion.first_order(attend, queries, residuals))


HISTORY = ((1, 2, LONG, 16),) * 2


@pytest.mark.parametrize(("function", "shapes"), [
    (jax.grad(squared_attention, argnums=(0, 1, 2)), ((1, 2, LONG, 16), *HISTORY)),  # 800 MB without blocks
    (jax.grad(squared_changes, argnums=(0, 1, 2, 3)), ((1, 2, 600, 16), *HISTORY, (2, 1, 2, 600, 16))),
    (functools.partial(expansion.expand, block=BLOCK), ((2, 64, 16), *HISTORY)),
    (functools.partial(attention.personalized_codebook, block=BLOCK),
     ((1, 2, LONG, 16), *(((1, 1, 2, LONG, 16),) * 2))),
], ids=["self-attention", "order 1", "expansion", "codebook"])
def test_memory_at_10_000_positions(function, shapes):
    """Some copies of the inputs (1.3 MB each) and of a block (0.5 MB), nothing of queries x positions."""
    assert temporary_bytes(function, *shapes) < 24 * MEGABYTE
