# SPDX-License-Identifier: Apache-2.0
"""Reads SentencePiece's `*.model` files (Kudo and Richardson, 2018), as a tokenizer.json.

The file is a protocol buffer, sentencepiece_model.proto, of which this reads what decides
the ids of a text: the pieces, what kind of model they belong to, and how it treats blanks.
Unigram and BPE models are read, with bytes for unknown characters if they have them. The
ids are SentencePiece's, but of two ways to cut a word that are as probable the library may
take the other; and, as in every tokenizer.json, the name of a control piece in a text
becomes that piece.
"""

import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from flaxlm.errors import DataError, first_line
from flaxlm.tokenizers.own import MAX_FILE_BYTES, rust_errors

BLANK = "\u2581"
MOST_CHARACTERS = 512  # of a piece: finding merges takes the square
TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
# Types of pieces.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6

# Numbers of fields. ModelProto:
PIECES, TRAINER, NORMALIZER = 1, 2, 3
# SentencePiece:
TEXT, SCORE, TYPE = 1, 2, 3
# TrainerSpec:
MODEL_TYPE, BLANK_AFTER, BYTE_FALLBACK = 3, 24, 35
NAMES = {"bos": (46, "<s>"), "eos": (47, "</s>"), "pad": (48, "<pad>")}
# NormalizerSpec:
CHARACTER_MAP, DUMMY_PREFIX, REMOVE_BLANKS, ESCAPE_BLANKS = 2, 3, 4, 5

Fields = Mapping[int, list[int | bytes]]


class Piece(NamedTuple):
  text: str
  score: float
  type: int


class Converted(NamedTuple):
  """A SentencePiece model as the library `tokenizers` has it."""

  backend: tokenizers.Tokenizer
  ids: dict[str, int | None]  # of bos, eos and pad, as far as the model has them


def read_sentencepiece(path: Path) -> Converted:
  """A `*.model` file. Raises `DataError` if it is damaged or of another type."""
  cure = "use a SentencePiece model of type unigram or bpe, or a tokenizer.json"
  try:
    if path.stat().st_size > MAX_FILE_BYTES:
      raise DataError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MB", cure)
    fields = parse(path.read_bytes())
    pieces = [_piece(parse(_raw(one))) for one in fields.get(PIECES, [])]
    trainer, normalizer = (
      parse(_raw(_last(fields, number, b""))) for number in (TRAINER, NORMALIZER)
    )
    kind = TYPES.get(_number(trainer, MODEL_TYPE, 1), "unknown")
    unknown = [n for n, piece in enumerate(pieces) if piece.type == UNKNOWN]
    if not pieces or len(unknown) != 1:
      raise ValueError(f"{len(pieces)} pieces, {len(unknown)} of which are <unk>")
    if len({piece.text for piece in pieces}) < len(pieces):
      raise ValueError("a piece is there twice")
  except OSError as e:
    raise DataError(f"cannot read {path}: {first_line(e)}", cure) from e
  except (ValueError, struct.error) as e:
    raise DataError(f"{path} is not a SentencePiece model: {first_line(e)}", cure) from e
  if kind not in ("unigram", "bpe"):
    raise DataError(f"{path} is a SentencePiece model of type {kind}", cure)
  if _number(trainer, BLANK_AFTER, 0) or not _number(normalizer, ESCAPE_BLANKS, 1):
    raise DataError(f"{path} does not put a {BLANK} before words", cure)
  with rust_errors(f"{path} is not a SentencePiece model", cure):
    has_bytes = bool(_number(trainer, BYTE_FALLBACK, 0))
    backend = tokenizers.Tokenizer(_model(kind, pieces, unknown[0], has_bytes))
    backend.normalizer = _normalizer(normalizer)
    backend.decoder = _decoder(normalizer)
    if own := [re.escape(p.text) for p in pieces if p.type == USER_DEFINED]:
      longest_first = "|".join(sorted(own, key=len, reverse=True))
      cut = tokenizers.Regex(longest_first)
      backend.pre_tokenizer = pre_tokenizers.Split(cut, "isolated")
    controls = [p.text for p in pieces if p.type in (CONTROL, UNKNOWN)]
    backend.add_special_tokens(
      [tokenizers.AddedToken(name, normalized=False) for name in controls]
    )
  number_of = {p.text: n for n, p in enumerate(pieces) if p.type == CONTROL}
  names = {
    role: _raw(_last(trainer, number, name.encode())).decode("utf-8", "replace")
    for role, (number, name) in NAMES.items()
  }
  return Converted(backend, {role: number_of.get(name) for role, name in names.items()})


def parse(raw: bytes) -> Fields:
  """The values of each field of a protocol buffer's message, in their order.

  https://protobuf.dev/programming-guides/encoding. Raises `ValueError` if it is none.
  """
  fields: dict[int, list[int | bytes]] = {}
  place = 0
  while place < len(raw):
    key, place = _varint(raw, place)
    number, wire = key >> 3, key & 7
    if wire == 0:
      value, place = _varint(raw, place)
      fields.setdefault(number, []).append(value)
      continue
    size = {1: 8, 5: 4}.get(wire)
    if wire == 2:
      size, place = _varint(raw, place)
    if size is None or not number or place + size > len(raw):
      raise ValueError(f"it is damaged at byte {place:,}")
    fields.setdefault(number, []).append(raw[place : place + size])
    place += size
  return fields


def _varint(raw: bytes, place: int) -> tuple[int, int]:
  """(an integer of seven bits a byte, the place after it)."""
  value = 0
  for shift in range(0, 70, 7):
    if place >= len(raw):
      break
    byte = raw[place]
    value |= (byte & 0x7F) << shift
    place += 1
    if byte < 0x80:
      return value, place
  raise ValueError(f"it is damaged at byte {place:,}")


def _last(fields: Fields, number: int, default: int | bytes) -> int | bytes:
  """The value of a field that is there once; of several, the last one counts."""
  return fields.get(number, [default])[-1]


def _raw(value: int | bytes) -> bytes:
  if isinstance(value, int):
    raise ValueError("a field has another type")
  return value


def _number(fields: Fields, number: int, default: int) -> int:
  value = _last(fields, number, default)
  if not isinstance(value, int):
    raise ValueError("a field has another type")
  return value


def _piece(fields: Fields) -> Piece:
  (score,) = struct.unpack("<f", _raw(_last(fields, SCORE, bytes(4))))
  if score != score:
    raise ValueError("a score is not a number")
  text = _raw(_last(fields, TEXT, b"")).decode()
  if len(text) > MOST_CHARACTERS:
    raise ValueError(f"a piece has {len(text):,} characters")
  return Piece(text, score, _number(fields, TYPE, 1))


def _model(kind: str, pieces: list[Piece], unknown: int, has_bytes: bool) -> models.Model:
  if kind == "unigram":
    scored = [(piece.text, piece.score) for piece in pieces]
    return models.Unigram(scored, unknown, has_bytes)
  return models.BPE(
    vocab={piece.text: n for n, piece in enumerate(pieces)},
    merges=list(_merges(pieces)),
    unk_token=pieces[unknown].text,
    fuse_unk=True,
    byte_fallback=has_bytes,
    # What the model's maker has defined is cut out of the text, and is a piece as it is.
    ignore_merges=any(piece.type == USER_DEFINED for piece in pieces),
  )


def _merges(pieces: list[Piece]) -> Iterator[tuple[str, str]]:
  """The pairs that SentencePiece would join, the first to be joined first: any two pieces
  that are a third together, whose score is the rank."""
  normal = {piece.text: n for n, piece in enumerate(pieces) if piece.type == NORMAL}
  for text in sorted(normal, key=lambda text: -pieces[normal[text]].score):
    cuts = [(text[:n], text[n:]) for n in range(1, len(text))]
    both = [cut for cut in cuts if cut[0] in normal and cut[1] in normal]
    yield from sorted(both, key=lambda cut: (normal[cut[0]], normal[cut[1]]))


def _normalizer(fields: Fields) -> normalizers.Normalizer:
  """What SentencePiece does to a text first; a blank becomes a letter."""
  steps: list[normalizers.Normalizer] = []
  if characters := _raw(_last(fields, CHARACTER_MAP, b"")):
    steps.append(normalizers.Precompiled(characters))
  if _number(fields, REMOVE_BLANKS, 1):
    for pattern, blank in ((rf"\A +|[ {BLANK}]+\z", ""), (" {2,}", " ")):
      steps.append(normalizers.Replace(tokenizers.Regex(pattern), blank))
  if _number(fields, DUMMY_PREFIX, 1):
    steps.append(normalizers.Prepend(" "))
  return normalizers.Sequence([*steps, normalizers.Replace(" ", BLANK)])


def _decoder(fields: Fields) -> decoders.Decoder:
  steps = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
  strips = _number(fields, DUMMY_PREFIX, 1) or _number(fields, REMOVE_BLANKS, 1)
  return decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if strips else [])])
