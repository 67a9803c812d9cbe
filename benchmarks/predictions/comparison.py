# SPDX-License-Identifier: Apache-2.0
"""What both predictions share: the device before measuring, and predicted / measured."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from flaxlm.benchmark.ceilings import this_device
from flaxlm.benchmark.measure import Side, Timing
from flaxlm.benchmark.report import Result, summarise
from flaxlm.config import MESH_AXES
from flaxlm.devices import ANY, Device
from flaxlm.platform import fused_kernel


def unmeasured_device() -> Device:
  """What is known of this device without measuring."""
  kind: Any = jax.default_backend()
  return dataclasses.replace(ANY, kind=kind, kernel=fused_kernel())


def one_device_mesh() -> Mesh:
  """The rates are those of one device, so the models run on one."""
  axes = (1,) * len(MESH_AXES)
  types = (AxisType.Auto,) * len(MESH_AXES)
  return jax.make_mesh(axes, MESH_AXES, axis_types=types, devices=jax.devices()[:1])


def part_side(function: Callable, *arguments: Any) -> Side:
  """A part of a larger program, compiled alone and called with the same arguments."""
  return Side(jax.jit(function), lambda: arguments, queued=True)


def compare(
  case: str,
  predicted: Sequence[float | None],
  measured: Timing,
  parts: Mapping[str, float],
  predict: Callable[[Device], float | None],
) -> list[Result]:
  """Predicted / measured; the note lists the parts in milliseconds.

  A second figure uses the prediction from the device table alone, if it has this device.
  """
  listed = ", ".join(f"{part} {1e3 * seconds:.3g}" for part, seconds in parts.items())
  results = [ratio(case, predicted, measured, f" ({listed})")]
  published = this_device()
  if published is not None and published.peak_flops:
    seconds = [predict(published)] * len(measured.rounds)
    results.append(ratio(f"{case}, by data sheet", seconds, measured))
  return results


def ratio(
  case: str, seconds: Sequence[float | None], measured: Timing, note: str = ""
) -> Result:
  predicted = [s for s in seconds if s is not None]
  ratios = [p / m for p, m in zip(predicted, measured.rounds, strict=True)]
  result = summarise("predictions", case, ratios, "predicted / measured")
  result.seconds = measured.median
  milliseconds = 1e3 * float(np.median(predicted)), 1e3 * measured.median
  result.correct = "predicted {:.4g} ms, measured {:.4g} ms".format(*milliseconds) + note
  return result
