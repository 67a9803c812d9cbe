# SPDX-License-Identifier: Apache-2.0
"""The training benchmark compares like with like: both sides have the same losses."""

import importlib.util
import os

import pytest

from flaxlm.benchmark import train as bench
from flaxlm.benchmark.report import summarise
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
  bench.write_work(bench.CASES[name], work)
  sides = [bench.run_side(side, name, work) for side in ("flaxlm", "torch")]
  assert "agree" in bench.compare(sides[0]["losses"], sides[1]["losses"])
  assert sides[0]["losses"][-1] < sides[0]["losses"][0]
  assert all(side["rate"] > 0 for side in sides)


def test_a_speed_without_the_result_is_refused():
  with pytest.raises(FlaxLMError, match="without a result"):
    bench.compare([4.0, 3.9], [4.0, 3.91])
  with pytest.raises(FlaxLMError, match="without a result"):
    bench.compare([4.0, float("nan")], [4.0, 3.91])


def test_ratios_are_taken_round_by_round():
  """A machine that halves its speed between rounds leaves the ratio alone."""
  result = summarise("s", "c", [10.0, 20.0, 40.0], "tokens/s", [5.0, 10.0, 20.0])
  assert (result.ratio, result.ratio_low, result.ratio_high) == (2.0, 2.0, 2.0)
  assert (result.median, result.low, result.high) == (20.0, 10.0, 40.0)
