# SPDX-License-Identifier: Apache-2.0
"""Completions: streamed pieces add up to the text and end where they should, whatever the
block and token boundaries."""

import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meshes import mesh_of

from flaxlm.config import Config, ModelConfig
from flaxlm.decoding.completions import (
  DEFAULT_NEW_TOKENS,
  Completion,
  GrowingCompletion,
  Stopping,
  complete,
)
from flaxlm.decoding.loading import Run
from flaxlm.decoding.prefill import BLOCK_STEPS
from flaxlm.decoding.sampling import same_settings
from flaxlm.errors import ConfigError
from flaxlm.nn.models import abstract_params, build_model
from flaxlm.tokenizers import Tokenizer, train_tokenizer

BYTES = train_tokenizer("byte", [], 0)
NUM_NEW = 1 + 2 * BLOCK_STEPS + 3
LETTERS = "ab \né漢"  # of one, two and three bytes each


def make_run(eos_logit: float) -> Run:
  """A random model whose texts are of `LETTERS`, cut apart at times, and of their ends.

  The last norm writes 1 into dim 0, so the head's row 0 is a bias of the logits.
  """
  model_cfg = ModelConfig(
    depth=1,
    width=16,
    num_heads=2,
    vocab_size=320,
    context=160,
    norm="layernorm",
    tied_embeddings=False,
  )
  cfg = Config(name="random", model=model_cfg)
  model = build_model(cfg.model)
  mesh = mesh_of()
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: (0.3 * rng.normal(size=x.shape)).astype(np.float32),
    abstract_params(model, mesh),
  )
  params["final_norm"]["scale"][0] = 0.0
  params["final_norm"]["bias"][0] = 1.0
  params["head"]["kernel"][0] = -30.0
  params["head"]["kernel"][0, [*LETTERS.encode()]] = 0.0
  params["head"]["kernel"][0, BYTES.eos_id] = eos_logit
  return Run(Path("nowhere"), cfg, BYTES, 0, model, params, mesh)


@pytest.fixture(scope="module")
def endless() -> Run:
  return make_run(-30.0)


def told(run: Run, prompts: list[str], seed: int = 0, **kwargs: Any) -> list[Completion]:
  """Completions, after a look at what every one of them must satisfy."""
  pieces: list[list[str]] = [[] for _ in prompts]
  kwargs = {"max_new_tokens": NUM_NEW} | kwargs
  results = complete(
    run,
    prompts,
    same_settings(len(prompts), 1.0, seed=seed),
    on_text=lambda row, piece: pieces[row].append(piece),
    **kwargs,
  )
  assert [result.prompt for result in results] == prompts
  for result, heard in zip(results, pieces, strict=True):
    assert "".join(heard) == result.completion
    assert all(heard)  # silence is not told
    assert len(result.logprobs) == len(result.tokens) <= kwargs["max_new_tokens"]
    assert all(logprob <= 0 for logprob in result.logprobs)
    assert result.finish_reason in ("stop", "length")
  return results


def texts_after(tokens: list[int], tokenizer: Tokenizer = BYTES) -> list[str]:
  """The text that is whole after each token."""
  stream, texts = tokenizer.stream(), [""]
  for token in tokens:
    texts.append(texts[-1] + stream.push(token))
  return texts[1:]


# -- Whole completions ---------------------------------------------------------------------


def test_without_a_stop_the_completion_is_the_text_of_its_tokens(endless: Run):
  results = told(endless, ["a", "", "b é", "some longer prompt"], seed=1)
  assert len({result.completion for result in results}) == 4
  for result in results:
    assert result.finish_reason == "length"
    assert len(result.tokens) == NUM_NEW
    assert result.completion == BYTES.decode(result.tokens)


def test_text_is_told_block_by_block(endless: Run):
  heard: list[str] = []
  settings = same_settings(1, 1.0)
  show = lambda _, piece: heard.append(piece)
  (result,) = complete(endless, ["a"], settings, NUM_NEW, on_text=show)
  texts = texts_after(result.tokens)
  ends = [1, 1 + BLOCK_STEPS, 1 + 2 * BLOCK_STEPS, NUM_NEW]
  shown = ["", *(texts[end - 1] for end in ends), result.completion]
  expected = [new.removeprefix(old) for old, new in itertools.pairwise(shown)]
  assert heard == [piece for piece in expected if piece]


def test_any_part_of_a_completion_can_stop_it(endless: Run):
  """Also across tokens (é is two) and across blocks; the stop itself is never shown."""
  (whole,) = told(endless, ["b"], seed=3)
  texts = texts_after(whole.tokens)
  rng = np.random.default_rng(0)
  borders = [0, BLOCK_STEPS - 1, BLOCK_STEPS, 2 * BLOCK_STEPS, len(whole.completion) - 3]
  for at in [*borders, *rng.integers(0, len(whole.completion) - 3, 15)]:
    stop = whole.completion[at : at + int(rng.integers(1, 9))]
    (result,) = told(endless, ["b"], seed=3, stop=[stop])
    if any(stop in text for text in texts):
      assert result.completion == whole.completion.partition(stop)[0]
      assert result.finish_reason == "stop"
      used = next(n for n, text in enumerate(texts, 1) if stop in text)
      assert result.tokens == whole.tokens[:used]
      assert result.logprobs == whole.logprobs[:used]
      assert stop not in result.completion


def test_the_stop_that_is_complete_first_wins(endless: Run):
  (whole,) = told(endless, ["b"], seed=3)
  text = whole.completion
  (result,) = told(endless, ["b"], seed=3, stop=[text[2:12], text[4:7], "no such text"])
  assert result.completion == text.partition(text[4:7])[0]


def test_a_stop_that_never_comes_changes_nothing(endless: Run):
  """Not even one that the very end of the text begins."""
  (whole,) = told(endless, ["b"], seed=3)
  (result,) = told(endless, ["b"], seed=3, stop=[whole.completion[-3:] + "Z", "Y"])
  assert result == whole


def test_a_stop_ends_its_own_row_alone(endless: Run):
  prompts = ["a", "b", "é"]
  free = told(endless, prompts, seed=5)
  stop = free[1].completion[2:7]
  stopped = told(endless, prompts, seed=5, stop=[stop])
  for before, after in zip(free, stopped, strict=True):
    assert after.completion == before.completion.partition(stop)[0]
  assert stopped[1].finish_reason == "stop"


def test_the_end_of_the_text_ends_a_row():
  """Its token is counted, has no text, and leaves the other rows alone."""
  run = make_run(-2.0)
  results = told(run, ["a"] * 4, seed=2)
  reasons = {result.finish_reason for result in results}
  assert reasons == {"stop", "length"}  # both happen, or this says nothing
  for result in results:
    ended = result.finish_reason == "stop"
    assert BYTES.eos_id not in result.tokens[:-1]
    assert (result.tokens[-1] == BYTES.eos_id) == ended
    assert ended or len(result.tokens) == NUM_NEW
    assert result.completion == BYTES.decode(result.tokens)
    assert "endoftext" not in result.completion


def test_without_a_number_there_is_room_or_the_default(endless: Run):
  """The context holds the end-of-text before the prompt, the prompt, and the answer."""
  context = endless.model.cfg.context
  for prompt in ("a" * 10, "a" * (context - 9)):
    (result,) = complete(endless, [prompt], same_settings(1))
    assert len(result.tokens) == min(DEFAULT_NEW_TOKENS, context - 1 - len(prompt))
  assert context - 1 - 10 > DEFAULT_NEW_TOKENS > 8  # one of each


def test_samples_of_one_prompt_differ_and_repeat(endless: Run):
  first = told(endless, ["a"] * 4, seed=7)
  assert len({result.completion for result in first}) == 4
  assert told(endless, ["a"] * 4, seed=7) == first


@pytest.mark.parametrize(
  ("prompts", "kwargs", "complaint"),
  [
    (["a"], {"stop": ["x", ""]}, "a stop string is empty"),
    (["a"], {"max_new_tokens": 0}, "max-new-tokens is 0"),
    (["a" * 160], {"max_new_tokens": 1}, "prompt of 161 tokens + 1 new"),
    (["a", "é" * 100], {}, "prompt of 201 tokens"),
    ([], {}, "no tokens"),
  ],
)
def test_mistakes_are_told(endless: Run, prompts: list[str], kwargs: Any, complaint: str):
  with pytest.raises(ConfigError, match=complaint.replace("+", r"\+")):
    complete(endless, prompts, same_settings(len(prompts)), **kwargs)


def test_a_string_alone_is_one_prompt_and_one_stop(endless: Run):
  """Never its characters."""
  (whole,) = told(endless, ["def "])
  (alone,) = complete(endless, "def ", same_settings(1), NUM_NEW)
  assert alone == whole
  stop = whole.completion[3:5]
  for way in (stop, [stop], Stopping(strings=stop)):
    (stopped,) = complete(endless, "def ", same_settings(1), NUM_NEW, way)
    assert stopped.completion == whole.completion.partition(stop)[0]


@pytest.mark.parametrize(
  ("settings", "stop", "complaint"),
  [
    (same_settings(1), (), "settings for 1 rows, and 2 prompts"),
    (same_settings(3), (), "settings for 3 rows, and 2 prompts"),
    (same_settings(2), [Stopping()], "stops for 1 rows, and 2 prompts"),
    (same_settings(2, banned_tokens=range(BYTES.vocab_size)), (), "every token is banned"),
    (same_settings(2, logit_bias={BYTES.vocab_size: 1.0}), (), "token id 257 of a bias"),
    (same_settings(2, banned_tokens=[BYTES.vocab_size]), (), "token id 257 of a bias"),
    (same_settings(2), Stopping(tokens=[257]), "stop-token is 257"),
    (same_settings(2), Stopping(tokens=[-1]), "stop-token is -1"),
    (same_settings(2), ["a", 3], "stop string 2 is 3"),
  ],
)
def test_settings_that_do_not_fit_are_refused(
  endless: Run, settings: Any, stop: Any, complaint: str
):
  with pytest.raises(ConfigError, match=complaint):
    complete(endless, ["a", "b"], settings, 4, stop)


def test_one_token_may_be_left_to_be_drawn(endless: Run):
  banned = [token for token in range(BYTES.vocab_size) if token != 98]
  (answer,) = complete(endless, "a", same_settings(1, banned_tokens=banned), 3)
  assert answer.completion == "bbb"


@pytest.mark.parametrize("prompt", [b"a", 3, "a\ud800", ["a"]])
def test_what_is_no_text_is_refused(endless: Run, prompt: Any):
  with pytest.raises(ConfigError, match="prompt 2 is"):
    complete(endless, ["a", prompt], same_settings(2), 4)


# -- Every border --------------------------------------------------------------------------


def certain(text: str, stops: list[str]) -> int:
  """How much of a text cannot be part of a stop, whatever follows."""
  for start in range(len(text)):
    if any(stop.startswith(text[start:]) for stop in stops):
      return start
  return len(text)


# Bytes of few letters, so that stops come up, are nearly met, and overlap themselves.
TOKENS = st.lists(st.sampled_from([*"aab é".encode(), 0xE6, BYTES.eos_id]), max_size=40)
STOPS = st.lists(
  st.text(st.sampled_from("aabé\ufffd "), min_size=1, max_size=4), max_size=3
)


@settings(max_examples=400)
@given(tokens=TOKENS, stops=STOPS, cuts=st.lists(st.integers(0, 40), max_size=6))
def test_wherever_the_blocks_end(tokens: list[int], stops: list[str], cuts: list[int]):
  """Against the plain definition: look at the whole text again after every token."""
  used, text, reason = 0, "", "length"
  stream, spoken = BYTES.stream(), [""]
  for token in tokens:
    used += 1
    end = token == BYTES.eos_id
    text += stream.flush() if end else stream.push(token)
    spoken.append(text)
    if end or any(stop in text for stop in stops):
      reason = "stop"
      break
  else:
    text += stream.flush()
  found = [text.find(stop) for stop in stops if stop in text]
  if found:
    text, reason = text[: min(found)], "stop"

  row = GrowingCompletion(Completion("prompt"), BYTES, Stopping(strings=stops))
  shown = ""
  borders = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
  for start, end in itertools.pairwise(borders):
    count, block = end - start, tokens[start:end]
    shown += row.extend(block, [-1.0] * count, [[]] * count, [[]] * count)
    if row.result.finish_reason is None:
      assert len(shown) <= certain(spoken[end], stops)
      assert stops or shown == spoken[end]
    assert text.startswith(shown)
  shown += row.finish()
  assert shown == row.result.completion == text
  assert row.result.finish_reason == reason
  assert row.result.tokens == tokens[:used]
  assert len(row.result.logprobs) == used
