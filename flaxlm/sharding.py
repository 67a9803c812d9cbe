# SPDX-License-Identifier: Apache-2.0
"""Where every array lives: the device mesh and the one table from names to its axes.

Parameters and activations carry *logical* names ("embed", "heads"); `RULES` says on which
mesh axis each lies. Nothing else decides a layout, and nothing is silently replicated:
an unknown name, two dims on one mesh axis and an indivisible dim are errors.
"""

import ctypes
import functools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flaxlm.config import (
  MESH_AXES,
  SLOW,
  Config,
  MeshConfig,
  TrainingConfig,
  mesh_sizes,
  slow_axes,
)
from flaxlm.errors import ConfigError
from flaxlm.xla_flags import Flag, flags_for, set_flags

# Logical name -> mesh axes. Parameters: `embed` over fsdp is ZeRO-3 (Rajbhandari et al.,
# 2020), `heads`, `ffn` and `vocab` over tensor are Megatron's cuts (Shoeybi et al., 2019).
RULES: Mapping[str, tuple[str, ...]] = {
  # parameters
  "layers": ("stage",),  # each stage of a pipeline its own
  "vocab": ("tensor",),
  "embed": ("fsdp",),
  "heads": ("tensor",),
  "kv_heads": ("tensor",),
  "head_dim": (),
  "ffn": ("tensor",),
  "hidden": ("tensor",),  # of a recurrent cell
  "experts": ("expert",),
  "expert_ffn": ("tensor",),
  "router": (),
  "slots": (),  # learned positions
  "norm": (),
  # activations
  # Tokens travel to the experts and back; around the pipeline its stages share the rows.
  "batch": ("stage", "data", "fsdp", "expert"),
  "length": ("context",),  # each device has its share of every row
  "norm_length": ("context", "tensor"),  # in norms, with training.sequence_parallel
  "key_length": (),  # of which all queries see all
  "act_embed": (),
  "act_heads": ("tensor",),
  "act_kv_heads": ("tensor",),
  "act_ffn": ("tensor",),
  "act_vocab": ("tensor",),
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
      split = " x ".join(f"{axis}={axis_sizes[axis]}" for axis in axes)
      cure = f"make it a multiple of {parts}, or change --mesh"
      if name in ("vocab", "act_vocab"):  # of a stored run: training and importing pad
        cure += "; a new run, or a new import, on this mesh pads it by itself"
      raise ConfigError(
        f"{FIELDS.get(name or '', name)} = {dim} cannot be split over mesh {split}",
        cure,
      )
    entries.append(axes or None)
  used = [axis for axes in entries if axes for axis in axes]
  if len(used) != len(set(used)):
    raise ValueError(f"{tuple(names)} puts two dims on one mesh axis: {used}")
  return PartitionSpec(*entries)


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """The mesh axes that cut a dim; a spec writes a single one without its tuple."""
  return (entry,) if isinstance(entry, str) else tuple(entry or ())


def axis_sizes_in_use() -> dict[str, int]:
  """The axes of the mesh that is set; within a stage of a pipeline there is no `stage`."""
  mesh = jax.sharding.get_abstract_mesh()
  return {axis: n for axis, n in mesh.shape.items() if axis not in mesh.manual_axes}


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Pins an activation to the layout of its logical names; no mesh set, no effect.

  Rows that `context` does not divide, such as a token that is being decoded, stay whole:
  training refuses them before it starts. Those that only `tensor` does not divide are not
  cut by it.
  """
  sizes = axis_sizes_in_use()
  if math.prod(sizes.values()) == 1:
    return x
  kept = [fitting(name, dim, sizes) for name, dim in zip(names, x.shape, strict=True)]
  spec = partition_spec(kept, x.shape, sizes)
  return jax.lax.with_sharding_constraint(x, spec)


def fitting(name: str | None, dim: int, sizes: Mapping[str, int]) -> str | None:
  """The name, or that of a coarser cut for rows that its axes do not divide."""
  coarser = {"norm_length": "length", "length": None}
  while name in coarser and dim % math.prod(sizes.get(axis, 1) for axis in RULES[name]):
    name = coarser[name]
  return name


def is_cut(name: str) -> bool:
  """Whether the mesh that is set cuts dims of this logical name."""
  sizes = axis_sizes_in_use()
  return any(sizes.get(axis, 1) > 1 for axis in RULES[name])


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
  """An abstract optimizer state, each leaf sharded as the parameter it belongs to.

  With `over_data` also over the copies of the parameter, where a dim divides: each copy
  updates its share (ZeRO-1; Rajbhandari et al., 2020, section 5.1).

  It belongs to the parameter with the same end of the path and the same shape; what has
  no such parameter (counters, factored moments) is replicated. Optax's and Flax's own
  routes fail for Muon and Adafactor; path and shape hold for all.
  """
  table = dict(jax.tree_util.tree_leaves_with_path(params))
  replicated = NamedSharding(mesh, PartitionSpec())

  def place(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
    twins = (table.get(path[start:]) for start in range(len(path)))
    shardings = [twin.sharding for twin in twins if twin and twin.shape == leaf.shape]
    sharding = shardings[0] if shardings else replicated
    if shardings and over_data:
      sharding = NamedSharding(mesh, cut_further(sharding.spec, leaf.shape, mesh, "data"))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree_util.tree_map_with_path(place, tree)


class Replication(NamedTuple):
  """Parameters that the mesh could cut, but every device has whole."""

  fraction: float  # of all parameters' bytes
  largest: str  # the largest of them; "" if there is none


def find_replication(params: Any, sizes: Mapping[str, int]) -> Replication:
  """What `fsdp`, `tensor` and `expert` leave whole of an abstract tree, if in use."""
  whole, total = {}, 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    size = leaf.size * leaf.dtype.itemsize
    total += size
    cut = {axis for entry in leaf.sharding.spec for axis in axes_of(entry)}
    if not any(sizes[axis] > 1 for axis in cut):
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
      f"{found.fraction:.1%} of the parameters' bytes lie whole on every device, above "
      f"training.replication_tolerance={tolerance:g}; the largest is {found.largest}",
      "use an axis that cuts it (`flaxlm shard` says which), or raise the tolerance",
    )


def cut_further(
  spec: PartitionSpec, shape: Sequence[int], mesh: Any, axis: str
) -> PartitionSpec:
  """`spec` with the largest shard that `axis` divides cut by it; as it is if none is."""
  cuts = [axes_of(entry) for entry in spec]
  parts = [math.prod(mesh.shape[a] for a in cut) for cut in cuts]
  sizes = [dim // n for dim, n in zip(shape, parts, strict=True)]
  dims = [n for n, size in enumerate(sizes) if size % mesh.shape[axis] == 0]
  if not dims:
    return spec
  dim = max(dims, key=lambda n: sizes[n])
  cuts[dim] = (*cuts[dim], axis)
  return PartitionSpec(*(cut or None for cut in cuts))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over every data-parallel axis, cut over `context`: each leaf of a `Batch`."""
  return NamedSharding(mesh, PartitionSpec(RULES["batch"], RULES["length"]))


def batch_shards(axis_sizes: Mapping[str, int]) -> int:
  """How many parts a batch is cut into."""
  return math.prod(axis_sizes[axis] for axis in RULES["batch"])


def least_rows(training: TrainingConfig, sizes: Mapping[str, int]) -> int:
  """What the rows of a micro-batch are a multiple of: each device has some of them, and
  in a pipeline some of every microbatch."""
  stages = sizes["stage"]
  microbatches = training.pipeline_microbatches or stages
  return batch_shards(sizes) * (microbatches // stages if stages > 1 else 1)


def on_host(x: jax.Array) -> np.ndarray:
  """The whole of an array; every process has to ask, if some of it is on other hosts."""
  if x.is_fully_addressable or x.is_fully_replicated:
    return np.asarray(x)
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))


@functools.lru_cache(maxsize=8)
def batch_parts(mesh: Mesh, process: int) -> tuple[tuple[int, ...], int]:
  """Which parts of a batch a process needs, and how many parts there are.

  A process that has devices of several parts gets them all; processes between which only
  other axes are cut need the same. Parts that lie side by side count as one, as far as
  all processes have them so.
  """
  shards = batch_shards(mesh.shape)
  rows = NamedSharding(mesh, PartitionSpec(RULES["batch"]))
  slices = rows.devices_indices_map((shards,))
  owned: dict[int, set[int]] = {}
  for device in mesh.devices.flat:
    (part,) = slices[device]
    owned.setdefault(device.process_index, set()).add(part.indices(shards)[0])
  return merged(owned, process, shards)


def merged(
  owned: Mapping[int, set[int]], process: int, shards: int
) -> tuple[tuple[int, ...], int]:
  """`batch_parts` of what each process owns of so many shards."""
  size = min(map(len, owned.values()))
  aligned = all(
    len(mine) == size and min(mine) % size == 0 and max(mine) - min(mine) == size - 1
    for mine in owned.values()
  )
  if aligned:
    return (min(owned[process]) // size,), shards // size
  return tuple(sorted(owned[process])), shards


def check_batch(cfg: Config, sizes: Mapping[str, int]) -> None:
  """Refuses, by `ConfigError`, a batch or rows that a mesh cannot share out evenly."""
  check_stages(cfg, sizes)
  accumulation, size = cfg.training.accumulation_steps, cfg.data.batch_size
  shards = least_rows(cfg.training, sizes) * accumulation
  if size % shards:
    factors = [f"{axis}={sizes[axis]}" for axis in RULES["batch"]]
    if sizes["stage"] == 1:
      del factors[0]
    elif cfg.training.pipeline_microbatches is not None:
      factors[0] = f"pipeline_microbatches={cfg.training.pipeline_microbatches}"
    axes = " x ".join(factors)
    raise ConfigError(
      f"data.batch_size={size} is not a multiple of {axes} x "
      f"accumulation_steps={accumulation}",
      f"nearest: {max(1, round(size / shards)) * shards}",
    )
  for name in ("seq_len", "source_len"):
    length, parts = getattr(cfg.data, name), sizes["context"]
    if length is not None and length % parts:
      raise ConfigError(
        f"data.{name}={length} is not a multiple of mesh context={parts}",
        f"nearest: {max(1, round(length / parts)) * parts}",
      )


def check_stages(cfg: Config, sizes: Mapping[str, int]) -> None:
  """Refuses, by `ConfigError`, a pipeline whose stages would not all do the same."""
  stages, training, model = sizes["stage"], cfg.training, cfg.model
  if stages == 1:
    return
  if model.family == "rnn":
    raise ConfigError("mesh axis stage is for transformers", "leave it out")
  repeats, microbatches = training.pipeline_repeats, training.pipeline_microbatches
  rounds = f"mesh stage={stages} x training.pipeline_repeats={repeats}"
  depths = {"depth": model.depth}
  if model.family == "encoder_decoder":
    depths["encoder_depth"] = model.encoder_depth or model.depth
  for name, depth in depths.items():
    if depth % (stages * repeats):
      raise ConfigError(
        f"model.{name}={depth} is not a multiple of {rounds}",
        f"nearest: {max(1, round(depth / (stages * repeats))) * stages * repeats}",
      )
    visit = depth // (stages * repeats)
    kinds = [model.period[n % len(model.period)] for n in range(depth)]
    if kinds != kinds[:visit] * stages * repeats:
      raise ConfigError(
        f"model.layer_pattern={model.layer_pattern} differs from stage to stage: each has "
        f"{visit} layers at a time (model.{name}={depth} / ({rounds}))",
        "a stage has to hold whole patterns",
      )
  if microbatches is not None and microbatches % stages:
    raise ConfigError(
      f"training.pipeline_microbatches={microbatches} is not a multiple of mesh "
      f"stage={stages}",
      f"nearest: {max(1, round(microbatches / stages)) * stages}",
    )
  if repeats > 1 and training.remat == "none":
    raise ConfigError(
      f"training.pipeline_repeats={repeats} with training.remat=none would keep the "
      "weights of every visit for the backward pass",
      "--training.remat=dots, or any other",
    )


def make_mesh(mesh: MeshConfig) -> Mesh:
  """The mesh of all devices; axes not named have size 1, one size may be -1 (the rest).

  Axes on the slow network join slices or hosts; all others stay within each of them.
  Raises `ConfigError` when the sizes do not use every device, or not as they lie.
  """
  sizes, num_devices = mesh_sizes(mesh), jax.device_count()
  known = math.prod(size for size in sizes.values() if size != -1)
  shape = {axis: sizes.get(axis, 1) for axis in MESH_AXES}
  for axis, size in shape.items():
    if size == -1:
      shape[axis] = num_devices // known
  total = math.prod(shape.values())
  if total != num_devices:
    text = ",".join(f"{axis}={size}" for axis, size in mesh.items())
    needed = f"a multiple of {known}" if -1 in sizes.values() else total
    raise ConfigError(
      f"mesh {text} needs {needed} devices, {num_devices} present",
      f"use --mesh data={num_devices}"
      + ("" if -1 in sizes.values() else ", or let one axis be -1")
      + (", or --simulated_devices=N on a CPU" if num_devices == 1 else ""),
    )
  # Linen's logical names and GSPMD's propagation need Auto axes; make_mesh's default
  # has been Explicit since jax 0.9.
  types = (AxisType.Auto,) * len(shape)
  if slow := slow_axes(mesh):
    grid = hybrid_grid(shape, slow, jax.devices())
    return Mesh(grid, tuple(shape), axis_types=types)
  return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=types)


def describe_mesh(sizes: Mapping[str, int], slow: Sequence[str] = ()) -> str:
  """The axes in use, as `--mesh` takes them."""
  used = {axis: size for axis, size in sizes.items() if size > 1}
  texts = (f"{axis}={n}{SLOW if axis in slow else ''}" for axis, n in used.items())
  return ",".join(texts) or "data=1"


def hybrid_grid(
  sizes: Mapping[str, int], slow: Sequence[str], devices: Sequence[Any]
) -> np.ndarray:
  """The devices of a mesh whose `slow` axes go from one slice or host to the next.

  Slices are what the devices say they are of (TPUs, and GPUs by host), else every
  process is a host. The simulated devices of one process have neither: there
  every slice is a run of them. Raises `ConfigError` when the slow sizes' product is not
  the number of slices or hosts.
  """
  outer, inner = networks(sizes, slow)
  count = lambda name: len({getattr(device, name, 0) for device in devices})
  slices, hosts = count("slice_index"), count("process_index")
  if slices == hosts == 1 and devices[0].platform == "cpu":
    return consecutive_grid(outer, inner, devices)
  by_process = slices == 1 and devices[0].platform != "tpu"
  found, kind = (hosts, "hosts") if by_process else (slices, "slices")
  if math.prod(outer) != found:
    text = " x ".join(f"{axis}={sizes[axis]}" for axis in slow)
    raise ConfigError(
      f"mesh {text} on the slow network needs {math.prod(outer)} {kind}, {found} present",
      "leave @dcn out" if found == 1 else f"sizes with @dcn have to make {found}",
    )
  options = dict(process_is_granule=by_process, allow_split_physical_axes=True)
  return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, **options)


def networks(sizes: Mapping[str, int], slow: Sequence[str]) -> tuple[list[int], list[int]]:
  """The sizes of all axes on the network between slices or hosts, and within them."""
  outer = [size if axis in slow else 1 for axis, size in sizes.items()]
  return outer, [size // n for size, n in zip(sizes.values(), outer, strict=True)]


def consecutive_grid(
  outer: Sequence[int], inner: Sequence[int], devices: Sequence[Any]
) -> np.ndarray:
  """`devices` in their order, those of one place in `outer` side by side in `inner`."""
  grid = np.array(devices, object).reshape(*outer, *inner)
  axes = [axis for n in range(len(outer)) for axis in (n, n + len(outer))]
  return grid.transpose(axes).reshape([a * b for a, b in zip(outer, inner, strict=True)])


def start_jax(
  simulated_devices: int | None = None, cache_dir: Path | None = None
) -> tuple[Flag, ...]:
  """Sets JAX up, once, from a door: devices, memory, and the persistent compile cache.

  Returns the flags of XLA that it set. Raises `ConfigError` when the devices cannot be
  had.
  """
  keep_freed_memory()
  flags: tuple[Flag, ...] = ()
  if simulated_devices is None:
    flags = set_flags(os.environ, flags_for(os.environ))
  if simulated_devices is not None:
    if os.environ.get("JAX_PLATFORMS", "cpu") != "cpu":
      raise ConfigError("simulated_devices works on the CPU only", "set JAX_PLATFORMS=cpu")
    jax.config.update("jax_platforms", "cpu")
    try:
      jax.config.update("jax_num_cpu_devices", simulated_devices)
    except RuntimeError:  # the backend is up already: a notebook or a test process
      if jax.device_count() != simulated_devices:
        raise ConfigError(
          f"JAX already runs with {jax.device_count()} devices",
          "set simulated_devices before the first use of JAX",
        ) from None
  if cache_dir is not None and jax.config.values["jax_compilation_cache_dir"] is None:
    cache_dir.mkdir(parents=True, exist_ok=True)
    cache_dir.chmod(0o700)  # what lies here is executed: nobody else may write it
    jax.config.update("jax_compilation_cache_dir", str(cache_dir))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  return flags


def keep_freed_memory() -> None:
  """Tells glibc's malloc to keep what a step frees for the next step, on the CPU.

  By default every large buffer of every step is mapped from the kernel anew, page by
  page: a sixth to a third of the time of a training step on two cores (docs/LOG.md).
  What the user has set in the environment stands; other C libraries are left alone.

  Only the main thread's arena can keep blocks above 64 MiB, so a program runs in the
  thread that calls it. One arena for all threads would do too, but then they wait for
  each other: compiling took up to twice as long.
  """
  libc = ctypes.CDLL(None)
  user_set = any(name.startswith("MALLOC_") for name in os.environ)
  if user_set or not hasattr(libc, "gnu_get_libc_version"):
    return
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  mmap_threshold, trim_threshold = -3, -1  # malloc.h
  libc.mallopt(mmap_threshold, 2**31 - 1)
  libc.mallopt(trim_threshold, -1)  # never
