# SPDX-License-Identifier: Apache-2.0
"""Makes a tokenizer from texts: six methods, each of which gives a tokenizer.json.

The same texts give the same tokenizer, in every process and whatever their order: where the
trainers of the `tokenizers` library follow the order of a hash table, we do without them.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, trainers

from flaxlm.errors import DataError
from flaxlm.tokenizers.own import (
  CHARACTERS,
  CONTINUING,
  END_OF_TEXT,
  MASK,
  SHORT_WORDS,
  UNKNOWN,
  WORDS,
  Tokenizer,
  byte_alphabet,
  pre_tokenizer,
  rust_errors,
  word_piece_decoder,
)
from flaxlm.tokenizers.unigram import train_unigram


def train_tokenizer(
  kind: str, texts: Iterable[str], vocab_size: int, masked: bool = False
) -> Tokenizer:
  """A tokenizer of `kind`, with `vocab_size` ids or fewer, if the texts have no more.

  byte: an id for each byte; `texts` and `vocab_size` are not used. char: all bytes, and the
  most frequent characters beyond ASCII; any other is written in bytes. word: the most
  frequent words, each with the blank before it; any other is unknown. bpe: all bytes, and
  merges of the most frequent pairs (Sennrich et al., 2016). wordpiece: all bytes, at the
  beginning and inside of a word, and the pieces that the same merges make; a word is cut
  into the longest piece from its beginning on (Schuster and Nakajima, 2012; its encoder is
  that of Devlin et al., 2019, and so are the merges, which count pairs). unigram: all
  bytes, and the pieces that are most probable together (Kudo, 2018).

  If `masked`, the last id is that of `[MASK]`. Raises `DataError` for texts without a
  character, and for a vocabulary that has no room for the alphabet.
  """
  if kind not in _METHODS:
    raise ValueError(f"unknown kind of tokenizer {kind!r}: {', '.join(_METHODS)}")
  # With `lstrip`, other tools count the blank before [MASK] to it, as `encode_masked` does.
  mask = tokenizers.AddedToken(MASK, lstrip=True, special=True)
  specials = [END_OF_TEXT, mask] if masked else [END_OF_TEXT]
  split, least, make_model = _METHODS[kind]
  room = vocab_size - len(specials)
  if kind != "byte" and room < least:
    raise DataError(
      f"a vocabulary of {vocab_size} ids is too small for a tokenizer of kind {kind}, "
      f"whose alphabet has {least}",
      f"it takes {least + len(specials)} or more",
    )
  clean = _not_empty(text.encode("utf-8", "replace").decode() for text in texts)
  backend = tokenizers.Tokenizer(make_model(() if kind == "byte" else clean, room))
  backend.pre_tokenizer = pre_tokenizer(split)
  backend.decoder = word_piece_decoder() if kind == "wordpiece" else decoders.ByteLevel()
  backend.add_special_tokens(specials)
  return Tokenizer(backend)


def _not_empty(texts: Iterable[str]) -> Iterable[str]:
  """The texts. Raises `DataError` if none has a character."""
  empty = True
  for text in texts:
    empty = empty and not text
    yield text
  if empty:
    raise DataError("there is no text to train a tokenizer on", "name a corpus with text")


def _bytes(texts: Iterable[str], room: int) -> models.Model:
  return models.BPE(vocab=_ids(byte_alphabet()), merges=[])


def _characters(texts: Iterable[str], room: int) -> models.Model:
  """`ignore_merges`: a character that is in the vocabulary is taken whole."""
  counts = Counter[str]()
  for text in texts:
    counts.update(text)
  frequent = [character for character in _by_frequency(counts) if character > "\x7f"]
  names = [*byte_alphabet(), *map(_name, frequent[: room - 256])]
  return models.BPE(vocab=_ids(names), merges=[], ignore_merges=True)


def _words(texts: Iterable[str], room: int) -> models.Model:
  words = _by_frequency(_count_words(texts))
  # No word of a text is spelled as [UNK] is: the brackets are words of their own.
  names = [UNKNOWN, *map(_name, words[: room - 1])]
  return models.WordLevel(vocab=_ids(names), unk_token=UNKNOWN)


def _byte_pairs(texts: Iterable[str], room: int) -> models.Model:
  return _merge(texts, WORDS, room).model


def _word_pieces(texts: Iterable[str], room: int) -> models.Model:
  """The library's own trainer of WordPieces is this one of BPE, too, but it numbers the
  pieces of one byte in the order of a hash table, and ties between pairs follow."""
  inside = [CONTINUING + character for character in byte_alphabet()]
  merged = _merge(texts, SHORT_WORDS, room, inside, CONTINUING)
  vocab = merged.get_vocab(with_added_tokens=False)
  return models.WordPiece(vocab=vocab, unk_token=UNKNOWN, max_input_chars_per_word=1000)


def _pieces(texts: Iterable[str], room: int) -> models.Model:
  counts = {word.encode(): number for word, number in _count_words(texts).items()}
  pieces = train_unigram(counts, room)
  return models.Unigram([(_name(piece), score) for piece, score in pieces], None, False)


# Of each kind: how it cuts a text, the least ids without the specials, and its model.
_METHODS: dict[str, tuple[str, int, Callable[[Iterable[str], int], models.Model]]] = {
  "byte": (WORDS, 256, _bytes),
  "char": (CHARACTERS, 256, _characters),
  "word": (WORDS, 2, _words),
  "bpe": (WORDS, 256, _byte_pairs),
  "wordpiece": (SHORT_WORDS, 512, _word_pieces),
  "unigram": (WORDS, 256, _pieces),
}


def _merge(
  texts: Iterable[str],
  split: str,
  room: int,
  more: Sequence[str] = (),
  prefix: str | None = None,
) -> tokenizers.Tokenizer:
  """A tokenizer whose model has all bytes, `more`, and merges up to `room` ids; with a
  `prefix`, that of pieces inside of a word."""
  options: dict[str, Any] = {"continuing_subword_prefix": prefix} if prefix else {}
  backend = tokenizers.Tokenizer(models.BPE(**options))
  backend.pre_tokenizer = pre_tokenizer(split)
  trainer = trainers.BpeTrainer(
    vocab_size=room,
    initial_alphabet=byte_alphabet(),
    special_tokens=list(more),
    show_progress=False,
    **options,
  )
  with rust_errors("cannot train the tokenizer"):
    backend.train_from_iterator(texts, trainer)
  return backend


def _count_words(texts: Iterable[str]) -> Counter[str]:
  counts, words_of = Counter[str](), re.compile(WORDS).findall
  for text in texts:
    counts.update(words_of(text))
  return counts


def _by_frequency(counts: Mapping[str, int]) -> list[str]:
  """The most frequent first; of those that are as frequent, the first in code points."""
  return sorted(counts, key=lambda text: (-counts[text], text))


def _name(text: str | bytes) -> str:
  """How a vocabulary spells a text whose characters are to stand for its bytes."""
  alphabet = byte_alphabet()
  return "".join(alphabet[b] for b in (text.encode() if isinstance(text, str) else text))


def _ids(names: Iterable[str]) -> dict[str, int]:
  return {name: number for number, name in enumerate(names)}
