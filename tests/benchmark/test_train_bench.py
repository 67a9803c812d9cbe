# SPDX-License-Identifier: Apache-2.0
"""The training benchmark compares like with like: both sides have the same losses."""

import importlib.util
import os

import pytest

from flaxlm.benchmark import train as bench
from flaxlm.errors import FlaxLMError

HAS_TORCH = importlib.util.find_spec("torch") is not None


@pytest.mark.parity
@pytest.mark.skipif(
  not HAS_TORCH and "FLAXLM_REQUIRE_PARITY" not in os.environ, reason="needs PyTorch"
)
def test_torch_has_the_same_losses(tmp_path):
  """An independent implementation: PyTorch's modules, attention and AdamW, step by step."""
  name = "4x128_context64_batch12"
  work = tmp_path / "work.npz"
  bench.write_work(bench.find_case(name), work)
  sides = [bench.run_side(side, name, work) for side in ("flaxlm", "torch eager")]
  assert "agree" in bench.compare(sides[0]["losses"], sides[1]["losses"])
  assert sides[0]["losses"][-1] < sides[0]["losses"][0]
  assert all(side["rate"] > 0 for side in sides)


def test_a_speed_without_the_result_is_refused():
  with pytest.raises(FlaxLMError, match="without a result"):
    bench.compare([4.0, 3.9], [4.0, 3.91])
  with pytest.raises(FlaxLMError, match="without a result"):
    bench.compare([4.0, float("nan")], [4.0, 3.91])


def test_work_is_strict():
  """6 per weight and token, the head included; attention over half of the square, x 3."""
  case = bench.find_case("4x128_context64_batch12")
  weights, tokens = 4 * 12 * 128**2 + 65 * 128, 12 * 64
  attention = 3 * 4 * 4 * 128 * 32 * tokens
  assert bench.work_of(case).flops == 6 * weights * tokens + attention


def test_losses_that_are_not_numbers_have_no_speed():
  with pytest.raises(FlaxLMError, match="without a result"):
    bench.falls([4.0, float("inf")])
