# SPDX-License-Identifier: Apache-2.0
"""The vocabulary loss: hidden vectors to logits to cross-entropy, forward and backward.

2 D V FLOPs per token forward, three times as many with both gradients. Bytes are counted as
the planner counts them: logits in float32, written and read LOGIT_PASSES times in all.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.benchmark.measure import BenchOptions, Side, agree, measure_alone, timed
from flaxlm.benchmark.report import Demand, Result
from flaxlm.nn.kernels.products import rows_dot
from flaxlm.planning.roofline import LOGIT_PASSES
from flaxlm.training.losses import cross_entropy

TOLERANCES = {"float32": 2e-3, "bfloat16": 3e-2}
CHECKED_ROWS = 8  # tokens at a time in the check, because logits are large


def bench_loss(options: BenchOptions) -> list[Result]:
  """Milliseconds for a number of tokens, by vocabulary."""
  tokens, width = options.pick((8, 16), (1024, 256), (8192, 2048))
  vocabularies = options.pick((64,), (4096, 32_000), (50_304, 128_256))
  return [
    bench_vocabulary(tokens, width, vocab_size, backward, options)
    for vocab_size in vocabularies
    for backward in (False, True)
  ]


def bench_vocabulary(
  tokens: int, width: int, vocab_size: int, backward: bool, options: BenchOptions
) -> Result:
  R, D, V = tokens, width, vocab_size
  dtype = options.float_dtype
  rng = np.random.default_rng(0)
  x_RD = jnp.asarray(rng.standard_normal((R, D), np.float32), dtype)
  head_DV = jnp.asarray(rng.standard_normal((D, V), np.float32) / D**0.5, dtype)
  targets_R = rng.integers(0, V, R)
  function: Any = jax.value_and_grad(mean_loss, (0, 1)) if backward else mean_loss
  side = Side(jax.jit(function), lambda: (x_RD, head_DV, targets_R))
  timing = measure_alone(side, options)
  loss = timing.result[0] if backward else timing.result
  exact = reference(x_RD, head_DV, targets_R)
  gate = agree("the loss in float64", loss, exact, TOLERANCES[dtype])
  passes = 3 if backward else 1
  item = jnp.dtype(dtype).itemsize
  logits = 4.0 * R * V * (LOGIT_PASSES if backward else 2)
  operands = item * (R * D + D * V) * passes
  flops = 2.0 * R * D * V * passes
  demand = Demand(flops, logits + operands, dtype, 4.0 * R * V + operands)
  case = f"R{R} D{D} V{V} {dtype} " + ("forward+backward" if backward else "forward")
  return timed("loss", case, timing, "ms", gate, demand=demand)


def mean_loss(x_RD: jax.Array, head_DV: jax.Array, targets_R: jax.Array) -> jax.Array:
  logits_RV = rows_dot(x_RD, head_DV, 1, jnp.float32)
  return cross_entropy(logits_RV, targets_R).mean()


def reference(x_RD: Any, head_DV: Any, targets_R: np.ndarray) -> float:
  x_RD, head_DV = np.asarray(x_RD, np.float64), np.asarray(head_DV, np.float64)
  losses = []
  for start in range(0, len(targets_R), CHECKED_ROWS):
    targets = targets_R[start : start + CHECKED_ROWS]
    logits = x_RD[start : start + CHECKED_ROWS] @ head_DV
    high = logits.max(-1, keepdims=True)
    total = np.log(np.exp(logits - high).sum(-1)) + high[:, 0]
    losses.append(total - logits[np.arange(len(targets)), targets])
  return float(np.concatenate(losses).mean())
