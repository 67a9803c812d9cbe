# SPDX-License-Identifier: Apache-2.0
"""Decoding on paper: each step reads the weights and the cache, and memory limits it."""

import bisect
import dataclasses
import math

from flaxlm.config import ResolvedConfig, ResolvedModel, slow_axes
from flaxlm.cost import (
  active_parameters,
  copied_weights,
  forward_work,
  kv_cache_bytes,
  narrow_parameters,
  parameters,
  weight_bytes,
)
from flaxlm.devices import Device
from flaxlm.errors import ConfigError
from flaxlm.planning.memory import Sizes, cache_copies, decoding_memory
from flaxlm.planning.network import axis_bandwidth
from flaxlm.planning.roofline import memory_seconds, seconds_of
from flaxlm.sharding import batch_shards, kv_parts

# Kernels of a greedy decoding step, by kind of device: in each layer, and outside the
# layers (counted in HLO for LLaMA and GPT shapes: 22 and 29, 24 and 37 on a CPU; 14 and 9,
# 15 and 9 on an H100). On a CPU products with weights are not among them: their measured
# rates include what a call costs.
OPERATIONS = {"cpu": (23, 32), "gpu": (14, 9)}


@dataclasses.dataclass(frozen=True)
class Stored:
  """The dtypes that decoding keeps matrices and the cache in (`flaxlm infer --weights` and
  `--cache`); None: that of the computation."""

  weights: str | None = None
  cache: str | None = None


AS_COMPUTED = Stored()


@dataclasses.dataclass(frozen=True)
class Decoding:
  """Decoding `rows` rows of `context` tokens."""

  rows: int
  context: int
  stored: Stored = AS_COMPUTED


@dataclasses.dataclass(frozen=True)
class DecodePoint:
  """Decoding `batch` rows of `context` tokens: memory per device, and time per step."""

  batch: int
  context: int
  bytes_per_device: int
  fits: bool | None
  min_devices: int | None  # the fewest that together hold the weights and the cache
  seconds: float | None  # per step: one token for every row
  tokens_per_second: float | None
  limited_by: str | None
  stored: Stored = AS_COMPUTED


def plan_decoding(
  cfg: ResolvedConfig,
  sizes: Sizes,
  device: Device,
  batch: int,
  context: int,
  stored: Stored = AS_COMPUTED,
) -> DecodePoint:
  """One point of the bandwidth roofline: every step reads the weights and the cache.

  Arrays are sharded as in training: rows over `data`, `fsdp` and `expert`, heads over
  `tensor`. So `fsdp` has to gather the weights at every step; `tensor` does not.
  """
  usable, item = device.usable_bytes, cfg.training.item_size
  dtypes = (stored.weights, stored.cache)
  local = sum(decoding_memory(cfg, sizes, batch, context, *dtypes, device.lanes).values())
  shape, narrow = (cfg.model, batch, context, item), stored.cache == "int8"
  whole = weight_bytes(cfg.model, item, stored.weights)
  cached = kv_cache_bytes(*shape, cfg.source_length, narrow=narrow)
  whole += round(cached * cache_copies(cfg.model, device.lanes))
  times = _decode_times(cfg, sizes, device, batch, context, stored)
  known = {name: time for name, time in times.items() if time is not None}
  seconds = None
  if len(known) == len(times):
    compute, weights, *others = known.values()
    seconds = max(compute, weights) + sum(others)
  return DecodePoint(
    batch=batch,
    context=context,
    bytes_per_device=local,
    fits=None if usable is None else local <= usable,
    min_devices=usable and math.ceil(whole / usable),
    seconds=seconds,
    tokens_per_second=seconds and batch / seconds,
    limited_by=None if seconds is None else max(known, key=lambda name: known[name]),
    stored=stored,
  )


def most_rows(
  cfg: ResolvedConfig,
  sizes: Sizes,
  device: Device,
  context: int,
  stored: Stored,
  latency: float,
) -> DecodePoint | None:
  """The point of the most rows that fit and get a token each in `latency` seconds at most;
  None if one row for each device does not.

  Rows are a multiple of the devices that share them. Raises `ConfigError` if the time or
  the memory of the device is not known.
  """
  shards = batch_shards(sizes)

  def point(rows: int) -> DecodePoint:
    return plan_decoding(cfg, sizes, device, rows * shards, context, stored)

  first = point(1)
  if first.seconds is None or first.fits is None:
    raise ConfigError(
      f"a latency needs times and memory, which are not known of {device.name}",
      "name another --device",
    )
  keeps = lambda rows: (at := point(rows)).fits and (at.seconds or 0) <= latency
  if not keeps(1):
    return None
  too_many = 2
  while keeps(too_many):  # memory ends it: every row has logits
    too_many *= 2
  found = bisect.bisect_left(range(too_many), True, lo=1, key=lambda rows: not keeps(rows))
  return point(found - 1)


def _decode_times(
  cfg: ResolvedConfig,
  sizes: Sizes,
  device: Device,
  batch: int,
  context: int,
  stored: Stored,
) -> dict[str, float | None]:
  """Seconds of one step by their cause; compute and weights come first."""
  model, tensor = cfg.model, sizes["tensor"]
  rows = math.ceil(batch / batch_shards(sizes))
  flops, weights, cache = decode_work(cfg, rows, context, stored)
  if stored.weights in ("int8", "int4"):  # as if more were read: widening limits it
    weights += widening_bytes(model, device, stored.weights)
  weights *= 1 + copied_weights(model, tensor) / sum(parameters(model).values())
  weights, cache = weights / tensor / sizes["expert"], cache / kv_parts(model, tensor)
  vectors = rows * model.width * cfg.training.item_size * model.depth
  exchanges = {  # bytes in all, and the number of exchanges
    "fsdp": (weights, model.depth),
    "tensor": (4 * vectors, 2 * model.depth),
    # Every member gathers the tokens of all, and their sums are scattered (`nn.moe`).
    "expert": (2 * vectors * sizes["expert"], 2 * model.depth),
  }
  network: float | None = 0.0
  for axis, (whole, count) in exchanges.items():
    if sizes[axis] > 1 and network is not None:
      sent = whole * (1 - 1 / sizes[axis])
      time = seconds_of(sent, axis_bandwidth(device, sizes, axis, slow_axes(cfg.mesh)))
      network = (
        None if time is None else network + max(time, count * device.collective_seconds)
      )
  of_layer, of_step = OPERATIONS.get(device.kind, (0, 0))
  operations = of_layer * model.depth + of_step
  return {
    "compute": seconds_of(flops / tensor, device.attainable_flops(cfg.training.dtype)),
    "weights": memory_seconds({"weights": weights}, device),
    "cache": memory_seconds({"cache": cache}, device),
    "network": network,
    "overhead": operations * device.operation_seconds,
  }


def widening_bytes(model: ResolvedModel, device: Device, kind: str) -> float:
  """Bytes that narrow weights count for beyond those that are read. That a number of int4
  takes as long to widen as one of int8 is assumed, not measured."""
  narrow = narrow_parameters(model)[0]
  if kind == "int8" or device.narrow_fraction == 1:
    return narrow * (1 / device.narrow_fraction - 1)
  in_blocks = narrow - model.width * model.vocab_size
  return narrow / device.narrow_fraction - (narrow - in_blocks / 2)


def decode_work(
  cfg: ResolvedConfig, rows: int, context: int, stored: Stored = AS_COMPUTED
) -> tuple[float, float, float]:
  """One decoding step of `rows` rows, unsharded: FLOPs, bytes of weights and of cache."""
  model, item, source = cfg.model, cfg.training.item_size, cfg.source_length
  work = forward_work(model, rows, 1)
  flops = work.matmul + work.head
  if model.family != "rnn":  # attention computes the scores of all slots of its cache
    slots = model.all_cache_slots(context) + model.depth * source
    flops += 4.0 * rows * model.num_heads * model.head_dim * slots
  weights = float(read_parameters(cfg, rows) * item)
  weights -= weight_bytes(model, item) - weight_bytes(model, item, stored.weights)
  narrow = stored.cache == "int8"
  return flops, weights, kv_cache_bytes(model, rows, context, item, source, narrow=narrow)


def read_parameters(cfg: ResolvedConfig, rows: int) -> int:
  """Parameters that a decoding step reads: not the input embedding, and of the experts only
  those that a row has chosen."""
  model = cfg.model
  parts = parameters(model)
  total, active = sum(parts.values()), active_parameters(model)
  lookup = 0 if model.tied_embeddings else parts["embedding"]
  # A row chooses A of E experts; independent rows together a share of 1 - (1 - A/E)^rows.
  if model.moe.num_experts:
    share = model.moe.experts_per_token / model.moe.num_experts
    skipped = (total - active) / (1 - share) if share < 1 else 0.0
    total -= round(skipped * (1 - share) ** rows)
  return total - lookup
