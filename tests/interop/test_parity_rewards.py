# SPDX-License-Identifier: Apache-2.0
"""A step of the policy gradient is that of plain PyTorch on a model of transformers."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import BESIDE_TRANSFORMERS
from test_parity_preferences import close, save
from tiny_models import LLAMA

from flaxlm.config import TrainingConfig
from flaxlm.interop.huggingface import load_checkpoint
from flaxlm.nn.models import build_model
from flaxlm.sharding import make_mesh
from flaxlm.training.policy import advantages
from flaxlm.training.rollouts import rows_of
from flaxlm.training.step import loss_and_gradient

pytestmark = BESIDE_TRANSFORMERS

GROUPS, SAMPLES = 3, 4


def drawn() -> list[tuple[list[int], list[int], float]]:
  """(prompt, completion, reward) of each row; the rewards of the last group are equal."""
  rng = np.random.default_rng(0)
  rows = []
  for group in range(GROUPS):
    prompt = rng.integers(1, LLAMA["vocab_size"], 2 + 5 * group).tolist()
    for _ in range(SAMPLES):
      completion = rng.integers(1, LLAMA["vocab_size"], rng.integers(1, 9)).tolist()
      reward = 1.0 if group == GROUPS - 1 else float(rng.integers(0, 2) + rng.random() / 2)
      rows.append((prompt, completion, reward))
  return rows


def their_loss(model: Any) -> Any:
  """- A log p, a mean over the tokens of the groups whose rewards differ (Shao et al.,
  2024, with the group's mean alone; on policy)."""
  import torch

  rows, total, count = drawn(), 0.0, 0
  for start in range(0, len(rows), SAMPLES):
    group = rows[start : start + SAMPLES]
    rewards = torch.tensor([reward for _, _, reward in group], dtype=torch.float64)
    if len(set(rewards.tolist())) == 1:
      continue
    for (prompt, completion, _), advantage in zip(
      group, rewards - rewards.mean(), strict=True
    ):
      logits = model(torch.tensor([[*prompt, *completion]])).logits[0]
      logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1)
      chosen = logprobs.gather(-1, torch.tensor(completion)[:, None])
      total, count = total - advantage.float() * chosen.sum(), count + len(completion)
  return total / count


def test_a_step_of_the_policy_gradient(tmp_path: Path):
  import torch
  import transformers

  torch.manual_seed(0)
  theirs: Any = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(**LLAMA, initializer_range=0.3)
  )
  theirs.save_pretrained(tmp_path)
  mesh = make_mesh({"data": 8})
  loaded = load_checkpoint(tmp_path, mesh, None)
  model, params = build_model(loaded.cfg), jax.device_get(loaded.params)
  prompts, completions, rewards = zip(*drawn(), strict=True)
  values_PK, is_telling_P = advantages(np.array(rewards).reshape(GROUPS, SAMPLES))
  telling_B = np.repeat(is_telling_P, SAMPLES)
  batch = rows_of(prompts, completions, values_PK.reshape(-1), telling_B, seq_len=24)
  step = jax.jit(loss_and_gradient, static_argnums=(0, 1))
  total, gradient = step(model, TrainingConfig(), params, batch, jax.random.key(0))
  count = batch.weights_BT.sum()

  loss = their_loss(theirs)
  loss.backward()
  assert float(total / count) == pytest.approx(float(loss.detach()), rel=1e-4)
  named = {name: x.grad for name, x in theirs.named_parameters()}
  save(named, tmp_path / "model.safetensors")
  expected = jax.device_get(load_checkpoint(tmp_path, mesh, None).params)
  jax.tree.map(close, jax.tree.map(lambda g: np.asarray(g) / count, gradient), expected)
