# SPDX-License-Identifier: Apache-2.0
"""What decoding needs, as a table for people and as JSON for scripts."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console

from flaxlm.config import ResolvedConfig, slow_axes
from flaxlm.cost import parameters
from flaxlm.devices import Device
from flaxlm.planning.decoding import DecodePoint
from flaxlm.planning.memory import Sizes
from flaxlm.planning.tables import FITS, duration, known, print_table, size, wide_console
from flaxlm.sharding import describe_mesh

COLUMNS: Mapping[str, Callable[[DecodePoint], str]] = {
  "batch": lambda point: str(point.batch),
  "context": lambda point: f"{point.context:,}",
  "per device": lambda point: size(point.bytes_per_device),
  "fits": lambda point: FITS[point.fits],
  "needs": lambda point: known(point.min_devices, "{} devices"),
  "per token": lambda point: duration(point.seconds),
  "tokens/s": lambda point: known(point.tokens_per_second, "{:,.0f}"),
  "limit": lambda point: point.limited_by or "?",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingReport:
  """What one call of `flaxlm plan --decode --no-training` has found out."""

  cfg: ResolvedConfig
  device: Device
  sizes: Sizes
  points: Sequence[DecodePoint]
  latency: float | None = None  # what was asked for

  @property
  def fits(self) -> bool | None:
    """Whether everything that was asked fits."""
    usable = self.device.usable_bytes
    return None if usable is None else all(point.fits for point in self.points)


def decoding_json(report: DecodingReport) -> dict[str, Any]:
  """The report in the schema that scripts rely on: what a plan of training says, less all
  that is about training."""
  return {
    "name": report.cfg.name or "config",
    "device": report.device.name,
    "mesh": {axis: size for axis, size in report.sizes.items() if size > 1},
    "parameters": sum(parameters(report.cfg.model).values()),
    "usable_bytes": report.device.usable_bytes,
    "fits": report.fits,
    "latency_seconds": report.latency,
    "keeps_latency": keeps_latency(report.points, report.latency),
    "decode": [dataclasses.asdict(point) for point in report.points],
  }


def print_decoding(report: DecodingReport, out: TextIO) -> None:
  """The report as a table, with the verdict last."""
  console = wide_console(out)
  name = report.cfg.name or "config"
  total = sum(parameters(report.cfg.model).values())
  mesh = describe_mesh(report.sizes, slow_axes(report.cfg.mesh))
  console.print(f"{name} on {report.device.name}, mesh {mesh}: {total:,} parameters\n")
  print_points(console, report.points)
  print(decoding_verdict(report.points, report.device, report.latency), file=out)


def print_points(console: Console, points: Sequence[DecodePoint]) -> None:
  """The points as a table."""
  rows = ([cell(point) for cell in COLUMNS.values()] for point in points)
  print_table(console, "Decoding, from the bandwidth roofline", [*COLUMNS], rows)


def too_slow(points: Sequence[DecodePoint], latency: float | None) -> list[DecodePoint]:
  """The points whose tokens take longer than the `latency`."""
  if latency is None:
    return []
  return [point for point in points if (point.seconds or 0) > latency]


def keeps_latency(points: Sequence[DecodePoint], latency: float | None) -> bool | None:
  """Whether rows of every context keep to the `latency`; None if none was asked for."""
  return None if latency is None else not too_slow(points, latency)


def decoding_verdict(
  points: Sequence[DecodePoint], device: Device, latency: float | None = None
) -> str:
  """Whether everything that was asked about decoding fits, by the largest that does not
  or, if all does, by the largest; and for which contexts no row keeps to the `latency`."""
  if slow := too_slow(points, latency):
    assert latency is not None
    lengths = " or of ".join(f"{point.context:,}" for point in slow)
    text = f"TOO SLOW: no row of {lengths} tokens gets a token within {latency * 1e3:g} ms"
    text += "\n  faster: fewer bytes (--weights, --cache) or more members of tensor"
    others = [point for point in points if point not in slow]
    return text + (f"\nthe others: {decoding_verdict(others, device)}" if others else "")
  usable = device.usable_bytes
  most = max(points, key=lambda point: point.bytes_per_device)
  needs = f"{size(most.bytes_per_device)} per device"
  rows = f"for {most.batch} x {most.context:,} tokens"
  if usable is None:
    return f"{needs} {rows}; {no_verdict(device)}"
  share = f"{size(most.bytes_per_device)} of {size(usable)} per device {rows}"
  fitting = [point for point in points if point.fits]
  if len(fitting) == len(points):
    return f"FITS: {share}"
  text = f"DOES NOT FIT: {share}; it takes at least {most.min_devices} devices"
  if fitting:
    best = max(fitting, key=lambda point: point.bytes_per_device)
    text += f"\n  it fits up to {best.batch} x {best.context:,} tokens"
    text += f" ({size(best.bytes_per_device)})"
  if None in (most.stored.weights, most.stored.cache):
    text += "\n  smaller: --weights int8 --cache int8"
  return text


def no_verdict(device: Device) -> str:
  """Why nothing is said about whether something fits."""
  if device.is_any:
    return "name a --device to learn whether it fits"
  return f"the memory of a {device.name} is not known"
