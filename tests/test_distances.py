"""Distances of points to codewords."""

import jax
import numpy as np
from draws import normal
from hypothesis import given, settings
from hypothesis import strategies as st

from tarq_jax import distances


def test_negative_distances_up_to_a_constant_of_each_point():
    points, codewords = normal(0, 2, 4, 3), normal(1, 2, 5, 3)
    expected = -np.sum((points[:, :, None] - codewords[:, None]) ** 2, axis=-1)
    constant = np.sum(points**2, axis=-1, keepdims=True)
    actual = distances.negative_distances(points, codewords) - constant
    np.testing.assert_allclose(actual, expected, rtol=1e-4)


@given(st.integers(0, 2**31), st.integers(1, 9))
@settings(max_examples=25, deadline=None)
def test_the_central_codeword_is_one_of_them_and_nearest_to_their_mean(seed, size):
    codewords = normal(seed, 2, size, 3)
    found = np.asarray(distances.central(codewords))[:, 0]
    length = np.sum((codewords - codewords.mean(axis=1, keepdims=True)) ** 2, axis=-1)
    for centre, words, lengths in zip(found, codewords, length, strict=True):
        index = np.flatnonzero((words == centre).all(axis=1))
        assert lengths[index].min() <= lengths.min() * (1 + 1e-5)


def test_the_first_of_equal_codewords_is_the_centre():
    np.testing.assert_array_equal(distances.central(np.full((4, 2), 3.0, np.float32)), [[3.0, 3.0]])


def test_the_centre_has_no_derivative():
    points, codewords = normal(0, 4, 3), normal(1, 5, 3)
    moved, pull_back = jax.vjp(lambda words: distances.centred(points, words)[1], codewords)
    weights = normal(2, *moved.shape)
    np.testing.assert_array_equal(pull_back(weights)[0], weights)
