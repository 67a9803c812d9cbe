# SPDX-License-Identifier: Apache-2.0
"""Training speed, float32, on shapes of nanoGPT's recipes, against PyTorch if asked.

Each side runs in a fresh process of its own, the sides in turn, a round at a time. Both
start from the same parameters, see the same batches and update with the same AdamW; the
losses of their first steps must agree before a speed counts.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from flaxlm.benchmark.report import Result, summarise
from flaxlm.config import ModelConfig, OptimizerConfig, TrainingConfig
from flaxlm.errors import ConfigError, FlaxLMError

ROUNDS = 3
LOSS_TOLERANCE = 2e-4  # relative, over the first steps, float32 on both sides


@dataclasses.dataclass(frozen=True)
class Case:
  """A shape: GPT-2's architecture without biases in the projections, one text per row."""

  model: ModelConfig
  batch_size: int
  num_steps: int  # timed

  @property
  def tokens(self) -> int:
    return self.batch_size * self.model.context


def gpt2_shape(
  depth: int, width: int, num_heads: int, context: int, vocab: int
) -> ModelConfig:
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
  # nanoGPT's recipe for a CPU, and its Shakespeare recipe with half the rows.
  "4x128_context64_batch12": Case(gpt2_shape(4, 128, 4, 64, 65), 12, 40),
  "6x384_context256_batch16": Case(gpt2_shape(6, 384, 6, 256, 65), 16, 2),
}
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_steps=0)
CHECKED_STEPS = 4


def bench_train(peer: str | None) -> list[Result]:
  """Tokens per second of each case, and the ratio to `peer` ("torch") when given.

  Raises `ConfigError` if the peer is not installed, `FlaxLMError` if losses disagree.
  """
  results = []
  for name in CASES:
    with tempfile.TemporaryDirectory() as folder:
      work = Path(folder) / "work.npz"
      write_work(CASES[name], work)
      names = ["flaxlm", peer] if peer else ["flaxlm"]
      sides: dict[str, list[dict[str, Any]]] = {side: [] for side in names}
      for number in range(ROUNDS):
        order = list(sides) if number % 2 == 0 else list(reversed(sides))
        for side in order:
          sides[side].append(run_side(side, name, work))
    rates = {side: [run["rate"] for run in runs] for side, runs in sides.items()}
    peer_rates = rates[peer] if peer else ()
    result = summarise("train", name, rates["flaxlm"], "tokens/s", peer_rates)
    if peer:
      result.peer = peer
      result.correct = compare(sides["flaxlm"][0]["losses"], sides[peer][0]["losses"])
    results.append(result)
  return results


def compare(ours: list[float], theirs: list[float]) -> str:
  error = float(np.max(np.abs(np.subtract(ours, theirs)) / np.abs(theirs)))
  text = f"losses of {len(ours)} steps agree to {error:.1e}"
  if not error < LOSS_TOLERANCE:
    raise FlaxLMError(f"a speed without a result: {text}, {LOSS_TOLERANCE:.0e} is allowed")
  return text


def run_side(side: str, case: str, work: Path) -> dict[str, Any]:
  """One side's rate and first losses, from a process of its own."""
  command = [sys.executable, "-m", __name__, side, case, str(work)]
  run = subprocess.run(command, capture_output=True, text=True, check=False)
  if run.returncode:
    last_line = run.stderr.strip().splitlines()[-1] if run.stderr.strip() else "no output"
    raise ConfigError(f"the {side} side failed: {last_line}", f"pip install {side}?")
  return json.loads(run.stdout.splitlines()[-1])


def write_work(case: Case, path: Path) -> None:
  """The work of both sides: initial parameters by name, and token windows."""
  rng = np.random.default_rng(0)
  cfg = case.model
  L, D, N, F = cfg.depth, cfg.width, cfg.num_heads, cfg.ffn_width
  H = D // N
  assert cfg.vocab_size is not None and F is not None

  def normal(*shape: int) -> np.ndarray:
    return np.asarray(rng.normal(0, 0.02, shape), np.float32)

  def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)

  arrays = {
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


def time_steps(case: Case, windows: np.ndarray, step: Any, wait: Any) -> dict[str, Any]:
  """Runs `step(window)` over the windows, checked once, then timed in three passes."""
  losses = [float(step(window)) for window in windows]
  best = 0.0
  for _ in range(3):
    started = time.perf_counter()
    for number in range(case.num_steps):
      loss = step(windows[number % len(windows)])
    wait(loss)
    seconds = time.perf_counter() - started
    best = max(best, case.num_steps * case.tokens / seconds)
  return {"rate": best, "losses": losses}


def flaxlm_side(case: Case, work: Any) -> dict[str, Any]:
  """The same train step, batches and mesh as `flaxlm train`."""
  import flax
  import jax

  from flaxlm.data.objectives import next_token
  from flaxlm.nn.models import build_model
  from flaxlm.sharding import make_mesh, start_jax
  from flaxlm.training.optimizer import build_optimizer
  from flaxlm.training.step import abstract_state, compile_train_step, init_state, put_batch

  start_jax()
  mesh = make_mesh({"data": -1})
  model = build_model(case.model, TrainingConfig())
  optimizer = build_optimizer(OPTIMIZER, num_steps=1)
  state = init_state(model, optimizer, mesh, seed=0)
  names = [name for name in work if name != "windows"]
  params = flax.traverse_util.unflatten_dict({n: work[n] for n in names}, sep="/")
  target = abstract_state(model, optimizer, mesh).params
  params = jax.tree.map(lambda x, t: jax.device_put(x, t.sharding), params, target)
  state = state._replace(params=params)
  train_step = compile_train_step(model, optimizer, TrainingConfig(), mesh)
  seed = jax.numpy.uint32(0)
  lengths_B = np.full(case.batch_size, case.model.context + 1)

  def step(window: np.ndarray) -> jax.Array:
    nonlocal state
    batch = put_batch(next_token(window, lengths_B, bos_id=0), mesh)
    state, metrics = train_step(state, batch, seed)
    return metrics["loss"]

  return time_steps(case, work["windows"], step, jax.block_until_ready)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("side", choices=("flaxlm", "torch"))
  parser.add_argument("case", choices=tuple(CASES))
  parser.add_argument("work", type=Path)
  args = parser.parse_args()
  case, work = CASES[args.case], dict(np.load(args.work, allow_pickle=False))
  if args.side == "torch":
    from flaxlm.benchmark.torch_peer import torch_side

    print(json.dumps(torch_side(case, work)))
  else:
    print(json.dumps(flaxlm_side(case, work)))


if __name__ == "__main__":
  main()
