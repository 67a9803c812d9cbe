# SPDX-License-Identifier: Apache-2.0
"""How a batch is split: which rows are on which devices, and which a process reads."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flaxlm.config import Config, TrainingConfig
from flaxlm.errors import ConfigError
from flaxlm.sharding.heads import MeshError, offering
from flaxlm.sharding.rules import RULES, sizes_for
from flaxlm.sharding.schedule import training_schedule


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of each array of a `Batch`: rows over every data-parallel axis, tokens
  over `context`."""
  return NamedSharding(mesh, PartitionSpec(RULES["batch"], RULES["length"]))


def batch_shards(axis_sizes: Mapping[str, int]) -> int:
  """How many parts a batch is split into."""
  return math.prod(axis_sizes[axis] for axis in RULES["batch"])


def least_rows(training: TrainingConfig, sizes: Mapping[str, int]) -> int:
  """The number of rows of a micro-batch must be a multiple of this, so that each device has
  some of them and, in a pipeline, some of every microbatch."""
  schedule = training_schedule(training, sizes)
  return batch_shards(sizes) * (schedule.microbatches // schedule.stages)


def on_host(x: jax.Array) -> np.ndarray:
  """The whole array. If part of it is on other hosts, every process must call this."""
  if x.is_fully_addressable or x.is_fully_replicated:
    return np.asarray(x)
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def wait_on_cpu(values: Any) -> None:
  """Waits for arrays on a CPU, where a host that runs ahead gains nothing.

  Of programs that run at once, XLA's CPU client takes 32 for each device. If one more of
  several devices exchanges data among them, they wait for each other: it aborts after 40 s.
  And a program that starts while another runs is handed to a thread of a pool, as are all
  later ones, where their memory is mapped from the kernel every time.
  """
  if jax.default_backend() == "cpu":
    jax.block_until_ready(values)


@functools.lru_cache(maxsize=8)
def batch_parts(mesh: Mesh, process: int) -> tuple[tuple[int, ...], int]:
  """Which parts of a batch a process needs, and how many parts there are.

  A process whose devices have several parts needs all of them; processes that differ only
  along other axes need the same parts. If every process needs a run of adjacent parts, all
  of one length, each run counts as one part.
  """
  shards = batch_shards(mesh.shape)
  rows = NamedSharding(mesh, PartitionSpec(RULES["batch"]))
  slices = rows.devices_indices_map((shards,))
  owned: dict[int, set[int]] = {}
  for device in mesh.devices.flat:
    (part,) = slices[device]
    owned.setdefault(device.process_index, set()).add(part.indices(shards)[0])
  return merged(owned, process, shards)


def merged(
  owned: Mapping[int, set[int]], process: int, shards: int
) -> tuple[tuple[int, ...], int]:
  """The result of `batch_parts`, from the parts (of `shards`) that each process owns."""
  size = min(map(len, owned.values()))
  aligned = all(
    len(parts) == size and min(parts) % size == 0 and max(parts) - min(parts) == size - 1
    for parts in owned.values()
  )
  if aligned:
    return (min(owned[process]) // size,), shards // size
  return tuple(sorted(owned[process])), shards


def check_batch(cfg: Config, sizes: Mapping[str, int]) -> None:
  """Raises `ConfigError` for a batch, or rows, that a mesh cannot split evenly."""
  check_stages(cfg, sizes)
  accumulation, size = cfg.training.accumulation_steps, cfg.data.batch_size
  shards = least_rows(cfg.training, sizes) * accumulation
  factors = [f"{axis}={sizes[axis]}" for axis in RULES["batch"]]
  if sizes["stage"] == 1:
    del factors[0]
  elif cfg.training.pipeline_microbatches is not None:
    factors[0] = f"pipeline_microbatches={cfg.training.pipeline_microbatches}"
  factors.append(f"accumulation_steps={accumulation}")
  # As many rows as microbatches for each stage, if these are given: whatever the stages.
  fixed = cfg.training.pipeline_microbatches is not None
  axes = {axis: sizes[axis] for axis in RULES["batch"] if axis != "stage" or not fixed}
  check_multiple("data.batch_size", size, shards, " x ".join(factors), axes)
  parts = sizes["context"]
  context = (parts, f"mesh context={parts}", {"context": parts})
  check_multiple("data.seq_len", cfg.data.seq_len, *context)
  if cfg.data.source_len is not None:
    check_multiple("data.source_len", cfg.data.source_len, *context)


def check_multiple(
  name: str, number: int, factor: int, factors: str, sizes: Mapping[str, int]
) -> None:
  """Raises `ConfigError` for a field that is not a multiple of `factor`, which is `factors`
  in words; `sizes` are those of the mesh axes among them."""
  if number % factor:
    raise MeshError(
      f"{name}={number} is not a multiple of {factors}",
      f"nearest: {max(1, round(number / factor)) * factor}",
      sizes_for(number, sizes, factor),
      "; or --mesh: ",
    )


def check_stages(cfg: Config, sizes: Mapping[str, int]) -> None:
  """Raises `ConfigError` for a pipeline whose stages would not all do the same work."""
  with offering(lambda axis, n: _check_stages(cfg, {**sizes, axis: n})):
    _check_stages(cfg, sizes)


def _check_stages(cfg: Config, sizes: Mapping[str, int]) -> None:
  stages, training, model = sizes["stage"], cfg.training, cfg.model
  if stages == 1:
    return
  if model.family == "rnn":
    raise ConfigError("mesh axis stage is for transformers", "leave it out")
  repeats, microbatches = training.pipeline_repeats, training.pipeline_microbatches
  rounds = f"mesh stage={stages} x training.pipeline_repeats={repeats}"
  depths = {"depth": model.depth}
  if model.family == "encoder_decoder":
    depths["encoder_depth"] = model.encoder_depth or model.depth
  for name, depth in depths.items():
    check_multiple(f"model.{name}", depth, stages * repeats, rounds, {"stage": stages})
    visit = depth // (stages * repeats)
    kinds = model.layer_kinds(depth)
    if kinds != kinds[:visit] * stages * repeats:
      raise MeshError(
        f"model.layer_pattern={model.layer_pattern} differs from stage to stage: each has "
        f"{visit} layers at a time (model.{name}={depth} / ({rounds}))",
        "a stage has to hold whole patterns",
        sizes_for(depth, {"stage": stages}, stages * repeats),
        "; ",
      )
  if microbatches is not None:
    name = "training.pipeline_microbatches"
    stage = {"stage": stages}
    check_multiple(name, microbatches, stages, f"mesh stage={stages}", stage)
  if repeats > 1 and training.remat == "none":
    raise ConfigError(
      f"training.pipeline_repeats={repeats} with training.remat=none would keep the "
      "weights of every visit for the backward pass",
      "--training.remat=dots, or any other",
    )
