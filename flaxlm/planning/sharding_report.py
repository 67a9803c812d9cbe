# SPDX-License-Identifier: Apache-2.0
"""`flaxlm shard`: how each parameter is sharded and why, and what a step sends for it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TextIO

import flax.linen as nn
import jax

from flaxlm.config import MeshConfig, ResolvedConfig, mesh_shape, slow_axes
from flaxlm.devices import ANY, Device, find_device
from flaxlm.nn.models import boxed_shapes, build_model
from flaxlm.planning.collectives import Collective
from flaxlm.planning.compile import compile_step
from flaxlm.planning.memory import (
  Sizes,
  abstract_mesh,
  check_layout,
  local_size,
  state_bytes,
)
from flaxlm.planning.network import axis_bandwidth, network_bytes
from flaxlm.planning.tables import duration, named_axis, print_table, size, wide_console
from flaxlm.sharding import (
  RULES,
  axes_of,
  describe_mesh,
  find_replication,
  name_of,
  offering,
  split_sizes,
  whole_sizes,
  with_shardings,
)

# The reason for each rule of `sharding.RULES`, by logical name.
REASONS: Mapping[str, str] = {
  "embed": "every kernel's model width is cut, and gathered for its layer only (ZeRO-3)",
  "heads": "whole query heads: attention needs no exchange, its output one sum (Megatron)",
  "kv_heads": "with the query heads that read them",
  "ffn": "columns of up and gate, rows of down: one sum per layer (Megatron)",
  "vocab": "rows of the table, columns of the logits: the softmax sums over them",
  "hidden": "gates and state of the recurrent cells",
  "experts": "whole experts; tokens travel to them",
  "expert_ffn": "each expert is cut like a feed-forward",
  "layers": "stacked; each stage of a pipeline holds its own",
  "head_dim": "attention needs all dims of a head together",
  "norm": "a vector; cutting it would cost more than it saves",
  "router": "every token scores every expert",
  "slots": "looked up by position",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterSharding:
  """One parameter: its logical names by dim, the mesh axes that cut each, and why."""

  name: str
  shape: tuple[int, ...]
  dtype: str
  logical: tuple[str, ...]
  spec: tuple[tuple[str, ...] | None, ...]
  bytes_per_device: int
  reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingReport:
  """How all parameters of a config are sharded over a mesh, and what a step sends.

  The fields are the schema that scripts rely on (docs/design.md, section 2).
  """

  name: str
  mesh: Mapping[str, int]  # the axes in use
  slow_axes: Sequence[str]  # those on the network between slices or hosts
  parameters: Sequence[ParameterSharding]
  collectives: Sequence[Collective]  # of a compiled step
  bytes_per_device: Mapping[str, int]  # of parameters and optimizer_state
  whole_bytes: int  # of the parameters, unsharded
  replicated_fraction: float  # of their bytes: left whole, though the mesh could cut them
  analytic_bytes: Mapping[str, float]  # that one device sends in a step, by mesh axis
  bytes_per_second: Mapping[str, float | None]  # by mesh axis; None: not known
  compiled_for: str | None  # None: the step was not compiled
  error: str | None  # why the compiler refused
  padding: str  # a line about the padding of the vocabulary, if it has any


def report_sharding(
  cfg: ResolvedConfig, mesh: MeshConfig, device: str | None, compiled: bool
) -> ShardingReport:
  """How the parameters of a resolved config are sharded and, if `compiled`, which
  collectives its training step has when it is compiled for `device` (None: for simulated
  CPU devices).

  Raises `ConfigError` for a mesh that the config does not divide over.
  """
  sizes, slow = mesh_shape(mesh), slow_axes(mesh)
  with offering(lambda axis, n: check_layout(cfg, {**sizes, axis: n})):
    check_layout(cfg, sizes)
  model = cfg.model.padded(sizes["tensor"])
  cfg = dataclasses.replace(cfg, mesh=dict(mesh), model=model)
  target: Device = ANY if device is None else find_device(device)
  boxed = boxed_shapes(build_model(model, cfg.training))
  params = with_shardings(boxed, abstract_mesh(sizes, model))
  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
  boxes = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box)
  split = split_sizes(sizes, model)
  parameters = [
    describe_parameter(path, box.names, leaf, split)
    for (path, box), leaf in zip(boxes, jax.tree.leaves(params), strict=True)
  ]
  state = state_bytes(cfg, sizes)
  sent = network_bytes(cfg, sizes)
  step = compile_step(cfg, sizes, target) if compiled else None
  return ShardingReport(
    name=cfg.name or "config",
    mesh={axis: size for axis, size in sizes.items() if size > 1},
    slow_axes=slow,
    parameters=parameters,
    collectives=() if step is None else step.collectives,
    bytes_per_device={
      "parameters": state.parameters,
      "optimizer_state": state.optimizer_state,
    },
    whole_bytes=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params)),
    replicated_fraction=find_replication(params, sizes).fraction,
    analytic_bytes=sent,
    bytes_per_second={axis: axis_bandwidth(target, sizes, axis, slow) for axis in sent},
    compiled_for=None if step is None else step.target,
    error=None if step is None else step.error,
    padding=model.padding,
  )


def describe_parameter(
  path: tuple, names: tuple[str, ...], leaf: jax.ShapeDtypeStruct, sizes: Sizes
) -> ParameterSharding:
  assert isinstance(leaf.sharding, jax.sharding.NamedSharding)
  return ParameterSharding(
    name=name_of(path),
    shape=leaf.shape,
    dtype=str(leaf.dtype),
    logical=names,
    spec=tuple(axes_in_use(entry, sizes) or None for entry in leaf.sharding.spec),
    bytes_per_device=local_size(leaf) * leaf.dtype.itemsize,
    reason=explain(names, sizes),
  )


def axes_in_use(entry: str | tuple[str, ...] | None, sizes: Sizes) -> tuple[str, ...]:
  """The axes of a spec's entry that cut something, as a user names them."""
  return tuple(whole_sizes({axis: 1 for axis in axes_of(entry) if sizes[axis] > 1}))


def explain(names: Sequence[str], sizes: Sizes) -> str:
  """Why an array with these logical names is cut as it is, or is not cut, on a mesh whose
  axes are those of `split_sizes`."""
  cuts, idle, whole = [], [], whole_sizes(sizes)
  for name in names:
    by_axis = whole_sizes({axis: sizes.get(axis, 1) for axis in RULES[name]})
    for axis, parts in by_axis.items():
      if whole[axis] > 1:
        cuts.append(f"{name} over {axis}={whole[axis]}: {REASONS[name]}")
        if parts < whole[axis]:
          cuts[-1] += f", each on {whole[axis] // parts} devices"
      elif name != "layers":  # a pipeline is more than a way to cut parameters
        idle.append(f"{axis} would cut {name}")
  if cuts:
    return "; ".join(cuts)
  if idle:
    return f"whole: {', '.join(idle)}, but has one device"
  return "whole: " + "; ".join(f"{name}: {REASONS[name]}" for name in names[-1:])


# -- For people ----------------------------------------------------------------------------


def print_sharding(report: ShardingReport, out: TextIO) -> None:
  """The report as tables."""
  console = wide_console(out)
  mesh = describe_mesh(report.mesh, report.slow_axes)
  console.print(f"{report.name} on {mesh}: {math.prod(report.mesh.values())} devices")
  console.print(f"{report.padding}\n" if report.padding else "")
  reasons = list(dict.fromkeys(one.reason for one in report.parameters))
  columns = ("", "parameter", "shape", "dims:axes", "per device")
  rows = [_row(one, 1 + reasons.index(one.reason)) for one in report.parameters]
  print_table(console, "Parameters", columns, rows, left=4)
  for note, reason in enumerate(reasons, 1):
    console.print(f"({note}) {reason}")
  local = report.bytes_per_device
  share = local["parameters"] / report.whole_bytes
  console.print(
    "",
    f"parameters per device       {size(local['parameters'])} "
    f"({share:.2%} of {size(report.whole_bytes)})",
    f"optimizer state per device  {size(local['optimizer_state'])}",
    f"left whole                  {report.replicated_fraction:.3%} of the bytes that "
    "the mesh could cut",
    "",
    sep="\n",
  )
  if report.compiled_for is not None:
    title = f"Collectives of one step, compiled for {report.compiled_for}; "
    title += "bytes sent per device"
    if report.error is None:
      sent = [(c.kind, c.axes, str(c.count), size(c.bytes)) for c in report.collectives]
      print_table(console, title, ("kind", "axes", "count", "bytes"), sent, left=2)
    else:
      console.print(f"{title}: {report.error}")
  for axis in report.analytic_bytes:
    console.print(f"{named_axis(axis, report.slow_axes)}: {_traffic(report, axis)}")


def _row(one: ParameterSharding, note: int) -> Sequence[str]:
  dims = [
    f"{name}:{'+'.join(axes)}" if axes else name
    for name, axes in zip(one.logical, one.spec, strict=True)
  ]
  shape = "x".join(map(str, one.shape))
  return f"({note})", one.name, shape, " ".join(dims), size(one.bytes_per_device)


def _traffic(report: ShardingReport, axis: str) -> str:
  """Bytes along an axis by the formula, those of the compiled step, and the seconds."""
  expected = report.analytic_bytes[axis]
  texts = [f"{size(round(expected))} by the formula"]
  if report.compiled_for is not None and report.error is None:
    found = sum(c.bytes for c in report.collectives if axis in c.axes.split("+"))
    # Between slices a TPU sends through its hosts, and its program has no collective.
    hidden = axis in report.slow_axes and not found
    texts.insert(0, "sent by the hosts" if hidden else f"{size(found)} compiled")
  rate = report.bytes_per_second[axis]
  if rate:
    texts.append(f"{duration(expected / rate)} at {rate / 1e9:g} GB/s")
  return ", ".join(texts)
