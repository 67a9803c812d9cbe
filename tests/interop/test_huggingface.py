# SPDX-License-Identifier: Apache-2.0
"""Import and export of each family without the reference: identity, and what is refused.

test_parity.py checks that `transformers` computes the same with the numbers.
"""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow_but
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import LLAMA, MOE, VARIANTS, scaled

from flaxlm.config import ModelConfig, MoEConfig, RopeConfig
from flaxlm.errors import CheckpointError, FlaxLMError
from flaxlm.interop.families import FAMILIES
from flaxlm.interop.family import Family, canonical
from flaxlm.interop.huggingface import (
  describe,
  load_checkpoint,
  read_config,
  save_checkpoint,
)
from flaxlm.interop.safetensors import INDEX, SINGLE, open_checkpoint, write_files
from flaxlm.interop.settings import rotary_fraction, shortest_period
from flaxlm.interop.values import Values
from flaxlm.nn.models import abstract_params, build_model
from flaxlm.nn.positions import inverse_wavelengths, stretched_frequencies
from flaxlm.sharding import make_mesh

ONE_OF_EACH = [name for name, v in VARIANTS.items() if v.greedy] + ["bert", "roberta"]
# Names on which what is read depends: heads that some files of a family lack.
HEADS = ("cls.predictions.bias", "lm_head.layer_norm.weight")


def family_of(variant: str) -> Family:
  name = f"{VARIANTS[variant].name}Model"
  return next(family for family in FAMILIES.values() if name in family.architectures)


def config_of(variant: str) -> tuple[Family, ModelConfig]:
  family = family_of(variant)
  values = {"model_type": family.model_type, **VARIANTS[variant].values}
  return family, read_config(family, Values(values, "config.json", HEADS))


@functools.cache
def mesh() -> jax.sharding.Mesh:
  return make_mesh({"fsdp": 2, "data": -1})


def random_params(cfg: ModelConfig) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  flat = flatten_dict(abstract_params(build_model(cfg), mesh()), sep="/")
  draw = lambda shape: rng.normal(size=shape).astype(np.float32)
  return {path: draw(array.shape) for path, array in sorted(flat.items())}


def save(folder: Path, variant: str, most: int = 10**9) -> dict[str, np.ndarray]:
  """Random parameters of a variant, exported to `folder`; returns them by path."""
  family, cfg = config_of(variant)
  params = random_params(cfg)
  tree = unflatten_dict(params, sep="/")
  keys = save_checkpoint(folder, cfg, tree, family, "float32", most)
  (folder / "config.json").write_text(json.dumps(keys))
  return params


def rewrite(folder: Path, change: Any, dtype: Any = np.float32) -> None:
  """Replaces the tensors, {name: array}, by the result of `change`."""
  arrays = {name: t.read() for name, t in open_checkpoint(folder).items()}
  arrays = change(arrays) or arrays
  shapes = {name: array.shape for name, array in arrays.items()}
  write_files(folder, shapes, np.dtype(dtype), 10**9, arrays.__getitem__)


# The layouts that differ most; the round trips of the others are in the slow tests.
FAST = ("llama", "gemma3")


def edit(folder: Path, **values: Any) -> None:
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("variant", slow_but(FAST, ONE_OF_EACH))
def test_export_then_import_is_identity(variant: str, tmp_path: Path):
  params = save(tmp_path, variant, most=20_000)
  loaded = load_checkpoint(tmp_path, mesh())
  found = flatten_dict(loaded.params, sep="/")
  assert found.keys() == params.keys()
  for path, array in params.items():  # Gemma's norms are stored less 1
    np.testing.assert_allclose(found[path], array, rtol=0, atol=1e-6, err_msg=path)
  assert canonical(loaded.cfg) == canonical(config_of(variant)[1])
  target = flatten_dict(abstract_params(build_model(loaded.cfg), mesh()), sep="/")
  for path, array in found.items():
    assert array.sharding == target[path].sharding, path


@pytest.mark.slow
def test_a_vocabulary_that_the_mesh_does_not_divide_is_padded(tmp_path: Path):
  """On import; an export leaves the padding out."""
  family, cfg = config_of("llama_3")
  cfg = dataclasses.replace(cfg, vocab_size=101, num_ids=101, tied_embeddings=False)
  for name in "ab":
    (tmp_path / name).mkdir()
  params = random_params(cfg)
  tree = unflatten_dict(params, sep="/")
  keys = save_checkpoint(tmp_path / "a", cfg, tree, family, "float32", 10**9)
  (tmp_path / "a" / "config.json").write_text(json.dumps(keys))
  loaded = load_checkpoint(tmp_path / "a", make_mesh({"tensor": 2, "data": -1}))
  assert (loaded.cfg.vocab_size, loaded.cfg.num_ids) == (128, 101)
  found = flatten_dict(loaded.params, sep="/")
  assert found["embedding/table"].shape[0] == found["head/kernel"].shape[1] == 128
  for path, array in params.items():
    real = tuple(map(slice, array.shape))
    np.testing.assert_array_equal(np.asarray(found[path])[real], array, err_msg=path)
    rest = np.array(found[path])
    rest[real] = 0
    assert not rest.any(), f"{path}: padding is zeros"
  same = save_checkpoint(
    tmp_path / "b", loaded.cfg, loaded.params, family, "float32", 10**9
  )
  assert same == keys and keys["vocab_size"] == 101
  before, after = (open_checkpoint(tmp_path / name) for name in "ab")
  assert before.keys() == after.keys()
  for name, tensor in before.items():
    np.testing.assert_array_equal(after[name].read(), tensor.read(), err_msg=name)


def test_code_that_comes_along_is_never_run(llama: Path):
  """What transformers would run with trust_remote_code=True."""
  (llama / "modeling_evil.py").write_text(f"open({str(llama / 'ran')!r}, 'w')")
  edit(llama, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
  load_checkpoint(llama, mesh())
  assert not (llama / "ran").exists()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_config_survives_the_way_there_and_back(variant: str):
  family, cfg = config_of(variant)
  keys = json.loads(json.dumps(family.keys(cfg, HEADS)))
  again = read_config(family, Values(keys, "config.json", HEADS))
  assert canonical(again) == canonical(cfg)


# -- Three lists ---------------------------------------------------------------------------


@pytest.fixture
def llama(tmp_path: Path) -> Path:
  save(tmp_path, "llama_3")
  return tmp_path


def test_missing_unexpected_and_misshaped_are_listed_together(llama: Path):
  def change(arrays: dict[str, np.ndarray]) -> None:
    del arrays["model.norm.weight"]
    arrays["model.extra.weight"] = np.zeros(3, np.float32)
    arrays["lm_head.weight"] = arrays["lm_head.weight"][:-1]

  rewrite(llama, change)
  with pytest.raises(CheckpointError) as error:
    load_checkpoint(llama, mesh())
  assert error.value.exit_code == 4
  assert "missing: model.norm.weight" in error.value.cause
  assert "unexpected: model.extra.weight" in error.value.cause
  assert "wrong shape: lm_head.weight is [66, 32], not [67, 32]" in error.value.cause


def test_long_lists_are_cut_and_counted(llama: Path):
  rewrite(llama, lambda arrays: {"lm_head.weight": arrays["lm_head.weight"]})
  with pytest.raises(CheckpointError, match=r"and \d+ more"):
    load_checkpoint(llama, mesh())


def test_a_missing_head_is_not_tied_silently(llama: Path):
  rewrite(llama, lambda arrays: {n: x for n, x in arrays.items() if n != "lm_head.weight"})
  with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight$"):
    load_checkpoint(llama, mesh())
  edit(llama, tie_word_embeddings=True)
  assert "head" not in load_checkpoint(llama, mesh()).params


def test_a_tied_head_may_be_stored_if_it_is_the_same(llama: Path):
  edit(llama, tie_word_embeddings=True)
  with pytest.raises(CheckpointError, match="to which the config ties it"):
    load_checkpoint(llama, mesh())
  table = "model.embed_tokens.weight"
  rewrite(llama, lambda arrays: arrays | {"lm_head.weight": arrays[table]})
  both = load_checkpoint(llama, mesh()).params
  rewrite(llama, lambda arrays: {n: x for n, x in arrays.items() if n != table})
  alone = load_checkpoint(llama, mesh()).params
  jax.tree.map(np.testing.assert_array_equal, both, alone)


def test_buffers_are_passed_over(llama: Path):
  name = "model.layers.0.self_attn.rotary_emb.inv_freq"
  rewrite(llama, lambda arrays: arrays | {name: np.zeros(4, np.float32)})
  load_checkpoint(llama, mesh())


def test_names_without_the_prefix_are_known(tmp_path: Path):
  params = save(tmp_path, "gpt2")
  bare = lambda arrays: {n.removeprefix("transformer."): x for n, x in arrays.items()}
  buffers = {f"h.{n}.attn.bias": np.zeros((1, 1, 4, 4), np.float32) for n in range(2)}
  rewrite(tmp_path, lambda arrays: bare(arrays) | buffers)
  found = flatten_dict(load_checkpoint(tmp_path, mesh()).params, sep="/")
  for path, array in params.items():
    np.testing.assert_array_equal(found[path], array)
  twice = lambda arrays: arrays | {"transformer.wte.weight": arrays["wte.weight"]}
  rewrite(tmp_path, twice)
  with pytest.raises(CheckpointError, match="twice"):
    load_checkpoint(tmp_path, mesh())


def test_the_first_berts_names_are_known(tmp_path: Path):
  params = save(tmp_path, "bert")
  old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

  def change(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    renamed = {}
    for name, array in arrays.items():
      for new, older in old.items():
        name = name.replace(new, older)
      renamed[name] = array
    return renamed | {"cls.seq_relationship.bias": np.zeros(2, np.float32)}

  rewrite(tmp_path, change)
  found = flatten_dict(load_checkpoint(tmp_path, mesh()).params, sep="/")
  for path, array in params.items():
    np.testing.assert_array_equal(found[path], array)


# -- Dtypes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("stored", "asked", "expected"),
  [
    (jnp.bfloat16, None, "bfloat16"),
    (jnp.bfloat16, "float32", "float32"),
    (np.float16, None, "float32"),
    (np.float32, "bfloat16", "bfloat16"),
  ],
)
def test_a_dtype_is_kept_or_asked_for(llama: Path, stored: Any, asked: Any, expected: str):
  rewrite(llama, lambda arrays: arrays, stored)
  table = open_checkpoint(llama)["model.embed_tokens.weight"].read()
  loaded = load_checkpoint(llama, mesh(), asked)
  params = loaded.params
  assert loaded.dtype == expected == params["embedding"]["table"].dtype.name
  assert params["final_norm"]["scale"].dtype == np.float32
  wanted = table.astype(expected).astype(np.float32)
  np.testing.assert_array_equal(params["embedding"]["table"].astype(np.float32), wanted)


def narrowed(folder: Path, wide: Any, stored: Any = jnp.bfloat16) -> None:
  """Stores the tensors whose names satisfy `wide` in float32, the others in `stored`."""
  arrays = {name: tensor.read() for name, tensor in open_checkpoint(folder).items()}
  parts = {np.float32: filter(wide, arrays), stored: (n for n in arrays if not wide(n))}
  where = {}
  (folder / SINGLE).unlink()
  for number, (dtype, names) in enumerate(parts.items()):
    part = {name: arrays[name].astype(dtype) for name in names}
    shapes = {name: array.shape for name, array in part.items()}
    write_files(folder, shapes, np.dtype(dtype), 10**9, part.__getitem__)
    (folder / SINGLE).rename(folder / f"part-{number}.safetensors")
    where |= dict.fromkeys(part, f"part-{number}.safetensors")
  (folder / INDEX).write_text(json.dumps({"weight_map": where}))


def test_norms_in_float32_do_not_widen_the_rest(llama: Path):
  narrowed(llama, lambda name: "norm" in name)
  loaded = load_checkpoint(llama, mesh())
  assert (loaded.dtype, loaded.note) == ("bfloat16", "")
  assert loaded.params["blocks"]["attention"]["q"]["kernel"].dtype == jnp.bfloat16


def test_what_float32_costs_is_said(llama: Path):
  """One matrix in float32 cannot be kept beside others in bfloat16."""
  narrowed(llama, lambda name: name == "lm_head.weight")
  loaded = load_checkpoint(llama, mesh())
  matrices = [x for x in jax.tree.leaves(loaded.params) if x.ndim > 2 or x.size > 100]
  assert loaded.dtype == "float32" and {x.dtype for x in matrices} == {np.dtype("float32")}
  size = sum(4 * x.size for x in matrices)
  stored = size / 2 + 2 * loaded.params["head"]["kernel"].size
  assert loaded.note == (
    f"weights stored as bfloat16 and float32 become float32: {size / 1e9:.3g} GB for "
    f"{stored / 1e9:.3g} GB; --dtype bfloat16 takes {size / 2e9:.3g} GB, and rounds"
  )
  assert not load_checkpoint(llama, mesh(), "float32").note, "it was asked for"


def test_float16_becomes_float32_and_says_so(llama: Path):
  assert not load_checkpoint(llama, mesh()).note
  rewrite(llama, lambda arrays: arrays, np.float16)
  assert "stored as float16 become float32" in load_checkpoint(llama, mesh()).note


def test_tensors_of_whole_numbers_are_no_parameters(llama: Path):
  path = llama / "model.safetensors"
  path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"', 1))
  with pytest.raises(CheckpointError, match="I32"):
    load_checkpoint(llama, mesh())


# -- Configs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("model_type", "values", "named"),
  [
    ("gemma4", {}, "gemma4"),
    (["llama"], {}, "llama"),
    ("llama", {"hidden_size": None}, "hidden_size"),
    ("llama", {"hidden_size": "32"}, "hidden_size"),
    ("llama", {"hidden_size": 33}, "33"),
    ("llama", {"num_hidden_layers": 10**6}, "layers"),
    ("llama", {"num_key_value_heads": 3}, "num_kv_heads"),
    # Each of these would take gigabytes or minutes before the tensors are looked at.
    ("llama", {"head_dim": 2**16}, "all heads together"),
    ("llama", {"vocab_size": 10**6}, "vocabulary of 1,000,000"),
    ("llama", {"num_attention_heads": 2**30, "head_dim": 2}, "all heads|multiple"),
    (
      "llama",
      {"num_attention_heads": 2**30, "hidden_size": 2**30, "head_dim": 2}
      | {"num_key_value_heads": 3},
      "num_kv_heads",
    ),
    ("llama", {"hidden_act": "tanh"}, "hidden_act"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantized"),
    ("llama", scaled(rope_type="dynamic", factor=2.0), "dynamic"),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 1.0}}, "mscale"),
    ("llama", {"rope_theta": 1.0}, "rope_theta"),
    ("llama", {"rope_parameters": [1]}, "rope_parameters"),
    (
      "llama",
      scaled(rope_type="llama3", factor=2.0, low_freq_factor=4.0, high_freq_factor=4.0),
      "high_freq_factor",
    ),
    (
      "llama",
      scaled(rope_type="llama3", factor=2.0, low_freq_factor=0.0, high_freq_factor=4.0),
      "low_freq_factor",
    ),
    ("llama", {"vocab_size": None}, "vocab_size"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama", scaled(partial_rotary_factor=0.5), "partial_rotary_factor"),
    ("llama", {"hidden_size": 30, "head_dim": 8}, "hidden_size"),
    ("phi3", scaled(rope_type="longrope"), "longrope"),
    ("phi3", scaled(rope_type="linear", factor=2.0), "linear"),
    ("phi3", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
    ("gemma2", {"sliding_window": None}, "sliding_window"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("bert", {"type_vocab_size": 0}, "type_vocab_size"),
    (
      "qwen2_moe",
      {**MOE, "shared_expert_intermediate_size": 0},
      "shared_expert_intermediate_size",
    ),
    ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 16}, "OPT-350m"),
    ("gemma2", {"layer_types": ["full_attention"]}, "layer_types"),
    ("qwen3_moe", {"num_experts": 4, "mlp_only_layers": [0]}, "mlp_only_layers"),
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual"),
  ],
)
def test_what_cannot_be_done_is_refused_by_name(
  tmp_path: Path, model_type: Any, values: dict[str, Any], named: str
):
  save(tmp_path, "llama_3")
  config = {**LLAMA, "model_type": model_type, "rope_theta": 1e4, **values}
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(CheckpointError, match=named):
    load_checkpoint(tmp_path, mesh())


def test_older_keys_of_rope_mean_the_same():
  old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}
  new = scaled(rope_type="linear", factor=4.0, rope_theta=5e5)
  read = FAMILIES["llama"].read
  assert read(Values(LLAMA | old, "old")) == read(Values(LLAMA | new, "new"))


def test_yarn_over_a_context_of_no_turn_stretches_nothing():
  """Its ramp then ends before it begins, as in its authors' code."""
  rope = RopeConfig(scaling="yarn", factor=4.0, original_context=3)
  cfg = ModelConfig(rope=rope, vocab_size=64).resolve()
  frequencies, size = stretched_frequencies(32, cfg.rope)
  assert frequencies == inverse_wavelengths(32, cfg.rope.theta)
  assert size == pytest.approx(0.1 * math.log(4) + 1)


def test_of_two_objects_for_rope_the_older_counts_as_in_transformers():
  both = scaled(rope_type="linear", factor=4.0, rope_theta=5e5)
  both["rope_scaling"] = {"type": "linear", "factor": 2.0}
  rope = FAMILIES["llama"].read(Values(LLAMA | both | {"rope_theta": 7e3}, "both")).rope
  assert (rope.factor, rope.theta) == (2.0, 7e3)


def test_qwens_windows_without_a_list_of_layers():
  values = LLAMA | {"num_hidden_layers": 5, "sliding_window": 8, "max_window_layers": 3}
  values |= MOE | dict(use_sliding_window=True, shared_expert_intermediate_size=24)
  kinds = lambda name: FAMILIES[name].read(Values(values, name)).layer_kinds()
  assert kinds("qwen2") == kinds("qwen3") == "GGGLL"
  assert kinds("qwen2_moe") == "LGLGG"
  values["sliding_window"] = None
  assert {FAMILIES[name].read(Values(values, name)).window for name in QWENS} == {None}


QWENS = ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe")


def test_a_quarter_of_a_neox_head_turns_unless_its_file_says_otherwise():
  read = FAMILIES["gpt_neox"].read
  values = LLAMA | {"head_dim": None}
  # The usual names do not count beside NeoX's own: transformers passes over them.
  passed_over = {"partial_rotary_factor": 0.5, "rope_theta": 300.0}
  for said in ({}, {"rotary_pct": None}, {"partial_rotary_factor": None}, passed_over):
    rope = read(Values(values | said, "config.json")).rope
    assert (rope.fraction, rope.theta) == (0.25, 10_000.0)
  within = scaled(rope_type="default", **passed_over)
  for said in ({"rotary_pct": 0.5, "rotary_emb_base": 300}, within):
    rope = read(Values(values | said, "config.json")).rope
    assert (rope.fraction, rope.theta) == (0.5, 300.0)


def test_gemma_3_has_a_base_for_local_layers_in_old_and_new_keys():
  values = LLAMA | {"num_hidden_layers": 12, "sliding_window": 8}
  old = {"rope_theta": 1e6, "rope_local_base_freq": 2e4, "sliding_window_pattern": 3}
  old |= {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
  kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 4
  whole = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
  local = {"rope_type": "default", "rope_theta": 2e4}
  both = {"full_attention": whole, "sliding_attention": local}
  read = FAMILIES["gemma3_text"].read
  cfg = read(Values(values | old, "old"))
  assert cfg == read(Values(values | {"layer_types": kinds, "rope_parameters": both}, ""))
  assert (cfg.layer_pattern, cfg.rope.theta, cfg.rope.local_theta) == ("LLG", 1e6, 2e4)


ODD: dict[str, dict[str, Any]] = {
  "norm_placement": dict(norm_placement="post"),
  "positions": dict(positions="learned"),
  "window": dict(window=8),
  "rope.fraction": dict(rope=RopeConfig(fraction=0.5)),
  "rope.local_theta": dict(window=8, rope=RopeConfig(local_theta=5.0)),
  "logit_scale": dict(logit_scale=0.5),
  "learned_sinks": dict(learned_sinks=True),
  "qk_norm": dict(qk_norm="head"),
  "parallel": dict(parallel="two_norms"),
  "moe.num_experts": dict(moe=MoEConfig(num_experts=4)),
  "attention_softcap": dict(attention_softcap=20.0),
}


@pytest.mark.parametrize("field", ODD)
def test_an_export_names_what_the_family_cannot_say(field: str):
  cfg = ModelConfig(width=32, depth=2, vocab_size=64, **ODD[field])
  with pytest.raises(CheckpointError, match=rf"no place for .*model\.{field}="):
    FAMILIES["llama"].keys(cfg, ())


def test_gemma_3_has_no_place_for_a_cap_of_its_scores():
  """transformers has the key, but its attention never reads it."""
  family, cfg = config_of("gemma3")
  capped = dataclasses.replace(cfg, attention_softcap=20.0)
  with pytest.raises(CheckpointError, match=r"model\.attention_softcap=20"):
    family.keys(capped, ())


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.75])
def test_the_share_that_turns_is_written_as_it_is_computed(fraction: float):
  """Of a head of 12 dims, 2, 6 and 8: an even number, which their formula also gives."""
  family, cfg = config_of("phi3")
  rope = dataclasses.replace(cfg.rope, fraction=fraction)
  keys = family.keys(
    dataclasses.replace(cfg, rope=rope, head_dim=12, attention_scale=12**-0.5), ()
  )
  num_dims = 2 * int(12 * fraction / 2)
  assert int(12 * keys["partial_rotary_factor"]) == num_dims


@pytest.mark.parametrize(
  "name", slow_but(("llama", "bert", "t5"), sorted(FAMILIES.keys() - {"gemma3"}))
)
def test_a_model_of_another_kind_is_refused_by_every_family(name: str):
  """Not one of them by an assertion."""
  for odd in (
    dict(gated=False),
    dict(moe=MoEConfig(num_experts=2)),
    dict(attention_scale=0),
  ):
    cfg = ModelConfig(width=32, depth=2, vocab_size=64, norm_placement="post", **odd)
    params = unflatten_dict(random_params(cfg.resolve()), sep="/")
    with pytest.raises(CheckpointError):
      describe(cfg.resolve(), params, FAMILIES[name])


def test_whole_numbers_are_written_as_floats_where_theirs_are():
  family, cfg = config_of("gemma2")
  keys = family.keys(dataclasses.replace(cfg, logit_softcap=30, norm_epsilon=0), ())
  assert type(keys["final_logit_softcapping"]) is type(keys["rms_norm_eps"]) is float


def test_gemmas_gelu_is_the_approximation_whatever_it_says():
  cfg = FAMILIES["gemma"].read(Values(LLAMA | {"hidden_act": "gelu"}, "config.json"))
  assert cfg.activation == "gelu_tanh"
  exact = dataclasses.replace(cfg, activation="gelu")
  with pytest.raises(CheckpointError, match="activation=gelu"):
    FAMILIES["gemma"].keys(exact, ())


def test_rope_stretched_by_a_larger_base_is_exported_as_that_base():
  rope = RopeConfig(scaling="ntk", factor=4.0)
  cfg = ModelConfig(width=64, depth=1, vocab_size=64, rope=rope)
  keys = FAMILIES["llama"].keys(cfg, ())
  assert keys["rope_scaling"] is None
  assert keys["rope_theta"] == pytest.approx(1e4 * 4 ** (16 / 14))


@given(st.integers(2, 512))
def test_the_dims_that_turn_are_found_again(head_dim: int):
  for num_dims in range(2, head_dim, 2):
    assert 2 * int(head_dim * rotary_fraction(num_dims, head_dim) / 2) == num_dims


@given(st.text("LG", min_size=1, max_size=12), st.integers(1, 40))
def test_the_shortest_period_says_the_same(pattern: str, depth: int):
  kinds = (pattern * depth)[:depth]
  period = shortest_period(kinds)
  assert (period * depth)[:depth] == kinds
  assert len(period) <= len(pattern)


VALUES = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(),
  st.integers(-3, 9),
  st.floats(),
  st.text(max_size=4),
  st.lists(st.sampled_from(["full_attention", "sliding_attention", 0]), max_size=3),
  st.dictionaries(
    st.sampled_from(["rope_type", "factor", "full_attention", "rope_theta"]),
    st.sampled_from(["linear", "yarn", "llama3", 0, -1.0, 2, None, {}]),
  ),
)


@settings(max_examples=400)
@given(st.sampled_from(sorted(VARIANTS)), st.data())
def test_any_config_is_read_or_refused(variant: str, data: Any):
  """Whatever stands under the keys of a family: a config whose model can be described, or
  one of our errors."""
  family, cfg = config_of(variant)
  keys = family.keys(cfg, HEADS) | {"sliding_window": 8}
  for _ in range(data.draw(st.integers(1, 3))):
    keys[data.draw(st.sampled_from([*sorted(keys), "layer_types", "rope_parameters"]))] = (
      data.draw(VALUES)
    )
  try:
    found = read_config(family, Values(keys, "config.json", HEADS))
    family.keys(found, HEADS)
  except FlaxLMError:
    pass


@settings(max_examples=200)
@given(st.binary(max_size=60))
def test_any_bytes_are_no_config(tmp_path_factory, content: bytes):
  folder = tmp_path_factory.getbasetemp() / "config"
  folder.mkdir(exist_ok=True)
  (folder / "config.json").write_bytes(content)
  with pytest.raises(CheckpointError):
    load_checkpoint(folder, mesh())


def test_a_key_that_comes_twice_is_refused(llama: Path):
  text = (llama / "config.json").read_text()
  (llama / "config.json").write_text(text.replace("{", '{"vocab_size": 3, ', 1))
  with pytest.raises(CheckpointError, match="twice"):
    load_checkpoint(llama, mesh())


def test_fields_that_only_training_reads_do_not_matter():
  cfg = ModelConfig(width=32, depth=2, vocab_size=64)
  other = dataclasses.replace(cfg, dropout=0.1, window=300)
  assert canonical(cfg) == canonical(other)
