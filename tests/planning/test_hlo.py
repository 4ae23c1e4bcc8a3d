"""Collectives are counted as often as they run, with the bytes they give."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from shallow_pi.parallel import sharding
from shallow_pi.planning import hlo


@pytest.fixture(scope="module")
def mesh():
    return sharding.MeshConfig(data=8).create()


def _text(function, mesh, out, *arguments):
    """The optimized program; arguments are (shape, spec)."""
    given = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in arguments
    ]
    whole = NamedSharding(mesh, out)
    return jax.jit(function, out_shardings=whole).lower(*given).compile().as_text()


def test_a_sum_over_devices_is_one_all_reduce_of_its_result(mesh):
    """x @ w with the contracted dimension split: every device has a part of the (4, 16) sum."""
    text = _text(
        lambda x, w: x @ w,
        mesh,
        PartitionSpec(),
        ((4, 32), PartitionSpec(None, "data")),
        ((32, 16), PartitionSpec("data", None)),
    )
    found = hlo.collectives(text)
    assert [(c.kind, c.times, c.bytes) for c in found] == [("all-reduce", 1, 4 * 16 * 4)]
    assert "dot_general" in found[0].source
    assert hlo.totals(found)["all-reduce"] == (1, 256)


def test_a_collective_in_a_loop_counts_as_often_as_it_runs(mesh):
    def repeat(x, w):
        return jax.lax.scan(lambda y, _: (jnp.tanh(y @ w @ w.T), None), x, length=5)[0]

    text = _text(
        repeat,
        mesh,
        PartitionSpec(),
        ((4, 32), PartitionSpec()),
        ((32, 16), PartitionSpec(None, "data")),
    )
    count, size = hlo.totals(hlo.collectives(text))["all-reduce"]
    assert (count, size) == (5, 5 * 4 * 32 * 4)


def test_gathering_gives_the_bytes_of_the_whole(mesh):
    text = _text(lambda x: 2 * x, mesh, PartitionSpec(), ((64, 8), PartitionSpec("data")))
    assert hlo.totals(hlo.collectives(text))["all-gather"] == (1, 64 * 8 * 4)


def test_a_program_of_one_device_has_none():
    text = jax.jit(lambda x: x @ x).lower(jnp.ones((4, 4))).compile().as_text()
    assert hlo.collectives(text) == []
    assert set(hlo.totals([])) == set(hlo.KINDS)


def test_text_of_an_asynchronous_start_gives_its_result_alone():
    """TPUs and GPUs split a collective in two; the start's shape holds operand and result."""
    text = """
%body (p: f32[8]) -> f32[8] {
  %a = (bf16[2,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(bf16[2,8]{1,0} %x), dimensions={0}
  %b = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(f32[4]{0} %y)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %w = f32[8] while(%p), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"6"}}
}
"""
    found = [(c.kind, c.times, c.bytes) for c in hlo.collectives(text)]
    assert found == [("all-gather", 6, 16 * 8 * 2), ("collective-permute", 6, 16)]


def test_an_asynchronous_start_of_several_arrays_gives_all_their_results():
    """XLA joins small sums; the start of a sum has the results alone as its shape."""
    text = """
ENTRY %main (p: f32[8]) -> f32[8] {
  %a = (f32[64]{0}, bf16[4,8]{1,0}) all-reduce-start(%x, %y), replica_groups=[1,8]<=[8]
  %b = ((f32[2]{0}, f32[3]{0}), (f32[16]{0}, f32[24]{0})) all-gather-start(%x, %y)
  %c = ((f32[64]{0}, f32[16]{0}), (f32[8]{0}, f32[2]{0}), u32[]) reduce-scatter-start(%x, %y)
}
"""
    found = [(c.kind, c.bytes) for c in hlo.collectives(text)]
    sums, gathered, scattered = 64 * 4 + 4 * 8 * 2, (16 + 24) * 4, (8 + 2) * 4
    expected = [("all-reduce", sums), ("all-gather", gathered), ("reduce-scatter", scattered)]
    assert found == expected


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups={}", 8),
    ],
)
def test_a_device_sends_the_whole_array_whose_part_it_keeps(groups, size):
    text = f"""HloModule jit_step, is_scheduled=true, num_partitions=8

ENTRY %main (p: f32[32]) -> f32[8] {{
  %a = f32[8]{{0}} reduce-scatter(%p), channel_id=1, {groups}, dimensions={{0}}, to_apply=%add
}}
"""
    (found,) = hlo.collectives(text)
    assert (found.bytes, found.group, found.sent) == (32, size, 32 * size)


def test_a_loop_without_a_count_has_its_conditions_bound():
    text = """
%condition (p: (s32[], f32[8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(18)
  %count = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%count, %bound), direction=LT
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = f32[8]{0:T(128)} all-reduce(%x), to_apply=%sum
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%tuple), condition=%condition, body=%body
}
"""
    (found,) = hlo.collectives(text)
    assert (found.kind, found.times, found.bytes) == ("all-reduce", 18, 32)


def test_a_tpus_fusion_of_sum_and_slice_is_a_reduce_scatter():
    text = """
%all-reduce-scatter.3.clone (input.1: bf16[16,8]) -> bf16[4,8] {
  %sum = bf16[16,8]{1,0:T(8,128)} all-reduce(%input.1), channel_id=5, to_apply=%add
  ROOT %part = bf16[4,8]{1,0} dynamic-slice(%sum, %n, %zero), dynamic_slice_sizes={4,8}
}

ENTRY %main (p: bf16[16,8]) -> bf16[4,8] {
  ROOT %fusion = bf16[4,8]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.3.clone
}
"""
    (found,) = hlo.collectives(text)
    assert (found.kind, found.times, found.bytes) == ("reduce-scatter", 1, 4 * 8 * 2)


def test_a_collective_that_several_fusions_carry_counts_once():
    """One channel is one collective; another channel, or kind, is another."""
    text = """
%one (p: bf16[2,8]) -> bf16[8,8] {
  %a = bf16[8,8]{1,0} all-gather(%p), channel_id=7, dimensions={0}
}

%two (p: bf16[2,8]) -> bf16[8,8] {
  %b = bf16[8,8]{1,0} all-gather(%p), channel_id=7, dimensions={0}
  %c = bf16[8,8]{1,0} all-gather(%q), channel_id=8, dimensions={0}
  %d = f32[8]{0} all-reduce(%r), channel_id=7, to_apply=%add
}

ENTRY %main (p: bf16[2,8]) -> bf16[8,8] {
  %x = bf16[8,8]{1,0} fusion(%p), kind=kCustom, calls=%one
  %y = bf16[8,8]{1,0} fusion(%x), kind=kCustom, calls=%two
}
"""
    totals = hlo.totals(hlo.collectives(text))
    assert totals["all-gather"] == (2, 2 * 8 * 8 * 2)
    assert totals["all-reduce"] == (1, 32)
