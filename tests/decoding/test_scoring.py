# SPDX-License-Identifier: Apache-2.0
"""Log-likelihoods are those of a plain pass over each row alone, whatever the batch."""

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import slow_but
from meshes import mesh_of
from parameters import random_params

from flaxlm.config import Config, ModelConfig, MoEConfig
from flaxlm.decoding import scoring
from flaxlm.decoding.compile_counter import count_compilations
from flaxlm.decoding.generate import generate
from flaxlm.decoding.loading import Run
from flaxlm.decoding.prefill import Request
from flaxlm.decoding.prompt_scores import score_prompt
from flaxlm.decoding.sampling import SamplingSettings, stack_settings
from flaxlm.decoding.scoring import (
  Likelihood,
  Row,
  TokenPair,
  batch_rows,
  encode_pair,
  rolling_windows,
  score_continuations,
  score_rolling,
  score_tokens,
)
from flaxlm.errors import ConfigError, NonFiniteError
from flaxlm.nn.base import Source
from flaxlm.nn.models import build_model
from flaxlm.tokenizers import Tokenizer, train_tokenizer

BYTES = train_tokenizer("byte", [], 0)
BEGIN = BYTES.bos_id
MERGED = train_tokenizer("bpe", ["the cat sat on the mat"] * 9, 290)
CONTEXT = 40  # no power of two: rows are padded beyond it
SIZES = dict(depth=1, width=16, num_heads=2, vocab_size=320, context=CONTEXT)
FAMILIES: dict[str, dict[str, Any]] = {
  "decoder": dict(positions="learned"),
  "experts": dict(moe=MoEConfig(num_experts=4, expert_width=24)),
  "rnn": dict(family="rnn", num_heads=1),
  "encoder_decoder": dict(family="encoder_decoder"),
}


def make_run(tokenizer: Tokenizer = BYTES, spread: float = 0.5, **sizes: Any) -> Run:
  cfg = Config(name="random", model=ModelConfig(**SIZES | sizes))
  model = build_model(cfg.model)
  params = random_params(model, spread=spread)
  return Run(Path("nowhere"), cfg, tokenizer, 0, model, params, mesh_of())


@pytest.fixture(scope="module")
def run() -> Run:
  return make_run(**FAMILIES["decoder"])


forward = jax.jit(
  lambda model, params, tokens_BT, source: (
    model.apply(
      {"params": params}, tokens_BT, **({} if source is None else {"source": source})
    ).value
  ),
  static_argnums=0,
)


def logits_of(run: Run, read: list[int], source: tuple[int, ...] = ()) -> np.ndarray:
  """(T, V) of one row, by a plain pass: what follows a token is no matter to it."""
  row = np.array([[*read, *[0] * (CONTEXT - len(read))]])
  given = Source(np.array([source])) if source else None
  return np.float64(forward(run.model, run.params, row, given)[0, : len(read)])


def alone(run: Run, pair: TokenPair) -> tuple[float, bool]:
  """(log-likelihood, whether greedy) of one row."""
  logprobs_T, greedy = each_alone(run, pair)
  return float(logprobs_T.sum()), greedy


def each_alone(run: Run, pair: TokenPair) -> tuple[np.ndarray, bool]:
  read = [*pair.context, *pair.continuation[:-1]]
  logits_TV = logits_of(run, read, pair.source)[-len(pair.continuation) :, : run.num_ids]
  own_T = logits_TV[np.arange(len(logits_TV)), [*pair.continuation]]
  greedy = logits_TV.argmax(-1).tolist() == [*pair.continuation]
  return own_T - np.log(np.exp(logits_TV).sum(-1)), greedy


def ragged(run: Run, lengths: list[tuple[int, int]]) -> list[TokenPair]:
  random_ids = random.Random(0)
  draw = lambda count: tuple(random_ids.randrange(256) for _ in range(count))
  reads = run.model.cfg.family == "encoder_decoder"
  pairs = []
  for before, after in lengths:
    source = draw(before) if reads else ()
    pairs.append(TokenPair((BEGIN,) if reads else draw(before), draw(after), source))
  return pairs


@pytest.mark.parametrize("family", slow_but({"decoder", "rnn"}, FAMILIES))
def test_a_ragged_batch_equals_each_row_alone(family: str):
  run = make_run(**FAMILIES[family])
  pairs = ragged(run, [(1, 1), (1, 40), (5, 3), (30, 11), (40, 1), (5, 2)])
  *first, _ = pairs[3].continuation
  pairs.append(pairs[3]._replace(continuation=(*first, 7)))
  done: list[int] = []
  found = score_tokens(run, [*pairs, pairs[2]], done.append, each=True)
  assert sum(done) == len(found) == len(pairs) + 1 and found[-1] == found[2]
  for pair, likelihood in zip(pairs, found, strict=False):
    logprobs_T, is_greedy = each_alone(run, pair)
    assert likelihood.logprob == pytest.approx(logprobs_T.sum(), rel=1e-5, abs=1e-5)
    np.testing.assert_allclose(likelihood.logprobs, logprobs_T, rtol=1e-5, atol=1e-5)
    assert likelihood.is_greedy == is_greedy
    assert (likelihood.num_tokens, likelihood.num_cut) == (len(pair.continuation), 0)


@pytest.mark.slow
def test_a_capacity_drops_no_token(run: Run):
  """As in decoding: it is the same model without a capacity."""
  moe = MoEConfig(num_experts=4, expert_width=24)
  limited = make_run(moe=dataclasses.replace(moe, capacity_factor=0.5))
  pairs = ragged(limited, [(9, 3), (30, 11)])
  assert score_tokens(limited, pairs) == score_tokens(make_run(moe=moe), pairs)


def test_on_a_mesh(run: Run):
  pairs = ragged(run, [(3, 2), (20, 9), (40, 1)])
  cut = run._replace(mesh=mesh_of(data=2, fsdp=2))
  for one, other in zip(score_tokens(run, pairs), score_tokens(cut, pairs), strict=True):
    assert other.logprob == pytest.approx(one.logprob, rel=1e-5)


def test_greedy_is_what_greedy_decoding_writes(run: Run):
  context, written = (BEGIN, 97), []
  for _ in range(4):
    logits_TV = logits_of(run, [*context, *written])
    written.append(int(logits_TV[-1, : run.num_ids].argmax()))
  pairs = [TokenPair(context, tuple(written)), TokenPair(context, (*written[:3], 1))]
  assert [x.is_greedy for x in score_tokens(run, pairs)] == [True, False]


def test_likelihoods_are_those_that_decoding_reports():
  """Of a model that has more ids than its tokenizer: those are never written."""
  run = make_run(**FAMILIES["decoder"])
  assert run.num_ids < run.model.cfg.num_ids
  context = (BEGIN, 97)
  settings = stack_settings([SamplingSettings(seed=1)])
  request = Request([context], 12, run.num_ids)
  blocks = [*generate(run.model, run.params, request, settings, run.mesh)]
  tokens = [token for block in blocks for token in block.tokens_BT[0].tolist()]
  logprobs = np.concatenate([block.logprobs_BT[0] for block in blocks])
  [found] = score_tokens(run, [TokenPair(context, tuple(tokens))], each=True)
  np.testing.assert_allclose(found.logprobs, logprobs, rtol=1e-5, atol=1e-5)
  scores = score_prompt(run, [*context, *tokens])
  np.testing.assert_allclose(scores.logprobs[1:], logprobs, rtol=1e-5, atol=1e-5)
  with pytest.raises(ConfigError, match="300 has no probability"):
    score_tokens(run, [TokenPair((300,), (1,)), TokenPair((1,), (300, 1))])
  with pytest.raises(ConfigError, match="300 has no probability"):
    score_prompt(run, [1, 300])
  assert score_prompt(run, [300, 1]).logprobs  # it is read, and not scored


def test_a_context_that_is_too_long_is_cut_from_the_left(run: Run):
  """What is read fits exactly: the last token is not read."""
  [pair] = ragged(run, [(50, 4)])
  [found] = score_tokens(run, [pair])
  kept = pair._replace(context=pair.context[-37:])
  assert found.logprob == pytest.approx(alone(run, kept)[0], rel=1e-5)
  assert (found.num_cut, found.num_tokens) == (13, 4)
  with pytest.raises(ConfigError, match=r"41 tokens > model\.context=40"):
    score_tokens(run, ragged(run, [(1, 41)]))


def test_a_source_that_is_too_long_is_cut_from_the_left():
  run = make_run(**FAMILIES["encoder_decoder"])
  [pair] = ragged(run, [(45, 4)])
  [found] = score_tokens(run, [pair])
  kept = pair._replace(source=pair.source[-40:])
  assert found.logprob == pytest.approx(alone(run, kept)[0], rel=1e-5)
  assert found.num_cut == 5


def test_blanks_belong_to_the_continuation():
  """And what is the continuation's is cut from the tokens of the whole text."""
  run = make_run(MERGED)
  whole = (MERGED.bos_id, *MERGED.encode("the cat"))
  assert [*whole[1:]] != MERGED.encode("the ") + MERGED.encode("cat")
  for context, continuation in (("the", " cat"), ("the ", "cat")):
    pair = encode_pair(run, context, continuation)
    assert pair.context == (MERGED.bos_id, *MERGED.encode("the"))
    assert pair.context + pair.continuation == whole


def test_an_empty_context_is_the_begin_of_a_text(run: Run):
  assert encode_pair(run, "", "ab") == TokenPair((BEGIN,), (97, 98))
  assert encode_pair(run, " \n", "a") == TokenPair((BEGIN,), (32, 10, 97))


def test_a_continuation_without_a_token_of_its_own():
  run = make_run(MERGED)
  assert len(MERGED.encode("the")) < len(MERGED.encode("th"))
  with pytest.raises(ConfigError, match="'e' has no token of its own after 'th'"):
    score_continuations(run, [("th", "e")])
  with pytest.raises(ConfigError, match="'' has no token of its own"):
    score_continuations(run, [("the", "")])


def test_texts_of_all_lengths(run: Run):
  texts = ["", "a", "b" * 39, "c" * 40, "de" * 47]
  found = score_rolling(run, [BYTES.encode(text) for text in texts])
  assert found[0] == Likelihood(0.0, True, 0)
  for text, likelihood in zip(texts, found, strict=True):
    ids = BYTES.encode(text)
    windows = [*rolling_windows(ids, BEGIN, CONTEXT)]
    expected = math.fsum(alone(run, window)[0] for window in windows)
    assert likelihood.logprob == pytest.approx(expected, rel=1e-5)
    assert likelihood.num_tokens == len(text)


def test_windows_score_every_token_once_and_read_as_much_as_fits():
  """The example in lm-evaluation-harness's documentation."""
  assert [*rolling_windows(range(10), -1, 4)] == [
    ((-1,), (0, 1, 2, 3), ()),
    ((3,), (4, 5, 6, 7), ()),
    ((5, 6, 7), (8, 9), ()),
  ]
  for length in range(12):
    for most in range(1, 6):
      windows = [*rolling_windows(range(length), -1, most)]
      scored = [token for window in windows for token in window.continuation]
      assert scored == [*range(length)]
      for window in windows:
        assert len(window.context) + len(window.continuation) - 1 <= most
        assert window.context[-1] == window.continuation[0] - 1


def test_batches_are_bounded_and_programs_few(run: Run):
  pairs = ragged(run, [(n, n % 7 + 1) for n in range(1, 33)])
  with count_compilations() as counter:
    score_tokens(run, pairs)
  assert counter.programs <= 3
  long = [Row((n,) * read, (), 500, (n,)) for n in range(40) for read in (500, 900, 2000)]
  for shards in (1, 4):
    sizes = []
    for batch in batch_rows(long, shards, vocab_size=150_000):
      sizes.append(len(batch))
      per_device = -(-len(batch) // shards)
      assert per_device * len(batch[0].read) <= scoring.TOKENS_AT_A_TIME
      logits = per_device * scoring.PLACES_AT_A_TIME * 150_000
      assert logits <= scoring.LOGITS_AT_A_TIME
    assert sum(sizes) == len(long) and max(sizes) > shards


def test_choices_between_last_tokens_are_read_once(run: Run, monkeypatch):
  """A letter for each choice, and longer ones that differ in their last token."""
  pairs = [
    TokenPair((1, 2, 3), (*before, n)) for before in ((), (7, 8)) for n in range(65, 70)
  ]
  pairs += [TokenPair((1, 2, 3), (9, 8, 65)), TokenPair((1, 2), (3, 65)), pairs[0]]
  batches, score = [], scoring.score_batch
  spy = lambda run, batch, shards: batches.append(batch) or score(run, batch, shards)
  monkeypatch.setattr(scoring, "score_batch", spy)
  found = score_tokens(run, pairs)
  rows = [row for batch in batches for row in batch]
  assert sorted(len(row.last) for row in rows) == [1, 1, 5, 5]
  for pair, likelihood in zip(pairs, found, strict=True):
    logprob, is_greedy = alone(run, pair)
    assert likelihood.logprob == pytest.approx(logprob, rel=1e-5)
    assert likelihood.is_greedy == is_greedy
    assert likelihood.num_tokens == len(pair.continuation)


def test_what_cannot_be_scored():
  encoder = make_run(train_tokenizer("byte", [], 0, True), family="encoder")
  with pytest.raises(ConfigError, match="is an encoder"):
    score_continuations(encoder, [("a", "b")])
  with pytest.raises(ConfigError, match="is an encoder"):
    score_rolling(encoder, [[97]])
  with pytest.raises(ConfigError, match="is an encoder-decoder"):
    score_rolling(make_run(**FAMILIES["encoder_decoder"]), [[97]])
  damaged = make_run()
  damaged.params["embedding"]["table"] = damaged.params["embedding"]["table"] * np.nan
  with pytest.raises(NonFiniteError):
    score_continuations(damaged, [("a", "b")])
  with pytest.raises(ConfigError, match="not in the model's vocabulary"):
    score_tokens(make_run(), [TokenPair((0,), (320,))])
