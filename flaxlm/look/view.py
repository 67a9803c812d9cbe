# SPDX-License-Identifier: Apache-2.0
"""What one picture shows, whether it is written as a page or drawn as a PNG."""

import dataclasses
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
  """An array of numbers from 0 to 1, stored to the nearest 1/65535."""

  values: np.ndarray
