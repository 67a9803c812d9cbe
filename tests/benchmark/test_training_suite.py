# SPDX-License-Identifier: Apache-2.0
"""The suite `train` compares like with like: both sides have the same losses."""

import importlib.util
import os

import pytest

from flaxlm.benchmark.suites import train
from flaxlm.benchmark.training_case import find_case
from flaxlm.errors import FlaxLMError

HAS_TORCH = importlib.util.find_spec("torch") is not None


@pytest.mark.timeout(900)  # PyTorch's threads spin where other work needs the cores
@pytest.mark.parity
@pytest.mark.skipif(
  not HAS_TORCH and "FLAXLM_REQUIRE_PARITY" not in os.environ, reason="needs PyTorch"
)
def test_torch_has_the_same_losses(tmp_path):
  """An independent implementation: PyTorch's modules, attention and AdamW, step by step."""
  name = "4x128_context64_batch12"
  inputs = tmp_path / "inputs.npz"
  train.write_inputs(find_case(name), inputs)
  sides = [train.run_side(side, name, inputs) for side in ("flaxlm", "torch eager")]
  assert "agree" in train.compare_losses(sides[0]["losses"], sides[1]["losses"])
  assert sides[0]["losses"][-1] < sides[0]["losses"][0]
  assert all(side["rate"] > 0 for side in sides)


def test_a_speed_without_the_result_is_refused():
  with pytest.raises(FlaxLMError, match="without a result"):
    train.compare_losses([4.0, 3.9], [4.0, 3.91])
  with pytest.raises(FlaxLMError, match="without a result"):
    train.compare_losses([4.0, float("nan")], [4.0, 3.91])


def test_work_is_strict():
  """6 per weight and token, the head included; attention over half of the square, x 3."""
  case = find_case("4x128_context64_batch12")
  weights, tokens = 4 * 12 * 128**2 + 65 * 128, 12 * 64
  attention = 3 * 4 * 4 * 128 * 32 * tokens
  assert train.training_demand(case).flops == 6 * weights * tokens + attention


def test_ratios_are_taken_round_by_round():
  """A machine that halves its speed between rounds leaves the ratio alone."""
  name = "4x128_context64_batch12"
  run = lambda rate: {"rate": rate, "losses": [4.0], "first_seconds": 1.0, "devices": 1}
  sides = {"flaxlm": [run(10.0), run(20.0)], "torch eager": [run(5.0), run(10.0)]}
  (result,) = train.summarise_sides(name, find_case(name), sides)
  assert (result.peer, result.ratio, result.median) == ("torch eager", 2.0, 15.0)
  assert (result.ratio_low, result.ratio_high) == (2.0, 2.0)


def test_losses_that_are_not_numbers_have_no_speed():
  with pytest.raises(FlaxLMError, match="without a result"):
    train.check_losses([4.0, float("inf")])
