# SPDX-License-Identifier: Apache-2.0
"""Laws of the training step: sharded = one device, accumulation = one batch, and guards."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fuzz, slow
from meshes import mesh_of
from parameters import random_params, random_state

from flaxlm.config import ModelConfig, MoEConfig, OptimizerConfig, TrainingConfig
from flaxlm.data.objectives import Windows, next_token
from flaxlm.nn.models import abstract_params, build_model
from flaxlm.sharding import KV_COPIES, batch_shards, make_mesh, mesh_for, use_mesh
from flaxlm.training.accumulation import accumulate
from flaxlm.training.optimizer import build_optimizer
from flaxlm.training.step import (
  abstract_state,
  init_state,
  jit_train_step,
  loss_and_gradient,
  put_batch,
  shardings_of,
)

CFG = ModelConfig(
  depth=2,
  width=32,
  num_heads=4,
  num_kv_heads=2,
  vocab_size=64,
  context=16,
  tied_embeddings=False,
)
FAST = TrainingConfig(scanned=True)  # one block to compile: there are many programs here
MESHES = [
  dict(data=8),
  dict(fsdp=8),
  dict(data=4, tensor=2),
  dict(fsdp=4, tensor=2),
  dict(data=2, fsdp=4),
  dict(data=2, fsdp=2, tensor=2),
  {"data": 4, "fsdp": "2@dcn"},  # in another order than without @dcn
]

MORE_MESHES = [
  dict(tensor=2, expert=4),
  dict(data=4, fsdp=2),
  dict(data=2, expert=4),
  dict(fsdp=2, tensor=2, expert=2),
  dict(fsdp=4, expert=2),
  dict(data=2, fsdp=2, expert=2),
  dict(data=2, context=4),
  dict(fsdp=2, context=2, tensor=2),
  dict(context=2, expert=4),
]


def packed_batch(rows=16, seed=0):
  """Rows of several documents, of different lengths: every mask and weight in play."""
  rng = np.random.default_rng(seed)
  windows = rng.integers(1, CFG.vocab_size, (rows, CFG.context + 1))
  windows[rng.random(windows.shape) < 0.15] = 0
  lengths_B = rng.integers(4, CFG.context + 2, rows)
  return next_token(Windows(windows, windows == 0, lengths_B), end_id=0)


def batch_of(cfg: ModelConfig):
  """The same rows, and for an encoder-decoder other rows as sources."""
  batch = packed_batch()
  if cfg.family != "encoder_decoder":
    return batch
  source = packed_batch(seed=9)
  return batch._replace(
    source_BS=source.tokens_BT,
    source_positions_BS=source.positions_BT,
    # Every target has a source: segments of a row are numbered from 1 on both sides.
    source_segments_BS=np.minimum(source.segments_BT, batch.segments_BT.max(1)[:, None]),
  )


def params_on(mesh, model):
  """The same numbers on every mesh, cut as the rules say."""
  return jax.device_put(random_params(model), shardings_of(abstract_params(model, mesh)))


def loss_and_gradient_on(mesh, cfg=CFG, run=FAST):
  """Summed over `run.accumulation_steps` parts of the batch, as a training step does."""
  model = build_model(cfg, run)
  params = params_on(mesh, model)
  part = functools.partial(loss_and_gradient, model, run)
  dropout = dict(has_dropout=cfg.dropout > 0)
  whole = functools.partial(accumulate, part, run.accumulation_steps, **dropout)
  step = use_mesh(mesh)(jax.jit(whole))
  batch = put_batch(batch_of(cfg), mesh)
  return jax.device_get(step(params, batch, jax.random.key(0)))


@functools.cache
def on_one(cfg, run):
  return loss_and_gradient_on(mesh_of(), cfg, run)


@pytest.fixture
def on_one_device():
  return on_one(CFG, FAST)


# The others are in the slow grid below: each axis is in use here as well.
@pytest.mark.parametrize("sizes", MESHES[5:], ids=str)
def test_sharded_equals_one_device(on_one_device, sizes):
  """The same seed, parameters and batch: loss to 1e-5, gradients to 1e-4."""
  assert_same(loss_and_gradient_on(make_mesh(sizes)), on_one_device)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [*MESHES, *MORE_MESHES], ids=str)
@pytest.mark.parametrize("name", ["dense", "experts"])
def test_sharded_equals_one_device_however_it_runs(name, sizes):
  """Every mesh with every remat policy that differs and every accumulation.

  Half of the six pairs with dense layers, the other half with experts.
  """
  cfg, mesh = dataclasses.replace(CFG, **OTHERS.get(name, {})), make_mesh(sizes)
  policies = ("none", "full", "none") if name == "dense" else ("full", "none", "full")
  for remat, steps in zip(policies, (1, 2, 4), strict=True):
    if 16 % (steps * batch_shards(mesh.shape)):
      continue  # of the 16 rows
    run = dataclasses.replace(FAST, remat=remat, accumulation_steps=steps)
    assert_same(loss_and_gradient_on(mesh, cfg, run), on_one(cfg, run))


EXPERTS = MoEConfig(num_experts=4, expert_width=32)
GROUPED = dict(num_heads=8, num_kv_heads=2)
SINGLE = dict(num_heads=8, num_kv_heads=1, head_dim=8, parallel="one_norm")  # PaLM's


@pytest.mark.parametrize(
  ("changes", "sizes"),
  [
    slow(GROUPED, dict(fsdp=2, tensor=4)),
    fuzz(GROUPED, dict(tensor=8)),
    fuzz(SINGLE, dict(tensor=8)),
    slow(GROUPED | dict(window=5, learned_sinks=True, qk_norm="width"), dict(tensor=8)),
    fuzz(GROUPED, dict(context=2, tensor=4)),
    slow(GROUPED, dict(stage=2, tensor=4)),
    fuzz(SINGLE | dict(moe=EXPERTS), dict(expert=2, tensor=4)),
  ],
  ids=str,
)
def test_kv_heads_on_several_devices_equal_one_device(changes, sizes):
  cfg = dataclasses.replace(CFG, **changes)
  run = dataclasses.replace(FAST, sequence_parallel=sizes == dict(tensor=8))
  mesh = mesh_for(mesh_of(**sizes), cfg)
  assert KV_COPIES in mesh.shape
  assert_same(loss_and_gradient_on(mesh, cfg, run), on_one(cfg, FAST))


@pytest.mark.slow
@pytest.mark.parametrize("smoothing", [slow(0.0), 0.1])
def test_a_loss_in_chunks_equals_the_loss(on_one_device, smoothing):
  run = dataclasses.replace(FAST, label_smoothing=smoothing)
  expected = on_one(CFG, run)
  chunked = dataclasses.replace(run, loss_chunks=4)
  mesh = make_mesh(dict(fsdp=4, tensor=2))
  assert_same(loss_and_gradient_on(mesh, run=chunked), expected)
  assert expected[0] == on_one_device[0], "what is reported is not smoothed"


@pytest.mark.slow
def test_a_loss_in_chunks_never_has_all_logits():
  wide = dataclasses.replace(CFG, vocab_size=8192)
  batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), packed_batch())

  def temporary_bytes(chunks):
    run = dataclasses.replace(FAST, loss_chunks=chunks)
    model = build_model(wide, run)
    params = abstract_params(model, mesh_of())
    part = functools.partial(loss_and_gradient, model, run)
    lowered = jax.jit(part).lower(params, batch, jax.random.key(0))
    return lowered.compile().memory_analysis().temp_size_in_bytes

  logits = 16 * 16 * 8192 * 4
  assert temporary_bytes(1) - temporary_bytes(8) > 0.8 * logits


def assert_same(actual, expected):
  (loss, gradient), (expected_loss, expected_gradient) = actual, expected
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
  scale = max(np.abs(g).max() for g in jax.tree.leaves(expected_gradient))
  compare = lambda a, e: np.testing.assert_allclose(a, e, atol=1e-4 * scale)
  jax.tree.map(compare, gradient, expected_gradient)


OTHERS = {
  "dense": dict(),
  "windows": dict(window=5, layer_pattern="LG", qk_norm="head", attention_softcap=20.0),
  "capacity": dict(moe=MoEConfig(num_experts=4, expert_width=32, capacity_factor=1.0)),
  "experts": dict(moe=EXPERTS),
  "encoder": dict(
    family="encoder",
    positions="learned",
    norm_placement="post",
    embedding_norm=True,
    head_transform=True,
    head_biased=True,
    pooler=True,
    num_token_types=2,
    biased=True,
  ),
  "encoder_decoder": dict(family="encoder_decoder", positions="relative", qk_norm="width"),
}


@pytest.mark.parametrize(
  ("name", "sizes"),
  [
    slow("experts", dict(fsdp=2, tensor=2, expert=2)),
    slow("encoder_decoder", dict(data=2, fsdp=2, tensor=2)),
    slow("windows", dict(data=2, context=4)),
    slow("capacity", dict(context=2, expert=4)),
    slow("experts", dict(data=2, expert=4)),
    slow("encoder", dict(data=2, fsdp=2, tensor=2)),
    slow("dense", dict(context=4, tensor=2)),
    slow("experts", dict(context=2, expert=4)),
    slow("encoder_decoder", dict(fsdp=2, context=4)),
  ],
  ids=str,
)
def test_other_families_sharded_equal_one_device(name, sizes):
  cfg = dataclasses.replace(CFG, **OTHERS[name])
  assert_same(loss_and_gradient_on(make_mesh(sizes), cfg), on_one(cfg, FAST))


@pytest.mark.parametrize(
  ("name", "sizes"),
  [
    ("dense", dict(data=2, fsdp=2, tensor=2)),
    slow("dense", dict(context=2, fsdp=2, tensor=2)),
    slow("experts", dict(fsdp=2, expert=2, tensor=2)),
    slow("encoder_decoder", dict(fsdp=4, tensor=2)),
    slow("dense", dict(stage=2, data=2, tensor=2)),
  ],
  ids=str,
)
def test_norms_cut_over_tensor_change_nothing(name, sizes):
  cfg = dataclasses.replace(CFG, **OTHERS.get(name, {}))
  run = dataclasses.replace(FAST, sequence_parallel=True)
  on_mesh = loss_and_gradient_on(make_mesh(sizes), cfg, run)
  assert_same(on_mesh, on_one(cfg, FAST))


def test_state_stays_where_the_rules_say():
  """Every parameter and moment is sharded by the rules, initially and after a step."""
  mesh = make_mesh(dict(fsdp=4, tensor=2))
  model, optimizer = build_model(CFG, FAST), build_optimizer(OptimizerConfig(), 10)
  target = abstract_state(model, optimizer, mesh)
  state = init_state(model, optimizer, mesh, seed=0)
  where = lambda x, t: (
    x.sharding.is_equivalent_to(t.sharding, x.ndim) and x.shape == t.shape
  )
  assert all(jax.tree.leaves(jax.tree.map(where, state, target)))
  alone = init_state(model, optimizer, mesh_of(), seed=0)
  compare = lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-6, atol=1e-7)
  jax.tree.map(compare, jax.device_get(state), jax.device_get(alone))
  step = jit_train_step(model, optimizer, FAST, mesh)
  state, _ = step(state, put_batch(packed_batch(), mesh), jnp.uint32(0))
  assert all(jax.tree.leaves(jax.tree.map(where, state, target)))
  for tree in (state.params, state.opt_state):
    whole = [x for x in jax.tree.leaves(tree) if x.sharding.is_fully_replicated]
    assert all(x.size <= CFG.depth * CFG.width for x in whole), "only norms are whole"
  up = state.params["blocks"]["ffn"]["up"]["kernel"]
  assert up.addressable_shards[0].data.size == up.size // 8


@pytest.mark.parametrize("experts", [0, slow(4)])
def test_accumulation_equals_one_batch(experts):
  """Cutting a batch of unequally long rows into micro-batches changes nothing.

  Nor do the experts' own losses, which count each row by itself.
  """
  mesh = mesh_of(data=2)
  moe = MoEConfig(num_experts=experts, expert_width=32, load_balance_weight=0.5)
  model = build_model(dataclasses.replace(CFG, moe=moe), FAST)
  optimizer = build_optimizer(OptimizerConfig(warmup_steps=0, epsilon=1e-3), 10)

  def two_steps(parts):
    state = random_state(model, optimizer, mesh)
    step = jit_train_step(model, optimizer, TrainingConfig(accumulation_steps=parts), mesh)
    for n in range(2):
      state, metrics = step(state, put_batch(packed_batch(seed=n), mesh), jnp.uint32(0))
    return jax.device_get((metrics, state.params))

  expected = two_steps(1)
  compare = lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)
  jax.tree.map(compare, two_steps(4), expected)


@pytest.fixture(scope="module")
def one_device():
  """(new state, compiled step, batch on the device): one program for several tests."""
  mesh = mesh_of()
  model = build_model(CFG, FAST)
  optimizer = build_optimizer(OptimizerConfig(warmup_steps=0), 10)
  step = jit_train_step(model, optimizer, TrainingConfig(), mesh)
  return lambda: random_state(model, optimizer, mesh), step, lambda b: put_batch(b, mesh)


def test_a_step_that_is_not_finite_changes_nothing(one_device):
  """Infinite weights make the loss NaN: parameters and moments keep their bits."""
  new_state, step, put = one_device
  good = packed_batch()
  bad = good._replace(weights_BT=np.where(good.weights_BT > 0, np.float32(np.inf), 0))
  state, _ = step(new_state(), put(good), 0)
  before = jax.device_get(state)
  state, metrics = step(state, put(bad), 0)
  assert not metrics["finite"]
  after = jax.device_get(state)
  assert after.step == before.step + 1
  compare = np.testing.assert_array_equal
  jax.tree.map(compare, after._replace(step=0), before._replace(step=0))
  state, metrics = step(state, put(good), 0)
  assert metrics["finite"]


def test_every_dtype_stays_what_it_is():
  """Parameters and moments stay in bfloat16 after a step: nothing is widened silently."""
  cfg, mesh = TrainingConfig(param_dtype="bfloat16", scanned=True), mesh_of()
  model, optimizer = build_model(CFG, cfg), build_optimizer(OptimizerConfig(), 10)
  state = random_state(model, optimizer, mesh)
  before = jax.tree.map(lambda x: x.dtype, state)
  assert state.params["embedding"]["table"].dtype == jnp.bfloat16
  step = jit_train_step(model, optimizer, cfg, mesh)
  state, _ = step(state, put_batch(packed_batch(), mesh), jnp.uint32(0))
  assert jax.tree.map(lambda x: x.dtype, state) == before


def test_the_state_is_donated(one_device):
  """No second copy of the state: the step's input buffers are gone after it."""
  new_state, step, put = one_device
  state = new_state()
  step(state, put(packed_batch()), 0)
  assert all(x.is_deleted() for x in jax.tree.leaves(state))


@pytest.mark.slow
def test_bfloat16_trains_close_to_float32(one_device):
  """bfloat16 compute over float32 parameters: the first losses agree to its rounding."""
  new_state, float32_step, put = one_device
  model = build_model(CFG, TrainingConfig(dtype="bfloat16", scanned=True))
  optimizer = build_optimizer(OptimizerConfig(warmup_steps=0), 10)
  narrow_step = jit_train_step(model, optimizer, TrainingConfig(), mesh_of())

  def losses(step):
    state, found = new_state(), []
    for _ in range(4):
      state, metrics = step(state, put(packed_batch()), 0)
      found.append(float(metrics["loss"]))
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    return found

  narrow = losses(narrow_step)
  np.testing.assert_allclose(narrow, losses(float32_step), rtol=0.02)
  assert narrow[-1] < narrow[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_moments_cut_over_copies_change_nothing(kind):
  """ZeRO-1: the same parameters after two steps, and a share of the moments per device."""
  sizes = dict(data=4, tensor=2)
  after, held = {}, {}
  for sharded in (False, True):
    rule = OptimizerConfig(kind=kind, sharded=sharded, warmup_steps=0)
    model, optimizer = build_model(CFG, FAST), build_optimizer(rule, 10)
    mesh = make_mesh(sizes)
    state = random_state(model, optimizer, mesh)
    step = jit_train_step(model, optimizer, FAST, mesh)
    for n in range(2):
      state, _ = step(state, put_batch(packed_batch(seed=n), mesh), jnp.uint32(0))
    shards = [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(state.opt_state)]
    held[sharded] = sum(shard.nbytes for shard in shards)
    after[sharded] = jax.device_get(state.params)
  compare = lambda a, e: np.testing.assert_allclose(a, e, atol=1e-5)
  jax.tree.map(compare, after[True], after[False])
  assert held[True] < 0.3 * held[False]
