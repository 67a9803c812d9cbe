# SPDX-License-Identifier: Apache-2.0
"""Exports a GPT-2, LLaMA, Mistral, Qwen 2 or Qwen 3 run as one GGUF file, for llama.cpp.

The tensors are those of the Hugging Face export, written one at a time. The `gguf` package
knows their names in llama.cpp, and the file format.
"""

import contextlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from flaxlm.chat.templates import load_special_tokens, load_templates
from flaxlm.config import ResolvedModel
from flaxlm.decoding.loading import Run
from flaxlm.errors import CheckpointError, ConfigError, first_line
from flaxlm.interop.card import license_of
from flaxlm.interop.families import FAMILIES
from flaxlm.interop.gguf_cuts import NO_MERGE, find_pre_tokenizer
from flaxlm.interop.huggingface import describe
from flaxlm.interop.layouts import Shape
from flaxlm.interop.settings import rotary_dims
from flaxlm.interop.transfer import find_fitting
from flaxlm.nn.positions import inverse_wavelengths, stretched_frequencies


class Architecture(NamedTuple):
  """How llama.cpp has a family."""

  name: str
  # Whether RoPE rotates neighbouring dims together, as in LLaMA's own weights, instead of
  # dims that are half a head apart.
  neighbours: bool


ARCHITECTURES = {
  "gpt2": Architecture("gpt2", False),
  "llama": Architecture("llama", True),
  "mistral": Architecture("llama", True),
  "qwen2": Architecture("qwen2", False),
  "qwen3": Architecture("qwen3", False),
}

MAX_ENDS = 3  # ids that end an answer, for which llama.cpp has names


def export_gguf(run: Run, path: Path, dtype: str | None, license: str | None = None) -> str:
  """Writes the file, and returns the architecture's name in llama.cpp.

  Matrices are written in `dtype`, float32 or bfloat16 (None: that of the run's
  parameters), vectors in float32. The file names the `license`, or that of an import.
  Raises `CheckpointError` if llama.cpp cannot express the model or its tokenizer,
  `ConfigError` without the gguf package.
  """
  try:
    import gguf
  except ImportError as e:
    raise ConfigError("GGUF needs the gguf package", "pip install 'flaxlm[gguf]'") from e
  if path.exists():
    raise CheckpointError(f"{path} exists already", "choose another name, or remove it")
  cfg = run.model.cfg.unpadded
  try:
    family = find_fitting(run, [FAMILIES[name] for name in ARCHITECTURES])
  except CheckpointError as e:
    cure = f"GGUF export supports the families {', '.join(ARCHITECTURES)}"
    raise CheckpointError(e.cause, cure) from e
  architecture = ARCHITECTURES[family.model_type]
  rotated = rotary_dims(cfg)
  if cfg.positions == "rope" and architecture.neighbours and rotated != cfg.head_dim:
    raise CheckpointError(
      f"GGUF: llama.cpp rotates whole heads in {architecture.name}, not {rotated} of "
      f"{cfg.head_dim} dims",
      "export to safetensors",
    )
  if cfg.window is not None and cfg.window < cfg.context:
    raise CheckpointError(
      f"GGUF: llama.cpp does not support a window in {architecture.name}",
      "export to safetensors",
    )
  _, shapes, read = describe(run.cfg.model, run.params, family)
  narrow = (dtype or run.cfg.training.param_dtype) == "bfloat16"
  factors = frequency_factors(cfg, architecture)
  known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
  names = gguf.get_tensor_name_map(known[architecture.name], cfg.depth)
  partial = path.with_name(f".{path.name}.partial")
  writer = gguf.GGUFWriter(partial, architecture.name)
  add_settings(writer, cfg, run.cfg.name or path.stem)
  if (license := license or license_of(run)) is not None:
    writer.add_license(license)
  add_tokenizer(writer, run)

  def is_narrow(shape: Shape) -> bool:
    return narrow and len(shape) > 1

  for theirs, shape in shapes.items():
    name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
    assert name is not None, theirs
    kind = gguf.GGMLQuantizationType["BF16" if is_narrow(shape) else "F32"]
    size = math.prod(shape) * (2 if is_narrow(shape) else 4)
    shape = shape[::-1] if is_input_first(theirs, architecture) else shape
    writer.add_tensor_info(name, shape, np.dtype(np.float32), size, kind)
  if factors is not None:
    kind, size = gguf.GGMLQuantizationType.F32, factors.nbytes
    writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, size, kind)
  try:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for theirs, shape in shapes.items():
      array = read(theirs).astype(jnp.bfloat16 if is_narrow(shape) else np.float32)
      array = to_gguf(theirs, array, cfg, architecture)
      array = array.view(np.uint16) if is_narrow(shape) else array
      writer.write_tensor_data(np.ascontiguousarray(array))
    if factors is not None:
      writer.write_tensor_data(factors)
    writer.close()
    partial.rename(path)
  except OSError as e:
    raise CheckpointError(f"{path} cannot be written: {first_line(e)}") from e
  finally:
    with contextlib.suppress(OSError):  # what a full disk has not taken yet
      writer.close()
    partial.unlink(missing_ok=True)
  return architecture.name


def is_input_first(name: str, architecture: Architecture) -> bool:
  """Whether a tensor is (inputs, outputs) in the export; GGUF wants (outputs, inputs)."""
  return architecture.name == "gpt2" and ".h." in name and name.endswith("weight")


def to_gguf(
  name: str, array: np.ndarray, cfg: ResolvedModel, architecture: Architecture
) -> np.ndarray:
  """A tensor as GGUF has it: matrices (outputs, inputs), and the rows of queries and keys
  in pairs of neighbours where the architecture wants them so."""
  if is_input_first(name, architecture):
    return array.T
  for part, heads in (("q_proj", cfg.num_heads), ("k_proj", cfg.num_kv_heads)):
    if architecture.neighbours and f".{part}." in name:
      halves = array.reshape(heads, 2, -1, *array.shape[1:])
      return halves.swapaxes(1, 2).reshape(array.shape)
  return array


def frequency_factors(cfg: ResolvedModel, architecture: Architecture) -> np.ndarray | None:
  """The factor by which RoPE scaling lowers the frequency of each pair; None without it.

  Raises `CheckpointError` for scaling that also changes the scores, and for any that the
  architecture does not read.
  """
  rope = cfg.rope
  if rope.scaling == "none":
    return None
  scaled, size = stretched_frequencies(cfg.head_dim, rope)
  if size != 1 or architecture.name != "llama":
    raise CheckpointError(f"GGUF: this family cannot have rope.scaling={rope.scaling}")
  plain = inverse_wavelengths(cfg.head_dim, rope.theta)
  return np.array([a / b for a, b in zip(plain, scaled, strict=True)], np.float32)


def add_settings(writer: Any, cfg: ResolvedModel, name: str) -> None:
  writer.add_name(name)
  writer.add_block_count(cfg.depth)
  writer.add_context_length(cfg.context)
  writer.add_embedding_length(cfg.width)
  writer.add_feed_forward_length(cfg.ffn_width)
  writer.add_head_count(cfg.num_heads)
  writer.add_head_count_kv(cfg.num_kv_heads)
  writer.add_key_length(cfg.head_dim)
  writer.add_value_length(cfg.head_dim)
  if cfg.positions == "rope":
    writer.add_rope_dimension_count(rotary_dims(cfg))
    writer.add_rope_freq_base(cfg.rope.theta)
  if cfg.norm == "rmsnorm":
    writer.add_layer_norm_rms_eps(cfg.norm_epsilon)
  else:
    writer.add_layer_norm_eps(cfg.norm_epsilon)
  writer.add_vocab_size(cfg.vocab_size)


def add_tokenizer(writer: Any, run: Run) -> None:
  """Writes ids, merges, special ids and the chat template.

  Raises `CheckpointError` unless llama.cpp would make the same ids of every text.
  """
  import gguf

  spec = json.loads(run.tokenizer.to_json())
  model, added = spec["model"], {one["id"]: one for one in spec["added_tokens"]}
  pre_tokenizer = find_pre_tokenizer(spec)
  words = {number: word for word, number in model["vocab"].items()}
  words |= {number: one["content"] for number, one in added.items()}
  numbers = range(run.model.cfg.num_ids)
  types = gguf.TokenType
  kind = lambda n: (
    (types.CONTROL if added[n]["special"] else types.USER_DEFINED)
    if n in added
    else (types.NORMAL if n in words else types.UNUSED)
  )
  merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre(pre_tokenizer)
  writer.add_token_list([words.get(number, f"[PAD{number}]") for number in numbers])
  writer.add_token_types([kind(number) for number in numbers])
  writer.add_token_merges(merges or [NO_MERGE])
  add_special_ids(writer, run)
  templates = load_templates(run.path)
  if templates:
    named = [{"name": name, "template": text} for name, text in templates.items()]
    writer.add_chat_template(named)


def add_special_ids(writer: Any, run: Run) -> None:
  """Writes what begins a text, and the ids that end one: the configured one first."""
  tokenizer, num_ids = run.tokenizer, run.model.cfg.num_ids
  starts = tokenizer.framed([0], "prompt")[:-1]
  if len(starts) > 1:
    raise CheckpointError(
      f"GGUF: texts begin with the ids {starts}, and llama.cpp adds one",
      "export to safetensors",
    )
  writer.add_bos_token_id(starts[0] if starts else tokenizer.bos_id)
  writer.add_add_bos_token(bool(starts))
  writer.add_add_eos_token(False)
  first = configured_end(run)
  ends = [first, *sorted(tokenizer.eos_ids - {first})]
  ends = [end for end in ends if 0 <= end < num_ids]
  if not 1 <= len(ends) <= MAX_ENDS:
    raise CheckpointError(
      f"GGUF: {len(ends)} ids end an answer, and llama.cpp has places for 1 to {MAX_ENDS}",
      "export to safetensors",
    )
  writers = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
  for write, end in zip(writers, ends, strict=False):
    write(end)


def configured_end(run: Run) -> int:
  """Of the ids that end an answer, the one that the tokenizer's settings name; else the
  first."""
  named = run.tokenizer.id_of(load_special_tokens(run.path).get("eos_token", ""))
  return named if named in run.tokenizer.eos_ids else run.tokenizer.eos_id
