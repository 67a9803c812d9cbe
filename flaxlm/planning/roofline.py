# SPDX-License-Identifier: Apache-2.0
"""Time on paper: what a step costs in arithmetic, in memory traffic, and on each mesh axis.

What overlaps is an assumption. Ours: on one device, matrix products and passes over memory
take turns; the exchanges over `data` and `fsdp` (weights and gradients) overlap with them;
the exchanges over the other axes do not, because their results are needed at once; and in
a pipeline a stage waits for the first microbatch to arrive and for the last one to leave.
Formulas are those of the scaling book (jax-ml.github.io/scaling-book): gathering an array
of b bytes on an axis of n devices takes b (n - 1) / n / W, reduce-scattering it the same,
and an all-reduce twice that.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from flaxlm.config import MESH_AXES, ResolvedConfig, slow_axes
from flaxlm.nn.kernels.paths import Path, training_path
from flaxlm.nn.models import build_model
from flaxlm.planning.cost import (
  TOKENS_PER_PARAMETER,
  StepCost,
  active_parameters,
  attention_passes,
  forward_work,
  kv_cache_bytes,
  parameters,
  stacks,
  step_cost,
)
from flaxlm.planning.devices import Device
from flaxlm.planning.memory import (
  PeakMemory,
  Sizes,
  StateBytes,
  decoding_memory,
  gathered_keys,
  kept_bytes,
  local_rows,
  source_len,
  state_bytes,
  training_memory,
)
from flaxlm.planning.products import (
  Products,
  is_listed,
  training_products,
)
from flaxlm.sharding import batch_shards, describe_mesh, training_schedule

COLLECTIVE_SECONDS = 1e-6  # no exchange is faster, however small (scaling book)
# Passes over memory for an array that a layer keeps: it is written and read, and so is its
# gradient. An array that is computed again is written once more.
PASSES, PASSES_AGAIN = 4, 5
# Kernels of a greedy decoding step, by kind of device: in each layer, and outside the
# layers (counted in HLO for LLaMA and GPT shapes: 22 and 29, 24 and 37 on a CPU; 14 and 9,
# 15 and 9 on an H100). On a CPU products with weights are not among them: their measured
# rates include what a call costs.
OPERATIONS = {"cpu": (23, 32), "gpu": (14, 9)}
# Passes over the logits: written; read for the maximum, the sum and the gradient, which is
# written and read.
LOGIT_PASSES = 6


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a training step of a config needs on a mesh of devices."""

  device: Device
  sizes: Sizes
  parameters: Mapping[str, int]
  active_parameters: int
  memory: PeakMemory
  cost: StepCost
  times: "StepTimes"
  mfu: float | None  # strict, of the published peak
  slow: Sequence[str] = ()  # axes on the network between slices or hosts
  attention: Path | None = None  # of training's whole rows

  @property
  def mesh(self) -> str:
    return describe_mesh(self.sizes, self.slow)

  @property
  def num_devices(self) -> int:
    return math.prod(self.sizes.values())

  @property
  def fits(self) -> bool | None:
    usable = self.device.usable_bytes
    return None if usable is None else self.memory.total <= usable

  @property
  def tokens_per_second(self) -> float | None:
    return self.times.seconds and self.cost.tokens / self.times.seconds

  @property
  def optimal_tokens(self) -> int:
    return TOKENS_PER_PARAMETER * sum(self.parameters.values())

  def device_hours(self, tokens: float) -> float | None:
    rate = self.tokens_per_second
    return rate and self.num_devices * tokens / rate / 3600


@dataclasses.dataclass(frozen=True)
class StepTimes:
  """Seconds of one step by what takes them; None where the device's peak is not known."""

  compute: float | None
  memory: float | None
  network: Mapping[str, float | None]  # by mesh axis
  bubble: float = 0.0  # share of the ticks of a pipeline in which a stage waits

  @property
  def seconds(self) -> float | None:
    """Seconds of the whole step, by this module's assumption about what overlaps."""
    times = [self.compute, self.memory, *self.network.values()]
    if any(time is None for time in times):
      return None
    assert self.compute is not None and self.memory is not None
    wait = lambda *axes: sum(self.network.get(axis) or 0.0 for axis in axes)
    at_once = wait("stage", "tensor", "context", "expert")
    busy = self.compute + self.memory + (self.waiting or 0.0)
    return max(busy, wait("data", "fsdp")) + at_once

  @property
  def waiting(self) -> float | None:
    """Seconds in which a stage has no microbatch; the head counts as part of the stages."""
    if self.compute is None or self.memory is None:
      return None
    return (self.compute + self.memory) * self.bubble / (1 - self.bubble)

  @property
  def limited_by(self) -> str | None:
    """compute, memory, bubble or network:AXIS: the one that takes longest by itself."""
    if self.seconds is None:
      return None
    named = {"compute": self.compute, "memory": self.memory, "bubble": self.waiting}
    named |= {f"network:{axis}": time for axis, time in self.network.items()}
    return max(named, key=lambda name: named[name] or 0.0)


def plan_training(cfg: ResolvedConfig, sizes: Sizes, device: Device) -> Plan:
  """The plan of a resolved config; raises `ConfigError` when it cannot be laid out."""
  cfg, path = with_path(cfg, sizes, device)
  memory = training_memory(cfg, sizes, device.lanes)
  cost = step_cost(cfg)
  times = step_times(cfg, sizes, device, cost)
  peak, mfu = device.flops(cfg.training.dtype), None
  if peak and times.seconds:
    mfu = cost.strict_flops / (times.seconds * math.prod(sizes.values()) * peak)
    assert mfu <= 1, "faster than the peak"
  return Plan(
    device=device,
    sizes=sizes,
    parameters=parameters(cfg.model),
    active_parameters=active_parameters(cfg.model),
    memory=memory,
    cost=cost,
    times=times,
    mfu=mfu,
    slow=slow_axes(cfg.mesh),
    attention=path,
  )


def with_path(
  cfg: ResolvedConfig, sizes: Sizes, device: Device
) -> tuple[ResolvedConfig, Path | None]:
  """The config with the attention path that such a mesh takes, and the path's reason."""
  model = build_model(cfg.model, cfg.training, device.kernel_head_dim)
  path = training_path(model.cfg, model.execution, sizes, cfg.data.seq_len, source_len(cfg))
  if path is None:
    return cfg, None
  training = dataclasses.replace(cfg.training, attention=path.name)
  return dataclasses.replace(cfg, training=training), path


def step_times(
  cfg: ResolvedConfig, sizes: Sizes, device: Device, cost: StepCost
) -> StepTimes:
  state = state_bytes(cfg.model, cfg.training, cfg.optimizer, sizes)
  compute = compute_seconds(cfg, sizes, device, cost)
  memory = memory_seconds(traffic_parts(cfg, sizes, state), device)
  network = {}
  for axis, sent in network_bytes(cfg, sizes, state).items():
    rate = axis_bandwidth(device, sizes, axis, slow_axes(cfg.mesh))
    network[axis] = sent / rate if rate else None
  return StepTimes(compute, memory, network, training_schedule(cfg.training, sizes).bubble)


def compute_seconds(
  cfg: ResolvedConfig, sizes: Sizes, device: Device, cost: StepCost
) -> float | None:
  """Seconds of arithmetic: each product at its measured rate where rates were measured,
  else all FLOPs at the attainable rate."""
  num_devices = math.prod(sizes.values())
  fused, rate = cfg.training.attention == "cudnn", device.attention_rate
  executed, kernel = cost.executed_flops, 0.0
  if fused and rate:
    work = forward_work(cfg.model, cfg.data.batch_size, cfg.data.seq_len, source_len(cfg))
    passes = attention_passes(cfg.training)
    executed -= passes * work.attention_executed
    kernel = passes * work.attention / rate
  if device.product_rates and num_devices == 1 and is_listed(cfg):
    seconds = product_seconds(training_products(cfg), device, cfg.training.dtype)
    return None if seconds is None or (fused and not rate) else seconds + kernel
  peak = attainable_flops(device, cfg.training.dtype)
  return (kernel + executed / peak) / num_devices if peak else None


def product_seconds(products: Products, device: Device, dtype: str) -> float | None:
  seconds, rest = 0.0, 0.0
  for product, count in products.items():
    rate = device.product_rates.get(product)
    if rate:
      seconds += count * product.flops / rate
    else:
      rest += count * product.flops
  peak = attainable_flops(device, dtype)
  if rest and not peak:
    return None
  return seconds + (rest / peak if peak else 0.0)


def memory_seconds(parts: Mapping[str, float], device: Device) -> float | None:
  """Seconds to move these bytes: each part at its own measured bandwidth, if there is one,
  else at the memory's."""
  general, seconds = attainable_bandwidth(device), 0.0
  for part, num_bytes in parts.items():
    rate = device.pass_bandwidths.get(part, general)
    if not rate:
      return None
    seconds += num_bytes / rate
  return seconds


def attainable_flops(device: Device, dtype: str) -> float | None:
  """The best rate that was measured on such a device, else the published peak."""
  peak = device.flops(dtype)
  return peak and peak * (device.matmul_fraction or 1.0)


def attainable_bandwidth(device: Device) -> float | None:
  rate = device.memory_bandwidth
  return rate and rate * (device.bandwidth_fraction or 1.0)


def traffic_bytes(cfg: ResolvedConfig, sizes: Sizes, state: StateBytes) -> float:
  """Bytes that one device reads from memory and writes to it in a step; operands that stay
  in its caches are not counted."""
  return sum(traffic_parts(cfg, sizes, state).values())


def traffic_parts(cfg: ResolvedConfig, sizes: Sizes, state: StateBytes) -> dict[str, float]:
  """`traffic_bytes` by part."""
  training, model = cfg.training, cfg.model
  rows = local_rows(cfg, sizes)
  passes = PASSES if training.remat == "none" else PASSES_AGAIN
  T = cfg.data.seq_len
  kept = kept_bytes(cfg, sizes["tensor"], "none").per_row
  activations = passes * rows * kept / sizes["context"]
  logits = rows * T / sizes["context"] * (model.vocab_size // sizes["tensor"]) * 4
  weights = 3 * gathered_elements(state, sizes) * jnp.dtype(training.dtype).itemsize
  logit_passes = LOGIT_PASSES + (training.loss_chunks > 1)  # computed again
  times = training.accumulation_steps
  # Each microbatch reads the weights and adds to the gradients.
  schedule = training_schedule(training, sizes)
  in_blocks = state.stored_in_blocks * sizes["fsdp"]
  weights_of_blocks = 3 * in_blocks * jnp.dtype(training.dtype).itemsize
  return {
    "activations": times * activations,
    "logits": times * logit_passes * logits,
    "weights": times * (weights + (schedule.microbatches - 1) * weights_of_blocks),
    "gradients": times * (schedule.visits - 1) * 2 * blocks_bytes(cfg, state),
    "update": 2 * (state.parameters + state.optimizer_state) + 2 * state.parameters,
  }


def blocks_bytes(cfg: ResolvedConfig, state: StateBytes) -> int:
  """Bytes of the parameters of the layers on one device, or of their gradients."""
  return state.stored_in_blocks * jnp.dtype(cfg.training.param_dtype).itemsize


def gathered_elements(state: StateBytes, sizes: Sizes) -> int:
  """Parameters that one device uses in a step: its own, with those gathered over fsdp."""
  return state.elements * sizes["fsdp"]


# -- The network -------------------------------------------------------------------------


def network_bytes(cfg: ResolvedConfig, sizes: Sizes, state: StateBytes) -> dict[str, float]:
  """Bytes that one device sends in a step along each mesh axis in use."""
  training, model = cfg.training, cfg.model
  item = jnp.dtype(training.dtype).itemsize
  parts, rows = training.accumulation_steps, local_rows(cfg, sizes)
  share = lambda axis: (sizes[axis] - 1) / sizes[axis]
  tokens = rows * cfg.data.seq_len / sizes["context"]
  vector_bytes = tokens * model.width * item
  num_layers = sum(depth * (2 + reads_source) for depth, reads_source in stacks(model)) / 2
  again = training.remat == "full"
  schedule = training_schedule(training, sizes)
  # A stage without a microbatch computes as well, on data that is thrown away.
  stretch = schedule.ticks / schedule.visits
  num_layers *= stretch
  # A tied embedding has two gradients, of the lookup and of the logits, and each is summed.
  table = parameters(model)["embedding"] * model.tied_embeddings
  twice = table * jnp.dtype(training.param_dtype).itemsize
  gradients = state.parameters + twice // (sizes["tensor"] * sizes["fsdp"])
  blocks = blocks_bytes(cfg, state)
  at_ticks = 0.0
  if schedule.stages > 1:
    visit = state.stored_in_blocks * item / schedule.repeats
    at_ticks = parts * schedule.ticks * visit - blocks
  gathered: float = gathered_elements(state, sizes)
  gathered += (
    state.stored_in_blocks * sizes["fsdp"] * (schedule.ticks / schedule.repeats - 1)
  )
  sent = {
    # At each tick a microbatch, and its gradient; before and after the ticks all of them to
    # every stage and back; with repeats, layers to where they run; and the sum of the
    # gradients of all parameters that are not in a stage.
    "stage": 2
    * parts
    * vector_bytes
    * sizes["stage"]
    * schedule.ticks
    / schedule.microbatches
    + 4 * parts * vector_bytes * (sizes["stage"] - 1)
    + 2 * parts * blocks * (schedule.repeats > 1) * share("stage")
    + 2 * (gradients - blocks) * share("stage"),
    # An all-reduce of the gradients; in a pipeline at every tick.
    "data": 2 * (gradients + at_ticks) * share("data"),
    # Weights gathered forward and backward, gradients reduce-scattered; a pipeline does so
    # at every tick, for the layers of one visit.
    "fsdp": 3 * parts * gathered * item * share("fsdp"),
    # Two all-reduces per layer, forward and backward (Shoeybi et al., 2019), and those of
    # embedding and head. With sequence_parallel they are reduce-scatters and all-gathers,
    # which cost the same, but the inputs are gathered once more in the backward pass.
    "tensor": 2
    * parts
    * vector_bytes
    * (num_layers * (4 + 2 * again + training.sequence_parallel) + 2)
    * share("tensor"),
    # Keys and values, gathered in each layer; their gradients, reduce-scattered; and the
    # gradients of the parameters, as along `data`.
    "context": (2 + again) * parts * rows * num_layers * gathered_keys(cfg, sizes)
    + 2 * gradients * share("context"),
    "expert": 0.0,
  }
  if sizes["expert"] > 1:
    # Tokens to their experts and back, forward and backward; and the gradients of all other
    # parameters, as along `data`.
    moved = (4 + 2 * again) * parts * vector_bytes * model.moe.experts_per_token
    dense = 2 * gradients
    sent["expert"] = (moved * model.depth * stretch + dense) * share("expert")
  return {axis: sent[axis] for axis in MESH_AXES if sizes[axis] > 1}


def axis_bandwidth(
  device: Device, sizes: Sizes, axis: str, slow: Sequence[str] = ()
) -> float | None:
  """Bytes per second that one device sends along a mesh axis.

  Later mesh axes vary fastest, so their members are the nearest neighbours. The axes of a
  torus are shared out evenly among the mesh axes in use; on a switch every mesh axis has
  the full bandwidth. An axis that is larger than the domain has the bandwidth of the
  network cards of all its members within a domain. A `slow` axis lies outside all others:
  each of its members is in a slice or host of its own, and has the network card of one
  device.
  """
  if axis in slow:
    return device.network_bandwidth
  if device.link_bandwidth is None:
    return None
  fast = {other: size for other, size in sizes.items() if other not in slow}
  inner = math.prod(fast.get(other, 1) for other in MESH_AXES[MESH_AXES.index(axis) + 1 :])
  rate = device.link_bandwidth
  if device.torus_axes:
    in_use = sum(size > 1 for size in fast.values())
    rate *= max(1, device.torus_axes // in_use)
  if inner * sizes[axis] <= device.domain:
    return rate
  if device.network_bandwidth is None:
    return None
  local = max(1, device.domain // inner)
  return min(rate, local * device.network_bandwidth)


# -- Decoding ----------------------------------------------------------------------------


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


def plan_decoding(
  cfg: ResolvedConfig, sizes: Sizes, device: Device, batch: int, context: int
) -> DecodePoint:
  """One point of the bandwidth roofline: every step reads the weights and the cache.

  Arrays are sharded as in training: rows over `data`, `fsdp` and `expert`, heads over
  `tensor`. So `fsdp` has to gather the weights at every step; `tensor` does not.
  """
  memory = decoding_memory(cfg, sizes, batch, context)
  item = jnp.dtype(cfg.training.dtype).itemsize
  usable, local = device.usable_bytes, sum(memory.values())
  whole = sum(parameters(cfg.model).values()) * item
  whole += kv_cache_bytes(cfg.model, batch, context, item, source_len(cfg))
  times = _decode_times(cfg, sizes, device, batch, context)
  seconds = None
  if all(time is not None for time in times.values()):
    compute, weight_time, *others = (time or 0.0 for time in times.values())
    seconds = max(compute, weight_time) + sum(others)
  slowest = max(times, key=lambda name: times[name] or 0.0)
  return DecodePoint(
    batch=batch,
    context=context,
    bytes_per_device=local,
    fits=None if usable is None else local <= usable,
    min_devices=usable and math.ceil(whole / usable),
    seconds=seconds,
    tokens_per_second=seconds and batch / seconds,
    limited_by=None if seconds is None else slowest,
  )


def _decode_times(
  cfg: ResolvedConfig, sizes: Sizes, device: Device, batch: int, context: int
) -> dict[str, float | None]:
  """Seconds of one step by their cause; compute and weights come first."""
  model, tensor = cfg.model, sizes["tensor"]
  item = jnp.dtype(cfg.training.dtype).itemsize
  rows = math.ceil(batch / batch_shards(sizes))
  peak = attainable_flops(device, cfg.training.dtype)
  rate = attainable_bandwidth(device)
  flops, weights, cache = decode_work(cfg, rows, context)
  weights, cache = weights / tensor / sizes["expert"], cache / tensor
  vectors = rows * model.width * item * model.depth
  exchanges = {  # bytes in all, and the number of exchanges
    "fsdp": (weights, model.depth),
    "tensor": (4 * vectors, 2 * model.depth),
    "expert": (2 * vectors * model.moe.experts_per_token, 2 * model.depth),
  }
  network: float | None = 0.0
  for axis, (whole, count) in exchanges.items():
    if sizes[axis] > 1 and network is not None:
      speed = axis_bandwidth(device, sizes, axis, slow_axes(cfg.mesh))
      share = 1 - 1 / sizes[axis]
      time = speed and max(whole * share / speed, count * COLLECTIVE_SECONDS)
      network = None if time is None else network + time
  compute = flops / tensor / peak if peak else None
  of_layer, of_step = OPERATIONS.get(device.kind, (0, 0))
  operations = of_layer * model.depth + of_step
  return {
    "compute": compute,
    "weights": weights / rate if rate else None,
    "cache": memory_seconds({"cache": cache}, device),
    "network": network,
    "overhead": operations * device.operation_seconds,
  }


def decode_work(cfg: ResolvedConfig, rows: int, context: int) -> tuple[float, float, float]:
  """One decoding step of `rows` rows, unsharded: FLOPs, bytes of weights and of cache."""
  model, item = cfg.model, jnp.dtype(cfg.training.dtype).itemsize
  work = forward_work(model, rows, 1)
  flops, source = work.matmul + work.head, source_len(cfg)
  if model.family != "rnn":  # attention computes the scores of all slots of its cache
    slots = sum(model.cache_slots(kind, context) for kind in model.layer_kinds())
    flops += 4.0 * rows * model.num_heads * model.head_dim * (slots + model.depth * source)
  weights = read_parameters(cfg, rows) * item
  return flops, weights, kv_cache_bytes(model, rows, context, item, source)


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
