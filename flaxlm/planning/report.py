# SPDX-License-Identifier: Apache-2.0
"""A plan as tables for people and as JSON for scripts."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from flaxlm.cost import active_parameters, adapter_parameters
from flaxlm.planning.compile import CompiledStep
from flaxlm.planning.decoding import DecodePoint
from flaxlm.planning.decoding_report import (
  decoding_verdict,
  keeps_latency,
  no_verdict,
  print_points,
)
from flaxlm.planning.learning import (
  Learning,
  data_note,
  data_seconds,
  data_wait,
  learning_json,
  learning_rows,
)
from flaxlm.planning.roofline import Plan, StepTimes
from flaxlm.planning.tables import (
  FITS,
  Rows,
  duration,
  known,
  named_axis,
  print_table,
  size,
  wide_console,
)
from flaxlm.sharding import describe_copies

MOST_CHOICES = 20  # of a search that the tables show; JSON has all


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """Everything that one call of `flaxlm plan` has found out."""

  plan: Plan
  published_batch: int | None = None  # rows of it, where the plan has fewer
  learning: Learning | None = None  # of fine-tuning
  data_rate: float | None = None  # tokens per second that are made ready to train on
  tokens: float | None = None  # to train on
  price: float | None = None  # per device and hour
  cure: Plan | None = None  # the cheapest change that fits, if the plan does not
  choices: Sequence[Plan] = ()
  decoding: Sequence[DecodePoint] = ()
  latency: float | None = None  # of decoding, as it was asked for
  compiled: CompiledStep | None = None
  drawing: DecodePoint | None = None  # a token of each completion to learn from

  @property
  def fits(self) -> bool | None:
    """The verdict: the compiler's where it was asked, else the plan's."""
    usable = self.plan.device.usable_bytes
    if self.compiled is None or usable is None:
      return self.plan.fits
    return self.compiled.fits(usable)

  @property
  def drawing_seconds(self) -> float | None:
    """The time to draw the completions of a step, if all are as long as may be."""
    point = self.drawing
    seconds = None if point is None else point.seconds
    return seconds and seconds * self.plan.cfg.reward.max_new_tokens

  @property
  def budget(self) -> float:
    return self.plan.optimal_tokens if self.tokens is None else self.tokens

  @property
  def waiting(self) -> float:
    """The share of the time in which steps wait for their rows."""
    return data_wait(self.plan, self.data_rate)

  @property
  def tokens_per_second(self) -> float | None:
    rate = self.plan.tokens_per_second
    return rate and rate * (1 - self.waiting)

  @property
  def mfu(self) -> float | None:
    return self.plan.mfu and self.plan.mfu * (1 - self.waiting)

  @property
  def loose_mfu(self) -> float | None:
    return self.plan.loose_mfu and self.plan.loose_mfu * (1 - self.waiting)

  @property
  def limited_by(self) -> str | None:
    return "data" if self.waiting else self.plan.times.limited_by

  @property
  def device_hours(self) -> float | None:
    hours = self.plan.device_hours(self.budget)
    return hours and hours / (1 - self.waiting)

  @property
  def cost(self) -> float | None:
    hours = self.device_hours
    return None if hours is None or self.price is None else hours * self.price


# -- JSON ------------------------------------------------------------------------------


def to_json(report: Report) -> dict[str, Any]:
  """The report in the schema that scripts rely on: bytes and seconds, not rounded."""
  plan, times = report.plan, report.plan.times
  result: dict[str, Any] = {
    "name": plan.cfg.name or "config",
    "device": plan.device.name,
    "mesh": {axis: size for axis, size in plan.sizes.items() if size > 1},
    "slow_axes": list(plan.slow),
    "num_devices": plan.num_devices,
    "parameters": sum(plan.parameters.values()),
    "parameters_by_part": dict(plan.parameters),
    "active_parameters": active_parameters(plan.cfg.model),
    "adapter_parameters": adapter_parameters(plan.cfg.model, plan.cfg.lora),
    "bytes_per_device": {**plan.memory.parts, "total": plan.memory.total},
    "peak_moment": plan.memory.peak,
    "bytes_by_moment": {name: dict(parts) for name, parts in plan.memory.moments.items()},
    "usable_bytes": plan.device.usable_bytes,
    "fits": report.fits,
    "flops_per_step": {
      "strict": plan.cost.strict_flops,
      "loose": plan.cost.loose_flops,
      "executed": plan.cost.executed_flops,
    },
    "flops_per_token": plan.cost.strict_flops / plan.cost.tokens,
    "tokens_per_step": plan.cost.tokens,
    "batch_size": plan.cfg.data.batch_size,
    "published_batch_size": report.published_batch,
    "seconds_by_part": {
      "compute": times.compute,
      "memory": times.memory,
      **{f"network:{axis}": time for axis, time in times.network.items()},
    },
    "bubble": times.bubble,
    "step_seconds": times.seconds,
    "least_step_seconds": times.least,
    "data_seconds": data_seconds(plan, report.data_rate),
    "not_published": list(times.missing),
    "tokens_per_second": report.tokens_per_second,
    "tokens_per_day": report.tokens_per_second and 86_400 * report.tokens_per_second,
    "mfu": report.mfu,
    "loose_mfu": report.loose_mfu,
    "limited_by": report.limited_by,
    "fullest_expert_share": plan.fullest_share,
    "chinchilla_tokens": plan.optimal_tokens,
    "budget": {
      "tokens": report.budget,
      "device_hours": report.device_hours,
      "cost": report.cost,
    },
  }
  if report.learning is not None:
    result["fine_tuning"] = learning_json(report.learning)
  if report.cure is not None:
    result["cheapest_fit"] = _choice(report.cure)
  if report.choices:
    result["search"] = [_choice(choice) for choice in report.choices]
  if report.drawing is not None:
    result["drawing"] = {
      "rows": report.drawing.batch,
      "tokens": plan.cfg.reward.max_new_tokens,
      "seconds": report.drawing_seconds,
    }
  if report.decoding:
    result["latency_seconds"] = report.latency
    result["keeps_latency"] = keeps_latency(report.decoding, report.latency)
    result["decode"] = [dataclasses.asdict(point) for point in report.decoding]
  if report.compiled is not None:
    result["compiled"] = dataclasses.asdict(report.compiled) | {
      "analytic_bytes": plan.memory.total,
      "difference": report.compiled.difference(plan.memory.total),
    }
  return result


def _choice(plan: Plan) -> dict[str, Any]:
  training = plan.cfg.training
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
    "flags": plan.flags,
  }


# -- Text ------------------------------------------------------------------------------


def print_report(report: Report, out: TextIO) -> None:
  """The report as tables, with the verdict last."""
  console = wide_console(out)
  plan = report.plan
  name = plan.cfg.name or "config"
  count = "" if plan.num_devices == 1 else f"{plan.num_devices} x "
  console.print(f"{name} on {count}{plan.device.name}, mesh {plan.mesh}")
  copies = describe_copies(plan.cfg.model, plan.sizes["tensor"])
  notes = (plan.cfg.model.padding, copies, batch_note(report))
  console.print("".join(f"{note}\n" for note in notes if note))
  print_table(console, "Parameters", ("part", "number", "share"), _parameters(plan))
  peak, moments = plan.memory.peak, plan.memory.moments
  titles = ("part", *(f"{name}*" if name == peak else name for name in moments))
  print_table(console, "Memory per device, at each moment (* most)", titles, _memory(plan))
  if report.learning is not None:
    print_table(console, "What learns", ("", ""), learning_rows(report.learning), left=2)
  print_table(console, "A step", ("", ""), _time(report))
  if report.decoding:
    print_points(console, report.decoding)
  if report.choices:
    best = report.choices[:MOST_CHOICES]
    title = f"Best {len(best)} of {len(report.choices)} ways to run it"
    rows = ([cell(choice) for cell in CHOICES.values()] for choice in best)
    print_table(console, title, [*CHOICES], rows)
  if report.compiled is not None:
    title = f"Compiled for {report.compiled.target} in {report.compiled.seconds:.0f} s"
    print_table(console, title, ("", ""), _compiled(report.compiled, plan))
  # Not by rich, which would break lines in the middle of the flags.
  if report.decoding:
    decoding = decoding_verdict(report.decoding, plan.device, report.latency)
    print(f"training: {verdict(report)}\ndecoding: {decoding}", file=out)
  else:
    print(verdict(report), file=out)


def batch_note(report: Report) -> str:
  """A line about a batch that is smaller than the published one; "" if it is not."""
  if report.published_batch is None:
    return ""
  rows, length = report.plan.cfg.data.batch_size, report.plan.cfg.data.seq_len
  return (
    f"published with {report.published_batch:,} rows of {length:,} tokens a batch, which "
    f"do not fit; planned with --data.batch-size={rows}"
  )


def verdict(report: Report) -> str:
  """FITS or DOES NOT FIT, by how much, and the cheapest change that would fit."""
  plan, compiled = report.plan, report.compiled
  usable, total = plan.device.usable_bytes, plan.memory.total
  if compiled is not None and usable is not None:
    if compiled.peak_bytes is None:
      return f"DOES NOT COMPILE: {compiled.error}"
    total = compiled.peak_bytes
  if usable is None:
    return f"{size(total)} per device; {no_verdict(plan.device)}"
  times = total / usable
  share = f"{times:.0%}" if times < 10 else f"{times:,.0f} times as much"
  share = f"{size(total)} of {size(usable)} per device ({share})"
  if compiled is not None:
    share += ", says the compiler"
  if report.fits:
    text = f"FITS: {share}"
    if report.choices:
      text += f"\n  fastest: {plan.flags}"
    if plan.device.kind == "gpu" and total > 0.75 * usable:
      text += "\n  JAX takes 75% of a GPU: set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"
    return text
  if report.cure is None:
    return f"DOES NOT FIT: {share}, and no mesh, remat or accumulation changes that"
  more = report.cure.num_devices
  devices = "" if more == plan.num_devices else f" on {more} devices"
  return (
    f"DOES NOT FIT: {share}\n  cheapest change that fits{devices}: {report.cure.flags} "
    f"({size(report.cure.memory.total)})"
  )


def _parameters(plan: Plan) -> Rows:
  total = sum(plan.parameters.values())
  for part, number in plan.parameters.items():
    yield part, f"{number:,}", f"{number / total:.1%}"
  yield "total", f"{total:,}", ""
  active = active_parameters(plan.cfg.model)
  if active != total:
    yield "active per token", f"{active:,}", ""
  if learning := adapter_parameters(plan.cfg.model, plan.cfg.lora):
    yield "adapters, which alone learn", f"{learning:,}", f"{learning / total:.1%}"


def _memory(plan: Plan) -> Rows:
  moments = plan.memory.moments.values()
  for part in dict.fromkeys(part for at in moments for part in at):
    yield part, *(size(at[part]) if part in at else "-" for at in moments)
  yield "total", *(size(sum(at.values())) for at in moments)


def _time(report: Report) -> Rows:
  plan, cost, times = report.plan, report.plan.cost, report.plan.times
  yield "tokens", f"{cost.tokens:,}"
  if plan.attention is not None:
    yield "attention", plan.attention.name
  yield "FLOPs per token, strict", f"{cost.strict_flops / cost.tokens / 1e9:,.3f} G"
  yield "  loose", f"{cost.loose_flops / cost.tokens / 1e9:,.3f} G"
  yield "  executed", f"{cost.executed_flops / cost.tokens / 1e9:,.3f} G"
  yield "compute", duration(times.compute)
  if (share := plan.fullest_share) > 1:
    yield "  waits for the fullest member of expert, with", f"{share:.2f} x an even share"
  yield "memory traffic", duration(times.memory)
  for axis, time in times.network.items():
    yield f"network, {named_axis(axis, plan.slow)}", duration(time)
  if times.bubble:
    yield f"waiting in the pipeline, {times.bubble:.0%}", duration(times.waiting)
  yield "step", step_time(times)
  yield "its rows, made ready meanwhile", data_note(plan, report.data_rate)
  if report.drawing is not None:
    most = plan.cfg.reward.max_new_tokens
    yield f"drawing before it, up to {most:,} tokens", duration(report.drawing_seconds)
  rate = report.tokens_per_second
  if rate is not None:
    yield "limited by", report.limited_by or "?"
    yield "MFU, strict", known(report.mfu, "{:.1%}")
    yield "  loose", known(report.loose_mfu, "{:.1%}")
    yield "tokens/s", f"{rate:,.0f}"
    yield "tokens/day", f"{rate * 86_400:.3g}"
  if report.learning is not None and report.tokens is None:
    return  # 20 for each parameter are for a model that learns from nothing
  title = "tokens, 20 per parameter" if report.tokens is None else "tokens asked for"
  yield title, f"{report.budget:.3g}"
  if report.device_hours is not None:
    days = report.device_hours / plan.num_devices / 24
    yield "device-hours for them", f"{report.device_hours:,.0f} ({days:,.1f} days)"
  if report.cost is not None:
    yield f"cost at {report.price:g} per device-hour", f"{report.cost:,.0f}"


def step_time(times: StepTimes) -> str:
  """The time of a step; where something is not known, the least, and what is missing."""
  if times.seconds is not None or times.least is None:
    return duration(times.seconds)
  return f"{duration(times.least)} and more: {', '.join(times.missing)} not published"


def _compiled(compiled: CompiledStep, plan: Plan) -> Rows:
  if compiled.error is not None:
    yield "refused", compiled.error
    return
  yield "arguments", size(compiled.argument_bytes)
  yield "outputs", size(compiled.output_bytes)
  yield "temporaries", size(compiled.temp_bytes)
  yield "peak", size(compiled.peak_bytes)
  yield "analytic", size(plan.memory.total)
  if plan.device.kind == "gpu":
    yield "attention", "blocked: cuDNN's compiles only on a machine with a GPU"
  yield "analytic / peak - 1", known(compiled.difference(plan.memory.total), "{:+.1%}")
  for one in compiled.collectives:
    yield f"{one.count} x {one.kind} over {one.axes}", size(one.bytes)


# The columns of a search: the title, and the cell of a choice.
CHOICES: Mapping[str, Callable[[Plan], str]] = {
  "mesh": lambda plan: plan.mesh,
  "remat": lambda plan: plan.cfg.training.remat,
  "accumulate": lambda plan: str(plan.cfg.training.accumulation_steps),
  "per device": lambda plan: size(plan.memory.total),
  "step": lambda plan: duration(plan.times.seconds),
  "MFU": lambda plan: known(plan.mfu, "{:.1%}"),
  "limit": lambda plan: plan.times.limited_by or "?",
  "fits": lambda plan: FITS[plan.fits],
}
