# SPDX-License-Identifier: Apache-2.0
"""What is measured on a GPU: models, rows, documents. The same numbers on both sides."""

import dataclasses
import zlib
from typing import Any, Literal

import numpy as np

from flaxlm.benchmark.training_case import OPTIMIZER, gpt2_shape
from flaxlm.config import (
  DataConfig,
  ModelConfig,
  ResolvedConfig,
  ResolvedModel,
  RopeConfig,
  TrainingConfig,
)
from flaxlm.data.objectives import Batch, Windows, next_token

Layout = Literal["whole", "packed"]
LAYOUTS: tuple[Layout, ...] = ("whole", "packed")  # a document a row, or several
NUM_WINDOWS = 3  # batches, whose losses both sides must agree on


@dataclasses.dataclass(frozen=True)
class TrainCase:
  """A training step, and how often it is timed."""

  cfg: ResolvedConfig
  documents: int  # in a packed row
  num_steps: int  # of a timed pass

  @property
  def tokens(self) -> int:
    return self.cfg.data.batch_size * self.cfg.data.seq_len


def llama(depth: int, width: int, heads: int, ffn: int, **sizes: Any) -> ResolvedModel:
  """Llama 3's architecture, with its rotations as they are before they are stretched."""
  return ModelConfig(
    depth=depth,
    width=width,
    num_heads=heads,
    ffn_width=ffn,
    rope=RopeConfig(theta=500_000),
    norm_epsilon=1e-5,
    **sizes,
  ).resolve()


def llama_1b(context: int) -> ResolvedModel:
  """Llama 3.2 1B: 1,235,814,400 parameters."""
  shared = dict(num_kv_heads=8, vocab_size=128_256, context=context)
  return llama(16, 2048, 32, 8192, tied_embeddings=True, **shared)


def llama_8b(context: int) -> ResolvedModel:
  """Llama 3 8B: 8,030,261,248 parameters."""
  shared = dict(num_kv_heads=8, vocab_size=128_256, context=context)
  return llama(32, 4096, 32, 14_336, tied_embeddings=False, **shared)


def tiny(context: int) -> ResolvedModel:
  sizes = dict(num_kv_heads=1, vocab_size=65, context=context, tied_embeddings=False)
  return llama(1, 16, 2, 32, **sizes)


def train_case(
  model: ResolvedModel, batch: int, documents: int, steps: int, **training: Any
) -> TrainCase:
  cfg = ResolvedConfig(
    model=model,
    data=DataConfig(seq_len=model.context, batch_size=batch),
    optimizer=OPTIMIZER,
    training=TrainingConfig(**training),
  )
  return TrainCase(cfg, documents, steps)


def train_cases(smoke: bool) -> dict[str, TrainCase]:
  """By name. 8B: parameters and both moments in bfloat16, 45 GiB, so that a step fits."""
  if smoke:
    return {"tiny": train_case(tiny(8), 2, 2, 1, dtype="float32")}
  half = dict(dtype="bfloat16")
  narrow = half | dict(param_dtype="bfloat16")
  return {
    "124M": train_case(gpt2_shape(12, 768, 12, 1024, 50_304), 32, 4, 20, **half),
    "8B": train_case(llama_8b(4096), 2, 8, 2, **narrow),
    "1.24B": train_case(llama_1b(4096), 4, 8, 5, **half),
  }


def decode_models(smoke: bool) -> dict[str, ResolvedConfig]:
  """By name; weights are as wide as the computation."""
  if smoke:
    return {"tiny": ResolvedConfig(model=tiny(64))}
  half = TrainingConfig(dtype="bfloat16", param_dtype="bfloat16")
  models = {"1.24B": llama_1b(1024), "8B": llama_8b(1024)}
  return {name: ResolvedConfig(model=m, training=half) for name, m in models.items()}


# -- The same numbers on both sides --------------------------------------------------------

PERIOD = 1_048_573  # prime, so that no row of a matrix is another


def block_of_numbers() -> np.ndarray:
  """Normal numbers of spread 0.02, exact in bfloat16; parameters are pieces of its
  repetition, which both sides make on their device in a moment, without files."""
  block = np.random.default_rng(0).normal(0, 0.02, PERIOD).astype(np.float32)
  return (block.view(np.uint32) & 0xFFFF0000).view(np.float32)


def offset_of(name: str) -> int:
  """Where a parameter begins in the block."""
  return zlib.crc32(name.encode()) % PERIOD


def constant_of(name: str) -> float | None:
  """The value of all of a norm's parameters; None for the others."""
  return {"scale": 1.0, "bias": 0.0}.get(name.rsplit("/", 1)[-1])


def windows_of(case: TrainCase, layout: Layout) -> Windows:
  """Windows (NUM_WINDOWS, B, T + 1); a packed row has documents of random lengths, as
  many in every row, the same in each window."""
  cfg, rng = case.cfg, np.random.default_rng(0)
  B, T = cfg.data.batch_size, cfg.data.seq_len
  tokens = rng.integers(1, cfg.model.vocab_size, (NUM_WINDOWS, B, T + 1))
  begins = np.zeros(tokens.shape, bool)
  if layout == "packed":
    for row in range(B):
      cuts = rng.choice(np.arange(1, T), case.documents - 1, replace=False)
      begins[:, row, cuts] = True
  lengths = np.full((NUM_WINDOWS, B), T + 1)
  return Windows(tokens, begins, lengths)


def batches_of(case: TrainCase, layout: Layout) -> list[Batch]:
  """Whole rows have no segments: the kernels then need no mask."""
  windows = windows_of(case, layout)
  found = []
  for parts in zip(*windows[:3], strict=True):
    batch = next_token(Windows(*parts), end_id=0)
    found.append(batch if layout == "packed" else batch._replace(segments_BT=None))
  return found


def visible_share(case: TrainCase, layout: Layout) -> float:
  """Pairs of a query and a key that it sees / those of rows of one document."""
  if layout == "whole":
    return 1.0
  T = case.cfg.data.seq_len
  positions_BT = batches_of(case, layout)[0].positions_BT
  return float((positions_BT + 1).sum() / (len(positions_BT) * T * (T + 1) / 2))
