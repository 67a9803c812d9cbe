# SPDX-License-Identifier: Apache-2.0
"""LLaMA and the families derived from it: the same names, other details.

Sources: the configuration and modelling files of each family in `transformers`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flaxlm.config import ModelConfig, MoEConfig, ResolvedModel
from flaxlm.errors import CheckpointError
from flaxlm.interop.family import Family
from flaxlm.interop.layouts import FromOne, Heads, Layout, Weight, array, linear, norm
from flaxlm.interop.settings import (
  ACTIVATION_NAMES,
  MOST_LAYERS,
  Keys,
  Settings,
  head_dim,
  layer_types,
  rope_keys,
  to_keys,
)

BLOCK = "model.layers.{l}."
ATTENTION = BLOCK + "self_attn."

KEYS: Keys = (
  ("vocab_size", "vocab_size"),
  ("hidden_size", "width"),
  ("num_hidden_layers", "depth"),
  ("num_attention_heads", "num_heads"),
  ("num_key_value_heads", "num_kv_heads"),
  ("head_dim", "head_dim"),
  ("intermediate_size", "ffn_width"),
  ("max_position_embeddings", "context"),
  ("rms_norm_eps", "norm_epsilon"),
  ("tie_word_embeddings", "tied_embeddings"),
)
ROPE_KEYS = {"rope_theta", "partial_rotary_factor"}

# -- Tables --------------------------------------------------------------------------------

ENDS = (
  array("model.embed_tokens.weight", "embedding/table"),
  *norm("model.norm", "final_norm"),
  *linear("lm_head", "head"),
)
PROJECTIONS = (
  *linear(ATTENTION + "q_proj", "blocks/attention/q"),
  *linear(ATTENTION + "k_proj", "blocks/attention/k"),
  *linear(ATTENTION + "v_proj", "blocks/attention/v"),
  *linear(ATTENTION + "o_proj", "blocks/attention/o", inputs=2),
)
FFN = (
  *linear(BLOCK + "mlp.gate_proj", "blocks/ffn/gate"),
  *linear(BLOCK + "mlp.up_proj", "blocks/ffn/up"),
  *linear(BLOCK + "mlp.down_proj", "blocks/ffn/down"),
)
PRE_NORMS = (
  *norm(BLOCK + "input_layernorm", "blocks/attention_norm"),
  *norm(BLOCK + "post_attention_layernorm", "blocks/ffn_norm"),
)
OUTPUT_NORMS = (
  *norm(BLOCK + "post_attention_layernorm", "blocks/attention_output_norm"),
  *norm(BLOCK + "post_feedforward_layernorm", "blocks/ffn_output_norm"),
)


def head_norms(layout: Layout) -> tuple[Weight, ...]:
  return (
    array(ATTENTION + "q_norm.weight", "blocks/attention/q_norm/scale", layout),
    array(ATTENTION + "k_norm.weight", "blocks/attention/k_norm/scale", layout),
  )


def experts(router: str, each: str, gate: str, up: str, down: str) -> tuple[Weight, ...]:
  """Rows for a router and its experts; `{e}` in `each` is the expert's number."""
  ours = "blocks/ffn/experts/"
  return (
    *linear(BLOCK + router, "blocks/ffn/router"),
    *linear(BLOCK + each + gate, ours + "gate"),
    *linear(BLOCK + each + up, ours + "up"),
    *linear(BLOCK + each + down, ours + "down"),
  )


LLAMA = (*ENDS, *PROJECTIONS, *FFN, *PRE_NORMS)
QWEN3 = (*LLAMA, *head_norms(Layout()))
MIXTRAL = (
  *(*ENDS, *PROJECTIONS, *PRE_NORMS),
  *experts("block_sparse_moe.gate", "block_sparse_moe.experts.{e}.", "w1", "w3", "w2"),
)
QWEN_EXPERTS = experts("mlp.gate", "mlp.experts.{e}.", "gate_proj", "up_proj", "down_proj")
QWEN2_MOE = (
  *(*ENDS, *PROJECTIONS, *PRE_NORMS, *QWEN_EXPERTS),
  *linear(BLOCK + "mlp.shared_expert.gate_proj", "blocks/ffn/shared/gate"),
  *linear(BLOCK + "mlp.shared_expert.up_proj", "blocks/ffn/shared/up"),
  *linear(BLOCK + "mlp.shared_expert.down_proj", "blocks/ffn/shared/down"),
  *linear(BLOCK + "mlp.shared_expert_gate", "blocks/ffn/shared_gate"),
)
QWEN3_MOE = (*ENDS, *PROJECTIONS, *PRE_NORMS, *QWEN_EXPERTS, *head_norms(Layout()))
OLMO2 = (*ENDS, *PROJECTIONS, *FFN, *OUTPUT_NORMS, *head_norms(Heads()))
PHI3 = (
  *(*ENDS, *PRE_NORMS, *PROJECTIONS[-2:]),
  *linear(ATTENTION + "qkv_proj", tuple(f"blocks/attention/{x}" for x in "qkv")),
  *linear(BLOCK + "mlp.gate_up_proj", ("blocks/ffn/gate", "blocks/ffn/up")),
  *FFN[-2:],
)


def from_one(rows: tuple[Weight, ...]) -> tuple[Weight, ...]:
  """The table for Gemma, whose norms multiply by 1 + weight."""
  is_norm = lambda row: row.ours[0].endswith("norm/scale")
  return tuple(
    dataclasses.replace(row, layout=FromOne()) if is_norm(row) else row for row in rows
  )


GEMMA = from_one(LLAMA)
GEMMA_2 = from_one(
  (
    *(*ENDS, *PROJECTIONS, *FFN, *OUTPUT_NORMS),
    *norm(BLOCK + "input_layernorm", "blocks/attention_norm"),
    *norm(BLOCK + "pre_feedforward_layernorm", "blocks/ffn_norm"),
  )
)
GEMMA_3 = (*GEMMA_2, *from_one(head_norms(Layout())))

# -- Configs -------------------------------------------------------------------------------


def read(
  hf: Settings,
  defaults: Mapping[str, Any],
  activation: tuple[str, str] = ("hidden_act", "silu"),
  **ours: Any,
) -> ModelConfig:
  """The config that all of them share.

  `defaults` are by their key, `ours` are a family's own fields.
  """
  general = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
  fields = hf.fields(KEYS, {**general, "tie_word_embeddings": False, **defaults})
  cfg = ModelConfig(**fields, activation=hf.activation(*activation), **ours)
  rotary = {key: defaults[key] for key in ROPE_KEYS & defaults.keys()}
  rope = hf.rope(head_dim(hf, cfg), cfg.context, rotary)
  return dataclasses.replace(cfg, rope=rope)


def write(cfg: ResolvedModel) -> dict[str, Any]:
  return {
    **to_keys(cfg, KEYS),
    "hidden_act": ACTIVATION_NAMES[cfg.activation],
    **rope_keys(cfg.rope, cfg.head_dim),
    "attention_dropout": 0.0,
  }


def attention_bias(hf: Settings) -> dict[str, Any]:
  biased = hf.get(bool, "attention_bias", False)
  return {"qkv_biased": biased, "o_biased": biased}


def read_llama(hf: Settings) -> ModelConfig:
  return read(hf, {}, biased=hf.get(bool, "mlp_bias", False), **attention_bias(hf))


def write_llama(cfg: ResolvedModel) -> dict[str, Any]:
  return {**write(cfg), "attention_bias": cfg.qkv_biased, "mlp_bias": cfg.biased}


def read_mistral(hf: Settings) -> ModelConfig:
  window: int | None = 4096  # of a file without the key; null means no window
  if "sliding_window" in hf.values:
    window = hf.get(int, "sliding_window", None)
  return read(hf, {"max_position_embeddings": 131_072}, window=window)


def write_mistral(cfg: ResolvedModel) -> dict[str, Any]:
  return {**write(cfg), "sliding_window": cfg.window}


def read_mixtral(hf: Settings) -> ModelConfig:
  moe = MoEConfig(
    num_experts=hf.get(int, "num_local_experts"),
    experts_per_token=hf.get(int, "num_experts_per_tok", 2),
    load_balance_weight=hf.get(float, "router_aux_loss_coef", 0.001),
  )
  window = hf.get(int, "sliding_window", None)
  defaults = {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 131_072}
  return read(hf, defaults, window=window, moe=moe)


def write_mixtral(cfg: ResolvedModel) -> dict[str, Any]:
  return {
    **write_mistral(cfg),
    "intermediate_size": cfg.moe.expert_width,
    "num_local_experts": cfg.moe.num_experts,
    "num_experts_per_tok": cfg.moe.experts_per_token,
    "router_aux_loss_coef": cfg.moe.load_balance_weight,
  }


def windows(hf: Settings) -> dict[str, Any]:
  """Qwen's windows: the first `max_window_layers` layers are global, the others local."""
  if not hf.get(bool, "use_sliding_window", False):
    return {}
  depth = hf.get(int, "num_hidden_layers")
  full = max(0, min(depth, hf.get(int, "max_window_layers", 28)))
  pattern = hf.layer_pattern(depth, "G" * full + "L" * (depth - full))
  return {"window": hf.get(int, "sliding_window", 4096), "layer_pattern": pattern}


def window_keys(cfg: ResolvedModel) -> dict[str, Any]:
  kinds = layer_types(cfg)
  return {
    "use_sliding_window": "sliding_attention" in kinds,
    "sliding_window": cfg.window,
    "max_window_layers": kinds.count("full_attention"),
    "layer_types": kinds,
  }


def read_qwen2(hf: Settings) -> ModelConfig:
  return read(hf, {}, qkv_biased=True, **windows(hf))


def write_qwen2(cfg: ResolvedModel) -> dict[str, Any]:
  return {**write(cfg), **window_keys(cfg)}


def read_qwen3(hf: Settings) -> ModelConfig:
  return read(hf, {"head_dim": 128}, qk_norm="head", **attention_bias(hf), **windows(hf))


def write_qwen3(cfg: ResolvedModel) -> dict[str, Any]:
  return {**write_qwen2(cfg), "attention_bias": cfg.qkv_biased}


def qwen_moe(hf: Settings) -> MoEConfig:
  hf.demand(decoder_sparse_step=1, mlp_only_layers=[])
  experts = hf.get(int, "num_local_experts", None)
  if experts is None:
    experts = hf.get(int, "num_experts")
  width = hf.get(int, "moe_intermediate_size")
  shared = hf.get(int, "shared_expert_intermediate_size", 0)
  if width < 1 or shared % width:
    raise hf.refused("shared_expert_intermediate_size", f"use a multiple of {width}")
  return MoEConfig(
    num_experts=experts,
    experts_per_token=hf.get(int, "num_experts_per_tok"),
    expert_width=width,
    num_shared_experts=shared // width,
    shared_gated=shared > 0,
    normalized=hf.get(bool, "norm_topk_prob", False),
    load_balance_weight=hf.get(float, "router_aux_loss_coef", 0.001),
  )


def moe_keys(cfg: ResolvedModel) -> dict[str, Any]:
  return {
    "num_experts": cfg.moe.num_experts,
    "num_experts_per_tok": cfg.moe.experts_per_token,
    "moe_intermediate_size": cfg.moe.expert_width,
    "norm_topk_prob": cfg.moe.normalized,
    "router_aux_loss_coef": cfg.moe.load_balance_weight,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
  }


def read_qwen2_moe(hf: Settings) -> ModelConfig:
  biased = hf.get(bool, "qkv_bias", True)
  return read(hf, {}, qkv_biased=biased, moe=qwen_moe(hf), **windows(hf))


def write_qwen2_moe(cfg: ResolvedModel) -> dict[str, Any]:
  shared = cfg.moe.num_shared_experts * cfg.moe.expert_width
  return {
    **write_qwen2(cfg),
    **moe_keys(cfg),
    "qkv_bias": cfg.qkv_biased,
    "shared_expert_intermediate_size": shared,
  }


def read_qwen3_moe(hf: Settings) -> ModelConfig:
  window = None
  if hf.get(bool, "use_sliding_window", False):
    window = hf.get(int, "sliding_window", 4096)  # in every layer
  moe, biases = qwen_moe(hf), attention_bias(hf)
  return read(hf, {}, qk_norm="head", moe=moe, window=window, **biases)


def write_qwen3_moe(cfg: ResolvedModel) -> dict[str, Any]:
  return {
    **write_mistral(cfg),
    **moe_keys(cfg),
    "use_sliding_window": cfg.window is not None,
    "attention_bias": cfg.qkv_biased,
  }


def read_phi3(hf: Settings) -> ModelConfig:
  return read(hf, {"rms_norm_eps": 1e-5}, window=hf.get(int, "sliding_window", None))


def read_olmo2(hf: Settings) -> ModelConfig:
  defaults = {"rms_norm_eps": 1e-5}
  biases = attention_bias(hf)
  return read(hf, defaults, norm_placement="output", qk_norm="width", **biases)


def write_olmo2(cfg: ResolvedModel) -> dict[str, Any]:
  return {**write(cfg), "attention_bias": cfg.qkv_biased}


def read_gemma(hf: Settings, **ours: Any) -> ModelConfig:
  hf.demand(use_bidirectional_attention=False)
  key = "hidden_act" if hf.values.get("hidden_activation") is None else "hidden_activation"
  defaults = {"tie_word_embeddings": True, "head_dim": 256, "max_position_embeddings": 8192}
  ours |= dict(embedding_scaled=True, **attention_bias(hf))
  cfg = read(hf, defaults, (key, "gelu_pytorch_tanh"), **ours)
  if key == "hidden_act" and cfg.activation == "gelu":
    # The first files say gelu, but were trained with its tanh approximation.
    cfg = dataclasses.replace(cfg, activation="gelu_tanh")
  return cfg


def write_gemma(cfg: ResolvedModel) -> dict[str, Any]:
  return {**write(cfg), "attention_bias": cfg.qkv_biased}


def read_gemma2(hf: Settings, pattern: str = "LG", **ours: Any) -> ModelConfig:
  """Gemma 2 and, with other fields, Gemma 3."""
  scalar = hf.get(float, "query_pre_attn_scalar", 256.0)
  if scalar <= 0:
    raise hf.refused("query_pre_attn_scalar", "it is positive")
  softcaps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
  softcaps |= {key: hf.values[key] for key in softcaps if key in hf.values}
  capped = Settings(softcaps, hf.origin)
  return read_gemma(
    hf,
    norm_placement="both",
    attention_scale=scalar**-0.5,
    attention_softcap=capped.get(float, "attn_logit_softcapping", None),
    logit_softcap=capped.get(float, "final_logit_softcapping", None),
    window=hf.get(int, "sliding_window", 4096),
    layer_pattern=hf.layer_pattern(hf.get(int, "num_hidden_layers"), pattern),
    **ours,
  )


def write_gemma2(cfg: ResolvedModel) -> dict[str, Any]:
  return {
    **write_gemma(cfg),
    "hidden_activation": ACTIVATION_NAMES[cfg.activation],
    "query_pre_attn_scalar": round(cfg.attention_scale**-2),
    "attn_logit_softcapping": cfg.attention_softcap,
    "final_logit_softcapping": cfg.logit_softcap,
    "sliding_window": cfg.window or cfg.context,
    "layer_types": layer_types(cfg),
  }


# Keys that the text config of a model with image input leaves out.
GEMMA_3_DEFAULTS: dict[str, Any] = {
  "vocab_size": 262_208,
  "num_attention_heads": 8,
  "num_key_value_heads": 4,
  "max_position_embeddings": 131_072,
  "rope_theta": 1e6,
  "attn_logit_softcapping": None,
  "final_logit_softcapping": None,
}


def read_gemma3(hf: Settings) -> ModelConfig:
  of_kind = hf.inner("rope_parameters") or Settings({}, hf.origin)
  whole, local = of_kind.inner("full_attention"), of_kind.inner("sliding_attention")
  theta = hf.get(float, "rope_local_base_freq", 10_000.0)
  if local is not None:
    local.demand(rope_type="default")
    theta = local.get(float, "rope_theta", theta)
  values = GEMMA_3_DEFAULTS | dict(hf.values)
  if whole is not None:
    values["rope_parameters"] = dict(whole.values)
  period = hf.get(int, "sliding_window_pattern", 6)
  if not 0 < period < MOST_LAYERS:
    raise hf.refused("sliding_window_pattern", "it is positive")
  hf = Settings(values, hf.origin, hf.names)
  cfg = read_gemma2(hf, "L" * (period - 1) + "G", qk_norm="head")
  return dataclasses.replace(cfg, rope=dataclasses.replace(cfg.rope, local_theta=theta))


def write_gemma3(cfg: ResolvedModel) -> dict[str, Any]:
  keys = write_gemma2(cfg)
  theta = cfg.rope.local_theta or cfg.rope.theta
  return {**keys, "rope_local_base_freq": theta, "use_bidirectional_attention": False}


def read_gemma3_multimodal(hf: Settings) -> ModelConfig:
  """The language model of a Gemma 3 with image input."""
  text = hf.inner("text_config")
  if text is None:
    raise hf.refused("text_config", "it is an object")
  return read_gemma3(text)


def write_gemma3_multimodal(cfg: ResolvedModel) -> dict[str, Any]:
  raise CheckpointError("gemma3 has image input, which flaxlm lacks", "use gemma3_text")


# -- Families ------------------------------------------------------------------------------


def family(
  model_type: str, name: str, rows: tuple[Weight, ...], read: Any, write: Any
) -> Family:
  return Family(
    model_type,
    (f"{name}ForCausalLM", f"{name}Model"),
    lambda _: rows,
    read,
    write,
    prefix="model.",
    tied=(("lm_head.weight", "model.embed_tokens.weight"),),
    ignored=(r"rotary_emb\.inv_freq$",),
  )


FAMILIES = (
  family("llama", "Llama", LLAMA, read_llama, write_llama),
  family("mistral", "Mistral", LLAMA, read_mistral, write_mistral),
  family("mixtral", "Mixtral", MIXTRAL, read_mixtral, write_mixtral),
  family("qwen2", "Qwen2", LLAMA, read_qwen2, write_qwen2),
  family("qwen2_moe", "Qwen2Moe", QWEN2_MOE, read_qwen2_moe, write_qwen2_moe),
  family("qwen3", "Qwen3", QWEN3, read_qwen3, write_qwen3),
  family("qwen3_moe", "Qwen3Moe", QWEN3_MOE, read_qwen3_moe, write_qwen3_moe),
  family("gemma", "Gemma", GEMMA, read_gemma, write_gemma),
  family("gemma2", "Gemma2", GEMMA_2, read_gemma2, write_gemma2),
  family("gemma3_text", "Gemma3", GEMMA_3, read_gemma3, write_gemma3),
  Family(
    "gemma3",
    ("Gemma3ForConditionalGeneration", "Gemma3Model"),
    lambda _: tuple(
      dataclasses.replace(row, theirs=f"language_model.{row.theirs}") for row in GEMMA_3
    ),
    read_gemma3_multimodal,
    write_gemma3_multimodal,
    prefix="language_model.",
    tied=(("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"),),
    ignored=(r"^vision_tower\.", r"^multi_modal_projector\."),
  ),
  family("phi3", "Phi3", PHI3, read_phi3, write_mistral),
  family("olmo2", "Olmo2", OLMO2, read_olmo2, write_olmo2),
)
