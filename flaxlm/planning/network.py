# SPDX-License-Identifier: Apache-2.0
"""What a training step sends along each axis of the mesh, and how fast it travels there.

Formulas are those of the scaling book (jax-ml.github.io/scaling-book): gathering an array
of b bytes on an axis of n devices takes b (n - 1) / n / W, reduce-scattering it the same,
and an all-reduce twice that.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp

from flaxlm.config import MESH_AXES, ResolvedConfig, ResolvedModel
from flaxlm.cost import stacks
from flaxlm.devices import Device
from flaxlm.planning.memory import Sizes, StateBytes, gathered_keys, local_rows, state_bytes
from flaxlm.sharding import kv_parts, sums_at_ticks, sums_once, training_schedule


def network_bytes(cfg: ResolvedConfig, sizes: Sizes) -> dict[str, float]:
  """Bytes that one device sends in a step along each mesh axis in use."""
  training, model, state = cfg.training, cfg.model, state_bytes(cfg, sizes)
  # Passes over the layers: forward, that of a reference, and backward; and how many forward
  # passes there are besides the first.
  passes = 2 + cfg.reference_passes
  item, again = training.item_size, (training.remat == "full") + cfg.reference_passes
  parts, rows = training.accumulation_steps, local_rows(cfg, sizes)
  frozen = cfg.lora.rank > 0
  schedule = training_schedule(training, sizes)
  share = lambda axis: (sizes[axis] - 1) / sizes[axis]
  # Bytes of the residual stream, of all micro-batches.
  vectors = parts * rows * cfg.data.seq_len / sizes["context"] * model.width * item
  # A stage without a microbatch computes as well, on data that is thrown away.
  stretch = schedule.ticks / schedule.visits
  # Two branches count as a layer; one that reads a source has three.
  num_layers = stretch * sum(depth * (2 + reads) for depth, reads in stacks(model)) / 2
  summed = parts * gradient_bytes(cfg, sizes, state)
  # In a pipeline each tick has the weights of the layers of one visit.
  visit = state.stored_in_blocks / schedule.repeats
  is_once = is_summed_once(cfg, sizes)
  at_ticks = 0.0  # gradients that are summed at every tick (nn.pipeline)
  if schedule.stages > 1 and sums_at_ticks(jnp.dtype(training.param_dtype).itemsize):
    at_ticks = schedule.ticks * visit * item - state.blocks
    at_ticks *= not frozen  # what is frozen has no gradient
  over_data = state.learning_elements * 4.0 if is_once else summed + parts * at_ticks
  gathered = state.elements + schedule.ticks * visit - state.stored_in_blocks
  # Each chunk of the loss scatters a gradient of the head. DPO gathers the head too, for
  # a forward and a backward pass of the chunk (training/logprobs.py).
  scattered = (training.loss_chunks - 1) * head_elements(model, sizes)
  if cfg.active_dpo is not None:
    gathered, scattered = gathered + scattered, 0
  # Two all-reduces per layer, forward and backward (Shoeybi et al., 2019), and those of
  # embedding and head. With sequence_parallel they are reduce-scatters and all-gathers,
  # which cost the same, but the inputs are gathered once more in the backward pass.
  per_layer: float = 4 + 2 * again + training.sequence_parallel
  if training.matmul == "int8":
    # Products are summed in int32 before they are scaled, and so the gradients of what q, k
    # and v read are not added up first, nor those of up and gate.
    per_layer = (per_layer + 2 + model.gated) * 4 / item
  sums = num_layers * per_layer + passes
  sent = {
    # At each tick a microbatch, and its gradient; before and after the ticks all of them to
    # every stage and back; with repeats, layers to where they run; and the sum of the
    # gradients of all parameters that are not in a stage.
    "stage": passes * vectors * sizes["stage"] * schedule.ticks / schedule.microbatches
    + 2 * passes * vectors * (sizes["stage"] - 1)
    + 2 * parts * state.blocks * (schedule.repeats > 1) * share("stage")
    + 2 * max(0, summed - parts * state.blocks) * share("stage"),
    # An all-reduce of each micro-batch's gradients, or of their sum in float32.
    "data": 2 * over_data * share("data"),
    # Weights gathered forward and backward, gradients reduce-scattered; a pipeline does so
    # at every tick, for the layers of one visit.
    "fsdp": ((1 + passes - frozen) * gathered + (1 - frozen) * scattered)
    * parts
    * sizes["fsdp"]
    * item
    * share("fsdp"),
    "tensor": 2 * vectors * sums * share("tensor")
    + kv_copy_bytes(model, sizes["tensor"], stretch * vectors),
    # Keys and values, gathered in each layer; their gradients, reduce-scattered; and the
    # gradients of the parameters, as along `data`.
    "context": (2 + again) * parts * rows * num_layers * gathered_keys(cfg, sizes)
    + 2 * summed * share("context"),
    # The gradients of all parameters but the experts' are summed, too.
    "expert": expert_bytes(cfg, sizes, stretch * vectors)
    + 2 * (summed - parts * state.experts) * share("expert"),
  }
  return {axis: sent[axis] for axis in MESH_AXES if sizes[axis] > 1}


def is_summed_once(cfg: ResolvedConfig, sizes: Sizes) -> bool:
  """Whether gradients are summed over `data` once a step (training/accumulation.py)."""
  has_dropout = cfg.model.dropout > 0 or cfg.lora.dropout > 0
  parts, attention = cfg.training.accumulation_steps, cfg.training.attention
  return sums_once(sizes, parts, attention, has_dropout)


def head_elements(model: ResolvedModel, sizes: Sizes) -> int:
  """Weights of the head, or of the tied embedding, on one device."""
  return model.vocab_size * model.width // (sizes["tensor"] * sizes["fsdp"])


def gradient_bytes(cfg: ResolvedConfig, sizes: Sizes, state: StateBytes) -> int:
  """Bytes of the gradients on one device that are summed over copies, for one micro-batch:
  each as soon as it is there.

  Every chunk of the loss has a gradient of the head, and a tied embedding one more, of the
  lookup.
  """
  if cfg.lora.rank:
    return state.learning
  again = cfg.training.loss_chunks - 1 + cfg.model.tied_embeddings
  item = jnp.dtype(cfg.training.param_dtype).itemsize
  return state.learning + again * head_elements(cfg.model, sizes) * item


def expert_bytes(cfg: ResolvedConfig, sizes: Sizes, vectors: float) -> float:
  """Bytes that one device sends so that tokens reach their experts and come back;
  `vectors` are the bytes of the residual stream (`nn.moe`).

  Without a capacity each device gathers the tokens of all members of `expert`, and results
  are summed and scattered, whoever is chosen: both forward, and both backward, where each
  is the other's gradient. Under remat tokens are gathered once more, but no result is
  needed again. With a capacity places travel, taken or not: there and back, forward and
  backward and, because the weights of the sum have a gradient, both again under remat.
  """
  moe, size = cfg.model.moe, sizes["expert"]
  if not moe.num_experts:
    return 0.0
  again = cfg.training.remat not in ("none", "dots")
  times = 4 + again + 2 * cfg.reference_passes
  copies: float = size
  if moe.capacity_factor is not None:
    times += again
    # Every member of `context` serves whole rows.
    copies = moe.experts_per_token * moe.capacity_factor * sizes["context"]
  return times * vectors * copies * cfg.model.depth * (size - 1) / size


def kv_copy_bytes(model: ResolvedModel, tensor: int, vectors: float) -> float:
  """Bytes that one device sends in a backward pass because kv heads lie on several members
  of a `tensor` axis; `vectors` are the bytes of the residual stream.

  The gradients of keys and values are summed over the copies of their head. What they add
  to the gradient of the layer's input is summed over one copy of each head, apart from what
  the queries add, which is summed over all members.
  """
  parts = kv_parts(model, tensor)
  if parts == tensor:
    return 0.0
  local = 2 * (model.num_kv_heads // parts) * model.head_dim / model.width
  sums = local * (1 - parts / tensor) + (1 - 1 / parts)
  return 2 * vectors * sums * sum(depth * (1 + reads) for depth, reads in stacks(model))


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
  rate = _published_bandwidth(device, sizes, axis, slow)
  return rate and rate * device.link_fraction


def _published_bandwidth(
  device: Device, sizes: Sizes, axis: str, slow: Sequence[str]
) -> float | None:
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


def far_axes(device: Device, sizes: Sizes, slow: Sequence[str] = ()) -> tuple[str, ...]:
  """The axes in use whose members are in several domains."""
  reach, far = 1, []
  for axis in reversed(MESH_AXES):
    if axis not in slow:
      reach *= sizes[axis]
    if sizes[axis] > 1 and (axis in slow or reach > device.domain):
      far.append(axis)
  return tuple(far)
