# SPDX-License-Identifier: Apache-2.0
"""Collectives of programs whose exchanges are known, and every way HLO spells groups."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flaxlm.config import mesh_shape
from flaxlm.planning.collectives import Collective, _axes_of, _groups, find_collectives
from flaxlm.sharding import make_mesh

SIZES = mesh_shape(dict(data=2, fsdp=4))


def compiled_text(function, *specs) -> str:
  mesh = make_mesh({"data": 2, "fsdp": 4})
  arrays = [
    jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=NamedSharding(mesh, spec))
    for spec in specs
  ]
  out = NamedSharding(mesh, PartitionSpec())
  return jax.jit(function, out_shardings=out).lower(*arrays).compile().as_text()


def test_a_gather_over_one_axis():
  found = find_collectives(compiled_text(lambda x: x + 1, PartitionSpec("fsdp")), SIZES)
  assert found == [Collective("all-gather", "fsdp", 1, 8 * 64 * 4 * 3 // 4)]


def test_a_sum_over_both_axes():
  spec = PartitionSpec(("data", "fsdp"))
  found = find_collectives(compiled_text(lambda x: x.sum(), spec), SIZES)
  assert [(one.kind, one.axes, one.count) for one in found] == [
    ("all-reduce", "data+fsdp", 1)
  ]
  assert found[0].bytes == 2 * 4 * 7 // 8


def test_what_is_in_a_loop_counts_as_often_as_it_runs():
  def loop(x, y):
    body = lambda total, _: (jnp.tanh(total @ y.T @ x), None)
    return jax.lax.scan(body, x, None, length=5)[0]

  specs = (PartitionSpec(None, "fsdp"), PartitionSpec(None, "fsdp"))
  once = find_collectives(compiled_text(lambda x, y: jnp.tanh(x @ y.T @ x), *specs), SIZES)
  many = find_collectives(compiled_text(loop, *specs), SIZES)
  sums = lambda found: sum(one.count for one in found if one.kind == "all-reduce")
  assert sums(once) == 1
  assert sums(many) == 5


@pytest.mark.parametrize(
  ("text", "axes"),
  [
    ("replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true", "fsdp"),
    ("replica_groups=[2,4]<=[8], use_global_device_ids=true", "fsdp"),
    ("replica_groups=[4,2]<=[2,4]T(1,0), use_global_device_ids=true", "data"),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, dimensions={1}", "data"),
    ("replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=(0,4,1,5,2,6,3,7) {'c'}", "data"),
    ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", "fsdp"),
    ("replica_groups={}, channel_id=1", "data+fsdp"),
    ("source_target_pairs={{0,1},{1,2},{4,5}}, channel_id=2", "fsdp"),
    ("source_target_pairs={{0,4},{4,0}}", "data"),
  ],
)
def test_groups_are_told_by_mesh_axis(text: str, axes: str):
  groups = _groups(f"%x = f32[8]{{0}} all-gather(%y), {text}", SIZES)
  assert _axes_of(groups, SIZES)[0] == axes


LOOP = """
%body (p: (u32[], f32[8])) -> (u32[], f32[8]) {
  %two = u32[] constant(2)
  %i = u32[] get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %next = u32[] add(%i, %two), control-predecessors={%x}
  %start = (f32[8], f32[8]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %done = f32[8]{0} collective-permute-done(%start)
  ROOT %t = (u32[], f32[8]{0}) tuple(%next, %done)
}

%cond (p: (u32[], f32[8])) -> pred[] {
  %limit = u32[] constant(8)
  %i = u32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  ROOT %loop = (u32[], f32[8]{0}) while(%x), condition=%cond, body=%body
}
"""


def test_a_loop_that_counts_in_twos():
  """As libtpu writes a product whose operand travels while it is multiplied."""
  assert find_collectives(LOOP, SIZES) == [
    Collective("collective-permute", "fsdp", 4, 4 * 32)
  ]
