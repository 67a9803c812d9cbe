# SPDX-License-Identifier: Apache-2.0
"""Laws of the decoder: causal, packed = alone, padding, cached = full, scan, remat."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow_but
from parameters import random_params

from flaxlm.config import ModelConfig, MoEConfig, RopeConfig, TrainingConfig
from flaxlm.nn.models import build_model, init_cache

SMALL = dict(depth=2, width=32, num_heads=4, vocab_size=61, context=32)
ARCHITECTURES = {
  "llama": dict(num_kv_heads=2, tied_embeddings=False),
  "gpt2": dict(
    positions="learned", norm="layernorm", gated=False, activation="gelu", biased=True
  ),
  "window": dict(window=4, num_kv_heads=1),
  "post_norm": dict(positions="sinusoidal", norm_placement="post"),
  # Local and global layers in turn, one left over, and all that changes scores.
  "pattern": dict(
    depth=3,
    layer_pattern="LG",
    window=4,
    sink_tokens=1,
    learned_sinks=True,
    attention_softcap=5.0,
    qk_norm="head",
    norm_placement="both",
    rope=RopeConfig(fraction=0.5, local_theta=100.0, scaling="yarn", factor=2.0),
  ),
  "experts": dict(
    positions="alibi",
    parallel="two_norms",
    moe=MoEConfig(num_experts=4, expert_width=24, num_shared_experts=1),
  ),
}

FAST = ("pattern",)  # it has what the others have, but for experts (tests/nn/test_moe.py)


@pytest.fixture(scope="module", params=slow_but(FAST, ARCHITECTURES))
def decoder(request):
  """(model, params), larger than at the start, logits still of the order of one."""
  model = build_model(ModelConfig(**SMALL | ARCHITECTURES[request.param]))
  return model, random_params(model)


@functools.partial(jax.jit, static_argnames="model")
def logits_of(model, params, tokens_BT, positions_BT=None, segments_BT=None):
  return model.apply({"params": params}, tokens_BT, positions_BT, segments_BT)[0]


def random_tokens(*shape: int) -> np.ndarray:
  return np.random.default_rng(7).integers(1, SMALL["vocab_size"], shape)


def test_causal_by_gradient(decoder):
  """The logits at t have exactly zero gradient to every later token's embedding."""
  model, params = decoder
  tokens_BT = random_tokens(1, 8)

  def logits_from(x_BTD):
    def replace(next_fun, args, kwargs, context):
      is_embedding = (
        context.module.name == "embedding" and context.method_name == "__call__"
      )
      return x_BTD if is_embedding else next_fun(*args, **kwargs)

    with nn.intercept_methods(replace):
      return model.apply({"params": params}, tokens_BT)[0]

  x_BTD = params["embedding"]["table"][tokens_BT]
  gradient_at = lambda t: jax.grad(lambda x: logits_from(x)[0, t].sum())(x_BTD)[0]
  jacobian = jax.jit(lambda: jax.lax.map(gradient_at, jnp.arange(8)))()  # (T, S, D)
  reach_TS = np.abs(jacobian).sum(-1)
  assert np.all(reach_TS[np.triu_indices(8, 1)] == 0)
  assert np.all(np.diag(reach_TS) > 0)


def test_packed_equals_alone(decoder):
  """Documents in one row have the logits that each has in a row of its own."""
  model, params = decoder
  first, second = random_tokens(2, 9)[0], random_tokens(2, 9)[1][:6]
  row = np.concatenate([first, second])[None]
  segments = np.array([[1] * 9 + [2] * 6])
  positions = np.array([[*range(9), *range(6)]])
  packed = logits_of(model, params, row, positions, segments)
  alone = [logits_of(model, params, x[None])[0] for x in (first, second)]
  np.testing.assert_allclose(packed[0], np.concatenate(alone), atol=1e-5)


def test_padding_never_matters(decoder):
  """What stands after a row's end, or in another segment, changes no bit before it."""
  model, params = decoder
  tokens = random_tokens(2, 12)
  other = tokens.copy()
  other[:, 7:] = (other[:, 7:] + 5) % SMALL["vocab_size"]
  segments = np.array([[1] * 7 + [0] * 5] * 2)
  logits = [logits_of(model, params, x, None, segments) for x in (tokens, other)]
  np.testing.assert_array_equal(logits[0][:, :7], logits[1][:, :7])


def test_cached_equals_full_at_every_position(decoder):
  """Ragged rows: each is prefilled to its own length, then fed on by ones and by threes."""
  model, params = decoder
  tokens_BT, lengths_B = random_tokens(3, 15), np.array([2, 6, 4])
  full_BTV = np.asarray(logits_of(model, params, tokens_BT))
  apply = jax.jit(
    lambda tokens, cache: model.apply({"params": params}, tokens, cache=cache)[:2]
  )
  prompts = np.where(np.arange(6) < lengths_B[:, None], tokens_BT[:, :6], 59)
  logits, prefilled = apply(prompts, init_cache(model, 3, 20))
  for row, length in enumerate(lengths_B):
    np.testing.assert_allclose(logits[row, :length], full_BTV[row, :length], atol=1e-5)
  for chunk in (1, 3):
    cache = prefilled._replace(lengths_B=jnp.asarray(lengths_B))
    for start in range(0, 9, chunk):
      index = lengths_B[:, None] + start + np.arange(chunk)
      logits, cache = apply(np.take_along_axis(tokens_BT, index, 1), cache)
      expected = np.take_along_axis(full_BTV, index[..., None], 1)
      np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_independent_of_cache_length(decoder):
  model, params = decoder
  tokens_BT = random_tokens(2, 7)
  apply = jax.jit(lambda cache: model.apply({"params": params}, tokens_BT, cache=cache)[0])
  outputs = [apply(init_cache(model, 2, slots)) for slots in (7, 29)]
  np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-5)


def test_how_it_runs_changes_nothing(decoder):
  """Scan = unrolled, remat = not: the same parameters, logits and gradients."""
  model, params = decoder
  tokens_BT = random_tokens(2, 9)

  def loss_and_gradient(**knobs):
    model_as_run = build_model(model.cfg, TrainingConfig(**knobs))
    loss = lambda p: jnp.square(model_as_run.apply({"params": p}, tokens_BT)[0]).mean()
    return jax.jit(jax.value_and_grad(loss))(params)

  expected = loss_and_gradient(scanned=False, remat="none")
  ways = [dict(scanned=True, remat=remat) for remat in ("dots", "offload")]
  ways = [*ways, dict(scanned=False, remat="full")]
  if model.cfg.depth > SMALL["depth"] or model.cfg.moe.num_experts:
    ways = ways[:1]  # these take long to compile unrolled
  for knobs in ways:
    compare = lambda a, e: np.testing.assert_allclose(a, e, atol=1e-5)
    jax.tree.map(compare, loss_and_gradient(**knobs), expected)


@pytest.mark.slow
def test_remat_keeps_less():
  """The knob is real: full remat needs less temporary memory for the gradient."""
  deep = ModelConfig(**SMALL | ARCHITECTURES["gpt2"] | dict(depth=6))
  tokens_BT = jax.ShapeDtypeStruct((8, 32), jnp.int32)

  def temporary_bytes(remat):
    model = build_model(deep, TrainingConfig(remat=remat, scanned=True))
    params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens_BT))["params"]
    loss = lambda p, x: jnp.square(model.apply({"params": p}, x)[0]).mean()
    compiled = jax.jit(jax.grad(loss)).lower(params, tokens_BT).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary_bytes("full") < 0.7 * temporary_bytes("none")
