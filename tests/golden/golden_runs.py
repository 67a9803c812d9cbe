# SPDX-License-Identifier: Apache-2.0
"""Five tiny models, trained for ten steps on a fixed text and then decoded from.

Their results are stored in figures.json. Only a change that is meant to compute something
else writes it again, by `PYTHONPATH=tests python tests/golden/golden_runs.py`, and says so.
"""

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from meshes import mesh_of

from flaxlm.config import ModelConfig, MoEConfig, OptimizerConfig, TrainingConfig
from flaxlm.data.objectives import Batch, Masking, Windows, masked, next_token, seq2seq
from flaxlm.decoding.generate import generate
from flaxlm.decoding.prefill import Request
from flaxlm.decoding.sampling import SamplingSettings, stack_settings
from flaxlm.nn.models import build_model
from flaxlm.training.optimizer import build_optimizer
from flaxlm.training.step import (
  TrainState,
  abstract_state,
  init_state,
  jit_eval_step,
  jit_train_step,
  put_batch,
  shardings_of,
)

FIGURES = Path(__file__).parent / "figures.json"

TEXT = (
  "the cat sat on the mat and the dog sat on the log. "
  "one day the cat and the dog met on the mat; the log was wet. "
  "so the cat ran to the hat, and the dog ran to the fog. "
)
LETTERS = sorted(set(TEXT))
BOS, MASK = 0, 1
NUM_IDS = 2 + len(LETTERS)
ROWS, LENGTH, NUM_NEW = 8, 32, 32
NUM_STEPS = 10
# Parameters are scaled up before decoding. After so few steps no token is much likelier
# than the next, and rounding would choose.
SCALE = 2.0

TRANSFORMER = dict(depth=2, width=32, num_heads=4, vocab_size=64, context=128)
MODELS = {
  "decoder": ModelConfig(**TRANSFORMER, num_kv_heads=2),
  "lstm": ModelConfig(family="rnn", depth=2, width=32, vocab_size=64, context=128),
  "encoder": ModelConfig(
    **TRANSFORMER,
    family="encoder",
    positions="learned",
    norm="layernorm",
    activation="gelu",
    gated=False,
    biased=True,
    head_transform=True,
  ),
  "encoder_decoder": ModelConfig(
    **TRANSFORMER | dict(depth=1),
    family="encoder_decoder",
    positions="relative",
    dropout=0.1,
  ),
  "moe": ModelConfig(
    **TRANSFORMER,
    window=8,
    layer_pattern="LG",
    moe=MoEConfig(num_experts=4, num_shared_experts=1),
  ),
}
MESHES = {"one device": {}, "fsdp=2,tensor=2": dict(fsdp=2, tensor=2)}
RUNS = {name: TrainingConfig(scanned=name != "moe") for name in MODELS} | {
  "decoder": TrainingConfig(accumulation_steps=2),
  "encoder_decoder": TrainingConfig(scanned=True, label_smoothing=0.1),
}
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, schedule="constant")


def encode(text: str) -> list[int]:
  return [2 + LETTERS.index(letter) for letter in text]


def batch_of(family: str, step: int) -> Batch:
  """Rows of the text, from other places at each step; some begin a document."""
  rng = np.random.default_rng(step)
  ids = np.array(encode(TEXT * 2))
  starts_B = rng.integers(0, len(TEXT), ROWS)
  windows = ids[starts_B[:, None] + np.arange(LENGTH + 1)]
  windows[::2, 0] = BOS
  windows[::3, LENGTH // 2] = BOS
  lengths_B = np.where(np.arange(ROWS) % 4 == 3, LENGTH - 4, LENGTH + 1)
  if family == "encoder":
    masking = Masking(0.25, MASK, np.arange(2, NUM_IDS))
    random_3BT = rng.random((3, ROWS, LENGTH))
    lengths_B = np.minimum(lengths_B, LENGTH)
    windows = windows[:, :-1]
    return masked(Windows(windows, windows == BOS, lengths_B), masking, random_3BT)
  if family == "encoder_decoder":  # the target is the source, backwards
    windows = ids[starts_B[:, None] + np.arange(LENGTH + 1)]
    windows[:, 0] = BOS
    lengths_B[:] = LENGTH
    windows[:, LENGTH - 1 :] = BOS
    backwards = np.roll(windows[:, ::-1], 1, 1)
    source, target = (Windows(w, w == BOS, lengths_B) for w in (windows, backwards))
    return seq2seq(source, target, BOS)
  return next_token(Windows(windows, windows == BOS, lengths_B), BOS)


@functools.cache
def first_state(name: str) -> TrainState:
  """On one device: to compile this once for each mesh takes as long as the step."""
  model = build_model(MODELS[name], RUNS[name])
  state = init_state(model, build_optimizer(OPTIMIZER, NUM_STEPS), mesh_of(), seed=7)
  return jax.device_get(state)


@functools.cache
def trained(name: str, mesh_name: str) -> tuple[Any, Any, list[float], Mesh]:
  """(model, parameters, the losses of its steps, mesh)."""
  run, mesh = RUNS[name], mesh_of(**MESHES[mesh_name])
  model = build_model(MODELS[name], run)
  optimizer = build_optimizer(OPTIMIZER, NUM_STEPS)
  state = first_state(name)
  state = jax.device_put(state, shardings_of(abstract_state(model, optimizer, mesh)))
  step = jit_train_step(model, optimizer, run, mesh)
  losses = []
  for n in range(NUM_STEPS):
    batch = put_batch(batch_of(model.cfg.family, n), mesh)
    state, metrics = step(state, batch, np.uint32(3))
    losses.append(float(metrics["loss"]))
  return model, state.params, losses, mesh


def held_out(name: str) -> float:
  """Loss in nats per token of a batch that no step saw."""
  model, params, _, mesh = trained(name, "one device")
  batch = put_batch(batch_of(model.cfg.family, NUM_STEPS), mesh)
  sums = jit_eval_step(model, mesh)(params, batch)
  return float(sums["nats"] / sums["tokens"])


def decoded(name: str, temperature: float) -> list[list[int]]:
  """The next tokens of two prompts; of an encoder, what it fills each mask with."""
  model, params, _, mesh = trained(name, "one device")
  params = jax.tree.map(lambda x: x * SCALE, params)
  if model.cfg.family == "encoder":
    batch = batch_of("encoder", NUM_STEPS)
    logits_BTV = model.apply(
      {"params": params}, batch.tokens_BT, batch.positions_BT, batch.segments_BT
    ).value
    logits_BTV = np.asarray(logits_BTV)[:2, :, :NUM_IDS]
    # So early it would fill every mask with what is frequent: what is likelier here than
    # elsewhere tells more.
    return (logits_BTV - logits_BTV.mean(1, keepdims=True)).argmax(-1).tolist()
  texts = ["the cat sat on the", "one day"]
  prompts = [[BOS, *encode(text)] for text in texts]
  sources = None
  if model.cfg.family == "encoder_decoder":
    sources, prompts = [[*prompt[1:], BOS] for prompt in prompts], [[BOS], [BOS]]
  request = Request(prompts, NUM_NEW, NUM_IDS, sources)
  settings = SamplingSettings(
    temperature=temperature, top_p=0.95, repetition_penalty=2.0, banned_tokens=[BOS]
  )
  sampling = stack_settings([dataclasses.replace(settings, seed=s) for s in (11, 12)])
  blocks = [block.tokens_BT for block in generate(model, params, request, sampling, mesh)]
  return np.concatenate(blocks, 1).tolist()


def figures() -> dict[str, Any]:
  return {
    name: {
      "losses": {mesh_name: trained(name, mesh_name)[2] for mesh_name in MESHES},
      "held_out": held_out(name),
      "greedy": decoded(name, 0.0),
      "drawn": decoded(name, 1.0),
    }
    for name in MODELS
  }


if __name__ == "__main__":
  import conftest  # noqa: F401 - the platform and the compiler that the tests have

  text = json.dumps(figures(), indent=1)
  FIGURES.write_text(re.sub(r"\n {4,}|\n {3}(?=])", " ", text) + "\n", "utf-8")
