# SPDX-License-Identifier: Apache-2.0
"""Bytes of memory per device, by part, of a training step and of decoding.

As little as possible is estimated. The shapes and shardings of the state are those of
`training`, by the same table of rules, on a mesh without devices. What the layers keep for
the backward pass is read off the traced model (planning/residuals.py). This module adds the
moments at which memory can peak, and the temporaries of each.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.extend.core
from jax.sharding import AbstractMesh, AxisType

from flaxlm.config import (
  SPLASH,
  LoraConfig,
  OptimizerConfig,
  ResolvedConfig,
  ResolvedModel,
  TrainingConfig,
)
from flaxlm.cost import kv_cache_bytes, stacks, weight_bytes
from flaxlm.decoding.prefill import Request
from flaxlm.nn.lora import boxed_adapters, boxed_frozen
from flaxlm.nn.models import boxed_shapes, build_model
from flaxlm.planning.residuals import kept_bytes, precision_of
from flaxlm.sharding import (
  axes_of,
  batch_shards,
  check_batch,
  check_stages,
  kv_parts,
  like_parameters,
  split_sizes,
  training_schedule,
  with_shardings,
)
from flaxlm.training.optimizer import build_optimizer

Sizes = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class PeakMemory:
  """Bytes on a device at each moment of a step at which memory can peak, by part.

  The moments are the pass of a reference, if there is one; the loss (all activations, and
  the logits), the backward pass of the layers (activations and gradients), that of the
  head, the update and, for rewards, the drawing of completions. `peak` names the moment
  that needs most, and `parts` are the parts of that one.
  """

  moments: Mapping[str, Mapping[str, int]]

  @property
  def peak(self) -> str:
    return max(self.moments, key=lambda name: sum(self.moments[name].values()))

  @property
  def parts(self) -> Mapping[str, int]:
    return self.moments[self.peak]

  @property
  def total(self) -> int:
    return sum(self.parts.values())


def training_memory(cfg: ResolvedConfig, sizes: Sizes, lanes: int = 1) -> PeakMemory:
  """Peak memory of one training step of a resolved config on one device.

  The device stores arrays in rows of `lanes` elements. Raises `ConfigError` when the mesh
  does not divide a dim or the batch.
  """
  model_cfg, training = cfg.model, cfg.training
  check_stages(cfg, sizes)
  state = state_bytes(cfg, sizes, lanes)
  rows = local_rows(cfg, sizes)
  T = cfg.data.seq_len
  depth = sum(depth for depth, _ in stacks(model_cfg))
  item = training.item_size
  casts = training.dtype != training.param_dtype
  kept = kept_bytes(cfg, sizes, training.remat)
  unsharded = dict.fromkeys(sizes, 1) | {"tensor": sizes["tensor"]}
  whole = state_bytes(cfg, unsharded)
  copies = kept.fixed * state.stored_in_blocks // whole.stored_in_blocks
  keys = gathered_keys(cfg, sizes) * rows
  schedule = training_schedule(training, sizes)
  kept_keys = keys * (depth if training.remat == "none" else 1)
  activations = rows * (kept.per_row - elsewhere(cfg, sizes)) // sizes["context"]
  activations += kept_keys
  activations = activations * schedule.ticks // schedule.visits  # a stage keeps all ticks
  # One layer's activations, computed again, or their gradients.
  together = rows * schedule.stages // schedule.microbatches  # rows in a layer at once
  one_layer = together * kept_bytes(cfg, sizes, "none").per_row // depth
  one_layer = one_layer // sizes["context"] + keys
  if training.attention == "splash":  # a float32 per row of scores, in 128 lanes
    queries = together * T // sizes["context"]
    one_layer += queries * (model_cfg.num_heads // sizes["tensor"]) * 4 * SPLASH.lanes

  copied = cfg.reference_passes and not cfg.lora.rank
  num_arrays, of_sources = 5 + (cfg.data.objective == "reward"), 3 * cfg.source_length
  always = {
    "parameters": state.parameters - (state.learning if cfg.lora.rank else 0),
    **({"adapters": state.learning} if cfg.lora.rank else {}),
    "optimizer_state": state.optimizer_state,
    **({"reference": state.parameters} if copied else {}),
    "batch": rows * training.accumulation_steps * 4 * (num_arrays * T + of_sources),
  }
  if training.accumulation_steps > 1:  # sums over micro-batches, in float32
    always["gradient_sums"] = state.learning_elements * 4
  V = model_cfg.vocab_size
  logits = rows * T // training.loss_chunks // sizes["context"] * (V // sizes["tensor"]) * 4
  head = model_cfg.width * (V // sizes["tensor"])
  gathered = sizes["fsdp"] > 1
  head_gradient = head * 4 if gathered and not cfg.lora.rank else 0
  gradients = {"gradients": state.learning}
  between = {"activations": activations, "weight_copies": copies}  # forward and backward
  # The reference's pass, over before the other begins, keeps nothing but the
  # log-probability of each target. A head that travels while it is multiplied has two
  # sums of logits.
  before = {"logits": logits * (1 + gathered)}
  # Where the vocabulary is cut, the gradient of the logits is made anew in each product
  # that reads it. While layers keep much, XLA sums the head's gradient after theirs, and
  # the logits stay; when rows are shared it does not.
  cut = sizes["tensor"] > 1
  late = cut and training.remat in ("none", "dots") and not training.sequence_parallel
  if schedule.stages > 1:
    # Every stage holds all microbatches and their gradients. With repeats, layers and their
    # gradients lie twice: where they are stored and where they run.
    everywhere = rows * schedule.stages * T // sizes["context"] * model_cfg.width * item
    between["pipeline"] = 2 * everywhere + 2 * state.blocks * (schedule.repeats > 1)
  moments = {
    **({"reference": before} if cfg.reference_passes else {}),
    "loss": between
    | {
      # In float32, and their gradient in the compute dtype.
      "logits": logits + (0 if cut else logits * item // 4),
      "temporary": head * item if casts or gathered else 0,  # gathered and converted
    },
    "backward": between
    | gradients
    | ({"logits": logits} if late else {})
    | {"temporary": one_layer + state.largest_layer * item},
    # The head's gradient is summed unsharded: at once, if that frees more memory (the
    # gradient of the logits) than it takes, else after everything else.
    "head": (between if logits > head * 4 // sizes["fsdp"] else gradients)
    | {"logits": logits, "temporary": head_gradient},
    "update": gradients | {"temporary": state.update_temporaries},
  }
  if cfg.data.objective == "reward":
    moments["drawing"] = drawing_memory(cfg, sizes, lanes)
  return PeakMemory({name: always | parts for name, parts in moments.items()})


def check_layout(cfg: ResolvedConfig, sizes: Sizes) -> None:
  """Raises `ConfigError` for a mesh that does not divide the config and its batch."""
  check_batch(cfg, sizes)
  model = cfg.model.padded(sizes["tensor"])
  state_bytes(dataclasses.replace(cfg, model=model), sizes)


# -- The state ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StateBytes:
  """Bytes of the training state on one device, and the element counts behind them."""

  parameters: int
  optimizer_state: int
  elements: int  # of parameters, on this device
  learning: int  # bytes of the parameters that learn: all, or adapters
  learning_elements: int
  blocks: int  # bytes of the blocks' parameters
  experts: int  # bytes of the experts' among them
  stored_in_blocks: int  # their elements, with the padding of the device's tiles
  largest_layer: int  # elements of one layer's parameters, gathered over fsdp
  update_temporaries: int  # bytes of the update rule's intermediate results


def state_bytes(cfg: ResolvedConfig, sizes: Sizes, lanes: int = 1) -> StateBytes:
  """The training state on one device, sharded by the rules that training uses."""
  run = precision_of(cfg.training)
  mesh = abstract_mesh(sizes, cfg.model)
  return _state_bytes(cfg.model, run, cfg.optimizer, mesh, lanes, cfg.lora)


@functools.lru_cache(maxsize=1024)
def _state_bytes(
  cfg: ResolvedModel,
  run: TrainingConfig,
  optimizer: OptimizerConfig,
  mesh: Any,
  lanes: int,
  lora: LoraConfig,
) -> StateBytes:
  boxed, boxed_learning, opt_state = _abstract_trees(cfg, run, optimizer, lora)
  sizes = mesh.shape
  learning = with_shardings(boxed_learning, mesh)
  params = {"all": with_shardings(boxed, mesh), "adapters": learning if lora.rank else {}}
  moments = like_parameters(opt_state, learning, mesh, optimizer.sharded)
  leaves = jax.tree_util.tree_leaves_with_path(params)
  among = lambda path, part: any(getattr(key, "key", None) == part for key in path)
  blocks = [leaf for path, leaf in leaves if among(path, "blocks")]
  experts = [leaf for path, leaf in leaves if among(path, "experts")]
  gathered = sum(
    local_size(leaf)
    * (sizes["fsdp"] if any("fsdp" in axes_of(axes) for axes in leaf.sharding.spec) else 1)
    // (leaf.shape[0] // sizes["stage"])
    for leaf in blocks
  )
  return StateBytes(
    parameters=tree_bytes(params, lanes),
    optimizer_state=tree_bytes(moments, lanes),
    elements=sum(map(local_size, jax.tree.leaves(params))),
    learning=tree_bytes(learning, lanes),
    learning_elements=sum(map(local_size, jax.tree.leaves(learning))),
    blocks=tree_bytes(blocks, lanes),
    experts=0 if lora.rank else tree_bytes(experts),
    stored_in_blocks=sum(local_size(leaf, lanes) for leaf in blocks),
    largest_layer=gathered,
    update_temporaries=(
      0 if lora.rank else _update_temporaries(params, blocks, cfg.width, optimizer.kind)
    ),
  )


def _update_temporaries(params: Any, blocks: Sequence[Any], width: int, kind: str) -> int:
  """Bytes that an update rule needs besides the state, which most overwrite in place."""
  if kind != "muon":
    return 0
  # Muon makes all updates at once. Newton-Schulz has a stack X of matrices, X X^T and its
  # square in float32; the products are unsharded on every device.
  most = 0
  for leaf in blocks:
    matrices, *dims = leaf.shape
    rows = min(width, math.prod(dims) // width)
    most = max(most, local_size(leaf) * 4 + 2 * matrices * rows * rows * 4)
  return tree_bytes(params) + most


def abstract_mesh(sizes: Sizes, model: ResolvedModel) -> Any:
  """A mesh for a model without devices, which is all that the sharding rules need."""
  sizes = split_sizes(sizes, model)
  types = (AxisType.Auto,) * len(sizes)
  return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=types)


@functools.lru_cache(maxsize=8)
def _abstract_trees(
  cfg: ResolvedModel, training: TrainingConfig, optimizer: OptimizerConfig, lora: LoraConfig
) -> tuple[Any, Any, Any]:
  """Shapes and logical names of the parameters, without adapters, and of those that learn;
  shapes of the optimizer's state."""
  model = build_model(cfg, training)
  boxed = learning = boxed_shapes(model)
  if lora.rank:
    boxed, learning = boxed_frozen(model, lora), boxed_adapters(model, lora)
  init = build_optimizer(optimizer, 1000).init
  return boxed, learning, jax.eval_shape(init, nn.unbox(learning))


def tree_bytes(tree: Any, lanes: int = 1) -> int:
  leaves = jax.tree.leaves(tree)
  return sum(local_size(leaf, lanes) * leaf.dtype.itemsize for leaf in leaves)


def local_size(leaf: jax.ShapeDtypeStruct, lanes: int = 1) -> int:
  """Elements that one device stores for an array, padding included.

  A TPU pads one dim to a multiple of its 128 lanes; the compiler takes the dim that wastes
  least.
  """
  assert leaf.sharding is not None
  shape = leaf.sharding.shard_shape(leaf.shape)
  size = math.prod(shape)
  if len(shape) < 2:
    return size
  dims = shape[1:] if len(shape) > 2 else shape  # the dim of the layers is never padded
  return min(size // dim * lanes * math.ceil(dim / lanes) for dim in dims)


# -- What the layers keep ----------------------------------------------------------------


def local_rows(cfg: ResolvedConfig, sizes: Sizes) -> int:
  """Rows of one micro-batch on one device; `ConfigError` if the batch does not divide."""
  check_batch(cfg, sizes)
  return cfg.data.batch_size // (batch_shards(sizes) * cfg.training.accumulation_steps)


def gathered_keys(cfg: ResolvedConfig, sizes: Sizes) -> int:
  """Bytes of one row's keys and values in one layer that a device gathers from the other
  members of `context`."""
  model, others = cfg.model, sizes["context"] - 1
  local_heads = model.num_kv_heads // kv_parts(model, sizes["tensor"])
  width = 2 * local_heads * model.head_dim
  per_row = cfg.data.seq_len * width * cfg.training.item_size
  return per_row * others // sizes["context"]


def elsewhere(cfg: ResolvedConfig, sizes: Sizes) -> int:
  """Bytes of the residual stream of one row that other members of `tensor` keep, with
  `sequence_parallel`: the input of each block and, if norms are not computed again, that of
  its second norm."""
  if not cfg.training.sequence_parallel:
    return 0
  times = 2 if cfg.training.remat in ("none", "dots") else 1
  depth = sum(depth for depth, _ in stacks(cfg.model))
  stream = cfg.data.seq_len * cfg.model.width * cfg.training.item_size
  return times * depth * stream * (sizes["tensor"] - 1) // sizes["tensor"]


# -- Decoding ----------------------------------------------------------------------------


def decoding_memory(
  cfg: ResolvedConfig,
  sizes: Sizes,
  rows: int,
  context: int,
  weights: str | None = None,
  cache: str | None = None,
  lanes: int = 1,
) -> Mapping[str, int]:
  """Bytes per device that decoding `rows` rows of `context` tokens needs.

  `weights` and `cache` are the dtypes that these are stored in, if not that of `training`.
  Where a head does not fill the device's rows of `lanes` elements, a block of steps gets a
  cache whose heads are padded, and keeps a copy of its own without the padding.

  An encoder-decoder's source is as long as in training (`data.source_len`).
  """
  training = cfg.training
  plain = dataclasses.replace(cfg, lora=LoraConfig())  # adapters are merged
  state, item = state_bytes(plain, sizes), training.item_size
  shards, parts = batch_shards(sizes), sizes["tensor"]
  V = cfg.model.vocab_size
  local = math.ceil(rows / shards)
  # Decoding unstacks the layers, and then every stage holds all of them.
  elements = state.elements + (sizes["stage"] - 1) * state.stored_in_blocks
  narrower = weight_bytes(cfg.model, item, weights) / weight_bytes(cfg.model, item)
  shape = (cfg.model, local, context, item, cfg.source_length, parts)
  copies = cache_copies(cfg.model, lanes)
  gathers, width = sizes["fsdp"] > 1, cfg.model.width
  return {
    "parameters": round(elements * item * narrower),
    "kv_cache": round(kv_cache_bytes(*shape, narrow=cache == "int8") * copies),
    "logits": local * (V // parts) * 4,
    # The head, the largest matrix, whole: each is gathered for its own product.
    **({"gathered": round(V // parts * width * item * narrower)} if gathers else {}),
  }


def cache_copies(model: ResolvedModel, lanes: int) -> float:
  """The bytes of a cache on a device with rows of `lanes` elements / of its numbers."""
  H = model.head_dim
  if model.family == "rnn" or H % lanes == 0:
    return 1.0
  return 1 + lanes * math.ceil(H / lanes) / H


def drawing_memory(cfg: ResolvedConfig, sizes: Sizes, lanes: int = 1) -> dict[str, int]:
  """Bytes per device that drawing a batch of completions needs besides the training state:
  a copy of the parameters as decoding reads them (with adapters also the merged ones it is
  made of), the cache of all rows, and their logits."""
  longest = cfg.data.seq_len - cfg.reward.max_new_tokens  # of a prompt
  request = Request([range(longest)], cfg.reward.max_new_tokens, cfg.model.num_ids)
  rows = cfg.data.batch_size
  parts = decoding_memory(cfg, sizes, rows, request.slots, lanes=lanes)
  plain = dataclasses.replace(cfg, lora=LoraConfig())
  copies = 2 if cfg.lora.rank else 1
  copy = state_bytes(plain, sizes).parameters
  drawing = {name: size for name, size in parts.items() if name != "parameters"}
  return {"weight_copies": copies * copy, **drawing}
