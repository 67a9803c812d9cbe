# SPDX-License-Identifier: Apache-2.0
"""Laws of what the other laws leave out: a capacity, 16 bits, adapters, fused kernels."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flaxlm.config import NO_KERNEL, SPLASH, LoraConfig, OptimizerConfig, TrainingConfig
from flaxlm.nn.base import LanguageModel, Source
from flaxlm.nn.execution import Execution
from flaxlm.nn.kernels.paths import OBSTACLES
from flaxlm.nn.layers import PROJECTIONS, build_norm
from flaxlm.nn.lora import (
  abstract_adapters,
  abstract_frozen,
  combined,
  freeze,
  init_adapters,
  merged,
)
from flaxlm.nn.models import abstract_params, build_model
from flaxlm.training.optimizer import build_optimizer
from flaxlm.training.step import TrainState, jit_train_step, loss_and_gradient, put_batch
from flaxlm.verify.case import (
  ROUNDING,
  Case,
  Finding,
  Law,
  distance,
  does_not_apply,
  one_layer,
  random_params,
  random_tokens,
)
from flaxlm.verify.decoding_laws import empty, step
from flaxlm.verify.layer import layer_of
from flaxlm.verify.layer_laws import experts_by_hand, kind_of, norm_by_hand
from flaxlm.verify.shrink import SEQ_LEN
from flaxlm.verify.training_laws import gradient_of, sharded, without_dropout

TIGHT = 0.5  # a capacity that drops choices, whatever the router says
BFLOAT16_HALF = 2.0**-8  # the largest share of a number that rounding it changes
KERNEL_TOKENS = 256  # two of splash's blocks
KERNEL_DOCUMENT = 100  # tokens of the first of two documents


# -- Capacity ------------------------------------------------------------------------------


def capacity(case: Case) -> Finding:
  """Experts that serve the first so many choices of a row, with the config's capacity and a
  tight one: token by token; on the mesh; and decoding, which drops nothing."""
  factor = case.cfg.model.moe.capacity_factor
  if not case.model_cfg.moe.num_experts or factor is None:
    return does_not_apply("there are no experts with a model.moe.capacity_factor")
  errors = []
  for one_factor in (factor, TIGHT):
    moe = dataclasses.replace(case.model_cfg.moe, capacity_factor=one_factor)
    layer = layer_of(case, kind_of(case), moe=moe)
    x_BTD, y_BTD = layer.calls["ffn"]
    even_share = SEQ_LEN * moe.experts_per_token / moe.num_experts
    most = max(1, math.ceil(one_factor * even_share))
    expected = experts_by_hand(layer.cfg, layer.params["ffn"], x_BTD, most)
    errors.append(distance(y_BTD, expected))
  limited = dataclasses.replace(
    case, model_cfg=dataclasses.replace(case.model_cfg, moe=moe)
  )
  if math.prod(case.sizes.values()) > 1:
    errors.append(sharded(limited).error or 0.0)
  if case.family != "encoder":
    tokens_BT, source = random_tokens(2, SEQ_LEN), case.source_of(2)
    cache = empty(limited, 2, SEQ_LEN, source)
    found, _ = step(limited, tokens_BT, cache, np.full(2, SEQ_LEN, np.int32))
    errors.append(distance(found, case.logits(tokens_BT, source=source)))
  return Finding(max(errors))


# -- 16 bits -------------------------------------------------------------------------------


def bfloat16(case: Case) -> Finding:
  """Loss and gradient in the config's own dtypes, and in float32: of gradients the length
  of their difference. Logits stay in float32, and a norm is rounded once.

  Scores that nothing divides by the root of their head dim (T5) are larger by as much, and
  so are their errors, of which the weights make more: the difference is divided instead.
  """
  run = case.cfg.training
  if {run.dtype, run.param_dtype} == {"float32"}:
    return does_not_apply("training.dtype and training.param_dtype are float32")
  own = dataclasses.replace(case.training, dtype=run.dtype, param_dtype=run.param_dtype)
  found, expected = gradient_of(case, case.one, own), gradient_of(case, case.one)
  length = lambda tree: math.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(tree)))
  as_float64 = functools.partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
  gradients = as_float64(found[1]), as_float64(expected[1])
  apart = length(jax.tree.map(np.subtract, *gradients)) / length(gradients[1])
  apart /= max(1.0, case.model_cfg.attention_scale * math.sqrt(case.model_cfg.head_dim))
  loss = abs(found[0] - expected[0]) / max(1.0, abs(expected[0]))
  return Finding(max(float(loss), apart), details=[*in_wrong_dtype(case, own, found)])


def in_wrong_dtype(case: Case, own: TrainingConfig, found: Any) -> Iterator[str]:
  """What is to be in float32, or rounded only at its end, and is not."""
  logits = case.all_logits(
    random_tokens(8, SEQ_LEN),
    source=case.source_of(8),
    model=build_model(case.model_cfg, own),
    params=case.params_in(own),
  )
  for name, dtype in (("the loss", found[0].dtype), ("logits", logits.dtype)):
    if dtype != np.float32:
      yield f"{name} is in {dtype}"
  # Whatever is in float32 afterwards: hardly a number of 24 bits ends after the 8th.
  if (logits.astype(jnp.bfloat16).astype(np.float32) == logits).mean() > 0.5:
    yield "logits are rounded to 16 bits"
  if own.dtype == "bfloat16" and norm_error(case) > 1:
    yield "a norm is rounded before its end"


def norm_error(case: Case) -> float:
  """The largest error of a norm of bfloat16 numbers, as a share of what one rounding makes.

  The norm is asked for alone: in a larger program XLA may leave out the rounding of what
  goes in."""
  cfg, random = case.model_cfg, np.random.default_rng(6)
  x_BTD = jnp.asarray(3 + random.normal(size=(8, SEQ_LEN, cfg.width)), jnp.bfloat16)
  norm = build_norm(cfg)
  shapes = nn.unbox(jax.eval_shape(norm.init, jax.random.key(0), x_BTD)["params"])
  draw = lambda like: random.normal(size=like.shape).astype(np.float32)
  params = jax.tree.map(draw, shapes)
  found_BTD = np.asarray(jax.jit(norm.apply)({"params": params}, x_BTD), np.float64)
  exact_BTD = norm_by_hand(cfg, params, np.asarray(x_BTD, np.float64))
  allowed_BTD = 1.01 * BFLOAT16_HALF * np.abs(exact_BTD) + 1e-5  # and float32's rounding
  return float((np.abs(found_BTD - exact_BTD) / allowed_BTD).max())


# -- Adapters ------------------------------------------------------------------------------


def adapters(case: Case) -> Finding:
  """New adapters change nothing. Others have the logits of merged parameters, and a step of
  plain descent moves them by the chain rule's gradient, and nothing else."""
  if not case.cfg.lora.rank:
    return does_not_apply("lora.rank is 0")
  if case.family == "rnn":
    return does_not_apply("an RNN has no projections to adapt")
  lora = dataclasses.replace(case.cfg.lora, rank=min(4, case.cfg.lora.rank), dropout=0.0)
  model, one = build_model(without_dropout(case), case.training), case.one
  target = abstract_params(model, one)
  base = jax.tree.map(jnp.copy, case.params)
  frozen = freeze(base, abstract_frozen(model, lora, one), lora)
  new = init_adapters(abstract_adapters(model, lora, one), seed=0)
  random = np.random.default_rng(5)
  some = jax.tree.map(lambda x: np.float32(0.2 * random.normal(size=x.shape)), new)
  tokens_BT, source = random_tokens(8, SEQ_LEN), case.source_of(8)
  logits = lambda params: case.logits(tokens_BT, source=source, params=params)
  whole = merged(frozen, some, target)
  # The base itself, or what int8 has left of it.
  errors = [distance(logits(combined(frozen, new)), logits(merged(frozen, new, target)))]
  errors.append(distance(logits(combined(frozen, some)), logits(whole)))
  before = jax.device_get(frozen)
  state, moved = descend(case, model, lora, frozen, some)
  errors.append(distance(moved, by_chain_rule(case, model, lora, whole, some)))
  unlike = [
    "/".join(path)
    for path, x in flatten_dict(jax.device_get(state.frozen)).items()
    if not np.array_equal(x, flatten_dict(before)[path])
  ]
  return Finding(
    max(errors), details=[f"the base's {name} has moved" for name in unlike[:3]]
  )


def descend(case: Case, model: Any, lora: LoraConfig, frozen: Any, some: Any) -> Any:
  """(state, how far the adapters moved against the gradient) after a step of rate 1."""
  rule = OptimizerConfig(
    kind="sgd",
    learning_rate=1.0,
    schedule="constant",
    warmup_steps=0,
    weight_decay=0.0,
    clip_norm=None,
  )
  run = case.training
  optimizer = build_optimizer(rule, 10)
  train = jit_train_step(model, optimizer, run, case.one, lora)
  params = jax.device_put(some)
  state = TrainState(np.int32(0), params, optimizer.init(params), frozen)
  state, _ = train(state, put_batch(case.batch, case.one), np.uint32(0))
  return state, jax.tree.map(lambda old, new: old - np.asarray(new), some, state.params)


def by_chain_rule(case: Case, model: Any, lora: LoraConfig, whole: Any, some: Any) -> Any:
  """The adapters' gradient, from that of the merged kernels W + scale A B: scale dW B^T and
  scale A^T dW, layer by layer (Hu et al., 2021)."""
  learn = jax.jit(functools.partial(loss_and_gradient, model, case.training))
  batch = put_batch(case.batch, case.one)
  _, gradient = jax.device_get(learn(whole, batch, jax.random.key(0)))
  kernels, flat = flatten_dict(gradient), flatten_dict(some)
  found = {}
  for path in flat:
    a, b = (flat[(*path[:-1], name)] for name in ("lora_a", "lora_b"))
    dims = 1 + PROJECTIONS[path[-2]]  # of the layers, and of the inputs
    change = kernels[(*path[:-1], "kernel")]
    inputs = math.prod(change.shape[1:dims])
    change = change.reshape(len(change), inputs, -1) * lora.alpha / lora.rank
    if path[-1] == "lora_a":
      change = np.einsum("LIO,LRO->LIR", change, b.reshape(*b.shape[:2], -1))
    else:
      change = np.einsum("LIR,LIO->LRO", a.reshape(len(a), inputs, -1), change)
    found[path] = change.reshape(flat[path].shape) / case.batch.weights_BT.sum()
  return unflatten_dict(found)


# -- Kernels -------------------------------------------------------------------------------


def splash(case: Case) -> Finding:
  """The TPU's kernel by Pallas's interpreter, and XLA's operations: logits and gradient of
  one layer of each kind, over rows of two documents."""
  if case.family == "rnn":
    return does_not_apply("an RNN has no attention")
  kernel = dataclasses.replace(SPLASH, shortest=0, interpreted=True)
  execution = Execution(attention="splash", kernel=kernel)
  found = OBSTACLES["splash"](case.model_cfg, execution, {}, (KERNEL_TOKENS,))
  if found:
    return does_not_apply(f"splash cannot run it: {found[0]}")
  tokens_BT = random_tokens(1, KERNEL_TOKENS)
  index_T = np.arange(KERNEL_TOKENS)
  is_second_BT = (index_T >= KERNEL_DOCUMENT)[None]
  positions_BT = np.where(is_second_BT, index_T - KERNEL_DOCUMENT, index_T)
  read = {}
  if case.family == "encoder_decoder":
    places = positions_BT, 1 + is_second_BT
    read = {"source": Source(random_tokens(1, KERNEL_TOKENS, seed=5), *places)}
  errors = []
  for kind in sorted(set(case.model_cfg.period)):
    context = max(case.model_cfg.context, KERNEL_TOKENS)
    cfg = dataclasses.replace(one_layer(case.model_cfg, kind), context=context)
    params, ways = random_params(build_model(cfg)), []
    plain = dataclasses.replace(case.training, attention="blocked", remat="none")
    fused = dataclasses.replace(plain, attention="splash")
    for run, device in ((fused, kernel), (plain, NO_KERNEL)):
      model = build_model(cfg, run, device)
      arrays = tokens_BT, positions_BT, 1 + is_second_BT
      ways.append(jax.device_get(_weighed(model, params, arrays, read)))
    errors.append(distance(*ways))
  return Finding(max(errors))


@functools.partial(jax.jit, static_argnums=0)
def _weighed(model: LanguageModel, params: Any, arrays: Any, read: Any) -> Any:
  """(logits, the gradient of a weighted sum of them)."""

  def weighed(params: Any) -> Any:
    logits_BTV = model.apply({"params": params}, *arrays, **read).value
    logits_BTV = logits_BTV[..., : model.cfg.num_ids]
    weights_BTV = jax.random.normal(jax.random.key(0), logits_BTV.shape)
    return (weights_BTV * logits_BTV).mean(), logits_BTV

  (_, logits_BTV), gradient = jax.value_and_grad(weighed, has_aux=True)(params)
  return logits_BTV, gradient


def cudnn(case: Case) -> Finding:
  return does_not_apply(
    "it runs on NVIDIA GPUs, and these are simulated devices: "
    "`FLAXLM_TEST_PLATFORM=cuda pytest -m gpu -n 0` compares it on one"
  )


HALF = "numbers of 8 bits, and experts chosen by a hair"
LAWS = (
  Law("capacity", "experts serve the first choices", capacity, 1e-4, ROUNDING),
  Law("bfloat16", "16 bits round, and do no more", bfloat16, 0.2, HALF),
  Law("adapters", "adapters are merged kernels", adapters, 1e-4, ROUNDING),
  Law("splash", "the TPU's kernel is attention", splash, 1e-4, ROUNDING),
  Law("cudnn", "so is the NVIDIA GPU's", cudnn, 1e-2, "numbers of 8 bits"),
)
