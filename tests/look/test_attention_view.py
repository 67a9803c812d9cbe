# SPDX-License-Identifier: Apache-2.0
"""The page's maps are the model's own, and its figures agree with them."""

import zlib

import jax
import numpy as np
import pytest
from conftest import slow
from look_runs import HOSTILE, log_softmax, make_run, page_of

from flaxlm.errors import ConfigError
from flaxlm.look import attention
from flaxlm.look.attention import (
  STEPS,
  check_attention,
  check_size,
  choose_heads,
  find_repeated,
  finest_steps,
  look_attention,
)
from flaxlm.look.page import to_html
from flaxlm.look.pieces import make_reading
from flaxlm.look.view import Shares
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


# -- Queries and keys ----------------------------------------------------------------------


def weights_of(one) -> np.ndarray:
  """The weights (X, T, S) as the page's queries and keys make them."""
  sides = []
  for side in ("queries", "keys"):
    most_X = np.array(one["vectors"][side]["most"])
    sides.append((2 * one["vectors"][side]["values"] - 1) * most_X[:, None, None])
  scores = np.einsum("XTH,XSH->XTS", *sides)
  if one["causal"]:
    scores = np.where(np.tri(scores.shape[1], dtype=bool), scores, -np.inf)
  return np.exp(log_softmax(scores))


@pytest.mark.parametrize("family", ["decoder", "encoder", slow("encoder_decoder")])
def test_the_products_make_the_weights(family: str):
  run = make_run(family, num_kv_heads=2, depth=3)
  source = "to read" if family == "encoder_decoder" else None
  _, view = look(run, HOSTILE[:20], source)
  for one in page_of(view).view["data"]["maps"]:
    L, N, T, S = one["weights"].shape
    assert one["vectors"]["heads"] == [*range(L * N)], "all of them fit"
    expected = one["weights"].reshape(L * N, T, S)
    np.testing.assert_allclose(weights_of(one), expected, atol=5e-4)
    # A head's own weights, and no other's.
    other = expected[np.r_[1 : L * N, 0]]
    assert np.abs(weights_of(one) - other).max((1, 2)).min() > 0.005


def test_of_a_layer_and_a_head_they_are_their_own():
  _, view = look(make_run(num_kv_heads=2), "a text", layer=1, head=2)
  (one,) = page_of(view).view["data"]["maps"]
  np.testing.assert_allclose(weights_of(one), one["weights"][0], atol=5e-4)


def test_the_clearest_heads_of_each_name_come_first(monkeypatch):
  entry = lambda name, strength: {"looks_at": name, "strength": strength}
  heads = [entry("a", 0.6), entry("a", 0.9), entry("b", 0.5), entry("a", 0.7)]
  monkeypatch.setattr(attention, "MOST_NUMBERS", 25)
  assert choose_heads([heads], [10]) == [[1, 2]]
  assert choose_heads([heads], [30]) == [[]]
  assert choose_heads([heads], [6]) == [[0, 1, 2, 3]]


def test_induction_heads_are_sought_with_tokens_read_twice(monkeypatch):
  run, read = make_run(), []
  honest = attention.apply_to_row

  def watched(run, function, ids, *args):
    read.append(ids)
    return honest(run, function, ids, *args)

  monkeypatch.setattr(attention, "apply_to_row", watched)
  found_LN = find_repeated(run, None, None)
  (ids,) = read
  length = (run.model.cfg.context - 1) // 2
  assert ids[1 : 1 + length] == ids[1 + length :] and len(set(ids)) == length + 1
  maps = run.model.apply({"params": run.params}, np.array([ids]), capture=True).attention
  weights_LNTS = np.asarray(maps["self"])[:, 0]
  places = [(1 + length + n, 2 + n) for n in range(length)]
  expected = np.mean([weights_LNTS[:, :, t, s] for t, s in places], 0)
  np.testing.assert_allclose(found_LN, expected, atol=1e-5)
  assert find_repeated(make_run("encoder"), None, None) is None
  assert find_repeated(make_run(context=8), None, None) is None, "too short to tell"


# -- The size of a page --------------------------------------------------------------------


def test_weights_are_as_fine_as_fits(monkeypatch):
  weights = np.random.default_rng(0).dirichlet(np.ones(64), (2, 4, 64))
  assert finest_steps([weights]) == 65535
  sizes = {}
  for steps in STEPS:
    sizes[steps] = len(zlib.compress(Shares(weights, steps).to_bytes(), 6)) * 4 / 3
  monkeypatch.setattr(attention, "SAMPLED", 1)
  monkeypatch.setattr(attention, "MOST_PACKED", sizes[1023] + 1)
  assert finest_steps([weights]) == 1023
  monkeypatch.setattr(attention, "MOST_PACKED", 10)
  assert finest_steps([weights]) == STEPS[-1], "no coarser, even if it is too large"


@pytest.mark.slow
def test_all_heads_of_a_gpt2_and_256_tokens_stay_below_3_mb():
  run = make_run(depth=12, num_heads=12, head_dim=64, width=96, context=256)
  text = "".join(map(chr, np.random.default_rng(0).integers(32, 127, 255)))
  reading = make_reading(run.model.cfg, run.tokenizer, text, None, 256)
  view = look_attention(run, reading, 256)
  (one,) = view.data["maps"]
  assert one["weights"].values.shape == (12, 12, 256, 256)
  assert len(one["vectors"]["heads"]) == 8, "as many as there is room for"
  assert len(to_html(view)) < 3_000_000
  assert "to the nearest 1/" in view.notes[-1]


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
