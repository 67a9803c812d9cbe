# SPDX-License-Identifier: Apache-2.0
"""Laws of the training step: its loss, its gradients, its layout, its randomness."""

import dataclasses
import functools
import math
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from flaxlm.checkpoint.store import CheckpointStore
from flaxlm.config import OptimizerConfig, ResolvedModel, TrainingConfig
from flaxlm.data.objectives import Batch
from flaxlm.nn.layers import Dropout
from flaxlm.nn.models import abstract_params, build_model
from flaxlm.sharding import name_of, use_mesh
from flaxlm.training.accumulation import accumulate
from flaxlm.training.logprobs import forward
from flaxlm.training.optimizer import Optimizer, build_optimizer
from flaxlm.training.step import (
  TrainState,
  abstract_state,
  jit_train_step,
  loss_and_gradient,
  put_batch,
  shardings_of,
)
from flaxlm.verify.case import (
  ROUNDING,
  Case,
  Finding,
  Law,
  distance,
  does_not_apply,
  one_layer,
  random_params,
)

# What a mesh must cut, by name, whatever the table of rules says (docs/sharding.md): the
# width of every matrix over fsdp, and the other dim of these over tensor or expert.
BY_TENSOR = re.compile(
  r"(attention/(q|k|v|o)/kernel|ffn/(gate|up|down)/kernel|experts/\w+/kernel"
  r"|shared/\w+/kernel|(^|/)(embedding/table|head/kernel)|relative_bias/table|cell/\w+/kernel)$"
)
OF_KV_HEADS = re.compile(r"attention/(k|v)/kernel$")
BY_EXPERT = re.compile(r"experts/\w+/kernel$")
MATRIX = re.compile(r"(kernel|table)$")
NO_WIDTH = re.compile(r"(relative_bias/table|shared_gate/kernel)$")


# -- Loss and gradient ---------------------------------------------------------------------


def loss(case: Case) -> Finding:
  """The step's loss, from the logits in float64: the mean over weighted tokens."""
  batch = case.batch
  logits_BTV = _forward(case.model, case.params, batch)
  logits_BTV = np.asarray(logits_BTV, np.float64)[..., : case.model_cfg.num_ids]
  normaliser_BT = np.log(np.exp(logits_BTV).sum(-1))
  targets_BT = np.take_along_axis(logits_BTV, batch.targets_BT[..., None], -1)[..., 0]
  nats_BT = (normaliser_BT - targets_BT) * batch.weights_BT
  weight = batch.weights_BT.sum()
  expected = nats_BT.sum() / weight
  found = [in_parts(case)[1]["loss"], gradient_of(case, case.one)[0] / weight]
  return Finding(distance(found, [expected] * 2))


@functools.partial(jax.jit, static_argnums=0)
def _forward(model: Any, params: Any, batch: Batch) -> jax.Array:
  return forward(model, params, batch).value


def accumulation(case: Case) -> Finding:
  """A step of two micro-batches with unequally long rows, and the optimizer's update by
  the gradient of all rows at once."""
  params, metrics = in_parts(case)
  optimizer = optimizer_of(case)
  weight, (_, gradient) = case.batch.weights_BT.sum(), gradient_of(case, case.one)
  gradient = jax.tree.map(lambda g: g / weight, gradient)
  norm = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(gradient)))
  expected = jax.device_get(_updated(optimizer, case.params, gradient))
  errors = distance(params, expected), distance(metrics["gradient_norm"], norm)
  return Finding(max(errors))


@functools.partial(jax.jit, static_argnums=0)
def _updated(optimizer: Optimizer, params: Any, gradient: Any) -> Any:
  updates, _ = optimizer.update(gradient, optimizer.init(params), params)
  return optax.apply_updates(params, updates)


@functools.lru_cache(maxsize=2)
def in_parts(case: Case) -> tuple[Any, dict]:
  """(parameters, metrics) after one step without dropout, in two micro-batches."""
  training = dataclasses.replace(case.training, accumulation_steps=2)
  model, optimizer = build_model(without_dropout(case), training), optimizer_of(case)
  step = jit_train_step(model, optimizer, training, case.one)
  state = state_of(model, optimizer, case.one)
  state, metrics = step(state, put_batch(case.batch, case.one), np.uint32(0))
  return jax.device_get((state.params, metrics))


@functools.lru_cache(maxsize=2)
def optimizer_of(case: Case) -> Optimizer:
  """The config's, whose first rate is not 0. Its epsilon is too large for the direction of
  an update to depend on rounding."""
  rule = dataclasses.replace(case.cfg.optimizer, warmup_steps=0, epsilon=1e-3)
  return build_optimizer(rule, 10)


def sharded(case: Case) -> Finding:
  """Loss and gradient on the mesh, and on one device."""
  if math.prod(case.sizes.values()) == 1:
    return does_not_apply("the mesh has one device")
  found, expected = gradient_of(case, case.mesh), gradient_of(case, case.one)
  loss_error = abs(found[0] - expected[0]) / max(1.0, abs(expected[0]))
  return Finding(max(float(loss_error), gradient_distance(found[1], expected[1])))


def how_it_runs(case: Case) -> Finding:
  """As the config says, and the other way round: layers in a loop or unrolled, recomputed
  in the backward pass or not, logits in chunks or at once."""
  run = case.training
  other = dataclasses.replace(
    run,
    scanned=not run.scanned,
    remat="full" if run.remat == "none" else "none",
    loss_chunks=4 if run.loss_chunks == 1 else 1,
  )
  found, expected = gradient_of(case, case.one, other), gradient_of(case, case.one)
  errors = distance(found[0], expected[0]), gradient_distance(found[1], expected[1])
  return Finding(max(errors))


def gradient_distance(actual: Any, expected: Any) -> float:
  """The largest difference as a share of the largest gradient."""
  scale = max(float(np.abs(x).max(initial=0)) for x in jax.tree.leaves(expected))
  return distance(*(jax.tree.map(lambda x: x / scale, t) for t in (actual, expected)))


@functools.lru_cache(maxsize=4)
def gradient_of(
  case: Case, mesh: Mesh, training: TrainingConfig | None = None
) -> tuple[float, Any]:
  """(loss, gradient), summed over the batch's tokens, without dropout."""
  run = training or case.training
  model = build_model(without_dropout(case), run)
  shardings = shardings_of(abstract_params(model, mesh))
  params = jax.device_put(jax.device_get(case.params_in(run)), shardings)
  step = use_mesh(mesh)(jax.jit(functools.partial(loss_and_gradient, model, run)))
  return jax.device_get(step(params, put_batch(case.batch, mesh), jax.random.key(0)))


def without_dropout(case: Case) -> Any:
  return dataclasses.replace(case.model_cfg, dropout=0.0)


def state_of(model: Any, optimizer: Any, mesh: Mesh) -> TrainState:
  """A state of step 0 with random parameters, cut as the rules say."""
  params = random_params(model)
  state = TrainState(np.int32(0), params, jax.jit(optimizer.init)(params))
  where = shardings_of(abstract_state(model, optimizer, mesh))
  return jax.device_put(jax.device_get(state), where)


# -- Layout --------------------------------------------------------------------------------


def layout(case: Case) -> Finding:
  """How many times each parameter, and its moments, are cut by the mesh."""
  sizes = case.sizes
  if math.prod(sizes[axis] for axis in ("fsdp", "tensor", "expert")) == 1:
    return does_not_apply("the mesh cuts no parameter")
  model = build_model(case.model_cfg, case.training)
  optimizer = build_optimizer(case.cfg.optimizer, 10)
  state = abstract_state(model, optimizer, case.mesh)
  leaves = jax.tree_util.tree_leaves_with_path(state.params)
  shapes = {leaf.shape: pieces(leaf) for _, leaf in leaves}
  details = []
  for path, leaf in leaves:
    name, found = name_of(path), pieces(leaf)
    if not MATRIX.search(name):
      continue  # vectors may be whole
    expected = expected_pieces(name, sizes, case.model_cfg)
    if found != expected:
      details.append(f"{name} is cut into {found} pieces, not {expected}")
  for leaf in jax.tree.leaves(state.opt_state):
    if leaf.ndim > 2 and leaf.shape in shapes and pieces(leaf) < shapes[leaf.shape]:
      details.append(f"moments of shape {leaf.shape} are whole where parameters are not")
  return Finding(float(len(details)), details=details[:3])


def pieces(leaf: Any) -> int:
  return math.prod(leaf.shape) // math.prod(leaf.sharding.shard_shape(leaf.shape))


def expected_pieces(name: str, sizes: Any, model: ResolvedModel) -> int:
  number = sizes["fsdp"] if not NO_WIDTH.search(name) else 1
  if BY_TENSOR.search(name):
    # There are as many pieces of keys and values as kv heads, at most.
    few = OF_KV_HEADS.search(name) and sizes["tensor"] > model.num_kv_heads
    number *= model.num_kv_heads if few else sizes["tensor"]
  if BY_EXPERT.search(name):
    number *= sizes["expert"]
  return number


# -- Randomness ----------------------------------------------------------------------------


def dropout(case: Case) -> Finding:
  """Every step, every micro-batch and every place in the model drops other units."""
  rate = case.model_cfg.dropout
  if not rate:
    return does_not_apply("model.dropout is 0")
  details = [*reused_in_steps(case), *reused_in_parts(), *reused_in_places(case)]
  return Finding(float(len(details)), details=details)


def reused_in_steps(case: Case) -> Iterator[str]:
  optimizer = build_optimizer(OptimizerConfig(kind="sgd", learning_rate=0.0), 10)
  model = build_model(one_layer(case.model_cfg, "G"), case.training)
  step = jit_train_step(model, optimizer, case.training, case.one)
  state, losses = state_of(model, optimizer, case.one), []
  for _ in range(2):
    state, metrics = step(state, put_batch(case.batch, case.one), np.uint32(0))
    losses.append(float(metrics["loss"]))
  if losses[0] == losses[1]:
    yield "two steps drop the same units"


def reused_in_parts() -> Iterator[str]:
  """The sum of a random number of each part, and the sum of its squares, tell."""

  def draw(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    number = jax.random.uniform(key)
    return number, number * number

  rows: Any = np.zeros((2, 1))
  total, squares = accumulate(draw, 2, {}, rows, jax.random.key(0))
  if abs(float(squares) - float(total) ** 2 / 2) < 1e-6:
    yield "two micro-batches of a step drop the same units"


def reused_in_places(case: Case) -> Iterator[str]:
  """What every dropout of the model lets through, of ones."""
  model, masks = build_model(case.model_cfg), []

  def record(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    if isinstance(context.module, Dropout) and context.method_name == "__call__":
      ones = next_fun(jnp.ones_like(args[0]), *args[1:], **kwargs)
      masks.append(ones)
    return next_fun(*args, **kwargs)

  def masks_of(params: Any) -> list:
    masks.clear()
    with nn.intercept_methods(record):
      options = dict(deterministic=False, rngs={"dropout": jax.random.key(0)})
      forward(model, params, case.batch, method="hidden", **options)
    return [*masks]

  dropped = [np.asarray(mask == 0) for mask in jax.jit(masks_of)(case.params)]
  for number, mask in enumerate(dropped):
    for other in dropped[:number]:
      if mask.shape == other.shape and np.array_equal(mask, other):
        yield "two places of the model drop the same units"
        return


# -- Checkpoints ---------------------------------------------------------------------------


def checkpoints(case: Case) -> Finding:
  """A state that is saved on the mesh and restored there, and on one device: the same
  bits."""
  model = build_model(case.model_cfg, case.training)
  optimizer = build_optimizer(case.cfg.optimizer, 10)
  state = state_of(model, optimizer, case.mesh)
  differing = 0
  with tempfile.TemporaryDirectory() as folder:
    store = CheckpointStore(Path(folder) / "checkpoints")
    try:
      store.save(3, state.params, state.opt_state, {"step": 3})
      store.wait()
      for mesh in (case.mesh, case.one):
        target = abstract_state(model, optimizer, mesh)
        targets = dict(params=target.params, opt_state=target.opt_state)
        found = store.restore(3, **targets)
        for name, tree in targets.items():
          before = jax.tree.leaves(jax.device_get(getattr(state, name)))
          after = jax.tree.leaves(jax.device_get(found[name]))
          assert len(before) == len(after) == len(jax.tree.leaves(tree))
          pairs = zip(before, after, strict=True)
          differing += sum(not np.array_equal(a, b) for a, b in pairs)
    finally:
      store.close()
  return Finding(float(differing))


LAWS = (
  Law("loss", "the loss is the mean over weighted tokens", loss, 1e-5, ROUNDING),
  Law("accumulation", "micro-batches are one batch", accumulation, 1e-4, ROUNDING),
  Law("sharded", "a mesh computes what one device does", sharded, 1e-4, ROUNDING),
  Law("layout", "the mesh cuts all that it should", layout, 0.0, "a number of pieces"),
  Law("how it runs", "loops, remat and chunks change nothing", how_it_runs, 1e-4, ROUNDING),
  Law("dropout", "no mask of dropout is used twice", dropout, 0.0, "masks are counted"),
  Law("checkpoints", "what is restored is what was saved", checkpoints, 0.0, "bits"),
)
