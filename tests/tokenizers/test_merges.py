# SPDX-License-Identifier: Apache-2.0
"""How a word is merged: step by step, to the tokens that encoding gives."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import gpt2, llama

from flaxlm.errors import DataError
from flaxlm.tokenizers import ImportedTokenizer, Specials, train_tokenizer
from flaxlm.tokenizers.merges import Step, trace_merges

CORPUS = [path.read_text("utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]
MERGING = {
  "bpe": train_tokenizer("bpe", CORPUS, 400),
  "byte": train_tokenizer("byte", [], 0),
  "char": train_tokenizer("char", CORPUS, 400),
  "llama": ImportedTokenizer(llama(), Specials()),
  "gpt2": ImportedTokenizer(gpt2(), Specials()),
}


def test_by_hand():
  (word,) = trace_merges(MERGING["llama"], "thecat")
  assert word.pieces == ["▁", "t", "h", "e", "c", "a", "t"]
  assert word.steps == [
    Step(0, "t", "h", ["▁", "th", "e", "c", "a", "t"]),
    Step(1, "th", "e", ["▁", "the", "c", "a", "t"]),
    Step(2, "▁", "the", ["▁the", "c", "a", "t"]),
    Step(3, "a", "t", ["▁the", "c", "at"]),
    Step(4, "c", "at", ["▁the", "cat"]),
  ]


@pytest.mark.parametrize("kind", MERGING)
@given(text=st.text(st.sampled_from("theca sfd()_\n0é漢🙂"), min_size=1, max_size=20))
def test_the_last_pieces_are_the_tokens(kind: str, text: str):
  tokenizer = MERGING[kind]
  words = trace_merges(tokenizer, text)
  pieces = [piece for word in words for piece in (word.steps or [word])[-1].pieces]
  assert pieces == [tokenizer.name_of(i) for i in tokenizer.encode(text)]
  for word in words:  # each step joins one pair, and the learnt order decides
    sizes = [len(word.pieces), *(len(step.pieces) for step in word.steps)]
    assert all(a - b == 1 for a, b in itertools.pairwise(sizes))


@pytest.mark.parametrize("kind", ["word", "wordpiece", "unigram"])
def test_what_does_not_merge_is_told(kind: str):
  with pytest.raises(DataError, match="does not merge: its model is"):
    trace_merges(train_tokenizer(kind, CORPUS, 600), "word")
