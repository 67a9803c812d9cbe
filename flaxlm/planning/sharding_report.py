# SPDX-License-Identifier: Apache-2.0
"""`flaxlm shard`: how each parameter is sharded and why, and what a step sends for it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import flax.linen as nn
import jax
from rich.console import Console
from rich.table import Table

from flaxlm.config import MeshConfig, ResolvedConfig, mesh_shape, slow_axes
from flaxlm.nn.models import boxed_shapes, build_model
from flaxlm.planning.collectives import Collective
from flaxlm.planning.compile import CompiledStep, compile_step
from flaxlm.planning.devices import ANY, Device, find_device
from flaxlm.planning.memory import (
  Sizes,
  abstract_mesh,
  local_size,
  state_bytes,
)
from flaxlm.planning.network import axis_bandwidth, network_bytes
from flaxlm.planning.report import duration, size
from flaxlm.sharding import (
  RULES,
  Replication,
  axes_of,
  describe_mesh,
  find_replication,
  name_of,
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
  """How all parameters of a config are sharded over a mesh; bytes are per device."""

  name: str
  sizes: Sizes
  parameters: Sequence[ParameterSharding]
  parameter_bytes: int
  optimizer_bytes: int
  whole_bytes: int  # of the parameters, unsharded
  replication: Replication
  analytic: Mapping[str, float]  # bytes that one device sends in a step, by mesh axis
  bandwidth: Mapping[str, float | None]  # bytes per second, by mesh axis; None: not known
  compiled: CompiledStep | None
  padding: str = ""  # a line about the padding of the vocabulary, if it has any
  slow: Sequence[str] = ()  # axes on the network between slices or hosts

  @property
  def collectives(self) -> Sequence[Collective]:
    return [] if self.compiled is None else self.compiled.collectives


def report_sharding(
  cfg: ResolvedConfig, mesh: MeshConfig, device: str | None, compiled: bool
) -> ShardingReport:
  """How the parameters of a resolved config are sharded and, if `compiled`, which
  collectives its training step has when it is compiled for `device` (None: for simulated
  CPU devices).

  Raises `ConfigError` for a mesh that the config does not divide over.
  """
  sizes, slow = mesh_shape(mesh), slow_axes(mesh)
  model = cfg.model.padded(sizes["tensor"])
  cfg = dataclasses.replace(cfg, mesh=dict(mesh), model=model)
  target: Device = ANY if device is None else find_device(device)
  boxed = boxed_shapes(build_model(model, cfg.training))
  params = with_shardings(boxed, abstract_mesh(sizes))
  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
  boxes = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box)
  parameters = [
    describe_parameter(path, box.names, leaf, sizes)
    for (path, box), leaf in zip(boxes, jax.tree.leaves(params), strict=True)
  ]
  state = state_bytes(cfg, sizes)
  analytic = network_bytes(cfg, sizes)
  return ShardingReport(
    name=cfg.name or "config",
    sizes=sizes,
    parameters=parameters,
    parameter_bytes=state.parameters,
    optimizer_bytes=state.optimizer_state,
    whole_bytes=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params)),
    replication=find_replication(params, sizes),
    analytic=analytic,
    bandwidth={axis: axis_bandwidth(target, sizes, axis, slow) for axis in analytic},
    compiled=compile_step(cfg, sizes, target) if compiled else None,
    padding=model.padding,
    slow=slow,
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
    spec=tuple(
      tuple(axis for axis in axes_of(entry) if sizes[axis] > 1) or None
      for entry in leaf.sharding.spec
    ),
    bytes_per_device=local_size(leaf) * leaf.dtype.itemsize,
    reason=explain(names, sizes),
  )


def explain(names: Sequence[str], sizes: Sizes) -> str:
  """Why an array with these logical names is cut as it is, or is not cut."""
  cuts, idle = [], []
  for name in names:
    for axis in RULES[name]:
      if sizes[axis] > 1:
        cuts.append(f"{name} over {axis}={sizes[axis]}: {REASONS[name]}")
      elif name != "layers":  # a pipeline is more than a way to cut parameters
        idle.append(f"{axis} would cut {name}")
  if cuts:
    return "; ".join(cuts)
  if idle:
    return f"whole: {', '.join(idle)}, but has one device"
  return "whole: " + "; ".join(f"{name}: {REASONS[name]}" for name in names[-1:])


# -- For scripts and people ----------------------------------------------------------------


def to_json(report: ShardingReport) -> dict[str, Any]:
  """The report in the schema that scripts rely on (docs/design.md, section 2)."""
  return {
    "name": report.name,
    "mesh": {axis: n for axis, n in report.sizes.items() if n > 1},
    "slow_axes": list(report.slow),
    "parameters": [dataclasses.asdict(one) for one in report.parameters],
    "collectives": [dataclasses.asdict(one) for one in report.collectives],
    "bytes_per_device": {
      "parameters": report.parameter_bytes,
      "optimizer_state": report.optimizer_bytes,
    },
    "whole_bytes": report.whole_bytes,
    "replicated_fraction": report.replication.fraction,
    "analytic_bytes": dict(report.analytic),
    "bytes_per_second": dict(report.bandwidth),
    "compiled_for": report.compiled and report.compiled.target,
    "error": report.compiled and report.compiled.error,
  }


def print_sharding(report: ShardingReport, out: TextIO) -> None:
  """The report as tables."""
  console = Console(file=out, highlight=False, width=None if out.isatty() else 120)
  devices = math.prod(report.sizes.values())
  mesh = describe_mesh(report.sizes, report.slow)
  console.print(f"{report.name} on {mesh}: {devices} devices")
  console.print(f"{report.padding}\n" if report.padding else "")
  table = Table(title="Parameters", title_justify="left", box=None, padding=(0, 2, 0, 0))
  for title in ("", "parameter", "shape", "dims:axes", "per device"):
    justify: Any = "right" if title == "per device" else "left"
    table.add_column(title, justify=justify, overflow="fold")
  notes: dict[str, int] = {}
  for one in report.parameters:
    note = notes.setdefault(one.reason, len(notes) + 1)
    dims = [
      f"{name}:{'+'.join(axes)}" if axes else name
      for name, axes in zip(one.logical, one.spec, strict=True)
    ]
    shape = "x".join(map(str, one.shape))
    cells = (f"({note})", one.name, shape, " ".join(dims), size(one.bytes_per_device))
    table.add_row(*cells)
  console.print(table, "")
  for reason, note in notes.items():
    console.print(f"({note}) {reason}")
  share = report.parameter_bytes / report.whole_bytes
  console.print(
    "",
    f"parameters per device       {size(report.parameter_bytes)} "
    f"({share:.2%} of {size(report.whole_bytes)})",
    f"optimizer state per device  {size(report.optimizer_bytes)}",
    f"left whole                  {report.replication.fraction:.3%} of the bytes that "
    "the mesh could cut",
    "",
    sep="\n",
  )
  if report.compiled is not None:
    print_collectives(report, report.compiled, console)
  print_traffic(report, console)


def print_collectives(
  report: ShardingReport, compiled: CompiledStep, console: Console
) -> None:
  title = f"Collectives of one step, compiled for {compiled.target}; bytes sent per device"
  if compiled.error is not None:
    console.print(f"{title}: {compiled.error}")
    return
  table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
  for title in ("kind", "axes", "count", "bytes"):
    table.add_column(title, justify="left" if title in ("kind", "axes") else "right")
  for one in report.collectives:
    table.add_row(one.kind, one.axes, str(one.count), size(one.bytes))
  console.print(table, "")


def print_traffic(report: ShardingReport, console: Console) -> None:
  """Along each axis: the bytes by the formula, those of the compiled step, the seconds."""
  for axis, expected in report.analytic.items():
    texts = [f"{size(round(expected))} by the formula"]
    if report.compiled is not None and report.compiled.error is None:
      found = sum(c.bytes for c in report.collectives if axis in c.axes.split("+"))
      # Between slices a TPU sends through its hosts, and its program has no collective.
      hidden = axis in report.slow and not found
      texts.insert(0, "sent by the hosts" if hidden else f"{size(found)} compiled")
    rate = report.bandwidth[axis]
    if rate:
      texts.append(f"{duration(expected / rate)} at {rate / 1e9:g} GB/s")
    where = " (data-centre network)" if axis in report.slow else ""
    console.print(f"{axis}{where}: {', '.join(texts)}")
