# SPDX-License-Identifier: Apache-2.0
"""Adapters in PEFT's layout: export and import are inverse, peft itself computes the same
with them, and those of another base or another kind are refused."""

import functools
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from test_huggingface import rewrite, save
from test_parity import ours, rows, theirs
from tiny_models import tiny

from flaxlm.config import Config, LoraConfig
from flaxlm.decoding.loading import load_run
from flaxlm.errors import CheckpointError, ConfigError
from flaxlm.interop.adapters import (
  ADAPTER,
  BASE,
  WEIGHTS,
  export_adapter,
  import_adapter,
  save_adapters,
)
from flaxlm.interop.families import FAMILIES
from flaxlm.interop.files import CARD
from flaxlm.interop.huggingface import Loaded
from flaxlm.interop.safetensors import read_header
from flaxlm.interop.transfer import import_run
from flaxlm.nn.lora import abstract_adapters
from flaxlm.nn.models import build_model
from flaxlm.origin import find_origin
from flaxlm.runs import files_damage, load_config_of
from flaxlm.sharding import make_mesh

pytestmark = pytest.mark.slow  # nn/test_lora.py has the fast ones

ALL = LoraConfig().targets
# One with each layout: plain, fused, interleaved, other pairs, not transposed, two stacks.
VARIANTS = ["llama_3", "gpt2", "neox", "gptj", "phi3", "t5", "bert", "gemma2", "qwen2_moe"]
FAST = ("llama_3", "gpt2", "neox")

HAS_ALL = all(importlib.util.find_spec(n) for n in ("torch", "transformers", "peft"))
needs_peft = pytest.mark.skipif(
  not HAS_ALL and "FLAXLM_REQUIRE_PARITY" not in os.environ, reason="needs peft"
)


@functools.cache
def mesh() -> Any:
  return make_mesh({"data": -1})


def adapt(base: Path, run_dir: Path, targets: str = ALL, rank: int = 3) -> Path:
  """A run of random adapters over an imported one."""
  lora = LoraConfig(rank=rank, alpha=5.0, targets=targets)
  cfg = load_config_of(base)
  shapes = abstract_adapters(build_model(cfg.model, cfg.training), lora, mesh())
  rng = np.random.default_rng(0)
  draw = lambda x: jax.device_put(rng.normal(size=x.shape).astype(x.dtype) / 5, x.sharding)
  origin = find_origin(Config(name="x", init=str(base)))
  save_adapters(run_dir, origin, lora, jax.tree.map(draw, shapes))
  return run_dir


def same_params(one: Path, other: Path) -> None:
  trees = [flatten_dict(load_run(p, mesh(), None, False).params) for p in (one, other)]
  for path in trees[0]:
    np.testing.assert_allclose(trees[0][path], trees[1][path], atol=1e-6, err_msg=str(path))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
  root = tmp_path_factory.mktemp("base")
  (root / "hub").mkdir()
  save(root / "hub", "llama_3")
  import_run(root / "hub", root / "run", mesh())
  return root / "run"


@pytest.mark.parametrize("targets", [ALL, "/(q|down)$"])
@pytest.mark.parametrize(
  "variant",
  [v if v in FAST else pytest.param(v, marks=pytest.mark.fuzz) for v in VARIANTS],
)
def test_what_goes_out_comes_in_again(variant: str, targets: str, tmp_path: Path):
  (tmp_path / "hub").mkdir()
  save(tmp_path / "hub", variant)
  import_run(tmp_path / "hub", tmp_path / "base", mesh())
  run_dir = adapt(tmp_path / "base", tmp_path / "run", targets)
  assert files_damage(run_dir) == []
  run = load_run(run_dir, mesh(), None, False)
  family, notes = export_adapter(run, tmp_path / "out", None)
  assert notes == []
  assert {path.name for path in (tmp_path / "out").iterdir()} == {
    ADAPTER,
    WEIGHTS,
    BASE,
    CARD,
  }
  kept = json.loads((tmp_path / "hub/config.json").read_text())["model_type"]
  assert family.model_type == kept
  cfg, _ = import_adapter(tmp_path / "out", tmp_path / "again", tmp_path / "base", mesh())
  fused = variant in ("gpt2", "neox", "phi3")
  assert cfg.lora.rank == 3 or fused
  same_params(run_dir, tmp_path / "again")


@pytest.mark.parity
@needs_peft
@pytest.mark.filterwarnings("ignore")  # what they warn of is theirs
@pytest.mark.parametrize("variant", VARIANTS[:-1])
def test_peft_computes_the_same(variant: str, tmp_path: Path):
  """With what we export, and we with what it saves."""
  import peft

  made, (tokens, real) = tiny(variant), rows(variant)
  import_run(made.folder, tmp_path / "base", mesh())
  run_dir = adapt(tmp_path / "base", tmp_path / "run")
  plain = theirs(made.model, tokens, real)

  def logits(path: Path) -> np.ndarray:
    run = load_run(path, mesh(), None, False)
    family = FAMILIES[made.model.config.model_type]
    return ours(Loaded(run.cfg.model, run.params, "float32", family), tokens, real)

  def close(found: np.ndarray, wanted: np.ndarray) -> None:
    kept = real[:, : wanted.shape[1]]
    assert np.abs(wanted - plain)[kept].max() > 1e-2, "the adapter changes something"
    assert np.abs(found - wanted)[kept].max() < 5e-5 * max(1, np.abs(wanted).max())

  export_adapter(load_run(run_dir, mesh(), None, False), tmp_path / "out", None)
  adapted = peft.PeftModel.from_pretrained(made.model, str(tmp_path / "out")).eval()
  try:
    assert not [n for n, p in adapted.named_parameters() if "lora" in n and not p.any()]
    close(logits(run_dir), theirs(adapted, tokens, real))
  finally:
    adapted.unload()
  linear = {
    "llama_3": ["q_proj", "down_proj"],
    "gpt2": ["c_attn"],
    "neox": ["query_key_value"],
  }
  linear |= {"gptj": ["q_proj", "fc_in"], "phi3": ["qkv_proj", "o_proj"], "t5": ["q", "wo"]}
  linear |= {"bert": ["query", "value"], "gemma2": ["gate_proj"]}
  settings = peft.LoraConfig(
    r=4, lora_alpha=6, target_modules=linear[variant], init_lora_weights=False,
    use_rslora=variant == "llama_3",
    rank_pattern={"down_proj": 2}, alpha_pattern={"down_proj": 9},
  )  # fmt: skip
  adapted = peft.get_peft_model(made.model, settings).eval()
  try:
    adapted.save_pretrained(tmp_path / "theirs")
    import_adapter(tmp_path / "theirs", tmp_path / "in", tmp_path / "base", mesh())
    close(logits(tmp_path / "in"), theirs(adapted, tokens, real))
  finally:
    adapted.unload()


@pytest.fixture
def exported(base: Path, tmp_path: Path) -> Path:
  run_dir = adapt(base, tmp_path / "run", "/(q|v)$")
  export_adapter(load_run(run_dir, mesh(), None, False), tmp_path / "out", None)
  return tmp_path / "out"


def test_what_is_written_is_what_peft_reads(exported: Path):
  settings = json.loads((exported / ADAPTER).read_text())
  assert settings["target_modules"] == ["q_proj", "v_proj"]
  assert (settings["r"], settings["lora_alpha"], settings["task_type"]) == (
    3,
    5,
    "CAUSAL_LM",
  )
  assert {path.name for path in exported.iterdir()} == {ADAPTER, WEIGHTS, BASE, CARD}
  names = read_header(exported / WEIGHTS)
  first = "base_model.model.model.layers.0.self_attn.q_proj"
  assert names[f"{first}.lora_A.weight"].shape == (3, 32)
  assert names[f"{first}.lora_B.weight"].shape == (32, 3)
  assert len(names) == 8


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    ({"use_dora": True}, "use_dora is True"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
    ({"bias": "all"}, "bias is 'all'"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    ({"lora_alpha": "many"}, "lora_alpha is 'many'"),
    ({"r": 7}, "r is 7"),
    ({"lora_dropout": 2}, "lora_dropout is 2"),
    ({"alpha_pattern": {"(a+)+$": 1}}, "alpha_pattern is "),
    ({"alpha_pattern": [1]}, "alpha_pattern is [1]"),
  ],
)
def test_another_kind_is_refused(
  base: Path, exported: Path, tmp_path: Path, change: dict, said: str
):
  settings = json.loads((exported / ADAPTER).read_text())
  (exported / ADAPTER).write_text(json.dumps(settings | change))
  with pytest.raises(CheckpointError) as caught:
    import_adapter(exported, tmp_path / "in", base, mesh())
  assert said in caught.value.cause and "\n" not in caught.value.cause
  assert not (tmp_path / "in").exists()


@pytest.mark.parametrize("variant", ["gpt2", "qwen3"])
def test_an_adapter_for_another_base_is_refused(
  exported: Path, tmp_path: Path, variant: str
):
  """By a name that the base has not, or by a shape."""
  (tmp_path / "hub").mkdir()
  save(tmp_path / "hub", variant)
  import_run(tmp_path / "hub", tmp_path / "other", mesh())
  with pytest.raises(CheckpointError, match="an adapter for another base") as caught:
    import_adapter(exported, tmp_path / "in", tmp_path / "other", mesh())
  assert (
    "the base has no " if variant == "gpt2" else "q_proj it has [3, 32]"
  ) in caught.value.cause


def test_another_base_of_the_same_shapes_is_refused(
  base: Path, exported: Path, tmp_path: Path
):
  """By what our export says of it, or else by the checkpoint that the adapter names."""
  (tmp_path / "hub").mkdir()
  save(tmp_path / "hub", "llama_3")
  more = lambda arrays: {name: 1.1 * values for name, values in arrays.items()}
  rewrite(tmp_path / "hub", more)
  other = tmp_path / "other"
  import_run(tmp_path / "hub", other, mesh())
  narrow = tmp_path / "narrow"  # the same, stored in another dtype
  import_run(base.parent / "hub", narrow, mesh(), "bfloat16")
  refused = pytest.raises(CheckpointError, match=f"the parameters of {other} are others")
  with refused as caught:
    import_adapter(exported, tmp_path / "in", other, mesh())
  assert f"remove {exported / BASE}" in caught.value.cure
  assert not (tmp_path / "in").exists()
  assert import_adapter(exported, tmp_path / "a", base, mesh())[1] == []
  assert import_adapter(exported, tmp_path / "b", narrow, mesh())[1] == []

  (exported / BASE).unlink()
  (note,) = import_adapter(exported, tmp_path / "c", other, mesh())[1]
  assert f"nothing tells whether {other} is the base" in note and "names none" in note
  settings = json.loads((exported / ADAPTER).read_text())
  name = lambda x: (exported / ADAPTER).write_text(
    json.dumps(settings | {"base_model_name_or_path": str(x)})
  )
  name("somebody/something")
  (note,) = import_adapter(exported, tmp_path / "d", other, mesh())[1]
  assert "somebody/something, which it names, is not here" in note
  name(tmp_path / "hub")
  assert import_adapter(exported, tmp_path / "e", other, mesh())[1] == []
  with pytest.raises(CheckpointError, match="an adapter for another base"):
    import_adapter(exported, tmp_path / "in", base, mesh())


def test_of_an_adapter_over_another_one_no_digest_tells_the_base(
  base: Path, tmp_path: Path
):
  """Merging rounds, so that it would not be the same each time; a line says so."""
  first = adapt(base, tmp_path / "first")
  run = load_run(adapt(first, tmp_path / "second"), mesh(), None, False)
  _, (note,) = export_adapter(run, tmp_path / "out", None)
  assert f"no digest of its base, which is {first}, with the adapters" in note
  assert not (tmp_path / "out" / BASE).exists()
  (note,) = import_adapter(tmp_path / "out", tmp_path / "in", first, mesh())[1]
  assert f"nothing tells whether {first} is the base" in note


def test_what_is_missing_is_named(base: Path, exported: Path, tmp_path: Path):
  with pytest.raises(ConfigError, match="has no adapters"):
    export_adapter(load_run(base, mesh(), None, False), tmp_path / "none", None)
  (exported / WEIGHTS).rename(exported / "adapter_model.bin")
  with pytest.raises(CheckpointError, match=f"has no {WEIGHTS}"):
    import_adapter(exported, tmp_path / "in", base, mesh())
  (exported / ADAPTER).unlink()
  with pytest.raises(CheckpointError, match=f"has no {ADAPTER}"):
    import_adapter(exported, tmp_path / "in", base, mesh())


def test_some_layers_alone_may_be_adapted(base: Path, exported: Path, tmp_path: Path):
  """PEFT's layers_to_transform: the other layers stay as they are."""
  from flaxlm.interop.safetensors import SINGLE, write_files

  tensors = read_header(exported / WEIGHTS)
  kept = {name: t.read() for name, t in tensors.items() if ".layers.1." in name}
  shapes = {name: values.shape for name, values in kept.items()}
  write_files(exported, shapes, np.dtype("float32"), 10**9, kept.__getitem__)
  shutil.move(exported / SINGLE, exported / WEIGHTS)
  import_adapter(exported, tmp_path / "in", base, mesh())
  whole, found, plain = (
    flatten_dict(load_run(path, mesh(), None, False).params)
    for path in (tmp_path / "run", tmp_path / "in", base)
  )
  path = ("blocks", "attention", "q", "kernel")
  np.testing.assert_array_equal(found[path][0], plain[path][0])
  np.testing.assert_allclose(found[path][1], whole[path][1], atol=1e-6)
