# SPDX-License-Identifier: Apache-2.0
"""The page's maps are the model's own, and its figures agree with them."""

import jax
import numpy as np
import pytest
from conftest import slow
from look_runs import HOSTILE, make_run, page_of

from flaxlm.errors import ConfigError
from flaxlm.look.attention import (
  check_attention,
  check_size,
  entropy_bits,
  head_figures,
  look_attention,
)
from flaxlm.look.pieces import make_reading
from flaxlm.nn.base import Source

HALF = 0.5000001 / 65535  # what the page's rounding costs


def look(run, text, source=None, **options):
  reading = make_reading(run.model.cfg, run.tokenizer, text, source, 99)
  return reading, look_attention(run, reading, 99, **options)


def captured(run, reading):
  """The maps captured from the model directly, without the package's own function."""
  source = {}
  if reading.source_ids is not None:
    source = {"source": Source(np.array([reading.source_ids]))}
  row = np.array([reading.ids])
  apply = jax.jit(
    lambda params: run.model.apply({"params": params}, row, capture=True, **source)
  )
  return apply(run.params).attention


@pytest.mark.parametrize("family", ["decoder", "encoder", slow("encoder_decoder")])
def test_the_page_holds_the_captured_attention(family: str):
  run = make_run(family, num_kv_heads=2)
  source = "to read" if family == "encoder_decoder" else None
  reading, view = look(run, HOSTILE[:30], source)
  page = page_of(view).view
  expected = captured(run, reading)
  assert [one["kind"] for one in page["data"]["maps"]] == [
    name for name in ("self", "cross", "encoder_self") if name in expected
  ]
  for one in page["data"]["maps"]:
    weights = one["weights"]
    np.testing.assert_allclose(weights, expected[one["kind"]][:, 0], atol=2 * HALF)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=HALF * weights.shape[-1])
    assert weights.shape[-2:] == (len(one["queries"]), len(one["keys"]))
    ids = reading.source_ids if one["kind"] == "encoder_self" else reading.ids
    assert [piece["id"] for piece in one["queries"]] == ids
    keys = reading.ids if one["kind"] == "self" else reading.source_ids
    assert [piece["id"] for piece in one["keys"]] == keys
    causal = one["kind"] == "self" and family != "encoder"
    assert one["causal"] == causal
    assert (np.triu(weights, 1) == 0).all() == causal


def test_a_layer_and_a_head_are_those_of_the_whole():
  run = make_run(positions="alibi", window=4, layer_pattern="LG")
  _, whole = look(run, "some text")
  _, part = look(run, "some text", layer=1, head=2)
  (all_of_it,), (one,) = whole.data["maps"], part.data["maps"]
  expected = all_of_it["weights"].values[1:2, 2:3]
  np.testing.assert_allclose(one["weights"].values, expected, atol=1e-6)
  (entry,) = part.figures["maps"][0]["per_head"]
  assert (entry["layer"], entry["head"]) == (1, 2)
  same = whole.figures["maps"][0]["per_head"][4 + 2]
  assert entry == pytest.approx(same)
  assert all_of_it["layer_kinds"] == ["local, 4 tokens", ""]


@pytest.mark.slow
def test_without_a_text_an_encoder_decoder_answers():
  run = make_run("encoder_decoder", depth=1)
  reading = make_reading(run.model.cfg, run.tokenizer, None, "to read", 12)
  view = look_attention(run, reading, 12)
  assert "own answer" in view.cuts[-1]
  own, cross, _ = view.data["maps"]
  assert own["queries"][0]["id"] == run.tokenizer.bos_id
  assert 2 <= len(own["queries"]) <= 12 and len(cross["keys"]) == len("to read") + 1


# -- Figures -------------------------------------------------------------------------------


def figures_of(weights_TS, causal=True, kind="self"):
  shown = {"kind": kind, "layers": [0], "heads": [0], "causal": causal}
  (entry,) = head_figures(np.array(weights_TS)[None, None], shown)
  return entry


def test_figures_of_heads_that_do_one_thing():
  T = 8
  own, first = np.eye(T), np.zeros((T, T))
  first[:, 0] = 1
  previous = np.eye(T, k=-1)
  previous[0, 0] = 1
  even = np.tril(np.ones((T, T))) / np.arange(1, T + 1)[:, None]
  for weights, words, distance in (
    (own, "itself", 0),
    (first, "the first token", np.arange(1, T).mean()),
    (previous, "the previous token", 1),
    (even, "all evenly", np.mean([t / 2 for t in range(1, T)])),
  ):
    entry = figures_of(weights)
    assert entry["looks_at"] == words
    assert entry["distance"] == pytest.approx(distance)
  assert entry["entropy"] == pytest.approx(np.mean(np.log2(np.arange(2, T + 1))))
  assert figures_of(previous)["first"] == pytest.approx(1 / (T - 1)), "of token 1 alone"
  assert figures_of(np.eye(T, k=1), causal=False)["next"] == pytest.approx(
    (T - 1) / T, abs=0.2
  )
  mixed = 0.3 * first + 0.7 * np.tril(np.eye(T, k=-3))
  mixed[:, 1] += 1 - mixed.sum(1)
  assert figures_of(mixed)["looks_at"] in ("partly the first token", "a mixture")


def test_figures_of_one_token_and_of_a_source():
  entry = figures_of([[1.0]])
  assert (entry["entropy"], entry["itself"], entry["previous"]) == (0, 1, 0)
  cross = figures_of([[0.0, 0.1, 0.9], [0.0, 0.2, 0.8]], False, "cross")
  assert cross["last"] == pytest.approx(0.85) and "distance" not in cross
  assert cross["looks_at"] == "the last source token"


def test_what_goes_to_sinks_counts_as_one_more_outcome():
  np.testing.assert_allclose(entropy_bits(np.array([0.25, 0.25])), 1.5)
  np.testing.assert_allclose(entropy_bits(np.array([0.5, 0.5])), 1.0)


# -- Refusals ------------------------------------------------------------------------------


def test_layers_and_heads_that_are_not_there():
  cfg = make_run("encoder_decoder", encoder_depth=3).model.cfg
  check_attention(cfg, 2, 3)  # the encoder's
  for layer, head, words in ((3, None, "layers are 0 to 2"), (None, 4, "heads are 0 to 3")):
    with pytest.raises(ConfigError) as e:
      check_attention(cfg, layer, head)
    assert words in e.value.cure


def test_a_layer_of_the_encoder_alone():
  run = make_run("encoder_decoder", encoder_depth=3)
  _, view = look(run, "a", "b", layer=2)
  assert [one["kind"] for one in view.data["maps"]] == ["encoder_self"]


def test_too_many_weights_for_a_page():
  cfg = make_run(depth=32, num_heads=16, width=64).model.cfg
  check_size(cfg, 128, 0, None, None)
  with pytest.raises(ConfigError, match="MB"):
    check_size(cfg, 1024, 0, None, None)
  check_size(cfg, 1024, 0, 3, None)
