# SPDX-License-Identifier: Apache-2.0
"""A step on conversations is that of plain PyTorch on transformers' ids and masks."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from chat_templates import MARKED
from conftest import BESIDE_TRANSFORMERS
from test_transfer import own_run
from tiny_models import LLAMA
from tiny_tokenizers import llama

from flaxlm.chat.templates import CHAT, Talk, plain_chat
from flaxlm.config import DataConfig, ModelConfig, TokenizerConfig, TrainingConfig
from flaxlm.data.batches import Batches
from flaxlm.data.conversations import lessons
from flaxlm.data.prepare import prepare
from flaxlm.decoding.completions import make_request
from flaxlm.decoding.loading import load_run
from flaxlm.interop.huggingface import load_checkpoint
from flaxlm.interop.transfer import export_run, import_run
from flaxlm.nn.models import build_model
from flaxlm.runs import TOKENIZER
from flaxlm.sharding import make_mesh
from flaxlm.training.step import loss_and_gradient

pytestmark = BESIDE_TRANSFORMERS

SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
WORDS = ("the cat", "sat", "on a hat", "théâtre", "the mat and the cat", "a")


def conversations() -> list[list[dict[str, str]]]:
  """Of one to three turns, with answers of one word or many."""
  draw = np.random.default_rng(0)
  say = lambda role, most: {
    "role": role,
    "content": " ".join(draw.choice(WORDS, draw.integers(1, most))),
  }
  return [
    [
      turn
      for _ in range(draw.integers(1, 4))
      for turn in (say("user", 4), say("assistant", 9))
    ]
    for _ in range(12)
  ]


def save_chat_model(hub: Path) -> tuple[Any, Any]:
  """A random model of transformers with a chat template, saved in a folder, and the backend
  of its tokenizer."""
  import torch
  import transformers

  backend = llama()
  backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
  sizes = LLAMA | dict(vocab_size=backend.get_vocab_size(), max_position_embeddings=512)
  torch.manual_seed(0)
  model: Any = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(**sizes, initializer_range=0.3)
  )
  model.save_pretrained(hub)
  backend.save(str(hub / TOKENIZER))
  settings = SPECIALS | {"chat_template": MARKED["chatml"]}
  (hub / "tokenizer_config.json").write_text(json.dumps(settings))
  return model, backend


def test_a_step_on_conversations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  """Loss and gradient to 1e-4, though rows are packed here, and each is alone there."""
  import torch
  import transformers

  monkeypatch.setenv("FLAXLM_DATA_DIR", str(tmp_path / "data"))
  hub = tmp_path / "hub"
  model, backend = save_chat_model(hub)
  talks, file = conversations(), tmp_path / "chats" / "train.jsonl"
  file.parent.mkdir()
  file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
  (file.parent / "validation.jsonl").write_text(json.dumps({"messages": talks[0]}))

  mesh = make_mesh({"data": 8})
  loaded, _ = import_run(hub, tmp_path / "run", mesh)
  cfg = TokenizerConfig(path=str(tmp_path / "run" / TOKENIZER))
  prepared = prepare(f"files:{file.parent}", cfg, lambda line: None, "chat")
  data = DataConfig(objective="chat", seq_len=400, batch_size=16)
  batches = Batches(prepared.train, data, vocab_size=loaded.cfg.num_ids)
  assert batches.num_batches == 1
  batch = batches[0]
  step = jax.jit(loss_and_gradient, static_argnums=(0, 1))
  ours = build_model(loaded.cfg)
  params = jax.device_get(loaded.params)
  found, gradient = step(ours, TrainingConfig(), params, batch, jax.random.key(0))
  count = batch.weights_BT.sum()

  theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIALS)
  total, num_targets = 0.0, 0
  for talk in talks:
    row = theirs.apply_chat_template(
      talk,
      chat_template=MARKED["chatml"],
      return_assistant_tokens_mask=True,
      return_dict=True,
    )
    ids, mask = torch.tensor([row["input_ids"]]), torch.tensor([row["assistant_masks"]])
    labels = torch.where(mask == 1, ids, -100)
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    total += torch.nn.functional.cross_entropy(
      logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    num_targets += int(mask[:, 1:].sum())
  loss = total / num_targets
  loss.backward()

  assert count == num_targets and len({*batch.weights_BT.sum(1).tolist()}) > 1
  assert float(found / count) == pytest.approx(float(loss.detach()), rel=1e-4)
  # Gradients have the names and layouts of their parameters, so they are read as these.
  named = {name: x.grad.numpy() for name, x in model.named_parameters()}
  from safetensors.numpy import save_file  # comes with transformers

  save_file(named, hub / "model.safetensors", {"format": "pt"})
  expected = jax.device_get(load_checkpoint(hub, mesh, None).params)

  def close(found_X: np.ndarray, expected_X: np.ndarray) -> None:
    scale = np.abs(expected_X).max()
    assert scale > 0
    np.testing.assert_allclose(found_X / count, expected_X, atol=1e-4 * scale)

  jax.tree.map(close, jax.device_get(gradient), expected)


def test_a_run_that_was_taught_here_is_asked_there_in_its_template(tmp_path: Path):
  """Exported, with the plain template: the same prompt, ids and mask."""
  import transformers

  folder = own_run(tmp_path, ModelConfig(width=32, depth=1, context=64))
  run = load_run(folder, make_mesh({"data": 8}))
  chat = plain_chat(run.tokenizer, folder)
  (folder / CHAT).write_text(chat.to_json())
  export_run(run, tmp_path / "out", None, 10**9)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
  user = {"role": "user", "content": "tête? <|endoftext|>"}
  talk = [user, {"role": "assistant", "content": " 漢字\n"}, user]
  prompt = theirs.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
  assert chat.render(talk) == prompt
  request = make_request(run, [prompt], 4, has_specials=True)
  assert request.prompts == [theirs(prompt, add_special_tokens=False)["input_ids"]]
  options: Any = dict(return_assistant_tokens_mask=True, return_dict=True)
  expected = theirs.apply_chat_template(talk, **options)
  (lesson,) = lessons([Talk(talk)], chat, run.tokenizer)
  assert lesson.ids_T.tolist() == expected["input_ids"]
  assert lesson.weights_T.tolist() == expected["assistant_masks"]
