# SPDX-License-Identifier: Apache-2.0
"""An imported model's loss of texts that name special tokens is that of `transformers`."""

import itertools
import json
from pathlib import Path

import pytest
from conftest import BESIDE_TRANSFORMERS
from tiny_models import LLAMA
from tiny_tokenizers import gpt2

from flaxlm.decoding.loading import load_run
from flaxlm.interop.transfer import import_run
from flaxlm.sharding import make_mesh
from flaxlm.training.evaluation import evaluate_run

pytestmark = BESIDE_TRANSFORMERS

END = "<|im_end|>"
TEXTS = {"a.txt": f"the cat{END}\nsat{END}\n", "b.txt": f"{END}on the mat", "c.txt": "é"}


def test_a_tokenizer_without_bos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  """Its end of text comes before each text, and nothing else begins one."""
  import torch
  import transformers

  monkeypatch.setenv("FLAXLM_DATA_DIR", str(tmp_path / "data"))
  backend, folder = gpt2(), tmp_path / "hub"
  backend.add_special_tokens([END])
  end = backend.token_to_id(END)
  sizes = LLAMA | dict(vocab_size=backend.get_vocab_size(), max_position_embeddings=64)
  sizes |= dict(bos_token_id=None, eos_token_id=end)
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(**sizes, initializer_range=0.5)
  )
  model.save_pretrained(folder)
  backend.save(str(folder / "tokenizer.json"))
  about = {"eos_token": END, "bos_token": None}
  (folder / "tokenizer_config.json").write_text(json.dumps(about))
  for name, text in TEXTS.items():
    path = tmp_path / "text" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)

  mesh = make_mesh({"data": 8})
  import_run(folder, tmp_path / "run", mesh)
  run = load_run(tmp_path / "run", mesh)
  lines: list[str] = []
  found = evaluate_run(run, f"files:{tmp_path / 'text'}", None, None, lines.append)

  nats: list[float] = []
  for text in TEXTS.values():
    ids = [end, *backend.encode(text).ids, end]
    with torch.no_grad():
      logits_TV = model(torch.tensor([ids[:-1]])).logits[0]
    logprobs_TV = torch.log_softmax(logits_TV, -1)
    pairs = itertools.pairwise(ids)
    nats += [-float(logprobs_TV[t, after]) for t, (_, after) in enumerate(pairs)]
  nats = nats[:-1]  # nothing comes after the last text
  num_bytes = sum(len(text.encode()) for text in TEXTS.values())
  assert (found["split"], found["tokens"], found["bytes"]) == (
    "whole",
    len(nats),
    num_bytes,
  )
  assert found["eval/loss"] == pytest.approx(sum(nats) / len(nats), rel=1e-5)
  bits_per_byte = found["eval/loss"] / 0.6931471805599453 * len(nats) / num_bytes
  assert found["eval/bits_per_byte"] == pytest.approx(bits_per_byte, rel=1e-6)
