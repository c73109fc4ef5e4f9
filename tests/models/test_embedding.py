"""Embedding tables: ids outside the vocabulary, rows beyond it, other look-ups."""

import jax
import numpy as np

from tarq_jax.models.embedding import Embedding, Tables, take_rows

SIZE, WIDTH = 5, 3


def initial(module):
    return module.init(jax.random.key(0), np.zeros(1, np.int32))


def test_ids_out_of_the_vocabulary_read_row_0():
    module = Embedding(SIZE, WIDTH, Tables(lambda path: 4))
    params = initial(module)
    table = np.asarray(params["params"]["embedding"])
    assert table.shape == (8, WIDTH)
    ids = np.array([[0, 4, 5], [7, -1, 2**31 - 1]], np.int32)  # 5 and 7 are rows of the table, but not ids
    np.testing.assert_array_equal(module.apply(params, ids), table[[[0, 4, 0], [0, 0, 0]]])
    gradient = jax.grad(lambda params: module.apply(params, ids).sum())(params)["params"]["embedding"]
    np.testing.assert_array_equal(gradient, np.array([5, 0, 0, 0, 1, 0, 0, 0])[:, None] * np.ones(WIDTH))


def test_rows_beyond_the_vocabulary_are_zero_and_change_no_other():
    plain, padded = (initial(Embedding(SIZE, WIDTH, tables))["params"]["embedding"]
                     for tables in (Tables(), Tables(lambda path: 4)))
    np.testing.assert_array_equal(padded, np.pad(plain, ((0, 3), (0, 0))))


def test_the_look_up_is_told_the_path_and_valid_ids():
    seen = []

    def lookup(path, table, ids):
        seen.append((path, np.asarray(ids).tolist()))
        return take_rows(path, table, ids)

    module = Embedding(SIZE, WIDTH, Tables(lookup=lookup))
    params = initial(module)
    assert not seen  # not called on initialisation, whose batch need not fit a mesh
    module.apply(params, np.array([3, 9]))
    assert seen == [("params/embedding", [3, 0])]
