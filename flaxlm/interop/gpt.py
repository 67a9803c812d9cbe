# SPDX-License-Identifier: Apache-2.0
"""Families with GPT's layer norms and biases: GPT-2, GPT-J, GPT-NeoX, BLOOM, OPT.

Sources: the configuration and modelling files of each family in `transformers`.
"""

import dataclasses
from typing import Any

from flaxlm.config import ModelConfig, ResolvedModel, RopeConfig
from flaxlm.errors import CheckpointError
from flaxlm.interop.family import Family
from flaxlm.interop.layouts import Rows, Weight, array, linear, norm
from flaxlm.interop.settings import (
  ACTIVATION_NAMES,
  Keys,
  Settings,
  head_dim,
  rope_keys,
  rotary_fraction,
  to_keys,
)

QKV = tuple(f"blocks/attention/{part}" for part in "qkv")
OURS: dict[str, Any] = dict(norm="layernorm", gated=False, biased=True)
BUFFERS = (r"attn\.(bias|masked_bias)$", r"attention\.(bias|masked_bias)$", r"inv_freq$")

# -- GPT-2 (Radford et al., 2019) ----------------------------------------------------------

H = "transformer.h.{l}."
GPT2 = (
  array("transformer.wte.weight", "embedding/table"),
  array("transformer.wpe.weight", "positions/table"),
  *norm("transformer.ln_f", "final_norm"),
  *norm(H + "ln_1", "blocks/attention_norm"),
  *norm(H + "ln_2", "blocks/ffn_norm"),
  *linear(H + "attn.c_attn", QKV, transposed=False),
  *linear(H + "attn.c_proj", "blocks/attention/o", inputs=2, transposed=False),
  *linear(H + "mlp.c_fc", "blocks/ffn/up", transposed=False),
  *linear(H + "mlp.c_proj", "blocks/ffn/down", transposed=False),
  *linear("lm_head", "head"),
)
GPT_KEYS: Keys = (
  ("vocab_size", "vocab_size"),
  ("n_embd", "width"),
  ("n_layer", "depth"),
  ("n_head", "num_heads"),
  ("n_inner", "ffn_width"),
  ("n_positions", "context"),
  ("layer_norm_epsilon", "norm_epsilon"),
  ("tie_word_embeddings", "tied_embeddings"),
)
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


def read_gpt2(hf: Settings) -> ModelConfig:
  hf.demand(
    scale_attn_weights=True,
    scale_attn_by_inverse_layer_idx=False,
    reorder_and_upcast_attn=False,
    add_cross_attention=False,
  )
  defaults = {"layer_norm_epsilon": 1e-5, "n_positions": 1024, "tie_word_embeddings": True}
  return ModelConfig(
    **hf.fields(GPT_KEYS, defaults),
    activation=hf.activation("activation_function", "gelu_new"),
    positions="learned",
    **OURS,
  )


def write_gpt2(cfg: ResolvedModel) -> dict[str, Any]:
  name = ACTIVATION_NAMES[cfg.activation]
  return {**to_keys(cfg, GPT_KEYS), "activation_function": name, **NO_DROPOUT}


# -- GPT-J (Wang & Komatsuzaki, 2021) ------------------------------------------------------


def gptj(cfg: ResolvedModel) -> tuple[Weight, ...]:
  turning = 2 * int(cfg.head_dim * cfg.rope.fraction / 2)
  return (
    array("transformer.wte.weight", "embedding/table"),
    *norm("transformer.ln_f", "final_norm"),
    *norm(H + "ln_1", "blocks/attention_norm"),
    *linear(H + "attn.q_proj", "blocks/attention/q", pairs=turning),
    *linear(H + "attn.k_proj", "blocks/attention/k", pairs=turning),
    *linear(H + "attn.v_proj", "blocks/attention/v"),
    *linear(H + "attn.out_proj", "blocks/attention/o", inputs=2),
    *linear(H + "mlp.fc_in", "blocks/ffn/up"),
    *linear(H + "mlp.fc_out", "blocks/ffn/down"),
    array("lm_head.bias", "head_bias"),
    *linear("lm_head", "head")[:1],
  )


def read_gptj(hf: Settings) -> ModelConfig:
  defaults = {"layer_norm_epsilon": 1e-5, "n_positions": 2048, "tie_word_embeddings": False}
  cfg = ModelConfig(
    **hf.fields(GPT_KEYS, defaults),
    activation=hf.activation("activation_function", "gelu_new"),
    parallel="one_norm",
    qkv_biased=False,
    o_biased=False,
    head_biased=True,
    **OURS,
  )
  size = head_dim(hf, cfg)
  fraction = rotary_fraction(hf.get(int, "rotary_dim", size), size)
  return dataclasses.replace(cfg, rope=RopeConfig(fraction=fraction))


def write_gptj(cfg: ResolvedModel) -> dict[str, Any]:
  return {**write_gpt2(cfg), "rotary_dim": 2 * int(cfg.head_dim * cfg.rope.fraction / 2)}


# -- GPT-NeoX (Black et al., 2022), Pythia (Biderman et al., 2023) -------------------------

N = "gpt_neox.layers.{l}."
NEOX = (
  array("gpt_neox.embed_in.weight", "embedding/table"),
  *norm("gpt_neox.final_layer_norm", "final_norm"),
  *norm(N + "input_layernorm", "blocks/attention_norm"),
  *norm(N + "post_attention_layernorm", "blocks/ffn_norm"),
  *linear(N + "attention.query_key_value", QKV, interleaved=True),
  *linear(N + "attention.dense", "blocks/attention/o", inputs=2),
  *linear(N + "mlp.dense_h_to_4h", "blocks/ffn/up"),
  *linear(N + "mlp.dense_4h_to_h", "blocks/ffn/down"),
  *linear("embed_out", "head"),
)
NEOX_KEYS: Keys = (
  ("vocab_size", "vocab_size"),
  ("hidden_size", "width"),
  ("num_hidden_layers", "depth"),
  ("num_attention_heads", "num_heads"),
  ("intermediate_size", "ffn_width"),
  ("max_position_embeddings", "context"),
  ("layer_norm_eps", "norm_epsilon"),
  ("tie_word_embeddings", "tied_embeddings"),
)


def read_neox(hf: Settings) -> ModelConfig:
  defaults = {
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
  }
  biased = hf.get(bool, "attention_bias", True)
  cfg = ModelConfig(
    **hf.fields(NEOX_KEYS, defaults),
    activation=hf.activation("hidden_act", "gelu"),
    parallel="two_norms" if hf.get(bool, "use_parallel_residual", True) else "none",
    qkv_biased=biased,
    o_biased=biased,
    **OURS,
  )
  defaults = {"partial_rotary_factor": hf.get(float, "rotary_pct", 0.25)}
  defaults["rope_theta"] = hf.get(float, "rotary_emb_base", 10_000.0)
  rope = hf.rope(head_dim(hf, cfg), cfg.context, defaults)
  return dataclasses.replace(cfg, rope=rope)


def write_neox(cfg: ResolvedModel) -> dict[str, Any]:
  rope = rope_keys(cfg.rope, cfg.head_dim)
  return {
    **to_keys(cfg, NEOX_KEYS),
    "hidden_act": ACTIVATION_NAMES[cfg.activation],
    "use_parallel_residual": cfg.parallel == "two_norms",
    "attention_bias": cfg.qkv_biased,
    "rotary_pct": cfg.rope.fraction,
    "rotary_emb_base": rope["rope_theta"],
    "partial_rotary_factor": cfg.rope.fraction,
    **rope,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
  }


# -- BLOOM (BigScience, 2022) --------------------------------------------------------------

BLOOM = (
  array("transformer.word_embeddings.weight", "embedding/table"),
  *norm("transformer.word_embeddings_layernorm", "embedding_norm"),
  *norm("transformer.ln_f", "final_norm"),
  *norm(H + "input_layernorm", "blocks/attention_norm"),
  *norm(H + "post_attention_layernorm", "blocks/ffn_norm"),
  *linear(H + "self_attention.query_key_value", QKV, interleaved=True),
  *linear(H + "self_attention.dense", "blocks/attention/o", inputs=2),
  *linear(H + "mlp.dense_h_to_4h", "blocks/ffn/up"),
  *linear(H + "mlp.dense_4h_to_h", "blocks/ffn/down"),
  *linear("lm_head", "head"),
)
BLOOM_KEYS: Keys = (
  ("vocab_size", "vocab_size"),
  ("hidden_size", "width"),
  ("n_layer", "depth"),
  ("n_head", "num_heads"),
  ("seq_length", "context"),
  ("layer_norm_epsilon", "norm_epsilon"),
  ("tie_word_embeddings", "tied_embeddings"),
)
# Names of keys in older files.
BLOOM_NAMES = {"n_embed": "hidden_size", "num_hidden_layers": "n_layer"}
BLOOM_NAMES["num_attention_heads"] = "n_head"


def read_bloom(hf: Settings) -> ModelConfig:
  older = {new: hf.values[old] for old, new in BLOOM_NAMES.items() if old in hf.values}
  hf = Settings(older | dict(hf.values), hf.origin, hf.names)
  hf.demand(apply_residual_connection_post_layernorm=False)
  defaults = {"layer_norm_epsilon": 1e-5, "seq_length": 2048, "tie_word_embeddings": True}
  return ModelConfig(
    **hf.fields(BLOOM_KEYS, defaults),
    activation="gelu_tanh",
    positions="alibi",
    embedding_norm=True,
    **OURS,
  )


def write_bloom(cfg: ResolvedModel) -> dict[str, Any]:
  none = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
  return {**to_keys(cfg, BLOOM_KEYS), **none}


# -- OPT (Zhang et al., 2022) --------------------------------------------------------------

P = "model.decoder.layers.{l}."
OPT = (
  array("model.decoder.embed_tokens.weight", "embedding/table"),
  array("model.decoder.embed_positions.weight", "positions/table", Rows(2)),
  *norm("model.decoder.final_layer_norm", "final_norm"),
  *norm(P + "self_attn_layer_norm", "blocks/attention_norm"),
  *norm(P + "final_layer_norm", "blocks/ffn_norm"),
  *linear(P + "self_attn.q_proj", "blocks/attention/q"),
  *linear(P + "self_attn.k_proj", "blocks/attention/k"),
  *linear(P + "self_attn.v_proj", "blocks/attention/v"),
  *linear(P + "self_attn.out_proj", "blocks/attention/o", inputs=2),
  *linear(P + "fc1", "blocks/ffn/up"),
  *linear(P + "fc2", "blocks/ffn/down"),
  *linear("lm_head", "head"),
)
OPT_KEYS: Keys = (
  ("vocab_size", "vocab_size"),
  ("hidden_size", "width"),
  ("num_hidden_layers", "depth"),
  ("num_attention_heads", "num_heads"),
  ("ffn_dim", "ffn_width"),
  ("max_position_embeddings", "context"),
  ("tie_word_embeddings", "tied_embeddings"),
)


def read_opt(hf: Settings) -> ModelConfig:
  hf.demand(_remove_final_layer_norm=False, layer_norm_elementwise_affine=True)
  hf.demand(enable_bias=True)
  width = hf.get(int, "hidden_size")
  if hf.get(int, "word_embed_proj_dim", width) != width:
    raise CheckpointError(
      f"{hf.origin}: the embedding is projected to another width (word_embed_proj_dim), "
      "as in OPT-350m alone",
      "flaxlm does not support it; every other OPT works",
    )
  placement: Any = "pre" if hf.get(bool, "do_layer_norm_before", True) else "post"
  return ModelConfig(
    **hf.fields(OPT_KEYS, {"max_position_embeddings": 2048, "tie_word_embeddings": True}),
    activation=hf.activation("activation_function", "relu"),
    positions="learned",
    norm_epsilon=1e-5,
    norm_placement=placement,
    **OURS,
  )


def write_opt(cfg: ResolvedModel) -> dict[str, Any]:
  return {
    **to_keys(cfg, OPT_KEYS),
    "activation_function": ACTIVATION_NAMES[cfg.activation],
    "do_layer_norm_before": cfg.norm_placement == "pre",
    "word_embed_proj_dim": cfg.width,
    "attention_dropout": 0.0,
    "dropout": 0.0,
  }


# -- Families ------------------------------------------------------------------------------


def family(
  model_type: str, name: str, prefix: str, weights: Any, read: Any, write: Any
) -> Family:
  rows = weights if callable(weights) else lambda _: weights
  embedding, *_ = rows(ModelConfig().resolve(1))
  head = "embed_out.weight" if model_type == "gpt_neox" else "lm_head.weight"
  return Family(
    model_type,
    (f"{name}{'LMHeadModel' if model_type == 'gpt2' else 'ForCausalLM'}", f"{name}Model"),
    rows,
    read,
    write,
    prefix,
    tied=((head, embedding.theirs),),
    ignored=BUFFERS,
  )


FAMILIES = (
  family("gpt2", "GPT2", "transformer.", GPT2, read_gpt2, write_gpt2),
  family("gpt_neox", "GPTNeoX", "gpt_neox.", NEOX, read_neox, write_neox),
  family("gptj", "GPTJ", "transformer.", gptj, read_gptj, write_gptj),
  family("bloom", "Bloom", "transformer.", BLOOM, read_bloom, write_bloom),
  family("opt", "OPT", "model.", OPT, read_opt, write_opt),
)
