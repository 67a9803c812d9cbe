# SPDX-License-Identifier: Apache-2.0
"""How byte pair encoding makes a word's tokens, one merge after the other.

A merge's rank is when it was learnt: merge 0 joined the pair that was the most frequent of
all in the training text, and each later one the most frequent pair of what was left.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import tokenizers
from tokenizers import models

from flaxlm.errors import ConfigError, DataError
from flaxlm.tokenizers.own import Vocabulary, rust_errors


class Step(NamedTuple):
  """A merge: the pair of rank `rank` becomes one piece; `pieces` are those of the word
  then, as the vocabulary spells them."""

  rank: int
  left: str
  right: str
  pieces: list[str]


class Word(NamedTuple):
  """A word, what it is made of before any merge, and the merges, in their order."""

  pieces: list[str]
  steps: list[Step]


def trace_merges(tokenizer: Vocabulary, text: str) -> list[Word]:
  """How each word of a text is merged; the last pieces are its tokens.

  Raises `DataError` for a tokenizer that does not merge, `ConfigError` for no text.
  """
  if not text:
    raise ConfigError("there is no word", "as in ' unbelievable', with its blank")
  spec = tokenizer.to_json()
  model = json.loads(spec)["model"]
  if model["type"] != "BPE" or model.get("continuing_subword_prefix"):
    raise DataError(
      f"the tokenizer does not merge: its model is {model['type']}", "name one of BPE"
    )
  backend = tokenizers.Tokenizer.from_str(spec)
  pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
  ranks = {(left, right): rank for rank, (left, right) in enumerate(pairs)}
  vocab, whole = model["vocab"], model.get("ignore_merges", False)
  traced = []
  for word in _words(backend, text):
    if whole and word in vocab:  # as it stands in the vocabulary, without merges
      traced.append(Word([word], []))
      continue
    pieces = list(_symbols(word, backend.model, vocab))
    traced.append(Word(pieces, list(_merge(pieces, ranks))))
  return traced


def _words(backend: tokenizers.Tokenizer, text: str) -> list[str]:
  """The words that the tokenizer cuts a text into, in the letters of its vocabulary."""
  with rust_errors("cannot cut the text"):
    if backend.normalizer is not None:
      text = backend.normalizer.normalize_str(text)
    if backend.pre_tokenizer is None:
      return [text] if text else []
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


def _symbols(word: str, model: models.BPE, vocab: dict[str, int]) -> Iterator[str]:
  """The letters of a word; one that is unknown is its bytes, or the name of the unknown."""
  for letter in word:
    raw = [f"<0x{byte:02X}>" for byte in letter.encode("utf-8", "replace")]
    if letter in vocab:
      yield letter
    elif model.byte_fallback and all(name in vocab for name in raw):
      yield from raw
    else:
      yield model.unk_token or letter


def _merge(pieces: Sequence[str], ranks: dict[tuple[str, str], int]) -> Iterator[Step]:
  """Merges the pair of the lowest rank, the first of several, until there is none."""
  current = list(pieces)
  while True:
    pairs = list(itertools.pairwise(current))
    known = [(ranks[pair], place) for place, pair in enumerate(pairs) if pair in ranks]
    if not known:
      return
    rank, place = min(known)
    left, right = pairs[place]
    current[place : place + 2] = [left + right]
    yield Step(rank, left, right, list(current))
