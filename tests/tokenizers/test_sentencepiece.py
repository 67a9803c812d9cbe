# SPDX-License-Identifier: Apache-2.0
"""SentencePiece models: read as what they are, or refused."""

import struct
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from flaxlm.errors import DataError
from flaxlm.tokenizers import load_tokenizer
from flaxlm.tokenizers.sentencepiece import parse, read_sentencepiece

UNIGRAM, BPE, WORD, CHAR = 1, 2, 3, 4
NORMAL, UNKNOWN, CONTROL, USER, _, BYTE = range(1, 7)
BYTES = [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
START = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
# Merges: th, the, ▁the.
LETTERS = [(letter, -9.0, NORMAL) for letter in "▁abcehmnost"]
MERGED = [("th", 0.0, NORMAL), ("the", -1.0, NORMAL), ("▁the", -2.0, NORMAL)]


# -- Writing a protocol buffer -------------------------------------------------------------


def varint(value: int) -> bytes:
  out = b""
  while value >= 0x80:
    out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
  return out + bytes([value])


def field(number: int, value: Any) -> bytes:
  if isinstance(value, float):
    return varint(number << 3 | 5) + struct.pack("<f", value)
  if isinstance(value, int):
    return varint(number << 3) + varint(value)
  raw = value.encode() if isinstance(value, str) else value
  return varint(number << 3 | 2) + varint(len(raw)) + raw


def model(
  pieces: list[tuple[str, float, int]], trainer: Any = (), normalizer: Any = ()
) -> bytes:
  listed = [field(1, field(1, t) + field(2, s) + field(3, k)) for t, s, k in pieces]
  parts = [
    b"".join(field(n, v) for n, v in one.items())
    for one in map(dict, (trainer, normalizer))
  ]
  return b"".join([*listed, field(2, parts[0]), field(3, parts[1])])


PLAIN = {4: 0}  # blanks stay as they are
TINY = model([*START, *BYTES, *LETTERS, *MERGED], {3: BPE, 35: 1}, PLAIN)


def test_a_small_model_by_hand(tmp_path: Path):
  path = tmp_path / "tokenizer.model"
  path.write_bytes(TINY)
  found = load_tokenizer(path)
  names = [found.name_of(i) for i in found.encode("the mat é")]
  assert names == ["▁the", "▁", "m", "a", "t", "▁", "<0xC3>", "<0xA9>"]
  assert found.decode(found.encode("the  mat é\n")) == "the  mat é\n"
  assert (found.bos_id, found.eos_id, found.framed([9], "prompt")) == (1, 2, [1, 9])
  assert "begins with <s> and ends with </s>, as its model says" in found.note
  # What a run stores is an ordinary tokenizer.json.
  found.save(tmp_path / "tokenizer.json")
  again = load_tokenizer(tmp_path / "tokenizer.json")
  assert again.encode("the mat é") == found.encode("the mat é")
  assert tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))


def test_specials_have_the_names_that_the_model_gives(tmp_path: Path):
  pieces = [("<unk>", 0.0, UNKNOWN), ("[B]", 0.0, CONTROL), ("[E]", 0.0, CONTROL)]
  path = tmp_path / "a.model"
  path.write_bytes(model([*pieces, *LETTERS], {3: UNIGRAM, 46: "[B]", 47: "[E]"}))
  assert load_tokenizer(path).bos_id == 1 and load_tokenizer(path).eos_id == 2
  path.write_bytes(model([*pieces, *LETTERS]))
  with pytest.raises(DataError, match="no token that is known to end a text"):
    load_tokenizer(path)


BAD = [
  (b"", "0 pieces"),
  (b"\x00", "damaged at byte"),
  (TINY[:-1], "damaged at byte"),
  (TINY[:500], "damaged at byte"),
  (b'{"model": {}}', "not a SentencePiece model"),
  (b"\xff" * 20, "damaged at byte"),
  (field(1, 3), "another type"),
  (model(START[1:]), "0 of which are <unk>"),
  (model([*START, *START[1:]]), "there twice"),
  (model([*START, ("a", float("nan"), NORMAL)]), "not a number"),
  (model([*START, ("a" * 10**6, -1.0, NORMAL)], {3: BPE}), "1,000,000 characters"),
  (model(START, {3: WORD}), "of type word"),
  (model(START, {3: CHAR}), "of type char"),
  (model(START, {3: 77}), "of type unknown"),
  (model(START, {24: 1}), "before words"),
  (model(START, {}, {5: 0}), "before words"),
  (model(START, {}, {2: b"xxxxx"}), "not a SentencePiece model"),
]


@pytest.mark.parametrize(("raw", "cause"), BAD, ids=range(len(BAD)))
def test_what_is_damaged_or_of_another_type_is_refused(tmp_path: Path, raw, cause):
  path = tmp_path / "a.model"
  path.write_bytes(raw)
  with pytest.raises(DataError, match=cause) as error:
    load_tokenizer(path)
  assert str(path) in error.value.cause and "\n" not in error.value.cause
  assert error.value.exit_code == 3 and error.value.cure


def test_one_that_is_not_there(tmp_path: Path):
  with pytest.raises(DataError, match=r"cannot read .*a\.model: No such file"):
    load_tokenizer(tmp_path / "a.model")


@given(st.binary(max_size=200), st.integers(0, len(TINY)))
def test_any_bytes_are_read_or_refused(tmp_path_factory, raw: bytes, place: int):
  path = tmp_path_factory.getbasetemp() / "any.model"
  path.write_bytes(TINY[:place] + raw + TINY[place:])
  try:
    read_sentencepiece(path)
  except DataError as e:
    assert "\n" not in e.cause


@given(st.dictionaries(st.integers(1, 2**28), st.integers(0, 2**63) | st.binary()))
def test_messages_are_read_as_they_are_written(fields: dict):
  raw = b"".join(field(number, value) for number, value in fields.items())
  assert parse(raw) == {number: [value] for number, value in fields.items()}
