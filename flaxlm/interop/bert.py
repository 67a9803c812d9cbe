# SPDX-License-Identifier: Apache-2.0
"""Families with an encoder: BERT, RoBERTa, T5 and FLAN-T5.

Sources: the configuration and modelling files of each family in `transformers`.
"""

from typing import Any

from flaxlm.config import ModelConfig, ResolvedModel
from flaxlm.interop.family import Family
from flaxlm.interop.layouts import Rows, Weight, array, linear, norm
from flaxlm.interop.settings import ACTIVATION_NAMES, Keys, Settings, to_keys

# -- BERT (Devlin et al., 2019), RoBERTa (Liu et al., 2019) --------------------------------

# The id of RoBERTa's first position: 1 more than that of its padding.
ROBERTA_OFFSET = 2


def encoder(prefix: str, positions: Any) -> tuple[Weight, ...]:
  ends, layer = f"{prefix}.embeddings.", prefix + ".encoder.layer.{l}."
  return (
    array(ends + "word_embeddings.weight", "embedding/table"),
    positions(ends + "position_embeddings.weight", "positions/table"),
    array(ends + "token_type_embeddings.weight", "token_types/table"),
    *norm(ends + "LayerNorm", "embedding_norm"),
    *linear(layer + "attention.self.query", "blocks/attention/q"),
    *linear(layer + "attention.self.key", "blocks/attention/k"),
    *linear(layer + "attention.self.value", "blocks/attention/v"),
    *linear(layer + "attention.output.dense", "blocks/attention/o", inputs=2),
    *norm(layer + "attention.output.LayerNorm", "blocks/attention_norm"),
    *linear(layer + "intermediate.dense", "blocks/ffn/up"),
    *linear(layer + "output.dense", "blocks/ffn/down"),
    *norm(layer + "output.LayerNorm", "blocks/ffn_norm"),
    *linear(f"{prefix}.pooler.dense", "pooler"),
  )


BERT = (
  *encoder("bert", array),
  *linear("cls.predictions.transform.dense", "head_transform/dense"),
  *norm("cls.predictions.transform.LayerNorm", "head_transform/norm"),
)
ROBERTA = (
  *encoder("roberta", lambda theirs, ours: array(theirs, ours, Rows(ROBERTA_OFFSET))),
  *linear("lm_head.dense", "head_transform/dense"),
  *norm("lm_head.layer_norm", "head_transform/norm"),
)


def with_head(rows: tuple[Weight, ...], bias: str, head: str, tied: bool) -> Any:
  """The table of an encoder with its head. An untied head is stored with its bias twice."""
  biases = array(f"{bias}.bias", "head_bias"), array(f"{head}.bias", "head_bias")
  return *rows, *biases[: 1 if tied else 2], *linear(head, "head")[:1]


def bert(cfg: ResolvedModel) -> tuple[Weight, ...]:
  names = ("cls.predictions", "cls.predictions.decoder")
  return with_head(BERT, *names, cfg.tied_embeddings)


def roberta(cfg: ResolvedModel) -> tuple[Weight, ...]:
  return with_head(ROBERTA, "lm_head", "lm_head.decoder", cfg.tied_embeddings)


KEYS: Keys = (
  ("vocab_size", "vocab_size"),
  ("hidden_size", "width"),
  ("num_hidden_layers", "depth"),
  ("num_attention_heads", "num_heads"),
  ("intermediate_size", "ffn_width"),
  ("max_position_embeddings", "context"),
  ("type_vocab_size", "num_token_types"),
  ("layer_norm_eps", "norm_epsilon"),
  ("tie_word_embeddings", "tied_embeddings"),
)


def read_bert(hf: Settings, head: str = "cls.predictions.bias", **ours: Any) -> ModelConfig:
  hf.demand(position_embedding_type="absolute", is_decoder=False)
  defaults = {"type_vocab_size": 2, "layer_norm_eps": 1e-12, "tie_word_embeddings": True}
  fields = hf.fields(KEYS, defaults) | ours
  has_head = hf.has(head)  # encoders for sentence embeddings have none
  if not has_head:
    fields["tied_embeddings"] = True
  return ModelConfig(
    **fields,
    family="encoder",
    activation=hf.activation("hidden_act", "gelu"),
    positions="learned",
    norm="layernorm",
    norm_placement="post",
    embedding_norm=True,
    gated=False,
    biased=True,
    head_transform=has_head,
    head_biased=has_head,
    pooler=hf.has("pooler.dense.weight"),
  )


def write_bert(cfg: ResolvedModel) -> dict[str, Any]:
  return {
    **to_keys(cfg, KEYS),
    "hidden_act": ACTIVATION_NAMES[cfg.activation],
    "position_embedding_type": "absolute",
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
  }


def read_roberta(hf: Settings) -> ModelConfig:
  hf.demand(pad_token_id=ROBERTA_OFFSET - 1)
  rows = hf.get(int, "max_position_embeddings")
  return read_bert(hf, "lm_head.layer_norm.weight", context=rows - ROBERTA_OFFSET)


def write_roberta(cfg: ResolvedModel) -> dict[str, Any]:
  rows = cfg.context + ROBERTA_OFFSET
  padding = ROBERTA_OFFSET - 1
  return {**write_bert(cfg), "max_position_embeddings": rows, "pad_token_id": padding}


# -- T5 (Raffel et al., 2020), FLAN-T5 (Chung et al., 2022) --------------------------------


def t5_stack(name: str, ffn: int) -> tuple[Weight, ...]:
  """One of the two stacks. Its feed-forward is sub-layer number `ffn` of a layer."""
  layer, ours = name + ".block.{l}.layer.", f"{name}/blocks/"
  attention, dense = layer + "0.SelfAttention.", f"{layer}{ffn}.DenseReluDense."
  bias = f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
  return (
    array(bias, f"{name}/relative_bias/table"),
    *linear(attention + "q", ours + "attention/q")[:1],
    *linear(attention + "k", ours + "attention/k")[:1],
    *linear(attention + "v", ours + "attention/v")[:1],
    *linear(attention + "o", ours + "attention/o", inputs=2)[:1],
    *norm(layer + "0.layer_norm", ours + "attention_norm")[:1],
    *linear(dense + "wo", ours + "ffn/down")[:1],
    *norm(f"{layer}{ffn}.layer_norm", ours + "ffn_norm")[:1],
    array(f"{name}.final_layer_norm.weight", f"{name}/final_norm/scale"),
  )


def t5(cfg: ResolvedModel) -> tuple[Weight, ...]:
  cross, ours = "decoder.block.{l}.layer.1.", "decoder/blocks/"
  wi, stacks = "block.{l}.layer.%d.DenseReluDense.wi", (("encoder", 1), ("decoder", 2))
  ffn: list[Weight] = []
  for name, part in stacks:
    inner, into = f"{name}.{wi % part}", f"{name}/blocks/ffn/"
    ffn += linear(inner + ("_1" if cfg.gated else ""), into + "up")[:1]
    ffn += linear(inner + "_0", into + "gate")[:1]
  return (
    array("shared.weight", "embedding/table"),
    *t5_stack("encoder", 1),
    *t5_stack("decoder", 2),
    *ffn,
    *linear(cross + "EncDecAttention.q", ours + "cross_attention/q")[:1],
    *linear(cross + "EncDecAttention.k", ours + "cross_attention/k")[:1],
    *linear(cross + "EncDecAttention.v", ours + "cross_attention/v")[:1],
    *linear(cross + "EncDecAttention.o", ours + "cross_attention/o", inputs=2)[:1],
    *norm(cross + "layer_norm", ours + "cross_attention_norm")[:1],
    *linear("lm_head", "head")[:1],
  )


T5_KEYS: Keys = (
  ("vocab_size", "vocab_size"),
  ("d_model", "width"),
  ("d_kv", "head_dim"),
  ("d_ff", "ffn_width"),
  ("num_layers", "encoder_depth"),
  ("num_decoder_layers", "depth"),
  ("num_heads", "num_heads"),
  ("n_positions", "context"),
  ("relative_attention_num_buckets", "relative_buckets"),
  ("relative_attention_max_distance", "relative_distance"),
  ("layer_norm_epsilon", "norm_epsilon"),
)
FFNS = {"relu": ("relu", False), "gated-gelu": ("gelu_tanh", True)}
FFNS |= {"gated-silu": ("silu", True), "gelu_new": ("gelu_tanh", False)}


def read_t5(hf: Settings) -> ModelConfig:
  depth = hf.get(int, "num_layers")
  defaults = {
    "num_decoder_layers": depth,
    "n_positions": 512,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
  }
  fields = hf.fields(T5_KEYS, defaults)
  ffn = hf.get(str, "feed_forward_proj", "relu")
  if ffn not in FFNS:
    raise hf.refused("feed_forward_proj", f"it can be {', '.join(FFNS)}")
  activation: Any
  activation, gated = FFNS[ffn]
  # T5 scales the input of its tied head. T5 1.1 and FLAN-T5 have an untied head, without
  # scaling. Newer files have a key for it, and may tie a head without scaling.
  tied = hf.get(bool, "tie_word_embeddings", True)
  scaled = hf.get(bool, "scale_decoder_outputs", tied)
  tied = tied and not (hf.has("lm_head.weight") and not scaled)
  return ModelConfig(
    **fields,
    family="encoder_decoder",
    activation=activation,
    gated=gated,
    positions="relative",
    attention_scale=1.0,
    tied_embeddings=tied,
    logit_scale=max(1, fields["width"]) ** -0.5 if scaled else 1.0,
  )


def write_t5(cfg: ResolvedModel) -> dict[str, Any]:
  ffns = {ours: theirs for theirs, ours in FFNS.items()}
  scaled = cfg.logit_scale != 1
  return {
    **to_keys(cfg, T5_KEYS),
    "feed_forward_proj": ffns.get((cfg.activation, cfg.gated), "relu"),
    "tie_word_embeddings": cfg.tied_embeddings,
    "scale_decoder_outputs": scaled,
    "is_encoder_decoder": True,
    "dropout_rate": 0.0,
  }


# -- Families ------------------------------------------------------------------------------

# Older names, in the first checkpoints, which were converted from TensorFlow.
GAMMA_BETA = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))

FAMILIES = (
  Family(
    "bert",
    ("BertForMaskedLM", "BertModel"),
    bert,
    read_bert,
    write_bert,
    prefix="bert.",
    renamed=GAMMA_BETA,
    tied=(
      ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
      ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ),
    ignored=(r"embeddings\.position_ids$", r"^cls\.seq_relationship\."),
  ),
  Family(
    "roberta",
    ("RobertaForMaskedLM", "RobertaModel"),
    roberta,
    read_roberta,
    write_roberta,
    prefix="roberta.",
    renamed=GAMMA_BETA,
    tied=(
      ("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
      ("lm_head.decoder.bias", "lm_head.bias"),
    ),
    ignored=(r"embeddings\.position_ids$",),
  ),
  Family(
    "t5",
    ("T5ForConditionalGeneration", "T5Model"),
    t5,
    read_t5,
    write_t5,
    prefix="",
    tied=(
      ("lm_head.weight", "shared.weight"),
      ("encoder.embed_tokens.weight", "shared.weight"),
      ("decoder.embed_tokens.weight", "shared.weight"),
    ),
    # T5's first checkpoints have this bias in their first layer; no model uses it.
    ignored=(
      r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",
    ),
  ),
)
