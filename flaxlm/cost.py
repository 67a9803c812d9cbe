# SPDX-License-Identifier: Apache-2.0
"""What a model costs, in closed form: its parameters by part, and its FLOPs.

A multiply-add is two FLOPs, and the backward pass costs twice the forward pass. Two
conventions are in use, and they differ by 4-13 %; never compare figures across them:

- *strict*: 6 per parameter that multiplies (a tied head once, no lookup, of experts only
  the active ones) plus attention over the keys that a query really sees (`visible_keys`),
  so half of all in a causal model; nothing for what is computed twice. MFU here is always
  strict.
- *loose*: attention over all keys, 12 L N H T per token (PaLM, Chowdhery et al., 2022,
  appendix B; nanoGPT).

What the chips *execute* is a third figure: it includes the masked part of the blocks that
attention computes, and the second forward pass under remat. Step time follows from it; MFU
does not.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterator

import flax.linen as nn
import jax

from flaxlm.config import LoraConfig, ResolvedConfig, ResolvedModel, TrainingConfig
from flaxlm.nn.kernels.blocked import query_blocks
from flaxlm.nn.kernels.int4 import group_size
from flaxlm.nn.lora import boxed_adapters
from flaxlm.nn.models import build_model
from flaxlm.sharding import kv_parts

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
TOKENS_PER_PARAMETER = 20  # compute-optimal (Hoffmann et al., 2022)


# -- Parameters --------------------------------------------------------------------------


def parameters(cfg: ResolvedModel) -> dict[str, int]:
  """Number of parameters by part; their sum is the model's."""
  V, D, norm = cfg.vocab_size, cfg.width, _norm(cfg)
  head = V * D * (not cfg.tied_embeddings) + V * cfg.head_biased
  head += (cfg.head_transform + cfg.pooler) * (D * D + D)
  parts = Counter(embedding=(V + cfg.num_token_types) * D, positions=0, attention=0, ffn=0)
  parts.update(norms=norm * cfg.head_transform, head=head)
  tables = {"learned": cfg.context * D, "relative": cfg.relative_buckets * cfg.num_heads}
  for depth, reads_source in stacks(cfg):
    for part, count in _layer(cfg, reads_source).items():
      parts[part] += depth * count
    parts["norms"] += norm * ((cfg.norm_placement != "post") + cfg.embedding_norm)
    if cfg.family != "rnn":
      parts["positions"] += tables.get(cfg.positions, 0)
  return {part: count for part, count in parts.items() if count}


def stacks(cfg: ResolvedModel) -> list[tuple[int, bool]]:
  """(depth, whether it reads a source) of each stack of blocks."""
  if cfg.family == "encoder_decoder":
    return [(cfg.encoder_depth, False), (cfg.depth, True)]
  return [(cfg.depth, False)]


def _layer(cfg: ResolvedModel, reads_source: bool) -> dict[str, int]:
  """Parameters of one layer by part."""
  if cfg.family == "rnn":
    return {"recurrent": _cell(cfg), "norms": _norm(cfg)}
  ffn, router, _ = _ffn(cfg)
  norms = (2 + reads_source) * (2 if cfg.norm_placement == "both" else 1)
  norms -= cfg.parallel == "one_norm"
  return {
    "attention": _attention(cfg) * (1 + reads_source),
    "ffn": ffn,
    "router": router,
    "norms": norms * _norm(cfg),
  }


def _norm(cfg: ResolvedModel) -> int:
  return cfg.width * (2 if cfg.norm == "layernorm" and cfg.norm_biased else 1)


def _projections(cfg: ResolvedModel) -> tuple[int, int, int]:
  """Weights of one attention layer: of queries, of keys and values, and of the output."""
  D, N, K, H = cfg.width, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
  return D * N * H, 2 * D * K * H, N * H * D


def copied_weights(cfg: ResolvedModel, tensor: int) -> int:
  """Weights that are on several members of a `tensor` axis, of keys and values, without the
  first of each: how many more weights all members together hold and multiply with."""
  if cfg.family == "rnn":
    return 0
  attentions = sum(depth * (1 + reads) for depth, reads in stacks(cfg))
  copies = tensor // kv_parts(cfg, tensor)
  return (copies - 1) * attentions * _projections(cfg)[1]


def _attention(cfg: ResolvedModel) -> int:
  D, N, K, H = cfg.width, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
  count = sum(_projections(cfg))
  count += (N + 2 * K) * H * bool(cfg.qkv_biased) + D * bool(cfg.o_biased)
  count += {"none": 0, "head": 2 * H, "width": (N + K) * H}[cfg.qk_norm]
  return count + N * cfg.learned_sinks


def _ffn(cfg: ResolvedModel) -> tuple[int, int, int]:
  """Parameters of a feed-forward and of its router, and the weights that one token uses."""
  D, F, moe = cfg.width, cfg.ffn_width, cfg.moe
  matrices = 3 if cfg.gated else 2
  if not moe.num_experts:
    weights = matrices * D * F
    return weights + cfg.biased * ((matrices - 1) * F + D), 0, weights
  expert = matrices * D * moe.expert_width
  shared = moe.num_shared_experts * expert
  router = D * moe.num_experts + D * (moe.shared_gated and shared > 0)
  active = moe.experts_per_token * expert + shared + router
  return moe.num_experts * expert + shared, router, active


def routed_weights(cfg: ResolvedModel) -> int:
  """Weights of a layer's router, and of the experts that a token is sent to."""
  moe = cfg.moe
  if not moe.num_experts:
    return 0
  shared = moe.num_shared_experts * moe.expert_width * cfg.width * (3 if cfg.gated else 2)
  return _ffn(cfg)[2] - shared


def _cell(cfg: ResolvedModel) -> int:
  """Parameters of one recurrent layer: each gate reads the input and the state; biases."""
  gates = {"lstm": 4, "gru": 3}[cfg.cell]
  return gates * 2 * cfg.width**2 + 4 * cfg.width


def narrow_parameters(cfg: ResolvedModel) -> tuple[int, int]:
  """The weights that decoding can store narrow, and their outputs, one scale for each.

  They are those of `decoding.weights.prepare_params`: the matrices of attention, of
  feed-forwards without experts, and of the head or the tied embedding.
  """
  blocks = block_matrices(cfg)
  weights = sum(n * outputs * inputs for (outputs, inputs), n in blocks.items())
  outputs = sum(n * outputs for (outputs, _), n in blocks.items())
  return weights + cfg.width * cfg.vocab_size, outputs + cfg.vocab_size


def block_matrices(cfg: ResolvedModel) -> Counter[tuple[int, int]]:
  """How many matrices (outputs, inputs) the blocks have, without those of experts."""
  D, N, K = cfg.width, *(n * cfg.head_dim for n in (cfg.num_heads, cfg.num_kv_heads))
  found: Counter[tuple[int, int]] = Counter()
  for depth, reads_source in stacks(cfg):
    if cfg.family == "rnn":
      continue
    attentions = depth * (1 + reads_source)
    for shape, count in (((N, D), 1), ((K, D), 2), ((D, N), 1)):
      found[shape] += attentions * count
    width = cfg.ffn_width
    if cfg.moe.num_experts:
      width = cfg.moe.num_shared_experts * cfg.moe.expert_width
    found[width, D] += depth * (2 if cfg.gated else 1) * (width > 0)
    found[D, width] += depth * (width > 0)
  return found


def weight_bytes(cfg: ResolvedModel, item_size: int, kind: str | None = None) -> int:
  """Bytes of all parameters, laid out for decoding; `kind` is the dtype of matrices, and
  all others have `item_size` bytes. With int4 the head and a tied embedding are int8."""
  whole = sum(parameters(cfg).values()) * item_size
  if kind is None:
    return whole
  weights, outputs = narrow_parameters(cfg)
  if kind == "int4":
    blocks = block_matrices(cfg)
    scales = lambda outputs, inputs: outputs * inputs // group_size(inputs)
    packed = sum(n * (o * i // 2 + 2 * scales(o, i)) for (o, i), n in blocks.items())
    V, D = cfg.vocab_size, cfg.width
    return whole - weights * item_size + packed + V * D * BYTES["int8"] + 4 * V
  scales_bytes = 4 * outputs if kind == "int8" else 0
  return whole - weights * (item_size - BYTES[kind]) + scales_bytes


@functools.lru_cache(maxsize=64)
def adapter_parameters(cfg: ResolvedModel, lora: LoraConfig) -> int:
  """Elements of all adapters: what learns in place of the parameters."""
  if not lora.rank:
    return 0
  adapters = nn.unbox(boxed_adapters(build_model(cfg), lora))
  return sum(leaf.size for leaf in jax.tree.leaves(adapters))


def active_parameters(cfg: ResolvedModel) -> int:
  """Parameters that one token uses: all but those of the experts that it skips."""
  skipped = 0
  if cfg.moe.num_experts:
    ffn, router, active = _ffn(cfg)
    skipped = sum(depth for depth, _ in stacks(cfg)) * (ffn + router - active)
  return sum(parameters(cfg).values()) - skipped


# -- FLOPs -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ForwardFlops:
  """FLOPs of one forward pass over some rows, counted in the three ways of this module."""

  matmul: float  # products with weights, without the head
  head: float
  attention: float  # strict: over the keys that queries see
  attention_loose: float  # over all keys
  attention_executed: float  # over the blocks that are computed
  idle_places: float = 0.0  # products with the places of experts that no token has taken
  added: float = 0.0  # of `matmul`, the products whose results no gradient needs

  @property
  def strict(self) -> float:
    return self.matmul + self.head + self.attention

  @property
  def loose(self) -> float:
    return self.matmul + self.head + self.attention_loose

  def step(self, training: TrainingConfig) -> float:
    """FLOPs that one training step executes.

    The backward pass costs twice the forward pass, and what was not kept is computed again,
    but for products whose results are only added to the residual stream. Attention is
    computed again unless all of it is kept: its output alone does not help, because the
    backward pass needs the weights.
    """
    products = self.matmul + self.idle_places
    again = 0.0
    if training.remat not in ("none", "dots"):
      again = products - self.added
    attention = attention_passes(training) * self.attention_executed
    return 3 * (products + self.head) + attention + again


# The backward pass / the forward pass of attention, two products: XLA's operations keep the
# weights; cuDNN's kernel and tiles compute the scores again; splash has two kernels, and
# each does.
BACKWARD = {"cudnn": 2.5, "splash": 3.5, "tiled": 2.5}


def attention_passes(training: TrainingConfig) -> float:
  """How often a step computes attention: once forward, and backward as above; under remat
  once more."""
  return 1 + BACKWARD.get(training.attention, 2) + (training.remat != "none")


def forward_work(
  cfg: ResolvedModel, rows: int, seq_len: int, source_len: int | None = None
) -> ForwardFlops:
  """FLOPs of one forward pass over `rows` rows of `seq_len` tokens.

  `source_len` is the length of an encoder-decoder's source; None: as long as the target.
  """
  D, V = cfg.width, cfg.vocab_size
  S = seq_len if source_len is None else source_len
  matmul, seen, loose, executed, added = 0.0, 0.0, 0.0, 0.0, 0.0
  for depth, reads_source in stacks(cfg):
    encodes = cfg.family == "encoder_decoder" and not reads_source
    queries = S if encodes else seq_len
    causal = not encodes and cfg.family != "encoder"
    matmul += 2.0 * rows * depth * _layer_weights(cfg, queries, S, reads_source)
    added += depth * queries * _added_weights(cfg)
    if cfg.family == "rnn":
      continue
    # q . k and weights . v: 2 H each per query, head and key.
    unit = 4.0 * rows * cfg.num_heads * cfg.head_dim * queries
    for kind in cfg.layer_kinds(depth):
      window, sinks = cfg.window_of(kind), cfg.sink_tokens
      seen += unit * visible_keys(queries, window, causal, sinks)
      # With sinks every block of queries goes back to the first key.
      executed += unit * computed_keys(queries, None if sinks else window, causal)
      loose += unit * queries
    if reads_source:
      cross = unit * depth * S
      seen, loose, executed = seen + cross, loose + cross, executed + cross
  head = 2.0 * rows * seq_len * (V * D + cfg.head_transform * D * D)
  idle = 2.0 * rows * seq_len * cfg.depth * _idle_weights(cfg)
  return ForwardFlops(matmul, head, seen, loose, executed, idle, 2.0 * rows * added)


def _idle_weights(cfg: ResolvedModel) -> float:
  """Weights of a layer that multiply places without a token, per token; negative where
  experts drop tokens. They compute all their places (`nn.moe.with_capacity`)."""
  moe = cfg.moe
  if not moe.num_experts or moe.capacity_factor is None:
    return 0.0
  expert = (3 if cfg.gated else 2) * cfg.width * moe.expert_width
  return (moe.capacity_factor - 1) * moe.experts_per_token * expert


def _added_weights(cfg: ResolvedModel) -> int:
  """Weights of a layer whose products go into the residual stream at the layer's end, where
  no norm and no expert's weight in a sum needs them to find its gradient."""
  if cfg.family == "rnn" or cfg.norm_placement != "pre":
    return 0
  down = 0 if cfg.moe.num_experts else cfg.width * cfg.ffn_width
  return down + (_projections(cfg)[2] if cfg.parallel != "none" else 0)


def _layer_weights(cfg: ResolvedModel, queries: int, source: int, cross: bool) -> float:
  """Weights of one layer, each counted as often as a row multiplies with it."""
  if cfg.family == "rnn":
    return queries * (_cell(cfg) - 4 * cfg.width)
  q, kv, o = _projections(cfg)
  self_attention = q + kv + o
  weights = queries * (self_attention + _ffn(cfg)[2])
  return weights + cross * (queries * (q + o) + source * kv)


def visible_keys(
  queries: int, window: int | None, causal: bool, sink_tokens: int = 0
) -> float:
  """Keys that a query sees, averaged over a row of T queries that is one document.

  Without a causal mask this is the exact mean of `nn.attention.visible`. With one, query t
  sees min(t + 1, r) keys, where r is T or the window and its sinks, and the exact mean is
  r - r (r - 1) / 2T. The convention of the literature is r - r^2 / 2T, so that without a
  window it is T / 2: the triangle of the first r queries counts half of its diagonal, which
  is r / 2T keys per query less.
  """
  T = queries
  if window is None or window >= T:
    return T / 2 if causal else T
  if causal:
    reach = min(window + sink_tokens, T)
    return reach - reach**2 / (2 * T)
  # The window leaves the row at both ends. Sinks are seen from behind it and, where it is
  # narrower than they are many, from before it.
  outside, behind, ahead = window * (window - 1), T - window, max(0, sink_tokens - window)
  sinks = min(sink_tokens, behind)
  seen_sinks = sinks * behind - sinks * (sinks - 1) / 2 + ahead * (ahead + 1) / 2
  return 2 * window - 1 + (seen_sinks - outside) / T


def computed_blocks(queries: int, window: int | None) -> Iterator[tuple[int, int]]:
  """Queries, and keys that they attend to, of each block that causal attention computes."""
  for start, end in query_blocks(queries):
    yield end - start, end if window is None else end - max(0, start - window + 1)


def computed_keys(queries: int, window: int | None, causal: bool) -> float:
  """Keys per query in the blocks of queries that attention computes (`nn.attention`)."""
  if not causal:
    return queries
  return sum(math.prod(block) for block in computed_blocks(queries, window)) / queries


@dataclasses.dataclass(frozen=True)
class StepCost:
  """FLOPs of one training step on the global batch."""

  tokens: int  # target tokens; those of an encoder-decoder's source are not counted
  strict_flops: float
  loose_flops: float
  executed_flops: float


def step_cost(cfg: ResolvedConfig) -> StepCost:
  """FLOPs of one training step of a resolved config; accumulation does not change them."""
  B, T = cfg.data.batch_size, cfg.data.seq_len
  work = forward_work(cfg.model, B, T, cfg.source_length)
  # Of a frozen weight there is no gradient; an adapter's A and B are products like others.
  saved = work.matmul + work.head if cfg.lora.rank else 0.0
  change = 6.0 * B * T * adapter_parameters(cfg.model, cfg.lora) - saved
  passes, once = cfg.reference_passes, work.matmul + work.head + work.attention_executed
  executed = work.step(cfg.training) + passes * once
  if cfg.active_dpo is not None and cfg.training.loss_chunks > 1:
    executed += work.head  # its logits are computed again: training/logprobs.py
  flops = ((3 + passes) * work.strict, (3 + passes) * work.loose, executed)
  return StepCost(B * T, *(some + change for some in flops))


def kv_cache_bytes(
  cfg: ResolvedModel,
  rows: int,
  context: int,
  item_size: int,
  source_len: int = 0,
  parts: int = 1,
  narrow: bool = False,
) -> int:
  """Bytes of the cache that `rows` rows of `context` tokens decode from, on one of the
  `parts` members of a `tensor` axis.

  Local layers keep a ring of slots, the others all of them (`ResolvedModel.cache_slots`);
  a decoder that reads a source of `source_len` tokens also keeps each layer's keys and
  values of those. A number has `item_size` bytes. In a `narrow` cache it has one, with a
  float32 scale for each vector, but for those of a source. An RNN keeps its state,
  whatever the context.
  """
  lengths = 4 * rows  # int32: the tokens of each row so far
  if cfg.family == "rnn":  # float32 always: a vector per layer, two with an LSTM's cell
    vectors = rows * cfg.depth * (2 if cfg.cell == "lstm" else 1)
    return lengths + vectors * 4 * cfg.width // parts
  segments = 4 * rows * source_len  # int32: which tokens of the source are real
  vectors = 2 * cfg.num_kv_heads // kv_parts(cfg, parts)
  wide = cfg.head_dim * item_size
  per_slot = vectors * (cfg.head_dim + 4 if narrow else wide)
  of_source = cfg.depth * source_len * vectors * wide
  return lengths + segments + rows * (cfg.all_cache_slots(context) * per_slot + of_source)
