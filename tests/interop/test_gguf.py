# SPDX-License-Identifier: Apache-2.0
"""GGUF files: transformers reads the same models from them, under llama.cpp's names."""

import dataclasses
import importlib.util
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_transfer import own_run
from tiny_tokenizers import gpt_2_like

from flaxlm.cli import main
from flaxlm.config import ModelConfig, RopeConfig
from flaxlm.decoding.loading import load_run
from flaxlm.errors import CheckpointError
from flaxlm.interop.gguf import (
  ARCHITECTURES,
  add_settings,
  add_special_ids,
  export_gguf,
  find_pre_tokenizer,
  frequency_factors,
)
from flaxlm.interop.transfer import export_run
from flaxlm.nn.positions import inverse_wavelengths
from flaxlm.runs import IMPORTED_FILES
from flaxlm.sharding import make_mesh
from flaxlm.tokenizers import train_tokenizer
from flaxlm.tokenizers.imported import ImportedTokenizer, Specials

NEEDED = ("torch", "transformers", "gguf")
needs_parity = [
  pytest.mark.parity,
  pytest.mark.skipif(
    not all(map(importlib.util.find_spec, NEEDED))
    and "FLAXLM_REQUIRE_PARITY" not in os.environ,
    reason="needs PyTorch, transformers and gguf",
  ),
  pytest.mark.filterwarnings("ignore"),
]

SMALL = ModelConfig(width=32, depth=2, num_heads=4, num_kv_heads=2, context=64)
MODELS = {
  "llama": SMALL,
  "untied": dataclasses.replace(SMALL, tied_embeddings=False, num_kv_heads=4, head_dim=16),
  "qwen2": dataclasses.replace(SMALL, qkv_biased=True),
  "qwen3": dataclasses.replace(SMALL, qk_norm="head", head_dim=128),
  "gpt2": dataclasses.replace(
    SMALL,
    num_kv_heads=None,
    context=1024,  # transformers takes no other from a GGUF
    positions="learned",
    norm="layernorm",
    activation="gelu_tanh",
    gated=False,
    biased=True,
  ),
}


def run_of(tmp_path: Path, model: ModelConfig):
  return load_run(own_run(tmp_path, model), make_mesh({"data": -1}))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
class TestParity:
  pytestmark = needs_parity

  def test_transformers_reads_the_same_model(self, name: str, dtype: str, tmp_path: Path):
    import torch
    from transformers import AutoModelForCausalLM

    run = run_of(tmp_path, MODELS[name])
    architecture = export_gguf(run, tmp_path / "model.gguf", dtype)
    assert architecture == ("llama" if name == "untied" else name)
    export_run(run, tmp_path / "safetensors", dtype, most=10**9)
    read = lambda path, **options: AutoModelForCausalLM.from_pretrained(
      path, dtype=torch.float32, **options
    )
    expected = read(tmp_path / "safetensors")
    actual = read(tmp_path, gguf_file="model.gguf")
    keys = {"num_attention_heads", "max_position_embeddings"}
    if name == "gpt2":
      keys |= {"layer_norm_epsilon"}
    else:
      keys |= {"rms_norm_eps", "num_key_value_heads"}
      # A config of Qwen 2's need not say it: what the model made of it counts.
      head_dims = [model.model.layers[0].self_attn.head_dim for model in (actual, expected)]
      assert head_dims[0] == head_dims[1] == run.model.cfg.head_dim
    for key in keys:
      assert getattr(actual.config, key) == pytest.approx(getattr(expected.config, key))
    theirs = dict(actual.named_parameters())
    assert theirs.keys() == dict(expected.named_parameters()).keys()
    for parameter, value in expected.named_parameters():
      found = theirs[parameter]
      if value.ndim == 1:  # a file has its vectors in float32
        found = found.to(getattr(torch, dtype))
      assert torch.equal(found.float(), value), parameter
    tokens = torch.tensor(np.random.default_rng(0).integers(0, 257, (2, 24)))
    if dtype == "float32":
      with torch.no_grad():
        # A transposed matrix lies otherwise in memory: sums are added in another order.
        tolerance = 1e-4 if name == "gpt2" else 0
        options = dict(rtol=0, atol=tolerance)
        torch.testing.assert_close(
          actual(tokens).logits, expected(tokens).logits, **options
        )

  def test_the_words_come_along(self, name: str, dtype: str, tmp_path: Path):
    from gguf import GGUFReader

    run = run_of(tmp_path, MODELS[name])
    export_gguf(run, tmp_path / "model.gguf", dtype)
    fields = GGUFReader(tmp_path / "model.gguf").fields
    words = fields["tokenizer.ggml.tokens"].contents()
    said = json.loads(run.tokenizer.to_json())
    assert len(words) == run.cfg.model.num_ids == 257
    for word, number in said["model"]["vocab"].items():
      assert words[number] == word
    assert words[256] == "<|endoftext|>"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 256
    assert fields["tokenizer.ggml.token_type"].contents()[256] == 3  # control
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True


def spec_of(pre_tokenizer: str, **model: Any) -> dict[str, Any]:
  """A tokenizer.json that cuts texts in some way."""
  backend = gpt_2_like(pre_tokenizer)
  spec = json.loads(backend.to_str())
  spec["model"] |= model
  return spec


@pytest.mark.parametrize(
  ("pre_tokenizer", "whole_words", "name"),
  [
    ("gpt2", False, "gpt-2"),
    ("smollm", False, "smollm"),
    ("llama3", True, "llama-bpe"),
    ("llama3", False, "dbrx"),
    ("qwen2", False, "qwen2"),
  ],
)
def test_how_texts_are_cut(pre_tokenizer: str, whole_words: bool, name: str):
  spec = spec_of(pre_tokenizer, ignore_merges=whole_words)
  assert find_pre_tokenizer(spec) == name
  if pre_tokenizer == "qwen2":
    assert find_pre_tokenizer(spec | {"normalizer": {"type": "NFC"}}) == name


def test_what_llama_cpp_would_cut_otherwise_is_refused():
  ours = json.loads(train_tokenizer("bpe", ["def f(): pass"] * 9, 300).to_json())
  spaced = spec_of("gpt2")
  spaced["pre_tokenizer"]["add_prefix_space"] = True
  no_bytes = spec_of("qwen2")
  no_bytes["pre_tokenizer"] = no_bytes["pre_tokenizer"]["pretokenizers"][0]
  whole = spec_of("qwen2", ignore_merges=True)
  for spec in (ours, spaced, no_bytes, whole, spec_of("tekken")):
    with pytest.raises(CheckpointError, match="does not split texts"):
      find_pre_tokenizer(spec)
  # Where each byte is an id, every way to cut is the same.
  spec = json.loads(train_tokenizer("byte", [], 257).to_json())
  assert find_pre_tokenizer(spec) == "gpt-2"


@pytest.mark.parametrize(
  ("change", "told"),
  [
    ({"normalizer": {"type": "Lowercase"}}, "normalizer"),
    ({"model": {"byte_fallback": True}}, "byte-level"),
    ({"model": {"type": "Unigram"}}, "byte-level"),
    ({"model": {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
    ({"model": {"dropout": 0.1}}, "dropout"),
    ({"token": {"rstrip": True}}, "rstrip"),
  ],
)
def test_what_a_tokenizer_has_and_gguf_has_not(change: dict[str, Any], told: str):
  spec = spec_of("gpt2")
  spec["model"] |= change.pop("model", {})
  spec["added_tokens"][0] |= change.pop("token", {})
  with pytest.raises(CheckpointError, match=told):
    find_pre_tokenizer(spec | change)


class Written(dict):
  """Takes what a writer of GGUF is told, by the names of its methods."""

  def __getattr__(self, name: str) -> Any:
    return lambda value: self.__setitem__(name.removeprefix("add_"), value)


def special_ids(tmp_path: Path, specials: Specials, **settings: Any) -> Written:
  """What a file says of the special ids 300 to 304 of a tokenizer."""
  folder = tmp_path / IMPORTED_FILES
  folder.mkdir(exist_ok=True)
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))
  backend = gpt_2_like("gpt2")
  backend.add_special_tokens([f"<{n}>" for n in range(5)])
  tokenizer, written = ImportedTokenizer(backend, specials), Written()
  ids = [tokenizer.id_of(f"<{n}>") for n in range(5)]
  named = specials._replace(
    bos_id=None if specials.bos_id is None else ids[specials.bos_id],
    eos_ids=tuple(ids[n] for n in specials.eos_ids),
    prefix=tuple(ids[n] for n in specials.prefix),
  )
  model = SimpleNamespace(cfg=SimpleNamespace(num_ids=400))
  tokenizer = ImportedTokenizer(backend, named)
  run = SimpleNamespace(tokenizer=tokenizer, model=model, path=tmp_path)
  add_special_ids(written, run)  # type: ignore[arg-type]
  return Written({k: ids.index(v) if v in ids else v for k, v in written.items()})


def test_special_ids_are_the_configured_ones(tmp_path: Path):
  """As for Llama 3: the settings name one end, others end an answer as well."""
  specials = Specials(bos_id=4, eos_ids=(0, 2, 3), prefix=(4,))
  assert special_ids(tmp_path, specials, eos_token={"content": "<3>"}) == {
    "bos_token_id": 4,
    "add_bos_token": True,
    "add_eos_token": False,
    "eos_token_id": 3,
    "eot_token_id": 0,
    "eom_token_id": 2,
  }
  # As for Qwen: nothing begins a text, and the first of several ends is the configured one.
  found = special_ids(tmp_path, Specials(bos_id=1, eos_ids=(3, 1)))
  assert (found["add_bos_token"], found["eos_token_id"]) == (False, 3)
  assert found["eot_token_id"] == 1 and "eom_token_id" not in found


@pytest.mark.parametrize(
  ("specials", "told"),
  [
    (Specials(eos_ids=(0,), prefix=(1, 2)), "texts begin with"),
    (Specials(), "0 ids end an answer"),
    (Specials(eos_ids=(0, 1, 2, 3)), "4 ids end an answer"),
  ],
)
def test_special_ids_that_gguf_has_no_place_for(
  tmp_path: Path, specials: Specials, told: str
):
  with pytest.raises(CheckpointError, match=told):
    special_ids(tmp_path, specials)


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs gguf")
def test_a_partly_rotated_head(tmp_path: Path):
  """llama.cpp refuses it for LLaMA, and for others it wants to know how many dims."""
  model = dataclasses.replace(SMALL, rope=RopeConfig(fraction=0.5), qkv_biased=True)
  cfg, written = model.resolve(257), Written()
  add_settings(written, cfg, "name")
  assert written["rope_dimension_count"] == cfg.head_dim // 2
  run = run_of(tmp_path, dataclasses.replace(model, qkv_biased=False))
  with pytest.raises(CheckpointError):
    export_gguf(run, tmp_path / "model.gguf", None)
  assert not (tmp_path / "model.gguf").exists()


def test_scaled_positions():
  """Llama 3.1's scaling: fast pairs stay, and slow ones are slowed by the factor."""
  rope = RopeConfig(
    scaling="llama3",
    factor=8.0,
    original_context=8192,
    theta=500_000,
    fast_turns=4,
    slow_turns=1,
  )
  cfg = dataclasses.replace(SMALL, rope=rope, head_dim=64, context=512).resolve(257)
  factors = frequency_factors(cfg, ARCHITECTURES["llama"])
  assert factors is not None and len(factors) == len(inverse_wavelengths(64, 500_000))
  assert factors[0] == 1 and factors[-1] == pytest.approx(8)
  with pytest.raises(CheckpointError, match="llama3"):
    frequency_factors(cfg, ARCHITECTURES["qwen2"])
  stretched = dataclasses.replace(rope, scaling="yarn")
  with pytest.raises(CheckpointError, match="yarn"):
    frequency_factors(dataclasses.replace(cfg, rope=stretched), ARCHITECTURES["llama"])


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs gguf")
def test_what_llama_cpp_has_no_place_for(tmp_path: Path, capsys: pytest.CaptureFixture):
  run = own_run(tmp_path, dataclasses.replace(SMALL, positions="alibi"))
  target = tmp_path / "model.gguf"
  assert main(["export", str(run), str(target), "--format", "gguf"]) == 4
  assert "GGUF export supports the families" in capsys.readouterr().err
  target.write_text("mine")
  assert main(["export", str(run), str(target), "--format", "gguf"]) == 4
  assert target.read_text() == "mine"
