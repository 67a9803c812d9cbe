# SPDX-License-Identifier: Apache-2.0
"""A plan as tables for people and as JSON for scripts."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from flaxlm.planning.compile import CompiledStep
from flaxlm.planning.decoding import DecodePoint
from flaxlm.planning.devices import ANY
from flaxlm.planning.roofline import Plan
from flaxlm.planning.search import Choice

MOST_CHOICES = 20  # of a search that the tables show; JSON has all


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """Everything that one call of `flaxlm plan` has found out."""

  name: str
  plan: Plan
  padding: str = ""  # a line about the padding of the vocabulary, if it has any
  tokens: float | None = None  # to train on
  price: float | None = None  # per device and hour
  cure: Choice | None = None  # the cheapest change that fits, if the plan does not
  choices: Sequence[Choice] = ()
  decoding: Sequence[DecodePoint] = ()
  compiled: CompiledStep | None = None

  @property
  def budget(self) -> float:
    return self.plan.optimal_tokens if self.tokens is None else self.tokens

  @property
  def device_hours(self) -> float | None:
    return self.plan.device_hours(self.budget)

  @property
  def cost(self) -> float | None:
    hours = self.device_hours
    return None if hours is None or self.price is None else hours * self.price


# -- JSON ------------------------------------------------------------------------------


def to_json(report: Report) -> dict[str, Any]:
  """The report in the schema that scripts rely on: bytes and seconds, not rounded."""
  plan, times = report.plan, report.plan.times
  result: dict[str, Any] = {
    "name": report.name,
    "device": plan.device.name,
    "mesh": {axis: size for axis, size in plan.sizes.items() if size > 1},
    "slow_axes": list(plan.slow),
    "num_devices": plan.num_devices,
    "parameters": sum(plan.parameters.values()),
    "parameters_by_part": dict(plan.parameters),
    "active_parameters": plan.active_parameters,
    "bytes_per_device": {**plan.memory.parts, "total": plan.memory.total},
    "peak_moment": plan.memory.peak,
    "bytes_by_moment": {name: dict(parts) for name, parts in plan.memory.moments.items()},
    "usable_bytes": plan.device.usable_bytes,
    "fits": plan.fits,
    "flops_per_step": {
      "strict": plan.cost.strict_flops,
      "loose": plan.cost.loose_flops,
      "executed": plan.cost.executed_flops,
    },
    "flops_per_token": plan.cost.strict_flops / plan.cost.tokens,
    "tokens_per_step": plan.cost.tokens,
    "seconds_by_part": {
      "compute": times.compute,
      "memory": times.memory,
      **{f"network:{axis}": time for axis, time in times.network.items()},
    },
    "bubble": times.bubble,
    "step_seconds": times.seconds,
    "tokens_per_second": plan.tokens_per_second,
    "tokens_per_day": plan.tokens_per_second and 86_400 * plan.tokens_per_second,
    "mfu": plan.mfu,
    "limited_by": times.limited_by,
    "chinchilla_tokens": plan.optimal_tokens,
    "budget": {
      "tokens": report.budget,
      "device_hours": report.device_hours,
      "cost": report.cost,
    },
  }
  if report.cure is not None:
    result["cheapest_fit"] = _choice(report.cure)
  if report.choices:
    result["search"] = [_choice(choice) for choice in report.choices]
  if report.decoding:
    result["decode"] = [dataclasses.asdict(point) for point in report.decoding]
  if report.compiled is not None:
    compiled = dataclasses.asdict(report.compiled)
    result["compiled"] = {
      **compiled,
      "analytic_bytes": plan.memory.total,
      "difference": report.compiled.difference(plan.memory.total),
    }
  return result


def _choice(choice: Choice) -> dict[str, Any]:
  plan, training = choice.plan, choice.cfg.training
  return {
    "mesh": {axis: size for axis, size in plan.sizes.items() if size > 1},
    "remat": training.remat,
    "accumulation_steps": training.accumulation_steps,
    "num_devices": plan.num_devices,
    "total_bytes": plan.memory.total,
    "fits": plan.fits,
    "step_seconds": plan.times.seconds,
    "mfu": plan.mfu,
    "limited_by": plan.times.limited_by,
    "flags": choice.flags,
  }


# -- Text ------------------------------------------------------------------------------


def print_report(report: Report, out: TextIO) -> None:
  """The report as tables, with the verdict last."""
  console = Console(file=out, highlight=False)
  plan = report.plan
  device = plan.device.name if plan.num_devices == 1 else f"{plan.num_devices} x"
  device += "" if plan.num_devices == 1 else f" {plan.device.name}"
  console.print(f"{report.name} on {device}, mesh {plan.mesh}")
  console.print(f"{report.padding}\n" if report.padding else "")
  _print_parameters(plan, console)
  _print_memory(plan, console)
  _print_time(report, console)
  if report.decoding:
    _print_decoding(report.decoding, console)
  if report.choices:
    _print_choices(report.choices, console)
  if report.compiled is not None:
    _print_compiled(report.compiled, plan, console)
  print(verdict(report), file=out)  # rich would break lines in the middle of the flags


def verdict(report: Report) -> str:
  """FITS or DOES NOT FIT, by how much, and the cheapest change that would fit."""
  plan = report.plan
  usable, total = plan.device.usable_bytes, plan.memory.total
  if usable is None:
    why = f"the memory of a {plan.device.name} is not known"
    if plan.device is ANY:
      why = "name a --device to learn whether it fits"
    return f"{size(total)} per device; {why}"
  times = total / usable
  share = f"{times:.0%}" if times < 10 else f"{times:,.0f} times as much"
  share = f"{size(total)} of {size(usable)} per device ({share})"
  if plan.fits:
    text = f"FITS: {share}"
    if plan.device.kind == "gpu" and total > 0.75 * usable:
      text += "\n  JAX takes 75% of a GPU: set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"
    return text
  if report.cure is None:
    return f"DOES NOT FIT: {share}, and no mesh, remat or accumulation changes that"
  more = report.cure.plan.num_devices
  devices = "" if more == plan.num_devices else f" on {more} devices"
  return (
    f"DOES NOT FIT: {share}\n  cheapest change that fits{devices}: {report.cure.flags} "
    f"({size(report.cure.plan.memory.total)})"
  )


def _table(title: str, *columns: str) -> Table:
  table = Table(title=title, title_justify="left", box=None, pad_edge=False)
  for number, column in enumerate(columns):
    table.add_column(column, justify="right" if number else "left")
  return table


def _print_parameters(plan: Plan, console: Console) -> None:
  total = sum(plan.parameters.values())
  table = _table("Parameters", "part", "number", "share")
  for part, number in plan.parameters.items():
    table.add_row(part, f"{number:,}", f"{number / total:.1%}")
  table.add_row("total", f"{total:,}", "")
  if plan.active_parameters != total:
    table.add_row("active per token", f"{plan.active_parameters:,}", "")
  console.print(table, "")


def _print_memory(plan: Plan, console: Console) -> None:
  moments = plan.memory.moments
  titles = [f"{name}*" if name == plan.memory.peak else name for name in moments]
  table = _table("Memory per device, at each moment (* most)", "part", *titles)
  parts = list(dict.fromkeys(part for at in moments.values() for part in at))
  for part in parts:
    cells = [size(at[part]) if part in at else "-" for at in moments.values()]
    table.add_row(part, *cells)
  table.add_row("total", *(size(sum(at.values())) for at in moments.values()))
  console.print(table, "")


def _print_time(report: Report, console: Console) -> None:
  plan, cost, times = report.plan, report.plan.cost, report.plan.times
  table = _table("A step", "", "")
  table.add_row("tokens", f"{cost.tokens:,}")
  if plan.attention is not None:
    table.add_row("attention", plan.attention.name)
  per_token = cost.strict_flops / cost.tokens
  table.add_row("FLOPs per token, strict", f"{per_token / 1e9:,.3f} G")
  table.add_row("  loose", f"{cost.loose_flops / cost.tokens / 1e9:,.3f} G")
  table.add_row("  executed", f"{cost.executed_flops / cost.tokens / 1e9:,.3f} G")
  table.add_row("compute", duration(times.compute))
  table.add_row("memory traffic", duration(times.memory))
  for axis, time in times.network.items():
    slow = " (data-centre network)" if axis in plan.slow else ""
    table.add_row(f"network, {axis}{slow}", duration(time))
  if times.bubble:
    waiting = f"waiting in the pipeline, {times.bubble:.0%}"
    table.add_row(waiting, duration(times.waiting))
  table.add_row("step", duration(times.seconds))
  if times.seconds is not None and plan.tokens_per_second is not None:
    table.add_row("limited by", times.limited_by)
    table.add_row("MFU, strict", f"{plan.mfu:.1%}" if plan.mfu else "?")
    rate = plan.tokens_per_second
    table.add_row("tokens/s", f"{rate:,.0f}")
    table.add_row("tokens/day", f"{rate * 86_400:.3g}")
  title = "tokens, 20 per parameter" if report.tokens is None else "tokens asked for"
  table.add_row(title, f"{report.budget:.3g}")
  if report.device_hours is not None:
    days = report.device_hours / plan.num_devices / 24
    table.add_row("device-hours for them", f"{report.device_hours:,.0f} ({days:,.1f} days)")
  if report.cost is not None:
    table.add_row(f"cost at {report.price:g} per device-hour", f"{report.cost:,.0f}")
  console.print(table, "")


def _print_decoding(points: Sequence[DecodePoint], console: Console) -> None:
  titles = ("context", "per device", "fits", "needs", "per token", "tokens/s", "limit")
  table = _table("Decoding, from the bandwidth roofline", "batch", *titles)
  for point in points:
    table.add_row(
      str(point.batch),
      f"{point.context:,}",
      size(point.bytes_per_device),
      {True: "yes", False: "no", None: "?"}[point.fits],
      "?" if point.min_devices is None else f"{point.min_devices} devices",
      duration(point.seconds),
      "?" if point.tokens_per_second is None else f"{point.tokens_per_second:,.0f}",
      point.limited_by or "?",
    )
  console.print(table, "")


def _print_choices(choices: Sequence[Choice], console: Console) -> None:
  titles = ("remat", "accumulate", "per device", "step", "MFU", "limit", "fits")
  table = _table(f"Best of {len(choices)} ways to run it", "mesh", *titles)
  for choice in choices[:MOST_CHOICES]:
    plan, training = choice.plan, choice.cfg.training
    table.add_row(
      plan.mesh,
      training.remat,
      str(training.accumulation_steps),
      size(plan.memory.total),
      duration(plan.times.seconds),
      f"{plan.mfu:.1%}" if plan.mfu else "?",
      plan.times.limited_by or "?",
      {True: "yes", False: "no", None: "?"}[plan.fits],
    )
  console.print(table, "")


def _print_compiled(compiled: CompiledStep, plan: Plan, console: Console) -> None:
  table = _table(f"Compiled for {compiled.target} in {compiled.seconds:.0f} s", "", "")
  if compiled.error is not None:
    table.add_row("refused", compiled.error)
  else:
    rows: Mapping[str, int | None] = {
      "arguments": compiled.argument_bytes,
      "outputs": compiled.output_bytes,
      "temporaries": compiled.temp_bytes,
      "peak": compiled.peak_bytes,
    }
    for name, value in rows.items():
      table.add_row(name, size(value))
    table.add_row("analytic", size(plan.memory.total))
    if plan.device.kind == "gpu":
      table.add_row("attention", "blocked: cuDNN's compiles only on a machine with a GPU")
    difference = compiled.difference(plan.memory.total)
    table.add_row(
      "analytic / peak - 1", "?" if difference is None else f"{difference:+.1%}"
    )
    for one in compiled.collectives:
      table.add_row(f"{one.count} x {one.kind} over {one.axes}", size(one.bytes))
  console.print(table, "")


def size(number: int | None) -> str:
  """Bytes for people, in powers of 1024."""
  if number is None:
    return "?"
  units = ("B", "KiB", "MiB", "GiB", "TiB")
  power = min(len(units) - 1, int(math.log(max(number, 1), 1024)))
  return f"{number / 1024**power:,.{0 if power == 0 else 2}f} {units[power]}"


def duration(seconds: float | None) -> str:
  if seconds is None:
    return "?"
  if seconds < 1e-3:
    return f"{seconds * 1e6:,.0f} us"
  return f"{seconds * 1e3:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"
