# SPDX-License-Identifier: Apache-2.0
"""A small model that has all that a config's model has: what the laws are checked on."""

import dataclasses
import math
import re
from collections.abc import Mapping

from flaxlm.config import (
  MESH_AXES,
  MeshConfig,
  ModelConfig,
  ResolvedConfig,
  ResolvedModel,
  TrainingConfig,
  mesh_sizes,
)
from flaxlm.decoding.prefix_store import has_rings

WIDTH = 32
SEQ_LEN = 24  # tokens in a row of a batch
MOST_DEVICES = 8  # a mesh of more is cut to 2 along each of its axes
VOCAB_SIZE, NUM_IDS = 64, 61  # the last three rows are padding
MOST_CONTEXT = 192  # two pieces of the prefix cache, and some tokens more
# A local layer's cache begins to overwrite itself after some 600 tokens.
RING_CONTEXT = 704

RULE = (
  "one period of the layer pattern, without more than two of a kind in a row, and at least "
  "2 layers; 2 kv heads (or 1) with at most 2 query heads each, or 4 heads that have their "
  "own, of at most 16 dims, or more for a larger mesh axis tensor; "
  f"width {WIDTH} (48 for 6 heads), feed-forward 48 or 4 x width; "
  f"{NUM_IDS} ids in {VOCAB_SIZE} rows; context {MOST_CONTEXT}, or {RING_CONTEXT} with a "
  "window; window 5, 2 sink tokens, 8 buckets; 4 experts of width 24 without a capacity; "
  "float32, full products; no adapters; everything else as the config says"
)


def shrink_model(
  model: ResolvedModel,
  training: TrainingConfig,
  sizes: Mapping[str, int],
  copied: bool = False,
) -> ResolvedModel:
  """The model after `RULE`, for a mesh of these sizes. Numbers that are smaller already
  stay. `copied` says that the config's own mesh has each kv head on several devices."""
  pattern = model.layer_pattern
  if pattern is not None:  # no more than two of one kind in a row
    pattern = re.sub(r"(.)\1+", r"\1\1", pattern)
  period = len(pattern or "G")
  if sizes["stage"] > 1:  # a stage has whole periods, once in each round
    depth = period * sizes["stage"] * training.pipeline_repeats
  else:
    depth = min(model.depth, max(2, period))
  own = model.num_kv_heads == model.num_heads
  kv_heads = min(model.num_kv_heads, 4 if own else 2)
  if own and model.positions == "alibi" and model.num_heads & (model.num_heads - 1):
    kv_heads = min(model.num_kv_heads, 6)  # no power of two either: it has other slopes
  group = min(2, model.num_heads // model.num_kv_heads)
  tensor = sizes["tensor"]
  if copied and kv_heads >= tensor > 1:
    kv_heads = tensor // 2
  elif kv_heads < tensor <= model.num_kv_heads:
    kv_heads = tensor
  heads = kv_heads * max(group, tensor // kv_heads)
  # Published families demand that some of these numbers fit each other, to the last bit.
  width, head_dim = min(model.width, WIDTH if heads in (1, 2, 4) else 8 * heads), 16
  if model.num_heads * model.head_dim == model.width and width % heads == 0:
    head_dim = width // heads
  head_dim = min(model.head_dim, head_dim)
  ffn_width = 4 * width if model.ffn_width == 4 * model.width else min(model.ffn_width, 48)
  attention_scale, logit_scale = model.attention_scale, model.logit_scale
  if attention_scale == model.head_dim**-0.5:
    attention_scale = head_dim**-0.5
  if logit_scale == model.width**-0.5:  # T5's
    logit_scale = width**-0.5
  moe = dataclasses.replace(
    model.moe,
    num_experts=min(model.moe.num_experts, 4),
    experts_per_token=min(model.moe.experts_per_token, 2),
    expert_width=min(model.moe.expert_width, 24),
    num_shared_experts=min(model.moe.num_shared_experts, 1),
    capacity_factor=None,
  )
  window = None if model.window is None else min(model.window, 5)
  small = dataclasses.replace(
    model,
    depth=depth,
    layer_pattern=pattern,
    encoder_depth=min(model.encoder_depth, 2) if sizes["stage"] == 1 else depth,
    width=width,
    num_heads=heads,
    num_kv_heads=kv_heads,
    head_dim=head_dim,
    attention_scale=attention_scale,
    logit_scale=logit_scale,
    ffn_width=ffn_width,
    vocab_size=VOCAB_SIZE,
    num_ids=NUM_IDS,
    window=window,
    sink_tokens=min(model.sink_tokens, 2),
    relative_buckets=min(model.relative_buckets, 8),
    relative_distance=min(model.relative_distance, 16),
    moe=moe,
  )
  context = RING_CONTEXT if has_rings(small) else MOST_CONTEXT
  return dataclasses.replace(small, context=min(model.context, context))


def shrink_training(training: TrainingConfig, sizes: Mapping[str, int]) -> TrainingConfig:
  """How the small model runs: as the config says, but in float32 and on few rows."""
  staged = sizes["stage"] > 1
  return dataclasses.replace(
    training,
    dtype="float32",
    param_dtype="float32",
    matmul="full",  # rounding makes whole steps of errors of the last bit
    attention="auto",
    accumulation_steps=1,
    loss_chunks=math.gcd(training.loss_chunks, SEQ_LEN),
    pipeline_microbatches=None,
    pipeline_repeats=training.pipeline_repeats if staged else 1,
  )


def shrink_mesh(mesh: MeshConfig, model: ModelConfig) -> dict[str, int]:
  """Every mesh axis with its size: those of `mesh`, or 2 where it names more than
  `MOST_DEVICES` devices. A mesh that names no axis but `data=-1` becomes one that cuts
  whatever can be cut."""
  named = mesh_sizes(mesh)
  if named == {"data": -1}:
    named = {"fsdp": 2, "tensor": 2, "expert" if model.moe.num_experts else "data": 2}
  named = {axis: 2 if size == -1 else size for axis, size in named.items()}
  if math.prod(named.values()) > MOST_DEVICES:
    named = {axis: min(size, 2) for axis, size in named.items()}
  return dict.fromkeys(MESH_AXES, 1) | named


def describe(cfg: ResolvedConfig, small: ResolvedModel) -> str:
  """One line: which numbers of the model became which."""
  names = [
    *("depth", "width", "num_heads", "num_kv_heads", "head_dim", "ffn_width"),
    *("vocab_size", "context", "window", "sink_tokens"),
  ]
  pairs = [(name, getattr(cfg.model, name), getattr(small, name)) for name in names]
  pairs.append(("experts", cfg.model.moe.num_experts, small.moe.num_experts))
  return ", ".join(f"{name} {old:,} -> {new:,}" for name, old, new in pairs if old != new)
