# SPDX-License-Identifier: Apache-2.0
"""The training that all sides of the suite `train` do: shapes, parameters, batches, clock.

The shapes are those of nanoGPT's recipes. All sides start from the same parameters and see
the same batches, which one file holds.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flaxlm.config import ModelConfig, OptimizerConfig, ResolvedModel


@dataclasses.dataclass(frozen=True)
class Case:
  """GPT-2's architecture without biases in the projections, one text per row."""

  model: ResolvedModel
  batch_size: int
  num_steps: int  # timed
  dtype: Literal["float32", "bfloat16"] = "float32"

  @property
  def tokens(self) -> int:
    return self.batch_size * self.model.context


def gpt2_shape(
  depth: int, width: int, num_heads: int, context: int, vocab: int
) -> ResolvedModel:
  return ModelConfig(
    depth=depth,
    width=width,
    num_heads=num_heads,
    context=context,
    vocab_size=vocab,
    positions="learned",
    norm="layernorm",
    norm_epsilon=1e-5,
    activation="gelu",
    gated=False,
  ).resolve()


CASES = {
  "tiny": {"1x16_context8_batch2": Case(gpt2_shape(1, 16, 2, 8, 65), 2, 1)},
  # nanoGPT's recipe for a CPU, and its Shakespeare recipe with half the rows.
  "small": {
    "4x128_context64_batch12": Case(gpt2_shape(4, 128, 4, 64, 65), 12, 40),
    "6x384_context256_batch16": Case(gpt2_shape(6, 384, 6, 256, 65), 16, 1),
  },
  "large": {
    "12x768_context1024_batch16_bfloat16": Case(
      gpt2_shape(12, 768, 12, 1024, 50_304), 16, 20, "bfloat16"
    ),
  },
}
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_steps=0)
CHECKED_STEPS = 4
TIMED_PASSES = 3


def find_case(name: str) -> Case:
  (case,) = (cases[name] for cases in CASES.values() if name in cases)
  return case


def write_inputs(case: Case, path: Path) -> None:
  """Writes initial parameters, by their names in our tree, and windows of tokens."""
  rng = np.random.default_rng(0)
  cfg = case.model
  L, D, N, F = cfg.depth, cfg.width, cfg.num_heads, cfg.ffn_width
  H = D // N
  normal = lambda *shape: np.asarray(rng.normal(0, 0.02, shape), np.float32)
  ones = lambda *shape: np.ones(shape, np.float32)
  arrays: dict[str, np.ndarray] = {
    "embedding/table": normal(cfg.vocab_size, D),
    "positions/table": normal(cfg.context, D),
    "final_norm/scale": ones(D),
    "final_norm/bias": normal(D),
    "blocks/attention/o/kernel": normal(L, N, H, D),
    "blocks/ffn/up/kernel": normal(L, D, F),
    "blocks/ffn/down/kernel": normal(L, F, D),
  }
  for name in "qkv":
    arrays[f"blocks/attention/{name}/kernel"] = normal(L, D, N, H)
  for name in ("attention_norm", "ffn_norm"):
    arrays[f"blocks/{name}/scale"] = ones(L, D)
    arrays[f"blocks/{name}/bias"] = normal(L, D)
  shape = (CHECKED_STEPS, case.batch_size, cfg.context + 1)
  arrays["windows"] = rng.integers(1, cfg.vocab_size, shape)
  np.savez(path, allow_pickle=False, **arrays)


def time_steps(
  case: Case,
  windows: np.ndarray,
  step: Callable[[np.ndarray], Any],
  wait: Callable[[Any], Any],
) -> dict[str, Any]:
  """Runs `step(window)` once over the windows for the losses, then times it.

  The rate is that of the best pass, in tokens per second. `wait` returns when the step
  whose loss it gets is done.
  """
  started = time.perf_counter()
  losses = [float(step(windows[0]))]
  first_seconds = time.perf_counter() - started
  losses += [float(step(window)) for window in windows[1:]]
  best = 0.0
  for _ in range(TIMED_PASSES):
    started = time.perf_counter()
    for number in range(case.num_steps):
      loss = step(windows[number % len(windows)])
    wait(loss)
    seconds = time.perf_counter() - started
    best = max(best, case.num_steps * case.tokens / seconds)
  return {"rate": best, "losses": losses, "first_seconds": first_seconds}
