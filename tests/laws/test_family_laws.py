# SPDX-License-Identifier: Apache-2.0
"""Laws of encoders and encoder-decoders: packed = alone, padding, causal, cached = full."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow, slow_but
from parameters import random_params

from flaxlm.config import ModelConfig, TrainingConfig
from flaxlm.nn.base import Source
from flaxlm.nn.models import build_model

SMALL = dict(depth=2, width=32, num_heads=4, vocab_size=61, context=32)
FAMILIES = {
  "bert": dict(
    family="encoder",
    positions="learned",
    norm="layernorm",
    norm_placement="post",
    embedding_norm=True,
    gated=False,
    activation="gelu",
    biased=True,
    head_transform=True,
  ),
  "transformer_2017": dict(
    family="encoder_decoder",
    positions="sinusoidal",
    embedding_scaled=True,
    norm="layernorm",
    norm_placement="post",
    gated=False,
    activation="relu",
  ),
  "t5": dict(
    family="encoder_decoder", positions="relative", attention_scale=1.0, encoder_depth=3
  ),
}
TRANSLATORS = ["transformer_2017", "t5"]
FAST = ("t5",)


@functools.cache
def model_of(name: str):
  model = build_model(ModelConfig(**SMALL | FAMILIES[name]))
  return model, random_params(model)


def random_tokens(*shape: int) -> np.ndarray:
  return np.random.default_rng(7).integers(1, SMALL["vocab_size"], shape)


def logits_of(model, params, tokens_BT, positions_BT=None, segments_BT=None, source=None):
  source = None if model.cfg.family == "encoder" else source
  return np.asarray(_logits(model, params, tokens_BT, positions_BT, segments_BT, source))


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, tokens_BT, positions_BT, segments_BT, source):
  read = {} if source is None else {"source": source}
  return model.apply({"params": params}, tokens_BT, positions_BT, segments_BT, **read).value


@pytest.mark.parametrize("name", slow_but(FAST, FAMILIES))
def test_packed_equals_alone(name):
  """Documents in one row, and their sources in one, have the logits of each alone."""
  model, params = model_of(name)
  first, second = random_tokens(2, 9)[0], random_tokens(2, 9)[1][:6]
  read = random_tokens(2, 7)
  row, segments = np.concatenate([first, second])[None], np.array([[1] * 9 + [2] * 6])
  positions = np.array([[*range(9), *range(6)]])
  sources = Source(
    np.concatenate([read[0], read[1][:4]])[None],
    np.array([[*range(7), *range(4)]]),
    np.array([[1] * 7 + [2] * 4]),
  )
  packed = logits_of(model, params, row, positions, segments, sources)[0]
  alone = [
    logits_of(model, params, text[None], source=Source(of[None]))[0]
    for text, of in ((first, read[0]), (second, read[1][:4]))
  ]
  np.testing.assert_allclose(packed, np.concatenate(alone), atol=1e-5)


@pytest.mark.parametrize("name", slow_but(FAST, FAMILIES))
def test_padding_never_matters(name):
  """What stands in padding, on either side, changes no bit outside it."""
  model, params = model_of(name)

  def logits(shift: int) -> np.ndarray:
    move = lambda x, at: np.where(np.arange(x.shape[1]) < at, x, (x + shift) % 61)
    sources = Source(move(random_tokens(2, 8), 5), None, np.array([[1] * 5 + [0] * 3] * 2))
    segments = np.array([[1] * 7 + [0] * 5] * 2)
    tokens = move(random_tokens(2, 12), 7)
    return logits_of(model, params, tokens, None, segments, sources)[:, :7]

  np.testing.assert_array_equal(logits(0), logits(5))


def test_an_encoder_sees_both_sides():
  """Changing any token changes the logits at every other: nothing is causal by mistake."""
  model, params = model_of("bert")
  tokens = random_tokens(1, 6)
  plain = logits_of(model, params, tokens)
  for at in (0, 5):
    other = tokens.copy()
    other[0, at] = (other[0, at] + 1) % 61
    assert np.all(np.abs(logits_of(model, params, other) - plain).max(-1) > 1e-6)


@pytest.mark.parametrize("name", slow_but(FAST, TRANSLATORS))
def test_a_decoder_with_a_source_is_causal(name):
  """A later target token changes no bit before it; a source token changes all of it."""
  model, params = model_of(name)
  tokens, read = random_tokens(1, 8), random_tokens(1, 6)
  plain = logits_of(model, params, tokens, source=Source(read))
  other = tokens.copy()
  other[0, 5] += 1
  np.testing.assert_array_equal(
    logits_of(model, params, other, source=Source(read))[:, :5], plain[:, :5]
  )
  read[0, -1] = (read[0, -1] + 1) % 61
  changed = logits_of(model, params, tokens, source=Source(read))
  assert np.all(np.abs(changed - plain).max(-1) > 1e-6)


@pytest.mark.parametrize("name", slow_but(FAST, TRANSLATORS))
def test_cached_equals_full_at_every_position(name):
  """Ragged sources, ragged prefills, then fed on by ones and by threes."""
  model, params = model_of(name)
  tokens_BT, lengths_B = random_tokens(3, 15), np.array([2, 6, 4])
  segments_BS = (np.arange(8) < np.array([[3], [8], [5]])).astype(np.int32)
  source = Source(random_tokens(3, 8), segments_BS=segments_BS)
  ones_BT = np.ones_like(tokens_BT)  # a row is one document, as its source is
  full_BTV = logits_of(model, params, tokens_BT, None, ones_BT, source)
  start = jax.jit(lambda p: model.apply({"params": p}, source, 20, method="start"))
  apply = jax.jit(
    lambda tokens, cache, num_new=None: model.apply(
      {"params": params}, tokens, cache=cache, num_new_B=num_new
    )[:2]
  )
  prompts = np.where(np.arange(6) < lengths_B[:, None], tokens_BT[:, :6], 59)
  logits, prefilled = apply(prompts, start(params), lengths_B)
  for row, length in enumerate(lengths_B):
    np.testing.assert_allclose(logits[row, :length], full_BTV[row, :length], atol=1e-5)
  for chunk in (1, 3):
    cache = prefilled
    for first in range(0, 9, chunk):
      index = lengths_B[:, None] + first + np.arange(chunk)
      logits, cache = apply(np.take_along_axis(tokens_BT, index, 1), cache)
      expected = np.take_along_axis(full_BTV, index[..., None], 1)
      np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", slow("t5")])
def test_how_it_runs_changes_nothing(name):
  """Scan = unrolled, remat = not: the same parameters, logits and gradients."""
  model, params = model_of(name)
  tokens_BT, source = random_tokens(2, 9), Source(random_tokens(2, 7))

  def loss_and_gradient(**knobs):
    as_run = build_model(model.cfg, TrainingConfig(**knobs))
    read = {} if model.cfg.family == "encoder" else {"source": source}
    loss = lambda p: jnp.square(as_run.apply({"params": p}, tokens_BT, **read).value).mean()
    return jax.jit(jax.value_and_grad(loss))(params)

  compare = lambda a, e: np.testing.assert_allclose(a, e, atol=1e-5)
  actual = loss_and_gradient(scanned=True, remat="full")
  jax.tree.map(compare, actual, loss_and_gradient())


@pytest.mark.parametrize("name", slow_but(FAST, FAMILIES))
def test_captured_maps_are_the_ones_used(name):
  """Looking changes no logit, and every map is a distribution over what may be seen."""
  model, params = model_of(name)
  tokens_BT, source = random_tokens(2, 6), Source(random_tokens(2, 7))
  read = {} if model.cfg.family == "encoder" else {"source": source}
  look = jax.jit(lambda p: model.apply({"params": p}, tokens_BT, capture=True, **read))
  looked = look(params)
  plain = logits_of(model, params, tokens_BT, source=source)
  np.testing.assert_allclose(looked.value, plain, atol=1e-5)
  sizes = {
    "self": (2, 6, 6),
    "cross": (2, 6, 7),
    "encoder_self": (model.cfg.encoder_depth, 7, 7),
  }
  names = ["self"] if model.cfg.family == "encoder" else list(sizes)
  assert sorted(looked.attention) == sorted(names)
  for kind in names:
    depth, queries, keys = sizes[kind]
    maps_LBNTS = looked.attention[kind]
    assert maps_LBNTS.shape == (depth, 2, 4, queries, keys)
    np.testing.assert_allclose(maps_LBNTS.sum(-1), 1, atol=1e-5)
