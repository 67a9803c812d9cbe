# SPDX-License-Identifier: Apache-2.0
"""Laws of low-rank adapters: a fresh one changes nothing, merged = unmerged, its gradient
is that of its kernel by the chain rule, and nothing is computed for what is frozen."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fuzz, slow, slow_but
from flax.traverse_util import flatten_dict
from meshes import mesh_of
from parameters import random_params

from flaxlm.config import (
  LoraConfig,
  ModelConfig,
  MoEConfig,
  OptimizerConfig,
  TrainingConfig,
  load_config,
)
from flaxlm.data.objectives import Batch
from flaxlm.errors import ConfigError
from flaxlm.nn.layers import PROJECTIONS
from flaxlm.nn.lora import (
  abstract_adapters,
  abstract_frozen,
  combined,
  freeze,
  init_adapters,
  merged,
  num_frozen,
  unadaptable,
)
from flaxlm.nn.models import abstract_params, boxed_shapes, build_model
from flaxlm.sharding import make_mesh, use_mesh
from flaxlm.training.logprobs import forward
from flaxlm.training.optimizer import build_optimizer
from flaxlm.training.step import (
  TrainState,
  jit_train_step,
  loss_and_gradient,
  put_batch,
  shardings_of,
)

SMALL = dict(depth=2, width=32, num_heads=4, num_kv_heads=2, vocab_size=64, context=16)
MODELS = {
  "decoder": ModelConfig(**SMALL, tied_embeddings=False),
  "biased": ModelConfig(**SMALL, biased=True, gated=False, norm="layernorm"),
  "experts": ModelConfig(**SMALL, moe=MoEConfig(num_experts=4, num_shared_experts=1)),
  "encoder": ModelConfig(**SMALL, family="encoder", head_transform=True),
  "encoder_decoder": ModelConfig(**SMALL, family="encoder_decoder"),
}
FAST = TrainingConfig(scanned=True)
OPTIMIZER = OptimizerConfig(warmup_steps=0)
LORA = LoraConfig(rank=3, alpha=6.0)
INT8 = dataclasses.replace(LORA, base_weights="int8")


def batch_of(cfg: ModelConfig, rows: int = 8) -> Batch:
  rng = np.random.default_rng(1)
  T = cfg.context
  ids = rng.integers(1, 64, (rows, T)).astype(np.int32)
  segments = np.broadcast_to((np.arange(T) >= 5) + 1, (rows, T)).astype(np.int32)
  positions = np.broadcast_to(
    np.where(np.arange(T) < 5, np.arange(T), np.arange(T) - 5), ids.shape
  )
  weights = (rng.random((rows, T)) < 0.7).astype(np.float32)
  batch = Batch(ids, positions.astype(np.int32), segments, np.roll(ids, -1, 1), weights)
  if cfg.family == "encoder_decoder":
    source = (ids[::-1].copy(), batch.positions_BT, batch.segments_BT)
    batch = batch._replace(
      source_BS=source[0], source_positions_BS=source[1], source_segments_BS=source[2]
    )
  return batch


def trees(name: str, lora: LoraConfig = LORA, mesh: Any = None, run: Any = FAST):
  """(model, parameters, the frozen tree, adapters): new ones, whose B is 0."""
  mesh = mesh or mesh_of()
  model = build_model(MODELS[name], run)
  place = shardings_of(abstract_params(model, mesh))
  params = jax.device_put(random_params(model), place)
  adapters = init_adapters(abstract_adapters(model, lora, mesh), seed=0)
  frozen = freeze(dict(params), abstract_frozen(model, lora, mesh), lora)
  return model, params, frozen, adapters


def trained(adapters: Any) -> Any:
  """Adapters of which B is random, too."""
  rng = np.random.default_rng(3)
  draw = lambda x: jax.device_put(rng.normal(size=x.shape).astype(x.dtype) / 8, x.sharding)
  return jax.tree.map(draw, adapters)


def logits(model: Any, params: Any, batch: Batch) -> jax.Array:
  return jax.jit(lambda params: forward(model, params, batch).value)(params)


FAMILIES = slow_but(("decoder",), MODELS)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fresh_adapter_leaves_every_logit_as_it_was(name: str):
  model, params, frozen, adapters = trees(name)
  batch = batch_of(MODELS[name])
  found = logits(model, combined(frozen, adapters), batch)
  np.testing.assert_array_equal(found, logits(model, params, batch))


@pytest.mark.parametrize("lora", [LORA, INT8], ids=["full", "int8"])
@pytest.mark.parametrize("name", FAMILIES)
def test_merged_equals_unmerged(name: str, lora: LoraConfig):
  model, params, frozen, adapters = trees(name, lora)
  adapters, batch = trained(adapters), batch_of(MODELS[name])
  target = abstract_params(model, mesh_of())
  plain = merged(frozen, adapters, target)
  assert jax.tree.map(lambda x: x.shape, plain) == jax.tree.map(lambda x: x.shape, params)
  found, wanted = (logits(model, p, batch) for p in (plain, combined(frozen, adapters)))
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-5)
  assert np.abs(found - logits(model, params, batch)).max() > 0.05


def test_int8_is_within_half_a_step_of_its_scale():
  _, params, frozen, _ = trees("decoder", INT8)
  flat, narrow = flatten_dict(params), flatten_dict(frozen)
  found = [path for path in narrow if path[-1] == "kernel_scale"]
  assert len(found) == 7
  assert num_frozen(frozen) == sum(x.size for x in jax.tree.leaves(params))
  for path in found:
    kernel = (*path[:-1], "kernel")
    axes = tuple(range(1, 1 + PROJECTIONS[path[-2]]))
    scale = np.expand_dims(narrow[path], axes)
    assert narrow[kernel].dtype == jnp.int8
    error = np.abs(narrow[kernel] * scale - flat[kernel])
    assert (error <= scale * 0.5001).all() and error.max() > 0
    assert np.abs(narrow[kernel]).max(axes).min() == 127


@functools.cache
def gradients_on(name: str, mesh: Any, lora: LoraConfig) -> tuple[float, Any]:
  model, _, frozen, adapters = trees(name, lora, mesh)
  step = functools.partial(loss_and_gradient, model, FAST)
  run = jax.jit(lambda p, b, k, f: step(p, b, k, frozen=f))
  batch = put_batch(batch_of(MODELS[name]), mesh)
  with use_mesh(mesh):
    loss, gradient = run(trained(adapters), batch, jax.random.key(0), frozen)
  return float(loss), jax.device_get(gradient)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_gradient_is_that_of_the_kernel_by_the_chain_rule(name: str):
  """dA = s dW B^T and dB = s A^T dW, at the merged parameters."""
  model, _, frozen, adapters = trees(name)
  adapters = trained(adapters)
  plain = merged(frozen, adapters, abstract_params(model, mesh_of()))
  step = jax.jit(functools.partial(loss_and_gradient, model, FAST))
  loss, whole = step(plain, batch_of(MODELS[name]), jax.random.key(0))
  found_loss, found = gradients_on(name, mesh_of(), LORA)
  assert found_loss == pytest.approx(float(loss), rel=1e-5)
  flat, whole, adapters = map(flatten_dict, (found, whole, adapters))
  assert flat.keys() == adapters.keys()
  for path in flat:
    if path[-1] == "lora_a":
      module = path[:-1]
      a, b = (np.asarray(adapters[(*module, f"lora_{x}")], np.float64) for x in "ab")
      L, R = a.shape[0], a.shape[-1]
      a, b = a.reshape(L, -1, R), b.reshape(L, R, -1)
      dw = np.asarray(whole[(*module, "kernel")], np.float64)
      dw = dw.reshape(L, a.shape[1], -1)
      scale = LORA.alpha / LORA.rank
      for x, wanted in (("a", dw @ b.swapaxes(1, 2)), ("b", a.swapaxes(1, 2) @ dw)):
        got = flat[(*module, f"lora_{x}")]
        wanted = scale * wanted.reshape(got.shape)
        np.testing.assert_allclose(got, wanted, atol=2e-4 * np.abs(wanted).max())


@pytest.mark.parametrize(
  "sizes",
  [
    slow(dict(fsdp=2, tensor=2, data=2)),
    slow(dict(stage=2, data=4)),
    fuzz(dict(context=2, fsdp=4)),
  ],
  ids=str,
)
@pytest.mark.parametrize("lora", [LORA, INT8], ids=["full", "int8"])
def test_sharded_equals_one_device(sizes: dict, lora: LoraConfig):
  loss, found = gradients_on("decoder", make_mesh(sizes), lora)
  wanted_loss, wanted = gradients_on("decoder", mesh_of(), lora)
  assert loss == pytest.approx(wanted_loss, rel=1e-5)
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())
  jax.tree.map(close, found, wanted)


def test_adapters_lie_as_their_kernels_do():
  mesh = make_mesh(dict(fsdp=2, tensor=2, data=2))
  model = build_model(MODELS["decoder"])
  found = flatten_dict(abstract_adapters(model, LORA, mesh))
  specs = {"/".join(path[1:]): tuple(leaf.sharding.spec) for path, leaf in found.items()}
  assert specs["attention/q/lora_a"] == ("stage", "fsdp", None)
  assert specs["attention/q/lora_b"] == ("stage", None, "tensor", None)
  assert specs["attention/o/lora_a"] == ("stage", "tensor", None, None)
  assert specs["attention/o/lora_b"] == ("stage", None, "fsdp")


@pytest.mark.slow
@pytest.mark.parametrize(
  "run",
  [TrainingConfig(), TrainingConfig(remat="full"), TrainingConfig(loss_chunks=4)],
  ids=str,
)
def test_how_layers_run_changes_nothing(run: TrainingConfig):
  model, _, frozen, adapters = trees("decoder", run=run)
  step = jax.jit(functools.partial(loss_and_gradient, model, run))
  batch = batch_of(MODELS["decoder"])
  loss, found = step(trained(adapters), batch, jax.random.key(0), frozen=frozen)
  wanted_loss, wanted = gradients_on("decoder", mesh_of(), LORA)
  assert float(loss) == pytest.approx(wanted_loss, rel=1e-5)
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())
  jax.tree.map(close, found, wanted)


def test_nothing_is_computed_for_what_is_frozen():
  """A step has no product for a weight's gradient, and moments of the adapters alone."""
  cfg = dataclasses.replace(MODELS["decoder"], width=64, vocab_size=512)
  run = TrainingConfig()
  model, batch = build_model(cfg, run), batch_of(cfg)
  params = nn.unbox(boxed_shapes(model))
  mesh = mesh_of()
  strip = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
  frozen = strip(abstract_frozen(model, LORA, mesh))
  adapters = strip(abstract_adapters(model, LORA, mesh))
  step = functools.partial(loss_and_gradient, model, run)
  flops = lambda *a, **k: jax.jit(step).lower(*a, **k).compile().cost_analysis()["flops"]
  key = jax.random.key(0)
  assert flops(adapters, batch, key, frozen=frozen) < 0.75 * flops(params, batch, key)
  size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  moments = lambda tree: size(jax.eval_shape(build_optimizer(OPTIMIZER, 9).init, tree))
  assert moments(adapters) < moments(params) / 3


def test_a_step_changes_the_adapters_alone():
  mesh, name = mesh_of(), "decoder"
  model, _, frozen, adapters = trees(name)
  optimizer = build_optimizer(OPTIMIZER, 9)
  step = jit_train_step(model, optimizer, FAST, mesh, LORA)
  state = TrainState(jnp.int32(0), adapters, optimizer.init(adapters), frozen)
  before = jax.device_get((state.params, state.frozen))
  state, metrics = step(state, put_batch(batch_of(MODELS[name]), mesh), np.uint32(0))
  assert metrics["finite"]
  after = jax.device_get((state.params, state.frozen))
  jax.tree.map(np.testing.assert_array_equal, after[1], before[1])
  changed = jax.tree.map(lambda a, b: bool((a != b).any()), after[0], before[0])
  flat = flatten_dict(changed)
  assert all(flat[path] for path in flat if path[-1] == "lora_b")


@pytest.mark.slow
def test_dropout_is_on_the_input_of_adapters_and_only_in_training():
  lora = dataclasses.replace(LORA, dropout=0.5)
  model, _, frozen, adapters = trees("decoder", lora)
  adapters, batch = trained(adapters), batch_of(MODELS["decoder"])
  params = combined(frozen, adapters)
  plain = combined(trees("decoder")[2], adapters)
  np.testing.assert_array_equal(logits(model, params, batch), logits(model, plain, batch))
  step = jax.jit(functools.partial(loss_and_gradient, model, FAST))
  losses = {
    seed: float(step(adapters, batch, jax.random.key(seed), frozen=frozen)[0])
    for seed in range(2)
  }
  assert losses[0] != losses[1]
  fresh = jax.tree_util.tree_map_with_path(
    lambda path, x: x * (path[-1].key == "lora_a"), adapters
  )
  found = float(step(fresh, batch, jax.random.key(0), frozen=frozen)[0])
  still = float(step(fresh, batch, jax.random.key(1), frozen=frozen)[0])
  assert found == still, "B is 0: nothing else is dropped"


@pytest.mark.parametrize(
  ("targets", "count"),
  [("/(q|v)$", 2), ("attention", 4), ("/down$", 1), ("^blocks/ffn/(gate|up)$", 2)],
)
def test_targets_are_an_expression_over_paths(targets: str, count: int):
  lora = dataclasses.replace(LORA, targets=targets)
  found = abstract_adapters(build_model(MODELS["decoder"]), lora, mesh_of())
  assert len(jax.tree.leaves(found)) == 2 * count


def test_what_has_no_adapters_is_named():
  boxes = lambda name: flatten_dict(
    boxed_shapes(build_model(load_config(name).resolve(64).model))
  )
  experts = [f"blocks/ffn/experts/{name}" for name in ("down", "gate", "up")]
  assert unadaptable(boxes("moe_tiny")) == [*experts, "blocks/ffn/router", "embedding"]
  assert unadaptable(boxes("gpt2_124m")) == ["embedding", "positions"]


@pytest.mark.parametrize(("name", "targets"), [("decoder", "query"), ("decoder", "head$")])
def test_a_target_that_matches_nothing_is_refused(name: str, targets: str):
  lora = dataclasses.replace(LORA, targets=targets)
  with pytest.raises(ConfigError, match="matches no projection") as caught:
    abstract_adapters(build_model(MODELS[name]), lora, mesh_of())
  assert "blocks/attention/q, " in caught.value.cure
  rnn = ModelConfig(**SMALL, family="rnn")
  with pytest.raises(ConfigError, match="matches no projection") as caught:
    abstract_adapters(build_model(rnn), LORA, mesh_of())
  assert "none in this family" in caught.value.cure
