# SPDX-License-Identifier: Apache-2.0
"""The methods: what each makes of a text that can be worked out by hand, and of itself."""

import collections
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, trainers

from flaxlm.errors import DataError
from flaxlm.tokenizers import Tokenizer, train_tokenizer
from flaxlm.tokenizers.own import UNKNOWN, WORDS, byte_alphabet, pre_tokenizer
from flaxlm.tokenizers.train import _METHODS
from flaxlm.tokenizers.unigram import expected_counts, make_lattice, train_unigram

CORPUS = [path.read_text("utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
  return [
    tokenizer.bytes_of(i).decode("utf-8", "backslashreplace")
    for i in tokenizer.encode(text)
  ]


def test_characters_are_ids_and_rare_ones_are_bytes():
  tokenizer = train_tokenizer("char", ["éé漢漢漢 ab", "字"], 257 + 2)
  assert pieces(tokenizer, "a 漢é") == ["a", " ", "漢", "é"]
  assert pieces(tokenizer, "字") == ["\\xe5", "\\xad", "\\x97"]
  assert tokenizer.vocab_size == 259 and tokenizer.unknown_id is None
  assert train_tokenizer("char", ["abc"], 4096).vocab_size == 257


def test_words_are_ids_and_rare_ones_are_unknown():
  tokenizer = train_tokenizer("word", ["the cat sat on the cat the end"], 5)
  names = [tokenizer.name_of(i) for i in range(5)]
  assert names[:4] == [UNKNOWN, "Ġcat", "Ġthe", "Ġend"] and tokenizer.eos_id == 4
  ids = tokenizer.encode("a cat in the")
  assert ids == [0, 1, 0, 2]
  assert tokenizer.decode(ids) == "� cat� the"
  assert tokenizer.token_bytes()[ids].tolist() == [0, 4, 0, 4]
  assert "lost" in tokenizer.note
  # Neither the name of the unknown nor that of a special token is written as one.
  assert set(tokenizer.encode("[UNK] <|endoftext|>")) == {0}


def test_word_pieces_are_the_longest_from_the_left():
  tokenizer = train_tokenizer("wordpiece", [" unable"] * 9 + [" able"] * 9 + [" un"], 4096)
  assert pieces(tokenizer, " unable") == [" unable"]
  vocab = {tokenizer.name_of(i) for i in range(tokenizer.vocab_size)}
  for word in ("unables", " unable ablex", "## #x#y", "a##b"):
    rebuilt = []
    for split in tokenizer._backend.pre_tokenizer.pre_tokenize_str(word):
      rest, begin = split[0], ""
      while rest:
        size = max(n for n in range(1, len(rest) + 1) if begin + rest[:n] in vocab)
        rebuilt.append(begin + rest[:size])
        rest, begin = rest[size:], "##"
    assert [tokenizer.name_of(i) for i in tokenizer.encode(word)] == rebuilt


def test_a_long_word_is_no_trouble_for_word_pieces():
  tokenizer = train_tokenizer("wordpiece", CORPUS, 600)
  text = "x" * 5000 + "漢" * 5000 + "\n" * 5000 + "#" * 500 + " " * 5000
  assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", _METHODS)
def test_the_order_of_texts_and_of_hashes_does_not_matter(kind: str):
  """The trainers of the library vary from process to process."""
  code = (
    "import sys; from flaxlm.tokenizers import train_tokenizer\n"
    "texts = sys.stdin.read().split('\\0')[::-1]\n"
    "print(train_tokenizer(sys.argv[1], texts, 700).fingerprint)"
  )
  argv = [sys.executable, "-c", code, kind]
  run = subprocess.run(argv, input="\0".join(CORPUS), capture_output=True, text=True)
  assert run.stdout.strip() == train_tokenizer(kind, CORPUS, 700).fingerprint, run.stderr


@pytest.mark.parametrize("kind", _METHODS)
def test_sizes(kind: str):
  tokenizer = train_tokenizer(kind, CORPUS, 600, masked=True)
  assert tokenizer.mask_id == tokenizer.vocab_size - 1
  if kind not in ("byte", "char"):
    assert tokenizer.vocab_size == 600
  least = _METHODS[kind][1]
  if kind != "byte":
    with pytest.raises(DataError, match=f"whose alphabet has {least}"):
      train_tokenizer(kind, CORPUS, least)
    with pytest.raises(DataError, match="no text"):
      train_tokenizer(kind, ["", ""], 600)


# -- The unigram model ---------------------------------------------------------------------


def ways(word: bytes, known: set[bytes]) -> list[list[bytes]]:
  """All ways to cut a word into pieces that are known."""
  if not word:
    return [[]]
  starts = [n for n in range(1, len(word) + 1) if word[:n] in known]
  return [[word[:n], *rest] for n in starts for rest in ways(word[n:], known)]


@given(
  st.dictionaries(st.binary(min_size=1, max_size=5).map(lambda b: bytes(x % 3 for x in b)),
                  st.integers(1, 9), min_size=1, max_size=4),
  st.integers(0, 99),
)  # fmt: skip
def test_expected_counts_are_those_of_all_ways_to_cut(words: dict[bytes, int], seed: int):
  known = [bytes(x) for n in (1, 2, 3) for x in itertools.product(range(3), repeat=n)]
  probability_P = np.random.default_rng(seed).dirichlet(np.ones(len(known)))
  probability = dict(zip(known, probability_P, strict=True))
  expected = collections.Counter[bytes]()
  for word, count in words.items():
    cuts = ways(word, set(known))
    weights = [math.prod(probability[piece] for piece in cut) for cut in cuts]
    for cut, weight in zip(cuts, weights, strict=True):
      for piece in cut:
        expected[piece] += count * weight / sum(weights)
  numbers = {piece: number for number, piece in enumerate(known)}
  lattice = make_lattice([*words], numbers, whole=True)
  found = expected_counts(lattice, probability_P, np.array([*words.values()], float))
  np.testing.assert_allclose(found, [expected[piece] for piece in known], atol=1e-9)


def test_learning_finds_the_words_that_a_text_was_made_of():
  rng = np.random.default_rng(0)
  made_of = [b"cat", b"window", b"of", b"river"]
  words = collections.Counter(
    b"".join(made_of[i] for i in rng.integers(4, size=3)) for _ in range(500)
  )
  found = train_unigram(words, 256 + 4)
  assert [piece for piece, _ in found if len(piece) > 1][:4] == sorted(
    made_of, key=lambda piece: -dict(found)[piece]
  )
  assert len(found) == 260 and found == sorted(found, key=lambda item: -item[1])
  assert sum(math.exp(score) for _, score in found) == pytest.approx(1, abs=1e-4)


def test_unigram_is_as_good_as_the_trainer_of_the_library():
  """Held-out likelihood under the best cuts; theirs varies from process to process."""
  package = ROOT / "flaxlm"
  texts = [path.read_text("utf-8") for path in sorted(package.glob("d*/*.py"))]
  theirs = tokenizers.Tokenizer(models.Unigram())
  theirs.pre_tokenizer = pre_tokenizer(WORDS)
  trainer = trainers.UnigramTrainer(
    vocab_size=999, initial_alphabet=byte_alphabet(), show_progress=False
  )
  theirs.train_from_iterator(texts, trainer)
  ours = tokenizers.Tokenizer.from_str(train_tokenizer("unigram", texts, 1000).to_json())

  def nats(backend: tokenizers.Tokenizer) -> float:
    backend.encode_special_tokens = True
    scores = [score for _, score in json.loads(backend.to_str())["model"]["vocab"]]
    return -sum(scores[i] for text in CORPUS for i in backend.encode(text).ids)

  assert nats(ours) < 1.02 * nats(theirs)
