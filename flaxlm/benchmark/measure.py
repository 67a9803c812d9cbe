# SPDX-License-Identifier: Apache-2.0
"""The one way to take a time: compiled and warmed up apart, rounds in turn, waited for."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from flaxlm.benchmark.report import Result, Work, figures, summarise
from flaxlm.config import MeshConfig
from flaxlm.errors import FlaxLMError

Size = Literal["tiny", "small", "large"]  # for tests, for a CPU, for an accelerator

MOST_CALLS = 1000  # in a round


@dataclasses.dataclass(frozen=True)
class Setting:
  """How large the cases are, and how long they are measured."""

  size: Size = "small"
  rounds: int = 5
  round_seconds: float = 0.15  # at least, per side
  peer: str | None = None
  mesh: MeshConfig = dataclasses.field(default_factory=lambda: {"data": -1})

  def pick(self, tiny: Any, small: Any, large: Any) -> Any:
    """The one of three that fits the size."""
    return {"tiny": tiny, "small": small, "large": large}[self.size]


class Side(NamedTuple):
  """Something to be timed: `call(*prepare())`, where preparing does not count."""

  call: Callable[..., Any]
  prepare: Callable[[], Sequence[Any]] = tuple
  queued: bool = False  # calls of a round follow each other; only the last is waited for


@dataclasses.dataclass(frozen=True)
class Timing:
  """Seconds per call, a figure per round; the first call apart, and what it returned."""

  first_seconds: float
  rounds: Sequence[float]
  result: Any

  @property
  def median(self) -> float:
    return statistics.median(self.rounds)


def measure(sides: Mapping[str, Side], setting: Setting) -> dict[str, Timing]:
  """Times all sides, a round of each in turn and in turning order: a machine that slows
  down, or a neighbour that wakes up, meets them all.

  Every call is waited for, unless they are `queued`, as pieces of a larger program are: an
  accelerator is done with a small one sooner than the host has seen to it. A round of a
  side has as many calls as fill `round_seconds`.
  """
  first, result, calls = {}, {}, {}
  for name, side in sides.items():
    arguments = jax.block_until_ready(side.prepare())
    started = time.perf_counter()
    result[name] = jax.block_until_ready(side.call(*arguments))
    first[name] = time.perf_counter() - started
    warm = _seconds(side, 1)
    calls[name] = max(1, min(MOST_CALLS, math.ceil(setting.round_seconds / warm)))
  rounds: dict[str, list[float]] = {name: [] for name in sides}
  for number in range(setting.rounds):
    order = list(sides)[:: 1 if number % 2 == 0 else -1]
    for name in order:
      rounds[name].append(_seconds(sides[name], calls[name]))
  return {name: Timing(first[name], rounds[name], result[name]) for name in sides}


def _seconds(side: Side, calls: int) -> float:
  if side.queued:
    arguments = jax.block_until_ready(side.prepare())
    started = time.perf_counter()
    for _ in range(calls):
      last = side.call(*arguments)
    jax.block_until_ready(last)
    return (time.perf_counter() - started) / calls
  total = 0.0
  for _ in range(calls):
    arguments = jax.block_until_ready(side.prepare())
    started = time.perf_counter()
    jax.block_until_ready(side.call(*arguments))
    total += time.perf_counter() - started
  return total / calls


def timed(
  name: tuple[str, str],
  timing: Timing,
  unit: str,
  amount: float = 1.0,
  work: Work | None = None,
) -> Result:
  """The result of a (suite, case); `amount` is what one call handles."""
  result = summarise(*name, figures(timing.rounds, unit, amount), unit)
  result.first_seconds, result.seconds = timing.first_seconds, timing.median
  if work is not None:
    result.flops, result.bytes = work.flops, work.bytes
    result.footprint, result.dtype = work.footprint, work.dtype
  return result


def against(result: Result, peer: str, theirs: Timing, ours: Timing, gate: str) -> Result:
  """A copy of `result` with its ratio to a peer that was timed in the same rounds."""
  pairs = zip(ours.rounds, theirs.rounds, strict=True)
  ratios = [theirs / ours for ours, theirs in pairs]
  return dataclasses.replace(
    result,
    peer=peer,
    ratio=statistics.median(ratios),
    ratio_low=min(ratios),
    ratio_high=max(ratios),
    correct=gate,
  )


def agree(what: str, ours: Any, theirs: Any, tolerance: float) -> str:
  """The gate: the largest difference / the largest value. Raises where it is too large."""
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  error = float(np.max(np.abs(ours - theirs)) / max(float(np.max(np.abs(theirs))), 1e-30))
  text = f"{what} agrees to {error:.1e}"
  if not error <= tolerance:
    raise FlaxLMError(f"a speed without a result: {text}, {tolerance:.0e} is allowed")
  return text
