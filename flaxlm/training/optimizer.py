# SPDX-License-Identifier: Apache-2.0
"""Optax chains: clip the gradient, then the update rule, on a schedule."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from flaxlm.config import OptimizerConfig


class Optimizer(NamedTuple):
  """An Optax gradient transformation that also tells its rate at a step."""

  init: Callable[[Any], Any]
  update: Callable[[Any, Any, Any], tuple[Any, Any]]
  learning_rate: optax.Schedule
  sharded: bool = False  # its moments are cut over `data` too


def build_optimizer(cfg: OptimizerConfig, num_steps: int) -> Optimizer:
  """The whole update: global-norm clipping, the rule, decoupled decay on matrices."""
  schedule = build_schedule(cfg, num_steps)
  rule = build_rule(cfg, schedule)
  if cfg.clip_norm is not None:
    rule = optax.chain(optax.clip_by_global_norm(cfg.clip_norm), rule)
  return Optimizer(rule.init, rule.update, schedule, cfg.sharded)


def build_schedule(cfg: OptimizerConfig, num_steps: int) -> optax.Schedule:
  """Learning rate of step 0, 1, ...: linear warm-up from 0 to the peak, then the shape."""
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
  """The update rule; every kind decays matrices only, in proportion to the rate."""
  decay = dict(weight_decay=cfg.weight_decay, mask=decayed)
  match cfg.kind:
    case "adamw":
      return optax.adamw(schedule, cfg.beta1, cfg.beta2, cfg.epsilon, **decay)
    case "lion":
      return optax.lion(schedule, cfg.beta1, cfg.beta2, **decay)
    case "adafactor":
      # Its decay is per step, not times the rate: give it the same strength at the peak.
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
        consistent_rms=0.2,  # as large as Adam's updates (Liu et al., 2025): one rate fits
      )
      # Its own decay would not spare the norms and biases that Adam updates.
      shrink = optax.add_decayed_weights(lambda t: -cfg.weight_decay * schedule(t), decayed)
      return optax.chain(muon, shrink)
    case "sgd":
      decay_rule = optax.add_decayed_weights(cfg.weight_decay, decayed)
      return optax.chain(decay_rule, optax.sgd(schedule, cfg.beta1))


def decayed(params: Any) -> Any:
  """True for matrices, False for norms and biases; by name, as all are stacked."""
  return _map_with_names(lambda names, _: names[-1] in ("kernel", "table"), params)


def matrix_dims(params: Any) -> Any:
  """Muon's view of each stacked kernel as L matrices; None for what Adam should update.

  Left to itself, optax would take the 2-D embedding for a matrix and the stacked 3-D
  kernels for none.
  """

  def dims(names: tuple[str, ...], leaf: jax.Array) -> contrib.MuonDimensionNumbers | None:
    if "blocks" not in names or names[-1] != "kernel":
      return None
    if names[-2] in ("router", "shared_gate"):  # too few columns to be orthogonal
      return None
    rows = 2 if names[-2] == "o" else 1  # "LNHD" contracts N and H, the others one dim
    axes = tuple(range(2 if "experts" in names else 1, leaf.ndim))  # "LEDF": a matrix each
    return contrib.MuonDimensionNumbers(axes[:rows], axes[rows:])

  return _map_with_names(dims, params)


def _map_with_names(function: Any, params: Any) -> Any:
  names = lambda path: tuple(str(key.key) for key in path)
  return jax.tree_util.tree_map_with_path(lambda p, x: function(names(p), x), params)
