# SPDX-License-Identifier: Apache-2.0
"""What a run makes of its time and of its devices: rates, MFU, goodput, memory."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from flaxlm.config import ResolvedConfig
from flaxlm.cost import step_cost
from flaxlm.devices import device_of
from flaxlm.runs import METRICS, lines_of

ELAPSED, GOODPUT, MFU = "perf/elapsed_seconds", "perf/goodput", "perf/mfu"


class Spent(NamedTuple):
  """Seconds of a run, over all processes that trained it one after the other."""

  elapsed: float = 0.0  # since each of them began
  trained: float = 0.0  # of these, in steps that the run still has


class Clock:
  """Rates over blocks of steps. A block ends when the host has read its last result.

  What lies between blocks is no training: preparing, compiling, evaluating, saving. Neither
  is waiting for data.
  """

  def __init__(
    self,
    begun: float | None = None,
    before: Spent = Spent(),  # noqa: B008 - as frozen as a number
    seconds_at_peak: float | None = None,
  ):
    """`begun` is when this process began, by `time.perf_counter`, and `before` what the run
    had spent by then; `seconds_at_peak` is `seconds_at_peak` below."""
    self.begun = time.perf_counter() if begun is None else begun
    self.before, self.trained = before, before.trained
    self.seconds_at_peak = seconds_at_peak
    self.first_step_done = False
    self.restart()

  def restart(self) -> None:
    """Begins a block."""
    self.started = time.perf_counter()
    self.num_steps, self.tokens = 0, 0.0
    self.data_seconds = self.drawing_seconds = 0.0

  @contextlib.contextmanager
  def stopped(self) -> Iterator[None]:
    """Ends the block; what happens inside is in none, and the next one begins after it."""
    self._end()
    yield
    self.restart()

  def _end(self) -> float:
    """Counts the block, which ends now, as trained; returns its seconds."""
    seconds = time.perf_counter() - self.started
    if self.first_step_done:
      self.trained += seconds - self.data_seconds
    return seconds

  @contextlib.contextmanager
  def waiting_for_data(self) -> Iterator[None]:
    started = time.perf_counter()
    yield
    self.data_seconds += time.perf_counter() - started

  @contextlib.contextmanager
  def drawing(self) -> Iterator[None]:
    started = time.perf_counter()
    yield
    self.drawing_seconds += time.perf_counter() - started

  def step_done(self, tokens: float) -> None:
    if self.first_step_done:
      self.num_steps += 1
      self.tokens += tokens
    else:  # the first step includes compiling
      self.first_step_done = True
      self.restart()

  def rates(self) -> dict[str, float]:
    """Ends the block and begins the next; its figures, those of the run's whole time, and
    the memory that devices have used.

    Of the block: tokens per second, MFU where the peak is known, and the shares of time
    spent waiting for data and drawing completions.
    """
    num_steps, tokens = self.num_steps, self.tokens
    waited, drawn = self.data_seconds, self.drawing_seconds
    seconds = self._end()
    self.restart()
    rates = {}
    if tokens:
      rates["perf/tokens_per_sec"] = tokens / seconds
      if self.seconds_at_peak is not None:
        rates[MFU] = num_steps * self.seconds_at_peak / seconds
      rates["perf/data_wait_fraction"] = waited / seconds
      if drawn:
        rates["perf/drawing_fraction"] = drawn / seconds
    elapsed = self.before.elapsed + self.started - self.begun
    rates |= {GOODPUT: self.trained / elapsed, ELAPSED: elapsed}
    used = memory_gb()
    return rates if used is None else rates | {"perf/memory_gb": used}


def seconds_at_peak(cfg: ResolvedConfig, mesh: Mesh) -> float | None:
  """Seconds that a training step would take at the peak of its devices; MFU is this over
  what it takes. None if no data sheet gives their peak in the dtype of the computation.

  FLOPs are strict (`flaxlm.cost`): nothing for masked keys or for what is computed twice.
  """
  device = device_of(mesh.devices.flat[0].device_kind)
  peak = device.flops(cfg.training.dtype) if device is not None else None
  return peak and step_cost(cfg).strict_flops / (mesh.size * peak)


def memory_gb() -> float | None:
  """The most that a device of this process has had in use so far, in GB of 1e9 bytes; None
  where devices do not tell, as a CPU."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  used = [found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found]
  return max(used) / 1e9 if used else None


def spent_before(run_dir: Path, first_step: int) -> Spent:
  """What a run that resumes after `first_step` has spent, by its metrics. Steps that are
  done again count as elapsed, not as trained."""
  spent = Spent()
  for _, line in lines_of(run_dir / METRICS) if first_step else ():
    elapsed, goodput = _number(line, ELAPSED), _number(line, GOODPUT)
    if elapsed is not None and goodput is not None:
      trained = elapsed * goodput if line["step"] <= first_step else spent.trained
      spent = Spent(max(elapsed, spent.elapsed), trained)
  return spent


def _number(line: Mapping[str, Any], name: str) -> float | None:
  value = line.get(name)
  return value if type(value) in (int, float) else None
