# SPDX-License-Identifier: Apache-2.0
"""A model's architecture: `ModelConfig`, and `ResolvedModel` with every number known."""

import dataclasses
import math
from typing import Literal

from flaxlm.config.fields import (
  MOST_FFN_WIDTH,
  MOST_IDS,
  MOST_LAYERS,
  MOST_TOKENS,
  MOST_WIDTH,
  fields_of,
  knob,
)
from flaxlm.errors import ConfigError

VOCAB_MULTIPLE = 64  # divides over a mesh and fills the vector units (nanoGPT's 50304)

# A local layer's cache is a ring: how many tokens may be added to it at a time, and how
# many removed again (by speculative decoding, or when an earlier turn is answered again).
MAX_NEW_IN_RING = 512
MAX_TAKEN_BACK = 64
RING_MULTIPLE = 128  # slots

# What each family of models is trained to predict.
OBJECTIVES = {
  "decoder": "next_token",
  "rnn": "next_token",
  "encoder": "masked",
  "encoder_decoder": "seq2seq",
}
TALKS = ("chat", "preference")  # what models of the next token learn from conversations


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
  """Rotary positions (Su et al., 2021), and how they stretch past the trained context."""

  theta: float = knob(10_000.0, "base of the wavelengths", 1)
  local_theta: float | None = knob(
    None, "base in local layers, which then are never stretched; none = theta", 1
  )
  fraction: float = knob(
    1.0, "share of each head's dims, from the first on, that is rotated in pairs", 0, 1
  )
  scaling: Literal["none", "linear", "ntk", "yarn", "llama3"] = knob(
    "none",
    "how wavelengths stretch: equally (linear), by a larger base (ntk), or by wavelength",
  )
  factor: float = knob(1.0, "new context / original context", 1)
  original_context: int | None = knob(
    None, "context before stretching; none = context / factor", 1, MOST_TOKENS
  )
  slow_turns: float = knob(
    1.0,
    "yarn, llama3: pairs that turn less often over the original context stretch fully",
    0,
  )
  fast_turns: float = knob(
    32.0, "yarn (32), llama3 (4): pairs that turn more often do not stretch", 0
  )
  attention_factor: float | None = knob(
    None, "yarn: scale of q and k; none = 0.1 ln(factor) + 1", 0
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
  """A mixture of experts (Shazeer et al., 2017) in place of each feed-forward."""

  num_experts: int = knob(
    0, "experts in a layer (E); 0 = one dense feed-forward", 0, MOST_WIDTH
  )
  experts_per_token: int = knob(2, "experts that process a token (A)", 1, MOST_WIDTH)
  expert_width: int | None = knob(
    None, "an expert's width (F); none = ffn_width", 1, MOST_FFN_WIDTH
  )
  num_shared_experts: int = knob(
    0, "further experts that process every token", 0, MOST_LAYERS
  )
  shared_gated: bool = knob(False, "the shared experts' output is weighted by a sigmoid")
  normalized: bool = knob(True, "a token's weights add up to 1 over its chosen experts")
  capacity_factor: float | None = knob(
    None,
    "an expert's capacity / an even share; the rest is dropped; none = no limit",
    0,
  )
  load_balance_weight: float = knob(0.01, "weight of the loss for uneven use of experts", 0)
  router_z_weight: float = knob(0.001, "weight of the loss for large router logits", 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """The architecture: what the parameters are, and nothing about how they run."""

  family: Literal["decoder", "encoder", "encoder_decoder", "rnn"] = knob(
    "decoder", "kind of model"
  )
  depth: int = knob(
    4, "number of blocks (L); encoder_decoder: of the decoder", 1, MOST_LAYERS
  )
  encoder_depth: int | None = knob(
    None, "encoder_decoder: blocks of the encoder; none = depth", 1, MOST_LAYERS
  )
  width: int = knob(128, "model width (D)", 1, MOST_WIDTH)
  num_heads: int = knob(4, "query heads (N)", 1, MOST_WIDTH)
  num_kv_heads: int | None = knob(
    None, "key/value heads (K); none = num_heads", 1, MOST_WIDTH
  )
  head_dim: int | None = knob(None, "head dim (H); none = width / num_heads", 1, MOST_WIDTH)
  ffn_width: int | None = knob(
    None, "feed-forward width (F); none = 4 D, or 8/3 D when gated", 1, MOST_FFN_WIDTH
  )
  vocab_size: int | None = knob(
    None,
    "vocabulary (V); none = the tokenizer's, rounded up to a multiple of 64",
    2,
    MOST_IDS,
  )
  num_ids: int | None = knob(
    None, "ids that stand for tokens; later rows of V are padding; none = all", 2, MOST_IDS
  )
  context: int = knob(256, "longest sequence the model takes, in tokens", 1, MOST_TOKENS)
  cell: Literal["lstm", "gru"] = knob("lstm", "rnn: the recurrent cell")
  # -- Positions
  positions: Literal["rope", "learned", "sinusoidal", "alibi", "relative", "none"] = knob(
    "rope", "positional encoding; relative is T5's bias by bucketed distance"
  )
  rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
  relative_buckets: int = knob(
    32, "relative: number of buckets of distances", 4, MOST_WIDTH
  )
  relative_distance: int = knob(
    128, "relative: longer distances share a bucket", 2, MOST_TOKENS
  )
  # -- Normalisation and residual stream
  norm: Literal["rmsnorm", "layernorm"] = knob("rmsnorm", "normalisation")
  norm_placement: Literal["pre", "post", "output", "both"] = knob(
    "pre", "x + f(norm x) | norm(x + f x) | x + norm(f x) | x + norm(f(norm x))"
  )
  norm_biased: bool = knob(True, "layernorm: adds a bias")
  norm_epsilon: float = knob(1e-6, "added to the variance", 0)
  parallel: Literal["none", "one_norm", "two_norms"] = knob(
    "none", "attention and feed-forward in parallel, after one norm or two"
  )
  embedding_norm: bool = knob(False, "a norm right after the embedding")
  embedding_scaled: bool = knob(False, "multiply embedded tokens by sqrt(width)")
  dropout: float = knob(0.0, "rate on embeddings and residual branches", 0, 0.999)
  # -- Attention
  window: int | None = knob(
    None, "sliding window of local layers, in tokens", 1, MOST_TOKENS
  )
  layer_pattern: str | None = knob(
    None,
    "repeated over depth: L local, G global, as in LLLLLG; none = L with a window, else G",
  )
  sink_tokens: int = knob(
    0, "first tokens of a text that local layers always see", 0, MOST_TOKENS
  )
  learned_sinks: bool = knob(False, "a trained logit per head that takes weight from keys")
  attention_scale: float | None = knob(
    None, "factor on q . k; none = 1 / sqrt(head_dim)", 0
  )
  attention_softcap: float | None = knob(None, "c: scores become c tanh(score / c)", 1e-6)
  qk_norm: Literal["none", "head", "width"] = knob(
    "none", "RMSNorm of queries and keys, over each head or over all heads together"
  )
  # -- Feed-forward and biases
  activation: Literal["gelu", "gelu_tanh", "silu", "relu"] = knob(
    "silu", "feed-forward nonlinearity"
  )
  gated: bool = knob(True, "gated feed-forward (SwiGLU with silu, GEGLU with gelu)")
  moe: MoEConfig = dataclasses.field(default_factory=MoEConfig)
  biased: bool = knob(
    False, "biases in the projections and the feed-forward, except in experts"
  )
  qkv_biased: bool | None = knob(None, "biases of queries, keys, values; none = as biased")
  o_biased: bool | None = knob(None, "bias of attention's output; none = as biased")
  # -- Head
  tied_embeddings: bool = knob(True, "the head is the embedding, transposed")
  head_biased: bool = knob(False, "a bias per token of the vocabulary")
  head_transform: bool = knob(False, "dense, activation, norm before the head (BERT)")
  logit_scale: float = knob(1.0, "factor on the logits", 1e-9)
  logit_softcap: float | None = knob(None, "c: logits become c tanh(logit / c)", 1e-6)
  num_token_types: int = knob(
    0, "encoder: number of segment types (BERT: 2)", 0, MOST_WIDTH
  )
  pooler: bool = knob(False, "encoder: dense and tanh over the first token (BERT)")

  @property
  def period(self) -> str:
    """The kinds of layers, L and G, that repeat over the depth."""
    return self.layer_pattern or ("G" if self.window is None else "L")

  def layer_kinds(self, depth: int | None = None) -> str:
    """One letter per layer of a stack of `depth` layers (default: the model's own): L for
    local layers, which see a window, and G for global ones."""
    depth = self.depth if depth is None else depth
    return (self.period * depth)[:depth]

  def resolve(self, tokenizer_size: int | None = None) -> "ResolvedModel":
    """Fills in every `None` that has a rule, so that the modules see numbers only.

    The vocabulary is the config's or, rounded up, the tokenizer's. Raises `ConfigError`
    when neither is known.
    """
    vocab_size, num_ids = self.vocab_size, self.num_ids
    if vocab_size is None:
      if tokenizer_size is None:
        raise ConfigError("model.vocab_size is none, and there is no tokenizer", "set it")
      num_ids = tokenizer_size
      vocab_size = VOCAB_MULTIPLE * math.ceil(tokenizer_size / VOCAB_MULTIPLE)
    ffn_width = 4 * self.width
    if self.gated:  # three matrices, not two: 8/3 D keeps their size (Shazeer, 2020)
      multiple = 256 if self.width >= 1024 else 32  # 256 as LLaMA; GPUs pad other widths
      ffn_width = multiple * math.ceil(8 * self.width / 3 / multiple)
    ffn_width = self.ffn_width or ffn_width
    head_dim = self.head_dim or self.width // self.num_heads
    original_context = self.rope.original_context or int(self.context / self.rope.factor)
    expert_width = self.moe.expert_width or ffn_width
    known = dict(
      encoder_depth=self.encoder_depth or self.depth,
      num_kv_heads=self.num_kv_heads or self.num_heads,
      head_dim=head_dim,
      ffn_width=ffn_width,
      vocab_size=vocab_size,
      num_ids=num_ids or vocab_size,
      rope=ResolvedRope(**fields_of(self.rope) | dict(original_context=original_context)),
      attention_scale=(
        head_dim**-0.5 if self.attention_scale is None else self.attention_scale
      ),
      moe=ResolvedMoE(**fields_of(self.moe) | dict(expert_width=expert_width)),
      qkv_biased=self.biased if self.qkv_biased is None else self.qkv_biased,
      o_biased=self.biased if self.o_biased is None else self.o_biased,
    )
    return ResolvedModel(**fields_of(self) | known)


# -- Every number known --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedRope(RopeConfig):
  """Rotary positions whose original context is known."""

  original_context: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedMoE(MoEConfig):
  """A mixture of experts whose width is known."""

  expert_width: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedModel(ModelConfig):
  """An architecture in which every number is known: what modules are built from."""

  encoder_depth: int
  num_kv_heads: int
  head_dim: int
  ffn_width: int
  vocab_size: int
  num_ids: int  # vocab_size where no row is padding
  rope: ResolvedRope
  attention_scale: float
  moe: ResolvedMoE
  qkv_biased: bool
  o_biased: bool

  def resolve(self, tokenizer_size: int | None = None) -> "ResolvedModel":
    """Returns itself: every number is known already."""
    return self

  @property
  def is_padded(self) -> bool:
    """Whether the vocabulary's last rows stand for no token."""
    return self.num_ids < self.vocab_size

  @property
  def unpadded(self) -> "ResolvedModel":
    """The same model without padding: every row of the vocabulary stands for a token."""
    return dataclasses.replace(self, vocab_size=self.num_ids)

  def padded(self, parts: int) -> "ResolvedModel":
    """The same model, its vocabulary padded if it does not split into `parts` evenly."""
    if self.vocab_size % parts == 0:
      return self
    multiple = math.lcm(VOCAB_MULTIPLE, parts)
    return dataclasses.replace(
      self, vocab_size=multiple * math.ceil(self.num_ids / multiple)
    )

  @property
  def padding(self) -> str:
    """The line that a run prints about a padded vocabulary; "" if it is not padded."""
    if not self.is_padded:
      return ""
    return (
      f"vocabulary: {self.num_ids:,} ids, padded to {self.vocab_size:,} rows; the padding "
      "gets no probability"
    )

  # -- Local and global layers: what each sees, and what it keeps in a cache

  def window_of(self, kind: str) -> int | None:
    """The window of a layer of this kind; None: it sees everything."""
    return self.window if kind == "L" else None

  @property
  def ring_slots(self) -> int | None:
    """Slots of a local layer's cache, however long the text: sinks, then a ring.

    The ring holds the window of the first of `MAX_NEW_IN_RING` new tokens, those tokens,
    and `MAX_TAKEN_BACK` more, rounded up to whole lanes of a TPU: of a cache with another
    number of slots, its compiler keeps a copy in each block of steps. None: local layers
    keep all slots, because their scores have a bias by slot.
    """
    if self.window is None or self.positions in {"alibi", "relative"}:
      return None
    slots = self.sink_tokens + self.window + MAX_NEW_IN_RING + MAX_TAKEN_BACK - 1
    return -(-slots // RING_MULTIPLE) * RING_MULTIPLE

  def cache_slots(self, kind: str, slots: int) -> int:
    """Slots that a layer of this kind has in a cache for `slots` tokens."""
    if kind == "L" and self.ring_slots is not None:
      return min(slots, self.ring_slots)
    return slots

  def all_cache_slots(self, slots: int) -> int:
    """Slots of all layers together, in a cache for `slots` tokens."""
    return sum(self.cache_slots(kind, slots) for kind in self.layer_kinds())
