# SPDX-License-Identifier: Apache-2.0
"""What this machine can do at best: measured in the same run, and on paper.

A roofline (Williams et al., 2009): no call is faster than its operations at the best rate
of matrix products, nor than its bytes at the bandwidth of the memory that holds them. A
case's fraction of the measured limit is that bound / its time.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax

from flaxlm.benchmark.matmul import bench_matmul
from flaxlm.benchmark.measure import Setting
from flaxlm.benchmark.memory import bench_memory
from flaxlm.benchmark.report import Result, Work
from flaxlm.errors import FlaxLMError
from flaxlm.planning.devices import Device, device_of

# A ceiling is the best of a few rounds: another moment may be a little better.
NOISE = 0.05
LARGEST_CACHE = 2**28  # bytes: what no cache holds is read from memory


@dataclasses.dataclass(frozen=True)
class Ceilings:
  """Best measured rates: of matrix products by dtype, of memory by bytes touched."""

  flops: Mapping[str, float]
  bandwidths: Mapping[float, float]  # footprint in bytes: bytes per second

  def bandwidth(self, footprint: float) -> float | None:
    """The best that was seen with that much memory or more: smaller caches are faster."""
    larger = [rate for size, rate in self.bandwidths.items() if size >= footprint]
    return max(larger) if larger else self.main_memory

  @property
  def main_memory(self) -> float | None:
    """Of the largest arrays that were measured."""
    return self.bandwidths[max(self.bandwidths)] if self.bandwidths else None

  def bound(self, work: Work) -> float | None:
    """Seconds that the work takes at least; None if a rate that it needs is not known."""
    seconds = 0.0
    for amount, rate in (
      (work.flops, self.flops.get(work.dtype)),
      (work.bytes, self.bandwidth(work.footprint or work.bytes)),
    ):
      if amount and not rate:
        return None
      seconds = max(seconds, amount / rate if amount and rate else 0.0)
    return seconds or None


def ceilings_of(results: Sequence[Result]) -> Ceilings:
  """The best rounds of the `matmul` and `memory` suites."""
  flops: dict[str, float] = {}
  bandwidths: dict[float, float] = {}
  for result in results:
    work = result.work
    if work is None or result.suite not in ("matmul", "memory"):
      continue
    rate = 1e9 * result.high
    if result.suite == "matmul":
      flops[work.dtype] = max(flops.get(work.dtype, 0.0), rate)
    elif work.footprint:
      bandwidths[work.footprint] = max(bandwidths.get(work.footprint, 0.0), rate)
  return Ceilings(flops, bandwidths)


def measure_ceilings(setting: Setting) -> Ceilings:
  """For suites that run without those of matrix products and memory."""
  short = dataclasses.replace(setting, rounds=min(3, setting.rounds), peer=None)
  return ceilings_of([*bench_matmul(short, square_only=True), *bench_memory(short)])


def judge(results: Sequence[Result], ceilings: Ceilings, device: Device | None) -> None:
  """Fills in every result's fractions of the published peak and of the measured limit,
  both of one device, as the work is.

  Raises `FlaxLMError` where something was faster than the peak: then the time or the
  formula is wrong, and the figure would be a lie.
  """
  for result in results:
    work = result.work
    if work is None or not result.seconds:
      continue
    peak, rate = device and device.flops(work.dtype), work.flops / result.seconds
    memory = device and device.memory_bandwidth
    if work.flops and peak:
      result.peak_fraction = rate / peak
    elif memory and work.bytes and (work.footprint or 0) >= LARGEST_CACHE:
      result.peak_fraction = work.bytes / result.seconds / memory
    if result.peak_fraction is not None and result.peak_fraction > 1:
      raise FlaxLMError(
        f"{result.suite} {result.case} is {result.peak_fraction:.2f} of this device's peak",
        "nothing is faster than its peak: the time or the formula is wrong; please report",
      )
    bound = ceilings.bound(work)
    if bound is not None:
      fraction = bound / result.seconds
      # Beyond noise the ceiling is the wrong one, as when a neighbour slept later on.
      result.measured_limit_fraction = fraction if fraction <= 1 + NOISE else None


@functools.cache
def this_device() -> Device | None:
  """The published peaks of what JAX runs on, if there are any."""
  return device_of(jax.devices()[0].device_kind)
