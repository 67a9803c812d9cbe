# SPDX-License-Identifier: Apache-2.0
"""The decoder equals an independent float64 implementation, for each architecture."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest
import references
from parameters import random_params

from flaxlm.config import ModelConfig
from flaxlm.nn.models import build_model, init_params

SMALL = dict(depth=2, width=32, num_heads=4, vocab_size=61, context=24)
GPT2 = dict(
  positions="learned",
  norm="layernorm",
  activation="gelu_tanh",
  gated=False,
  biased=True,
  norm_epsilon=1e-5,
)
LLAMA = dict(num_kv_heads=2, tied_embeddings=False, activation="silu", gated=True)
ARCHITECTURES = {
  "gpt2": GPT2,
  "llama": LLAMA,
  "multi_query_window": dict(num_kv_heads=1, window=3),
  "transformer_2017": dict(
    positions="sinusoidal",
    embedding_scaled=True,
    norm="layernorm",
    norm_placement="post",
    activation="relu",
    gated=False,
  ),
  "no_positions_wide_heads": dict(positions="none", head_dim=12, activation="gelu"),
}


def as_float64(params):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_equal_float64_reference(name):
  cfg = ModelConfig(**SMALL | ARCHITECTURES[name]).resolve()
  model = build_model(cfg)
  params = random_params(model)
  rng = np.random.default_rng(1)
  tokens_BT = rng.integers(0, cfg.vocab_size, (2, 11))
  segments_BT = np.array([[1] * 4 + [2] * 7, [1] * 11])
  positions_BT = np.array([[*range(4), *range(7)], [*range(11)]])
  logits, *_ = jax.jit(model.apply)(
    {"params": params}, tokens_BT, positions_BT, segments_BT
  )
  expected = references.decoder(
    as_float64(params), cfg, tokens_BT, segments_BT, positions_BT
  )
  np.testing.assert_allclose(logits, expected, atol=2e-5, rtol=2e-5)


def test_captured_weights_are_the_ones_used():
  """Looking changes no logit; each layer and head has a causal distribution."""
  cfg = ModelConfig(**SMALL | LLAMA).resolve()
  model = build_model(cfg)
  params = random_params(model)
  tokens_BT = np.arange(18).reshape(2, 9)
  plain, *_ = jax.jit(model.apply)({"params": params}, tokens_BT)
  looked = jax.jit(functools.partial(model.apply, capture=True))(
    {"params": params}, tokens_BT
  )
  np.testing.assert_allclose(looked.value, plain, atol=1e-5)
  weights_LBNTS = looked.attention["self"]
  assert weights_LBNTS.shape == (cfg.depth, 2, cfg.num_heads, 9, 9)
  np.testing.assert_allclose(weights_LBNTS.sum(-1), 1, atol=1e-5)
  assert np.all(np.triu(weights_LBNTS, 1) == 0)


def test_dropout_needs_a_key_and_changes_the_output():
  cfg = ModelConfig(**SMALL, dropout=0.5).resolve()
  model = build_model(cfg)
  params = random_params(model)
  tokens_BT = np.arange(8).reshape(1, 8)

  @jax.jit
  def apply(seed):
    rngs = {"dropout": jax.random.key(seed)}
    return model.apply({"params": params}, tokens_BT, deterministic=False, rngs=rngs)[0]

  np.testing.assert_array_equal(apply(0), apply(0))
  assert not np.allclose(apply(0), apply(1))


def test_seeds_start_with_other_parameters():
  cfg = ModelConfig(**SMALL).resolve()
  init = jax.jit(lambda seed: nn.unbox(init_params(build_model(cfg), seed)))
  first, again, other = init(0), init(0), init(1)
  jax.tree.map(np.testing.assert_array_equal, first, again)
  same = jax.tree.map(lambda a, b: bool(np.any(a == b)), first, other)
  named = {path[-1].key: x for path, x in jax.tree.leaves_with_path(same)}
  assert named == {"table": False, "kernel": False, "scale": True}


def test_residual_branches_start_small():
  """Projections to the residual stream start at 1 / sqrt(2 L) (Radford et al., 2019)."""
  cfg = ModelConfig(**SMALL | dict(depth=8, width=128)).resolve()
  init = jax.jit(build_model(cfg).init)
  params = nn.unbox(init(jax.random.key(0), np.zeros((1, 2), np.int32)))
  blocks = params["params"]["blocks"]
  ratio = np.std(blocks["ffn"]["down"]["kernel"]) * cfg.ffn_width**0.5
  np.testing.assert_allclose(ratio, (2 * cfg.depth) ** -0.5, rtol=0.05)
  np.testing.assert_allclose(np.std(blocks["ffn"]["up"]["kernel"]) * 128**0.5, 1, rtol=0.05)
  # All heads are the inputs of attention's output (4 of 32 dims here), not those of one.
  ratio = np.std(blocks["attention"]["o"]["kernel"]) * (4 * 32) ** 0.5
  np.testing.assert_allclose(ratio, (2 * cfg.depth) ** -0.5, rtol=0.05)
  for name in "qkv":
    kernel = blocks["attention"][name]["kernel"]
    np.testing.assert_allclose(np.std(kernel) * 128**0.5, 1, rtol=0.05)
  table = params["params"]["embedding"]["table"]
  np.testing.assert_allclose(np.std(table), 0.02, rtol=0.05)  # GPT's (Radford et al., 2018)
