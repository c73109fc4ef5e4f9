"""The look-ups of the item side, which gather rows, compared with those of the library."""

import numpy as np
import pytest
from draws import normal

from tarq_jax.corrections import damping
from tarq_jax.expansion import expand, look_up_expansion
from tarq_jax.serving import item_side
from tarq_jax.serving.method import further_levels
from tarq_jax.serving.vectors import read, store

B, H, N, E, K, M, L = 3, 2, 7, 4, 5, 11, 3


CODES = np.random.default_rng(3).integers(0, K, (M, L)).astype(np.uint8)
LEVELS = normal(4, L - 1, K, H, E)
CHOSEN = [level[codes] for level, codes in zip(LEVELS, CODES.T[1:], strict=True)]  # [M, H, E] each
RADIUS = np.array([0.5, 4.0], np.float32)


@pytest.fixture(scope="module")
def expansion():
    mask = np.arange(N) < np.array([7, 0, 3])[:, None]
    return expand(normal(0, H, K, E), normal(1, B, H, N, E), normal(2, B, H, N, E), mask)


@pytest.fixture(scope="module")
def users(expansion):
    return {"means": np.swapaxes(expansion.means, 1, 2).reshape(B, K, H * E),
            "jacobians": np.transpose(expansion.jacobians, (0, 2, 4, 1, 3))}


def by_library(expansion, corrections):
    """`m_c + J_c r` [B, M, D], for corrections [M, H, E]."""
    residuals = np.tile(np.swapaxes(corrections, 0, 1), (B, 1, 1, 1))
    found = look_up_expansion(expansion, np.tile(CODES[:, 0].astype(np.int32), (B, 1)), residuals)
    return np.swapaxes(found, 1, 2).reshape(B, M, H * E)


@pytest.mark.parametrize("kept", ["exactly", "in levels", "in levels, damped"])
def test_changes_are_those_of_the_expansion(expansion, users, kept):
    """`m_c + J_c r` by gathering rows, for codes in any order."""
    corrections, weights, items = sum(CHOSEN), further_levels(LEVELS), {"codes": CODES}
    if kept == "exactly":
        weights, items = {}, {"codes": CODES[:, :1], "correction": corrections.reshape(M, H * E)}
    elif kept == "in levels, damped":
        weights["radius"] = RADIUS
        corrections = corrections * damping(corrections, radius=RADIUS[:, None])
    found = item_side.for_all(item_side.first_order)(weights, users, items)
    np.testing.assert_allclose(found, by_library(expansion, corrections), rtol=1e-5, atol=1e-5)


def test_changes_level_by_level(expansion, users):
    """All levels are damped by the factor of their sum."""
    weights = further_levels(LEVELS) | {"radius": RADIUS}
    found = item_side.for_all(item_side.level_changes)(weights, users, {"codes": CODES})
    factors, means = damping(sum(CHOSEN), radius=RADIUS[:, None]), by_library(expansion, 0.0 * CHOSEN[0])
    expected = [by_library(expansion, level * factors) - means for level in CHOSEN]
    np.testing.assert_allclose(found, np.stack(expected, axis=2), rtol=1e-5, atol=1e-5)


def test_one_set_of_items_or_one_for_each():
    users = {"vector": normal(0, B, 6), "table": normal(1, B, 2, K)}
    items = {"vector": normal(2, M, 6), "codes": np.random.default_rng(3).integers(0, K, (M, 2))}
    weights = {"bias": np.float32(0.5)}
    for_all = item_side.for_all(item_side.scalar)(weights, users, items)
    each = {name: np.broadcast_to(values, (B, *values.shape)) for name, values in items.items()}
    np.testing.assert_allclose(
        item_side.for_each(item_side.scalar)(weights, users, each), for_all, rtol=1e-5, atol=1e-5)
    by_hand = users["vector"] @ items["vector"].T + 0.5
    by_hand += sum(users["table"][:, level, items["codes"][:, level]] for level in range(2))
    np.testing.assert_allclose(for_all, by_hand, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("storage", "bound"), [("float32", 0.0), ("bfloat16", 2**-8), ("int8", 1 / 254)])
def test_the_error_of_stored_vectors(storage, bound):
    """Relative to the entry in bfloat16, to the row's largest entry in int8; zeros stay zeros."""
    values = normal(0, 50, 2, 16) * np.array([1e-6, 1e4], np.float32)[:, None]
    values[3] = 0.0
    arrays = store({"vector": values, "codes": np.array([[299]])}, storage, 300)
    error = np.abs(np.asarray(read(arrays, "vector")) - values)
    size = np.abs(values) if storage == "bfloat16" else np.abs(values).max(axis=-1, keepdims=True)
    assert (error <= 1.001 * bound * size).all()
    assert arrays["codes"].dtype == np.uint16
    assert store({"codes": np.array([[255]])}, storage, 256)["codes"].dtype == np.uint8


def test_unknown_storage():
    with pytest.raises(ValueError, match="vectors is 'int4', expected one of"):
        store({}, "int4", 0)
    for number, codewords in ((64, 64), (-1, 64), (0, 0)):
        with pytest.raises(ValueError, match=f"'kind' has integers from {number} to {number}, expected"):
            store({"kind": np.array([[number]])}, "float32", codewords)
