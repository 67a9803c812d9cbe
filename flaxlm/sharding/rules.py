# SPDX-License-Identifier: Apache-2.0
"""The one table from logical names to mesh axes, and the shardings that follow from it.

The dims of parameters and activations have *logical* names ("embed", "heads"); `RULES` says
over which mesh axes each is sharded. Nothing else decides a layout, and nothing is silently
replicated: an unknown name, two dims on one mesh axis and an indivisible dim are errors.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flaxlm.errors import ConfigError
from flaxlm.sharding.heads import KV_COPIES, MOST_MEMBERS, MeshError, whole_sizes

# All members of the axis that a user calls tensor: sharding/heads.py has the reason.
TENSOR = ("tensor", KV_COPIES)

# Logical name -> mesh axes. Parameters: `embed` over fsdp is ZeRO-3 (Rajbhandari et al.,
# 2020), `heads`, `ffn` and `vocab` over tensor are Megatron's cuts (Shoeybi et al., 2019).
RULES: Mapping[str, tuple[str, ...]] = {
  # parameters
  "layers": ("stage",),  # each stage of a pipeline has its own
  "vocab": TENSOR,
  "embed": ("fsdp",),
  "heads": TENSOR,
  "kv_heads": ("tensor",),
  "head_dim": (),
  "ffn": TENSOR,
  "hidden": TENSOR,  # of a recurrent cell
  "experts": ("expert",),
  "expert_ffn": TENSOR,
  "router": (),
  "slots": (),  # learned positions
  "norm": (),
  # activations
  # Tokens are sent to the experts and back; outside the pipeline its stages share the rows.
  "batch": ("stage", "data", "fsdp", "expert"),
  "length": ("context",),  # each device has its share of every row
  "norm_length": ("context", *TENSOR),  # in norms, with training.sequence_parallel
  "key_length": (),  # whole: a query may see every key
  "act_embed": (),
  "act_heads": TENSOR,
  "act_kv_heads": ("tensor",),
  "act_ffn": TENSOR,
  "act_vocab": TENSOR,
}

# The config field behind a logical name: what a user changes when a dim does not divide.
FIELDS = {
  "layers": "model.depth",
  "vocab": "model.vocab_size",
  "act_vocab": "model.vocab_size",
  "embed": "model.width",
  "heads": "model.num_heads",
  "act_heads": "model.num_heads",
  "kv_heads": "model.num_kv_heads",
  "act_kv_heads": "model.num_kv_heads",
  "ffn": "model.ffn_width",
  "hidden": "model.width",
  "experts": "model.moe.num_experts",
  "expert_ffn": "model.moe.expert_width",
  "act_ffn": "model.ffn_width",
  "length": "data.seq_len",
  "norm_length": "data.seq_len",
  "batch": "data.batch_size / training.accumulation_steps",
}


def partition_spec(
  names: Sequence[str | None], shape: Sequence[int], axis_sizes: Mapping[str, int]
) -> PartitionSpec:
  """The spec of an array whose dims carry `names`, strictly by `RULES`.

  Raises `ValueError` for an unknown name, a wrong rank or a mesh axis used twice, and
  `ConfigError`, which names the field to change, for a dim that does not divide.
  """
  if len(names) != len(shape):
    raise ValueError(f"{len(names)} names {tuple(names)} for the shape {tuple(shape)}")
  entries: list[tuple[str, ...] | None] = []
  for name, dim in zip(names, shape, strict=True):
    if name is not None and name not in RULES:
      raise ValueError(f"no sharding rule for {name!r}; known: {', '.join(RULES)}")
    axes = tuple(axis for axis in RULES[name] if axis in axis_sizes) if name else ()
    parts = math.prod(axis_sizes[axis] for axis in axes)
    if dim % parts:
      sizes = whole_sizes({axis: axis_sizes[axis] for axis in axes})
      split = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
      more = ""
      if name in ("vocab", "act_vocab"):  # a stored run's: training and importing pad
        more = "; a new run, or a new import, on this mesh pads it by itself"
      raise MeshError(
        f"{FIELDS.get(name or '', name)} = {dim} cannot be split over mesh {split}",
        f"make it a multiple of {parts}, or change --mesh",
        sizes_for(dim, sizes, parts),
        ": ",
        more,
      )
    entries.append(axes or None)
  used = [axis for axes in entries if axes for axis in axes]
  if len(used) != len(set(used)):
    raise ValueError(f"{tuple(names)} puts two dims on one mesh axis: {used}")
  return PartitionSpec(*entries)


def sizes_for(dim: int, sizes: Mapping[str, int], parts: int) -> dict[str, list[int]]:
  """Which sizes of each axis in use, up to twice the one that it has, would split a dim.

  It is to be cut into `parts`, by these axes and perhaps by more.
  """
  found = {}
  for axis, size in sizes.items():
    others = parts // size
    most = min(2 * size, MOST_MEMBERS)
    if size > 1:
      found[axis] = [n for n in range(1, most + 1) if dim % (n * others) == 0]
  return found


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """The mesh axes of a spec's entry, which may have a single one without a tuple."""
  return (entry,) if isinstance(entry, str) else tuple(entry or ())


def axis_sizes_in_use() -> dict[str, int]:
  """The axes of the mesh that is set, without those whose traced code is one member's.

  These are `stage` in a pipeline, and `data` in training/accumulation.py.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return {axis: n for axis, n in mesh.shape.items() if axis not in mesh.manual_axes}


def is_one_member(axis: str) -> bool:
  """Whether the code that is traced is that of one member of a mesh axis (`shard_map`)."""
  return axis in jax.sharding.get_abstract_mesh().manual_axes


def on_members(
  function: Callable, in_specs: Any, out_specs: Any, check_vma: bool = True
) -> Callable:
  """`jax.shard_map` over all axes in use, where the code is perhaps one member's of others.

  By default JAX maps over the others, too, and sums gradients over them unless `check_vma`.
  With it, naming the axes has XLA compile without end (learned positions, three axes).
  """
  return jax.shard_map(
    function,
    in_specs=in_specs,
    out_specs=out_specs,
    axis_names=set() if check_vma else set(axis_sizes_in_use()),
    check_vma=check_vma,
  )


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Pins an activation to the layout of its logical names; without a mesh, does nothing.

  Rows that `context` does not divide, such as a single token in decoding, stay whole;
  training refuses them before it starts. Rows that only `tensor` does not divide are split
  over `context` alone.
  """
  sizes = axis_sizes_in_use()
  if math.prod(sizes.values()) == 1:
    return x
  kept = [fitting(name, dim, sizes) for name, dim in zip(names, x.shape, strict=True)]
  spec = partition_spec(kept, x.shape, sizes)
  return jax.lax.with_sharding_constraint(x, spec)


def fitting(name: str | None, dim: int, sizes: Mapping[str, int]) -> str | None:
  """The name, or one that splits rows less, if the name's axes do not divide them."""
  coarser = {"norm_length": "length", "length": None}
  while name in coarser and dim % math.prod(sizes.get(axis, 1) for axis in RULES[name]):
    name = coarser[name]
  return name


def cutting_axes(name: str) -> tuple[str, ...]:
  """The axes in use, of more than one member, that shard dims of this logical name."""
  sizes = axis_sizes_in_use()
  return tuple(axis for axis in RULES[name] if sizes.get(axis, 1) > 1)


def is_cut(name: str) -> bool:
  """Whether the mesh that is set shards dims of this logical name."""
  return bool(cutting_axes(name))


def with_shardings(boxed: Any, mesh: Mesh) -> Any:
  """An abstract tree of boxed (named) parameters, unboxed, each with its sharding."""

  def place(box: nn.LogicallyPartitioned) -> jax.ShapeDtypeStruct:
    array = box.value
    spec = partition_spec(box.names, array.shape, dict(mesh.shape))
    sharding = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

  # A parameter without a box has no names: `place` fails on it, as it should.
  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
  return jax.tree.map(place, boxed, is_leaf=is_box)


def like_parameters(tree: Any, params: Any, mesh: Mesh, over_data: bool = False) -> Any:
  """An abstract optimizer state, each leaf sharded like the parameter that it belongs to.

  With `over_data`, leaves are also sharded over the copies of the parameter, where a dim
  divides: each copy updates its share (ZeRO-1; Rajbhandari et al., 2020, section 5.1).

  A leaf belongs to the parameter whose path ends its own and which has its shape; a leaf
  without such a parameter (counters, factored moments) is replicated. Optax's and Flax's
  own ways fail for Muon and Adafactor, whereas path and shape work for all.
  """
  table = dict(jax.tree_util.tree_leaves_with_path(params))
  replicated = NamedSharding(mesh, PartitionSpec())

  def place(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
    found = (table.get(path[start:]) for start in range(len(path)))
    shardings = [param.sharding for param in found if param and param.shape == leaf.shape]
    sharding = shardings[0] if shardings else replicated
    if shardings and over_data:
      sharding = NamedSharding(mesh, cut_further(sharding.spec, leaf.shape, mesh, "data"))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree_util.tree_map_with_path(place, tree)


def cut_further(
  spec: PartitionSpec, shape: Sequence[int], mesh: Any, axis: str
) -> PartitionSpec:
  """`spec` with the dim sharded by `axis` that has the largest shard divisible by it; the
  same spec if there is none."""
  cuts = [axes_of(entry) for entry in spec]
  parts = [math.prod(mesh.shape[a] for a in cut) for cut in cuts]
  sizes = [dim // n for dim, n in zip(shape, parts, strict=True)]
  dims = [n for n, size in enumerate(sizes) if size % mesh.shape[axis] == 0]
  if not dims:
    return spec
  dim = max(dims, key=lambda n: sizes[n])
  cuts[dim] = (*cuts[dim], axis)
  return PartitionSpec(*(cut or None for cut in cuts))


class Replication(NamedTuple):
  """Parameters that the mesh could shard, but every device has whole."""

  fraction: float  # of all parameters' bytes
  largest: str  # the largest of them; "" if there is none


def find_replication(params: Any, sizes: Mapping[str, int]) -> Replication:
  """The parameters, of an abstract tree, that a mesh with `fsdp`, `tensor` or `expert`
  leaves whole on every device."""
  # Copies of a kv head are there for their query heads, and not by accident.
  sizes, whole, total = whole_sizes(sizes), {}, 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    size = leaf.size * leaf.dtype.itemsize
    total += size
    cut = {axis for entry in leaf.sharding.spec for axis in axes_of(entry)}
    if not any(sizes.get(axis, 1) > 1 for axis in cut):
      whole[name_of(path)] = size
  if all(sizes[axis] == 1 for axis in ("fsdp", "tensor", "expert")):
    whole = {}
  largest = max(whole, key=lambda name: whole[name], default="")
  return Replication(sum(whole.values()) / total, largest)


def name_of(path: tuple) -> str:
  """`blocks/ffn/up/kernel` for a leaf's path in a tree of parameters."""
  return "/".join(key.key for key in path)


def check_replication(params: Any, sizes: Mapping[str, int], tolerance: float) -> None:
  """Raises `ConfigError` when more than `tolerance` of the bytes is left whole."""
  found = find_replication(params, sizes)
  if found.fraction > tolerance:
    raise ConfigError(
      f"{found.fraction:.1%} of the parameters' bytes are whole on every device, above "
      f"training.replication_tolerance={tolerance:g}; the largest is {found.largest}",
      "use an axis that cuts it (`flaxlm shard` says which), or raise the tolerance",
    )
