# SPDX-License-Identifier: Apache-2.0
"""Random models of ours against `transformers`: an export computes the same there, or it is
refused. Random configs of theirs: what a file leaves out is read as they read it."""

import collections
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BESIDE_TRANSFORMERS
from parameters import random_params
from test_huggingface import HEADS, family_of
from test_parity import LENGTHS, theirs
from test_parity import ours as logits_of
from tiny_models import VARIANTS

from flaxlm.config import Config, ModelConfig, check_config, difference, knobs
from flaxlm.decoding.loading import Run
from flaxlm.errors import CheckpointError, ConfigError
from flaxlm.interop.family import canonical
from flaxlm.interop.huggingface import Loaded, read_config
from flaxlm.interop.transfer import export_run
from flaxlm.interop.values import Values
from flaxlm.nn.models import build_model
from flaxlm.sharding import make_mesh
from flaxlm.tokenizers import train_tokenizer

pytestmark = BESIDE_TRANSFORMERS

# Values of every field of a model's config, those at the edge of what is allowed too.
CHOICES: dict[str, tuple[Any, ...]] = {
  "family": ("decoder", "encoder", "encoder_decoder"),
  "depth": (1, 2, 3),
  "encoder_depth": (None, 1, 3),
  "width": (32, 24, 36),
  "num_heads": (4, 2, 3, 6),
  "num_kv_heads": (None, 1, 2, 3),
  "head_dim": (None, 8, 12, 6),
  "ffn_width": (None, 40),
  "vocab_size": (258, 300),
  "num_ids": (None, 258),
  "context": (24, 64),
  "cell": ("lstm", "gru"),
  "positions": ("rope", "learned", "sinusoidal", "alibi", "relative", "none"),
  "rope.theta": (10_000, 500.0, 2.0),
  "rope.local_theta": (None, 100, 20_000.0),
  "rope.fraction": (1.0, 0.5, 0.75, 0.3, 0.01),
  "rope.scaling": ("none", "linear", "ntk", "yarn", "llama3"),
  "rope.factor": (1, 2.5, 8),
  "rope.original_context": (None, 3, 8, 16),
  "rope.slow_turns": (1, 0, 2.5),
  "rope.fast_turns": (32, 4, 3),
  "rope.attention_factor": (None, 1.3, 1),
  "relative_buckets": (32, 8, 5),
  "relative_distance": (128, 20, 3),
  "norm": ("rmsnorm", "layernorm"),
  "norm_placement": ("pre", "post", "output", "both"),
  "norm_biased": (True, False),
  "norm_epsilon": (1e-6, 1e-3, 0),
  "parallel": ("none", "one_norm", "two_norms"),
  "embedding_norm": (False, True),
  "embedding_scaled": (False, True),
  "dropout": (0.0, 0.5),
  "window": (None, 5, 100),
  "layer_pattern": (None, "L", "G", "LG", "LLG", "GL"),
  "sink_tokens": (0, 2),
  "learned_sinks": (False, True),
  "attention_scale": (None, 0.3, 0.25, 1, 0),
  "attention_softcap": (None, 2.0, 5),
  "qk_norm": ("none", "head", "width"),
  "activation": ("gelu", "gelu_tanh", "silu", "relu"),
  "gated": (True, False),
  "moe.num_experts": (0, 3),
  "moe.experts_per_token": (2, 1),
  "moe.expert_width": (None, 20),
  "moe.num_shared_experts": (0, 1, 2),
  "moe.shared_gated": (False, True),
  "moe.normalized": (True, False),
  # With a capacity, which no family has, decoding drops nothing, but scoring does.
  "moe.capacity_factor": (None,),
  "moe.load_balance_weight": (0.01, 0),
  "moe.router_z_weight": (0.001, 0),
  "biased": (False, True),
  "qkv_biased": (None, True, False),
  "o_biased": (None, True, False),
  "tied_embeddings": (True, False),
  "head_biased": (False, True),
  "head_transform": (False, True),
  "logit_scale": (1, 0.5),
  "logit_softcap": (None, 3, 0.7),
  "num_token_types": (0, 1, 2),
  "pooler": (False, True),
}


def test_every_field_is_varied():
  assert CHOICES.keys() == {name for name, _, _ in knobs(ModelConfig)}


def of_a_family(variant: str) -> ModelConfig:
  """The model of a tiny variant, as our config would say it, with a vocabulary of ours."""
  family = family_of(variant)
  values = {"model_type": family.model_type, **VARIANTS[variant].values, "vocab_size": 258}
  return family.read(Values(values, "config.json", HEADS))


def drawn(number: int) -> ModelConfig:
  """A random model: one of a family's, with up to six fields changed."""
  rng = np.random.default_rng(number)
  while True:
    cfg = of_a_family(sorted(VARIANTS)[rng.integers(len(VARIANTS))])
    for name in rng.choice(sorted(CHOICES), rng.choice([0, 1, 1, 2, 2, 3, 6])):
      value = CHOICES[name][rng.integers(len(CHOICES[name]))]
      outer, _, inner = name.partition(".")
      if inner:
        value = dataclasses.replace(getattr(cfg, outer), **{inner: value})
      cfg = dataclasses.replace(cfg, **{outer: value})
    objective = {"encoder": "masked", "encoder_decoder": "seq2seq"}
    data = {"objective": objective.get(cfg.family, "next_token"), "seq_len": 8}
    whole = Config(model=cfg)
    whole = dataclasses.replace(whole, data=dataclasses.replace(whole.data, **data))
    try:
      check_config(whole)
    except ConfigError:
      continue  # what training refuses, too
    return cfg


def compared(number: int, folder: Path) -> bool:
  """Whether model `number` can be exported; `transformers` then computes the same."""
  import transformers

  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  unresolved, mesh = drawn(number), make_mesh({"data": -1})
  cfg = unresolved.resolve()
  tokenizer = train_tokenizer("byte", [], 257, masked=cfg.family == "encoder")
  model = build_model(cfg)
  params = random_params(model, number)
  run = Run(
    folder, Config(name="x", model=cfg).resolve(), tokenizer, 0, model, params, mesh
  )
  said = f"model {number}: {unresolved}"
  try:
    family = export_run(run, folder, "float32", 10**9)
  except CheckpointError as e:
    assert e.cause and "\n" not in e.cause, said
    return False
  [architecture] = json.loads((folder / "config.json").read_text())["architectures"]
  again, info = getattr(transformers, architecture).from_pretrained(
    folder, attn_implementation="eager", output_loading_info=True
  )
  assert not info["missing_keys"] and not info["mismatched_keys"], f"{said}: {info}"
  stray = {name for name in info["unexpected_keys"] if "pooler" not in name}
  assert not stray, f"{said}: {stray}"

  rng = np.random.default_rng(number)
  real = np.arange(min(24, cfg.context)) < np.array(LENGTHS)[:, None]
  tokens = np.where(real, rng.integers(4, 250, real.shape), 1)
  loaded = Loaded(cfg, params, "float32", family)
  if cfg.family == "encoder" and not cfg.head_transform:  # its hidden vectors, then
    segments = real.astype(np.int32)
    found = model.apply({"params": params}, tokens, None, segments, method="hidden").value
    expected = hidden(again.eval(), tokens, real)
  else:
    found, expected = logits_of(loaded, tokens, real), theirs(again.eval(), tokens, real)
  found = np.asarray(found)[..., : expected.shape[-1]]  # padding of the vocabulary
  error = np.abs(found - expected)[real[:, : expected.shape[1]]].max()
  assert error < 1e-4 * max(1, np.abs(expected).max()), f"{said}: {family.model_type}"
  return True


def hidden(model: Any, tokens: np.ndarray, real: np.ndarray) -> np.ndarray:
  import torch

  with torch.no_grad():
    mask = torch.tensor(real.astype(np.int64))
    return model(torch.tensor(tokens), attention_mask=mask).last_hidden_state.numpy()


# Some of those that were another model there, or a traceback here.
ONCE_WRONG = (16, 43, 85, 108)


@pytest.mark.parametrize("number", (0, 1, 2, 3, *ONCE_WRONG))
def test_an_export_is_the_same_model_or_refused(number: int, tmp_path: Path):
  compared(number, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.fuzz
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("hundred", range(20))
def test_two_thousand_exports_are_the_same_model_or_refused(hundred: int, tmp_path: Path):
  outcomes = collections.Counter(
    compared(number, tmp_path / str(number))
    for number in range(100 * hundred, 100 * hundred + 100)
  )
  assert outcomes[True] >= 20, "exports that are compared"


# -- What a file leaves out ----------------------------------------------------------------

# Of these they have defaults that no checkpoint relies on; without them we refuse.
NEEDED = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_missing_key_is_read_as_theirs(variant: str):
  """Of every key that an export writes: left out of config.json, it means here what it
  means to `transformers`, whose own export of such a config is read, too."""
  import transformers

  transformers.logging.set_verbosity_error()
  family, name = family_of(variant), VARIANTS[variant].name
  config_class = getattr(
    transformers, f"{ {'Gemma3': 'Gemma3Text'}.get(name, name) }Config"
  )
  cfg = read_config(family, Values(VARIANTS[variant].values, "config.json", HEADS))
  written = json.loads(json.dumps(family.keys(cfg, HEADS)))
  # Theirs ties any T5, until a file has another head.
  names = HEADS if cfg.tied_embeddings else (*HEADS, "lm_head.weight")
  for key in sorted(written.keys() - {"model_type"}):
    rest = {k: v for k, v in written.items() if k != key}
    try:
      found = read_config(family, Values(rest, "config.json", names))
    except CheckpointError:
      continue
    try:
      whole = config_class(**{k: v for k, v in rest.items() if k != "model_type"}).to_dict()
    except ValueError:  # theirs refuse it too
      continue
    expected = read_config(family, Values(whole, "config.json", names))
    assert not difference(canonical(found), canonical(expected)), key
