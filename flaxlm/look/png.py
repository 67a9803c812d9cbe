# SPDX-License-Identifier: Apache-2.0
"""The pictures as PNGs, drawn by matplotlib (the extra `look`)."""

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from flaxlm.look.png_story import draw_story
from flaxlm.look.view import View

MOST_NAMED = 40  # tokens whose names fit along a map
MOST_HEADS = 16  # in a row, and three times as many rows, of small maps
WRAP = 118  # characters of a line of tokens
MOST_LETTERS = 40  # of a token
CHARTED = ("positions", "run", "runs")  # whose axes spell powers of ten as formulas
TEXT_FIGURES = ("num_tokens", "num_bytes", "bytes_per_token", "bits_per_byte", "perplexity")


def draw(view: View, path: Path) -> None:
  """Draws a view into a PNG."""
  import matplotlib.style
  from matplotlib.figure import Figure

  # The user's matplotlibrc has no effect. A token may be $x$, which is no formula.
  styles = ["default", {"text.parse_math": view.kind in CHARTED}]
  with matplotlib.style.context(styles), warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Glyph .* missing")  # a box is drawn instead
    figure = Figure(layout="constrained", dpi=120)
    DRAW[view.kind](figure, view)
    figure.suptitle(view.title, fontsize=13, parse_math=False)
    figure.savefig(path)


def draw_attention(figure: Any, view: View) -> None:
  """Every head's map, one row per layer; a single head is drawn with its tokens."""
  rows = []  # the map, and the titles and weights of a layer's heads
  for one, figures in zip(view.data["maps"], view.figures["maps"], strict=True):
    facts = iter(figures["per_head"])
    for layer, weights_NTS in zip(one["layers"], one["weights"].values, strict=True):
      titles = [
        f"{one['kind']} L{layer} H{head}\n{next(facts)['looks_at']}"
        for head in one["heads"]
      ]
      rows.append((one, titles[:MOST_HEADS], weights_NTS))
  rows = rows[: 3 * MOST_HEADS]
  columns = len(rows[0][1])
  alone = len(rows) == columns == 1
  side = 8.0 if alone else 1.9
  figure.set_size_inches(max(6.0, side * columns), max(3.0, 1.15 * side * len(rows)))
  axes = figure.subplots(len(rows), columns, squeeze=False)
  for axes_row, (one, titles, weights_NTS) in zip(axes, rows, strict=True):
    for ax, title, weights_TS in zip(axes_row, titles, weights_NTS, strict=False):
      ax.imshow(np.sqrt(weights_TS), cmap="Blues", vmin=0, vmax=1, aspect="auto")
      ax.set_title(title, fontsize=10 if alone else 7)
      ax.set(xticks=[], yticks=[])
      if alone and max(weights_TS.shape) <= MOST_NAMED:
        font = dict(family="monospace", fontsize=8)
        keys, queries = (
          [x["label"] for x in one[pieces]] for pieces in ("keys", "queries")
        )
        ax.set_xticks(range(len(keys)), keys, rotation=90, **font)
        ax.set_yticks(range(len(queries)), queries, **font)


def draw_embeddings(figure: Any, view: View) -> None:
  figure.set_size_inches(10, 8)
  ax = figure.subplots()
  tokens, points = view.data["tokens"], view.data["points"]
  for sort in sorted({token["sort"] for token in tokens}):
    some = [n for n, token in enumerate(tokens) if token["sort"] == sort]
    ax.scatter(*points[some].T, s=5, label=sort)
  taken: set[tuple[int, int]] = set()
  low, span = points.min(0), np.maximum(np.ptp(points, 0), 1e-12)
  for token, point in zip(tokens, points, strict=True):
    cell = tuple((np.array([16, 40]) * (point - low) / span).astype(int).tolist())
    if cell not in taken:  # only where there is room for a name
      taken.add(cell)
      ax.annotate(token["label"][:16], point, fontsize=7, family="monospace")
  x, y = view.figures["explained"]
  ax.set_xlabel(f"{x:.1%} of the variance, scaled to 1")
  ax.set_ylabel(f"{y:.1%}")
  ax.legend(fontsize=8)


def draw_tokens(figure: Any, view: View) -> None:
  """The text: the colour of a token shows its surprisal, whose bits stand below it."""
  import matplotlib

  figure.set_layout_engine("none")
  tokens = view.figures["tokens"]
  places: list[tuple[int, int]] = []  # the column and the line of each token
  column = line = 0
  for token in tokens:
    size = min(MOST_LETTERS, len(token["label"])) + 2
    if column and column + size > WRAP:
      column, line = 0, line + 1
    places.append((column, line))
    column += size
    if "↵" in token["label"]:
      column, line = 0, line + 1
  height = 1.2 + 0.42 * (1 + places[-1][1])
  figure.set_size_inches(11, height)
  known = {key: view.figures.get(key) for key in TEXT_FIGURES}
  words = [
    f"{value:.4g} {key.removeprefix('num_').replace('_', ' ')}"
    for key, value in known.items()
    if value is not None
  ]
  figure.text(0.03, 1 - 0.75 / height, ", ".join(words), fontsize=9, color="0.4")
  for token, (column, line) in zip(tokens, places, strict=True):
    share = min(1.0, token.get("bits", 0) / 16)
    x, y = 0.03 + 0.94 * column / WRAP, 1 - (1.05 + 0.42 * line) / height
    figure.text(
      x,
      y,
      token["label"][:MOST_LETTERS],
      family="monospace",
      fontsize=9,
      color="white" if share > 0.55 else "black",
      bbox=dict(
        facecolor=matplotlib.colormaps["Blues"](0.9 * share),
        edgecolor="tab:red" if token.get("loss") else "0.85",  # what carries loss
        pad=1.5,
      ),
    )
    if "bits" in token:
      bits = f"{token['bits']:.1f}"
      figure.text(x, y - 0.16 / height, bits, family="monospace", fontsize=6)


def draw_charts(figure: Any, view: View) -> None:
  """Curves and heat maps, two a row."""
  charts = view.data["charts"]
  num_rows = max(1, math.ceil(len(charts) / 2))
  figure.set_size_inches(12, 1 + 3.4 * num_rows)
  axes = figure.subplots(num_rows, 2, squeeze=False).ravel()
  for ax in axes[len(charts) :]:
    ax.axis("off")
  if not charts:
    axes[0].text(0, 0.5, "\n".join(view.notes), wrap=True)
  for ax, chart in zip(axes, charts, strict=False):
    ax.set_title(plain(chart["title"]), fontsize=10)
    ax.set_xlabel(chart["x_label"])
    ax.set_ylabel(chart["y_label"])
    if chart["form"] == "map":
      draw_map(figure, ax, chart)
      continue
    for number, one in enumerate(chart["series"]):
      y = np.array(one["y"], float)  # None becomes NaN
      style = dict(
        marker="." if len(y) < 40 else None, color=f"C{one.get('colour', number)}"
      )
      ax.plot(one["x"], y, label=plain(one["name"]), **style)
    for mark in chart["marks"]:
      line = ax.axvline if mark["axis"] == "x" else ax.axhline
      line(mark["at"], color="0.5", linestyle="--", linewidth=1, label=mark["name"])
    if chart["log_x"]:
      ax.set_xscale("symlog", linthresh=1)
    if chart["log_y"]:
      ax.set_yscale("log")
    if 1 < (count := len(chart["series"]) + len(chart["marks"])) <= 10:
      ax.legend(fontsize=8 if count < 5 else 7, ncols=1 if count < 5 else 2)


def plain(text: str) -> str:
  """A name among formulas; a run may be called $x$."""
  return text.replace("$", r"\$")


def draw_map(figure: Any, ax: Any, chart: Any) -> None:
  """A matrix, with a bar for its colours."""
  values, columns, rows = (chart[key] for key in ("values", "columns", "rows"))
  named = isinstance(rows[0], str)
  ends = (-0.5, len(rows) - 0.5) if named else (rows[0] - 0.5, rows[-1] + 0.5)
  extent = (columns[0] - 0.5, columns[-1] + 0.5, ends[1], ends[0])
  most = max(float(np.nanmax(np.abs(values), initial=0)), 1e-12)
  colours: dict[str, Any] = dict(cmap="RdBu_r", vmin=-most, vmax=most)
  if not (values < 0).any():
    colours = dict(cmap="Blues", vmin=0, vmax=most)
  if chart["log"]:
    colours = dict(cmap="Blues", norm="log")
    values = np.where(values > 0, values, np.nan)
  if not np.isfinite(values).any():
    ax.text(0.5, 0.5, "nothing", transform=ax.transAxes)
    return
  image = ax.imshow(
    values, interpolation="nearest", aspect="auto", extent=extent, **colours
  )
  figure.colorbar(image)
  if named:
    some = range(0, len(rows), math.ceil(len(rows) / 16))
    ax.set_yticks([*some], [plain(rows[n]) for n in some], fontsize=7)


DRAW = {
  "attention": draw_attention,
  "embeddings": draw_embeddings,
  "tokens": draw_tokens,
  "positions": draw_charts,
  "run": draw_charts,
  "runs": draw_charts,
  "story": draw_story,
}
