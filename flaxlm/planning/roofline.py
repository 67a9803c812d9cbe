# SPDX-License-Identifier: Apache-2.0
"""Time on paper: what a step costs in arithmetic, in memory traffic, and on each mesh axis.

What overlaps is an assumption. Ours: on one device, matrix products and passes over memory
take turns; the exchanges over `data` and `fsdp` (weights and gradients) overlap with them,
and on a GPU they take processors from them (`Device.contention`); the exchanges over the
other axes do not, because their results are needed at once, nor does the sum of gradients
between slices or hosts, or of several micro-batches or ticks, which comes after the last;
and in a pipeline a stage waits for the first microbatch to arrive and for the last one to
leave.
"""

import dataclasses
import math
from collections.abc import Mapping

from flaxlm.config import FUSED, ResolvedConfig, slow_axes
from flaxlm.cost import (
  TOKENS_PER_PARAMETER,
  ForwardFlops,
  StepCost,
  attention_passes,
  copied_weights,
  forward_work,
  parameters,
  step_cost,
)
from flaxlm.devices import Device
from flaxlm.nn.kernels.paths import Path, training_path
from flaxlm.nn.models import build_model
from flaxlm.planning.experts import awaited_flops, fullest_share
from flaxlm.planning.memory import (
  PeakMemory,
  Sizes,
  local_rows,
  state_bytes,
  training_memory,
)
from flaxlm.planning.network import axis_bandwidth, far_axes, is_summed_once, network_bytes
from flaxlm.planning.products import Products, is_listed, narrow_flops, training_products
from flaxlm.planning.residuals import kept_bytes
from flaxlm.sharding import describe_mesh, training_schedule

# Passes over memory for an array that a layer keeps: it is written and read, and so is its
# gradient. An array that is computed again is written once more.
PASSES, PASSES_AGAIN = 4, 5
# Passes over the logits: written; read for the maximum, the sum and the gradient, which is
# written and read.
LOGIT_PASSES = 6
# Those of a forward pass alone.
FORWARD_PASSES, FORWARD_LOGIT_PASSES = 2, 3


# Axes whose exchanges nothing hides.
EXPOSED = ("stage", "context", "tensor", "expert")


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a training step of a config needs on a mesh of devices."""

  cfg: ResolvedConfig
  device: Device
  sizes: Sizes
  memory: PeakMemory
  cost: StepCost
  times: "StepTimes"
  mfu: float | None  # strict, of the published peak
  attention: Path | None  # of training's whole rows

  @property
  def parameters(self) -> dict[str, int]:
    """Number of parameters by part."""
    return parameters(self.cfg.model)

  @property
  def slow(self) -> tuple[str, ...]:
    """The axes on the network between slices or hosts."""
    return slow_axes(self.cfg.mesh)

  @property
  def flags(self) -> str:
    """The command-line flags that choose this way to run the config."""
    training = self.cfg.training
    shared = " --training.sequence-parallel=true" if training.sequence_parallel else ""
    return (
      f"--mesh {self.mesh} --training.remat={training.remat} "
      f"--training.accumulation-steps={training.accumulation_steps}{shared}"
    )

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
  def loose_mfu(self) -> float | None:
    """MFU with attention over all keys, as many publish it."""
    return self.mfu and self.mfu * self.cost.loose_flops / self.cost.strict_flops

  @property
  def fullest_share(self) -> float:
    """Choices that the fullest member of `expert` serves, over an even share of them."""
    return fullest_share(self.cfg, self.sizes)

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
  exposed: tuple[str, ...] = EXPOSED  # axes whose exchanges nothing hides
  contention: float = 0.0  # what the others cost, of the time that they take

  @property
  def seconds(self) -> float | None:
    """Seconds of the whole step, by this module's assumption about what overlaps."""
    times = [self.compute, self.memory, *self.network.values()]
    if any(time is None for time in times):
      return None
    assert self.compute is not None and self.memory is not None
    hidden = sum(t or 0.0 for axis, t in self.network.items() if axis not in self.exposed)
    at_once = sum(t or 0.0 for axis, t in self.network.items() if axis in self.exposed)
    busy = self.compute + self.memory + (self.waiting or 0.0) + self.contention * hidden
    return max(busy, hidden) + at_once

  @property
  def missing(self) -> tuple[str, ...]:
    """What is not known of the device: compute, memory or network:AXIS."""
    named = {"compute": self.compute, "memory": self.memory}
    named |= {f"network:{axis}": time for axis, time in self.network.items()}
    return tuple(name for name, time in named.items() if time is None)

  @property
  def least(self) -> float | None:
    """Seconds of a step if what is not known took no time; None where nothing is known."""
    if len(self.missing) == 2 + len(self.network):
      return None
    known = {axis: time or 0.0 for axis, time in self.network.items()}
    compute, memory = self.compute or 0.0, self.memory or 0.0
    return dataclasses.replace(self, compute=compute, memory=memory, network=known).seconds

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
  asked = cfg
  cfg, path = with_path(cfg, sizes, device)
  memory = training_memory(cfg, sizes, device.lanes)
  cost = step_cost(cfg)
  slow = slow_axes(cfg.mesh)
  speed = lambda axis: axis_bandwidth(device, sizes, axis, slow)
  times = StepTimes(
    compute_seconds(cfg, sizes, device, cost),
    memory_seconds(traffic_parts(cfg, sizes), device),
    {axis: seconds_of(b, speed(axis)) for axis, b in network_bytes(cfg, sizes).items()},
    training_schedule(cfg.training, sizes).bubble,
    (*EXPOSED, "data") if is_data_exposed(cfg, sizes, device) else EXPOSED,
    device.contention,
  )
  peak, mfu = device.flops(cfg.training.dtype), None
  if peak and times.seconds:
    mfu = cost.strict_flops / (times.seconds * math.prod(sizes.values()) * peak)
    assert mfu <= 1, "faster than the peak"
  return Plan(asked, device, sizes, memory, cost, times, mfu, path)


def is_data_exposed(cfg: ResolvedConfig, sizes: Sizes, device: Device) -> bool:
  """Whether nothing hides the sum of the gradients over `data`."""
  far = far_axes(device, sizes, slow_axes(cfg.mesh))
  return "data" in far or sizes["stage"] > 1 or is_summed_once(cfg, sizes)


def with_path(
  cfg: ResolvedConfig, sizes: Sizes, device: Device
) -> tuple[ResolvedConfig, Path | None]:
  """The config with the attention path that such a mesh takes, and the path's reason."""
  model = build_model(cfg.model, cfg.training, device.kernel)
  execution, lengths = model.execution, (cfg.data.seq_len, cfg.source_length)
  path = training_path(model.cfg, execution, sizes, *lengths)
  if path is None:
    return cfg, None
  training = dataclasses.replace(cfg.training, attention=path.name)
  return dataclasses.replace(cfg, training=training), path


def seconds_of(amount: float, rate: float | None) -> float | None:
  """The time of an amount at a rate per second; None where the rate is not known."""
  return amount / rate if rate else None


def compute_seconds(
  cfg: ResolvedConfig, sizes: Sizes, device: Device, cost: StepCost
) -> float | None:
  """Seconds of arithmetic: each product at its measured rate where rates were measured,
  else all FLOPs at the attainable rate."""
  num_devices = math.prod(sizes.values())
  fused = cfg.training.attention in FUSED
  rate = device.attention_flops(cfg.data.seq_len)
  copied = copied_weights(cfg.model, sizes["tensor"])
  again = ForwardFlops(2.0 * cost.tokens * copied, 0, 0, 0, 0).step(cfg.training)
  executed, kernel = cost.executed_flops + again + awaited_flops(cfg, sizes), 0.0
  if fused and rate:
    work = forward_work(cfg.model, cfg.data.batch_size, cfg.data.seq_len, cfg.source_length)
    passes = attention_passes(cfg.training) + cfg.reference_passes
    executed -= passes * work.attention_executed
    kernel = passes * work.attention / rate
  if device.product_rates and num_devices == 1 and is_listed(cfg):
    seconds = product_seconds(training_products(cfg), device, cfg.training.dtype)
    return None if seconds is None or (fused and not rate) else seconds + kernel
  peak = device.attainable_flops(cfg.training.dtype)
  if not peak:
    return None
  narrow = narrow_flops(cfg)
  eight = narrow_rate(cfg, device) or peak
  seconds = kernel + (executed - narrow) / peak + narrow / max(peak, eight)
  return seconds / num_devices


def narrow_rate(cfg: ResolvedConfig, device: Device) -> float | None:
  """FLOP/s of products of 8-bit numbers, if `training.matmul` asks for them and the
  compiler makes such products on the device: of 8-bit floats on GPUs alone."""
  if cfg.training.matmul == "fp8":
    return device.attainable_flops("float8") if device.kind == "gpu" else None
  return device.attainable_flops(cfg.training.matmul)  # "full" is no dtype


def product_seconds(products: Products, device: Device, dtype: str) -> float | None:
  """Seconds of all products: of those without a measured rate at the attainable one."""
  general, seconds = device.attainable_flops(dtype), 0.0
  for product, count in products.items():
    rate = device.product_rates.get(product, general)
    if not rate:
      return None
    seconds += count * product.flops / rate
  return seconds


def memory_seconds(parts: Mapping[str, float], device: Device) -> float | None:
  """Seconds to move these bytes: each part at its own measured bandwidth, if there is one,
  else at the memory's."""
  general, seconds = device.attainable_bandwidth, 0.0
  for part, num_bytes in parts.items():
    rate = device.pass_bandwidths.get(part, general)
    if not rate:
      return None
    seconds += num_bytes / rate
  return seconds


def traffic_parts(cfg: ResolvedConfig, sizes: Sizes) -> dict[str, float]:
  """Bytes that one device reads from memory and writes to it in a step, by part; operands
  that stay in its caches are not counted."""
  training, state = cfg.training, state_bytes(cfg, sizes)
  times = training.accumulation_steps
  again = training.loss_chunks > 1 and cfg.active_dpo is not None
  frozen, forward = cfg.lora.rank > 0, cfg.reference_passes
  schedule = training_schedule(training, sizes)
  rows = local_rows(cfg, sizes)
  passes = PASSES if training.remat == "none" else PASSES_AGAIN
  kept = kept_bytes(cfg, sizes, "none").per_row
  vocab_size = cfg.model.vocab_size // sizes["tensor"]
  logits = rows * cfg.data.seq_len / sizes["context"] * vocab_size * 4
  # Each microbatch of a pipeline reads the blocks' weights and adds to their gradients.
  read = state.elements + (schedule.microbatches - 1) * state.stored_in_blocks
  return {
    "activations": times
    * (passes + forward * FORWARD_PASSES)
    * rows
    * kept
    / sizes["context"],
    "logits": times * (LOGIT_PASSES + again + forward * FORWARD_LOGIT_PASSES) * logits,
    # Read forward and backward; their gradients are written, if they learn.
    "weights": times * (3 - frozen + forward) * read * sizes["fsdp"] * training.item_size,
    "gradients": times * (schedule.visits - 1) * 2 * state.blocks * (1 - frozen),
    "update": 2 * (state.learning + state.optimizer_state) + 2 * state.learning,
  }
