# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding: plain decoding's tokens, whatever the draft, in fewer passes."""

from typing import Any

import jax
import numpy as np
import pytest
from conftest import slow
from test_generate import model_of
from test_prefill import tokens_of

from flaxlm.config import ModelConfig
from flaxlm.decoding import speculative
from flaxlm.decoding.prefill import Request
from flaxlm.decoding.sampling import make_sampling
from flaxlm.decoding.speculative import (
  MAX_DRAFT_TOKENS,
  Draft,
  draft_from_ngrams,
  speculate,
)
from flaxlm.errors import ConfigError
from flaxlm.nn.models import build_model

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 5, 6]]


def spoken(*arguments: Any) -> tuple[list[list[int]], np.ndarray]:
  blocks = list(speculate(*arguments))
  logprobs = np.concatenate([block.logprobs_BT for block in blocks], 1)
  return np.concatenate([block.tokens_BT for block in blocks], 1).tolist(), logprobs


def drafts() -> dict[str, Draft]:
  """The model itself (every guess is right), another one (few are), and the text."""
  model, params = model_of("gqa")
  noise = np.random.default_rng(1)
  other = jax.tree.map(lambda x: x + 0.1 * noise.normal(size=x.shape), params)
  return {
    "itself": Draft(model, params, 3),
    "another": Draft(model, jax.tree.map(np.float32, other), 2),
    "ngram": Draft(None, None, 4),
  }


@pytest.mark.parametrize("name", [slow("itself"), slow("another"), "ngram"])
def test_the_tokens_are_those_of_plain_decoding(name: str):
  """Greedy or drawn, to the last token of the length, and their log-probabilities."""
  model, params = model_of("gqa")
  for temperature, top_k in ((0.0, None), (1.0, 20)):
    sampling = make_sampling(3, temperature, top_k=top_k, seed=4)
    request = Request(PROMPTS, 23, 64)
    plain = tokens_of(model, params, request, sampling)
    tokens, logprobs = spoken(model, params, request, sampling, drafts()[name])
    assert tokens == plain
    assert logprobs.shape == (3, 23)
    assert np.isfinite(logprobs).all()


def test_a_row_draws_from_the_models_distribution():
  """By chi-square, over many seeds: the second and third token of plain and guessed text
  are as often what they are; the first pass decides both."""
  model, params = model_of("gqa")
  seeds = make_sampling(256, 1.0, seed=0)
  request = Request([[1, 2, 3]] * 256, 3, 64)
  tokens, _ = spoken(model, params, request, seeds, Draft(None, None, 2))
  for place in (1, 2):
    # The plain decoder with other seeds is an independent sample.
    others = make_sampling(256, 1.0, seed=10_000)
    plain = tokens_of(model, params, request, others)
    ours = np.bincount([row[place] for row in tokens], minlength=64)
    theirs = np.bincount([row[place] for row in plain], minlength=64)
    common = ours + theirs >= 8
    statistic = ((ours - theirs)[common] ** 2 / (ours + theirs)[common]).sum()
    assert statistic < 3 * common.sum() + 20, "two samples of one distribution"
    shifted = np.roll(theirs, 1)
    assert ((ours - shifted) ** 2 / np.maximum(ours + shifted, 1)).sum() > statistic


def test_right_guesses_save_passes(monkeypatch):
  model, params = model_of("gqa")
  calls = []
  check = speculative.verify_block
  counting = lambda *arguments: calls.append(1) or check(*arguments)
  monkeypatch.setattr(speculative, "verify_block", counting)
  request, greedy = Request(PROMPTS[:1], 33, 64), make_sampling(1, 0.0)
  spoken(model, params, request, greedy, drafts()["itself"])
  assert len(calls) == 2, "4 passes of 4 tokens each, twice"


@pytest.mark.slow
def test_a_draft_goes_on_from_what_was_accepted(monkeypatch):
  """Wrong guesses leave nothing behind: each pass accepts as many as the model's likeliest
  tokens, given the text so far, are the ones that are drawn, and one more."""
  model, params = model_of("gqa")
  verify, accepted = speculative.verify_block, []

  def verify_and_count(*arguments):
    state, block, accepted_BT = verify(*arguments)
    accepted.extend(np.asarray(accepted_BT)[0].reshape(speculative.PASSES, -1).sum(1))
    return state, block, accepted_BT

  monkeypatch.setattr(speculative, "verify_block", verify_and_count)
  prompt, draft = PROMPTS[0], drafts()["itself"]
  drawn = make_sampling(1, 0.6, seed=2)
  tokens, _ = spoken(model, params, Request([prompt], 33, 64), drawn, draft)
  text = np.array([*prompt, *tokens[0]])
  likeliest = np.asarray(model.apply({"params": params}, text[None]).value[0].argmax(-1))
  place, expected = len(prompt) + 1, []  # the first new token comes with the prefill
  while place < len(text):
    guesses = likeliest[place - 1 : place - 1 + draft.num_tokens]
    right = np.cumprod(guesses[: len(text) - place] == text[place : place + len(guesses)])
    expected.append(min(1 + right.sum(), len(text) - place))
    place += expected[-1]
  assert [count for count in accepted if count] == expected
  assert {1, 2, 3} <= set(expected), "or there was little to go wrong"


def test_what_followed_before_is_guessed():
  texts_BS = np.zeros((3, 16), np.int32)
  texts_BS[0, :8] = [7, 5, 6, 9, 8, 5, 6, 0]  # 5 6 was followed by 9 8 5
  texts_BS[1, :8] = [5, 6, 1, 5, 6, 2, 5, 6]  # twice: the later one counts
  texts_BS[2, :1] = [3]
  guesses = draft_from_ngrams(texts_BS, np.array([7, 8, 1]), 3)
  assert guesses[0].tolist() == [9, 8, 5]
  assert guesses[1].tolist() == [2, 5, 6]
  assert guesses.shape == (3, 3), "and anything where there is nothing to go by"


@pytest.mark.parametrize(
  ("draft", "rules", "complaint"),
  [
    (Draft(num_tokens=0), {}, "draft-tokens is 0"),
    (Draft(num_tokens=MAX_DRAFT_TOKENS + 1), {}, "draft-tokens is 33"),
    (Draft(), {"repetition_penalty": 1.2}, "rule repetition"),
    (Draft(build_model(ModelConfig(family="rnn", vocab_size=64))), {}, "family rnn"),
  ],
)
def test_what_cannot_be_checked_in_one_pass(draft: Draft, rules: Any, complaint: str):
  model, params = model_of("gqa")
  with pytest.raises(ConfigError, match=complaint):
    next(speculate(model, params, Request([[1]], 4, 64), make_sampling(1, **rules), draft))
