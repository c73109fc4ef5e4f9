"""Collectives read from HLO: handwritten text in every form, and programs that XLA compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from tarq_jax.training import hlo, sharding
from tarq_jax.training.hlo import Array

P = PartitionSpec

TEXT = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(f32[] %a, f32[] %b)
}

%never (x: f32[4]) -> f32[4] {
  ROOT %unused = f32[4]{0} all-reduce(f32[4]{0} %x), replica_groups={{0,1}}, to_apply=%add
}

%inner (x: f32[4]) -> f32[4] {
  ROOT %shift = f32[4]{0} collective-permute(f32[4]{0} %x), source_target_pairs={{0,1},{1,0}}
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %again = f32[4]{0} while(%y), body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %loop = f32[16]{0} all-gather(f32[4]{0} %x), replica_groups=[2,4]<=[8], dimensions={0}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]{0}) while(%t), body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %tuple = (f32[2,3]{1,0:T(8,128)}, /*index=1*/bf16[4]{0}) all-reduce(%a, %b), replica_groups={{0,1},{2,3}}
  %rs = f32[2]{0} reduce-scatter(f32[8]{0} %x), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
  %st = (f32[2]{0}, f32[16]{0}) all-gather-start(f32[2]{0} %x), replica_groups=mesh['a'=8] {'a':(1)4}
  %dn = f32[16]{0} all-gather-done((f32[2]{0}, f32[16]{0}) %st)
  %ar = f32[] all-reduce(f32[] %x), replica_groups={}, to_apply=%add, metadata={op_name="all-gather(x)"}
  ROOT %use = f32[] add(f32[] %ar, f32[] %ar)
}
"""


def test_every_form():
    found = hlo.collectives(TEXT)
    assert [(each.kind, each.group, each.times) for each in found] == [
        ("collective-permute", 8, 15), ("all-gather", 4, 5), ("all-reduce", 2, 1), ("reduce-scatter", 4, 1),
        ("all-gather", 4, 1), ("all-reduce", 8, 1)]
    assert found[2].arrays == (Array("f32", (2, 3)), Array("bf16", (4,)))
    assert found[4].arrays == (Array("f32", (16,)),)
    assert found[5].arrays == (Array("f32", ()),)


def test_bytes_by_the_ring_algorithm():
    assert [each.moved for each in hlo.collectives(TEXT)] == [15 * 16, 5 * 48, 32, 24, 48, 7]
    assert hlo.bytes_by_kind(hlo.collectives(TEXT)) == {
        "all-gather": 288, "all-reduce": 39, "reduce-scatter": 24, "collective-permute": 240}


@pytest.mark.parametrize(("array", "size"), [
    (Array("f32", (2, 3)), 24), (Array("bf16", (5,)), 10), (Array("pred", (3,)), 3), (Array("s64", ()), 8),
    (Array("s4", (3,)), 2), (Array("f8e4m3fn", (7,)), 7), (Array("token", ()), 0), (Array("f32", (0, 4)), 0)])
def test_sizes(array, size):
    assert array.num_bytes == size


def in_turn(x):
    """A loop of three steps, each with one permutation."""
    perm = [(i, (i + 1) % 8) for i in range(8)]
    return lax.fori_loop(0, 3, lambda _, x: lax.ppermute(x * 2, "data", perm), x)


@pytest.mark.parametrize(("function", "kind", "shapes", "times", "moved"), [
    (lambda x: lax.all_gather(x, "data", tiled=True), "all-gather", ((16, 4),), 1, 7 * 32),
    (lambda x: lax.psum(x, "data"), "all-reduce", ((2, 4),), 1, 2 * 7 * 32 // 8),
    (lambda x: lax.psum_scatter(x.ravel(), "data", tiled=True), "reduce-scatter", ((1,),), 1, 28),
    (lambda x: lax.all_to_all(jnp.tile(x, (4, 1)), "data", 0, 0, tiled=True),
     "all-to-all", ((1, 4),) * 8, 1, 7 * 16),
    (in_turn, "collective-permute", ((2, 4),), 3, 3 * 32),
], ids=["gather", "reduce", "scatter", "all to all", "loop"])
def test_what_xla_compiles(function, kind, shapes, times, moved):
    mesh = sharding.make_mesh()
    run = jax.jit(jax.shard_map(
        functools.partial(function), mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False))
    array = jax.device_put(np.ones((16, 4), np.float32), NamedSharding(mesh, P("data")))
    found, = hlo.collectives(run.lower(array).compile().as_text())
    assert (found.kind, found.arrays, found.group, found.times, found.moved) == (
        kind, tuple(Array("f32", shape) for shape in shapes), 8, times, moved)
