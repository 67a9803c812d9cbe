# SPDX-License-Identifier: Apache-2.0
"""The training that all sides of the suite `train` do: shapes, optimizer, clock.

The shapes are those of nanoGPT's recipes.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal

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
  # nanoGPT's recipe for a CPU, and its Shakespeare recipe with half the rows; long rows;
  # GPT-2 with 124M parameters, also for a CPU's matrix units.
  "small": {
    "4x128_context64_batch12": Case(gpt2_shape(4, 128, 4, 64, 65), 12, 40),
    "6x384_context256_batch16": Case(gpt2_shape(6, 384, 6, 256, 65), 16, 1),
    "4x256_context1024_batch4": Case(gpt2_shape(4, 256, 4, 1024, 65), 4, 2),
    "4x256_context2048_batch2": Case(gpt2_shape(4, 256, 4, 2048, 65), 2, 2),
    "12x768_context256_batch4": Case(gpt2_shape(12, 768, 12, 256, 50_304), 4, 1),
    "12x768_context256_batch4_bfloat16": Case(
      gpt2_shape(12, 768, 12, 256, 50_304), 4, 1, "bfloat16"
    ),
  },
  "large": {
    "12x768_context1024_batch16_bfloat16": Case(
      gpt2_shape(12, 768, 12, 1024, 50_304), 16, 20, "bfloat16"
    ),
  },
}
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_steps=0)
TIMED_PASSES = 3


def find_case(name: str) -> Case:
  return {case: cases[case] for cases in CASES.values() for case in cases}[name]


def time_steps(
  case: Any,
  windows: Any,
  step: Callable[[Any], Any],
  wait: Callable[[Any], Any],
) -> dict[str, Any]:
  """Runs `step(window)` once over the windows for the losses, then times it.

  `case` has the `tokens` of a step and the `num_steps` of a timed pass. The rates, and the
  best of them, are tokens per second. `wait` returns when the step whose loss it gets is
  done.
  """
  started = time.perf_counter()
  losses = [float(step(windows[0]))]
  first_seconds = time.perf_counter() - started
  losses += [float(step(window)) for window in windows[1:]]
  rates = []
  for _ in range(TIMED_PASSES):
    started = time.perf_counter()
    for number in range(case.num_steps):
      loss = step(windows[number % len(windows)])
    wait(loss)
    seconds = time.perf_counter() - started
    rates.append(case.num_steps * case.tokens / seconds)
  return {
    "rate": max(rates),
    "rates": rates,
    "losses": losses,
    "first_seconds": first_seconds,
  }
