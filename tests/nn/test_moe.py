# SPDX-License-Identifier: Apache-2.0
"""The mixture of experts equals float64 loops, a dense network, and itself on a mesh."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow_but
from parameters import random_params

from flaxlm.config import ModelConfig, MoEConfig
from flaxlm.nn.kernels.fusion import activate
from flaxlm.nn.layers import FeedForward
from flaxlm.nn.models import build_model, init_cache
from flaxlm.nn.moe import MoE
from flaxlm.sharding import batch_sharding, make_mesh, with_shardings

B, T, D, F, E = 3, 10, 8, 12, 4
VARIANTS = {
  "mixtral": dict(),
  "qwen2": dict(num_shared_experts=2, shared_gated=True, normalized=False),
  "switch": dict(experts_per_token=1, normalized=False, capacity_factor=1.0),
  "gshard": dict(capacity_factor=0.7, num_shared_experts=1),
  "little_room": dict(experts_per_token=3, capacity_factor=0.0),
}


def build(**moe) -> MoE:
  moe = MoEConfig(**dict(num_experts=E, expert_width=F) | moe)
  return MoE(ModelConfig(width=D, depth=2, vocab_size=8, moe=moe).resolve())


def init(moe: MoE):
  return nn.unbox(jax.jit(moe.init)(jax.random.key(0), jnp.zeros((1, 2, D))))["params"]


@functools.partial(jax.jit, static_argnames=("moe", "dropping"))
def apply(moe, params, x_BTD, real_BT=None, dropping=True):
  return moe.apply({"params": params}, x_BTD, real_BT, dropping)


def inputs(*shape: int) -> np.ndarray:
  return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def some_padding() -> np.ndarray:
  """A whole row, one with padding in front, one with padding behind."""
  return np.stack([np.full(T, True), np.arange(T) > 2, np.arange(T) < 6])


# -- The reference -------------------------------------------------------------------------


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def dense(kernels, x_D):
  gate, up, down = (kernels[name]["kernel"] for name in ("gate", "up", "down"))
  return ((x_D @ gate) / (1 + np.exp(-(x_D @ gate))) * (x_D @ up)) @ down


def reference(params, cfg, x_BTD, real_BT):
  """Token by token, choice by choice: outputs, the two losses, number of drops."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  cfg_moe, x_BTD = cfg.moe, np.asarray(x_BTD, np.float64)
  A = cfg_moe.experts_per_token
  y_BTD, load_balance, router_z, drops = np.zeros_like(x_BTD), 0.0, 0.0, 0
  room = math.inf
  if cfg_moe.capacity_factor is not None:
    room = max(1, math.ceil(cfg_moe.capacity_factor * x_BTD.shape[1] * A / E))
  for b in range(len(x_BTD)):
    served, chosen, total_p = np.zeros(E), np.zeros(E), np.zeros(E)
    for t in np.flatnonzero(real_BT[b]):
      x_D = x_BTD[b, t]
      logits_E = x_D @ params["router"]["kernel"]
      p_E = softmax(logits_E)
      best = np.argsort(-p_E)[:A]
      weights = p_E[best] / (p_E[best].sum() if cfg_moe.normalized else 1)
      router_z += np.log(np.exp(logits_E).sum()) ** 2
      total_p += p_E
      for e, weight in zip(best, weights, strict=True):
        chosen[e] += 1
        if served[e] == room:
          drops += 1
          continue
        served[e] += 1
        expert = {
          name: {"kernel": of["kernel"][e]} for name, of in params["experts"].items()
        }
        y_BTD[b, t] += weight * dense(expert, x_D)
    tokens = real_BT[b].sum()
    load_balance += tokens * E * (chosen / (A * tokens)) @ (total_p / tokens)
  if cfg_moe.num_shared_experts:
    shared_BTD = dense(params["shared"], x_BTD)
    if cfg_moe.shared_gated:
      shared_BTD /= 1 + np.exp(-(x_BTD @ params["shared_gate"]["kernel"]))
    y_BTD += shared_BTD
  return y_BTD, {"load_balance": load_balance, "router_z": router_z}, drops


@pytest.mark.parametrize("name", slow_but(["qwen2", "gshard"], VARIANTS))
def test_equals_float64_loops(name):
  moe = build(**VARIANTS[name])
  params, x_BTD, real_BT = init(moe), inputs(B, T, D), some_padding()
  y_BTD, losses = apply(moe, params, x_BTD, real_BT)
  expected_BTD, expected_losses, drops = reference(params, moe.cfg, x_BTD, real_BT)
  assert (drops > 0) == (moe.cfg.moe.capacity_factor is not None), "or the test is idle"
  np.testing.assert_allclose(y_BTD, expected_BTD, atol=1e-5)
  jax.tree.map(np.testing.assert_allclose, losses, expected_losses)


# -- Laws ----------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_one_expert_is_a_feed_forward(capacity_factor):
  moe = build(num_experts=1, experts_per_token=1, capacity_factor=capacity_factor)
  params, x_BTD = init(moe), inputs(B, T, D)
  one = jax.tree.map(lambda kernel: kernel[0], params["experts"])
  dense_cfg = dataclasses.replace(moe.cfg, ffn_width=F)
  expected = FeedForward(dense_cfg).apply({"params": one}, x_BTD)
  np.testing.assert_allclose(apply(moe, params, x_BTD)[0], expected, atol=1e-6)


def loss_and_gradients(moe, params, x_BTD, **options):
  def loss(params, x_BTD):
    y_BTD, losses = moe.apply({"params": params}, x_BTD, **options)
    weights_BTD = jnp.cos(jnp.arange(y_BTD.size).reshape(y_BTD.shape))  # no two alike
    return (y_BTD * weights_BTD).sum() + sum(losses.values()), y_BTD

  return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x_BTD)


def assert_close(actual, expected, **tolerance):
  compare = lambda a, e: np.testing.assert_allclose(a, e, **tolerance)
  jax.tree.map(compare, actual, expected)


def test_dropless_is_enough_room_and_all_experts_for_all_tokens():
  """Both forms have the outputs and gradients of the plain sum over every expert."""
  free, roomy = build(), build(capacity_factor=float(E))
  params, x_BTD = init(free), inputs(B, T, D)

  class Dense:
    """Every expert computes every token; the unchosen ones weigh nothing."""

    def apply(self, variables, x_BTD):
      params = variables["params"]
      p_BTE = jax.nn.softmax(x_BTD @ params["router"]["kernel"])
      chosen_BTE = p_BTE >= jnp.sort(p_BTE)[..., -2:-1]
      weights_BTE = p_BTE * chosen_BTE
      weights_BTE /= weights_BTE.sum(-1, keepdims=True)
      kernels = {name: of["kernel"] for name, of in params["experts"].items()}
      into = lambda name: jnp.einsum("BTD,EDF->BTEF", x_BTD, kernels[name])
      h_BTEF = activate(into("gate"), "silu") * into("up")
      y_BTD = jnp.einsum("BTEF,EFD,BTE->BTD", h_BTEF, kernels["down"], weights_BTE)
      share_BE = chosen_BTE.sum(1) / (2 * T)
      balance = T * E * (share_BE * p_BTE.mean(1)).sum()
      z = jnp.log(jnp.exp(x_BTD @ params["router"]["kernel"]).sum(-1)) ** 2
      return y_BTD, {"load_balance": balance, "router_z": z.sum()}

  expected = jax.jit(functools.partial(loss_and_gradients, Dense()))(params, x_BTD)
  for moe in (free, roomy):
    actual = jax.jit(functools.partial(loss_and_gradients, moe))(params, x_BTD)
    assert_close(actual, expected, atol=2e-5, rtol=1e-5)


def test_not_dropping_ignores_the_capacity():
  tight, free = build(capacity_factor=0.5), build()
  params, x_BTD = init(free), inputs(B, T, D)
  full = apply(free, params, x_BTD)[0]
  np.testing.assert_array_equal(apply(tight, params, x_BTD, dropping=False)[0], full)
  assert not np.allclose(apply(tight, params, x_BTD)[0], full)


def test_decoding_drops_nothing():
  """A prompt read into a cache is served whole, as by a model without a capacity."""
  tight = MoEConfig(num_experts=E, expert_width=F, capacity_factor=0.0)
  sizes = dict(depth=1, width=D, num_heads=2, vocab_size=16, context=T)
  cfg = ModelConfig(**sizes, moe=tight).resolve()
  roomy = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, capacity_factor=None))
  model, tokens_BT = build_model(cfg), np.random.default_rng(0).integers(0, 16, (2, T))
  params = random_params(model, spread=0.5)
  logits = jax.jit(
    lambda model, *x, **cache: model.apply(*x, **cache).value, static_argnums=0
  )
  expected = logits(build_model(roomy), {"params": params}, tokens_BT)
  dropped = logits(model, {"params": params}, tokens_BT)
  cached = logits(model, {"params": params}, tokens_BT, cache=init_cache(model, 2, T))
  np.testing.assert_allclose(cached, expected, atol=1e-5)
  assert not np.allclose(dropped, expected, atol=1e-3)


def test_dropping_is_causal():
  """Whatever comes later in a row, earlier tokens keep every bit, served or dropped."""
  moe = build(capacity_factor=0.5)
  params, x_BTD = init(moe), inputs(B, T, D)
  other_BTD = x_BTD.copy()
  other_BTD[:, 5:] = x_BTD[:, :5]  # what the first tokens want, the next ones want too
  y_BTD, changed_BTD = (apply(moe, params, x)[0] for x in (x_BTD, other_BTD))
  np.testing.assert_array_equal(y_BTD[:, :5], changed_BTD[:, :5])


@pytest.mark.parametrize("capacity_factor", [None, 0.5])
def test_padding_never_matters(capacity_factor):
  moe = build(capacity_factor=capacity_factor)
  params, x_BTD, real_BT = init(moe), inputs(B, T, D), some_padding()
  other_BTD = np.where(real_BT[..., None], x_BTD, 7.0)
  results = [apply(moe, params, x, real_BT) for x in (x_BTD, other_BTD)]
  outputs = [np.where(real_BT[..., None], y_BTD, 0) for y_BTD, _ in results]
  np.testing.assert_array_equal(*outputs)
  assert_close(results[0][1], results[1][1], rtol=1e-6)
  padding = apply(moe, params, x_BTD, np.zeros((B, T), bool))
  assert_close(padding, jax.tree.map(np.zeros_like, padding), atol=0)


def test_losses_add_up_over_parts_of_a_batch():
  moe = build()
  params, x_BTD, real_BT = init(moe), inputs(B, T, D), some_padding()
  whole = apply(moe, params, x_BTD, real_BT)[1]
  rows = [apply(moe, params, x_BTD[b : b + 1], real_BT[b : b + 1])[1] for b in range(B)]
  assert_close(whole, jax.tree.map(lambda *parts: sum(parts), *rows), rtol=1e-5)


def test_losses_of_a_router_that_knows_nothing():
  """Even probabilities: 1 a token of `load_balance`, log(E)^2 a token of `router_z`."""
  moe = build()
  params = init(moe) | {"router": {"kernel": jnp.zeros((D, E))}}
  losses = apply(moe, params, inputs(B, T, D), some_padding())[1]
  tokens = some_padding().sum()
  np.testing.assert_allclose(losses["load_balance"], tokens, rtol=1e-6)
  np.testing.assert_allclose(losses["router_z"], tokens * math.log(E) ** 2, rtol=1e-6)


def test_bfloat16_stays_close_to_float32():
  """Only products and sums are rounded: the router, in float32, chooses as before."""
  cfg, x_BTD = build(num_shared_experts=1).cfg, inputs(B, T, D)
  x_BTD = x_BTD.astype(jnp.bfloat16)
  params = init(MoE(cfg))
  exact, exact_losses = apply(MoE(cfg), params, x_BTD)
  narrow, losses = apply(MoE(cfg, dtype=jnp.bfloat16), params, x_BTD)
  assert narrow.dtype == jnp.bfloat16 and exact.dtype == jnp.float32
  np.testing.assert_allclose(narrow.astype(np.float32), exact, atol=0.03)
  assert_close(losses, exact_losses, rtol=1e-6)


def test_each_expert_starts_like_a_feed_forward_of_its_own():
  """Scaled by its own fan-in, D or F, and `down` by 1 / sqrt(2 L) besides."""
  wide = dataclasses.replace(build(expert_width=256).cfg, width=128)
  params = nn.unbox(jax.jit(MoE(wide).init)(jax.random.key(0), jnp.zeros((1, 1, 128))))
  experts = params["params"]["experts"]
  std = lambda name: np.std(experts[name]["kernel"], (1, 2))
  np.testing.assert_allclose(std("up"), np.full(E, 128**-0.5), rtol=0.05)
  np.testing.assert_allclose(std("down"), np.full(E, (2 * 2 * 256) ** -0.5), rtol=0.05)
  assert len({float(x) for x in std("gate")}) == E, "no two experts are alike"


# -- On a mesh -----------------------------------------------------------------------------

SHARDED = build(num_experts=8, num_shared_experts=1, capacity_factor=0.8)
ROWS, REAL = inputs(8, 6, D), np.random.default_rng(3).random((8, 6)) < 0.8


def with_and_without_drops(params, x_BTD):
  run = functools.partial(loss_and_gradients, SHARDED, params, x_BTD, real_BT=REAL)
  return run(dropping=True), run(dropping=False)


@pytest.fixture(scope="module")
def on_one_device():
  boxed = jax.jit(SHARDED.init)(jax.random.key(0), ROWS)["params"]
  return boxed, jax.jit(with_and_without_drops)(nn.unbox(boxed), ROWS)


@pytest.mark.parametrize(
  "sizes",
  [
    pytest.param(dict(expert=8), marks=pytest.mark.slow),
    pytest.param(dict(data=2, expert=4), marks=pytest.mark.slow),
    pytest.param(dict(fsdp=2, tensor=2, expert=2), marks=pytest.mark.slow),
    pytest.param(dict(data=2, fsdp=2, tensor=2), marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_a_mesh_changes_nothing(sizes, on_one_device):
  boxed, expected = on_one_device
  mesh = make_mesh(sizes)
  abstract = with_shardings(jax.eval_shape(lambda: boxed), mesh)
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  params = jax.device_put(nn.unbox(boxed), shardings)
  with jax.set_mesh(mesh):
    rows = jax.device_put(ROWS, batch_sharding(mesh))
    actual = jax.jit(with_and_without_drops)(params, rows)
  for mine, theirs in zip(actual, expected, strict=True):
    ((loss, y_BTD), gradients), ((one_loss, one_y_BTD), one_gradients) = mine, theirs
    np.testing.assert_allclose(loss, one_loss, rtol=1e-5)
    np.testing.assert_allclose(y_BTD, one_y_BTD, atol=1e-5)
    assert_close(gradients, one_gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_rows_are_cut_over_context_and_a_single_token_is_not():
  """Rows in training, and a single token in decoding, which `context` cannot split."""
  moe = build(num_experts=8)
  rows = inputs(8, 8, D)
  params = nn.unbox(jax.jit(moe.init)(jax.random.key(0), rows))
  for x_BTD in (rows, rows[:, :1]):
    real_BT = np.ones(x_BTD.shape[:2], bool)
    expected, _ = jax.jit(moe.apply)(params, x_BTD, real_BT)
    with jax.set_mesh(make_mesh({"data": 2, "context": 4})):
      actual, _ = jax.jit(moe.apply)(params, x_BTD, real_BT)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
