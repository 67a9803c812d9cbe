# SPDX-License-Identifier: Apache-2.0
"""A step that trains adapters (LoRA) against one that trains all parameters: time, and the
memory of the optimizer's state.

    python -m benchmarks.finetuning --rank 8

Both sides begin with the same parameters and see the same batch, round by round in turn. A
new adapter changes nothing, so that their first losses have to agree.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.writing import add_output, write
from flaxlm.benchmark.measure import BenchOptions, Side, agree, measure, timed
from flaxlm.benchmark.report import Result, summarise, with_ratio
from flaxlm.benchmark.training_case import OPTIMIZER, gpt2_shape
from flaxlm.config import LoraConfig, ResolvedModel, TrainingConfig
from flaxlm.data.objectives import Windows, next_token
from flaxlm.nn.lora import freeze, init_adapters
from flaxlm.nn.models import build_model
from flaxlm.platform import fused_kernel, start_jax
from flaxlm.sharding import make_mesh
from flaxlm.training.optimizer import build_optimizer
from flaxlm.training.step import (
  TrainState,
  abstract_state,
  init_state,
  jit_train_step,
  put_batch,
)

GPT2 = gpt2_shape(depth=12, width=768, num_heads=12, context=256, vocab=50_304)
BATCH_SIZE = 4
TOLERANCE = 1e-5


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--rank", type=int, default=8)
  parser.add_argument("--rounds", type=int, default=5)
  add_output(parser)
  args = parser.parse_args()
  start_jax()
  options = BenchOptions(rounds=args.rounds)
  write(bench_finetuning(options, args.rank), args)


def bench_finetuning(
  options: BenchOptions,
  rank: int,
  model: ResolvedModel = GPT2,
  batch_size: int = BATCH_SIZE,
) -> list[Result]:
  """Tokens per second of adapters of a rank, and megabytes of the optimizer's state, each
  with its ratio to those of all parameters: of a speed, or how many times less memory."""
  mesh, rng = make_mesh({"data": -1}), np.random.default_rng(0)
  window = rng.integers(1, model.vocab_size, (batch_size, model.context + 1))
  windows = Windows(window, window == 0, np.full(batch_size, model.context + 1))
  batch = put_batch(next_token(windows, end_id=0), mesh)
  lora = LoraConfig(rank=rank)
  trainers = {
    "all": Trainer(model, LoraConfig(), batch),
    "lora": Trainer(model, lora, batch),
  }
  timings = measure({name: Side(one.step) for name, one in trainers.items()}, options)
  losses = [timings[name].result for name in ("lora", "all")]
  gate = agree("the first loss", losses[0], losses[1], TOLERANCE)
  case = f"rank {rank}, {model.depth}x{model.width}, B{batch_size} T{model.context}"
  tokens = float(batch_size * model.context)
  speed = timed("finetuning", case, timings["lora"], "tokens/s", gate, tokens)
  peer, sizes = "all parameters", {name: one.opt_bytes for name, one in trainers.items()}
  memory = summarise(
    "finetuning", f"{case}, optimizer state", [sizes["lora"] / 1e6], "MB", gate
  )
  return [
    with_ratio(speed, peer, timings["lora"].rounds, timings["all"].rounds, gate),
    with_ratio(memory, peer, [sizes["lora"]], [sizes["all"]], gate),
  ]


class Trainer:
  """A training step of a model from a seed; `step` takes one, and returns its loss."""

  def __init__(self, cfg: ResolvedModel, lora: LoraConfig, batch: Any):
    mesh, training = make_mesh({"data": -1}), TrainingConfig()
    model = build_model(cfg, training, fused_kernel())
    optimizer = build_optimizer(OPTIMIZER, num_steps=1)
    state = init_state(model, optimizer, mesh, seed=0)
    if lora.rank:
      target = abstract_state(model, optimizer, mesh, lora)
      frozen = freeze(state.params, target.frozen, lora)
      adapters = init_adapters(target.params, seed=0)
      state = TrainState(state.step, adapters, optimizer.init(adapters), frozen)
    self.state, self.batch = state, batch
    self.train_step = jit_train_step(model, optimizer, training, mesh, lora)

  def step(self) -> jax.Array:
    self.state, metrics = self.train_step(self.state, self.batch, jnp.uint32(0))
    return metrics["loss"]

  @property
  def opt_bytes(self) -> float:
    return float(sum(x.nbytes for x in jax.tree.leaves(self.state.opt_state)))


if __name__ == "__main__":
  main()
