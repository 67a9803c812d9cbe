# SPDX-License-Identifier: Apache-2.0
"""The best that this machine can do, as measured in the same run and as published.

A roofline (Williams et al., 2009): no call takes less time than its FLOPs at the best rate
of matrix products, or than its bytes at the bandwidth of the memory that holds them. A
case's fraction of the measured limit is that bound / its time.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax

from flaxlm.benchmark.report import Demand, Result
from flaxlm.devices import Device, device_of
from flaxlm.errors import FlaxLMError

# A ceiling is the best of a few rounds; a later round may be a little better.
NOISE = 0.05
LARGEST_CACHE = 2**28  # bytes; arrays that are larger come from memory


@dataclasses.dataclass(frozen=True)
class Ceilings:
  """Best measured rates: of matrix products by dtype, of memory by bytes touched."""

  flops: Mapping[str, float]
  bandwidths: Mapping[float, float]  # footprint in bytes: bytes per second

  def bandwidth(self, footprint: float) -> float | None:
    """The best that was measured with arrays of this size or larger: caches are faster."""
    larger = [rate for size, rate in self.bandwidths.items() if size >= footprint]
    return max(larger) if larger else self.main_memory

  @property
  def main_memory(self) -> float | None:
    """The bandwidth of the largest arrays that were measured."""
    return self.bandwidths[max(self.bandwidths)] if self.bandwidths else None

  def bound(self, demand: Demand) -> float | None:
    """The least seconds that the demand takes; None if a rate for it is not known."""
    limits = (
      (demand.flops, self.flops.get(demand.dtype)),
      (demand.bytes, self.bandwidth(demand.footprint or demand.bytes)),
    )
    seconds = [amount / rate if rate else None for amount, rate in limits if amount]
    known = [s for s in seconds if s is not None]
    return max(known) if known and len(known) == len(seconds) else None


def ceilings_of(results: Sequence[Result]) -> Ceilings:
  """The best rounds of the `matmul` and `memory` suites."""
  flops: dict[str, float] = {}
  bandwidths: dict[float, float] = {}
  for result in results:
    demand, rate = result.demand, 1e9 * result.high
    if demand is not None and result.suite == "matmul":
      flops[demand.dtype] = max(flops.get(demand.dtype, 0.0), rate)
    if demand is not None and result.suite == "memory" and demand.footprint:
      bandwidths[demand.footprint] = max(bandwidths.get(demand.footprint, 0.0), rate)
  return Ceilings(flops, bandwidths)


def judge(results: Sequence[Result], ceilings: Ceilings, device: Device | None) -> None:
  """Fills in every result's fractions of the published peak and of the measured limit,
  both for one device, as the demand is.

  Raises `FlaxLMError` if a result is faster than the peak: the time or the formula must be
  wrong.
  """
  for result in results:
    demand = result.demand
    if demand is None or not result.seconds:
      continue
    peak, rate = device and device.flops(demand.dtype), demand.flops / result.seconds
    memory = device and device.memory_bandwidth
    if demand.flops and peak:
      result.peak_fraction = rate / peak
    elif memory and demand.bytes and (demand.footprint or 0) >= LARGEST_CACHE:
      result.peak_fraction = demand.bytes / result.seconds / memory
    if result.peak_fraction is not None and result.peak_fraction > 1:
      raise FlaxLMError(
        f"{result.suite} {result.case} is {result.peak_fraction:.2f} of this device's peak",
        "nothing is faster than its peak: the time or the formula is wrong; please report",
      )
    bound = ceilings.bound(demand)
    if bound is not None:
      fraction = bound / result.seconds
      # Further above the ceiling than noise explains: the ceiling was measured while the
      # machine was busier, and says nothing.
      result.measured_limit_fraction = fraction if fraction <= 1 + NOISE else None


@functools.cache
def this_device() -> Device | None:
  """The published peaks of the device that JAX runs on, if they are known."""
  return device_of(jax.devices()[0].device_kind)
