# SPDX-License-Identifier: Apache-2.0
"""Fractions of peaks and limits by hand; a result faster than the peak is refused."""

import pytest

from flaxlm.benchmark.ceilings import Ceilings, ceilings_of, judge
from flaxlm.benchmark.report import Demand, Result
from flaxlm.benchmark.suites.collectives import bus_bytes
from flaxlm.devices import find_device
from flaxlm.errors import FlaxLMError

CEILINGS = Ceilings({"float32": 200e9}, {1e6: 80e9, 1e9: 20e9})


def result(seconds: float, demand: Demand, suite: str = "s") -> Result:
  found = Result(suite, "c", 1.0, 1.0, 1.0, "ms", seconds=seconds)
  found.flops, found.bytes = demand.flops, demand.bytes
  found.footprint, found.dtype = demand.footprint, demand.dtype
  return found


def test_the_bound_is_the_slower_of_arithmetic_and_memory():
  assert CEILINGS.bound(Demand(2e9, 1e9, footprint=1e9)) == pytest.approx(
    0.05
  )  # 1e9 / 20e9
  assert CEILINGS.bound(Demand(40e9, 1e9, footprint=1e9)) == pytest.approx(0.2)  # 40 / 200
  assert CEILINGS.bound(Demand(0.0, 8e5)) == pytest.approx(1e-5)  # a cache holds it: 80e9
  assert CEILINGS.bound(Demand(0.0, 4e9)) == pytest.approx(
    0.2
  )  # larger than what was tried
  assert CEILINGS.bound(Demand(1e9, 0.0)) == pytest.approx(0.005)


def test_an_unknown_rate_gives_no_bound():
  assert CEILINGS.bound(Demand(1e9, 1e6, "bfloat16")) is None
  assert Ceilings({"float32": 1e9}, {}).bound(Demand(1e9, 1e6)) is None
  assert CEILINGS.bound(Demand(0.0, 0.0)) is None


def test_bandwidth_never_falls_with_smaller_arrays():
  """A smaller array's own figure may be worse, because it is too short to time."""
  ceilings = Ceilings({}, {1e5: 10e9, 1e6: 80e9, 1e9: 20e9})
  assert ceilings.bandwidth(1e4) == 80e9
  assert ceilings.bandwidth(2e6) == 20e9
  assert ceilings.main_memory == 20e9


def test_ceilings_are_the_best_rounds():
  product = Demand(2e9, 1e6, "bfloat16", 1e6)
  rows = [result(1.0, product, "matmul"), result(1.0, product, "matmul")]
  rows[0].high, rows[1].high = 90.0, 120.0
  reading = result(1.0, Demand(0.0, 1e6, footprint=1e6), "memory")
  reading.high = 30.0
  transfer = Result("memory", "to device", 1.0, 1.0, 99.0, "GB/s")
  found = ceilings_of([*rows, reading, transfer, result(1.0, product, "train")])
  assert found == Ceilings({"bfloat16": 120e9}, {1e6: 30e9})


def test_fractions():
  h100 = find_device("h100")
  done = result(0.01, Demand(494.7e12 * 0.004, 1e6), "train")  # 40 % of the TF32 peak
  judge([done], Ceilings({"float32": 400e12}, {1e9: 2e12}), h100)
  assert done.peak_fraction == pytest.approx(0.4)
  assert done.measured_limit_fraction == pytest.approx(494.7 * 0.4 / 400)
  unknown = result(0.01, Demand(1e9, 1e6))
  judge([unknown], CEILINGS, find_device("cpu"))
  assert unknown.peak_fraction is None
  assert unknown.measured_limit_fraction == pytest.approx(0.5)


def test_copies_are_compared_with_memory_only_when_no_cache_holds_them():
  h100 = find_device("h100")
  large = result(1e-3, Demand(0.0, 1.675e9, footprint=1.675e9))
  small = result(1e-6, Demand(0.0, 1e7, footprint=1e7))  # 10 TB/s: from the L2 cache
  judge([large, small], Ceilings({}, {}), h100)
  assert large.peak_fraction == pytest.approx(0.5)
  assert small.peak_fraction is None


def test_faster_than_the_peak_is_an_error():
  with pytest.raises(FlaxLMError, match=r"1\.01 of this device's peak"):
    judge([result(1.0, Demand(1.01 * 494.7e12, 1.0))], CEILINGS, find_device("h100"))


def test_beyond_the_measured_limit_there_is_no_fraction():
  """The ceiling was measured at a slower moment, so there is no figure."""
  quick = result(1.0, Demand(300e9, 1.0))
  near = result(1.0, Demand(204e9, 1.0))
  judge([quick, near], CEILINGS, None)
  assert quick.measured_limit_fraction is None
  assert near.measured_limit_fraction == pytest.approx(1.02)


@pytest.mark.parametrize(
  ("kind", "over_the_link"),
  [
    ("all_reduce", 1400),  # 2 x 800 x 7 / 8
    ("all_gather", 700),
    ("reduce_scatter", 700),
    ("all_to_all", 700),
    ("permute", 800),
  ],
)
def test_bus_bandwidth(kind: str, over_the_link: float):
  """nccl-tests, PERFORMANCE.md: 800 bytes among 8 devices."""
  assert bus_bytes(kind, 800, 8) == over_the_link
