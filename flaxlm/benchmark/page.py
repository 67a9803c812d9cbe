# SPDX-License-Identifier: Apache-2.0
"""The report as one self-contained HTML page: a roofline (Williams et al., 2009), a table.

The plot has FLOPs per byte along, FLOP/s up, both logarithmic. Solid roofs were measured
in the same run, dotted ones are published; a case lies below them by what it loses.
"""

import html
import math
from collections.abc import Sequence

from flaxlm.benchmark.ceilings import Ceilings
from flaxlm.benchmark.report import Result, number, origin, ratio_text
from flaxlm.planning.devices import Device

WIDTH, HEIGHT = 860, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 16, 48  # margins
# One colour and one shape for each suite that computes.
SUITES = ("matmul", "attention", "loss", "optimizer", "train", "decode")

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5c636d; --line: #dfe2e6;
  --back: #ffffff; --fill: #e3ecf8; --c0: #2f6fc1; --c1: #c4641a; --c2: #1f8a5f;
  --c3: #8552b8; --c4: #c03f4c; --c5: #6b7a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #a2a9b3;
  --line: #363b42; --back: #16181b; --fill: #25374f; --c0: #78aaf0; --c1: #f0a060;
  --c2: #5cc79a; --c3: #bd95ea; --c4: #f08a92; --c5: #c2cf52; } }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 84rem;
  background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .5rem; }
p { margin: .25rem 0; max-width: 46rem; } .soft { color: var(--soft); font-size: .87rem; }
svg { width: 100%; max-width: 64rem;
  height: auto; display: block; font: 12px system-ui, sans-serif; }
svg text { fill: var(--soft); } .grid { stroke: var(--line); }
.roof { stroke: var(--ink); stroke-width: 2; fill: none; } .cache { stroke-width: 1;
  stroke-dasharray: 6 4; } .peak { stroke: var(--soft); stroke-dasharray: 2 4; fill: none; }
.name { fill: var(--ink) !important; paint-order: stroke; stroke: var(--back);
  stroke-width: 4px; stroke-linejoin: round; }
.point { stroke: var(--back); stroke-width: 1; fill-opacity: .85; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%;
  font-variant-numeric: tabular-nums; font-size: .87rem; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line);
  vertical-align: top; white-space: nowrap; } th { color: var(--soft); font-weight: 600; }
td.n, th.n { text-align: right; } td.gate { color: var(--soft); }
.bar { display: inline-block; min-width: 3.2rem;
  background: linear-gradient(to right, var(--fill) var(--w), transparent var(--w)); }
"""

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
<h1>{title}</h1>
<p class="soft">{origin}</p>
{plot}
<h2>Figures</h2>
<p class="soft">Medians over rounds with their range. Of peak: of what the maker publishes
(a dash where nobody does). Of limit: the roofline's bound from this run's own ceilings /
the measured time. A ratio above 1: flaxlm is faster.</p>
<div class="wide">{table}</div>
</html>
"""


def render(
  results: Sequence[Result], ceilings: Ceilings, device: Device | None = None
) -> str:
  """The page. Everything that comes from outside is escaped."""
  where = results[0].device if results else "nothing"
  return PAGE.format(
    title=html.escape(f"flaxlm bench: {where}"),
    style=STYLE,
    origin=html.escape(origin(results[0]) if results else ""),
    plot=plot(results, ceilings, device),
    table=table(results),
  )


# -- The roofline --------------------------------------------------------------------------


class Axes:
  """Logarithmic scales that hold all points and the ends of all roofs, with some room."""

  def __init__(self, xs: Sequence[float], ys: Sequence[float]):
    self.x0, self.x1 = math.log10(min(xs)) - 0.2, math.log10(max(xs)) + 0.2
    self.y0, self.y1 = math.log10(min(ys)) - 0.2, math.log10(max(ys)) + 0.2

  def x(self, value: float) -> float:
    share = (math.log10(value) - self.x0) / (self.x1 - self.x0)
    return LEFT + share * (WIDTH - LEFT - RIGHT)

  def y(self, value: float) -> float:
    share = (math.log10(value) - self.y0) / (self.y1 - self.y0)
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def points(results: Sequence[Result]) -> list[tuple[Result, float, float]]:
  """(result, FLOPs per byte, FLOP/s) of what computes; a repeated case once."""
  found: dict[tuple[str, str], tuple[Result, float, float]] = {}
  for result in results:
    work = result.work
    if work and work.intensity and result.seconds and result.suite in SUITES:
      spot = (result, work.intensity, work.flops / result.seconds)
      found.setdefault((result.suite, result.case), spot)
  return list(found.values())


def plot(results: Sequence[Result], ceilings: Ceilings, device: Device | None) -> str:
  spots = points(results)
  if not spots or not ceilings.flops or not ceilings.main_memory:
    return ""
  roofs = list(ceilings.flops.values())
  peaks = dict(device.peak_flops) if device else {}
  ridge = max(roofs) / ceilings.main_memory
  axes = Axes(
    [x for _, x, _ in spots] + [ridge / 10, ridge * 10],
    [y for _, _, y in spots] + roofs + list(peaks.values()),
  )
  parts = [*grid(axes)]
  for dtype in ceilings.flops:
    if dtype in peaks:
      bandwidth = device.memory_bandwidth if device else None
      parts.append(roof(axes, peaks[dtype], bandwidth, "peak"))
  parts += [*measured_roofs(axes, ceilings)]
  parts += [mark(axes, *spot) for spot in spots]
  parts += legend({result.suite for result, _, _ in spots})
  body = "\n".join(parts)
  return (
    "<h2>Roofline</h2>\n"
    f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
    f'aria-label="Roofline of {len(spots)} cases">\n{body}\n</svg>\n'
    '<p class="soft">Solid: measured in this run; dashed: other dtypes, and what caches '
    "hold; dotted: published. Point at a mark for its case.</p>"
  )


def measured_roofs(axes: Axes, ceilings: Ceilings) -> list[str]:
  """Main memory and the best product; the fastest cache; slower dtypes as far as they
  are told apart."""
  memory, best = ceilings.main_memory, max(ceilings.flops.values())
  assert memory is not None
  parts = [roof(axes, best, memory, "roof")]
  fastest = max(ceilings.bandwidths.values())
  if fastest > 1.1 * memory:
    parts.append(roof(axes, best, fastest, "roof cache"))
  labelled: list[float] = []
  for dtype, rate in sorted(ceilings.flops.items(), key=lambda item: -item[1]):
    if rate < best:
      parts.append(roof(axes, rate, memory, "roof cache"))
    height = axes.y(rate) + 4
    if labelled:
      height = max(height, labelled[-1] + 15)
    labelled.append(height)
    text = f"{number(rate / 1e9)} GFLOP/s {dtype}"
    place = WIDTH - RIGHT + 6
    parts.append(
      f'<text class="name" x="{place}" y="{height:.1f}">{html.escape(text)}</text>'
    )
  start = max(10**axes.x0, 10**axes.y0 / memory) * 1.5
  label = f"{number(memory / 1e9)} GB/s memory"
  x, y = axes.x(start) + 12, min(axes.y(memory * start) + 8, HEIGHT - BOTTOM - 6)
  parts.append(f'<text class="name" x="{x:.1f}" y="{y:.1f}">{label}</text>')
  return parts


def roof(axes: Axes, flops: float, bandwidth: float | None, kind: str) -> str:
  """Up the diagonal of the bandwidth, then level; cut off where the plot ends."""
  end = 10.0**axes.x1
  corners = [(10.0**axes.x0, flops), (end, flops)]
  if bandwidth:
    ridge = min(max(flops / bandwidth, 10.0**axes.x0), end)
    low = max(10.0**axes.x0, 10.0**axes.y0 / bandwidth)
    corners = [(low, low * bandwidth), (ridge, min(flops, ridge * bandwidth)), (end, flops)]
    corners = [corner for corner in corners if corner[1] >= 10.0**axes.y0]
  path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in corners)
  return f'<polyline class="{kind}" points="{path}"/>'


def grid(axes: Axes) -> list[str]:
  parts = []
  for power in range(math.ceil(axes.x0), math.floor(axes.x1) + 1):
    x = axes.x(10.0**power)
    parts.append(
      f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
      f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
      f"{tick(power)}</text>"
    )
  for power in range(math.ceil(axes.y0), math.floor(axes.y1) + 1):
    y = axes.y(10.0**power)
    parts.append(
      f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
      f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick(power - 9)}</text>'
    )
  middle = (LEFT + WIDTH - RIGHT) / 2
  parts.append(
    f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">FLOPs per byte</text>'
  )
  place = f"14 {(TOP + HEIGHT - BOTTOM) / 2}"
  parts.append(
    f'<text transform="translate({place}) rotate(-90)" text-anchor="middle">GFLOP/s</text>'
  )
  return parts


def tick(power: int) -> str:
  return f"{10**power:,}" if power >= 0 else f"{10.0**power:.{-power}f}"


def mark(axes: Axes, result: Result, x: float, y: float) -> str:
  place = SUITES.index(result.suite)
  title = f"{result.suite} {result.case}: {number(y / 1e9)} GFLOP/s, {number(x)} FLOPs/byte"
  if result.measured_limit_fraction is not None:
    title += f", {result.measured_limit_fraction:.0%} of the measured limit"
  return (
    f'<path class="point" fill="var(--c{place})" d="{shape(place)}" '
    f'transform="translate({axes.x(x):.1f} {axes.y(y):.1f})">'
    f"<title>{html.escape(title)}</title></path>"
  )


def shape(place: int) -> str:
  """Circle, square, triangles, diamond, plus: told apart without their colours."""
  return (
    "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z",
    "M-4.5 -4.5h9v9h-9z",
    "M0 -5.5L5.5 4.5H-5.5z",
    "M0 -6L6 0L0 6L-6 0z",
    "M0 5.5L5.5 -4.5H-5.5z",
    "M-2 -6h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
  )[place]


def legend(present: set[str]) -> list[str]:
  parts, y = [], HEIGHT - BOTTOM - 18 * len(present)
  for place, suite in enumerate(SUITES):
    if suite in present:
      y += 18
      x = WIDTH - RIGHT + 16
      parts.append(
        f'<path class="point" fill="var(--c{place})" d="{shape(place)}" '
        f'transform="translate({x} {y - 4})"/>'
        f'<text class="name" x="{x + 14}" y="{y}">{suite}</text>'
      )
  return parts


# -- The table -----------------------------------------------------------------------------

HEADINGS = (
  "Suite",
  "Case",
  "Median",
  "Range",
  "Unit",
  "Of peak",
  "Of limit",
  "Ratio",
  "Checked",
)
RIGHT_ALIGNED = ("Median", "Range", "Of peak")


def table(results: Sequence[Result]) -> str:
  kind = lambda name: ' class="n"' if name in RIGHT_ALIGNED else ""
  head = "".join(f"<th{kind(name)}>{name}</th>" for name in HEADINGS)
  return f"<table><tr>{head}</tr>\n{''.join(map(row, results))}</table>"


def row(result: Result) -> str:
  spread = f"{number(result.low)}–{number(result.high)}" if result.rounds > 1 else ""
  peak = "—" if result.peak_fraction is None else f"{result.peak_fraction:.0%}"
  cells = [
    f"<td>{html.escape(result.suite)}</td>",
    f"<td>{html.escape(result.case)}</td>",
    f'<td class="n">{number(result.median)}</td>',
    f'<td class="n">{spread}</td>',
    f"<td>{html.escape(result.unit)}</td>",
    f'<td class="n">{peak}</td>',
    f"<td>{bar(result.measured_limit_fraction)}</td>",
    f"<td>{html.escape(ratio_text(result))}</td>",
    f'<td class="gate">{html.escape(result.correct or "")}</td>',
  ]
  return f"<tr>{''.join(cells)}</tr>\n"


def bar(fraction: float | None) -> str:
  if fraction is None:
    return "—"
  return f'<span class="bar" style="--w: {min(fraction, 1):.1%}">{fraction:.0%}</span>'
