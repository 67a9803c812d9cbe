# SPDX-License-Identifier: Apache-2.0
"""Where arrays are: strict specs, whole meshes, moments sharded like their parameters."""

import dataclasses
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from meshes import mesh_of

from flaxlm.config import (
  MESH_AXES,
  Config,
  DataConfig,
  ModelConfig,
  MoEConfig,
  OptimizerConfig,
  TrainingConfig,
  knobs,
  mesh_shape,
  mesh_sizes,
  parse_mesh,
  slow_axes,
)
from flaxlm.errors import ConfigError
from flaxlm.nn.models import build_model
from flaxlm.sharding import (
  FIELDS,
  KV_COPIES,
  RULES,
  batch_parts,
  batch_sharding,
  check_batch,
  constrain,
  describe_mesh,
  find_replication,
  hybrid_grid,
  kv_parts,
  make_mesh,
  merged,
  mesh_for,
  partition_spec,
  split_sizes,
  whole_sizes,
)
from flaxlm.sharding.rules import cut_further
from flaxlm.training.optimizer import build_optimizer
from flaxlm.training.step import TrainState, abstract_params, abstract_state

SIZES = {"data": 2, "fsdp": 2, "tensor": 2, "expert": 1}
SPLIT = dict.fromkeys((*MESH_AXES, KV_COPIES), 2)  # no mesh of this size is made


@pytest.fixture(scope="module")
def mesh() -> Mesh:
  return make_mesh(SIZES)


# -- Specs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_a_dim_is_cut_by_the_axes_of_its_rule(name: str):
  parts = math.prod(SPLIT[axis] for axis in RULES[name])
  spec = partition_spec([name], [3 * parts], SPLIT)
  assert spec == PartitionSpec(RULES[name] or None)


@pytest.mark.parametrize("name", [name for name, axes in RULES.items() if axes])
def test_a_dim_that_does_not_divide_names_the_field_to_change(name: str):
  parts = math.prod(SPLIT[axis] for axis in RULES[name])
  with pytest.raises(ConfigError) as caught:
    partition_spec([name], [3 * parts + 1], SPLIT)
  assert f"{FIELDS[name]} = {3 * parts + 1} cannot be split" in caught.value.cause
  whole = whole_sizes({axis: SPLIT[axis] for axis in RULES[name]})
  for axis, size in whole.items():
    assert f"{axis}={size}" in caught.value.cause
  assert f"multiple of {parts}" in caught.value.cure
  fields = {field for field, _, _ in knobs(Config)}
  assert set(FIELDS[name].split(" / ")) <= fields


def test_a_dim_that_does_not_divide_tells_which_sizes_would():
  with pytest.raises(ConfigError) as caught:
    partition_spec(["ffn"], [40], {"tensor": 6})
  assert caught.value.cure.endswith("--mesh: tensor can be 1, 2, 4, 5, 8 or 10")
  with pytest.raises(ConfigError) as caught:
    partition_spec(["vocab"], [7], {"tensor": 4})
  assert "--mesh: tensor can be 1 or 7; a new run" in caught.value.cure


def test_axes_that_the_mesh_does_not_have_cut_nothing():
  assert partition_spec(["vocab", "embed"], [7, 6], {"fsdp": 2}) == PartitionSpec(
    None, ("fsdp",)
  )


def test_dims_without_a_name_are_not_cut():
  assert partition_spec([None, "embed"], [7, 6], SIZES) == PartitionSpec(None, ("fsdp",))


def test_an_unknown_name_is_an_error():
  with pytest.raises(ValueError, match=r"no sharding rule for 'embde'; known: .*embed"):
    partition_spec(["embde"], [8], SIZES)


@pytest.mark.parametrize("names", [[], ["embed"], ["layers", "embed", "ffn"]])
def test_a_wrong_rank_is_an_error(names: list[str]):
  with pytest.raises(ValueError, match=rf"{len(names)} names .* for the shape \(8, 8\)"):
    partition_spec(names, [8, 8], SIZES)


@pytest.mark.parametrize(
  "names", [["heads", "ffn"], ["embed", "embed"], ["batch", "embed"]]
)
def test_two_dims_on_one_mesh_axis_are_an_error(names: list[str]):
  with pytest.raises(ValueError, match="two dims on one mesh axis"):
    partition_spec(names, [8, 8], SIZES)


# -- Meshes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("sizes", "shape"),
  [
    ({"data": -1}, (1, 8, 1, 1, 1, 1)),
    ({"data": 8}, (1, 8, 1, 1, 1, 1)),
    ({"fsdp": 8}, (1, 1, 8, 1, 1, 1)),
    ({"fsdp": -1, "data": 2}, (1, 2, 4, 1, 1, 1)),
    ({"tensor": 2, "data": -1, "fsdp": 2}, (1, 2, 2, 1, 2, 1)),
    ({"data": 2, "expert": 4}, (1, 2, 1, 1, 1, 4)),
    ({"data": -1, "tensor": 8}, (1, 1, 1, 1, 8, 1)),
    ({"data": -1, "stage": 4}, (4, 2, 1, 1, 1, 1)),
  ],
)
def test_a_mesh_uses_every_device_once(sizes: dict[str, int], shape: tuple[int, ...]):
  mesh = make_mesh(sizes)
  assert mesh.axis_names == MESH_AXES
  assert mesh.devices.shape == shape
  assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize(
  ("sizes", "needed"),
  [
    ({"data": 4}, "mesh data=4 needs 4 devices, 8 present"),
    ({"data": 2, "tensor": 2}, "mesh data=2,tensor=2 needs 4 devices, 8 present"),
    ({"data": 16}, "mesh data=16 needs 16 devices, 8 present"),
    ({"data": -1, "fsdp": 3}, "fsdp=3 needs a multiple of 3 devices, 8 present"),
    ({"data": -1, "fsdp": 16}, "fsdp=16"),
    ({}, "needs 1 devices, 8 present"),
  ],
)
def test_idle_or_missing_devices_are_an_error(sizes: dict[str, int], needed: str):
  with pytest.raises(ConfigError) as caught:
    make_mesh(sizes)
  assert needed in caught.value.cause
  assert "data=8" in caught.value.cure


# -- Meshes over a slow network ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chip:
  """As much of a device that is not present as a mesh needs."""

  id: int
  slice_index: int = 0
  process_index: int = 0
  platform: str = "gpu"
  device_kind: str = "a GPU"


def test_a_mesh_says_where_its_axes_lie():
  mesh = parse_mesh("fsdp=4,data=-1@dcn")
  assert mesh_sizes(mesh) == {"fsdp": 4, "data": -1}
  assert slow_axes(mesh) == ("data",)
  assert slow_axes({"data": -1}) == ()
  assert (
    describe_mesh({"data": 2, "fsdp": 4, "tensor": 1}, ("data",)) == "data=2@dcn,fsdp=4"
  )


def ids(grid: np.ndarray) -> list:
  return np.vectorize(lambda device: device.id)(grid).tolist()


# By process, by slice (of several processes here), or, simulated, in their order; those of
# a slice or host need not come together.
HOSTS = [Chip(n, process_index=n % 2) for n in range(8)]
SLICES = [Chip(n, slice_index=n % 2, process_index=n) for n in range(8)]
SIMULATED = [Chip(n, platform="cpu") for n in range(8)]


@pytest.mark.parametrize(
  ("devices", "expected"),
  [
    (HOSTS, [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]),
    (SLICES, [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]),
    (SIMULATED, [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]),
  ],
  ids=["hosts", "slices", "simulated"],
)
def test_slow_axes_go_from_slice_to_slice(devices: list[Chip], expected: list):
  sizes = {"data": 2, "fsdp": 2, "tensor": 2}
  assert ids(hybrid_grid(sizes, ["data"], devices)) == expected
  last = hybrid_grid(sizes, ["tensor"], devices)
  assert ids(np.moveaxis(last, -1, 0)) == expected


def test_two_slow_axes_share_the_slices_out():
  devices = [Chip(n, slice_index=n // 2) for n in range(8)]
  sizes = {"data": 2, "fsdp": 2, "tensor": 2}
  grid = hybrid_grid(sizes, ["data", "tensor"], devices)
  assert ids(grid) == [[[0, 2], [1, 3]], [[4, 6], [5, 7]]]


@pytest.mark.parametrize(
  ("devices", "cause", "cure"),
  [
    (HOSTS, "mesh data=4 on the slow network needs 4 hosts, 2 present", "multiply to 2"),
    (SLICES, "mesh data=4 on the slow network needs 4 slices, 2 present", "multiply to 2"),
    ([Chip(n, platform="tpu") for n in range(8)], "4 slices, 1 present", "leave @dcn out"),
    ([Chip(n) for n in range(8)], "4 hosts, 1 present", "leave @dcn out"),
  ],
)
def test_slow_axes_that_are_not_the_slices_are_an_error(devices, cause: str, cure: str):
  with pytest.raises(ConfigError) as caught:
    hybrid_grid({"data": 4, "fsdp": 2}, ["data"], devices)
  assert cause in caught.value.cause and cure in caught.value.cure


def test_a_hybrid_mesh_of_simulated_devices():
  mesh = make_mesh({"data": 4, "fsdp": "-1@dcn"})
  assert mesh.axis_names == MESH_AXES
  numbers = ids(mesh.devices.squeeze())
  assert numbers == [[0, 4], [1, 5], [2, 6], [3, 7]]
  with pytest.raises(ConfigError, match=r"mesh data=3@dcn needs 3 devices, 8 present"):
    make_mesh({"data": "3@dcn"})


# -- Kv heads on more devices than there are kv heads --------------------------------------


def heads(num_heads: int, num_kv_heads: int | None = None, **more) -> ModelConfig:
  return ModelConfig(width=64, num_heads=num_heads, num_kv_heads=num_kv_heads, **more)


@pytest.mark.parametrize(
  ("model", "tensor", "parts"),
  [
    (heads(8, 2), 1, 1),
    (heads(8, 2), 2, 2),
    (heads(8, 2), 4, 2),
    (heads(8, 2), 8, 2),
    (heads(48, 1), 12, 1),
    (heads(64, 8), 16, 8),
    (heads(8), 8, 8),
    (heads(4, family="rnn"), 8, 8),
  ],
)
def test_each_kv_head_is_on_the_devices_of_its_query_heads(model, tensor: int, parts: int):
  assert kv_parts(model, tensor) == kv_parts(model.resolve(64), tensor) == parts
  sizes = mesh_shape({"fsdp": 2, "tensor": tensor, "expert": 3})
  split = split_sizes(sizes, model)
  assert split["tensor"] * split.get(KV_COPIES, 1) == tensor
  assert split["tensor"] == parts and whole_sizes(split) == sizes
  assert split_sizes(split, model) == split


@pytest.mark.parametrize(
  ("model", "tensor", "cause", "cure"),
  [
    (
      heads(32, 4),
      6,
      "model.num_heads=32 and model.num_kv_heads=4 cannot be split over mesh tensor=6",
      "tensor can be 1, 2, 4, 8, 16 or 32",
    ),
    # 12 divides the query heads, and some would read half of the kv heads of a device.
    (heads(24, 8), 12, "mesh tensor=12", "tensor can be 1, 2, 4, 8 or 24"),
    (heads(6), 4, "model.num_heads=6 cannot", "tensor can be 1, 2, 3 or 6"),
  ],
)
def test_heads_that_do_not_divide_tell_the_sizes_that_would(model, tensor, cause, cure):
  with pytest.raises(ConfigError) as caught:
    kv_parts(model, tensor)
  assert cause in caught.value.cause and caught.value.cure == cure


def test_a_device_has_its_query_heads_and_the_kv_head_that_they_read():
  whole, model = make_mesh({"tensor": 8}), heads(8, 2)
  mesh = mesh_for(whole, model)
  assert mesh.devices.flatten().tolist() == whole.devices.flatten().tolist()
  assert mesh_for(mesh, model) is mesh and mesh_for(whole, heads(8)) is whole
  assert mesh_for(mesh, heads(8)) == whole
  place = lambda name, dim: NamedSharding(
    mesh, partition_spec([name], [dim], dict(mesh.shape))
  ).devices_indices_map((dim,))
  queries, keys = place("heads", 8), place("kv_heads", 2)
  for number, device in enumerate(whole.devices.flat):
    assert range(8)[queries[device][0]] == range(number, number + 1)
    assert range(2)[keys[device][0]] == range(number // 4, number // 4 + 1)


def test_copies_of_a_kv_head_are_no_accident():
  model = build_model(dataclasses.replace(TINY, num_kv_heads=1))
  mesh = mesh_for(mesh_of(tensor=4), model.cfg)
  params = abstract_params(model, mesh)
  found = find_replication(params, mesh.shape)
  total = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert found.fraction == (2 * 2 + 1) * 16 / total, "norms alone"


# -- The optimizer's state -----------------------------------------------------------------

TINY = ModelConfig(
  depth=2, width=16, num_heads=4, num_kv_heads=2, vocab_size=64, context=16
)


def state_of(kind: str, mesh: Mesh) -> TrainState:
  model = build_model(TINY)
  optimizer = build_optimizer(OptimizerConfig(kind=kind), 10)  # type: ignore[arg-type]
  return abstract_state(model, optimizer, mesh)


@pytest.mark.parametrize(
  ("spec", "shape", "expected"),
  [
    ((None, ("tensor",)), (4, 64), (None, ("tensor", "data"))),  # 4 or 32: the larger
    ((("fsdp",), ("tensor",)), (64, 6), (("fsdp", "data"), ("tensor",))),
    ((("fsdp",), None), (10, 4), (("fsdp",), ("data",))),  # 5 does not divide
    ((None, ("fsdp",)), (3, 2), (None, ("fsdp",))),  # nothing does
  ],
)
def test_moments_are_cut_further_where_their_shard_is_largest(spec, shape, expected, mesh):
  found = cut_further(PartitionSpec(*spec), shape, mesh, "data")
  assert found == PartitionSpec(*expected)


# How many arrays of a parameter's shape each rule keeps for it.
MOMENTS = {"adamw": 2, "lion": 1, "adafactor": 1, "sgd": 1}


@pytest.mark.parametrize("kind", [*MOMENTS, "muon"])
def test_every_moment_lies_beside_its_parameter(kind: str, mesh: Mesh):
  state = state_of(kind, mesh)
  params = jax.tree_util.tree_leaves_with_path(state.params)
  moments = jax.tree_util.tree_leaves_with_path(state.opt_state)
  found = 0
  for path, param in params:
    # Muon keeps one moment of the kernels it turns, two of what it leaves to Adam.
    names = [key.key for key in path]
    turned = kind == "muon" and names[0] == "blocks" and names[-1] == "kernel"
    expected = MOMENTS.get(kind, 1 if turned else 2)
    mine = [m for at, m in moments if at[-len(path) :] == path and m.shape == param.shape]
    assert len(mine) == expected, names
    assert all(moment.sharding == param.sharding for moment in mine), names
    found += len(mine)
  # Nothing else is as large as the smallest parameter: counters, coefficients.
  smallest = min(param.size for _, param in params)
  assert len([m for _, m in moments if m.size >= smallest]) == found


@pytest.mark.parametrize("kind", [*MOMENTS, "muon"])
def test_what_belongs_to_no_parameter_is_everywhere(kind: str, mesh: Mesh):
  state = state_of(kind, mesh)
  shapes = {param.shape for param in jax.tree.leaves(state.params)}
  rest = [m for m in jax.tree.leaves(state.opt_state) if m.shape not in shapes]
  assert rest  # every rule counts its steps
  assert all(moment.sharding.is_fully_replicated for moment in rest)
  assert state.step.sharding.is_fully_replicated


def test_factored_moments_are_replicated_and_none_is_lost(mesh: Mesh):
  """Above 128 wide, Adafactor keeps a row and a column in place of the matrix."""
  model = build_model(ModelConfig(depth=1, width=256, num_heads=2, vocab_size=256))
  optimizer = build_optimizer(OptimizerConfig(kind="adafactor"), 10)
  state = abstract_state(model, optimizer, mesh)
  wanted = jax.eval_shape(optimizer.init, state.params)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), state.opt_state) == jax.tree.map(
    lambda x: (x.shape, x.dtype), wanted
  )
  table = state.params["embedding"]["table"]
  factors = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
    if jax.tree_util.keystr(path).endswith("['table']") and leaf.size > 1
  ]
  assert sorted(leaf.shape for leaf in factors) == sorted((dim,) for dim in table.shape)
  assert all(leaf.sharding.is_fully_replicated for leaf in factors)


def test_every_matrix_is_cut_by_fsdp_and_tensor(mesh: Mesh):
  """Nothing is silently replicated: a device holds a quarter of each matrix."""
  for path, param in jax.tree_util.tree_leaves_with_path(state_of("adamw", mesh).params):
    shard = math.prod(param.sharding.shard_shape(param.shape))
    is_matrix = path[-1].key in ("kernel", "table")
    assert shard * (4 if is_matrix else 1) == param.size, path


# -- Activations ---------------------------------------------------------------------------


def test_constrain_is_nothing_without_a_mesh():
  x = jnp.ones((4, 2))
  assert constrain(x, "batch", "act_embed") is x
  single = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
  with jax.set_mesh(single):
    assert constrain(x, "batch", "act_embed") is x


def test_constrain_reaches_the_compiler(mesh: Mesh):
  pin = jax.jit(lambda x: constrain(2 * x, "batch", "length", "act_ffn"))
  x = np.ones((4, 3, 6), np.float32)
  assert "sharding_constraint" not in pin.lower(x).as_text()
  with jax.set_mesh(mesh):
    text = pin.lower(x).as_text()
    y = pin(x)
  assert "sharding_constraint" in text
  assert y.sharding.is_equivalent_to(
    NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor")), 3
  )
  np.testing.assert_array_equal(y, 2 * x)


def test_constrain_is_as_strict_as_a_spec(mesh: Mesh):
  with jax.set_mesh(mesh):
    with pytest.raises(ConfigError, match=r"data\.batch_size"):
      constrain(jnp.ones((3, 2)), "batch", "act_embed")
    with pytest.raises(ValueError, match="no sharding rule"):
      constrain(jnp.ones((4, 2)), "batch", "wdith")


def test_a_batch_is_cut_by_rows_over_every_data_parallel_axis(mesh: Mesh):
  x = jax.device_put(np.arange(8.0).reshape(8, 1), batch_sharding(mesh))
  rows = {tuple(np.ravel(shard.data)) for shard in x.addressable_shards}
  assert rows == {(0.0, 1.0), (2.0, 3.0), (4.0, 5.0), (6.0, 7.0)}
  with jax.set_mesh(mesh):
    spec = partition_spec(["batch", "length"], x.shape, dict(mesh.shape))
  assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)


@pytest.mark.slow
def test_a_program_keeps_the_memory_that_it_has_used():
  """On glibc: a step that needs 256 MB faults no page in once it has run a few times."""
  code = """
import resource
from flaxlm.platform import start_jax
start_jax()
import jax, jax.numpy as jnp
work = jax.jit(lambda x: jax.lax.optimization_barrier(jnp.outer(x, x)).sum())
faults = []
for _ in range(8):
  work(jnp.ones(8192)).block_until_ready()
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[-4])
"""
  environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
  environment["JAX_PLATFORMS"] = "cpu"
  command = [sys.executable, "-c", code]
  done = subprocess.run(
    command, env=environment, capture_output=True, text=True, check=True
  )
  assert int(done.stdout) < 4096, "a block of 256 MB has 65,536 pages"


@pytest.mark.slow
def test_no_block_is_too_large_to_be_kept():
  """On glibc: one of 3 GiB, as a step of GPT-2 can need, is not mapped for itself."""
  code = """
import ctypes
from flaxlm.platform import keep_freed_memory
keep_freed_memory()
libc = ctypes.CDLL(None)
class Counts(ctypes.Structure):
  _fields_ = [(name, ctypes.c_size_t) for name in (
    "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
  )]
libc.mallinfo2.restype, libc.malloc.restype = Counts, ctypes.c_void_p
before = libc.mallinfo2().hblks
assert libc.malloc(ctypes.c_size_t(3 << 30))
print(libc.mallinfo2().hblks - before)
"""
  environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
  command = [sys.executable, "-c", code]
  done = subprocess.run(
    command, env=environment, capture_output=True, text=True, check=True
  )
  assert int(done.stdout) == 0


# -- Which rows a process needs ------------------------------------------------------------


@pytest.mark.parametrize(
  ("owned", "expected"),
  [
    # two processes, data over both
    ([{0, 1}, {2, 3}], [((0,), 2), ((1,), 2)]),
    # tensor over both: the same rows for both
    ([{0, 1}, {0, 1}], [((0,), 1), ((0,), 1)]),
    # two pairs, tensor over each pair
    ([{0}, {0}, {1}, {1}], [((0,), 2), ((0,), 2), ((1,), 2), ((1,), 2)]),
    # parts that lie apart, as on a torus of TPUs
    ([{0, 2}, {1, 3}], [((0, 2), 4), ((1, 3), 4)]),
    # processes of different sizes
    ([{0}, {1, 2, 3}], [((0,), 4), ((1, 2, 3), 4)]),
  ],
)
def test_every_process_sees_its_own_rows_and_all_see_every_row(owned, expected):
  table = dict(enumerate(owned))
  shards = len(set().union(*owned))
  parts = [merged(table, process, shards) for process in table]
  assert parts == expected
  for (mine, num_parts), wanted in zip(parts, owned, strict=True):
    size = shards // num_parts
    assert {part * size + n for part in mine for n in range(size)} == wanted


def test_rows_are_cut_over_data_and_tokens_over_context():
  sharding = batch_sharding(make_mesh({"data": 2, "fsdp": 2, "context": 2}))
  assert sharding.shard_shape((16, 32)) == (4, 16)


def test_a_batch_is_a_multiple_of_its_shards_and_micro_batches():
  def check(batch_size: int, accumulation_steps: int) -> None:
    data = DataConfig(batch_size=batch_size)
    training = TrainingConfig(accumulation_steps=accumulation_steps)
    check_batch(Config(data=data, training=training), make_mesh({"data": 8}).shape)

  check(16, 2)
  check(24, 3)
  with pytest.raises(ConfigError, match=r"of data=8 .* accumulation_steps=2") as caught:
    check(24, 2)
  assert caught.value.cure == "nearest: 32; or --mesh: data can be 1, 2, 3, 4, 6 or 12"


# What each axis has to divide, of a config that all others suit.
FITTING = {
  "data": (
    6,
    dict(),
    "data.batch_size=16",
    "nearest: 18; or --mesh: data can be 1, 2, 4 or 8",
  ),
  "fsdp": (3, dict(data=2), "data.batch_size=16", "; or --mesh: fsdp can be 1, 2 or 4"),
  "context": (3, dict(), "data.seq_len=64", "63; or --mesh: context can be 1, 2 or 4"),
  "stage": (3, dict(), "model.depth=4", "nearest: 3; or --mesh: stage can be 1, 2 or 4"),
  "expert": (3, dict(), "model.moe.num_experts = 8", "expert can be 1, 2 or 4"),
  "tensor": (3, dict(), "model.num_heads=8 and model.num_kv_heads=2", "1, 2, 4 or 8"),
}


@pytest.mark.parametrize("axis", MESH_AXES)
def test_an_axis_that_divides_nothing_tells_which_sizes_would(axis: str):
  size, others, cause, cure = FITTING[axis]
  batch = 48 if axis in ("stage", "expert") else 16
  cfg = Config(
    model=heads(8, 2, depth=4, vocab_size=192, moe=MoEConfig(num_experts=8)),
    data=DataConfig(batch_size=batch, seq_len=64),
  )
  sizes = mesh_shape({axis: size, **others})
  with pytest.raises(ConfigError) as caught:
    check_batch(cfg.resolve(), sizes)
    for name, dim in (("embed", 64), ("experts", 8)):
      partition_spec([name], [dim], split_sizes(sizes, cfg.model))
  assert cause in caught.value.cause and caught.value.cure.endswith(cure)


def test_one_process_needs_everything(mesh: Mesh):
  assert batch_parts(mesh, 0) == ((0,), 1)
