# SPDX-License-Identifier: Apache-2.0
"""Duplicates: the first of each text stays, what is held out before what is learnt."""

import re
from pathlib import Path

import numpy as np
import pytest

from flaxlm.config import TokenizerConfig
from flaxlm.data.duplicates import Chosen, kept_texts, min_hashes
from flaxlm.data.prepare import prepare
from flaxlm.data.stores import PairStore, TokenStore

BYTE = TokenizerConfig(kind="byte")


def test_the_first_of_each_text_stays_and_what_is_held_out_counts_as_first():
  splits = {"train": ["a", "b", "a", "c", "\ud800", "?"], "validation": ["c", "d", "c"]}
  for near in (False, True):
    kept = kept_texts(splits, near)
    assert {split: numbers.tolist() for split, numbers in kept.items()} == {
      "train": [0, 1, 4],  # what becomes the same bytes is the same
      "validation": [0, 1],
    }
  texts = Chosen(splits["train"], kept["train"])
  assert list(texts) == texts[:] == ["a", "b", "\ud800"] and texts[-1] == "\ud800"
  assert texts[1:] == ["b", "\ud800"] and len(texts) == 3


def shingles(text: str) -> set[tuple[str, ...]]:
  words = re.findall(r"\w+", text.lower())
  return {tuple(words[n : n + 5]) for n in range(max(1, len(words) - 4))}


def changed(words: list[str], share: float, random: np.random.Generator) -> str:
  return " ".join("new" + word if random.random() < share else word for word in words)


def make_words(number: int, random: np.random.Generator) -> list[str]:
  return [f"w{n}" for n in random.integers(0, 10**6, number)]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.03, 0.1, 1.0])
def test_min_hashes_estimate_what_two_texts_share(share: float):
  random = np.random.default_rng(1)
  for _ in range(5):
    words = make_words(1500, random)
    one, other = " ".join(words), changed(words, share, random)
    a, b = shingles(one), shingles(other)
    jaccard = len(a & b) / len(a | b)
    estimate = (min_hashes(one) == min_hashes(other)).mean()
    deviation = np.sqrt(jaccard * (1 - jaccard) / 112)
    assert estimate == pytest.approx(jaccard, abs=4 * deviation + 1e-9)


def test_near_duplicates_go_and_others_stay():
  random = np.random.default_rng(2)
  texts = [make_words(300, random) for _ in range(40)]
  originals = [" ".join(words) for words in texts]
  nearly = [changed(words, 0.005, random) for words in texts]
  half = [changed(words, 0.15, random) for words in texts]
  other = [text.upper().replace(" ", ",\n") for text in originals]  # only the words count
  all_texts = originals + nearly + half + other
  kept = kept_texts({"train": all_texts}, near=True)["train"]
  assert {*range(40)} <= {*kept.tolist()}
  assert sum((kept >= 40) & (kept < 80)) <= 4
  assert sum((kept >= 80) & (kept < 120)) >= 38
  assert not any(kept >= 120)
  assert len(kept_texts({"train": all_texts}, near=False)["train"]) >= 150
  short = ["a b", "a b c", "b a", "a  b", "!", "?", ""]
  assert kept_texts({"train": short}, near=True)["train"].tolist() == [0, 1, 2, 4, 5, 6]


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
  monkeypatch.setenv("FLAXLM_DATA_DIR", str(tmp_path / "data"))
  for split, numbers in {"train": range(10), "validation": range(8, 12)}.items():
    (tmp_path / "c" / split).mkdir(parents=True)
    for n in numbers:
      for copy in "ab":
        text = f"text {n % 5 if split == 'train' and n < 8 else n}"
        (tmp_path / "c" / split / f"{n}{copy}").write_text(text)
  return f"files:{tmp_path}/c"


def texts_of(store: object) -> list[str]:
  assert isinstance(store, TokenStore)
  raw = bytes(token if token < 256 else 10 for token in store.tokens.tolist())
  return raw.decode().split("\n")[1:]


def test_a_corpus_without_duplicates(corpus: str, tmp_path: Path):
  plain = prepare(corpus, BYTE)
  assert len(texts_of(plain.train)) == 20 and len(texts_of(plain.validation)) == 8
  lines: list[str] = []
  exact = prepare(corpus, BYTE, lines.append, deduplicate="exact")
  assert texts_of(exact.validation) == [f"text {n}" for n in (10, 11, 8, 9)]
  assert texts_of(exact.train) == [f"text {n}" for n in range(5)], "8 and 9 are held out"
  told = f"{corpus}: 19 of 28 documents are left out, as the same text is there already"
  assert lines.count(told) == 1
  assert len({plain.fingerprint, exact.fingerprint}) == 2
  lines.clear()
  again = prepare(corpus, BYTE, lines.append, deduplicate="exact")
  assert lines == [told] and again.fingerprint == exact.fingerprint
  near = prepare(corpus, BYTE, lines.append, deduplicate="near")
  assert any("as nearly the same text" in line for line in lines)
  assert texts_of(near.train) == texts_of(exact.train)
  (tmp_path / "c" / "validation" / "x").write_text("text 0")
  held_out = prepare(corpus, BYTE, deduplicate="exact")
  assert texts_of(held_out.train) == [f"text {n}" for n in range(1, 5)]


def test_pairs_are_the_same_if_both_sides_are(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setenv("FLAXLM_DATA_DIR", str(tmp_path / "data"))
  plain = prepare("gettext:de", BYTE, objective="seq2seq")
  exact = prepare("gettext:de", BYTE, objective="seq2seq", deduplicate="exact")
  assert isinstance(plain.train, PairStore) and isinstance(exact.train, PairStore)
  assert np.array_equal(plain.train.target.tokens, exact.train.target.tokens)
