# SPDX-License-Identifier: Apache-2.0
"""GGUF files in llama.cpp itself: the same ids of every text, and the same greedy tokens.

With xllamacpp, whose wheels hold llama.cpp (`pip install xllamacpp`).
"""

import json
import os
import urllib.request
from pathlib import Path
from typing import Any

import jax
import pytest
from flax.traverse_util import unflatten_dict
from test_gguf import MODELS
from test_huggingface import random_params
from tiny_tokenizers import gpt_2_like

from flaxlm.checkpoint.store import CheckpointStore
from flaxlm.config import Config, DataConfig, ModelConfig, to_json
from flaxlm.decoding.completions import complete
from flaxlm.decoding.loading import Run, load_run
from flaxlm.decoding.sampling import make_sampling
from flaxlm.interop.gguf import export_gguf
from flaxlm.runs import IMPORTED_FILES
from flaxlm.sharding import make_mesh
from flaxlm.tokenizers import AnyTokenizer, train_tokenizer
from flaxlm.tokenizers.imported import ImportedTokenizer, Specials

if "FLAXLM_REQUIRE_PARITY" not in os.environ:
  pytest.importorskip("gguf")
  pytest.importorskip("xllamacpp")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

TEXTS = (
  "x =  12",
  "def f(x):\n    return x == 1234567\n\n\n  y",
  "it's DON'T we'LL 'rest 'tis",
  "théâtre ☕ 漢字 ٣٤٥ ½ e\u0301",
  " a\t\tb \r\n c\u00a0d   ",
  "the cat<|endoftext|>sat <|im_end|>",
  "!!! ... \n\n(a_b)  {c: d}",
)
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def make_tokenizer(kind: str) -> AnyTokenizer:
  if kind == "ours":
    return train_tokenizer("byte", [], 257)
  spec = json.loads(gpt_2_like(kind).to_str())
  spec["model"]["ignore_merges"] = kind == "llama3"
  backend = gpt_2_like(kind).from_str(json.dumps(spec))
  backend.add_special_tokens(["<|im_end|>"])
  ids = [backend.token_to_id(name) for name in ("<|endoftext|>", "<|im_end|>")]
  prefix = (ids[0],) if kind == "llama3" else ()
  return ImportedTokenizer(backend, Specials(ids[0], (ids[1], ids[0]), prefix=prefix))


def make_run(folder: Path, model: ModelConfig, tokenizer: AnyTokenizer) -> Run:
  """A run with random parameters, and a chat template."""
  size = tokenizer.vocab_size
  data = DataConfig(seq_len=model.context)
  cfg = Config(name="random", runs_dir=str(folder), model=model.resolve(size), data=data)
  (cfg.run_dir / IMPORTED_FILES).mkdir(parents=True)
  (cfg.run_dir / IMPORTED_FILES / "chat_template.jinja").write_text(TEMPLATE)
  tokenizer.save(cfg.run_dir / "tokenizer.json")
  (cfg.run_dir / "config.json").write_text(to_json(cfg))
  params = unflatten_dict(random_params(cfg.model), sep="/")
  store = CheckpointStore(cfg.run_dir / "checkpoints")
  store.save(0, jax.tree.map(jax.numpy.asarray, params), None, {"step": 0})
  store.close()
  return load_run(cfg.run_dir, make_mesh({"data": -1}))


class Server:
  """llama.cpp with one file, in float32 throughout."""

  def __init__(self, path: Path):
    import xllamacpp as llama_cpp

    params = llama_cpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = 64, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.port = 0
    self.server = llama_cpp.Server(params)

  def post(self, name: str, **values: Any) -> Any:
    address = f"{self.server.listening_address}/{name}"
    request = urllib.request.Request(address, json.dumps(values).encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
      return json.load(answer)


@pytest.mark.parametrize(
  ("model", "tokenizer"),
  [
    ("gpt2", "gpt2"),
    ("llama", "smollm"),
    ("untied", "llama3"),
    ("qwen2", "qwen2"),
    ("qwen3", "ours"),
  ],
)
def test_llama_cpp_reads_and_writes_the_same(model: str, tokenizer: str, tmp_path: Path):
  run = make_run(tmp_path, MODELS[model], make_tokenizer(tokenizer))
  path = tmp_path / "model.gguf"
  export_gguf(run, path, "float32")
  server = Server(path)
  for text in TEXTS:
    if tokenizer == "ours":  # whose special tokens have no name in a text
      text = text.replace("<|", "< |")
    ids = run.tokenizer.framed(run.tokenizer.encode(text), "prompt")
    said = server.post("tokenize", content=text, add_special=True, parse_special=True)
    assert said["tokens"] == ids, text
  [expected] = complete(run, ["the cat"], make_sampling(1, temperature=0), 24)
  options = dict(n_predict=24, temperature=0, return_tokens=True, cache_prompt=False)
  found = server.post("completion", prompt="the cat", **options)
  assert found["tokens"] == expected.tokens
  assert server.post("apply-template", messages=[{"role": "user", "content": "hi"}]) == {
    "prompt": "hi"
  }
