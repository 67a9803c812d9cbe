# SPDX-License-Identifier: Apache-2.0
"""From a fresh process to its first training step, without and with JAX's compile cache.

Each figure comes from a process of its own, which runs this file's `main` with a folder for
the cache: an empty one for the cold start, the same folder again for the warm one.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flaxlm.benchmark.measure import BenchOptions, agree, run_python
from flaxlm.benchmark.report import Result, summarise
from flaxlm.config import DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
from flaxlm.data.objectives import Windows, next_token
from flaxlm.nn.models import build_model
from flaxlm.platform import fused_kernel, start_jax
from flaxlm.sharding import make_mesh
from flaxlm.training.optimizer import build_optimizer
from flaxlm.training.step import (
  abstract_batch,
  abstract_state,
  init_state,
  jit_train_step,
  put_batch,
)

MAX_ROUNDS = 3  # because a process compiles for seconds
SHAPES = {"tiny": (1, 8, 1), "small": (4, 128, 4), "large": (12, 768, 12)}  # L, D, N


def bench_compile(options: BenchOptions) -> list[Result]:
  """Seconds of tracing, of compiling, and of the whole start, cold and warm."""
  kinds: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
  for _ in range(min(MAX_ROUNDS, options.rounds)):
    with tempfile.TemporaryDirectory() as folder:
      for runs in kinds.values():
        runs.append(run_start(options.size, folder))
  losses = [run["loss"] for runs in kinds.values() for run in runs]
  gate = agree("the first loss of each process", losses[1:], losses[:1], 1e-6)
  depth, width, _ = SHAPES[options.size]
  results = []
  for kind, runs in kinds.items():
    for part in ("trace", "compile", "start to first step"):
      case = f"{part} {depth}x{width} {kind}"
      results.append(summarise("compile", case, [run[part] for run in runs], "s", gate))
  return results


def run_start(size: str, folder: str) -> dict[str, Any]:
  started = time.perf_counter()
  output = run_python("-m", "flaxlm.benchmark.suites.compile", size, folder)
  seconds = time.perf_counter() - started
  return {"start to first step": seconds} | json.loads(output.splitlines()[-1])


# -- In that process -----------------------------------------------------------------------


def main() -> None:
  size, folder = sys.argv[1:]
  start_jax(cache_dir=Path(folder))
  depth, width, heads = SHAPES[size]
  model_cfg = ModelConfig(
    depth=depth, width=width, num_heads=heads, vocab_size=1024, context=128
  )
  data, training = DataConfig(seq_len=64, batch_size=8), TrainingConfig()
  mesh = make_mesh({"data": -1})
  model = build_model(model_cfg, training, fused_kernel())
  optimizer = build_optimizer(OptimizerConfig(), training.num_steps)
  step = jit_train_step(model, optimizer, training, mesh)
  started = time.perf_counter()
  state, batch = abstract_state(model, optimizer, mesh), abstract_batch(data, mesh)
  lowered = step.lower(state, batch)
  traced = time.perf_counter()
  lowered.compile()
  compiled = time.perf_counter()
  window = np.arange(8 * 65).reshape(8, 65) % 1000 + 1
  first = put_batch(
    next_token(Windows(window, window == 0, np.full(8, 65)), end_id=0), mesh
  )
  seed = jax.numpy.uint32(0)
  _, metrics = step(init_state(model, optimizer, mesh, seed=0), first, seed)
  found = {"trace": traced - started, "compile": compiled - traced}
  print(json.dumps(found | {"loss": float(metrics["loss"])}))


if __name__ == "__main__":
  main()
