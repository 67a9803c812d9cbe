# SPDX-License-Identifier: Apache-2.0
"""Surprisals are the log-softmax of the model's own forward pass, whatever the family."""

import math

import jax
import numpy as np
import pytest
from look_runs import HOSTILE, log_softmax, make_run, page_of

from flaxlm.look.pieces import make_reading
from flaxlm.look.tokens import look_tokens
from flaxlm.nn.base import Source

LN2 = math.log(2)


def look(run, text, source=None):
  reading = make_reading(run.model.cfg, run.tokenizer, text, source, 99)
  return reading, page_of(look_tokens(run, reading, 99)).view["figures"]


def logprobs_of(run, rows, source_ids=None):
  """log softmax (B, T, V) of the whole forward pass over some rows."""
  source = {} if source_ids is None else {"source": Source(np.array([source_ids]))}
  apply = jax.jit(lambda params, rows: run.model.apply({"params": params}, rows, **source))
  return log_softmax(apply(run.params, np.array(rows)).value)


@pytest.mark.parametrize("family", ["decoder", "rnn", "encoder_decoder"])
def test_each_token_given_those_before(family: str):
  run = make_run(family, depth=1)
  source = "ask" if family == "encoder_decoder" else None
  reading, figures = look(run, HOSTILE[:24], source)
  (logprobs_TV,) = logprobs_of(run, [reading.ids], reading.source_ids)
  tokens = figures["tokens"]
  assert "bits" not in tokens[0], "nothing stands before it"
  for at, token in enumerate(tokens[1:], 1):
    own_V = logprobs_TV[at - 1]
    assert token["bits"] == pytest.approx(-own_V[token["id"]] / LN2, abs=1e-4)
    assert token["chance"] == pytest.approx(2 ** -token["bits"], rel=1e-4)
    assert token["rank"] == 1 + (own_V > own_V[token["id"]]).sum()
    assert token["entropy"] == pytest.approx(-(np.exp(own_V) * own_V).sum() / LN2, abs=1e-4)
    assert [b["id"] for b in token["best"]] == np.argsort(-own_V, kind="stable")[
      :5
    ].tolist()
    chances = [b["chance"] for b in token["best"]]
    np.testing.assert_allclose(chances, np.sort(np.exp(own_V))[::-1][:5], atol=1e-5)
  after = [b["chance"] for b in figures["after"]["best"]]
  np.testing.assert_allclose(after, np.sort(np.exp(logprobs_TV[-1]))[::-1][:5], atol=1e-5)
  assert [piece["id"] for piece in figures["source"]] == (reading.source_ids or [])


def test_an_encoder_is_asked_with_each_token_masked():
  run = make_run("encoder", depth=1)
  text = "0123456789" * 4  # more places than rows at a time
  reading, figures = look(run, f"{text} [MASK]d")
  mask = run.tokenizer.mask_id
  assert reading.ids == [run.tokenizer.bos_id, *text.encode(), mask, *b"d"]
  rows_RT = np.tile(reading.ids, (len(reading.ids), 1))
  np.fill_diagonal(rows_RT, mask)
  logprobs_RTV = logprobs_of(run, rows_RT)
  assert "best" not in figures["tokens"][0], "a special is not asked for"
  for at, token in enumerate(figures["tokens"][1:], 1):
    own_V = logprobs_RTV[at, at]
    assert token["best"][0]["id"] == own_V.argmax()
    if token["id"] == mask:
      assert "bits" not in token, "nobody knows what stands there"
    else:
      assert token["bits"] == pytest.approx(-own_V[token["id"]] / LN2, abs=1e-4)
  assert "after" not in figures


def test_figures_of_the_text():
  run = make_run(depth=1)
  text = "é and more"
  _, figures = look(run, text)
  bits = [token["bits"] for token in figures["tokens"][1:]]
  assert figures["num_bytes"] == len(text.encode()) == figures["num_tokens"]
  assert figures["bytes_per_token"] == 1
  assert figures["bits"] == pytest.approx(sum(bits))
  assert figures["bits_per_byte"] == pytest.approx(sum(bits) / len(text.encode()))
  assert figures["perplexity"] == pytest.approx(2 ** (sum(bits) / len(bits)))


def test_without_a_mask_an_encoder_is_not_asked():
  run = make_run("encoder", depth=1)
  decoder = make_run()
  run = run._replace(tokenizer=decoder.tokenizer)
  reading = make_reading(run.model.cfg, run.tokenizer, "ab", None, 99)
  view = look_tokens(run, reading, 99)
  assert "no mask" in view.cuts[-1]
  assert all("best" not in token for token in view.figures["tokens"])
