# SPDX-License-Identifier: Apache-2.0
"""LLaMA and the families derived from it: the same names, other details.

Sources: the configuration and modelling files of each family in `transformers`.
"""

import dataclasses
import functools

from flaxlm.config import ResolvedModel
from flaxlm.interop.family import Family, Table, causal
from flaxlm.interop.layouts import Dense, FromOne, Layout, array, linear, linears, norm
from flaxlm.interop.settings import (
  ACTIVATIONS,
  MOST_LAYERS,
  ROPE,
  SIZES,
  Choice,
  Fields,
  Key,
  Keys,
  Row,
  Rule,
  defaults,
  fixed,
  fixed_base,
  layer_pattern,
  layer_types,
  ours,
  partial_rope,
  read_rope,
  replaced,
  write_rope,
  written,
)
from flaxlm.interop.values import REQUIRED, Values

BLOCK = "model.layers.{l}."
ATTENTION = BLOCK + "self_attn."

# -- Weights -------------------------------------------------------------------------------

ENDS = (
  array("model.embed_tokens.weight", "embedding/table"),
  *norm("model.norm", "final_norm"),
  *linear("lm_head", "head"),
)
PROJECTIONS = linears(
  ATTENTION, "blocks/attention/", q="q_proj", k="k_proj", v="v_proj", o="o_proj"
)
GATED = dict(gate="gate_proj", up="up_proj", down="down_proj")
FFN = linears(BLOCK + "mlp.", "blocks/ffn/", **GATED)
PRE_NORMS = (
  *norm(BLOCK + "input_layernorm", "blocks/attention_norm"),
  *norm(BLOCK + "post_attention_layernorm", "blocks/ffn_norm"),
)
OUTPUT_NORMS = (
  *norm(BLOCK + "post_attention_layernorm", "blocks/attention_output_norm"),
  *norm(BLOCK + "post_feedforward_layernorm", "blocks/ffn_output_norm"),
)


def head_norms(layout: Layout) -> Table:
  return (
    array(ATTENTION + "q_norm.weight", "blocks/attention/q_norm/scale", layout),
    array(ATTENTION + "k_norm.weight", "blocks/attention/k_norm/scale", layout),
  )


EXPERTS = "blocks/ffn/experts/"
LLAMA = (*ENDS, *PROJECTIONS, *FFN, *PRE_NORMS)
QWEN3 = (*LLAMA, *head_norms(Layout()))
MIXTRAL = (
  *(*ENDS, *PROJECTIONS, *PRE_NORMS),
  *linear(BLOCK + "block_sparse_moe.gate", "blocks/ffn/router"),
  *linears(BLOCK + "block_sparse_moe.experts.{e}.", EXPERTS, gate="w1", up="w3", down="w2"),
)
QWEN3_MOE = (
  *(*ENDS, *PROJECTIONS, *PRE_NORMS, *head_norms(Layout())),
  *linear(BLOCK + "mlp.gate", "blocks/ffn/router"),
  *linears(BLOCK + "mlp.experts.{e}.", EXPERTS, **GATED),
)
QWEN2_MOE = (
  *QWEN3_MOE,
  *linears(BLOCK + "mlp.shared_expert.", "blocks/ffn/shared/", **GATED),
  *linear(BLOCK + "mlp.shared_expert_gate", "blocks/ffn/shared_gate"),
)
OLMO2 = (*ENDS, *PROJECTIONS, *FFN, *OUTPUT_NORMS, *head_norms(Dense(0)))
PHI3 = (
  *(*ENDS, *PRE_NORMS, *PROJECTIONS[-2:]),
  *linear(ATTENTION + "qkv_proj", tuple(f"blocks/attention/{x}" for x in "qkv")),
  *linear(BLOCK + "mlp.gate_up_proj", ("blocks/ffn/gate", "blocks/ffn/up")),
  *FFN[-2:],
)


def from_one(rows: Table) -> Table:
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

# -- Settings ----------------------------------------------------------------------------

KEYS: tuple[Row, ...] = (
  *SIZES,
  Key("num_key_value_heads", "num_kv_heads"),
  Key("head_dim", "head_dim"),
  Key("intermediate_size", "ffn_width", REQUIRED),
  Key("rms_norm_eps", "norm_epsilon", 1e-6),
  Key("tie_word_embeddings", "tied_embeddings", False),
  Choice("hidden_act", ACTIVATIONS, "silu"),
  Key("rope_theta", "rope.theta", 10_000.0),
  ROPE,
  written(attention_dropout=0.0),
)
BIASES = (
  Key("attention_bias", "o_biased", False),
  Key("attention_bias", "qkv_biased", False),
)


def refuse_uneven_heads(hf: Values, found: Fields) -> Fields:
  """For families whose classes refuse it, although they have a key for the head dim."""
  if found["num_heads"] and found["width"] % found["num_heads"]:
    raise hf.refused("hidden_size", f"use a multiple of {found['num_heads']} heads")
  return {}


EVEN_HEADS = Rule(refuse_uneven_heads)
LLAMA_SETTINGS = (*KEYS, *BIASES, Key("mlp_bias", "biased", False), EVEN_HEADS)
MISTRAL_SETTINGS = (
  *defaults(KEYS, max_position_embeddings=131_072),
  Key("num_key_value_heads", "num_kv_heads", 8, nullable=True),
  Key("sliding_window", "window", 4096, nullable=True),
)
MIXTRAL_SETTINGS = (
  *defaults(KEYS, rms_norm_eps=1e-5, rope_theta=1e6, max_position_embeddings=131_072),
  Key("num_key_value_heads", "num_kv_heads", 8, nullable=True),
  Key("sliding_window", "window"),
  Key("intermediate_size", "moe.expert_width"),
  Key("num_local_experts", "moe.num_experts"),
  Key("num_experts_per_tok", "moe.experts_per_token", 2),
  Key("router_aux_loss_coef", "moe.load_balance_weight", 0.001),
)
PHI3_SETTINGS = (
  *defaults(
    replaced(KEYS, ROPE, partial_rope()), rms_norm_eps=1e-5, max_position_embeddings=4096
  ),
  Key("sliding_window", "window"),
)
OLMO2_SETTINGS = (
  *defaults(KEYS, rms_norm_eps=1e-5),
  *BIASES,
  ours(norm_placement="output", qk_norm="width"),
)

# -- Qwen


def read_windows(hf: Values, found: Fields, alternating: bool = False) -> Fields:
  """The first `max_window_layers` layers are global, the others local.

  If `alternating` (Qwen 2's models with experts), every second of the first ones is local
  instead, and all others are global.
  """
  window = read_window(hf, found)
  if not window:
    return {}
  depth = found["depth"]
  first = max(0, min(depth, hf.get(int, "max_window_layers", 28)))
  pattern = "G" * first + "L" * (depth - first)
  if alternating:
    pattern = ("LG" * depth)[:first] + "G" * (depth - first)
  return {**window, "layer_pattern": layer_pattern(hf, depth, pattern)}


def write_windows(cfg: ResolvedModel) -> Keys:
  kinds = layer_types(cfg)
  return {
    "use_sliding_window": "sliding_attention" in kinds,
    "sliding_window": cfg.window,
    "max_window_layers": kinds.count("full_attention"),
    "layer_types": kinds,
  }


def read_window(hf: Values, found: Fields) -> Fields:
  """The window, which in Qwen 3's models with experts is the same in every layer."""
  missing = hf.values.get("sliding_window", 4096) is None  # null is no window
  if missing or not hf.get(bool, "use_sliding_window", False):
    return {}
  return {"window": hf.get(int, "sliding_window", 4096)}


def write_window(cfg: ResolvedModel) -> Keys:
  return {"use_sliding_window": cfg.window is not None, "sliding_window": cfg.window}


def read_shared_experts(hf: Values, found: Fields) -> Fields:
  shared, width = hf.get(int, SHARED_WIDTH), found["moe.expert_width"]
  if width < 1 or shared < 1 or shared % width:
    raise hf.refused(SHARED_WIDTH, f"use a multiple of {width}")
  return {"moe.num_shared_experts": shared // width, "moe.shared_gated": True}


def write_shared_experts(cfg: ResolvedModel) -> Keys:
  return {SHARED_WIDTH: cfg.moe.num_shared_experts * cfg.moe.expert_width}


SHARED_WIDTH = "shared_expert_intermediate_size"
WINDOWS = Rule(read_windows, write_windows)
MOE_WINDOWS = Rule(functools.partial(read_windows, alternating=True), write_windows)
QWEN_MOE = (
  fixed(decoder_sparse_step=1, mlp_only_layers=[]),
  Key("num_experts", "moe.num_experts", older="num_local_experts"),
  Key("num_experts_per_tok", "moe.experts_per_token"),
  Key("moe_intermediate_size", "moe.expert_width", REQUIRED),
  Key("norm_topk_prob", "moe.normalized", False),
  Key("router_aux_loss_coef", "moe.load_balance_weight", 0.001),
)
QWEN_KEYS = defaults(KEYS, max_position_embeddings=32_768)
KV_HEADS = Key("num_key_value_heads", "num_kv_heads", 32, nullable=True)
QWEN2_SETTINGS = (*QWEN_KEYS, KV_HEADS, WINDOWS, ours(qkv_biased=True))
QWEN2_MOE_SETTINGS = (
  *(*QWEN_KEYS, dataclasses.replace(KV_HEADS, default=16), MOE_WINDOWS, *QWEN_MOE),
  Rule(read_shared_experts, write_shared_experts),
  Key("qkv_bias", "qkv_biased", True),
)
QWEN3_SETTINGS = (
  *(*defaults(QWEN_KEYS, head_dim=128), KV_HEADS, *BIASES, WINDOWS),
  ours(qk_norm="head"),
)
QWEN3_MOE_SETTINGS = (
  *(*defaults(QWEN_KEYS, num_key_value_heads=4), *BIASES, *QWEN_MOE),
  Rule(read_window, write_window),
  ours(qk_norm="head"),
)

# -- Gemma


def read_activation(hf: Values, found: Fields) -> Fields:
  if hf.values.get("hidden_activation") is not None:
    return Choice("hidden_activation", ACTIVATIONS, "gelu").read(hf, found)
  # The first files say gelu, but were trained with its tanh approximation.
  return {"activation": "gelu_tanh"} if found["activation"] == "gelu" else {}


def read_scale(hf: Values, found: Fields) -> Fields:
  scalar = hf.get(float, "query_pre_attn_scalar", 256.0)
  if scalar <= 0:
    raise hf.refused("query_pre_attn_scalar", "it is positive")
  return {"attention_scale": scalar**-0.5}


def write_scale(cfg: ResolvedModel) -> Keys:
  scale = cfg.attention_scale
  return {"query_pre_attn_scalar": round(scale**-2) if scale > 1e-4 else None}


def read_period(hf: Values, found: Fields) -> Fields:
  """Gemma 3's global layers, of which one follows several local ones."""
  period = hf.get(int, "sliding_window_pattern", 6)
  if not 0 < period < MOST_LAYERS:
    raise hf.refused("sliding_window_pattern", "it is positive")
  pattern = "L" * (period - 1) + "G"
  return {"layer_pattern": layer_pattern(hf, found["depth"], pattern)}


def read_both_ropes(hf: Values, found: Fields) -> Fields:
  """Gemma 3's RoPE, which has another base in local layers, and there no scaling."""
  of_kind, older_scaling = hf.inner("rope_parameters"), hf.inner("rope_scaling").values
  whole, local = of_kind.inner("full_attention"), of_kind.inner("sliding_attention")
  local.demand(rope_type="default", partial_rotary_factor=1.0)
  older = hf.get(float, "rope_local_base_freq", 10_000.0)
  fields = {"rope.local_theta": local.get(float, "rope_theta", older)}
  scaling = {**whole.values, **older_scaling}
  hf = Values({**hf.values, "rope_scaling": scaling, "rope_parameters": {}}, hf.origin)
  return fields | read_rope(hf, found)


def write_both_ropes(cfg: ResolvedModel) -> Keys:
  local = cfg.rope.local_theta or fixed_base(cfg).theta
  return {**write_rope(cfg), "rope_local_base_freq": local}


def read_local_window(hf: Values, found: Fields) -> Fields:
  if "sliding_window" in hf.values and hf.values["sliding_window"] is None:
    raise hf.refused("sliding_window", "local layers need one")
  return {"window": hf.get(int, "sliding_window", 4096)}


GEMMA_SETTINGS: tuple[Row, ...] = (
  *defaults(
    KEYS,
    hidden_act="gelu_pytorch_tanh",
    tie_word_embeddings=True,
    head_dim=256,
    num_key_value_heads=16,
    max_position_embeddings=8192,
  ),
  *BIASES,
  Rule(read_activation),
  fixed(use_bidirectional_attention=False),
  ours(embedding_scaled=True),
)
GEMMA_2_SETTINGS = (
  *defaults(GEMMA_SETTINGS, num_key_value_heads=4),
  EVEN_HEADS,
  # Written after it has been read from either key, so that any activation has a place.
  Rule(write=Choice("hidden_activation", ACTIVATIONS, "gelu").write),
  Rule(read_scale, write_scale),
  Key("attn_logit_softcapping", "attention_softcap", 50.0, nullable=True),
  Key("final_logit_softcapping", "logit_softcap", 30.0, nullable=True),
  Rule(read_local_window, lambda cfg: {"sliding_window": cfg.window or cfg.context}),
  Rule(
    lambda hf, found: {"layer_pattern": layer_pattern(hf, found["depth"], "LG")},
    lambda cfg: {"layer_types": layer_types(cfg)},
  ),
  ours(norm_placement="both"),
)
SOFTCAP = "attn_logit_softcapping"


def refuse_softcap(hf: Values, found: Fields) -> Fields:
  """Gemma 3 has the key, but its attention has no cap."""
  if hf.values.get(SOFTCAP) is not None:
    raise hf.refused(SOFTCAP, "this family has no such cap: set it to null")
  return {"attention_softcap": None}


# The defaults are those of the text model in a model with image input.
GEMMA_3_SETTINGS = (
  *defaults(
    tuple(row for row in GEMMA_2_SETTINGS if row is not ROPE),
    vocab_size=262_208,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=131_072,
    rope_theta=1e6,
    final_logit_softcapping=None,
  ),
  Rule(refuse_softcap, lambda cfg: {SOFTCAP: None}),
  Rule(read_both_ropes, write_both_ropes),
  Rule(read_period),
  ours(qk_norm="head"),
)

# -- Families ------------------------------------------------------------------------------


family = functools.partial(
  causal, embedding="model.embed_tokens", ignored=(r"rotary_emb\.inv_freq$",)
)
FAMILIES = (
  family("llama", "Llama", LLAMA, LLAMA_SETTINGS),
  family("mistral", "Mistral", LLAMA, MISTRAL_SETTINGS),
  family("mixtral", "Mixtral", MIXTRAL, MIXTRAL_SETTINGS),
  family("qwen2", "Qwen2", LLAMA, QWEN2_SETTINGS),
  family("qwen2_moe", "Qwen2Moe", QWEN2_MOE, QWEN2_MOE_SETTINGS),
  family("qwen3", "Qwen3", QWEN3, QWEN3_SETTINGS),
  family("qwen3_moe", "Qwen3Moe", QWEN3_MOE, QWEN3_MOE_SETTINGS),
  family("gemma", "Gemma", GEMMA, GEMMA_SETTINGS),
  family("gemma2", "Gemma2", GEMMA_2, GEMMA_2_SETTINGS),
  family("gemma3_text", "Gemma3", GEMMA_3, GEMMA_3_SETTINGS),
  Family(
    "gemma3",
    ("Gemma3ForConditionalGeneration", "Gemma3Model"),
    tuple(
      dataclasses.replace(row, theirs=f"language_model.{row.theirs}") for row in GEMMA_3
    ),
    GEMMA_3_SETTINGS,
    prefix="language_model.",
    tied=(("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"),),
    ignored=(r"^vision_tower\.", r"^multi_modal_projector\."),
    inner="text_config",
  ),
  family("phi3", "Phi3", PHI3, PHI3_SETTINGS),
  family("olmo2", "Olmo2", OLMO2, OLMO2_SETTINGS),
)
