# SPDX-License-Identifier: Apache-2.0
"""Families with an encoder: BERT, RoBERTa, T5 and FLAN-T5.

Sources: the configuration and modelling files of each family in `transformers`.
"""

from flaxlm.config import ResolvedModel
from flaxlm.interop.family import Family, Table
from flaxlm.interop.layouts import Dense, Layout, Rows, array, linear, linears, norm
from flaxlm.interop.settings import (
  ACTIVATIONS,
  SIZES,
  Choice,
  Fields,
  Key,
  Keys,
  Row,
  Rule,
  defaults,
  fixed,
  ours,
  written,
)
from flaxlm.interop.values import REQUIRED, Values

# -- BERT (Devlin et al., 2019), RoBERTa (Liu et al., 2019) --------------------------------

# The id of RoBERTa's first position: 1 more than that of its padding.
ROBERTA_OFFSET = 2


def read_heads(head: str) -> Rule:
  """Whether there is a head, which the tensor `head` tells, and a pooler.

  Encoders for sentence embeddings have no head.
  """

  def read(hf: Values, found: Fields) -> Fields:
    headed = hf.has(head)
    return {
      "tied_embeddings": found["tied_embeddings"] or not headed,
      "head_transform": headed,
      "head_biased": headed,
      "pooler": hf.has("pooler.dense.weight"),
    }

  return Rule(read)


def refuse_no_types(hf: Values, found: Fields) -> Fields:
  if not found["num_token_types"]:
    raise hf.refused("type_vocab_size", "it is at least 1")
  return {}


ENCODER: tuple[Row, ...] = (
  *defaults(SIZES, max_position_embeddings=REQUIRED),
  Key("intermediate_size", "ffn_width", REQUIRED),
  Key("type_vocab_size", "num_token_types", 2),
  Rule(refuse_no_types),
  Key("layer_norm_eps", "norm_epsilon", 1e-12),
  Key("tie_word_embeddings", "tied_embeddings", True),
  Choice("hidden_act", ACTIVATIONS, "gelu"),
  fixed(position_embedding_type="absolute", is_decoder=False),
  written(attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0),
  ours(
    family="encoder",
    positions="learned",
    norm="layernorm",
    norm_placement="post",
    embedding_norm=True,
    gated=False,
    biased=True,
  ),
)
BERT_SETTINGS = (*ENCODER, read_heads("cls.predictions.bias"))
ROBERTA_SETTINGS = (
  *ENCODER,
  read_heads("lm_head.layer_norm.weight"),
  Rule(
    lambda hf, found: {"context": found["context"] - ROBERTA_OFFSET},
    lambda cfg: {"max_position_embeddings": cfg.context + ROBERTA_OFFSET},
  ),
  fixed(pad_token_id=ROBERTA_OFFSET - 1),
)

# Older names, in the first checkpoints, which were converted from TensorFlow.
GAMMA_BETA = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))


def encoder(
  model_type: str,
  name: str,
  settings: tuple[Row, ...],
  positions: Layout,
  head: str,
  transform: str,
  transform_norm: str,
  ignored: tuple[str, ...] = (),
) -> Family:
  """The family of an encoder; `head` and what follows are modules of its head."""
  ends, layer = f"{model_type}.embeddings.", model_type + ".encoder.layer.{l}."
  rows = (
    array(ends + "word_embeddings.weight", "embedding/table"),
    array(ends + "position_embeddings.weight", "positions/table", positions),
    array(ends + "token_type_embeddings.weight", "token_types/table"),
    *norm(ends + "LayerNorm", "embedding_norm"),
    *linears(layer + "attention.self.", "blocks/attention/", q="query", k="key", v="value"),
    *linear(layer + "attention.output.dense", "blocks/attention/o"),
    *norm(layer + "attention.output.LayerNorm", "blocks/attention_norm"),
    *linear(layer + "intermediate.dense", "blocks/ffn/up"),
    *linear(layer + "output.dense", "blocks/ffn/down"),
    *norm(layer + "output.LayerNorm", "blocks/ffn_norm"),
    *linear(f"{model_type}.pooler.dense", "pooler"),
    *linear(transform, "head_transform/dense"),
    *norm(transform_norm, "head_transform/norm"),
    array(f"{head}.decoder.weight", "head/kernel", Dense()),
    array(f"{head}.bias", "head_bias"),
  )

  def weights(cfg: ResolvedModel) -> Table:
    # An untied head is stored with its bias twice.
    twice = () if cfg.tied_embeddings else (array(f"{head}.decoder.bias", "head_bias"),)
    return (*rows, *twice)

  return Family(
    model_type,
    (f"{name}ForMaskedLM", f"{name}Model"),
    weights,
    settings,
    prefix=f"{model_type}.",
    renamed=GAMMA_BETA,
    tied=(
      (f"{head}.decoder.weight", ends + "word_embeddings.weight"),
      (f"{head}.decoder.bias", f"{head}.bias"),
    ),
    ignored=(r"embeddings\.position_ids$", *ignored),
  )


BERT = encoder(
  "bert",
  "Bert",
  BERT_SETTINGS,
  Layout(),
  head="cls.predictions",
  transform="cls.predictions.transform.dense",
  transform_norm="cls.predictions.transform.LayerNorm",
  ignored=(r"^cls\.seq_relationship\.",),
)
ROBERTA = encoder(
  "roberta",
  "Roberta",
  ROBERTA_SETTINGS,
  Rows(ROBERTA_OFFSET),
  head="lm_head",
  transform="lm_head.dense",
  transform_norm="lm_head.layer_norm",
)

# -- T5 (Raffel et al., 2020), FLAN-T5 (Chung et al., 2022) --------------------------------


def t5_stack(name: str, attentions: tuple[tuple[str, str], ...], up: str) -> Table:
  """The encoder or the decoder: its attentions, (theirs, ours), and then a feed-forward."""
  layer, ours = name + ".block.{l}.layer.", f"{name}/blocks/"
  bias = f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
  rows = [
    array(bias, f"{name}/relative_bias/table"),
    *norm(f"{name}.final_layer_norm", f"{name}/final_norm"),
  ]
  for number, (theirs, part) in enumerate(attentions):
    each = dict(q="q", k="k", v="v", o="o")
    rows += linears(f"{layer}{number}.{theirs}.", f"{ours}{part}/", **each)
    rows += norm(f"{layer}{number}.layer_norm", f"{ours}{part}_norm")
  last = f"{layer}{len(attentions)}."
  return (
    *rows,
    *linears(f"{last}DenseReluDense.", ours + "ffn/", gate="wi_0", up=up, down="wo"),
    *norm(f"{last}layer_norm", ours + "ffn_norm"),
  )


def t5(cfg: ResolvedModel) -> Table:
  itself, source = ("SelfAttention", "attention"), ("EncDecAttention", "cross_attention")
  up = "wi_1" if cfg.gated else "wi"
  return (
    array("shared.weight", "embedding/table"),
    *t5_stack("encoder", (itself,), up),
    *t5_stack("decoder", (itself, source), up),
    *linear("lm_head", "head"),
  )


def read_t5_head(hf: Values, found: Fields) -> Fields:
  """T5 scales the input of its tied head; T5 1.1 and FLAN-T5 have an untied head, and no
  scaling. Newer files have a key for it, and may tie a head without scaling."""
  tied = hf.get(bool, "tie_word_embeddings", True)
  scaled = hf.get(bool, "scale_decoder_outputs", tied)
  return {
    "tied_embeddings": tied and not (hf.has("lm_head.weight") and not scaled),
    "logit_scale": max(1, found["width"]) ** -0.5 if scaled else 1.0,
  }


def write_t5_head(cfg: ResolvedModel) -> Keys:
  return {
    "tie_word_embeddings": cfg.tied_embeddings,
    "scale_decoder_outputs": cfg.logit_scale != 1,
  }


T5_SETTINGS = (
  Key("vocab_size", "vocab_size", REQUIRED),
  Key("d_model", "width"),
  Key("d_kv", "head_dim", REQUIRED),
  Key("d_ff", "ffn_width", REQUIRED),
  Key("num_layers", "depth"),
  Key("num_layers", "encoder_depth", REQUIRED),
  Key("num_decoder_layers", "depth"),  # in its absence, as many as the encoder has
  Key("num_heads", "num_heads"),
  Key("n_positions", "context", 512),
  Key("relative_attention_num_buckets", "relative_buckets", 32),
  Key("relative_attention_max_distance", "relative_distance", 128),
  Key("layer_norm_epsilon", "norm_epsilon", 1e-6),
  Choice(
    "feed_forward_proj",
    {
      "relu": {"activation": "relu", "gated": False},
      "gated-gelu": {"activation": "gelu_tanh", "gated": True},
      "gated-silu": {"activation": "silu", "gated": True},
      "gelu_new": {"activation": "gelu_tanh", "gated": False},
    },
    "relu",
  ),
  Rule(read_t5_head, write_t5_head),
  ours(family="encoder_decoder", positions="relative", attention_scale=1.0),
  written(is_encoder_decoder=True, dropout_rate=0.0),
)

T5 = Family(
  "t5",
  ("T5ForConditionalGeneration", "T5Model"),
  t5,
  T5_SETTINGS,
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
)

FAMILIES = (BERT, ROBERTA, T5)
