"""Look-ups in tables split over a mesh give the rows and the gradient of the table on one device."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tarq_jax.training import exchange, hlo, sharded_embedding, sharding

ROWS, WIDTH, BATCH, POSITIONS = 512, 3, 8, 2
BOTH = ("data", "model")
TABLE = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)
IDS = np.random.default_rng(1).integers(0, ROWS, (BATCH, POSITIONS)).astype(np.int32)
IDS[5] = IDS[0]  # a row that two devices ask for
IDS[7] = (0, ROWS - 1)
OUT = np.random.default_rng(2).normal(size=(BATCH, POSITIONS, WIDTH)).astype(np.float32)


def compiled(shape, axes, rows=ROWS, batch=BATCH, positions=POSITIONS):
    """Placed arguments, and the compiled function of them: the rows, and the gradient of the table."""
    mesh = sharding.make_mesh(*shape)
    placement = sharded_embedding.place(mesh, axes, BOTH, batch)

    def both(table, ids, out):
        found, pull = jax.vjp(lambda table: sharded_embedding.sharded_rows(table, ids, placement), table)
        return found, pull(out)[0]

    put = jax.device_put
    split = NamedSharding(mesh, PartitionSpec(placement.batch or None))
    ids = np.resize(IDS[:batch], (batch, positions)) % rows
    out = np.resize(OUT[:batch], (batch, positions, WIDTH))
    table = put(TABLE[:rows], NamedSharding(mesh, PartitionSpec(axes)))
    arguments = table, put(ids, split), put(out, split)
    return arguments, jax.jit(both).lower(*arguments).compile()


SHAPES = ((8, 1), (4, 2), (2, 4), (1, 8))


@pytest.mark.parametrize("axes", [("model",), BOTH, ("model", "data"), ("data",)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_and_gradient(shape, axes):
    arguments, run = compiled(shape, axes)
    found, gradient = run(*arguments)
    np.testing.assert_array_equal(found, TABLE[IDS])
    expected = np.zeros_like(TABLE)
    np.add.at(expected, IDS, OUT)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    parts = sharded_embedding.num_devices(sharding.make_mesh(*shape), axes)
    assert {shard.data.shape for shard in gradient.addressable_shards} == {(ROWS // parts, WIDTH)}
    largest = max(array.num_bytes for each in hlo.collectives(run.as_text()) for array in each.arrays)
    assert largest <= OUT.nbytes  # the size of the batch's rows, which is smaller than any block of the table


def test_small_tables_are_summed_instead():
    """Two blocks of four rows, and sixteen look-ups: a sum over copies moves fewer bytes."""
    arguments, run = compiled((4, 2), ("model",), rows=8)
    found, gradient = run(*arguments)
    np.testing.assert_array_equal(found, TABLE[IDS % 8])
    expected = np.zeros_like(TABLE[:8])
    np.add.at(expected, IDS % 8, OUT)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)
    reduced = [each for each in hlo.collectives(run.as_text()) if each.kind == "all-reduce"]
    assert [(each.group, each.arrays[0].shape) for each in reduced] == [(4, (4, WIDTH))]


def test_ids_that_do_not_divide_are_looked_up_by_every_device():
    arguments, run = compiled((2, 4), BOTH, batch=5)
    found, gradient = run(*arguments)
    np.testing.assert_array_equal(found, TABLE[IDS[:5]])
    expected = np.zeros_like(TABLE)
    np.add.at(expected, IDS[:5], OUT[:5])
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_bytes_moved_do_not_depend_on_the_table():
    """A device sends each of the 7 others one id and gets a row; later it sends the id and a gradient."""
    small, large = (hlo.bytes_by_kind(hlo.collectives(compiled((2, 4), BOTH, rows=rows)[1].as_text()))
                    for rows in (256, 512))
    assert small == large and small.keys() == {"all-reduce", "all-to-all"}
    assert small["all-to-all"] == 2 * 7 * exchange.capacity(POSITIONS, 8) * 4 * (1 + WIDTH)


def test_two_devices_show_each_other_all_ids():
    moved = hlo.bytes_by_kind(hlo.collectives(compiled((4, 2), ("model",), rows=512)[1].as_text()))
    assert moved.keys() == {"all-gather", "reduce-scatter"}


@pytest.fixture(scope="module", params=[((2, 4), BOTH), ((2, 4), ("model",)), ((8, 1), ("data",))], ids=str)
def compiled_for_many(request):
    """Sixteen ids per request; in each round, a device asks each of 4 or 8 devices for 8 or 4 of them."""
    return compiled(*request.param, batch=BATCH, positions=16)


# rows of a request: any, those of one or two owners, or always the same row
CROWDS = st.sampled_from([st.integers(0, ROWS - 1), st.integers(0, 40), st.integers(ROWS - 70, ROWS - 1),
                          st.just(0)])


@hypothesis.given(st.lists(CROWDS.flatmap(lambda rows: st.lists(rows, min_size=16, max_size=16)),
                           min_size=BATCH, max_size=BATCH))
@hypothesis.settings(max_examples=40, deadline=None)
def test_any_ids(compiled_for_many, ids):
    """However many ids go to one owner: an owner that everyone asks serves them in more rounds."""
    (table, given, out), run = compiled_for_many
    ids = np.array(ids, np.int32)
    found, gradient = run(table, jax.device_put(ids, given.sharding), out)
    np.testing.assert_array_equal(found, TABLE[ids])
    expected = np.zeros_like(TABLE)
    np.add.at(expected, ids, np.asarray(out))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def collect(shape, axes, positions=POSITIONS):
    """Placed arguments, and the compiled `sum_to_owners` of a batch."""
    mesh = sharding.make_mesh(*shape)
    placement = sharded_embedding.place(mesh, axes, BOTH, BATCH)
    split = NamedSharding(mesh, PartitionSpec(placement.batch or None))
    ids, out = (jax.device_put(np.resize(array, (BATCH * positions, *array.shape[2:])), split)
                for array in (IDS, OUT))
    run = jax.jit(lambda ids, out: sharded_embedding.sum_to_owners(ids, out, ROWS, placement))
    return (ids, out), run.lower(ids, out).compile()


def whole(rows, gradients):
    """The gradient of the whole table, from the parts of all devices; copies must be equal to the bit."""
    found = np.zeros_like(TABLE)
    parts = {(shard.index[0].start or 0): [] for shard in rows.addressable_shards}
    for one, other in zip(rows.addressable_shards, gradients.addressable_shards, strict=True):
        parts[one.index[0].start or 0].append((np.asarray(one.data), np.asarray(other.data)))
    block = ROWS // len(parts)
    for number, start in enumerate(sorted(parts)):
        (rows, sums), *copies = parts[start]
        assert all(rows.tobytes() == copy.tobytes() and sums.tobytes() == same.tobytes()
                   for copy, same in copies)
        valid = rows < block
        assert (np.diff(rows[valid]) > 0).all() and valid[:valid.sum()].all()
        assert (rows[~valid] == block).all() and not sums[~valid].any()
        found[number * block + rows[valid]] = sums[valid]
    return found


@pytest.mark.parametrize("axes", [(), ("model",), BOTH, ("data",)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_of_owners(shape, axes):
    (ids, out), run = collect(shape, axes)
    expected = np.zeros_like(TABLE)
    np.add.at(expected, np.asarray(ids), np.asarray(out))
    np.testing.assert_allclose(whole(*run(ids, out)), expected, rtol=1e-6)
    largest = max(array.num_bytes for each in hlo.collectives(run.as_text()) for array in each.arrays)
    assert largest <= OUT.nbytes


@pytest.fixture(scope="module", params=[((2, 4), BOTH), ((2, 4), ("model",)), ((1, 8), BOTH)], ids=str)
def collect_from_many(request):
    return collect(*request.param, positions=16)


@hypothesis.given(st.lists(CROWDS.flatmap(lambda rows: st.lists(rows, min_size=16, max_size=16)),
                           min_size=BATCH, max_size=BATCH), st.booleans())
@hypothesis.settings(max_examples=30, deadline=None)
def test_sums_of_any_ids(collect_from_many, ids, some):
    """Also in several rounds, and with ids that the table does not have, which are ignored."""
    (given, out), run = collect_from_many
    ids = np.array(ids, np.int32).ravel()
    ids[len(ids) // 2:] = ROWS if some else ids[len(ids) // 2:]
    expected = np.zeros((ROWS + 1, WIDTH), np.float32)
    np.add.at(expected, ids, np.asarray(out))
    found = whole(*run(jax.device_put(ids, given.sharding), out))
    np.testing.assert_allclose(found, expected[:ROWS], rtol=1e-5, atol=1e-5)


def test_one_device_moves_nothing():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    placement = sharded_embedding.place(mesh, BOTH, BOTH, BATCH)
    look_up = jax.jit(functools.partial(sharded_embedding.sharded_rows, placement=placement))
    run = look_up.lower(TABLE, IDS).compile()
    assert hlo.collectives(run.as_text()) == []
    np.testing.assert_array_equal(run(TABLE, IDS), TABLE[jnp.asarray(IDS)])
