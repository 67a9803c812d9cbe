# SPDX-License-Identifier: Apache-2.0
"""Beam search: one beam is greedy, all beams are exhaustive search, for every family."""

import functools
import itertools
from typing import Any

import jax
import numpy as np
import pytest
from conftest import slow, slow_but
from parameters import random_params

from flaxlm.config import ModelConfig
from flaxlm.decoding.beams import beam_search, length_penalty
from flaxlm.decoding.generate import generate
from flaxlm.decoding.prefill import Request
from flaxlm.decoding.sampling import make_sampling
from flaxlm.errors import ConfigError
from flaxlm.nn.base import LanguageModel, Source
from flaxlm.nn.models import build_model

SIZES = dict(depth=2, width=16, num_heads=2, vocab_size=8, context=32)
FAMILIES = {
  "decoder": ModelConfig(**SIZES),
  "rnn": ModelConfig(family="rnn", **SIZES),
  "encoder_decoder": ModelConfig(family="encoder_decoder", positions="relative", **SIZES),
}
EOS = 0


@functools.cache
def model_of(name: str) -> tuple[LanguageModel, Any]:
  """A model whose choices are far apart."""
  model = build_model(FAMILIES[name])
  return model, random_params(model, spread=0.5)


def request_of(name: str, num_new: int) -> Request:
  if name == "encoder_decoder":
    return Request([[0], [0]], num_new, 8, sources=[[3, 1, 4, 1, 5, 0], [2, 0]])
  return Request([[0, 3, 1], [0, 5]], num_new, 8)


@pytest.mark.parametrize("name", slow_but(["decoder"], FAMILIES))
def test_one_beam_is_greedy(name: str):
  model, params = model_of(name)
  request = request_of(name, 20)
  blocks = generate(model, params, request, make_sampling(2, 0.0))
  greedy_BT = np.concatenate([block.tokens_BT for block in blocks], 1)
  found = beam_search(model, params, request, 1, EOS)
  for row, (best,) in enumerate(found):
    expected = greedy_BT[row].tolist()
    if EOS in expected:
      expected = expected[: expected.index(EOS) + 1]
    assert best.tokens == expected
    assert best.ended == (EOS in expected)


@pytest.mark.parametrize(
  ("name", "alpha"),
  [
    ("decoder", 1.0),
    slow("encoder_decoder", 0.0),
    slow("decoder", 0.0),
    slow("encoder_decoder", 1.0),
    slow("rnn", 0.0),
    slow("rnn", 1.0),
  ],
)
def test_enough_beams_find_the_best_of_all(name: str, alpha: float):
  """Against every text of up to three tokens, scored by the full forward pass."""
  model, params = model_of(name)
  request = request_of(name, 3)
  num_ids = 4  # more would be too many texts
  request = Request(
    [[min(token, 3) for token in row] for row in request.prompts],
    3,
    num_ids,
    request.sources,
  )
  (first, _) = beam_search(model, params, request, 64, EOS, alpha)
  texts = [
    text
    for length in (1, 2, 3)
    for text in itertools.product(range(num_ids), repeat=length)
    if EOS not in text[:-1] and text[-1] == EOS
  ]
  tokens_BT = np.array(
    [[*request.prompts[0], *text, *[1] * (3 - len(text))] for text in texts]
  )
  source = {}
  if request.sources is not None:
    source = {"source": Source(np.array([request.sources[0]] * len(texts)))}
  apply = jax.jit(lambda p, t, source: model.apply({"params": p}, t, **source).value)
  logits = apply(params, tokens_BT, source)[..., :num_ids]
  logprobs = np.asarray(jax.nn.log_softmax(logits, -1))
  start = len(request.prompts[0]) - 1
  scores = [
    sum(logprobs[n, start + i, token] for i, token in enumerate(text))
    / length_penalty(len(text), alpha)
    for n, text in enumerate(texts)
  ]
  order = np.argsort(scores)[::-1]
  ended = [h for h in first if h.ended]
  assert [h.tokens for h in ended] == [list(texts[n]) for n in order]
  np.testing.assert_allclose([h.score for h in ended], np.sort(scores)[::-1], atol=1e-4)


def test_longer_texts_may_be_less_likely():
  """As much as Wu et al. (2016), equation 14, say: lp(Y) = ((5 + |Y|) / 6)^alpha."""
  assert length_penalty(1, 0.6) == 1
  assert length_penalty(7, 1.0) == 2
  assert length_penalty(19, 0.5) == 2
  assert length_penalty(50, 0.0) == 1


@pytest.mark.slow
def test_a_longer_search_passes_block_borders():
  """The answer does not change where blocks end, nor with what was asked besides."""
  model, params = model_of("decoder")
  long = beam_search(model, params, request_of("decoder", 25), 3, EOS)
  alone = Request([request_of("decoder", 25).prompts[1]], 25, 8)
  (second,) = beam_search(model, params, alone, 3, EOS)
  assert [h.tokens for h in second] == [h.tokens for h in long[1]]


@pytest.mark.parametrize("num_beams", [0, 1000])
def test_beams_that_cannot_be(num_beams: int):
  model, params = model_of("decoder")
  with pytest.raises(ConfigError, match=f"beams is {num_beams}"):
    beam_search(model, params, request_of("decoder", 4), num_beams, EOS)
