# SPDX-License-Identifier: Apache-2.0
"""The models on which predictions are tested, each of a different shape."""

import dataclasses
import functools
from typing import Any

from flaxlm.benchmark.measure import Size
from flaxlm.config import (
  DataConfig,
  ModelConfig,
  OptimizerConfig,
  ResolvedConfig,
  TrainingConfig,
)


def models(size: Size) -> dict[str, ResolvedConfig]:
  """Models of several widths, depths, vocabularies and numbers of rows, by name."""
  if size == "tiny":
    return {"tiny": gpt(1, 16, 2, context=48, vocab_size=64, batch_size=2)}
  if size == "large":
    half = TrainingConfig(dtype="bfloat16")
    big_gpt = functools.partial(gpt, context=1024, vocab_size=50_304, training=half)
    big_llama = functools.partial(llama, context=2048, vocab_size=32_000, training=half)
    return {
      "gpt2 12x768": big_gpt(12, 768, 12, batch_size=16),
      "llama 16x2048": big_llama(16, 2048, 16, num_kv_heads=8, batch_size=4),
    }
  stdlib_tiny = llama(4, 128, 4, context=256, vocab_size=4096, batch_size=8)
  muon = OptimizerConfig(kind="muon", learning_rate=1e-2)
  return {
    "nanogpt 4x128": gpt(4, 128, 4, context=128, vocab_size=256, batch_size=8),
    "stdlib_tiny 4x128": dataclasses.replace(stdlib_tiny, optimizer=muon),
    "wide 2x768": gpt(2, 768, 12, context=128, vocab_size=8192, batch_size=4),
    "llama 4x384": llama(
      4, 384, 6, num_kv_heads=2, context=256, vocab_size=4096, batch_size=4
    ),
    "deep 16x96": llama(16, 96, 3, context=128, vocab_size=512, batch_size=8),
  }


def llama(
  depth: int,
  width: int,
  heads: int,
  *,
  vocab_size: int,
  batch_size: int,
  training: TrainingConfig = TrainingConfig(),  # noqa: B008 - frozen
  **model: Any,
) -> ResolvedConfig:
  """LLaMA's architecture, with rows as long as its context."""
  resolved = ModelConfig(
    depth=depth, width=width, num_heads=heads, vocab_size=vocab_size, **model
  ).resolve()
  data = DataConfig(seq_len=resolved.context, batch_size=batch_size)
  return ResolvedConfig(model=resolved, data=data, training=training)


gpt = functools.partial(
  llama, positions="learned", norm="layernorm", activation="gelu", gated=False
)


def for_decoding(cfg: ResolvedConfig) -> ResolvedConfig:
  """The config with parameters as wide as the computation."""
  dtype = cfg.training.dtype
  return dataclasses.replace(cfg, training=TrainingConfig(dtype=dtype, param_dtype=dtype))
