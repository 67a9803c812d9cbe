# SPDX-License-Identifier: Apache-2.0
"""Training speed on shapes of nanoGPT's recipes, against PyTorch if asked.

Each side runs in a fresh process of its own, the sides in turn, a round at a time. All
start from the same parameters, see the same batches and update with the same AdamW; the
losses of their first steps must agree before a speed counts. FLOPs are strict (see
`planning.cost`), so that a fraction of the published peak is the MFU.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flaxlm.benchmark.measure import Setting
from flaxlm.benchmark.report import Result, Work, summarise
from flaxlm.config import (
  DataConfig,
  ModelConfig,
  OptimizerConfig,
  ResolvedConfig,
  ResolvedModel,
  TrainingConfig,
  mesh_shape,
)
from flaxlm.errors import ConfigError, FlaxLMError

MOST_ROUNDS, MOST_ROUNDS_ALONE = 3, 2  # each starts a process per side
# Relative, over the first steps.
LOSS_TOLERANCES = {"float32": 2e-4, "bfloat16": 1e-2}


@dataclasses.dataclass(frozen=True)
class Case:
  """A shape: GPT-2's architecture without biases in the projections, one text per row."""

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
PEERS = {"torch": ("torch eager", "torch compiled")}


def bench_train(setting: Setting) -> list[Result]:
  """Tokens per second of each case, and the ratios to PyTorch, eager and compiled.

  Raises `ConfigError` if the peer is not installed, `FlaxLMError` if losses disagree.
  """
  results = []
  for name, case in CASES[setting.size].items():
    names = ["flaxlm", *PEERS.get(setting.peer or "", ())]
    sides: dict[str, list[dict[str, Any]]] = {side: [] for side in names}
    with tempfile.TemporaryDirectory() as folder:
      work = Path(folder) / "work.npz"
      write_work(case, work)
      most = MOST_ROUNDS if setting.peer else MOST_ROUNDS_ALONE
      for number in range(min(most, setting.rounds)):
        order = list(sides) if number % 2 == 0 else list(reversed(sides))
        for side in order:
          sides[side].append(run_side(side, name, work))
    results += summarise_sides(name, case, sides)
  return results


def summarise_sides(
  name: str, case: Case, sides: dict[str, list[dict[str, Any]]]
) -> list[Result]:
  """One result, or one for each peer."""
  rates = {side: [run["rate"] for run in runs] for side, runs in sides.items()}
  ours = sides.pop("flaxlm")
  work, found = work_of(case), []
  for peer in sides or [None]:
    result = summarise(
      "train", name, rates["flaxlm"], "tokens/s", rates.get(peer or "", ())
    )
    result.first_seconds = statistics.median(run["first_seconds"] for run in ours)
    result.seconds = case.tokens / result.median
    result.flops = work.flops / ours[0]["devices"]
    result.bytes, result.dtype = work.bytes / ours[0]["devices"], work.dtype
    result.correct = falls(ours[0]["losses"])
    if peer:
      tolerance = LOSS_TOLERANCES[case.dtype]
      result.peer = peer
      result.correct = compare(ours[0]["losses"], sides[peer][0]["losses"], tolerance)
    found.append(result)
  return found


def work_of(case: Case) -> Work:
  """Of one step: strict FLOPs, and the planner's bytes."""
  from flaxlm.benchmark.ceilings import this_device
  from flaxlm.planning.cost import step_cost
  from flaxlm.planning.devices import ANY
  from flaxlm.planning.memory import state_bytes
  from flaxlm.planning.roofline import traffic_bytes, with_path

  cfg = ResolvedConfig(
    model=case.model,
    data=DataConfig(seq_len=case.model.context, batch_size=case.batch_size),
    optimizer=OPTIMIZER,
    training=TrainingConfig(dtype=case.dtype),
  )
  sizes = mesh_shape({})
  cfg, _ = with_path(cfg, sizes, this_device() or ANY)
  state = state_bytes(cfg.model, cfg.training, cfg.optimizer, sizes)
  touched = traffic_bytes(cfg, sizes, state)
  return Work(step_cost(cfg).strict_flops, touched, case.dtype)


def falls(losses: list[float]) -> str:
  """Without a peer: the losses are numbers, and near the logarithm of the vocabulary."""
  if not np.isfinite(losses).all():
    raise FlaxLMError(f"a speed without a result: the losses are {losses}")
  return f"losses of {len(losses)} steps are finite: {losses[0]:.3f} to {losses[-1]:.3f}"


def compare(
  ours: list[float], theirs: list[float], tolerance: float = LOSS_TOLERANCES["float32"]
) -> str:
  error = float(np.max(np.abs(np.subtract(ours, theirs)) / np.abs(theirs)))
  text = f"losses of {len(ours)} steps agree to {error:.1e}"
  if not error < tolerance:
    raise FlaxLMError(f"a speed without a result: {text}, {tolerance:.0e} is allowed")
  return text


def run_side(side: str, case: str, work: Path) -> dict[str, Any]:
  """One side's rate and first losses, from a process of its own."""
  command = [sys.executable, "-m", __name__, side, case, str(work)]
  run = subprocess.run(command, capture_output=True, text=True, check=False)
  if run.returncode:
    last_line = run.stderr.strip().splitlines()[-1] if run.stderr.strip() else "no output"
    cure = "" if side == "flaxlm" else "pip install 'flaxlm[parity]'?"
    raise ConfigError(f"the {side} side failed: {last_line}", cure)
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
  started = time.perf_counter()
  losses = [float(step(windows[0]))]
  first_seconds = time.perf_counter() - started
  losses += [float(step(window)) for window in windows[1:]]
  best = 0.0
  for _ in range(3):
    started = time.perf_counter()
    for number in range(case.num_steps):
      loss = step(windows[number % len(windows)])
    wait(loss)
    seconds = time.perf_counter() - started
    best = max(best, case.num_steps * case.tokens / seconds)
  return {"rate": best, "losses": losses, "first_seconds": first_seconds}


def flaxlm_side(case: Case, work: Any) -> dict[str, Any]:
  """The same train step, batches and mesh as `flaxlm train`."""
  import flax
  import jax

  from flaxlm.data.objectives import next_token
  from flaxlm.nn.models import build_model
  from flaxlm.platform import kernel_head_dim, start_jax
  from flaxlm.sharding import make_mesh
  from flaxlm.training.optimizer import build_optimizer
  from flaxlm.training.step import abstract_state, compile_train_step, init_state, put_batch

  start_jax()
  mesh = make_mesh({"data": -1})
  training = TrainingConfig(dtype=case.dtype)
  model = build_model(case.model, training, kernel_head_dim())
  optimizer = build_optimizer(OPTIMIZER, num_steps=1)
  state = init_state(model, optimizer, mesh, seed=0)
  names = [name for name in work if name != "windows"]
  params = flax.traverse_util.unflatten_dict({n: work[n] for n in names}, sep="/")
  target = abstract_state(model, optimizer, mesh).params
  params = jax.tree.map(lambda x, t: jax.device_put(x, t.sharding), params, target)
  state = state._replace(params=params)
  train_step = compile_train_step(model, optimizer, training, mesh)
  seed = jax.numpy.uint32(0)
  lengths_B = np.full(case.batch_size, case.model.context + 1)

  def step(window: np.ndarray) -> jax.Array:
    nonlocal state
    batch = put_batch(next_token(window, lengths_B, bos_id=0), mesh)
    state, metrics = train_step(state, batch, seed)
    return metrics["loss"]

  found = time_steps(case, work["windows"], step, jax.block_until_ready)
  return found | {"devices": mesh.size}


def find_case(name: str) -> Case:
  (case,) = (cases[name] for cases in CASES.values() if name in cases)
  return case


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("side", choices=("flaxlm", *PEERS["torch"]))
  parser.add_argument("case")
  parser.add_argument("work", type=Path)
  args = parser.parse_args()
  case, work = find_case(args.case), dict(np.load(args.work, allow_pickle=False))
  if args.side == "flaxlm":
    print(json.dumps(flaxlm_side(case, work)))
  else:
    from flaxlm.benchmark.torch_peer import torch_side

    print(json.dumps(torch_side(case, work, compiled=args.side == "torch compiled")))


if __name__ == "__main__":
  main()
