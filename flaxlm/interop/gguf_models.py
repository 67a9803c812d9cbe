# SPDX-License-Identifier: Apache-2.0
"""What a GGUF file says of a model, as config.json and tensors of Hugging Face's families.

From there on it is imported as their checkpoints are. What llama.cpp has in its code, and
not in the file, stands in the table of architectures. Source: `convert_hf_to_gguf.py` and
the model files of llama.cpp, for the names and for what is changed on the way.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from flaxlm.config import ResolvedRope
from flaxlm.errors import CheckpointError
from flaxlm.interop.gguf_file import GGUF, StoredTensor
from flaxlm.interop.values import Values, shortened, shown
from flaxlm.nn.positions import inverse_wavelengths, stretched_frequencies

ARCHITECTURE = "general.architecture"
ROPE_FACTORS = "rope_freqs.weight"
# The layers of each family by llama.cpp's names, and its other modules.
ENDS = {
  "token_embd": "model.embed_tokens",
  "output_norm": "model.norm",
  "output": "lm_head",
}
LLAMA = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "attn_q_norm": "self_attn.q_norm",
  "attn_k_norm": "self_attn.k_norm",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
GEMMA_2 = LLAMA | {
  "post_attention_norm": "post_attention_layernorm",
  "ffn_norm": "pre_feedforward_layernorm",
  "post_ffw_norm": "post_feedforward_layernorm",
}
GPT_2_ENDS = {
  "token_embd": "transformer.wte",
  "position_embd": "transformer.wpe",
  "output_norm": "transformer.ln_f",
  "output": "lm_head",
}
GPT_2 = {
  "attn_norm": "ln_1",
  "attn_qkv": "attn.c_attn",
  "attn_output": "attn.c_proj",
  "ffn_norm": "ln_2",
  "ffn_up": "mlp.c_fc",
  "ffn_down": "mlp.c_proj",
}
Keys = dict[str, Any]  # of a config.json
# Keys below the architecture's name that say nothing of what the model computes.
SILENT = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned"}
SCALING = "rope.scaling."


class Model(NamedTuple):
  """A file's model in Hugging Face's words."""

  keys: Keys  # config.json
  tensors: dict[str, StoredTensor]


class Context(NamedTuple):
  """What the keys of an architecture are made from."""

  said: Values  # below the architecture's name
  tensors: Mapping[str, StoredTensor]  # by llama.cpp's names
  asked: set[str]  # keys that have been looked at

  def get(self, kind: Any, key: str, *default: Any) -> Any:
    self.asked.add(key)
    return self.said.get(kind, key, *default)

  @property
  def head_dim(self) -> int:
    heads = self.get(int, "attention.head_count")
    if not 0 < heads < 2**20:
      raise self.said.refused("attention.head_count")
    size = self.get(int, "attention.key_length", self.get(int, "embedding_length") // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
      if self.get(int, key, size) != size:
        raise self.said.refused(key, f"flaxlm has {size} dims of each head there")
    return size

  def has(self, name: str) -> bool:
    return name in self.tensors


# -- Architectures -------------------------------------------------------------------------


def read_llama_like(context: Context) -> Keys:
  """What LLaMA and its relatives have in common."""
  get, heads = context.get, context.get(int, "attention.head_count")
  return {
    **sizes(context),
    "intermediate_size": get(int, "feed_forward_length"),
    "num_key_value_heads": get(int, "attention.head_count_kv", heads),
    "head_dim": context.head_dim,
    "rms_norm_eps": get(float, "attention.layer_norm_rms_epsilon"),
    "rope_theta": get(float, "rope.freq_base", 10_000.0),
    "rope_scaling": rope_scaling(context),
  }


def sizes(context: Context) -> Keys:
  return {
    "hidden_size": context.get(int, "embedding_length"),
    "num_hidden_layers": context.get(int, "block_count"),
    "num_attention_heads": context.get(int, "attention.head_count"),
    "max_position_embeddings": context.get(int, "context_length"),
  }


def read_llama(context: Context) -> Keys:
  return read_llama_like(context) | {
    "attention_bias": context.has("blk.0.attn_q.bias"),
    "mlp_bias": context.has("blk.0.ffn_up.bias"),
  }


def read_qwen3(context: Context) -> Keys:
  return read_llama_like(context) | {"attention_bias": context.has("blk.0.attn_q.bias")}


def read_gemma(context: Context) -> Keys:
  return read_llama_like(context) | {"hidden_activation": "gelu_pytorch_tanh"}


def read_gemma_2(context: Context) -> Keys:
  get = context.get
  return read_gemma(context) | {
    "sliding_window": get(int, "attention.sliding_window", 4096),
    "layer_types": local_layers(context, 2),
    "query_pre_attn_scalar": query_scalar(context, 46),
    "attn_logit_softcapping": cap(get(float, "attn_logit_softcapping", 50.0)),
    "final_logit_softcapping": cap(get(float, "final_logit_softcapping", 30.0)),
  }


def read_gemma_3(context: Context) -> Keys:
  get = context.get
  return read_gemma(context) | {
    "sliding_window": get(int, "attention.sliding_window"),
    "layer_types": local_layers(context, 6),
    "query_pre_attn_scalar": query_scalar(context, 62),
    "rope_theta": get(float, "rope.freq_base", 1e6),
    "rope_local_base_freq": get(float, "rope.freq_base_swa", 10_000.0),
    "final_logit_softcapping": cap(get(float, "final_logit_softcapping", 0.0)),
  }


def cap(value: float) -> float | None:
  return value or None


def query_scalar(context: Context, depth_of_27b: int) -> float:
  """By whose root scores are divided. llama.cpp knows the 27B models by their depth."""
  if context.get(int, "block_count") == depth_of_27b:
    heads = context.get(int, "attention.head_count")
    return context.get(int, "embedding_length") / max(1, heads)
  return float(context.head_dim)


def local_layers(context: Context, period: int) -> list[str]:
  """The kind of each layer, of which every `period`th is global."""
  depth = context.get(int, "block_count")
  key = "attention.sliding_window_pattern"
  said = context.said.values.get(key)
  context.asked.add(key)
  if isinstance(said, list):  # of bools: whether a layer is local
    if len(said) != depth or not all(type(one) is bool for one in said):
      raise context.said.refused(key, f"it is one for each of {depth} layers")
    local = said
  else:
    period = context.get(int, key, period)
    if period < 1 or not 0 <= depth <= 10_000:
      raise context.said.refused(key, "it is positive")
    local = [(layer + 1) % period != 0 for layer in range(depth)]
  return ["sliding_attention" if one else "full_attention" for one in local]


def read_gpt_2(context: Context) -> Keys:
  get, given = context.get, sizes(context)
  get(int, "attention.head_count_kv", 0)
  if given["hidden_size"] != context.head_dim * given["num_attention_heads"]:
    raise context.said.refused("attention.key_length", "heads share the width in GPT-2")
  return {
    "n_embd": given["hidden_size"],
    "n_layer": given["num_hidden_layers"],
    "n_head": given["num_attention_heads"],
    "n_positions": given["max_position_embeddings"],
    "n_inner": get(int, "feed_forward_length"),
    "layer_norm_epsilon": get(float, "attention.layer_norm_epsilon"),
    "activation_function": "gelu_new",
  }


class Architecture(NamedTuple):
  """How llama.cpp has a family of Hugging Face's."""

  model_type: str
  read: Callable[[Context], Keys]
  layers: Mapping[str, str] = LLAMA
  # RoPE rotates neighbouring dims together, as in LLaMA's own weights, instead of dims that
  # are half a head apart.
  neighbours: bool = False
  norms_from_one: bool = False  # Hugging Face keeps a norm's distance from 1

  @property
  def is_gpt_2(self) -> bool:
    return self.layers is GPT_2


ARCHITECTURES = {
  "llama": Architecture("llama", read_llama, neighbours=True),
  "qwen2": Architecture("qwen2", read_llama_like),
  "qwen3": Architecture("qwen3", read_qwen3),
  "gemma": Architecture("gemma", read_gemma, norms_from_one=True),
  "gemma2": Architecture("gemma2", read_gemma_2, GEMMA_2, norms_from_one=True),
  "gemma3": Architecture("gemma3_text", read_gemma_3, GEMMA_2, norms_from_one=True),
  "gpt2": Architecture("gpt2", read_gpt_2, GPT_2),
}

# -- A file's model ------------------------------------------------------------------------


def read_model(file: GGUF) -> Model:
  """config.json and the tensors. Raises `CheckpointError` for what flaxlm does not have."""
  said = Values(file.values, str(file.path))
  name = said.get(str, ARCHITECTURE)
  if name not in ARCHITECTURES:
    raise CheckpointError(
      f"{file.path}: the architecture {shown(name)} is not supported",
      f"supported: {', '.join(ARCHITECTURES)}",
    )
  if said.get(int, "split.count", 1) > 1:
    raise CheckpointError(
      f"{file.path} is one of {file.values['split.count']} parts of a model",
      "join them: llama-gguf-split --merge",
    )
  architecture = ARCHITECTURES[name]
  start = f"{name}."
  below = {k.removeprefix(start): v for k, v in file.values.items() if k.startswith(start)}
  context = Context(Values(below, f"{file.path}: {name}"), file.tensors, set())
  keys = {
    "model_type": architecture.model_type,
    "vocab_size": vocab_size(file),
    "tie_word_embeddings": "output.weight" not in file.tensors,
    **architecture.read(context),
  }
  refuse_unread(context)
  return Model(keys, rename(file, architecture, context, keys))


def vocab_size(file: GGUF) -> int:
  table = file.tensors.get("token_embd.weight")
  if table is None:
    raise CheckpointError(f"{file.path} has no tensor token_embd.weight")
  return table.shape[0]


def refuse_unread(context: Context) -> None:
  """Raises `CheckpointError` for a value that may change what the model computes."""
  for key, value in context.said.values.items():
    is_silent = key in SILENT or key in context.asked
    if not is_silent and value not in (0, 0.0, False, "none", "", []):
      raise CheckpointError(
        f"{context.said.origin}.{shortened(key)} is {shown(value)}",
        "flaxlm does not know what that changes",
      )


def rename(
  file: GGUF, architecture: Architecture, context: Context, keys: Keys
) -> dict[str, StoredTensor]:
  """The tensors by Hugging Face's names and in its layout."""
  ends = GPT_2_ENDS if architecture.is_gpt_2 else ENDS
  layer = "transformer.h" if architecture.is_gpt_2 else "model.layers"
  found = {}
  for name, tensor in file.tensors.items():
    if name == ROPE_FACTORS and ROPE_FACTORS in context.asked:
      continue
    theirs = None
    if part := re.fullmatch(r"blk\.(\d{1,5})\.(\w+)\.(weight|bias)", name):
      number, module, kind = part.groups()
      if module in architecture.layers:
        theirs = f"{layer}.{int(number)}.{architecture.layers[module]}.{kind}"
    elif (part := re.fullmatch(r"(\w+)\.(weight|bias)", name)) and part[1] in ends:
      theirs = f"{ends[part[1]]}.{part[2]}"
    if theirs is None or theirs in found:
      raise CheckpointError(
        f"{file.path}: {architecture.model_type} has no place for {shortened(name)}"
      )
    found[theirs] = changed(theirs, tensor, architecture, keys)
  return found


def changed(
  name: str, tensor: StoredTensor, architecture: Architecture, keys: Keys
) -> StoredTensor:
  """The tensor of Hugging Face's name `name` in its layout, when it is read."""
  if architecture.is_gpt_2 and ".h." in name and len(tensor.shape) == 2:
    return dataclasses.replace(tensor, shape=tensor.shape[::-1], change=np.transpose)
  if architecture.norms_from_one and name.endswith("norm.weight"):
    return dataclasses.replace(tensor, change=lambda array: array.astype(np.float32) - 1)
  for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
    if architecture.neighbours and f".{part}." in name:
      count = keys[heads]
      if count < 1 or tensor.shape[0] % (2 * count):
        raise CheckpointError(
          f"{tensor.path}: {tensor.shape[0]} rows of {name} for {count} heads"
        )
      return dataclasses.replace(tensor, change=functools.partial(halves, heads=count))
  return tensor


def halves(array: np.ndarray, heads: int) -> np.ndarray:
  """Rows in which pairs of neighbours are rotated, as halves of each head."""
  pairs = array.reshape(heads, -1, 2, *array.shape[1:])
  return pairs.swapaxes(1, 2).reshape(array.shape)


# -- RoPE scaling --------------------------------------------------------------------------

LLAMA_3_TURNS = (1.0, 4.0)  # over the original context, in all that were published
LLAMA_3_CONTEXT = 8192


def rope_scaling(context: Context) -> Keys | None:
  """rope_scaling of a config.json. Raises `CheckpointError` for any that it has not."""
  get = context.get
  kind = get(str, f"{SCALING}type", "none")
  factor = get(float, f"{SCALING}factor", get(float, "rope.scale_linear", 1.0))
  original = get(int, f"{SCALING}original_context_length", None)
  if context.has(ROPE_FACTORS):
    context.asked.add(ROPE_FACTORS)
    if kind not in ("none", "linear") or (kind == "linear" and factor != 1):
      raise context.said.refused(f"{SCALING}type", f"and {ROPE_FACTORS} scales RoPE, too")
    return scaling_of(context)
  if kind == "linear" or (kind == "none" and factor != 1):
    return None if factor == 1 else {"rope_type": "linear", "factor": factor}
  if kind == "yarn":
    scaling = {"rope_type": "yarn", "factor": factor, "beta_fast": 32.0, "beta_slow": 1.0}
    scaling["original_max_position_embeddings"] = original or get(int, "context_length")
    for theirs in ("beta_fast", "beta_slow"):
      scaling[theirs] = get(float, f"{SCALING}yarn_{theirs}", scaling[theirs])
    return scaling
  if kind != "none":
    raise context.said.refused(f"{SCALING}type", "flaxlm has none, linear and yarn")
  return None


def scaling_of(context: Context) -> Keys | None:
  """The rule that the factors of each pair's frequency follow: linear, or Llama 3's."""
  tensor = context.tensors[ROPE_FACTORS]
  size, theta = context.head_dim, context.get(float, "rope.freq_base", 10_000.0)
  if tensor.shape != (size // 2,) or not 0 < size <= 2**16 or theta <= 1:
    raise CheckpointError(f"{tensor.path}: {ROPE_FACTORS} is {list(tensor.shape)}")
  factors = tensor.read().astype(np.float64)
  if not np.isfinite(factors).all() or (factors < 1).any():
    raise CheckpointError(
      f"{tensor.path}: {ROPE_FACTORS} has factors that are not from 1 on"
    )
  if (factors == 1).all():
    return None
  if (factors == factors[0]).all():
    return {"rope_type": "linear", "factor": float(factors[0])}
  frequencies = np.array(inverse_wavelengths(size, theta))
  slow, fast = LLAMA_3_TURNS
  factor = float(str(np.float32(factors.max())))
  for original in (LLAMA_3_CONTEXT, original_context(frequencies, factors, factor)):
    rope = ResolvedRope(
      theta=theta, scaling="llama3", factor=factor, original_context=original,
      slow_turns=slow, fast_turns=fast,
    )  # fmt: skip
    scaled, _ = stretched_frequencies(size, rope)
    if np.allclose(frequencies / scaled, factors, rtol=1e-5, atol=0):
      return {
        "rope_type": "llama3",
        "factor": factor,
        "original_max_position_embeddings": original,
        "low_freq_factor": slow,
        "high_freq_factor": fast,
      }
  raise CheckpointError(
    f"{tensor.path}: {ROPE_FACTORS} scales RoPE by a rule that flaxlm does not know",
    "known: one factor for all, and that of Llama 3",
  )


def original_context(frequencies: np.ndarray, factors: np.ndarray, factor: float) -> int:
  """The context over which Llama 3's rule gives these factors, if one does."""
  slow, fast = LLAMA_3_TURNS
  kept = (1 / factors - 1 / factor) / (1 - 1 / factor)
  between = (kept > 1e-4) & (kept < 1 - 1e-4)
  if between.any():
    turns = slow + kept[between] * (fast - slow)
    return round(float(np.median(2 * math.pi * turns / frequencies[between])))
  fastest = frequencies[factors >= factor * (1 - 1e-6)].max()  # that turn less than `slow`
  return int(slow * 2 * math.pi / fastest)
