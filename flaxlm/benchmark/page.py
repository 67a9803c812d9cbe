# SPDX-License-Identifier: Apache-2.0
"""The results as one self-contained HTML page: a roofline (Williams et al., 2009), a table.

The plot has FLOPs per byte along and FLOP/s up, both logarithmic.
"""

import html
import math
from collections.abc import Sequence

from flaxlm.benchmark.ceilings import Ceilings
from flaxlm.benchmark.report import HEADINGS, Result, number, origin, table_row
from flaxlm.planning.devices import Device

WIDTH, HEIGHT = 860, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 16, 48  # margins
# The suites that compute, each with a mark and a colour of its own.
MARKS = {
  "matmul": ("●", "#2f6fc1"),
  "attention": ("■", "#c4641a"),
  "loss": ("▲", "#1f8a5f"),
  "optimizer": ("◆", "#8552b8"),
  "train": ("▼", "#c03f4c"),
  "decode": ("✚", "#8a9a00"),
}

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>flaxlm bench: {device}</title>
<style>
:root {{ color-scheme: light dark; --ink: light-dark(#1c1e21, #e8eaed);
  --soft: light-dark(#5c636d, #a2a9b3); --line: light-dark(#dfe2e6, #363b42); }}
body {{ margin: 2rem auto; padding: 0 1rem; max-width: 80rem; color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }}
p, th, svg text {{ color: var(--soft); fill: var(--soft); }}
svg {{ width: 100%; max-width: 64rem; font-size: 12px; }}
.grid {{ stroke: var(--line); }} .roof, .cache, .peak {{ stroke: var(--ink); fill: none; }}
.cache {{ stroke-dasharray: 6 4; }} .peak {{ stroke-dasharray: 2 4; }}
div {{ overflow-x: auto; }} table {{ border-collapse: collapse; font-size: .87rem; }}
th, td {{ text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; }}
</style>
<h1>flaxlm bench: {device}</h1>
<p>{origin}</p>
{roofline}
<h2>Figures</h2>
<p>Medians over rounds with their range. Of peak: of the published peak, where there is one.
Of limit: the least time by this run's own ceilings / the measured time. A ratio above 1:
flaxlm is faster.</p>
<div><table>{table}</table></div>
</html>
"""
ROOFLINE = """<h2>Roofline</h2>
<svg viewBox="0 0 {width} {height}" role="img" aria-label="Roofline of {count} cases">
{body}
</svg>
<p>Solid: the best dtype and main memory, measured in this run; dashed: other dtypes, and
the fastest cache; dotted: published. Point at a mark to see its case.</p>"""


def render(
  results: Sequence[Result], ceilings: Ceilings, device: Device | None = None
) -> str:
  """The page. Every text from outside is escaped."""
  cells = lambda tag, texts: "".join(f"<{tag}>{html.escape(x)}</{tag}>" for x in texts)
  rows = [f"<tr>{cells('th', (*HEADINGS, 'checked'))}</tr>"]
  for result in results:
    rows.append(f"<tr>{cells('td', (*table_row(result), result.correct or ''))}</tr>")
  return PAGE.format(
    device=html.escape(results[0].device if results else "no results"),
    origin=html.escape(origin(results[0]) if results else ""),
    roofline=roofline(results, ceilings, device),
    table="\n".join(rows),
  )


def roofline(results: Sequence[Result], ceilings: Ceilings, device: Device | None) -> str:
  """The plot; empty if no result computes, or if the ceilings are not known."""
  points = computing_points(results)
  memory = ceilings.main_memory
  if not points or not ceilings.flops or not memory:
    return ""
  best = max(ceilings.flops.values())
  peaks = {}
  if device is not None:
    peaks = {t: rate for t, rate in device.peak_flops.items() if t in ceilings.flops}
  axes = Axes(
    [x for _, x, _ in points] + [best / memory / 10, best / memory * 10],
    [y for _, _, y in points] + [*ceilings.flops.values(), *peaks.values()],
  )
  parts = grid(axes)
  for rate in peaks.values():
    assert device is not None
    parts.append(roof(axes, rate, device.memory_bandwidth or math.inf, "peak"))
  lowest = TOP - 15.0  # of the labels so far, which must not overlap
  for dtype, rate in sorted(ceilings.flops.items(), key=lambda item: -item[1]):
    parts.append(roof(axes, rate, memory, "roof" if rate == best else "cache"))
    lowest = max(axes.y(rate) + 4, lowest + 15)
    label = f"{number(rate / 1e9)} GFLOP/s {dtype}"
    parts.append(text(WIDTH - RIGHT + 6, lowest, label))
  fastest = max(ceilings.bandwidths.values())
  if fastest > 1.1 * memory:
    parts.append(roof(axes, best, fastest, "cache"))
  parts.append(text(LEFT + 8, TOP + 14, f"{number(memory / 1e9)} GB/s of main memory"))
  parts += [mark(result, axes.x(x), axes.y(y)) for result, x, y in points]
  parts += legend({result.suite for result, _, _ in points})
  body = "\n".join(parts)
  return ROOFLINE.format(width=WIDTH, height=HEIGHT, count=len(points), body=body)


def computing_points(results: Sequence[Result]) -> list[tuple[Result, float, float]]:
  """(result, FLOPs per byte, FLOP/s) of what computes; a repeated case once."""
  found: dict[tuple[str, str], tuple[Result, float, float]] = {}
  for result in results:
    demand = result.demand
    if demand and demand.intensity and result.seconds and result.suite in MARKS:
      point = (result, demand.intensity, demand.flops / result.seconds)
      found.setdefault((result.suite, result.case), point)
  return list(found.values())


class Axes:
  """Logarithmic scales that hold all given values, with some room around them."""

  def __init__(self, xs: Sequence[float], ys: Sequence[float]):
    self.x0, self.x1 = math.log10(min(xs)) - 0.2, math.log10(max(xs)) + 0.2
    self.y0, self.y1 = math.log10(min(ys)) - 0.2, math.log10(max(ys)) + 0.2

  def x(self, value: float) -> float:
    share = (math.log10(value) - self.x0) / (self.x1 - self.x0)
    return LEFT + share * (WIDTH - LEFT - RIGHT)

  def y(self, value: float) -> float:
    share = (math.log10(value) - self.y0) / (self.y1 - self.y0)
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def roof(axes: Axes, flops: float, bandwidth: float, kind: str) -> str:
  """A line up the diagonal of the bandwidth, then level, cut off where the plot ends."""
  low = max(10.0**axes.x0, 10.0**axes.y0 / bandwidth)
  ridge = min(max(flops / bandwidth, low), 10.0**axes.x1)
  corners = [(low, min(flops, low * bandwidth)), (ridge, min(flops, ridge * bandwidth))]
  corners.append((10.0**axes.x1, corners[-1][1]))
  path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in corners)
  return f'<polyline class="{kind}" points="{path}"/>'


def grid(axes: Axes) -> list[str]:
  right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
  parts = []
  for power in range(math.ceil(axes.x0), math.floor(axes.x1) + 1):
    x = axes.x(10.0**power)
    parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{bottom}"/>')
    parts.append(text(x, bottom + 18, f"{10.0**power:g}", "middle"))
  for power in range(math.ceil(axes.y0), math.floor(axes.y1) + 1):
    y = axes.y(10.0**power)
    parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>')
    parts.append(text(LEFT - 8, y + 4, f"{10.0 ** (power - 9):g}", "end"))
  parts.append(text((LEFT + right) / 2, HEIGHT - 8, "FLOPs per byte", "middle"))
  parts.append(text(LEFT - 8, TOP - 4, "GFLOP/s", "end"))
  return parts


def mark(result: Result, x: float, y: float) -> str:
  symbol, colour = MARKS[result.suite]
  title = f"{result.suite} {result.case}: {number(result.median)} {result.unit}"
  if result.measured_limit_fraction is not None:
    title += f", {result.measured_limit_fraction:.0%} of the measured limit"
  return (
    f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle" style="fill: {colour}">'
    f"{symbol}<title>{html.escape(title)}</title></text>"
  )


def legend(suites: set[str]) -> list[str]:
  parts = []
  for row, suite in enumerate(name for name in MARKS if name in suites):
    symbol, colour = MARKS[suite]
    x, y = WIDTH - RIGHT + 16, HEIGHT - BOTTOM - 18 * row
    parts.append(f'<text x="{x}" y="{y}" style="fill: {colour}">{symbol}</text>')
    parts.append(text(x + 18, y, suite))
  return parts


def text(x: float, y: float, words: str, anchor: str = "start") -> str:
  place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
  return f"<text {place}>{html.escape(words)}</text>"
