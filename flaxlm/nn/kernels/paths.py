# SPDX-License-Identifier: Apache-2.0
"""Which kernel computes attention over whole rows and over prompts: its name, and why."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from flaxlm.config import FUSED, SPLASH, ResolvedModel
from flaxlm.errors import ConfigError
from flaxlm.nn.execution import Execution
from flaxlm.sharding import axis_sizes_in_use, whole_sizes

OFFSETS_HEAD_DIM = 128  # others have run larger ones only with cuDNN's masks
SHORTEST_PROMPT = 32  # new tokens; fewer are not worth a fused kernel


class Path(NamedTuple):
  """The kernel that computes attention, and why it is this one."""

  name: Any  # "blocked", "cached", or one of `config.FUSED`
  why: str = ""


def choose_path(
  cfg: ResolvedModel,
  execution: Execution,
  sizes: Mapping[str, int],
  lengths: Sequence[int] = (),
) -> Path:
  """The path over whole rows of these `lengths`, on a mesh of these axis `sizes`.

  `execution.kernel` says what the devices can do. Raises `ConfigError` if the config asks
  for a kernel that cannot run the model.
  """
  wanted, kernel = execution.attention, execution.kernel
  if wanted == "blocked":
    return Path("blocked", "as training.attention says")
  if wanted == "auto" and not kernel.name:
    return Path("blocked", "the devices have no fused kernel")
  name = kernel.name if wanted == "auto" else wanted
  found = OBSTACLES[name](cfg, execution, sizes, lengths)
  if wanted != "auto":
    if found:
      cure = "training.attention=auto takes another path where it must"
      raise ConfigError(f"training.attention={name} is not possible: {found[0]}", cure)
    return Path(name, "as training.attention says" + packed_rows(name, cfg, execution))
  if found:
    return Path("blocked", f"{name} is not possible: {found[0]}")
  if max(lengths, default=0) < kernel.shortest:
    return Path("blocked", f"{name} is for rows of {kernel.shortest:,} tokens or more")
  why = "the devices' fused kernel, which supports the model"
  return Path(name, why + packed_rows(name, cfg, execution))


def packed_rows(name: str, cfg: ResolvedModel, execution: Execution) -> str:
  """How cuDNN's kernel tells packed documents apart, in words that end a reason."""
  if name != "cudnn":
    return ""
  obstacle = offsets_obstacle(cfg, execution)
  how = f"a mask, as {obstacle}" if obstacle else "where they begin"
  return f"; packed documents by {how}"


def offsets_obstacle(cfg: ResolvedModel, execution: Execution) -> str | None:
  """Why cuDNN's kernel needs a mask for packed documents; None: it does not, except in
  layers that have a window."""
  if not execution.kernel.packed:
    return "offsets need a GPU from Hopper on and cuDNN 9.6"
  if cfg.head_dim > OFFSETS_HEAD_DIM:
    return f"head_dim={cfg.head_dim} is above {OFFSETS_HEAD_DIM}"
  if execution.attention != "cudnn":  # no GPU has run them yet (docs/benchmarks.md)
    return "offsets are not measured yet: training.attention=cudnn takes them"
  return None


def cudnn_obstacles(
  cfg: ResolvedModel,
  execution: Execution,
  sizes: Mapping[str, int],
  lengths: Sequence[int],
) -> list[str]:
  """Why cuDNN's kernel cannot run a model; empty if it can."""
  largest = execution.kernel.head_dim
  obstacles = {
    "it runs on NVIDIA GPUs from Ampere on": execution.kernel.name != "cudnn",
    "it does not support float32": jnp.dtype(execution.dtype).itemsize != 2,
    f"head_dim={cfg.head_dim} is above {largest}": cfg.head_dim > largest,
    f"head_dim={cfg.head_dim} is not a multiple of 8": cfg.head_dim % 8 != 0,
    "it does not support attention_softcap": cfg.attention_softcap is not None,
    "it does not support learned_sinks": cfg.learned_sinks,
    **biases(cfg),
    "it does not support masks for rows of odd length": any(n % 2 for n in lengths),
    "it cannot be split over mesh axis context": sizes.get("context", 1) > 1,
    "mesh axis tensor has more members than there are kv heads": (
      whole_sizes(sizes).get("tensor", 1) > cfg.num_kv_heads
    ),
    **stages(sizes),
  }
  return [reason for reason, holds in obstacles.items() if holds]


def splash_obstacles(
  cfg: ResolvedModel,
  execution: Execution,
  sizes: Mapping[str, int],
  lengths: Sequence[int],
) -> list[str]:
  """Why jax's kernel for TPUs cannot run a model; empty if it can."""
  largest, context = execution.kernel.head_dim, sizes.get("context", 1)
  # Each member of context has two pieces of every row.
  unit = SPLASH.lanes * (1 if context == 1 else 2 * context)
  length = f"rows have to be a multiple of {unit} tokens long"
  if context > 1:
    length += f" with mesh axis context={context}"
  obstacles = {
    "it runs on TPUs": execution.kernel.name != "splash",
    f"head_dim={cfg.head_dim} is above {largest}": cfg.head_dim > largest,
    "it does not support sink_tokens": cfg.sink_tokens > 0,
    **biases(cfg),
    length: any(n % unit for n in lengths),
    **stages(sizes),
  }
  return [reason for reason, holds in obstacles.items() if holds]


def tiled_obstacles(
  cfg: ResolvedModel,
  execution: Execution,
  sizes: Mapping[str, int],
  lengths: Sequence[int],
) -> list[str]:
  """Why attention in tiles cannot run a model on a CPU; empty if it can."""
  obstacles = {
    "it is for CPUs": execution.kernel.name != "tiled",
    "it runs on one device": math.prod(sizes.values()) > 1,
    "it does not support attention_softcap": cfg.attention_softcap is not None,
    "it does not support learned_sinks": cfg.learned_sinks,
    **biases(cfg),
  }
  return [reason for reason, holds in obstacles.items() if holds]


def biases(cfg: ResolvedModel) -> dict[str, bool]:
  biased = cfg.positions in {"alibi", "relative"}
  return {f"it does not support positions={cfg.positions}": biased}


def stages(sizes: Mapping[str, int]) -> dict[str, bool]:
  return {"it does not run in the stages of a pipeline": sizes.get("stage", 1) > 1}


OBSTACLES = {"cudnn": cudnn_obstacles, "splash": splash_obstacles, "tiled": tiled_obstacles}


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


def rows_path(
  cfg: ResolvedModel,
  execution: Execution,
  sizes: Mapping[str, int],
  lengths: Sequence[int],
) -> Path:
  """The path of one call over whole rows, in training and outside of it.

  A kernel that is named by `training.attention` demands nothing of the lengths here: those
  of a training step were checked by `training_path`, and an encoder reads prompts of any.
  """
  name = execution.attention
  if name in FUSED:
    choose_path(cfg, execution, sizes)  # raises what holds for every length
    if found := OBSTACLES[name](cfg, execution, sizes, lengths):
      return Path("blocked", f"{name} is not possible: {found[0]}")
  return choose_path(cfg, execution, sizes, lengths)


def prompt_path(
  cfg: ResolvedModel, execution: Execution, num_queries: int, num_keys: int
) -> Path:
  """The path of new tokens over a cache.

  Prompts use the fused kernel where it can run the model. A kernel that is named by
  `training.attention` is no demand here, because a run may decode on other devices than it
  was trained on.
  """
  if execution.attention == "blocked":
    return Path("cached", "as training.attention says")
  if num_queries < SHORTEST_PROMPT:
    return Path("cached", "too few queries for a fused kernel")
  execution = dataclasses.replace(execution, attention="auto")
  chosen = choose_path(cfg, execution, axis_sizes_in_use(), (num_queries, num_keys))
  return chosen if chosen.name in FUSED else Path("cached", chosen.why)
