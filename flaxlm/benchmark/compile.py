# SPDX-License-Identifier: Apache-2.0
"""From a fresh process to a compiled training step: cold, and with JAX's compile cache.

Each figure is of a process of its own, `python -m flaxlm.benchmark.compile`, which gets a
folder for the cache: empty for the cold one, that same folder again for the warm one.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from flaxlm.benchmark.measure import Setting, agree
from flaxlm.benchmark.report import Result, summarise
from flaxlm.errors import FlaxLMError

MOST_ROUNDS = 3  # a process compiles for seconds
SHAPES = {"tiny": (1, 8, 1), "small": (4, 128, 4), "large": (12, 768, 12)}


def bench_compile(setting: Setting) -> list[Result]:
  """Seconds of tracing, of compiling, and of the whole start, cold and warm."""
  kinds: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
  for _ in range(min(MOST_ROUNDS, setting.rounds)):
    with tempfile.TemporaryDirectory() as folder:
      for runs in kinds.values():
        runs.append(start(setting.size, folder))
  losses = [run["loss"] for runs in kinds.values() for run in runs]
  gate = agree("the first loss of each process", losses[1:], losses[:1], 1e-6)
  depth, width, _ = SHAPES[setting.size]
  results = []
  for kind, runs in kinds.items():
    for part in ("trace", "compile", "start to first step"):
      case = f"{part} {depth}x{width} {kind}"
      results.append(summarise("compile", case, [run[part] for run in runs], "s"))
      results[-1].correct = gate
  return results


def start(size: str, folder: str) -> dict[str, Any]:
  started = time.perf_counter()
  command = [sys.executable, "-m", __name__, size, folder]
  run = subprocess.run(command, capture_output=True, text=True, check=False)
  if run.returncode:
    raise FlaxLMError(f"compiling in a fresh process failed: {run.stderr.strip()[-400:]}")
  seconds = time.perf_counter() - started
  return {"start to first step": seconds} | json.loads(run.stdout.splitlines()[-1])


# -- In the child ------------------------------------------------------------------------


def main() -> None:
  import jax
  import numpy as np

  from flaxlm.config import DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
  from flaxlm.data.objectives import next_token
  from flaxlm.nn.models import build_model
  from flaxlm.platform import kernel_head_dim, start_jax
  from flaxlm.sharding import make_mesh
  from flaxlm.training.optimizer import build_optimizer
  from flaxlm.training.step import (
    SEED,
    abstract_batch,
    abstract_state,
    compile_train_step,
    init_state,
    put_batch,
  )

  size, folder = sys.argv[1:]
  start_jax(cache_dir=Path(folder))
  depth, width, heads = SHAPES[size]
  model_cfg = ModelConfig(
    depth=depth, width=width, num_heads=heads, vocab_size=1024, context=128
  )
  data, training = DataConfig(seq_len=64, batch_size=8), TrainingConfig()
  mesh = make_mesh({"data": -1})
  model = build_model(model_cfg, training, kernel_head_dim())
  optimizer = build_optimizer(OptimizerConfig(), training.num_steps)
  step = compile_train_step(model, optimizer, training, mesh)
  started = time.perf_counter()
  state, batch = abstract_state(model, optimizer, mesh), abstract_batch(data, mesh)
  lowered = step.lower(state, batch, SEED)
  traced = time.perf_counter()
  lowered.compile()
  compiled = time.perf_counter()
  window = np.arange(8 * 65).reshape(8, 65) % 1000 + 1
  first = put_batch(next_token(window, np.full(8, 65), bos_id=0), mesh)
  seed = jax.numpy.uint32(0)
  _, metrics = step(init_state(model, optimizer, mesh, seed=0), first, seed)
  found = {"trace": traced - started, "compile": compiled - traced}
  print(json.dumps(found | {"loss": float(metrics["loss"])}))


if __name__ == "__main__":
  main()
