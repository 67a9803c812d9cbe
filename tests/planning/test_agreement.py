# SPDX-License-Identifier: Apache-2.0
"""The planner's memory against libtpu's, for chips that are not present: within 10 %.

What the compiler said stands in a file (benchmarks/agreement.py), so that no compiler is
needed to see that the planner still agrees. Compiling anew needs `pip install
'flaxlm[tpu]'`, and no TPU: half an hour on two cores, for all.
"""

import importlib.util

import pytest

from benchmarks.agreement import NEAR, Point, grid, read_raw
from flaxlm.planning.network import network_bytes

compiles = [
  pytest.mark.slow,
  pytest.mark.usefixtures("compiled_for_users"),
  pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
  pytest.mark.timeout(900),
]

# Where the planner is further off, and why. Not in the grid, with what was seen of GPT-2
# 124M: without a loop over layers (`scanned=False`) the compiler computes elementwise
# results again by itself, so that with remat=none it needs 24 % less, and 11 % more with
# full. Nor two tensor members with remat=none: the compiler keeps 19 % more of llama_1b,
# since merging batch and heads in `nn.attention.mix` makes both attend to all heads.
UNKEPT = (
  "the gradient of the logits in bfloat16, 0.41 GB, is made anew in each product that "
  "reads it; with remat=none, on a mesh of one, and with fsdp the compiler keeps it"
)
OUTSIDE = {
  "gpt2_124m v5e data=8 32x1024 dots": UNKEPT,
  "gpt2_124m v5e data=8 32x1024 full": UNKEPT,
}
# The quickest to trace, of each kind; the others are a dozen seconds.
QUICK = {
  "gpt2_124m v5e data=1 4x1024 dots",
  "gpt2_124m v5e fsdp=4 16x1024 dots",
  "llama_1b v5e fsdp=8 8x1024 full optimizer.kind=adafactor",
  "gpt2_124m v5e data=1 64x1024 decode",
  "llama3_8b v5e tensor=8 8x8192 decode model.depth=4",
  "mistral_7b v6e tensor=4 32x32768 decode model.depth=4",
}
# Those that are compiled anew with the other slow tests, where libtpu is installed.
ANEW = {
  "gpt2_124m v5e data=1 4x1024 dots",
  "gpt2_124m v5e data=8 64x1024 dots accumulation-steps=4",
  "gpt2_124m v5e fsdp=4 16x1024 none",
  "llama_1b v5e fsdp=2,tensor=4 8x2048 full sequence-parallel=true",
  "mistral_7b v6e tensor=4 32x32768 decode model.depth=4",
}


def marked(among: set[str], mark: pytest.MarkDecorator) -> list:
  """The points of the grid; those that are not `among` have the mark."""
  marks = lambda point: () if point.name in among else mark
  return [pytest.param(one, marks=marks(one), id=one.name) for one in grid()]


def difference(point: Point, compiled_bytes: int) -> float:
  """Planned / compiled - 1, printed."""
  planned, moment = point.planned()
  found = planned / compiled_bytes - 1
  print(f"{point.name}: planned / compiled - 1 = {found:+.3f}, at {moment}")
  return found


def test_the_grid_is_large_and_agrees():
  names = [point.name for point in grid()]
  assert len(names) >= 40 and len(set(names)) == len(names)
  assert read_raw().keys() == set(names)
  assert set(names) >= OUTSIDE.keys() | QUICK | ANEW
  assert len(OUTSIDE) <= len(names) / 10
  for word in ("decode", "lora", "stage=", "mixtral", "sequence-parallel", "muon", "x8192"):
    assert any(word in name for name in names), word


@pytest.mark.parametrize("point", marked(QUICK, pytest.mark.slow))
def test_the_planner_agrees_with_what_was_compiled(point: Point):
  far = abs(difference(point, read_raw()[point.name]["peak_bytes"]))
  assert far < (0.25 if point.name in OUTSIDE else NEAR)
  assert far > NEAR or point.name not in OUTSIDE, "it agrees: leave it out of OUTSIDE"


class TestCompiled:
  pytestmark = compiles

  @pytest.mark.parametrize("point", marked(ANEW, pytest.mark.fuzz))
  def test_memory_is_within_ten_percent(self, point: Point):
    compiled = point.compiled()
    assert compiled.error is None and compiled.peak_bytes is not None
    far = abs(difference(point, compiled.peak_bytes))
    assert far < (0.25 if point.name in OUTSIDE else NEAR)

  def test_traffic_of_fsdp_is_as_in_the_roofline(self):
    """Weights gathered twice, gradients reduced once. Measured: 13.6 % more, for shards go
    round 16 times on a ring of 16, and the embedding's gradient travels in float32.
    """
    point = Point("llama3_8b v5p fsdp=16 16x512 full")
    sent = sum(one.bytes for one in point.compiled().collectives if one.axes == "fsdp")
    expected = network_bytes(point.cfg, point.sizes)["fsdp"]
    assert sent == pytest.approx(expected, rel=0.15)

  def test_too_large_a_step_is_a_clean_result(self, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX2")  # which libtpu does not know
    point = Point("llama_1b v5e fsdp=8 64x2048 dots")
    compiled = point.compiled()
    assert compiled.error is not None and "out of memory" in compiled.error
    usable = point.device.usable_bytes
    assert usable is not None and point.planned()[0] > usable
