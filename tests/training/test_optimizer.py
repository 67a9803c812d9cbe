# SPDX-License-Identifier: Apache-2.0
"""Optimizers and schedules equal independent float64 references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

from flaxlm.config import OptimizerConfig
from flaxlm.training.optimizer import build_optimizer, build_schedule, decayed, matrix_dims


def small_params():
  """The names of a decoder's parameters, in miniature."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return {
    "embedding": {"table": normal(6, 4)},
    "blocks": {
      "attention": {
        "q": {"kernel": normal(2, 4, 2, 2), "bias": normal(2, 2, 2)},
        "o": {"kernel": normal(2, 2, 2, 4)},
      },
      "ffn": {"up": {"kernel": normal(2, 4, 8)}},
      "ffn_norm": {"scale": normal(2, 4)},
    },
  }


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "inverse_sqrt"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_schedule(schedule, warmup):
  cfg = OptimizerConfig(
    schedule=schedule, warmup_steps=warmup, learning_rate=0.3, final_fraction=0.1
  )
  rates = jax.jit(jax.vmap(build_schedule(cfg, num_steps=40)))(jnp.arange(40))
  expected = [
    references.learning_rate(schedule, t, 0.3, warmup, 40, 0.1) for t in range(40)
  ]
  np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-7)


def test_a_gradient_of_zeros_is_not_clipped_to_nan():
  cfg = OptimizerConfig(clip_norm=0.5, weight_decay=0.0, warmup_steps=0)
  params = small_params()
  optimizer = build_optimizer(cfg, 10)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zeros, optimizer.init(params), params)
  assert all((x == 0).all() for x in jax.tree.leaves(updates))


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_adamw_equals_reference(clip_norm):
  cfg = OptimizerConfig(
    learning_rate=0.01,
    schedule="constant",
    warmup_steps=0,
    weight_decay=0.3,
    clip_norm=clip_norm,
    epsilon=1e-6,
  )
  params = small_params()
  optimizer = build_optimizer(cfg, 10)
  state, ours = optimizer.init(params), params
  float64 = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
  theirs, zeros = float64(params), jax.tree.map(lambda x: np.zeros(x.shape), params)
  mu, nu = zeros, zeros
  update = jax.jit(optimizer.update)
  for step in range(1, 5):
    gradient = jax.tree.map(lambda x: np.sin(3 * x + step).astype(np.float32), params)
    updates, state = update(gradient, state, ours)
    ours = jax.tree.map(jnp.add, ours, updates)
    theirs, mu, nu = references.adamw_step(
      theirs,
      float64(gradient),
      mu,
      nu,
      step,
      lr=0.01,
      beta1=cfg.beta1,
      beta2=cfg.beta2,
      epsilon=cfg.epsilon,
      weight_decay=cfg.weight_decay,
      decay_mask=decayed(params),
      clip_norm=clip_norm,
    )
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-6), ours, theirs
  )


def test_only_matrices_decay():
  """With no gradient, decay alone moves kernels and tables, and nothing else."""
  for kind in ("adamw", "lion", "muon", "sgd"):
    cfg = OptimizerConfig(kind=kind, schedule="constant", warmup_steps=0, weight_decay=0.5)
    params = small_params()
    optimizer = build_optimizer(cfg, 10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    moved = jax.tree.map(lambda u: bool(np.any(u != 0)), updates)
    assert moved == decayed(params), kind


@pytest.mark.parametrize("kind", ["adamw", "lion", "adafactor", "muon", "sgd"])
def test_how_much_decays(kind):
  """Half-way up the warm-up a matrix loses half of the decay; Adafactor, whose decay knows
  no rate, loses all of it, at every step as much as the others at the peak."""
  cfg = OptimizerConfig(
    kind=kind,
    schedule="constant",
    learning_rate=0.02,
    warmup_steps=2,
    weight_decay=0.5,
    beta1=0.0,
  )
  params = small_params()
  optimizer = build_optimizer(cfg, 10)
  zeros, state = jax.tree.map(jnp.zeros_like, params), optimizer.init(params)
  update = jax.jit(optimizer.update)
  _, state = update(zeros, state, params)
  updates, _ = update(zeros, state, params)
  lost = 0.5 * (0.02 if kind == "adafactor" else 0.01)
  kernel = lambda tree: tree["blocks"]["ffn"]["up"]["kernel"]
  np.testing.assert_allclose(kernel(updates), -lost * kernel(params), rtol=1e-5)


def test_lion_equals_reference():
  """The sign of one mean of gradients, the memory of another (Chen et al., 2023,
  algorithm 2); the decay as of AdamW."""
  cfg = OptimizerConfig(
    kind="lion",
    learning_rate=0.01,
    schedule="constant",
    warmup_steps=0,
    weight_decay=0.3,
    clip_norm=None,
  )
  params = small_params()
  optimizer, masks = build_optimizer(cfg, 10), decayed(params)
  state, ours = optimizer.init(params), params
  theirs, moments = params, jax.tree.map(np.zeros_like, params)
  update = jax.jit(optimizer.update)
  for step in range(5):
    gradient = jax.tree.map(lambda x: np.sin(40 * x + step).astype(np.float32), params)
    updates, state = update(gradient, state, ours)
    ours = jax.tree.map(jnp.add, ours, updates)
    theirs = jax.tree.map(
      lambda p, m, g, mask: (
        p - 0.01 * (np.sign(cfg.beta1 * m + (1 - cfg.beta1) * g) + 0.3 * p * mask)
      ),
      *(theirs, moments, gradient, masks),
    )
    mix = lambda m, g: cfg.beta2 * m + (1 - cfg.beta2) * g
    moments = jax.tree.map(mix, moments, gradient)
  compare = lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)
  jax.tree.map(compare, ours, theirs)


def newton_schulz(matrix, num_steps=5):
  """The quintic iteration towards the nearest orthogonal matrix (Jordan, 2024)."""
  x = np.asarray(matrix, np.float64)
  x = x / np.linalg.norm(x)
  for _ in range(num_steps):
    gram = x @ x.T
    x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
  return x


def test_muon_orthogonalises_each_layer():
  """Each layer of a stacked kernel is one matrix; tables and biases are left to Adam."""
  cfg = OptimizerConfig(
    kind="muon", schedule="constant", warmup_steps=0, weight_decay=0.0, clip_norm=None
  )
  params = small_params()
  optimizer = build_optimizer(cfg, 10)
  updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
  attention, ffn = params["blocks"]["attention"], params["blocks"]["ffn"]
  kernels = {
    "q": (attention["q"], (4, 4)),
    "o": (attention["o"], (4, 4)),
    "up": (ffn["up"], (4, 8)),
  }
  for name, (gradient, shape) in kernels.items():
    update = updates["blocks"]["ffn" if name == "up" else "attention"][name]["kernel"]
    for layer in range(2):
      expected = -newton_schulz(gradient["kernel"][layer].reshape(shape))
      actual = np.asarray(update[layer], np.float64).reshape(shape)
      # As large as Adam's, whose numbers are near 0.2 of the rate (Liu et al., 2025, 2.2).
      largest = 0.2 * cfg.learning_rate
      assert 0.6 * largest < np.sqrt(np.mean(actual**2)) < 1.2 * largest
      expected, actual = (x / np.linalg.norm(x) for x in (expected, actual))
      np.testing.assert_allclose(actual, expected, atol=1e-3)
  dims = matrix_dims(params)
  assert dims["embedding"]["table"] is None
  assert dims["blocks"]["attention"]["q"]["bias"] is None


@pytest.mark.parametrize("kind", ["adamw", "lion", "adafactor", "muon", "sgd"])
def test_every_kind_descends(kind):
  cfg = OptimizerConfig(
    kind=kind, learning_rate=0.03, schedule="constant", warmup_steps=0, weight_decay=0.0
  )
  optimizer = build_optimizer(cfg, 50)
  loss = lambda p: sum(jnp.square(x - 0.5).mean() for x in jax.tree.leaves(p))

  @jax.jit
  def step(params, state):
    value, gradient = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradient, state, params)
    return jax.tree.map(jnp.add, params, updates), state, value

  params = small_params()
  state, values = optimizer.init(params), []
  for _ in range(20):
    params, state, value = step(params, state)
    values.append(float(value))
  assert values[-1] < 0.8 * values[0]
