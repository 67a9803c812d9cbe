# SPDX-License-Identifier: Apache-2.0
"""What the layers keep from the forward pass for the backward pass, read off the traced
model: the residuals of `jax.vjp`."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp

from flaxlm.config import (
  FUSED,
  NO_KERNEL,
  SPLASH,
  FusedKernel,
  LoraConfig,
  Remat,
  ResolvedConfig,
  ResolvedModel,
  TrainingConfig,
)
from flaxlm.data.objectives import Batch
from flaxlm.nn.kernels.outline import OUTLINE
from flaxlm.nn.lora import boxed_adapters, boxed_frozen, combined
from flaxlm.nn.models import boxed_shapes, build_model
from flaxlm.sharding import kv_parts
from flaxlm.training.logprobs import drops_units, forward


class Kept(NamedTuple):
  """Bytes that the layers keep from the forward pass for the backward pass."""

  per_row: int  # activations
  fixed: int  # copies of parameters, converted or sliced out of their stack


def kept_bytes(cfg: ResolvedConfig, sizes: Mapping[str, int], remat: Remat) -> Kept:
  """What one member of `tensor` and of `expert` keeps, besides the parameters.

  Without a capacity a member of `expert` has room for the choices of all of them
  (`nn.moe.dropless`): each choice takes what one choice more would take.
  """
  moe, others = cfg.model.moe, sizes["expert"] - 1
  kept = _traced(cfg, cfg.model, sizes["tensor"], remat)
  if not moe.num_experts or moe.capacity_factor is not None or not others:
    return kept
  chosen = moe.experts_per_token
  fewer = chosen - 1 if chosen == moe.num_experts else chosen
  one, two = (
    _traced(cfg, with_choices(cfg.model, n), sizes["tensor"], remat).per_row
    for n in (fewer, fewer + 1)
  )
  return kept._replace(per_row=kept.per_row + others * chosen * (two - one))


def with_choices(cfg: ResolvedModel, number: int) -> ResolvedModel:
  """The model, with so many experts for each token."""
  moe = dataclasses.replace(cfg.moe, experts_per_token=number)
  return dataclasses.replace(cfg, moe=moe)


def _traced(cfg: ResolvedConfig, model: ResolvedModel, parts: int, remat: Remat) -> Kept:
  """What one of the `parts` members of a `tensor` axis keeps of a model."""
  remat = "full" if remat == "offload" else remat  # the rest is in the host's memory
  fused = cfg.training.attention in FUSED
  path: Any = OUTLINE if fused else "blocked"
  run = dataclasses.replace(
    precision_of(cfg.training), remat=remat, scanned=True, attention=path
  )
  model = _local_model(model, parts)
  kernel = SPLASH if cfg.training.attention == "splash" else NO_KERNEL
  return _kept_bytes(model, run, kernel, cfg.data.seq_len, cfg.source_length, cfg.lora)


def _local_model(cfg: ResolvedModel, parts: int) -> ResolvedModel:
  """The share of a model that one member of a `tensor` axis computes."""
  return dataclasses.replace(
    cfg,
    num_heads=cfg.num_heads // parts,
    num_kv_heads=cfg.num_kv_heads // kv_parts(cfg, parts),
    ffn_width=cfg.ffn_width // parts,
    moe=dataclasses.replace(cfg.moe, expert_width=cfg.moe.expert_width // parts),
  )


@functools.lru_cache(maxsize=64)
def _kept_bytes(
  cfg: ResolvedModel,
  run: TrainingConfig,
  kernel: FusedKernel,
  seq_len: int,
  source_len: int,
  lora: LoraConfig,
) -> Kept:
  """What the traced model keeps for one row and for two tells what grows with the rows."""
  model = build_model(cfg, run, kernel)
  learning, frozen = nn.unbox(boxed_shapes(model)), None
  if lora.rank:
    learning = nn.unbox(boxed_adapters(model, lora))
    frozen = nn.unbox(boxed_frozen(model, lora))
  dropout = drops_units(model, frozen)

  def hidden(learning: Any, frozen: Any, batch: Batch) -> Any:
    rngs = {"dropout": jax.random.key(0)} if dropout else {}
    options = dict(method="hidden", deterministic=not dropout, rngs=rngs)
    return forward(model, combined(frozen, learning), batch, **options)

  def kept(rows: int) -> int:
    ids: Any = jax.ShapeDtypeStruct((rows, seq_len), jnp.int32)
    source: Any = (
      jax.ShapeDtypeStruct((rows, source_len), jnp.int32) if source_len else None
    )
    batch = Batch(ids, ids, ids, ids, ids, source, source, source)
    return residual_bytes(hidden, learning, frozen, batch)

  one, two = kept(1), kept(2)
  return Kept(two - one, max(0, 2 * one - two))


def residual_bytes(function: Callable, differentiated: Any, *others: Any) -> int:
  """Bytes that the backward pass of `function` needs besides its arguments."""

  def residuals(differentiated: Any, *others: Any) -> list[jax.Array]:
    return jax.tree.leaves(jax.vjp(lambda x: function(x, *others), differentiated)[1])

  jaxpr = jax.make_jaxpr(residuals)(differentiated, *others).jaxpr
  origins = _origins(jaxpr)
  given = set(jaxpr.invars)
  kept = {}
  for var in jaxpr.outvars:
    if isinstance(var, jax.extend.core.Var) and origins(var) not in given:
      kept[origins(var)] = var
  arrays: list[Any] = [var.aval for var in kept.values()]
  return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)


def _origins(jaxpr: Any) -> Callable[[Any], Any]:
  """A function that finds the array which another one is a reshape of.

  q, k and v each keep their own reshape of one input, which the compiler stores once. The
  function looks through reshapes, also inside the loop over layers.
  """
  makers = {var: (eqn, n) for eqn in jaxpr.eqns for n, var in enumerate(eqn.outvars)}

  def origin(var: Any) -> Any:
    if var not in makers:
      return var
    eqn, number = makers[var]
    if eqn.primitive.name == "reshape":
      return origin(eqn.invars[0])
    if eqn.primitive.name == "scan":
      body = eqn.params["jaxpr"].jaxpr
      inside = body.outvars[number]
      if isinstance(inside, jax.extend.core.Var):
        return id(eqn), _origins(body)(inside)
    return var

  return origin


def precision_of(training: TrainingConfig) -> TrainingConfig:
  """The part of a run that decides the bytes of the state, as a key for the cache."""
  dtypes = dict(dtype=training.dtype, param_dtype=training.param_dtype)
  return TrainingConfig(attention="blocked", **dtypes)  # type: ignore[arg-type]
