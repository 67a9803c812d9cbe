# SPDX-License-Identifier: Apache-2.0
"""Predicts a training step from its parts: products, attention, memory traffic."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.predictions.comparison import (
  compare,
  one_device_mesh,
  part_side,
  unmeasured_device,
)
from flaxlm.benchmark.measure import BenchOptions, Side, Timing, measure, wrong_result
from flaxlm.benchmark.report import Result
from flaxlm.benchmark.suites.attention import AttentionShape, operands, with_gradients
from flaxlm.benchmark.suites.matmul import multiply
from flaxlm.config import (
  FUSED,
  OptimizerConfig,
  ResolvedConfig,
  ResolvedModel,
  mesh_shape,
)
from flaxlm.cost import attention_passes, forward_work
from flaxlm.data.objectives import Windows, next_token
from flaxlm.devices import Device
from flaxlm.nn.kernels.cudnn import attend_cudnn
from flaxlm.nn.kernels.fusion import activate
from flaxlm.nn.layers import build_norm
from flaxlm.nn.masks import Placement, Reach, Scoring, Sight, visible
from flaxlm.nn.models import build_model
from flaxlm.planning.products import Product, training_products
from flaxlm.planning.residuals import residual_bytes
from flaxlm.planning.roofline import (
  LOGIT_PASSES,
  PASSES,
  plan_training,
  traffic_parts,
  with_path,
)
from flaxlm.platform import fused_kernel
from flaxlm.training.losses import cross_entropy
from flaxlm.training.optimizer import build_optimizer
from flaxlm.training.step import init_state, jit_train_step, put_batch

ONE_DEVICE = mesh_shape({})


@dataclasses.dataclass(frozen=True)
class TrafficPart:
  """Something that causes one part of a step's memory traffic and does nothing else."""

  side: Side
  num_bytes: float  # as the planner counts them


def predict_training(name: str, cfg: ResolvedConfig, options: BenchOptions) -> list[Result]:
  """Predicted / measured time of a step. Raises `FlaxLMError` if the loss is not finite."""
  cfg, path = with_path(cfg, ONE_DEVICE, unmeasured_device())
  traffic = {
    "activations": activations_part(cfg),
    "logits": logits_part(cfg),
    "update": update_part(cfg),
  }
  sides: dict[Any, Side] = {
    **{product: product_side(product, cfg) for product in training_products(cfg)},
    **{name: part.side for name, part in traffic.items()},
    "step": step_side(cfg),
  }
  if path is not None and path.name == "cudnn":
    sides["attention"] = attention_side(cfg)
  timings: dict[Any, Timing] = measure(sides, options)
  loss = float(timings["step"].result[0])
  if not np.isfinite(loss):
    raise wrong_result(f"the loss of {name} is {loss}")
  devices = [
    measured_device(cfg, traffic, timings, number) for number in range(options.rounds)
  ]
  predict = lambda device: plan_training(cfg, ONE_DEVICE, device).times.seconds
  return compare(
    f"train {name}",
    [predict(device) for device in devices],
    timings["step"],
    predicted_parts(cfg, devices[-1], timings),
    predict,
  )


def measured_device(
  cfg: ResolvedConfig,
  traffic: Mapping[str, TrafficPart],
  timings: Mapping[Any, Timing],
  number: int,
) -> Device:
  """A device with the rates of one round."""
  seconds = {name: timing.rounds[number] for name, timing in timings.items()}
  rates = {p: p.flops / seconds[p] for p in timings if isinstance(p, Product)}
  bandwidths = {name: part.num_bytes / seconds[name] for name, part in traffic.items()}
  attention_rate = None
  if "attention" in seconds:
    work = forward_work(cfg.model, cfg.data.batch_size, cfg.data.seq_len)
    work_seconds = cfg.model.depth * seconds["attention"]
    attention_rate = attention_passes(cfg.training) * work.attention / work_seconds
  return dataclasses.replace(
    unmeasured_device(),
    peak_flops={cfg.training.dtype: max(rates.values())},
    product_rates=rates,
    pass_bandwidths=bandwidths,
    memory_bandwidth=bandwidths["update"],
    attention_rate=attention_rate,
  )


def predicted_parts(
  cfg: ResolvedConfig, device: Device, timings: Mapping[Any, Timing]
) -> dict[str, float]:
  """Seconds of each part of a step on a device; parts that take no time are left out."""
  compute = plan_training(cfg, ONE_DEVICE, device).times.compute or 0.0
  attention = 0.0
  if "attention" in timings:
    attention = cfg.model.depth * timings["attention"].median
  parts = {"attention": attention, "products": compute - attention}
  for name, num_bytes in traffic_parts(cfg, ONE_DEVICE).items():
    parts[name] = num_bytes / device.pass_bandwidths.get(
      name, device.pass_bandwidths["update"]
    )
  return {name: seconds for name, seconds in parts.items() if seconds}


# -- What is timed -------------------------------------------------------------------------


def step_side(cfg: ResolvedConfig) -> Side:
  """The step of `flaxlm train`, repeated on the same batch.

  Its call returns the loss and the state, which is waited for.
  """
  mesh = one_device_mesh()
  model = build_model(cfg.model, cfg.training, fused_kernel())
  optimizer = build_optimizer(cfg.optimizer, cfg.training.num_steps)
  step = jit_train_step(model, optimizer, cfg.training, mesh)
  B, T = cfg.data.batch_size, cfg.data.seq_len
  window = np.random.default_rng(0).integers(1, cfg.model.vocab_size, (B, T + 1))
  windows = Windows(window, window == 0, np.full(B, T + 1))
  batch = put_batch(next_token(windows, end_id=0), mesh)
  state, seed = init_state(model, optimizer, mesh, seed=0), jnp.uint32(0)

  def call() -> tuple[jax.Array, Any]:
    nonlocal state
    state, metrics = step(state, batch, seed)
    return metrics["loss"], state

  return Side(call, queued=True)


def product_side(product: Product, cfg: ResolvedConfig) -> Side:
  M, K, N, G = product
  lead, dtype = (G,) if G > 1 else (), cfg.training.dtype
  return part_side(multiply, jnp.ones((*lead, M, K), dtype), jnp.ones((*lead, K, N), dtype))


def attention_side(cfg: ResolvedConfig) -> Side:
  """cuDNN's attention of one layer over whole rows, forward and backward."""
  model, data = cfg.model, cfg.data
  shape = AttentionShape(
    data.batch_size, data.seq_len, model.num_heads, model.num_kv_heads, model.head_dim
  )
  slots_BT = jnp.broadcast_to(jnp.arange(shape.T), (shape.B, shape.T))
  segments_BT = jnp.ones_like(slots_BT)
  mask_BTS = visible(Placement(slots_BT, segments_BT, segments_BT), shape.T)
  sight = Sight(mask_BTS, reach=Reach())
  scoring = Scoring(model.attention_scale)
  path = lambda q, k, v: attend_cudnn(q, k, v, sight, scoring)
  arrays = operands(shape, cfg.training.dtype)
  return part_side(functools.partial(with_gradients, path), *arrays)


def activations_part(cfg: ResolvedConfig) -> TrafficPart:
  """What a block does between its products, forward and backward."""
  model, data, dtype = cfg.model, cfg.data, cfg.training.dtype
  R = data.batch_size * data.seq_len
  scores = (data.batch_size, model.num_heads, data.seq_len, data.seq_len // 2)
  if cfg.training.attention in FUSED:  # the kernel stores no scores
    scores = (0, 0, 0, 1)
  inputs = (
    jnp.ones((R, model.width), dtype),
    jnp.ones((R, model.ffn_width), dtype),
    jnp.ones(scores),
  )
  passes = block_passes(model)

  def run(*inputs: jax.Array) -> Any:
    out, pull = jax.vjp(passes, inputs)
    return out, pull(out)

  return TrafficPart(part_side(run, *inputs), PASSES * residual_bytes(passes, inputs))


def block_passes(cfg: ResolvedModel) -> Callable[[tuple], tuple]:
  """A norm, an activation and a softmax."""
  norm = build_norm(cfg)
  variables = nn.unbox(norm.init(jax.random.key(0), jnp.ones((1, cfg.width))))

  def passes(inputs: tuple) -> tuple:
    x_RD, h_RF, scores = inputs
    out = activate(h_RF, cfg.activation) * (h_RF if cfg.gated else 1.0)
    exp = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    return norm.apply(variables, x_RD), out, (exp, exp.sum(-1))

  return passes


def logits_part(cfg: ResolvedConfig) -> TrafficPart:
  """The cross-entropy of float32 logits, and its gradient."""
  R = cfg.data.batch_size * cfg.data.seq_len
  logits_RV, targets_R = jnp.ones((R, cfg.model.vocab_size)), jnp.zeros(R, jnp.int32)
  loss = jax.value_and_grad(lambda x_RV: cross_entropy(x_RV, targets_R).mean())
  return TrafficPart(part_side(loss, logits_RV), LOGIT_PASSES * logits_RV.nbytes)


def update_part(cfg: ResolvedConfig) -> TrafficPart:
  """An update by AdamW; Muon's matrix products are counted among the products."""
  rule = OptimizerConfig(kind="adamw", warmup_steps=0)
  optimizer = build_optimizer(rule, 1000)
  state = init_state(build_model(cfg.model), optimizer, one_device_mesh(), seed=0)

  def update(state: Any, gradient: Any) -> Any:
    updates, new = optimizer.update(gradient, state.opt_state, state.params)
    return optax.apply_updates(state.params, updates), new

  adamw = dataclasses.replace(cfg, optimizer=rule)
  num_bytes = traffic_parts(adamw, ONE_DEVICE)["update"]
  return TrafficPart(part_side(update, state, state.params), num_bytes)
