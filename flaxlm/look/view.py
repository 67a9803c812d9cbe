# SPDX-License-Identifier: Apache-2.0
"""What one picture shows, whether it is written as a page or drawn as a PNG."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class View(NamedTuple):
  """What one picture shows.

  `figures` are the numbers that can also be printed. `data` is what is drawn besides them:
  JSON values, float32 arrays, and `Shares`.
  """

  kind: str  # which script, and which function of the PNG, draws it
  title: str
  cuts: list[str]  # what was left out or made up; the terminal says it too
  notes: list[str]
  figures: dict[str, Any]
  data: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Shares:
  """An array of numbers from 0 to 1, stored to the nearest 1/`steps` (65535 at most)."""

  values: np.ndarray
  steps: int = 65535

  def to_bytes(self) -> bytes:
    """Two bytes each: first the lower ones of all, then the upper ones, which deflate
    better so."""
    rounded = np.rint(self.values.astype(np.float64) * self.steps).astype("<u2")
    return rounded.reshape(-1, 1).view(np.uint8).T.tobytes()


def line_chart(
  title: str,
  series: Sequence[dict[str, Any]],
  x_label: str,
  y_label: str,
  log: str = "",
  marks: Sequence[dict[str, Any]] = (),
  says: str = "",
) -> dict[str, Any]:
  """Curves, each with a `name`, `x` and `y`; NaN makes a gap.

  A series with `labels` is drawn as points, one with a `dash` (SVG's) as a broken line.
  `log` names the logarithmic axes. A mark is a line across the chart: it has a `name`, and
  stands `at` a number of an `axis`.
  """
  plain = lambda y: [
    float(f"{x:.9g}") if x is not None and math.isfinite(x) else None for x in y
  ]
  return {
    "form": "lines",
    "title": title,
    "says": says,
    "series": [one | {"y": plain(one["y"])} for one in series],
    "x_label": x_label,
    "y_label": y_label,
    "log_x": "x" in log,
    "log_y": "y" in log,
    "marks": [*marks],
  }


def heat_map(
  title: str,
  values: np.ndarray,
  x: tuple[str, list[int]],
  y: tuple[str, list[int] | list[str]],
  says: str = "",
  log: bool = False,
) -> dict[str, Any]:
  """A matrix; `x` and `y` are what its columns and its rows are, and their numbers or
  names. NaN is an empty cell. `log` shades the order of magnitude of positive numbers.
  """
  return {
    "form": "map",
    "title": title,
    "says": says,
    "values": np.asarray(values, np.float32),
    "x_label": x[0],
    "columns": x[1],
    "y_label": y[0],
    "rows": y[1],
    "log": log,
  }


def shown(count: int, most: int) -> np.ndarray:
  """0, 1, ... below `count`; every second, third, ... of them if they exceed `most`."""
  return np.arange(0, count, -(-count // most), dtype=np.int32)
