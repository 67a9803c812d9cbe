# SPDX-License-Identifier: Apache-2.0
"""The training step equals one written from scratch in float64 numpy, for every family.

The laws compare the step with itself: on a mesh, in micro-batches, resumed. They cannot
find a mistake that both sides share: in the loss's divisor, in the key of dropout, in the
weights of the experts' losses. The reference here shares only the documented rules.
"""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_step
import references
from conftest import slow
from meshes import mesh_of

from flaxlm.config import ModelConfig, MoEConfig, OptimizerConfig, TrainingConfig
from flaxlm.data.objectives import Batch
from flaxlm.nn.layers import Dropout
from flaxlm.nn.models import abstract_params, build_model
from flaxlm.training.logprobs import forward
from flaxlm.training.optimizer import build_optimizer
from flaxlm.training.step import (
  TrainState,
  abstract_state,
  jit_train_step,
  put_batch,
  shardings_of,
)

SMALL = dict(depth=2, width=8, num_heads=4, head_dim=4, ffn_width=12, context=8)
# Of 13 rows of the vocabulary two are padding: smoothing does not reach them.
SIZES = SMALL | dict(vocab_size=13, num_ids=11, dropout=0.25)
FAMILIES = {
  "decoder": dict(num_kv_heads=2, window=3, logit_softcap=3.0),
  "lstm": dict(family="rnn", cell="lstm", tied_embeddings=False),
  "encoder": dict(
    family="encoder",
    positions="learned",
    norm="layernorm",
    norm_placement="post",
    embedding_norm=True,
    activation="gelu_tanh",
    gated=False,
    biased=True,
    head_biased=True,
  ),
  "encoder_decoder": dict(
    family="encoder_decoder",
    positions="relative",
    relative_buckets=6,
    relative_distance=5,
    encoder_depth=1,
  ),
  "moe": dict(
    num_kv_heads=1,
    moe=MoEConfig(
      num_experts=4,
      expert_width=6,
      load_balance_weight=0.5,
      router_z_weight=0.125,
    ),
  ),
}
OPTIMIZER = OptimizerConfig(
  learning_rate=0.1,
  warmup_steps=2,
  weight_decay=0.2,
  clip_norm=0.25,
  epsilon=1e-3,  # small gradients are divided by it, not by their rounding
)
TRAINING = TrainingConfig(num_steps=6, label_smoothing=0.2)
SEED = 17
NUM_STEPS = 4  # at rates of 0, half, all, and less than all


def batch_of(cfg: ModelConfig, seed: int) -> Batch:
  """Four rows of documents and padding.

  No two tokens have the same weight, and an encoder predicts only some of its tokens, so
  the sum of the weights is neither B, nor B T, nor a number of tokens.
  """
  rng = np.random.default_rng(seed)
  segments_BT = np.array(
    [
      [1, 1, 1, 1, 1, 1, 1],
      [1, 1, 1, 2, 2, 2, 0],
      [1, 2, 2, 2, 2, 0, 0],
      [1, 1, 1, 1, 0, 0, 0],
    ]
  )
  starts_BT = np.diff(segments_BT, axis=1, prepend=0) != 0
  slots_T = np.arange(segments_BT.shape[1])
  start_of_BT = np.maximum.accumulate(np.where(starts_BT, slots_T, 0), 1)
  weights_BT = rng.uniform(0.1, 3.0, segments_BT.shape) * (segments_BT > 0)
  if cfg.family == "encoder":
    weights_BT *= rng.random(segments_BT.shape) < 0.5
  ids = lambda: rng.integers(0, cfg.num_ids, segments_BT.shape).astype(np.int32)
  places = ((slots_T - start_of_BT).astype(np.int32), segments_BT.astype(np.int32))
  source = (ids(), *places) if cfg.family == "encoder_decoder" else ()
  return Batch(ids(), ids(), *places, weights_BT.astype(np.float32), *source)


def random_state(model, optimizer, mesh) -> TrainState:
  """Every parameter random, norms and biases too: zeros and ones would hide mistakes."""
  abstract = abstract_state(model, optimizer, mesh)
  rng = np.random.default_rng(0)

  def draw(path, x):
    size = 1.0 if path[-1].key == "scale" else 0.0
    return jnp.asarray(size + rng.normal(0, 0.4, x.shape), x.dtype)

  params = jax.tree_util.tree_map_with_path(draw, abstract.params)
  state = TrainState(jnp.int32(0), params, optimizer.init(params))
  return jax.device_put(state, shardings_of(abstract))


@functools.partial(jax.jit, static_argnums=0)
def dropout_factors(model, params, batch, key) -> list[jax.Array]:
  """What each dropout of a forward pass with this key multiplies by, in their order."""
  factors = []

  def record(call, args, kwargs, context):
    if not isinstance(context.module, Dropout):
      return call(*args, **kwargs)
    factors.append(call(jnp.ones_like(args[0]), *args[1:], **kwargs))
    return args[0]

  with nn.intercept_methods(record):
    options = dict(deterministic=False, rngs={"dropout": key}, method="hidden")
    forward(model, params, batch, **options)
  return factors


def parts_and_factors(cfg, params, batch: Batch, step: int, num_parts: int):
  """The micro-batches of a step, each with its dropout factors.

  The key of a step is the seed's with the step's number folded in. Of n micro-batches, the
  i-th has rows i, i + n, ... and the i-th of the n keys that the step's key splits into.
  """
  key = jax.random.fold_in(jax.random.key(SEED), step)
  keys = jax.random.split(key, num_parts) if num_parts > 1 else [key]
  unrolled = build_model(cfg)  # no factor is inside of a loop
  parts = []
  for n, key in enumerate(keys):
    rows = jax.tree.map(lambda x, n=n: x[n::num_parts], batch)
    parts.append((rows, jax.device_get(dropout_factors(unrolled, params, rows, key))))
  return parts


OTHER_FAMILIES = ("moe", "lstm", "encoder", "encoder_decoder")


@pytest.mark.parametrize(
  ("name", "num_parts"),
  [("decoder", 2), *(slow(name, 1) for name in OTHER_FAMILIES)],
)
def test_steps_equal_float64(name, num_parts):
  """Loss, gradient norm, rate and every parameter, step by step, dropout and all.

  The decoder has its rows on two devices and in two micro-batches.
  """
  cfg = ModelConfig(**SIZES | FAMILIES[name]).resolve()
  training = TrainingConfig(
    num_steps=TRAINING.num_steps,
    label_smoothing=TRAINING.label_smoothing,
    accumulation_steps=num_parts,
    scanned=True,  # one block to compile
  )
  model = build_model(cfg, training)
  optimizer = build_optimizer(OPTIMIZER, training.num_steps)
  mesh = mesh_of(data=num_parts)
  step = jit_train_step(model, optimizer, training, mesh)
  state = random_state(model, optimizer, mesh)
  float64 = functools.partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
  start = params = float64(jax.device_get(state.params))
  zeros = jax.tree.map(np.zeros_like, params)
  moments = (zeros, zeros)
  drawn, norms = [], []
  for number in range(NUM_STEPS):
    batch = batch_of(cfg, number)
    parts = parts_and_factors(cfg, state.params, batch, number, num_parts)
    drawn.extend(factors for _, factors in parts)
    params, moments, expected = reference_step.step(
      params,
      moments,
      number,
      parts,
      float(batch.weights_BT.astype(np.float64).sum()),
      cfg=cfg,
      optimizer=OPTIMIZER,
      training=training,
    )
    state, metrics = step(state, put_batch(batch, mesh), SEED)
    for key, value in expected.items():
      np.testing.assert_allclose(metrics[key], value, rtol=2e-5, err_msg=f"{key} {number}")
    norms.append(expected["gradient_norm"])
    compare = lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)
    jax.tree.map(compare, jax.device_get(state.params), params)
  assert max(norms) > OPTIMIZER.clip_norm, "or nothing was clipped"
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, start)
  still = [
    jax.tree_util.keystr(path) for path, x in jax.tree.leaves_with_path(moved) if x < 1e-3
  ]
  assert all("['k']['bias']" in name for name in still), "a softmax does not see that one"
  assert_all_differ(drawn)


def assert_all_differ(drawn: list[list[np.ndarray]]) -> None:
  """Every step, micro-batch and layer drops different units."""
  masks = [(f.shape, f.tobytes()) for factors in drawn for f in factors]
  assert len(set(masks)) == len(masks)
  share = np.mean([np.mean(f == 0) for factors in drawn for f in factors])
  assert abs(share - SIZES["dropout"]) < 0.03


# -- The reference itself ------------------------------------------------------------------


def random_params(cfg: ModelConfig):
  abstract = abstract_params(build_model(cfg), mesh_of())
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda x: 0.5 * rng.normal(size=x.shape), abstract)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "lstm"])
def test_the_reference_agrees_with_the_other_one(name):
  """Its models equal those of `references`, which are compared with PyTorch's. There is no
  LSTM there; test_rnn.py has one of its own."""
  cfg = ModelConfig(**SIZES | FAMILIES[name]).resolve()
  params, batch = random_params(cfg), batch_of(cfg, 0)
  logits_BTV, _ = reference_step.logits_and_losses(
    reference_step.map_tree(reference_step.Tensor, params), cfg, batch, nothing_dropped()
  )
  places = (batch.segments_BT, batch.positions_BT)
  if cfg.family == "encoder_decoder":
    expected_BTV = references.encoder_decoder(
      params,
      cfg,
      batch.source_BS,
      batch.tokens_BT,
      source_segments_BS=batch.source_segments_BS,
      segments_BT=batch.segments_BT,
    )
  else:
    expected_BTV = getattr(references, cfg.family)(params, cfg, batch.tokens_BT, *places)
  real_BT = batch.segments_BT > 0
  np.testing.assert_allclose(
    logits_BTV.value[real_BT], expected_BTV[real_BT][:, : cfg.num_ids], atol=1e-12
  )


@pytest.mark.parametrize("name", FAMILIES)
def test_the_references_gradient_is_the_slope(name):
  """Along a direction in the space of all parameters, by central differences."""
  cfg = ModelConfig(**SIZES | FAMILIES[name]).resolve()
  params, batch = random_params(cfg), batch_of(cfg, 0)
  rng = np.random.default_rng(2)
  direction = jax.tree.map(lambda x: rng.normal(size=x.shape), params)

  def minimised(distance):
    moved = jax.tree.map(lambda x, d: x + distance * d, params, direction)
    return reference_step.loss_and_gradient(moved, cfg, batch, nothing_dropped(), 0.2)

  _, gradient, _ = minimised(0.0)
  slope = (minimised(1e-6)[2] - minimised(-1e-6)[2]) / 2e-6
  along = jax.tree.map(lambda g, d: np.sum(g * d), gradient, direction)
  np.testing.assert_allclose(sum(jax.tree.leaves(along)), slope, rtol=1e-6)


def nothing_dropped():
  return itertools.repeat(1.0)
