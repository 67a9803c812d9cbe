# SPDX-License-Identifier: Apache-2.0
"""A step of DPO is that of plain PyTorch on transformers' ids and masks; with adapters, on
peft's, where the reference is the model with its adapter disabled."""

import contextlib
import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from chat_templates import MARKED
from conftest import BESIDE_TRANSFORMERS
from test_adapters import needs_peft
from test_parity_chats import SPECIALS, conversations, save_chat_model

from flaxlm.config import DataConfig, DpoConfig, TokenizerConfig, TrainingConfig
from flaxlm.data.batches import Batches
from flaxlm.data.objectives import Batch
from flaxlm.data.prepare import prepare
from flaxlm.decoding.loading import load_params, restore_params
from flaxlm.interop.adapters import import_adapter
from flaxlm.interop.huggingface import load_checkpoint
from flaxlm.interop.transfer import import_run
from flaxlm.nn.lora import abstract_adapters, abstract_frozen, freeze
from flaxlm.nn.models import abstract_params, build_model
from flaxlm.origin import checkpoint_of
from flaxlm.runs import TOKENIZER, load_config_of
from flaxlm.sharding import make_mesh
from flaxlm.training.preference import num_pairs, preference_and_gradient

pytestmark = BESIDE_TRANSFORMERS

BETA, SCANNED = 0.3, TrainingConfig(scanned=True)
FIELDS = ("chosen", "rejected")


class Made(NamedTuple):
  """A model of transformers as a run, and the same preferences for both."""

  model: Any
  hub: Path
  run: Path
  batch: Batch
  answers: list[list[tuple[Any, Any]]]  # (ids, mask) of chosen and rejected of each pair


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
  import transformers

  monkeypatch.setenv("FLAXLM_DATA_DIR", str(tmp_path / "data"))
  hub = tmp_path / "hub"
  model, backend = save_chat_model(hub)
  import_run(hub, tmp_path / "run", make_mesh({"data": 8}))
  pairs = preferences()
  batch = our_batch(tmp_path, pairs)
  theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIALS)
  return Made(model, hub, tmp_path / "run", batch, [read(theirs, pair) for pair in pairs])


def preferences() -> list[dict[str, Any]]:
  """Conversations with two ends; some answers are in the prompt, which are not learnt."""
  talks = [talk for talk in conversations() if talk[-1]["content"] != "another"]
  other = lambda n: [{"role": "assistant", "content": "another " * (1 + n % 3)}]
  return [
    {"prompt": talk[:-1], "chosen": talk[-1:], "rejected": other(n)}
    for n, talk in enumerate(talks)
  ]


def our_batch(folder: Path, pairs: list[dict[str, Any]]) -> Batch:
  files = folder / "pairs"
  files.mkdir()
  lines = [json.dumps(pair) + "\n" for pair in pairs]
  (files / "train.jsonl").write_text("".join(lines))
  (files / "validation.jsonl").write_text(lines[0])
  cfg = TokenizerConfig(path=str(folder / "run" / TOKENIZER))
  prepared = prepare(f"files:{files}", cfg, lambda line: None, "preference")
  data = DataConfig(objective="preference", seq_len=510, batch_size=16)
  batches = Batches(prepared.train, data, vocab_size=prepared.tokenizer.vocab_size)
  assert batches.num_batches == 1 and not batches.notes
  return batches[0]


def read(tokenizer: Any, pair: dict[str, Any]) -> list[tuple[Any, Any]]:
  import torch

  options = dict(chat_template=MARKED["chatml"], return_dict=True)
  prompt = tokenizer.apply_chat_template(
    pair["prompt"], add_generation_prompt=True, **options
  )
  start = len(prompt["input_ids"])
  found = []
  for field in FIELDS:
    row = tokenizer.apply_chat_template(
      pair["prompt"] + pair[field], return_assistant_tokens_mask=True, **options
    )
    mask = torch.tensor(row["assistant_masks"])
    mask[:start] = 0
    found.append((torch.tensor([row["input_ids"]]), mask))
  return found


def their_loss(policy: Any, reference: Any, off: Any, answers: Any) -> Any:
  """Rafailov et al. (2023), equation 7; `off` is entered while the reference computes."""
  import torch

  def logprob(model: Any, ids: Any, mask: Any) -> Any:
    logprobs = model(ids).logits[0, :-1].log_softmax(-1)
    return (logprobs.gather(-1, ids[0, 1:, None])[:, 0] * mask[1:]).sum()

  losses = []
  for pair in answers:
    rewards = []
    for ids, mask in pair:
      with torch.no_grad(), off():
        before = logprob(reference, ids, mask)
      rewards.append(BETA * (logprob(policy, ids, mask) - before))
    losses.append(-torch.nn.functional.logsigmoid(rewards[0] - rewards[1]))
  return torch.stack(losses).mean()


def our_step(model: Any, batch: Batch, params: Any, **trees: Any) -> tuple[float, Any]:
  step = jax.jit(preference_and_gradient, static_argnums=(0, 1, 2))
  settings = (SCANNED, DpoConfig(beta=BETA))
  sums, gradient = step(model, *settings, params, batch, jax.random.key(0), **trees)
  count = float(num_pairs(batch))
  gradient = jax.tree.map(lambda g: np.asarray(g) / count, gradient)
  return float(sums["loss"]) / count, gradient


def close(found_X: np.ndarray, expected_X: Any) -> None:
  scale = np.abs(expected_X).max()
  assert scale > 0
  np.testing.assert_allclose(found_X, expected_X, atol=1e-4 * scale)


def save(tensors: dict[str, Any], file: Path) -> None:
  from safetensors.numpy import save_file  # comes with transformers

  plain = {name: np.ascontiguousarray(x.detach().numpy()) for name, x in tensors.items()}
  save_file(plain, file, {"format": "pt"})


def test_a_step_of_all_parameters(made: Made, tmp_path: Path):
  import torch

  mesh, answers = make_mesh({"data": 8}), made.answers
  policy = copy.deepcopy(made.model)
  with torch.no_grad():
    for parameter in policy.parameters():
      parameter += 0.05 * torch.randn_like(parameter)
  save(dict(policy.named_parameters()), made.hub / "model.safetensors")
  loaded = load_checkpoint(made.hub, mesh, None)
  model = build_model(loaded.cfg, SCANNED)
  before = checkpoint_of(made.run, 0)
  reference = load_params(before, abstract_params(model, mesh), mesh)
  params, reference = jax.device_get((loaded.params, reference))
  found, gradient = our_step(model, made.batch, params, reference=reference)

  loss = their_loss(policy, made.model, contextlib.nullcontext, answers)
  loss.backward()
  assert int(num_pairs(made.batch)) == len(answers)
  assert found == pytest.approx(float(loss.detach()), rel=1e-4)
  assert abs(found - np.log(2)) > 1e-2
  # Gradients have the names and layouts of their parameters, so they are read as these.
  named = {name: x.grad for name, x in policy.named_parameters()}
  save(named, made.hub / "model.safetensors")
  expected = jax.device_get(load_checkpoint(made.hub, mesh, None).params)
  jax.tree.map(close, gradient, expected)


@needs_peft
def test_a_step_of_adapters(made: Made, tmp_path: Path):
  import peft

  mesh = make_mesh({"data": 8})
  settings = peft.LoraConfig(
    r=4, lora_alpha=6, target_modules=["q_proj", "o_proj", "down_proj"],
    init_lora_weights=False,
  )  # fmt: skip
  policy: Any = peft.get_peft_model(made.model, settings)
  loss = their_loss(policy, policy, policy.disable_adapter, made.answers)
  loss.backward()

  def ours(name: str) -> tuple[Any, Any]:
    """(config, adapters) of what is saved, whose base is the run."""
    import_adapter(tmp_path / "peft", tmp_path / name, made.run, mesh)
    cfg = load_config_of(tmp_path / name)
    wanted = abstract_adapters(build_model(cfg.model), cfg.lora, mesh)
    return cfg, restore_params(tmp_path / name, 0, wanted)

  policy.save_pretrained(tmp_path / "peft")
  cfg, adapters = ours("adapted")
  model = build_model(cfg.model, SCANNED)
  base = load_params(checkpoint_of(made.run, 0), abstract_params(model, mesh), mesh)
  frozen = jax.device_get(freeze(base, abstract_frozen(model, cfg.lora, mesh), cfg.lora))
  found, gradient = our_step(
    model, made.batch, jax.device_get(adapters), frozen=frozen, reference=frozen
  )
  assert found == pytest.approx(float(loss.detach()), rel=1e-4)
  assert abs(found - np.log(2)) > 1e-2
  for name, parameter in policy.named_parameters():
    if "lora" in name:
      parameter.data = parameter.grad
  policy.save_pretrained(tmp_path / "peft")
  jax.tree.map(close, gradient, jax.device_get(ours("gradient")[1]))
