# SPDX-License-Identifier: Apache-2.0
"""The results as a page like those of `flaxlm look`: a roofline (Williams et al., 2009) and
a table. The roofline has FLOPs per byte along and FLOP/s up, both logarithmic.
"""

import math
from collections.abc import Sequence
from typing import Any

from flaxlm.benchmark.ceilings import Ceilings
from flaxlm.benchmark.report import COLUMNS, Result, number, origin, table_row
from flaxlm.devices import Device
from flaxlm.look.view import View, line_chart

COMPUTING = ("matmul", "attention", "loss", "optimizer", "train", "decode")
EXPLAINED = (
  "Medians over rounds with their range. Of peak: of the published peak, where there is "
  "one. Of limit: the least time by this run's own ceilings / the measured time. A ratio "
  "above 1: flaxlm is faster."
)


def bench_view(
  results: Sequence[Result], ceilings: Ceilings, device: Device | None = None
) -> View:
  """A table of all results, and a roofline of those that compute."""
  measured_on = results[0].device if results else "no results"
  notes = [origin(results[0])] if results else []
  chart = roofline(results, ceilings, device)
  data = {
    "charts": [chart] if chart else [],
    "columns": [*COLUMNS, "checked"],
    "rows": [[*table_row(result), result.correct or ""] for result in results],
  }
  return View("bench", f"flaxlm bench: {measured_on}", [], [*notes, EXPLAINED], {}, data)


def roofline(
  results: Sequence[Result], ceilings: Ceilings, device: Device | None
) -> dict[str, Any] | None:
  """The chart; None if no result computes, or if the ceilings are not known."""
  points = computing_points(results)
  memory = ceilings.main_memory
  if not points or not ceilings.flops or not memory:
    return None
  rates = sorted(ceilings.flops.items(), key=lambda item: -item[1])
  best = rates[0][1]
  roofs = [
    (f"{number(rate / 1e9)} GFLOP/s {dtype}", rate, memory, "6 4" if n else "")
    for n, (dtype, rate) in enumerate(rates)
  ]
  fastest = max(ceilings.bandwidths.values())
  if fastest > 1.1 * memory:
    roofs.append((f"{number(fastest / 1e9)} GB/s of a cache", best, fastest, "6 4"))
  if device is not None:
    bandwidth = device.memory_bandwidth or math.inf
    for dtype in sorted(ceilings.flops.keys() & device.peak_flops.keys()):
      roofs.append((f"published {dtype}", device.peak_flops[dtype], bandwidth, "2 4"))
  xs = [x for series in points for x in series["x"]]
  ends = min(*xs, best / memory / 10), max(*xs, best / memory * 10)
  return line_chart(
    "Roofline",
    [roof(*limits, ends) for limits in roofs] + points,
    x_label="FLOPs per byte",
    y_label="GFLOP/s",
    log="xy",
    says=f"Solid: the best dtype and {number(memory / 1e9)} GB/s of main memory, measured "
    "in this run; dashed: other dtypes, and the fastest cache; dotted: published. Point at "
    "a mark to see its case.",
  )


def computing_points(results: Sequence[Result]) -> list[dict[str, Any]]:
  """A series for each suite that computes: FLOPs per byte, GFLOP/s, and what to say."""
  found: dict[str, dict[str, Any]] = {}
  for result in results:
    flops, num_bytes, seconds = result.flops, result.bytes, result.seconds
    if result.suite not in COMPUTING or not (flops and num_bytes and seconds):
      continue
    label = f"{result.suite} {result.case}: {number(result.median)} {result.unit}"
    if result.measured_limit_fraction is not None:
      label += f", {result.measured_limit_fraction:.0%} of the measured limit"
    empty: dict[str, Any] = {"name": result.suite, "x": [], "y": [], "labels": []}
    series = found.setdefault(result.suite, empty)
    if label not in series["labels"]:  # every peer of a case repeats it
      series["labels"].append(label)
      series["x"].append(flops / num_bytes)
      series["y"].append(flops / seconds / 1e9)
  return list(found.values())


def roof(
  name: str, flops: float, bandwidth: float, dash: str, ends: tuple[float, float]
) -> dict[str, Any]:
  """A line up the diagonal of the bandwidth, then level from its ridge on."""
  ridge = min(max(flops / bandwidth, ends[0]), ends[1])
  xs = [ends[0], ridge, ends[1]]
  ys = [min(flops, x * bandwidth) / 1e9 for x in xs]
  return {"name": name, "x": xs, "y": ys, "dash": dash}
