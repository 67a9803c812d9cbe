# SPDX-License-Identifier: Apache-2.0
"""Which kernel computes attention over whole rows and over prompts: its name, and why."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from flaxlm.config import ResolvedModel
from flaxlm.errors import ConfigError
from flaxlm.nn.execution import Execution
from flaxlm.sharding import axis_sizes_in_use

SHORTEST_PROMPT = 32  # new tokens; fewer are not worth a fused kernel


class Path(NamedTuple):
  """The kernel that computes attention and, if it is not cuDNN's, why not."""

  name: Any  # "blocked", "cudnn" or "cached"
  why: str = ""


def choose_path(
  cfg: ResolvedModel,
  execution: Execution,
  sizes: Mapping[str, int],
  lengths: Sequence[int] = (),
) -> Path:
  """The path over whole rows of these `lengths`, on a mesh of these axis `sizes`.

  `run.kernel_head_dim` says what the devices can do. Raises `ConfigError` if the config
  asks for cudnn and cuDNN cannot run the model.
  """
  largest = execution.kernel_head_dim
  wanted = execution.attention
  if wanted == "blocked":
    return Path("blocked", "as training.attention says")
  biased = cfg.positions in {"alibi", "relative"}
  obstacles = {
    "it runs on NVIDIA GPUs from Ampere on": not largest,
    "it does not support float32": jnp.dtype(execution.dtype).itemsize != 2,
    f"head_dim={cfg.head_dim} is above {largest}": cfg.head_dim > largest,
    f"head_dim={cfg.head_dim} is not a multiple of 8": cfg.head_dim % 8 != 0,
    "it does not support attention_softcap": cfg.attention_softcap is not None,
    "it does not support learned_sinks": cfg.learned_sinks,
    f"it does not support positions={cfg.positions}": biased,
    "it does not support masks for rows of odd length": any(n % 2 for n in lengths),
    "it cannot be split over mesh axis context": sizes.get("context", 1) > 1,
    "it does not run in the stages of a pipeline": sizes.get("stage", 1) > 1,
  }
  found = [reason for reason, holds in obstacles.items() if holds]
  if not found:
    return Path("cudnn")
  if wanted == "cudnn":
    cure = "training.attention=auto takes another path where it must"
    raise ConfigError(f"training.attention=cudnn is not possible: {found[0]}", cure)
  return Path("blocked", f"cudnn is not possible: {found[0]}")


def training_path(
  cfg: ResolvedModel,
  execution: Execution,
  sizes: Mapping[str, int],
  seq_len: int,
  source_len: int,
) -> Path | None:
  """The path of a training step; None for an RNN, which has no attention.

  `source_len` is 0 for a model that reads no source.
  """
  if cfg.family == "rnn":
    return None
  return choose_path(cfg, execution, sizes, (seq_len, source_len))


def prompt_path(
  cfg: ResolvedModel, execution: Execution, num_queries: int, num_keys: int
) -> Path:
  """The path of new tokens over a cache.

  Prompts use cuDNN's kernel where it can run the model. `training.attention=cudnn` demands
  nothing here, because a run may decode on other devices than it was trained on.
  """
  if execution.attention == "blocked":
    return Path("cached", "as training.attention says")
  if num_queries < SHORTEST_PROMPT:
    return Path("cached", "too few queries for a fused kernel")
  execution = dataclasses.replace(execution, attention="auto")
  chosen = choose_path(cfg, execution, axis_sizes_in_use(), (num_queries, num_keys))
  return chosen if chosen.name == "cudnn" else Path("cached", chosen.why)
