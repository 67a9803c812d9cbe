# SPDX-License-Identifier: Apache-2.0
"""How a time is taken: compiling apart, rounds of all sides in turn, results awaited."""

import dataclasses
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from flaxlm.benchmark.report import Demand, Result, figures, summarise
from flaxlm.config import MeshConfig
from flaxlm.errors import FlaxLMError

Size = Literal["tiny", "small", "large"]  # for tests, for a CPU, for an accelerator

MAX_CALLS = 1000  # in a round


@dataclasses.dataclass(frozen=True)
class BenchOptions:
  """How large the cases are, how long they are measured, and against whom."""

  size: Size = "small"
  rounds: int = 5
  round_seconds: float = 0.15  # at least, per side
  peer: str | None = None
  mesh: MeshConfig = dataclasses.field(default_factory=lambda: {"data": -1})

  def pick(self, tiny: Any, small: Any, large: Any) -> Any:
    """The one of three values that belongs to the size."""
    return {"tiny": tiny, "small": small, "large": large}[self.size]

  @property
  def float_dtype(self) -> Literal["float32", "bfloat16"]:
    """The dtype of models: bfloat16 on an accelerator, whose cases are large."""
    return "bfloat16" if self.size == "large" else "float32"


class Side(NamedTuple):
  """Something to be timed: `call(*prepare())`, of which only the call is timed."""

  call: Callable[..., Any]
  prepare: Callable[[], Sequence[Any]] = tuple
  queued: bool = False  # wait only for the last call of a round


@dataclasses.dataclass(frozen=True)
class Timing:
  """Seconds per call, one figure per round; the first call, and its result, apart."""

  first_seconds: float
  rounds: Sequence[float]
  result: Any

  @property
  def median(self) -> float:
    return statistics.median(self.rounds)


def measure(sides: Mapping[str, Side], options: BenchOptions) -> dict[str, Timing]:
  """Times all sides in alternating order, one round of each in turn, so that a machine
  that slows down, or a busy neighbour, affects all of them.

  A round of a side has as many calls as fill `round_seconds`. Every call is waited for,
  unless the side is `queued`: the parts of a larger program are, because an accelerator
  finishes a small one sooner than the host notices.
  """
  first, result, calls = {}, {}, {}
  for name, side in sides.items():
    arguments = jax.block_until_ready(side.prepare())
    started = time.perf_counter()
    result[name] = jax.block_until_ready(side.call(*arguments))
    first[name] = time.perf_counter() - started
    warm = _seconds_per_call(side, 1)
    calls[name] = max(1, min(MAX_CALLS, math.ceil(options.round_seconds / warm)))
  rounds: dict[str, list[float]] = {name: [] for name in sides}
  for number in range(options.rounds):
    order = list(sides)[:: 1 if number % 2 == 0 else -1]
    for name in order:
      rounds[name].append(_seconds_per_call(sides[name], calls[name]))
  return {name: Timing(first[name], rounds[name], result[name]) for name in sides}


def measure_alone(side: Side, options: BenchOptions) -> Timing:
  """Times a side that is compared with no other."""
  return measure({"alone": side}, options)["alone"]


def _seconds_per_call(side: Side, calls: int) -> float:
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
  suite: str,
  case: str,
  timing: Timing,
  unit: str,
  gate: str,
  amount: float = 1.0,
  demand: Demand | None = None,
) -> Result:
  """The result of a timing; `amount` is how much of the unit one call handles, and `gate`
  what the check of its result found."""
  rounds = figures(timing.rounds, unit, amount)
  result = summarise(suite, case, rounds, unit, gate, demand)
  result.first_seconds, result.seconds = timing.first_seconds, timing.median
  return result


def agree(what: str, ours: Any, theirs: Any, tolerance: float) -> str:
  """Checks the largest difference / the largest value, and says what it is.

  Raises `FlaxLMError` if it is above the tolerance.
  """
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  error = float(np.max(np.abs(ours - theirs)) / max(float(np.max(np.abs(theirs))), 1e-30))
  return within(f"{what} agrees", error, tolerance)


def within(what: str, error: float, tolerance: float) -> str:
  """Says how large the error is. Raises `FlaxLMError` if it is above the tolerance."""
  text = f"{what} to {error:.1e}"
  if not error <= tolerance:
    raise wrong_result(f"{text}, {tolerance:.0e} is allowed")
  return text


def wrong_result(what: str) -> FlaxLMError:
  """The error of a program that was timed but did not compute what it should."""
  return FlaxLMError(f"a speed without a result: {what}")


def run_python(*arguments: str, environment: Mapping[str, str] | None = None) -> str:
  """The output of `python ARGUMENTS`, in a process where nothing is compiled, allocated or
  cached yet. Raises `FlaxLMError` with the end of its stderr, and its exit code."""
  run = subprocess.run(
    [sys.executable, *arguments],
    capture_output=True,
    text=True,
    env=os.environ | (environment or {}),
    check=False,
  )
  if run.returncode:
    reason = run.stderr.strip()[-400:] or "no message"
    error = FlaxLMError(f"python {' '.join(arguments)} failed: {reason}")
    error.exit_code = max(1, run.returncode)
    raise error
  return run.stdout
