# SPDX-License-Identifier: Apache-2.0
"""GGUF files: transformers reads the same models from them, under llama.cpp's names."""

import dataclasses
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
from test_transfer import own_run

from flaxlm.cli import main
from flaxlm.config import ModelConfig, RopeConfig
from flaxlm.decoding.loading import load_run
from flaxlm.errors import CheckpointError
from flaxlm.interop.gguf import (
  ARCHITECTURES,
  export_gguf,
  find_pre_tokenizer,
  frequency_factors,
)
from flaxlm.interop.transfer import export_run
from flaxlm.nn.positions import inverse_wavelengths
from flaxlm.sharding import make_mesh
from flaxlm.tokenizers import train_tokenizer

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


def test_how_texts_are_cut():
  said = lambda tokenizer: json.dumps(json.loads(tokenizer.to_json())["pre_tokenizer"])
  assert (
    find_pre_tokenizer(said(train_tokenizer("bpe", ["def f(): pass"] * 9, 300)))
    == "llama-bpe"
  )
  with pytest.raises(CheckpointError, match="does not split texts"):
    find_pre_tokenizer('{"type": "Whitespace"}')


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
