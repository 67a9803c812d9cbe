# SPDX-License-Identifier: Apache-2.0
"""A head's name follows from its weights by the rule that the page states."""

import jax.numpy as jnp
import numpy as np
import pytest

from flaxlm.look.heads import (
  Word,
  describe_head,
  entropy_bits,
  layer_figures,
  patterns_of,
  repeated_share,
  sight_of,
)
from flaxlm.nn.masks import Placement, visible


def words_of(text: str) -> list[Word]:
  """A token for each character; a capital letter is the same word as the small one."""
  sort = lambda c: "blank" if c == "_" else "word" if c.isalpha() else "punctuation"
  return [Word(ord(c), c.lower().encode(), sort(c)) for c in text]


def figures_of(weights_TS, text=None, causal=True, kind="self", keys=None, repeated=None):
  weights = np.array(weights_TS, float)
  T, S = weights.shape
  queries = words_of(text or "".join(chr(0x4E00 + t) for t in range(T)))
  patterns = patterns_of(kind, causal, queries, words_of(keys) if keys else queries)
  sight = sight_of(T, S, causal, None, 0)
  repeated_N = None if repeated is None else np.array([repeated])
  (entry,) = layer_figures(weights[None], sight, patterns, causal, repeated_N)
  return entry


def rows(T, place):
  """One place each: all weight of query t is on `place(t)`."""
  return np.eye(T)[[place(t) for t in range(T)]]


EVEN = np.tril(np.ones((8, 8))) / np.arange(1, 9)[:, None]


def test_heads_that_do_one_thing():
  T = 8
  for weights, name, distance in (
    (rows(T, lambda t: t), "itself", 0),
    (rows(T, lambda t: 0), "first token", np.arange(1, T).mean()),
    (rows(T, lambda t: max(t - 1, 0)), "previous token", 1),
    (EVEN, "evenly", np.mean([t / 2 for t in range(1, T)])),
  ):
    entry = figures_of(weights)
    assert entry["looks_at"] == name
    assert entry["distance"] == pytest.approx(distance)
  assert entry["entropy"] == pytest.approx(np.mean(np.log2(np.arange(2, T + 1))))
  following = figures_of(rows(T, lambda t: min(t + 1, T - 1)), causal=False)
  assert following["looks_at"] == "next token" and following["next"] == 1


def test_induction_is_what_followed_an_earlier_copy():
  text = "abcxabcyabc"
  last = {c: [i for i, d in enumerate(text) if d == c] for c in text}
  earlier = lambda t: max((i for i in last[text[t]] if i < t), default=0)
  induction = rows(
    11, lambda t: earlier(t) + 1 if earlier(t) or (text[t] == "a" and t) else 0
  )
  entry = figures_of(induction, text)
  assert entry["looks_at"] == "induction" and entry["induction"] == 1
  assert entry["first"] == pytest.approx(4 / 10), "where there is no copy"
  copies = figures_of(rows(11, earlier), text)
  assert copies["looks_at"] == "same word" and copies["same"] == 1
  assert copies["induction"] == 0, "one place beside it"
  assert figures_of(rows(11, lambda t: 0), "abcdefghijk")["induction"] is None
  # Two copies are too few to tell by; but random tokens, read twice, tell.
  assert figures_of(induction[:6, :6], text[:6])["looks_at"] != "induction"
  assert figures_of(EVEN, repeated=0.5)["looks_at"] == "induction"
  assert figures_of(EVEN, repeated=0.3)["looks_at"] == "evenly"


def test_the_same_word_in_another_spelling():
  text = "aBcAbCaBc"
  entry = figures_of(rows(9, lambda t: max(t - 3, 0)), text)
  assert entry["looks_at"] == "same word" and entry["same"] == 1
  assert entry["induction"] == 0, "for induction, it is the token that counts"


def test_a_place_comes_before_the_words_that_stand_there():
  previous = rows(8, lambda t: max(t - 1, 0))
  entry = figures_of(previous, "aabbccdd")
  assert entry["same"] == 1 and entry["looks_at"] == "previous token"
  # Nor is a head that rests on the first token one of marks, if some are elsewhere.
  some = 0.95 * rows(8, lambda t: 0) + 0.05 * rows(8, lambda t: min(t, 4))
  assert figures_of(some, ".abc.efg")["looks_at"] == "first token"
  first = figures_of(rows(8, lambda t: 0), ".abcdefg")
  assert first["punctuation"] == 1 and first["looks_at"] == "first token"


def test_punctuation_and_blanks():
  text = "ab.cd_ef.gh_ij"
  at = lambda marks: lambda t: max((i for i in range(t) if text[i] in marks), default=t)
  assert figures_of(rows(14, at(".")), text)["looks_at"] == "punctuation"
  assert figures_of(rows(14, at("_")), text)["looks_at"] == "blanks"
  # As an even head would have it, for almost all tokens are marks.
  marks = "a......."
  assert figures_of(EVEN, marks)["punctuation"] > 0.5
  assert figures_of(EVEN, marks)["looks_at"] == "evenly"


def test_a_mixture_has_parts_and_what_has_none_is_described():
  T = 24
  itself, first = rows(T, lambda t: t), rows(T, lambda t: 0)
  far = rows(T, lambda t: max(t - 6, 0))
  assert figures_of(0.4 * itself + 0.4 * first + 0.2 * far)["looks_at"] in (
    "mixture: itself + first token",
    "mixture: first token + itself",
  )
  assert figures_of(0.35 * itself + 0.65 * far)["looks_at"] == "partly itself"
  T = 60
  spread = (rows(T, lambda t: max(t - n, 0)) for n in (3, 5, 7, 9))
  plain = figures_of(sum(spread) / 4)
  assert plain["looks_at"].startswith("about 4 tokens, "), plain
  assert describe_head(0.1, 6.2, "back") == "one token, 6 back"
  assert describe_head(3, None, "away") == "about 8 tokens"


def test_figures_of_one_token_and_of_a_source():
  entry = figures_of([[1.0]])
  assert (entry["entropy"], entry["itself"], entry["previous"]) == (0, 1, None)
  weights = [[0.0, 0.1, 0.0, 0.0, 0.9]] * 4
  cross = figures_of(weights, "abcd", False, "cross", keys="vwxyz")
  assert cross["last"] == pytest.approx(0.9) and "distance" not in cross
  assert cross["looks_at"] == "last token"
  copied = figures_of(np.eye(4)[::-1], "abcd", False, "cross", keys="dcba")
  assert copied["looks_at"] == "same word"


def test_what_goes_to_sinks_counts_as_one_more_outcome():
  np.testing.assert_allclose(entropy_bits(np.array([0.25, 0.25])), 1.5)
  np.testing.assert_allclose(entropy_bits(np.array([0.5, 0.5])), 1.0)


def test_the_prefix_matching_score():
  length, start = 5, 2
  T = start + 2 * length
  perfect = rows(T, lambda t: max(t - length + 1, 0))
  copies = rows(T, lambda t: max(t - length, 0))
  both = np.stack([perfect, copies])[None]
  np.testing.assert_array_equal(repeated_share(both, length), [[1, 0]])


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_sight_is_that_of_the_model(window: int | None, causal: bool):
  sinks = 2 if causal and window else 0
  where = Placement(jnp.arange(9)[None])
  mask = visible(where, 9, causal, window, sinks)
  expected = np.ones((9, 9), bool) if mask is None else np.asarray(mask)[0]
  np.testing.assert_array_equal(sight_of(9, 9, causal, window, sinks), expected)
