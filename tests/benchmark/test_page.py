# SPDX-License-Identifier: Apache-2.0
"""The HTML page: text is escaped, every case is in it, points are in the right places."""

import xml.etree.ElementTree as ET

import pytest

from flaxlm.benchmark.ceilings import Ceilings
from flaxlm.benchmark.page import Axes, computing_points, render, roof, roofline
from flaxlm.benchmark.report import Result
from flaxlm.planning.devices import find_device

CEILINGS = Ceilings({"float32": 100e9, "bfloat16": 80e9}, {1e6: 40e9, 1e9: 10e9})


def result(case: str, **rest) -> Result:
  values = dict(
    flops=5e9, bytes=1e9, seconds=0.1, rounds=3, device="cpu <1>", dtype="float32"
  )
  return Result("matmul", case, 50.0, 45.0, 55.0, "GFLOP/s", **(values | rest))


def svg(text: str) -> ET.Element:
  start = text.index("<svg")
  return ET.fromstring(text[start : text.index("</svg>") + 6])


def test_what_comes_from_outside_is_escaped():
  evil = "<script>alert('x')</script>&\""
  page = render([result(evil, peer=evil, ratio=1.0, correct=evil, device=evil)], CEILINGS)
  assert "<script" not in page
  # Title, heading, origin, mark, case, ratio, check.
  assert page.count("&lt;script&gt;") == 7
  svg(page)


def test_nothing_is_loaded_from_elsewhere():
  page = render([result("a")], CEILINGS)
  assert "http" not in page and "src=" not in page and "url(" not in page
  assert "light-dark(" in page


def test_a_point_lies_where_its_work_says():
  """5 FLOPs a byte, 50 GFLOP/s: on the diagonal of 10 GB/s, below the roof of 100."""
  ((_, intensity, rate),) = computing_points([result("a")])
  assert (intensity, rate) == (5.0, pytest.approx(50e9))
  axes = Axes([1.0, 100.0], [1e9, 1e11])
  middle = axes.x(1.0), axes.x(10.0), axes.x(100.0)
  assert middle[1] - middle[0] == pytest.approx(middle[2] - middle[1])
  assert axes.y(1e11) < axes.y(1e10) < axes.y(1e9)


def test_a_roof_bends_at_its_ridge():
  axes = Axes([1.0, 100.0], [1e9, 1e12])
  corners = ET.fromstring(roof(axes, 100e9, 10e9, "roof")).get("points", "").split()
  assert corners[1] == f"{axes.x(10.0):.1f},{axes.y(100e9):.1f}"
  assert corners[2].endswith(f",{axes.y(100e9):.1f}")


def test_the_plot_has_every_case_and_peaks_where_they_are_known():
  results = [result("a"), result("a", peer="torch"), result("b"), result("c", flops=0.0)]
  plot = svg(roofline(results, CEILINGS, None))
  titles = [title.text or "" for title in plot.iter("title")]
  assert [title.split(":")[0] for title in titles] == ["matmul a", "matmul b"]
  assert 'class="peak"' in roofline(results, CEILINGS, find_device("h100"))
  assert 'class="peak"' not in roofline(results, CEILINGS, find_device("cpu"))


def test_without_work_there_is_a_table_and_no_plot():
  page = render([result("a", flops=None)], CEILINGS)
  assert "<svg" not in page and "<td>a</td>" in page
  assert "<svg" not in render([], Ceilings({}, {}))
