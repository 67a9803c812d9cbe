# SPDX-License-Identifier: Apache-2.0
"""Which kernel attention takes over whole rows and prompts: by name, with the reason."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from flaxlm.config import ResolvedModel
from flaxlm.errors import ConfigError
from flaxlm.nn.execution import Execution
from flaxlm.sharding import axis_sizes_in_use

SHORTEST_PROMPT = 32  # new tokens; the scores of fewer are not worth a kernel


class Path(NamedTuple):
  """Which kernel attention takes, and why not cuDNN's where it does not."""

  name: Any  # "blocked", "cudnn" or "cached"
  why: str = ""


def choose_path(
  cfg: ResolvedModel,
  run: Execution,
  sizes: Mapping[str, int],
  lengths: Sequence[int] = (),
) -> Path:
  """The path over whole rows of such `lengths`, on a mesh of such `sizes`.

  `run.kernel_head_dim` says what the devices can do. Raises `ConfigError` where the config
  asks for cudnn and cuDNN cannot do what the model asks.
  """
  largest = run.kernel_head_dim
  wanted = run.attention
  if wanted == "blocked":
    return Path("blocked", "as training.attention says")
  against = {
    "it runs on NVIDIA's GPUs from Ampere on": not largest,
    "it knows no float32": jnp.dtype(run.dtype).itemsize != 2,
    f"head_dim={cfg.head_dim} is above {largest}": cfg.head_dim > largest,
    f"head_dim={cfg.head_dim} is no multiple of 8": cfg.head_dim % 8 != 0,
    "it knows no attention_softcap": cfg.attention_softcap is not None,
    "it knows no learned_sinks": cfg.learned_sinks,
    f"it knows no positions={cfg.positions}": cfg.positions in {"alibi", "relative"},
    "rows of an odd length may not have a mask": any(n % 2 for n in lengths),
    "it is not cut over mesh axis context": sizes.get("context", 1) > 1,
    "it does not run in the stages of a pipeline": sizes.get("stage", 1) > 1,
  }
  found = [reason for reason, holds in against.items() if holds]
  if not found:
    return Path("cudnn")
  if wanted == "cudnn":
    cure = "training.attention=auto takes another path where it must"
    raise ConfigError(f"training.attention=cudnn cannot: {found[0]}", cure)
  return Path("blocked", f"cudnn cannot: {found[0]}")


def path_here(cfg: ResolvedModel, run: Execution, lengths: Sequence[int]) -> Path:
  """The path over whole rows of such `lengths`, on the mesh that is set."""
  return choose_path(cfg, run, axis_sizes_in_use(), lengths)


def training_path(
  cfg: ResolvedModel,
  run: Execution,
  sizes: Mapping[str, int],
  seq_len: int,
  source_len: int,
) -> Path | None:
  """The path of a training step; None for an RNN, which has no attention.

  `source_len` matters to an encoder-decoder only.
  """
  if cfg.family == "rnn":
    return None
  source_len = source_len if cfg.family == "encoder_decoder" else 0
  return choose_path(cfg, run, sizes, (seq_len, source_len))


def prompt_path(
  cfg: ResolvedModel, run: Execution, num_queries: int, num_keys: int
) -> Path:
  """The path of new tokens over a cache.

  Prompts take cuDNN's kernel where it can do what the model asks. `training.attention`
  decides nothing here: a run may answer elsewhere than it was trained.
  """
  if num_queries < SHORTEST_PROMPT or run.attention == "blocked":
    return Path("cached", "too few queries for a kernel")
  run = dataclasses.replace(run, attention="auto")
  chosen = path_here(cfg, run, (num_queries, num_keys))
  return chosen if chosen.name == "cudnn" else Path("cached", chosen.why)
