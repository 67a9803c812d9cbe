# SPDX-License-Identifier: Apache-2.0
"""Families with GPT's layer norms and biases: GPT-2, GPT-J, GPT-NeoX, BLOOM, OPT.

Sources: the configuration and modelling files of each family in `transformers`.
"""

import functools

from flaxlm.config import ResolvedModel
from flaxlm.errors import CheckpointError
from flaxlm.interop.family import Table, causal
from flaxlm.interop.layouts import Rows, array, linear, linears, norm
from flaxlm.interop.settings import (
  ACTIVATIONS,
  PARTIAL,
  SIZES,
  Choice,
  Fields,
  Key,
  Keys,
  Row,
  Rule,
  defaults,
  fixed,
  head_dim,
  ours,
  read_rope,
  rotary_dims,
  rotary_fraction,
  write_partial_rope,
  written,
)
from flaxlm.interop.values import REQUIRED, Values

QKV = tuple(f"blocks/attention/{part}" for part in "qkv")
OURS = ours(norm="layernorm", gated=False, biased=True)
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
  *linear(H + "attn.c_proj", "blocks/attention/o", transposed=False),
  *linear(H + "mlp.c_fc", "blocks/ffn/up", transposed=False),
  *linear(H + "mlp.c_proj", "blocks/ffn/down", transposed=False),
  *linear("lm_head", "head"),
)
GPT_KEYS: tuple[Row, ...] = (
  OURS,
  Key("vocab_size", "vocab_size", REQUIRED),
  Key("n_embd", "width"),
  Key("n_layer", "depth"),
  Key("n_head", "num_heads"),
  Key("n_inner", "ffn_width"),
  Key("n_positions", "context", 1024),
  Key("layer_norm_epsilon", "norm_epsilon", 1e-5),
  Key("tie_word_embeddings", "tied_embeddings", True),
  Choice("activation_function", ACTIVATIONS, "gelu_new"),
  written(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
)
GPT2_SETTINGS = (
  *GPT_KEYS,
  ours(positions="learned"),
  fixed(
    scale_attn_weights=True,
    scale_attn_by_inverse_layer_idx=False,
    reorder_and_upcast_attn=False,
    add_cross_attention=False,
  ),
)

# -- GPT-J (Wang & Komatsuzaki, 2021) ------------------------------------------------------


def gptj(cfg: ResolvedModel) -> Table:
  turning = rotary_dims(cfg)
  return (
    array("transformer.wte.weight", "embedding/table"),
    *norm("transformer.ln_f", "final_norm"),
    *norm(H + "ln_1", "blocks/attention_norm"),
    *linear(H + "attn.q_proj", "blocks/attention/q", pairs=turning),
    *linear(H + "attn.k_proj", "blocks/attention/k", pairs=turning),
    *linears(H + "attn.", "blocks/attention/", v="v_proj", o="out_proj"),
    *linears(H + "mlp.", "blocks/ffn/", up="fc_in", down="fc_out"),
    array("lm_head.bias", "head_bias"),
    *linear("lm_head", "head"),
  )


def read_rotary_dim(hf: Values, found: Fields) -> Fields:
  size = head_dim(hf, found)
  return {"rope.fraction": rotary_fraction(hf.get(int, "rotary_dim", 64), size)}


GPTJ_SETTINGS = (
  *defaults(GPT_KEYS, n_positions=2048, tie_word_embeddings=False),
  Rule(read_rotary_dim, lambda cfg: {"rotary_dim": rotary_dims(cfg)}),
  ours(parallel="one_norm", qkv_biased=False, o_biased=False, head_biased=True),
)

# -- GPT-NeoX (Black et al., 2022), Pythia (Biderman et al., 2023) -------------------------

N = "gpt_neox.layers.{l}."
NEOX = (
  array("gpt_neox.embed_in.weight", "embedding/table"),
  *norm("gpt_neox.final_layer_norm", "final_norm"),
  *norm(N + "input_layernorm", "blocks/attention_norm"),
  *norm(N + "post_attention_layernorm", "blocks/ffn_norm"),
  *linear(N + "attention.query_key_value", QKV, interleaved=True),
  *linear(N + "attention.dense", "blocks/attention/o"),
  *linears(N + "mlp.", "blocks/ffn/", up="dense_h_to_4h", down="dense_4h_to_h"),
  *linear("embed_out", "head"),
)
NEOX_ROPE = {"rope_theta": "rotary_emb_base", PARTIAL: "rotary_pct"}  # its own names


def read_neox_rope(hf: Values, found: Fields) -> Fields:
  """RoPE by NeoX's own names: the usual ones count within rope_parameters only."""
  own = {name: hf.values.get(key) for name, key in NEOX_ROPE.items()}
  given = {name: value for name, value in own.items() if value is not None}
  others = {key: value for key, value in hf.values.items() if key not in NEOX_ROPE}
  hf = Values(others | given, hf.origin)
  return read_rope(hf, found | {"rope.fraction": 0.25}, partial=True)


def write_neox_rope(cfg: ResolvedModel) -> Keys:
  keys = {PARTIAL: 1.0, **write_partial_rope(cfg)}
  keys |= {own: keys[name] for name, own in NEOX_ROPE.items()}
  return {name: value for name, value in keys.items() if name != PARTIAL}


NEOX_SETTINGS = (
  OURS,
  *SIZES,
  Key("intermediate_size", "ffn_width", REQUIRED),
  Key("layer_norm_eps", "norm_epsilon", 1e-5),
  Key("tie_word_embeddings", "tied_embeddings", False),
  Choice("hidden_act", ACTIVATIONS, "gelu"),
  Choice(
    "use_parallel_residual",
    {True: {"parallel": "two_norms"}, False: {"parallel": "none"}},
    True,
  ),
  Key("attention_bias", "o_biased", True),
  Key("attention_bias", "qkv_biased", True),
  Rule(read_neox_rope, write_neox_rope),
  written(attention_dropout=0.0, hidden_dropout=0.0),
)

# -- BLOOM (BigScience, 2022) --------------------------------------------------------------

BLOOM = (
  array("transformer.word_embeddings.weight", "embedding/table"),
  *norm("transformer.word_embeddings_layernorm", "embedding_norm"),
  *norm("transformer.ln_f", "final_norm"),
  *norm(H + "input_layernorm", "blocks/attention_norm"),
  *norm(H + "post_attention_layernorm", "blocks/ffn_norm"),
  *linear(H + "self_attention.query_key_value", QKV, interleaved=True),
  *linear(H + "self_attention.dense", "blocks/attention/o"),
  *linears(H + "mlp.", "blocks/ffn/", up="dense_h_to_4h", down="dense_4h_to_h"),
  *linear("lm_head", "head"),
)
BLOOM_SETTINGS = (
  OURS,
  ours(activation="gelu_tanh", positions="alibi", embedding_norm=True),
  Key("vocab_size", "vocab_size", REQUIRED),
  Key("hidden_size", "width", older="n_embed"),
  Key("n_embed", "width"),  # of two, transformers takes this one
  Key("n_layer", "depth", older="num_hidden_layers"),
  Key("n_head", "num_heads", older="num_attention_heads"),
  Key("seq_length", "context", 2048),
  Key("layer_norm_epsilon", "norm_epsilon", 1e-5),
  Key("tie_word_embeddings", "tied_embeddings", True),
  fixed(apply_residual_connection_post_layernorm=False),
  written(attention_dropout=0.0, hidden_dropout=0.0),
)

# -- OPT (Zhang et al., 2022) --------------------------------------------------------------

P = "model.decoder.layers.{l}."
OPT = (
  array("model.decoder.embed_tokens.weight", "embedding/table"),
  array("model.decoder.embed_positions.weight", "positions/table", Rows(2)),
  *norm("model.decoder.final_layer_norm", "final_norm"),
  *norm(P + "self_attn_layer_norm", "blocks/attention_norm"),
  *norm(P + "final_layer_norm", "blocks/ffn_norm"),
  *linears(P + "self_attn.", "blocks/attention/", q="q_proj", k="k_proj", v="v_proj"),
  *linear(P + "self_attn.out_proj", "blocks/attention/o"),
  *linears(P, "blocks/ffn/", up="fc1", down="fc2"),
  *linear("lm_head", "head"),
)


def refuse_projection(hf: Values, found: Fields) -> Fields:
  if hf.get(int, "word_embed_proj_dim", found["width"]) != found["width"]:
    raise CheckpointError(
      f"{hf.origin}: the embedding is projected to another width (word_embed_proj_dim), "
      "as in OPT-350m alone",
      "flaxlm does not support it; every other OPT works",
    )
  return {}


OPT_SETTINGS = (
  OURS,
  ours(positions="learned", norm_epsilon=1e-5),
  *SIZES,
  Key("ffn_dim", "ffn_width", REQUIRED),
  Key("tie_word_embeddings", "tied_embeddings", True),
  Choice("activation_function", ACTIVATIONS, "relu"),
  Choice(
    "do_layer_norm_before",
    {True: {"norm_placement": "pre"}, False: {"norm_placement": "post"}},
    True,
  ),
  Rule(refuse_projection, lambda cfg: {"word_embed_proj_dim": cfg.width}),
  fixed(
    _remove_final_layer_norm=False, layer_norm_elementwise_affine=True, enable_bias=True
  ),
  written(attention_dropout=0.0, dropout=0.0),
)

# -- Families ------------------------------------------------------------------------------


family = functools.partial(causal, ignored=BUFFERS)
FAMILIES = (
  family("gpt2", "GPT2", GPT2, GPT2_SETTINGS, "transformer.wte", suffix="LMHeadModel"),
  family("gpt_neox", "GPTNeoX", NEOX, NEOX_SETTINGS, "gpt_neox.embed_in", "embed_out"),
  family("gptj", "GPTJ", gptj, GPTJ_SETTINGS, "transformer.wte"),
  family("bloom", "Bloom", BLOOM, BLOOM_SETTINGS, "transformer.word_embeddings"),
  family("opt", "OPT", OPT, OPT_SETTINGS, "model.decoder.embed_tokens"),
)
