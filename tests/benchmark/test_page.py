# SPDX-License-Identifier: Apache-2.0
"""The HTML page: every case is in it, and points and roofs are in the right places."""

import pytest

from flaxlm.benchmark.ceilings import Ceilings
from flaxlm.benchmark.page import bench_view, computing_points, roof, roofline
from flaxlm.benchmark.report import Result
from flaxlm.devices import find_device
from flaxlm.look.page import to_html

CEILINGS = Ceilings({"float32": 100e9, "bfloat16": 80e9}, {1e6: 40e9, 1e9: 10e9})


def result(case: str, **rest) -> Result:
  values = dict(
    flops=5e9, bytes=1e9, seconds=0.1, rounds=3, device="cpu <1>", dtype="float32"
  )
  return Result("matmul", case, 50.0, 45.0, 55.0, "GFLOP/s", **(values | rest))


def test_what_comes_from_outside_is_escaped():
  evil = "<script>alert('x')</script>&\""
  view = bench_view(
    [result(evil, peer=evil, ratio=1.0, correct=evil, device=evil)], CEILINGS
  )
  assert str(view._asdict()).count("<script>") == 6  # title, origin, mark, three cells
  assert "<script>alert" not in to_html(view)


def test_a_point_lies_where_its_work_says():
  """5 FLOPs a byte, 50 GFLOP/s: on the diagonal of 10 GB/s, below the roof of 100."""
  (series,) = computing_points([result("a")])
  assert (series["x"], series["y"]) == ([5.0], [pytest.approx(50.0)])


def test_a_roof_bends_at_its_ridge():
  line = roof("a", 100e9, 10e9, "", (1.0, 1000.0))
  assert line["x"] == [1.0, 10.0, 1000.0] and line["y"] == [10.0, 100.0, 100.0]
  assert roof("a", 100e9, 10e9, "", (20.0, 30.0))["y"] == [100.0] * 3
  assert roof("a", 100e9, 10e9, "", (1.0, 2.0))["y"] == [10.0, 20.0, 20.0]


def test_the_plot_has_every_case_and_peaks_where_they_are_known():
  results = [result("a"), result("a", peer="torch"), result("b"), result("c", flops=0.0)]
  names = {}
  for device in ("h100", "cpu"):
    *roofs, points = roofline(results, CEILINGS, find_device(device))["series"]
    assert [text.split(":")[0] for text in points["labels"]] == ["matmul a", "matmul b"]
    names[device] = [line["name"] for line in roofs]
  measured = ["100 GFLOP/s float32", "80.0 GFLOP/s bfloat16", "40.0 GB/s of a cache"]
  assert names["cpu"] == measured
  assert names["h100"] == [*measured, "published bfloat16", "published float32"]


def test_without_work_there_is_a_table_and_no_plot():
  view = bench_view([result("a", flops=None)], CEILINGS)
  assert not view.data["charts"] and view.data["rows"][0][:3] == ["matmul", "a", "50.0"]
  assert not bench_view([], Ceilings({}, {})).data["charts"]
