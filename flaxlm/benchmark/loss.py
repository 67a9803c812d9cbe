# SPDX-License-Identifier: Apache-2.0
"""The vocabulary loss: hidden vectors to logits to cross-entropy, forward and backward.

2 D V FLOPs per token, three times that with both gradients. Bytes are those of the
planner: logits in float32, written and read LOGIT_PASSES times.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.benchmark.measure import Setting, Side, agree, measure, timed
from flaxlm.benchmark.report import Result, Work
from flaxlm.nn.kernels.products import rows_dot
from flaxlm.planning.roofline import LOGIT_PASSES
from flaxlm.training.losses import cross_entropy

TOLERANCES = {"float32": 2e-3, "bfloat16": 3e-2}
CHECKED = 8  # tokens


def bench_loss(setting: Setting) -> list[Result]:
  """Milliseconds for some tokens, by vocabulary."""
  tokens, width = setting.pick((8, 16), (1024, 256), (8192, 2048))
  vocabularies = setting.pick((64,), (4096, 32_000), (50_304, 128_256))
  dtype = setting.pick("float32", "float32", "bfloat16")
  results = []
  for vocab_size in vocabularies:
    for backward in (False, True):
      results.append(bench_vocabulary(tokens, width, vocab_size, dtype, backward, setting))
  return results


def bench_vocabulary(
  tokens: int, width: int, vocab_size: int, dtype: str, backward: bool, setting: Setting
) -> Result:
  R, D, V = tokens, width, vocab_size
  rng = np.random.default_rng(0)
  x_RD = jnp.asarray(rng.standard_normal((R, D), np.float32), dtype)
  head_DV = jnp.asarray(rng.standard_normal((D, V), np.float32) / D**0.5, dtype)
  targets_R = rng.integers(0, V, R)
  function: Any = jax.value_and_grad(mean_loss, (0, 1)) if backward else mean_loss
  side = Side(jax.jit(function), lambda: (x_RD, head_DV, targets_R))
  timing = measure({"loss": side}, setting)["loss"]
  passes = 3 if backward else 1
  item = jnp.dtype(dtype).itemsize
  logits = 4.0 * R * V * (LOGIT_PASSES if backward else 2)
  operands = item * (R * D + D * V) * passes
  work = Work(2.0 * R * D * V * passes, logits + operands, dtype, 4.0 * R * V + operands)
  case = f"R{R} D{D} V{V} {dtype} " + ("forward+backward" if backward else "forward")
  result = timed(("loss", case), timing, "ms", work=work)
  loss = timing.result[0] if backward else timing.result
  result.correct = agree(
    "the loss in float64", loss, reference(x_RD, head_DV, targets_R), TOLERANCES[dtype]
  )
  return result


def mean_loss(x_RD: jax.Array, head_DV: jax.Array, targets_R: jax.Array) -> jax.Array:
  logits_RV = rows_dot(x_RD, head_DV, 1, jnp.float32)
  return cross_entropy(logits_RV, targets_R).mean()


def reference(x_RD: Any, head_DV: Any, targets_R: np.ndarray) -> float:
  x_RD, head_DV = np.asarray(x_RD, np.float64), np.asarray(head_DV, np.float64)
  losses = []
  for start in range(0, len(targets_R), CHECKED):  # a few rows at a time: logits are large
    targets = targets_R[start : start + CHECKED]
    logits = x_RD[start : start + CHECKED] @ head_DV
    high = logits.max(-1, keepdims=True)
    total = np.log(np.exp(logits - high).sum(-1)) + high[:, 0]
    losses.append(total - logits[np.arange(len(targets)), targets])
  return float(np.concatenate(losses).mean())
