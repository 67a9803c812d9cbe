# SPDX-License-Identifier: Apache-2.0
"""Every family against `transformers`, the reference: an imported model computes the same,
and so does `transformers` after it is exported again."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_tokenizers
from conftest import BESIDE_TRANSFORMERS, ROOT
from test_transfer import own_run
from tiny_models import LLAMA, VARIANTS, Tiny, Variant, tiny

from flaxlm.config import Config, ModelConfig
from flaxlm.decoding.completions import complete
from flaxlm.decoding.loading import Run, load_run
from flaxlm.decoding.sampling import same_settings
from flaxlm.interop.families import FAMILIES
from flaxlm.interop.huggingface import Loaded, load_checkpoint, save_checkpoint
from flaxlm.interop.transfer import export_run, import_run, import_tokenizer, write_json
from flaxlm.nn.base import Source
from flaxlm.nn.models import build_model
from flaxlm.sharding import make_mesh
from flaxlm.tokenizers import load_tokenizer, train_tokenizer

pytestmark = BESIDE_TRANSFORMERS

LENGTHS = [24, 17]
TARGET_LENGTH = 11


def rows(variant: str) -> tuple[np.ndarray, np.ndarray]:
  """Two rows of different length, and which of their tokens are real."""
  rng = np.random.default_rng(len(variant))
  real = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
  padding = 1 if "roberta" in variant else 0
  return np.where(real, rng.integers(4, 67, real.shape), padding), real


def theirs(model: Any, tokens: np.ndarray, real: np.ndarray) -> np.ndarray:
  """The logits of transformers; for a T5, with the first tokens as targets."""
  import torch

  extra = {}
  if model.config.is_encoder_decoder:
    extra["decoder_input_ids"] = torch.tensor(tokens[:, :TARGET_LENGTH])
  mask = torch.tensor(real.astype(np.int64))
  with torch.no_grad():
    output = model(input_ids=torch.tensor(tokens), attention_mask=mask, **extra)
  name = "logits" if "logits" in output else "prediction_logits"
  return output[name].numpy()


def ours(loaded: Loaded, tokens: np.ndarray, real: np.ndarray) -> np.ndarray:
  model, segments = build_model(loaded.cfg), real.astype(np.int32)
  if loaded.cfg.family == "encoder_decoder":
    source = Source(tokens, None, segments)
    targets = tokens[:, :TARGET_LENGTH]
    run = jax.jit(lambda params: model.apply(params, targets, source=source).value)
  else:
    run = jax.jit(lambda params: model.apply(params, tokens, None, segments).value)
  return np.asarray(run({"params": loaded.params}))


def close(found: np.ndarray, expected: np.ndarray, real: np.ndarray) -> None:
  compared = real[:, : expected.shape[1]]
  largest = np.abs(expected).max()
  assert largest > 0.5, "logits that say something"
  error = np.abs(found - expected)[compared].max()
  assert error < 2e-5 * max(1, largest), f"{error} of {largest}"


def test_the_family_that_the_docs_add(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
  """The family that docs/interop.md adds, run and compared."""
  page = (ROOT / "docs/interop.md").read_text()
  code: dict[str, Any] = {}
  exec(page.split("```python\n")[1].split("```")[0], code)
  monkeypatch.setitem(FAMILIES, "stablelm", code["STABLELM"])
  values = {k: v for k, v in LLAMA.items() if k != "head_dim"} | dict(use_qkv_bias=True)
  monkeypatch.setitem(VARIANTS, "stablelm", Variant("StableLm", values))
  test_logits_are_the_same_imported_and_exported("stablelm", tmp_path)


def test_a_bare_encoder_has_the_same_hidden_vectors(
  monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
  """As for sentence embeddings: no head, no prefix, a pooler."""
  import torch

  monkeypatch.setitem(VARIANTS, "bare", Variant("Bert", LLAMA, "Model"))
  made, (tokens, real) = tiny("bare"), rows("bare")
  mask = torch.tensor(real.astype(np.int64))
  with torch.no_grad():
    expected = made.model(torch.tensor(tokens), attention_mask=mask)
  loaded = load(made)
  assert not loaded.cfg.head_transform and loaded.cfg.pooler
  model, params = build_model(loaded.cfg), {"params": loaded.params}
  segments = real.astype(np.int32)
  found = model.apply(params, tokens, None, segments, method="hidden").value
  close(np.asarray(found), expected.last_hidden_state.numpy(), real)
  pooled = model.apply(params, found, method="pool")
  np.testing.assert_allclose(pooled, expected.pooler_output.numpy(), atol=2e-5)
  export = (tmp_path, loaded.cfg, loaded.params, loaded.family, "float32", 10**9)
  write_json(tmp_path / "config.json", save_checkpoint(*export))
  again, info = type(made.model).from_pretrained(tmp_path, output_loading_info=True)
  assert not info["missing_keys"] and not info["unexpected_keys"]
  with torch.no_grad():
    vectors = again.eval()(torch.tensor(tokens), attention_mask=mask).last_hidden_state
  close(vectors.numpy(), expected.last_hidden_state.numpy(), real)


def test_a_gemma_3_with_eyes_reads_text(tmp_path: Path):
  """Its text model is imported, and exported as the family without images."""
  import torch
  import transformers

  text = {k: v for k, v in VARIANTS["gemma3"].values.items()}
  eyes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
  eyes |= dict(intermediate_size=16, image_size=28, patch_size=14)
  images = dict(boi_token_index=64, eoi_token_index=65, image_token_index=66)
  config = transformers.Gemma3Config(
    text_config=text, vision_config=eyes, mm_tokens_per_image=4, **images
  )
  torch.manual_seed(0)
  model = transformers.Gemma3ForConditionalGeneration(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter += 0.2 * torch.randn(parameter.shape)
  model.save_pretrained(tmp_path / "hub")
  (tokens, real), mesh = rows("gemma3"), make_mesh({"data": -1})
  tokens = np.minimum(tokens, 63)
  expected = theirs(model, tokens, real)
  loaded = load_checkpoint(tmp_path / "hub", mesh)
  close(ours(loaded, tokens, real), expected, real)
  import_run(tmp_path / "hub", tmp_path / "run", mesh)
  cfg = Config(model=loaded.cfg)
  tokenizer = train_tokenizer("byte", [], 257)
  run = Run(
    tmp_path / "run", cfg, tokenizer, 0, build_model(cfg.model), loaded.params, mesh
  )
  assert export_run(run, tmp_path / "out", None, 10**9).model_type == "gemma3_text"
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
  close(theirs(again, tokens, real), expected, real)


def test_a_run_of_ours_speaks_there_as_here(tmp_path: Path):
  """Trained here, exported, opened without edits: the same tokens for the same prompt."""
  import torch
  import transformers

  # No ids beyond the tokenizer's, which we never draw and they might.
  model = ModelConfig(width=32, depth=2, context=64, vocab_size=257)
  run = load_run(own_run(tmp_path, model), make_mesh({"data": -1}))
  export_run(run, tmp_path / "out", None, 20_000)
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
  prompt = "def tête("
  inputs = tokenizer(prompt, return_tensors="pt")
  with torch.no_grad():
    whole = model.generate(**inputs, do_sample=False, max_new_tokens=20)[0]
  [answer] = complete(run, [prompt], same_settings(1, temperature=0), 20)
  length = inputs["input_ids"].shape[1]
  assert whole[length:].tolist() == answer.tokens
  assert tokenizer.decode(whole[:length], skip_special_tokens=True) == prompt


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
def test_an_imported_tokenizer_reads_as_theirs(kind: str, tmp_path: Path):
  import transformers

  backend = getattr(tiny_tokenizers, kind)()
  backend.save(str(tmp_path / "tokenizer.json"))
  tokens = {token.content for token in backend.get_added_tokens_decoder().values()}
  named = {"bos_token": "<s>", "eos_token": "</s>", "mask_token": "[MASK]"}
  said = {role: token for role, token in named.items() if token in tokens}
  write_json(tmp_path / "tokenizer_config.json", said)
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
  (tmp_path / "run").mkdir()
  import_tokenizer(tmp_path, tmp_path / "run", {})
  mine = load_tokenizer(tmp_path / "run/tokenizer.json")
  for text in ("the cat sat", " the  cats", "the</s> cat", "a [MASK] hat"):
    ids = mine.encode(text)
    assert mine.framed(ids, "source") == theirs(text)["input_ids"]
    assert mine.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
  assert (mine.mask_id is not None) == ("mask_token" in said)


def load(made: Tiny) -> Loaded:
  return load_checkpoint(made.folder, make_mesh({"tensor": 1, "data": -1}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_the_same_imported_and_exported(variant: str, tmp_path: Path):
  made, (tokens, real) = tiny(variant), rows(variant)
  expected = theirs(made.model, tokens, real)
  loaded = load(made)
  close(ours(loaded, tokens, real), expected, real)

  keys = save_checkpoint(
    tmp_path, loaded.cfg, loaded.params, loaded.family, "float32", 40_000
  )
  ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
  write_json(tmp_path / "config.json", ids | keys)
  cls = type(made.model)
  again, info = cls.from_pretrained(
    tmp_path, attn_implementation="eager", output_loading_info=True
  )
  missing = {name for name in info["missing_keys"] if "seq_relationship" not in name}
  assert not missing and not info["unexpected_keys"] and not info["mismatched_keys"]
  close(theirs(again.eval(), tokens, real), expected, real)
