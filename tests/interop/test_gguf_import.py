# SPDX-License-Identifier: Apache-2.0
"""GGUF files become runs: what an export wrote comes back bit for bit, and what llama.cpp's
own converter writes is the model that was converted."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import slow_but
from flax.traverse_util import flatten_dict
from test_gguf import MODELS, SMALL, run_of
from tiny_tokenizers import gpt_2_like

from flaxlm.config import RopeConfig
from flaxlm.decoding.loading import Run, load_run
from flaxlm.errors import CheckpointError, DataError
from flaxlm.interop.family import canonical
from flaxlm.interop.gguf import export_gguf
from flaxlm.interop.gguf_cuts import CUTS
from flaxlm.interop.gguf_file import read_gguf
from flaxlm.interop.gguf_tokenizer import read_tokenizer
from flaxlm.interop.huggingface import real_shapes
from flaxlm.interop.safetensors import open_checkpoint
from flaxlm.interop.transfer import export_run, import_run
from flaxlm.sharding import make_mesh

gguf = pytest.importorskip("gguf")

LLAMA_3 = RopeConfig(
  scaling="llama3", factor=8.0, original_context=48, slow_turns=1, fast_turns=4
)
EXPORTED = MODELS | {
  "llama3_rope": dataclasses.replace(SMALL, rope=LLAMA_3, head_dim=32),
  "linear_rope": dataclasses.replace(SMALL, rope=RopeConfig(scaling="linear", factor=2.5)),
  "biased": dataclasses.replace(SMALL, qkv_biased=True, o_biased=True),
}
TEXTS = (
  "x =  12 don't 'LL\n\n  y",
  "théâtre ☕ 漢字 ٣٤٥ ½ e\u0301",
  "<|im_end|> <s>a</s>",
  "",
)


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
  return make_mesh({"data": -1})


def params_of(run: Run) -> dict[str, np.ndarray]:
  """The parameters without rows that only fill the vocabulary up to what a mesh divides."""
  flat = flatten_dict(run.params, sep="/")
  real = real_shapes(run.cfg.model, flat)
  return {k: np.asarray(v)[tuple(map(slice, real[k]))] for k, v in flat.items()}


def assert_same_model(found: Run, given: Run) -> None:
  assert canonical(found.cfg.model) == canonical(given.cfg.model.unpadded)
  ours, theirs = params_of(found), params_of(given)
  assert ours.keys() == theirs.keys()
  for path, array in ours.items():
    np.testing.assert_array_equal(array, theirs[path], path)


# -- What was exported ---------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_but(("llama",), EXPORTED))
def test_an_export_comes_back_bit_for_bit(name: str, mesh: Any, tmp_path: Path):
  run = run_of(tmp_path, EXPORTED[name])
  path = tmp_path / "model.gguf"
  export_gguf(run, path, "float32")
  _, notes = import_run(path, tmp_path / "again", mesh)
  again = load_run(tmp_path / "again", mesh)
  assert not notes and again.cfg.training.param_dtype == "float32"
  assert_same_model(again, run)
  for text in TEXTS[:2]:
    framed = [
      one.framed(one.encode(text), "prompt") for one in (again.tokenizer, run.tokenizer)
    ]
    assert framed[0] == framed[1]
  assert again.tokenizer.eos_ids == run.tokenizer.eos_ids
  # And it is the same file, when it is exported again.
  export_gguf(again, tmp_path / "again.gguf", "float32")
  before, after = read_gguf(path), read_gguf(tmp_path / "again.gguf")
  assert before.tensors.keys() == after.tensors.keys()
  for key, tensor in before.tensors.items():
    np.testing.assert_array_equal(after.tensors[key].read(), tensor.read())
  names = {"general.name"}  # of the runs
  assert {k: v for k, v in before.values.items() if k not in names} == {
    k: v for k, v in after.values.items() if k not in names
  }


@pytest.mark.slow
def test_bfloat16_is_kept(mesh: Any, tmp_path: Path):
  run = run_of(tmp_path, SMALL)
  export_gguf(run, tmp_path / "model.gguf", "bfloat16")
  loaded, _ = import_run(tmp_path / "model.gguf", tmp_path / "again", mesh)
  assert loaded.dtype == "bfloat16"
  given, found = params_of(run), params_of(load_run(tmp_path / "again", mesh))
  table = "embedding/table"
  np.testing.assert_array_equal(found[table], given[table].astype(jax.numpy.bfloat16))


@pytest.mark.slow
def test_it_is_exported_to_hugging_face(mesh: Any, tmp_path: Path):
  """The files that a GGUF stands for are as those of a checkpoint from there."""
  run = run_of(tmp_path, SMALL)
  export_gguf(run, tmp_path / "model.gguf", "float32")
  import_run(tmp_path / "model.gguf", tmp_path / "again", mesh)
  folder = tmp_path / "hub"
  assert (
    export_run(load_run(tmp_path / "again", mesh), folder, None, 10**9).model_type
    == "llama"
  )
  import_run(folder, tmp_path / "third", mesh)
  third = load_run(tmp_path / "third", mesh)
  assert_same_model(third, run)
  assert third.tokenizer.eos_ids == run.tokenizer.eos_ids


# -- What llama.cpp's converter writes -----------------------------------------------------

GEMMA = dataclasses.replace(
  SMALL,
  embedding_scaled=True,
  activation="gelu_tanh",
  norm_placement="both",
  head_dim=16,
  context=64,
  window=8,
)
GEMMAS = {
  "gemma": dataclasses.replace(GEMMA, norm_placement="pre", window=None),
  "gemma2": dataclasses.replace(
    GEMMA,
    layer_pattern="LG",
    attention_softcap=20.0,
    logit_softcap=10.0,
    attention_scale=0.25,
  ),
  "gemma3": dataclasses.replace(
    GEMMA,
    depth=7,
    layer_pattern="LLLLLG",
    qk_norm="head",
    attention_scale=0.25,
    rope=RopeConfig(theta=1e6, local_theta=10_000.0, scaling="linear", factor=8.0),
  ),
}


def convert_gemma(run: Run, name: str, path: Path, scratch: Path) -> None:
  """What `convert_hf_to_gguf.py` makes of a Gemma: norms count from 0, and what llama.cpp
  has in its code stands nowhere in the file."""
  from flaxlm.interop.gguf import add_tokenizer

  export_run(run, scratch, "float32", 10**9)
  cfg = run.model.cfg
  known = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
  names = gguf.get_tensor_name_map(known[name], cfg.depth)
  writer = gguf.GGUFWriter(path, name)
  writer.add_context_length(cfg.context)
  writer.add_embedding_length(cfg.width)
  writer.add_block_count(cfg.depth)
  writer.add_feed_forward_length(cfg.ffn_width)
  writer.add_head_count(cfg.num_heads)
  writer.add_head_count_kv(cfg.num_kv_heads)
  writer.add_key_length(cfg.head_dim)
  writer.add_value_length(cfg.head_dim)
  writer.add_layer_norm_rms_eps(cfg.norm_epsilon)
  if name != "gemma":
    writer.add_sliding_window(cfg.window)
  if name == "gemma2":
    writer.add_attn_logit_softcapping(cfg.attention_softcap)
    writer.add_final_logit_softcapping(cfg.logit_softcap)
  if name == "gemma3":
    writer.add_rope_freq_base(cfg.rope.theta)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(cfg.rope.factor)
  add_tokenizer(writer, run)
  for theirs, tensor in open_checkpoint(scratch).items():
    array = tensor.read() + (1 if theirs.endswith("norm.weight") else 0)
    writer.add_tensor(names.get_name(theirs, try_suffixes=(".weight",)), array)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


@pytest.mark.parametrize("name", slow_but((), GEMMAS))
def test_a_converted_gemma_is_the_same_model(name: str, mesh: Any, tmp_path: Path):
  run = run_of(tmp_path, GEMMAS[name])
  convert_gemma(run, name, tmp_path / "model.gguf", tmp_path / "hub")
  import_run(tmp_path / "model.gguf", tmp_path / "again", mesh)
  again = load_run(tmp_path / "again", mesh)
  assert canonical(again.cfg.model) == canonical(run.cfg.model.unpadded)
  given = params_of(run)
  for key, array in params_of(again).items():
    np.testing.assert_allclose(array, given[key], rtol=0, atol=2e-7, err_msg=key)


@pytest.mark.parametrize(
  "kind", ["Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K", "Q5_K", "F16", "BF16", "IQ4_NL"]
)
def test_every_kind_of_tensor(kind: str, tmp_path: Path):
  """The package's own reader and functions see the same values, in stripes and at once."""
  rng = np.random.default_rng(0)
  dtype = gguf.GGMLQuantizationType[kind]
  shape = (7, 512)
  if kind in ("Q4_K", "Q6_K", "Q5_K", "IQ4_NL"):  # the package does not quantise these
    block, size = gguf.GGML_QUANT_SIZES[dtype]
    data = rng.integers(0, 256, (7, 512 // block, size), np.uint8)
    scales = {"Q4_K": slice(0, 4), "Q5_K": slice(0, 4), "Q6_K": slice(-2, None)}
    part = data[..., scales.get(kind, slice(0, 2))]
    part[:] = np.full((*part.shape[:-1], part.shape[-1] // 2), 0.01, np.float16).view(
      np.uint8
    )
    data = data.reshape(7, -1)
  else:
    data = gguf.quants.quantize(rng.normal(size=shape).astype(np.float32), dtype)
  writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
  writer.add_tensor("a", np.ascontiguousarray(data), raw_dtype=dtype)
  writer.add_tensor("b", np.ones(3, np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  tensors = read_gguf(tmp_path / "one.gguf").tensors
  assert tensors["a"].shape == shape and tensors["a"].num_bytes == data.nbytes
  expected = gguf.quants.dequantize(data, dtype).reshape(shape)
  for stripe in (2**22, 512, 1000):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr("flaxlm.interop.gguf_file.STRIPE", stripe)
      found = tensors["a"].read()
    np.testing.assert_array_equal(found.astype(np.float32), expected)
  np.testing.assert_array_equal(tensors["b"].read(), np.ones(3))


# -- Files of all kinds --------------------------------------------------------------------


def write(
  path: Path, change: Callable[[Any], None] = lambda writer: None, **values: Any
) -> Path:
  """A file with a LLaMA's values, and one tensor, its table."""
  writer = gguf.GGUFWriter(path, values.pop("architecture", "llama"))
  writer.add_context_length(values.pop("context", 64))
  writer.add_embedding_length(32)
  writer.add_block_count(1)
  writer.add_feed_forward_length(48)
  writer.add_head_count(4)
  writer.add_layer_norm_rms_eps(1e-5)
  for key, value in values.items():
    key = key.replace("__", ".")
    add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
    writer.add_string(key, value) if isinstance(value, str) else add(key, value)
  writer.add_tensor("token_embd.weight", np.ones((7, 32), np.float32))
  change(writer)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.mark.parametrize(
  ("values", "told"),
  [
    ({"architecture": "mamba"}, "architecture 'mamba' is not supported"),
    ({"llama__expert_count": 8}, r"llama\.expert_count is 8"),
    ({"llama__attention__sliding_window": 9}, r"sliding_window is 9"),
    ({"llama__rope__scaling__type": "longrope"}, "longrope"),
    ({"llama__rope__dimension_count": 4}, "rope.dimension_count is 4"),
    ({"llama__attention__value_length": 4}, "value_length is 4"),
    ({"split__count": 3}, "one of 3 parts"),
    ({"tokenizer__ggml__model": "bert"}, "model is 'bert'"),
    ({"general__alignment": 7}, "general.alignment"),
  ],
)
def test_what_flaxlm_lacks_is_refused_by_name(
  values: dict[str, Any], told: str, mesh: Any, tmp_path: Path
):
  path = write(tmp_path / "model.gguf", **values)
  with pytest.raises(CheckpointError, match=told):
    import_run(path, tmp_path / "run", mesh)


def test_a_tensor_without_a_place_is_named(mesh: Any, tmp_path: Path):
  add = lambda writer: writer.add_tensor("blk.0.ffn_gate_exps.weight", np.ones((2, 3)))
  path = write(tmp_path / "model.gguf", add)
  with pytest.raises(CheckpointError, match=r"no place for blk\.0\.ffn_gate_exps"):
    import_run(path, tmp_path / "run", mesh)


@pytest.mark.parametrize(
  ("factors", "told"),
  [
    ([1, 1, 1, 9.0], "scales RoPE by a rule"),
    ([1, 0.5, 2, 2], "not from 1 on"),
    ([1, 2], r"\[2\]"),
  ],
)
def test_factors_of_rope_by_another_rule(
  factors: list[float], told: str, mesh: Any, tmp_path: Path
):
  array = np.array(factors, np.float32)
  if len(factors) == 4 and told.startswith("scales"):
    array[1:3] = (3, 2)
  path = write(
    tmp_path / "model.gguf", lambda writer: writer.add_tensor("rope_freqs.weight", array)
  )
  with pytest.raises(CheckpointError, match=told):
    import_run(path, tmp_path / "run", mesh)


# -- Tokenizers ----------------------------------------------------------------------------


def with_words(tokens: list[str], **more: Any) -> Callable[[Any], None]:
  def add(writer: Any) -> None:
    writer.add_tokenizer_model(more.get("model", "gpt2"))
    if "pre" in more:
      writer.add_tokenizer_pre(more["pre"])
    writer.add_token_list(tokens)
    if "types" in more:
      writer.add_token_types(more["types"])
    if "scores" in more:
      writer.add_token_scores(more["scores"])
    if "merges" in more:
      writer.add_token_merges(more["merges"])
    for key in ("bos", "eos", "eot"):
      if key in more:
        getattr(writer, f"add_{key}_token_id")(more[key])
    if "template" in more:
      writer.add_chat_template(more["template"])

  return add


@pytest.mark.parametrize(
  ("words", "told"),
  [
    (with_words(["a", "b"], pre="default"), "pre is 'default'"),
    (with_words(["a", "b"]), "pre is None"),
    (with_words(["a", "a"], pre="gpt-2"), "a is there twice"),
    (with_words(["a", "b"], pre="gpt-2", merges=["a c"]), "damaged.*c` out of vocab"),
    (
      with_words(["a", "b"], pre="gpt-2", merges=["a b c"]),
      "merges are not all two tokens",
    ),
    (with_words(["a", "b"], pre="gpt-2", types=[1]), "token_type is not a list of 2"),
    (with_words(["a", "b"], model="llama"), "scores are missing"),
    (with_words(["a", ""], pre="gpt-2"), "without characters"),
    (with_words(["a"], model="llama", scores=[float("nan")]), "not all finite"),
  ],
)
def test_a_tokenizer_that_is_damaged_or_unknown(words: Any, told: str, tmp_path: Path):
  path = write(tmp_path / "model.gguf", words)
  with pytest.raises((CheckpointError, DataError), match=told):
    read_tokenizer(read_gguf(path))


def test_what_a_file_says_of_special_tokens(mesh: Any, tmp_path: Path):
  """Ends come from three keys and by their names, the configured one first."""
  spec = json.loads(gpt_2_like("llama3").to_str())
  words = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
  words += ["<|endoftext|>", "<|begin|>", "<|im_end|>", "<|eot|>", "[PAD9]"]
  count = len(words)
  kinds = [1] * (count - 5) + [3, 3, 3, 4, 5]
  merges = [" ".join(one) for one in spec["model"]["merges"]]
  more = dict(bos=count - 4, eos=count - 2, pre="llama-bpe", merges=merges, types=kinds)
  template = [{"name": "default", "template": "{{ bos_token }}"}]
  template += [{"name": "tool_use", "template": "tools"}]
  path = write(tmp_path / "model.gguf", with_words(words, template=template, **more))
  files = read_tokenizer(read_gguf(path))
  assert files is not None
  named = files.backend.token_to_id("<|endoftext|>")
  assert files.ids["eos_token_id"] == [count - 2, count - 3, named]
  assert files.backend.token_to_id("[PAD9]") is None
  assert files.backend.encode("<|im_end|>").ids == [count - 4, count - 3]  # Llama 3 begins
  assert files.settings["bos_token"] == "<|begin|>"
  assert [*map(str, files.templates)] == [
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
  ]


def test_all_cuts_that_an_export_writes_are_read():
  from flaxlm.interop.gguf_cuts import PRE_TOKENIZERS

  for (cuts, whole_words), name in PRE_TOKENIZERS.items():
    assert CUTS[name].steps == cuts and CUTS[name].whole_words == whole_words


# -- Damage --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 3, 4, 20, 23, 24, 30, 200, 5000, -1])
def test_a_file_that_is_cut_short(size: int, mesh: Any, tmp_path: Path):
  path = write(tmp_path / "model.gguf")
  content = path.read_bytes()
  path.write_bytes(content[:size])
  with pytest.raises(CheckpointError) as error:
    import_run(path, tmp_path / "run", mesh)
  assert "\n" not in error.value.cause and str(path) in error.value.cause


@pytest.mark.parametrize(
  ("at", "content", "told"),
  [
    (0, b"GGUX", "not a GGUF file"),
    (4, b"\x01\x00\x00\x00", "GGUF version 1"),
    (4, b"\x00\x00\x00\x03", "big-endian"),
    (8, b"\xff" * 8, "18446744073709551615 tensors"),
    (16, b"\xff" * 8, "18446744073709551615 values"),
    (24, b"\xff" * 8, "cut short"),
  ],
)
def test_a_count_that_is_absurd(
  at: int, content: bytes, told: str, mesh: Any, tmp_path: Path
):
  path = write(tmp_path / "model.gguf")
  whole = path.read_bytes()
  path.write_bytes(whole[:at] + content + whole[at + len(content) :])
  with pytest.raises(CheckpointError, match=told):
    import_run(path, tmp_path / "run", mesh)
