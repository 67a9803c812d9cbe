# SPDX-License-Identifier: Apache-2.0
"""Optimizers as Optax chains: clip the gradient, then apply the update rule."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from flaxlm.config import OptimizerConfig

# The leaves whose weights decay.
MATRICES = ("kernel", "table", "lora_a", "lora_b")


class Optimizer(NamedTuple):
  """An Optax gradient transformation with its learning-rate schedule."""

  init: Callable[[Any], Any]
  update: Callable[[Any, Any, Any], tuple[Any, Any]]
  learning_rate: optax.Schedule
  sharded: bool = False  # its moments are also sharded over `data`


def build_optimizer(cfg: OptimizerConfig, num_steps: int) -> Optimizer:
  """The whole update: global-norm clipping, the rule, decoupled decay on matrices."""
  schedule = build_schedule(cfg, num_steps)
  rule = build_rule(cfg, schedule)
  if cfg.clip_norm is not None:
    rule = optax.chain(optax.stateless(partial(clip, cfg.clip_norm)), rule)
  return Optimizer(rule.init, rule.update, schedule, cfg.sharded)


def clip(largest: float, gradient: Any, _: Any = None) -> Any:
  """The gradient, no longer than the norm `largest` (Pascanu et al., 2013).

  One factor for both cases: optax's choice between two gradients keeps a second one.
  """
  factor = jnp.minimum(1.0, largest / optax.tree.norm(gradient))
  return jax.tree.map(lambda g: (g * factor).astype(g.dtype), gradient)


def build_schedule(cfg: OptimizerConfig, num_steps: int) -> optax.Schedule:
  """The learning rate of each step: linear warm-up from 0 to the peak, then `schedule`."""
  peak, warmup = cfg.learning_rate, cfg.warmup_steps
  rest = max(1, num_steps - warmup)
  match cfg.schedule:
    case "cosine":  # Loshchilov & Hutter (2017), one period
      after = optax.cosine_decay_schedule(peak, rest, cfg.final_fraction)
    case "linear":
      after = optax.linear_schedule(peak, peak * cfg.final_fraction, rest)
    case "constant":
      after = optax.constant_schedule(peak)
    case "inverse_sqrt":  # Vaswani et al. (2017), section 5.3
      start = max(1, warmup)
      after = partial(inverse_sqrt, peak, start, warmup)
  ramp = optax.linear_schedule(0.0, peak, max(1, warmup))
  return optax.join_schedules([ramp, after], [warmup])


def inverse_sqrt(peak: float, start: int, warmup: int, step: jax.Array) -> jax.Array:
  """peak sqrt(start / t), where t counts from the first step and `step` after warm-up."""
  return peak * (start / jnp.maximum(step + warmup, 1)) ** 0.5


def build_rule(
  cfg: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """The update rule. All kinds decay matrices only, in proportion to the learning rate."""
  decay = dict(weight_decay=cfg.weight_decay, mask=decayed)
  match cfg.kind:
    case "adamw":
      return optax.adamw(schedule, cfg.beta1, cfg.beta2, cfg.epsilon, **decay)
    case "lion":
      return optax.lion(schedule, cfg.beta1, cfg.beta2, **decay)
    case "adafactor":
      # Adafactor's decay is not multiplied by the learning rate: multiply it by the peak.
      return optax.adafactor(
        schedule,
        weight_decay_rate=cfg.weight_decay * cfg.learning_rate or None,
        weight_decay_mask=decayed,
      )
    case "muon":  # orthogonalised momentum for matrices, Adam for the rest (Jordan, 2024)
      muon = contrib.muon(
        schedule,
        beta=cfg.beta1,
        adam_b1=cfg.beta1,
        adam_b2=cfg.beta2,
        muon_weight_dimension_numbers=matrix_dims,
        consistent_rms=0.2,  # updates as large as Adam's: one rate fits (Liu et al., 2025)
      )
      # Muon's own decay would also decay the norms and biases, which Adam updates.
      shrink = optax.add_decayed_weights(lambda t: -cfg.weight_decay * schedule(t), decayed)
      return optax.chain(muon, shrink)
    case "sgd":
      decay_rule = optax.add_decayed_weights(cfg.weight_decay, decayed)
      return optax.chain(decay_rule, optax.sgd(schedule, cfg.beta1))


def decayed(params: Any) -> Any:
  """True for matrices, False for norms and biases, by name: stacked, norms are 2-D too."""
  return _map_with_names(lambda names, _: names[-1] in MATRICES, params)


def matrix_dims(params: Any) -> Any:
  """How Muon sees each stacked kernel as L matrices; None for what Adam should update.

  By default optax would treat the 2-D embedding as a matrix, and the stacked 3-D kernels
  as none.
  """

  def dims(names: tuple[str, ...], leaf: jax.Array) -> contrib.MuonDimensionNumbers | None:
    if "blocks" not in names or names[-1] != "kernel":
      return None
    if names[-2] in ("router", "shared_gate"):  # too few columns to orthogonalise
      return None
    rows = 2 if names[-2] == "o" else 1  # "LNHD" contracts N and H, the others one dim
    axes = tuple(range(2 if "experts" in names else 1, leaf.ndim))  # "LEDF": a matrix each
    return contrib.MuonDimensionNumbers(axes[:rows], axes[rows:])

  return _map_with_names(dims, params)


def _map_with_names(function: Any, params: Any) -> Any:
  names = lambda path: tuple(str(key.key) for key in path)
  return jax.tree_util.tree_map_with_path(lambda p, x: function(names(p), x), params)
