# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of others: any tokenizer.json or SentencePiece model, used unchanged.

An `ImportedTokenizer` has the methods of our own `Tokenizer`. It encodes text as Hugging
Face's library does: the name of a special token in a text becomes that token.
"""

import functools
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers

from flaxlm.config import TokenizerConfig
from flaxlm.errors import DataError
from flaxlm.tokenizers.own import (
  END_OF_TEXT,
  MASK,
  Role,
  Tokenizer,
  Vocabulary,
  byte_alphabet,
  check_all_bytes,
  is_byte_level,
  load_backend,
  rust_errors,
)
from flaxlm.tokenizers.sentencepiece import read_sentencepiece

SPECIALS = "special_tokens.json"
# Text before the first piece of a stream: many decoders drop a text's first blank.
ANCHOR = "a"
MAX_ANCHORS = 1000  # words that are tried where the anchor is nothing to a tokenizer
# Where nothing says which tokens begin and end a text, these names do, the first one found.
NAMES = {
  "bos": ("<|begin_of_text|>", "<s>", "<bos>", "[CLS]", "<|startoftext|>"),
  "eos": ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]", "<|im_end|>"),
  "pad": ("<pad>", "[PAD]", "<|pad|>"),
  "mask": (MASK, "<mask>"),
}
SETTINGS = "tokenizer_config.json"  # of Hugging Face, may name them


class Specials(NamedTuple):
  """Special ids that tokenizer.json does not have; they are stored beside it."""

  bos_id: int | None = None  # begins a text; begins the output of an encoder-decoder
  eos_ids: tuple[int, ...] = ()  # end a completion
  pad_id: int | None = None
  mask_id: int | None = None
  prefix: tuple[int, ...] = ()  # before every text that a model reads
  suffix: tuple[int, ...] = ()  # and after it

  def save(self, path: Path) -> None:
    path.write_text(json.dumps(self._asdict(), indent=2, allow_nan=False) + "\n", "utf-8")

  @staticmethod
  def load(path: Path) -> "Specials":
    """Raises `DataError` for a file that `save` did not write."""
    try:
      values = json.loads(path.read_text("utf-8"))
      values |= {name: tuple(values[name]) for name in ("eos_ids", "prefix", "suffix")}
      specials = Specials(**values)
      ids = [i for x in specials for i in (x if isinstance(x, tuple) else [x])]
      if not all(i is None or (type(i) is int and 0 <= i < 2**31) for i in ids):
        raise ValueError("an id is not an integer from 0 on")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
      raise DataError(f"{path} cannot be read: {e}", "import the checkpoint again") from e
    return specials


class ImportedTokenizer(Vocabulary):
  """Any tokenizer of the tokenizers library, with the special ids of its checkpoint.

  It has the attributes of `Tokenizer`. Without an end of text, `eos_id` is -1, which is no
  token's id. Without a start of text, the end of text is used, as in GPT-2.
  """

  def __init__(self, backend: tokenizers.Tokenizer, specials: Specials):
    backend.no_truncation()
    backend.no_padding()
    self._backend, self._specials = backend, specials
    self.unknown_id = unknown_of(backend)
    vocab = backend.get_vocab(with_added_tokens=True)
    # There may be gaps between the ids.
    self.vocab_size: int = 1 + max(vocab.values(), default=0)
    self.eos_ids = frozenset(specials.eos_ids)
    self.eos_id: int = next(iter(specials.eos_ids), -1)
    starts = (specials.bos_id, *specials.eos_ids, specials.pad_id, 0)
    self.bos_id: int = next(i for i in starts if i is not None)
    self.mask_id = specials.mask_id
    added = backend.get_added_tokens_decoder().items()
    named = {n for n, token in added if token.special}
    self.special_ids: tuple[int, ...] = tuple(sorted(named | self.eos_ids | {self.bos_id}))

  def encode_masked(self, text: str) -> list[int]:
    """The ids of `text`, with `mask_id` for each `[MASK]`.

    Raises `DataError` if the tokenizer has no mask.
    """
    if self.mask_id is None:
      raise DataError(f"the tokenizer has no {MASK}", "only masked models fill in text")
    return self.encode(text.replace(MASK, self._backend.id_to_token(self.mask_id) or MASK))

  def framed(self, ids: Sequence[int], role: Role) -> list[int]:
    """`ids` with the special tokens around them; see `Tokenizer.framed`."""
    prefix, suffix = self._specials.prefix, self._specials.suffix
    if role != "prompt":
      return [*prefix, *ids, *suffix]
    return [*prefix, *ids] or [self.bos_id]

  def decode(self, ids: Iterable[int]) -> str:
    """The text of `ids`; special tokens and unknown ids have none."""
    known = [i for i in ids if 0 <= i < self.vocab_size]
    with rust_errors("cannot decode the ids"):
      return self._backend.decode(known, skip_special_tokens=True)

  def stream(self) -> "ImportedStream":
    """A decoder for ids that arrive one by one."""
    return ImportedStream(self)

  @functools.cached_property
  def _pieces(self) -> list[bytes]:
    """The bytes that each id stands for.

    Exact for byte-level and SentencePiece vocabularies; of others, blanks do not count.
    """
    pieces = [b""] * self.vocab_size
    byte_level = "ByteLevel" in str(self._backend.decoder)
    byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}
    for token, token_id in self._backend.get_vocab(with_added_tokens=True).items():
      if byte_level and all(character in byte_of for character in token):
        pieces[token_id] = bytes(byte_of[character] for character in token)
      elif re.fullmatch("<0x[0-9A-F]{2}>", token):
        pieces[token_id] = bytes.fromhex(token[3:5])
      else:
        pieces[token_id] = token.removeprefix("##").replace("\u2581", " ").encode()
    for token_id in self.special_ids:
      if token_id < self.vocab_size:
        pieces[token_id] = b""
    return pieces

  def token_bytes(self) -> np.ndarray:
    """How many bytes of text each id stands for, (V,) int32; a special token for those of
    its name, which a text may hold."""
    sizes = super().token_bytes()
    for token_id in self.special_ids:
      if token_id < self.vocab_size:
        sizes[token_id] = len((self.name_of(token_id) or "").encode())
    if self.unknown_id is not None:
      sizes[self.unknown_id] = 0
    return sizes

  def save(self, path: str | Path) -> None:
    """Writes tokenizer.json, and the special ids beside it."""
    Path(path).write_text(self._backend.to_str(pretty=True), "utf-8")
    self._specials.save(Path(path).with_name(SPECIALS))

  @staticmethod
  def load(path: Path) -> "ImportedTokenizer":
    """Reads tokenizer.json and the special ids beside it; `DataError` if one is damaged."""
    specials = Specials.load(path.with_name(SPECIALS))
    return ImportedTokenizer(load_backend(path), specials)


AnyTokenizer = Tokenizer | ImportedTokenizer


def load_tokenizer(path: Path) -> AnyTokenizer:
  """The tokenizer of a file: one of ours, that of an import, which has its special ids
  beside it, any other tokenizer.json, or a SentencePiece model (`*.model`).

  Of a file of others `note` says which special tokens were found, and how. Raises
  `DataError`.
  """
  if path.with_name(SPECIALS).is_file() and path.suffix != ".model":
    return ImportedTokenizer.load(path)
  if path.suffix == ".model":
    backend, ids = read_sentencepiece(path)
    specials = Specials(ids["bos"], _some(ids["eos"]), ids["pad"])
    origin = "as its model says"
  else:
    backend = load_backend(path, "give a tokenizer.json or a SentencePiece model")
    if is_byte_level(backend) and backend.token_to_id(END_OF_TEXT) is not None:
      return Tokenizer.of_file(backend, path)
    specials, origin = find_specials(backend, path)
  if is_byte_level(backend) and unknown_of(backend) is None:
    check_all_bytes(backend)
  if not specials.eos_ids:
    raise DataError(
      f"{path} has no token that is known to end a text, as {', '.join(NAMES['eos'])}",
      f'put {{"eos_token": NAME}} into a {SETTINGS} beside it',
    )
  start = specials.eos_ids[0] if specials.bos_id is None else specials.bos_id
  if not specials.prefix and not specials.suffix:
    specials = specials._replace(prefix=(start,))  # as a document that is learnt begins
  tokenizer = ImportedTokenizer(backend, specials)
  begin, end = map(backend.id_to_token, (start, specials.eos_ids[0]))
  tokenizer.note = f"{path}: a text begins with {begin} and ends with {end}, {origin}"
  return tokenizer


def find_specials(backend: tokenizers.Tokenizer, path: Path) -> tuple[Specials, str]:
  """The special tokens of a tokenizer.json, and what says so: the settings beside it, or
  else their names."""
  settings, origin = path.with_name(SETTINGS), "by their names"
  said: dict[str, str] = {}
  if settings.is_file():
    try:
      values = json.loads(settings.read_text("utf-8"))
      named = {role: values.get(f"{role}_token") for role in NAMES}
    except (OSError, ValueError, AttributeError, RecursionError) as e:
      raise DataError(f"{settings} cannot be read: {e}", "mend it, or remove it") from e
    contents = {r: x.get("content") if isinstance(x, dict) else x for r, x in named.items()}
    said = {role: text for role, text in contents.items() if isinstance(text, str)}
    origin = f"as {settings} says" if "eos" in said else origin
  found = {
    role: next((n for name in names if (n := backend.token_to_id(name)) is not None), None)
    for role, names in (
      {r: NAMES[r] for r in NAMES} | {r: (said[r],) for r in said}
    ).items()
  }
  prefix, suffix = frame(backend)
  ends = _some(found["eos"])
  return Specials(found["bos"], ends, found["pad"], found["mask"], prefix, suffix), origin


def _some(token_id: int | None) -> tuple[int, ...]:
  return () if token_id is None else (token_id,)


def unknown_of(backend: tokenizers.Tokenizer) -> int | None:
  """The id of what the vocabulary lacks, if the tokenizer has one."""
  if isinstance(backend.model, tokenizers.models.Unigram):
    found = re.search(r'"type":"Unigram","unk_id":(\d+)', backend.to_str())
    return None if found is None else int(found[1])
  name = backend.model.unk_token
  return None if name is None else backend.token_to_id(name)


class ImportedStream:
  """Turns ids into text as soon as it is certain; the pieces add up to the whole text."""

  def __init__(self, tokenizer: ImportedTokenizer):
    self._decode = tokenizer.decode
    self._ids = tokenizer.encode(ANCHOR)
    self._shown = len(self._ids)  # ids whose text has been returned

  def push(self, token_id: int) -> str:
    """The characters that `token_id` completes."""
    self._ids.append(token_id)
    text = self._decode(self._ids)
    if text.endswith("\ufffd"):  # a character that may be incomplete
      return ""
    piece = text[len(self._decode(self._ids[: self._shown])) :]
    # Ids before those of the last piece have no effect on later text.
    self._ids = self._ids[self._shown :] if piece else self._ids
    self._shown = len(self._ids)
    return piece

  def flush(self) -> str:
    """The rest of the text: U+FFFD if the last character is incomplete."""
    text = self._decode(self._ids)
    piece = text[len(self._decode(self._ids[: self._shown])) :]
    self._shown = len(self._ids)
    return piece


def frame(backend: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The ids that the tokenizer's post-processor adds before and after a text.

  Turns off padding and truncation, which change the text as well. Raises `DataError` if
  there is no text in whose ids the added ones can be told from others.
  """
  backend.no_padding()
  backend.no_truncation()
  ours = {token.content for token in backend.get_added_tokens_decoder().values()}
  words = itertools.islice((w for w in backend.get_vocab() if w not in ours), MAX_ANCHORS)
  for text in itertools.chain([ANCHOR], words):
    with rust_errors("cannot encode the text"):
      bare = backend.encode(text, add_special_tokens=False).ids
      whole = backend.encode(text, add_special_tokens=True).ids
    for start in range(len(whole) - len(bare) + 1):
      if bare and whole[start : start + len(bare)] == bare:
        return tuple(whole[:start]), tuple(whole[start + len(bare) :])
    if not bare and not whole and not backend.num_special_tokens_to_add(False):
      return (), ()
  raise DataError("what the tokenizer adds to a text cannot be told from the text")


def expected_vocab_size(cfg: TokenizerConfig) -> int:
  """The number of ids that the tokenizer will have, if the text is long enough for them."""
  if cfg.path is not None:
    return load_tokenizer(Path(cfg.path)).vocab_size
  return 257 if cfg.kind == "byte" else cfg.vocab_size
