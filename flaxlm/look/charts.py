# SPDX-License-Identifier: Apache-2.0
"""What a chart is, for the page and for the PNG alike."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def line_chart(
  title: str,
  series: Sequence[dict[str, Any]],
  labels: tuple[str, str],
  log: str = "",
  marks: Sequence[tuple[str, float, str]] = (),
  says: str = "",
) -> dict[str, Any]:
  """Curves. `log` names axes, a mark is (what, where, along which); NaN makes a gap."""
  plain = lambda y: [
    float(f"{x:.9g}") if x is not None and math.isfinite(x) else None for x in y
  ]
  return {
    "form": "lines",
    "title": title,
    "says": says,
    "series": [one | {"y": plain(one["y"])} for one in series],
    "x_label": labels[0],
    "y_label": labels[1],
    "log_x": "x" in log,
    "log_y": "y" in log,
    "marks": [{"name": name, "at": at, "axis": axis} for name, at, axis in marks],
  }


def heat_map(
  title: str, values: np.ndarray, axes: tuple[tuple[str, list[int]], tuple[str, list[int]]]
) -> dict[str, Any]:
  """A matrix; `axes` name the columns and the rows, and give their numbers."""
  (x_label, columns), (y_label, rows) = axes
  return {
    "form": "map",
    "title": title,
    "says": "",
    "values": np.asarray(values, np.float32),
    "x_label": x_label,
    "columns": columns,
    "y_label": y_label,
    "rows": rows,
  }
