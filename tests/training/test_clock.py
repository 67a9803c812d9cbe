# SPDX-License-Identifier: Apache-2.0
"""What becomes of a run's time, on a clock that the tests set."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from flaxlm.config import Config, DataConfig, ModelConfig, TrainingConfig
from flaxlm.runs import METRICS
from flaxlm.training.clock import Clock, Spent, memory_gb, seconds_at_peak, spent_before


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
  """The time, in `now.seconds`."""
  now = SimpleNamespace(seconds=100.0)
  fake = SimpleNamespace(perf_counter=lambda: now.seconds)
  monkeypatch.setattr("flaxlm.training.clock.time", fake)
  return now


def steps(clock: Clock, now: SimpleNamespace, count: int) -> None:
  """Each takes 2 s, of which half a second is waiting for data."""
  for _ in range(count):
    with clock.waiting_for_data():
      now.seconds += 0.5
    now.seconds += 1.5
    clock.step_done(tokens=64.0)


def test_a_block_leaves_out_compiling_evaluating_and_saving(now: SimpleNamespace):
  clock = Clock(begun=90.0, seconds_at_peak=0.8)
  now.seconds += 8.0  # preparing, compiling
  steps(clock, now, 1)  # the first step, which compiles
  steps(clock, now, 4)
  first = clock.rates()
  assert first["perf/tokens_per_sec"] == pytest.approx(4 * 64 / 8)
  assert first["perf/mfu"] == pytest.approx(0.8 / 2)
  assert first["perf/data_wait_fraction"] == pytest.approx(0.25)
  assert first["perf/elapsed_seconds"] == pytest.approx(10 + 8 + 10)
  assert first["perf/goodput"] == pytest.approx(4 * 1.5 / 28)
  assert "perf/drawing_fraction" not in first
  steps(clock, now, 2)
  with clock.stopped():
    now.seconds += 30.0
  steps(clock, now, 3)
  second = clock.rates()
  assert second["perf/tokens_per_sec"] == first["perf/tokens_per_sec"]
  assert second["perf/mfu"] == pytest.approx(first["perf/mfu"])
  assert second["perf/elapsed_seconds"] == pytest.approx(28 + 4 + 30 + 6)
  assert second["perf/goodput"] == pytest.approx(9 * 1.5 / 68), "all nine steps count"


def test_before_the_second_step_there_is_no_rate(now: SimpleNamespace):
  clock = Clock(seconds_at_peak=1.0)
  with clock.stopped():  # what a run begins from is evaluated
    now.seconds += 5.0
  steps(clock, now, 1)
  assert clock.rates() == {"perf/goodput": 0.0, "perf/elapsed_seconds": 7.0}


def test_a_resumed_run_counts_from_its_first_start(now: SimpleNamespace):
  clock = Clock(begun=100.0, before=Spent(elapsed=40.0, trained=10.0))
  steps(clock, now, 5)
  rates = clock.rates()
  assert rates["perf/elapsed_seconds"] == pytest.approx(50)
  assert rates["perf/goodput"] == pytest.approx((10 + 4 * 1.5) / 50)
  assert "perf/mfu" not in rates


def test_work_that_is_done_again_was_not_trained(tmp_path: Path):
  line = lambda step, elapsed, goodput: json.dumps(
    {"step": step, "perf/elapsed_seconds": elapsed, "perf/goodput": goodput}
  )
  lines = [line(10, 20.0, 0.5), '{"step": 12, "eval/loss": 2.0}', line(20, 40.0, 0.6)]
  lines += [line(30, 60.0, None), '{"step": 40, "perf/elap']
  assert spent_before(tmp_path, 20) == Spent()
  (tmp_path / METRICS).write_text("\n".join(lines))
  assert spent_before(tmp_path, 20) == pytest.approx(Spent(40.0, 24.0))
  assert spent_before(tmp_path, 15) == pytest.approx(Spent(40.0, 10.0))
  assert spent_before(tmp_path, 0) == Spent(), "a run that begins anew"


MODEL = ModelConfig(
  depth=3,
  width=32,
  num_heads=4,
  vocab_size=96,
  context=64,
  ffn_width=80,
  tied_embeddings=True,
)


@pytest.mark.parametrize(
  ("kind", "dtype", "peak"),
  [
    ("NVIDIA H200", "bfloat16", 989.4e12),
    ("NVIDIA H200", "float32", 494.7e12),
    ("TPU v5 lite", "bfloat16", 197e12),
    ("Tesla T4", "bfloat16", None),  # its tensor cores do not multiply it
    ("cpu", "float32", None),
    ("A Chip Of Next Year", "bfloat16", None),
  ],
)
def test_mfu_is_strict_and_of_a_known_peak(kind: str, dtype: Any, peak: float | None):
  """6 per parameter that multiplies, and attention over half of the keys: 6 D T per token
  and layer, forward and backward."""
  cfg = Config(
    model=MODEL,
    data=DataConfig(seq_len=64, batch_size=8),
    training=TrainingConfig(dtype=dtype, remat="full", accumulation_steps=2),
  ).resolve(96)
  mesh: Any = SimpleNamespace(
    devices=np.array([[SimpleNamespace(device_kind=kind)] * 4]), size=4
  )
  layer = 4 * 32 * 32 + (3 if cfg.model.gated else 2) * 32 * 80
  per_token = 6 * (3 * layer + 96 * 32) + 3 * 6 * 32 * 64
  expected = None if peak is None else 8 * 64 * per_token / (4 * peak)
  assert seconds_at_peak(cfg, mesh) == (expected and pytest.approx(expected))


def test_memory_is_that_of_the_fullest_device(monkeypatch: pytest.MonkeyPatch):
  device = lambda stats: SimpleNamespace(memory_stats=lambda: stats)
  devices = [{"peak_bytes_in_use": 2_500_000_000}, {"peak_bytes_in_use": 3 * 10**9}]
  monkeypatch.setattr(jax, "local_devices", lambda: [device(x) for x in devices])
  assert memory_gb() == 3.0
  for nothing in (None, {}, {"bytes_limit": 1}):
    monkeypatch.setattr(jax, "local_devices", lambda nothing=nothing: [device(nothing)])
    assert memory_gb() is None
