# SPDX-License-Identifier: Apache-2.0
"""Imported tokenizers of every kind: special tokens, streams and files as models need."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import bert, gpt2, llama, t5

from flaxlm.errors import CheckpointError, DataError
from flaxlm.interop.transfer import read_specials
from flaxlm.interop.values import Values
from flaxlm.tokenizers import train_tokenizer
from flaxlm.tokenizers.imported import (
  SPECIALS,
  ImportedTokenizer,
  Specials,
  frame,
  load_tokenizer,
)

MADE = {"llama": llama, "gpt2": gpt2, "bert": bert, "t5": t5}


def opened(kind: str, **specials: Any) -> ImportedTokenizer:
  backend = MADE[kind]()
  prefix, suffix = frame(backend)
  return ImportedTokenizer(backend, Specials(prefix=prefix, suffix=suffix, **specials))


@pytest.mark.parametrize(
  ("kind", "role", "expected"),
  [
    ("llama", "prompt", "<s> the cat"),
    ("gpt2", "prompt", "the cat"),
    ("bert", "text", "[CLS] the cat [SEP]"),
    ("t5", "source", "the cat </s>"),
  ],
)
def test_a_text_is_framed_as_its_post_processor_says(kind: str, role: Any, expected: str):
  tokenizer, backend = opened(kind, bos_id=0), MADE[kind]()
  found = tokenizer.framed(tokenizer.encode("the cat"), role)
  assert found == backend.encode("the cat").ids
  names = [backend.id_to_token(i) for i in found]
  for word in expected.split():
    if word.startswith(("<", "[")):
      assert names.index(word) == (0 if expected.startswith(word) else len(names) - 1)


@pytest.mark.parametrize("kind", MADE)
def test_padding_and_truncation_are_no_frame(kind: str):
  backend = MADE[kind]()
  backend.enable_padding(length=16)
  backend.enable_truncation(4)
  assert frame(backend) == frame(MADE[kind]())


def test_a_frame_is_found_around_any_word():
  """Where "a" is nothing to a tokenizer, a word of its own is tried."""
  for vocab, expected in (({"<s>": 0, "b": 1}, ((0,), ())), ({"<s>": 0}, None)):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.add_special_tokens(["<s>"])
    assert frame(backend) == ((), ())
    backend.post_processor = tokenizers.processors.TemplateProcessing(
      single="<s> $A", special_tokens=[("<s>", 0)]
    )
    if expected is not None:
      assert frame(backend) == expected
    else:
      with pytest.raises(DataError, match="cannot be told"):
        frame(backend)


def test_a_prompt_is_never_empty_and_never_ended():
  assert opened("gpt2", eos_ids=(5,)).framed([], "prompt") == [5]
  tokenizer = opened("t5", bos_id=0)
  assert tokenizer.framed([], "prompt") == [0]
  assert tokenizer.framed([7], "prompt") == [7]  # the end is for what an encoder reads


TEXTS = ["the cat", " the  cats", "théâtre ☕ 漢字", "a\n\tb", "", "<s>the</s>"]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_of_a_stream_add_up(kind: str, text: str):
  """After a prompt: nothing of the text is lost, not even the first space."""
  tokenizer = opened(kind)
  before = tokenizer.encode("ab")
  whole = tokenizer.encode(f"ab{text}")
  ids = whole[len(before) :]
  if whole[: len(before)] != before:  # the text has merged with what was before it
    return
  stream = tokenizer.stream()
  pieces = [stream.push(i) for i in ids]
  assert "".join(pieces) + stream.flush() == tokenizer.decode(whole)[2:]


@given(st.lists(st.integers(0, 300), max_size=12))
def test_any_ids_stream_to_what_they_decode_to(ids: list[int]):
  tokenizer = opened("llama")
  whole = tokenizer.decode([*tokenizer.encode("a"), *ids])[1:]
  stream = tokenizer.stream()
  streamed = "".join(map(stream.push, ids)) + stream.flush()
  # Bytes that are no UTF-8 spoil what stands beside them, if they are decoded together.
  assert streamed == whole or "\ufffd" in whole


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_bytes_of_tokens_add_up_to_the_text(kind: str):
  tokenizer = opened(kind)
  for text in ("the cat sat", "théâtre ☕ 漢字"):
    ids = tokenizer.encode(text)
    sizes = tokenizer.token_bytes()[ids]
    known = [i for i in ids if tokenizer.name_of(i) != "<unk>"]
    counted = tokenizer.token_bytes()[known].tolist()
    assert [len(tokenizer.bytes_of(i)) for i in known] == counted
    if kind != "t5":
      assert b"".join(map(tokenizer.bytes_of, ids)).decode().lstrip() == text
    assert all(tokenizer.name_of(i) for i in ids)
    added = 0 if kind == "gpt2" else 1  # the blank before the first word
    if kind != "t5" or text.isascii():  # what T5 does not know, it forgets
      assert sizes.sum() == len(text.encode()) + added
  assert len(sizes) and tokenizer.token_bytes().shape == (tokenizer.vocab_size,)


def test_masks_are_found_by_our_name_or_theirs():
  tokenizer = opened("bert", mask_id=MADE["bert"]().token_to_id("[MASK]"))
  assert tokenizer.encode_masked("the [MASK] sat")[1] == tokenizer.mask_id
  with pytest.raises(DataError, match="MASK"):
    opened("gpt2").encode_masked("[MASK]")


def test_ids_may_leave_gaps():
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 40}, "a"))
  tokenizer = ImportedTokenizer(backend, Specials())
  assert tokenizer.vocab_size == 41
  assert tokenizer.decode([40, 41, -1, 7]) == "b"


def test_what_is_stored_is_found_again(tmp_path: Path):
  tokenizer = opened("llama", bos_id=1, eos_ids=(2, 3), pad_id=0)
  tokenizer.save(tmp_path / "tokenizer.json")
  again = load_tokenizer(tmp_path / "tokenizer.json")
  assert isinstance(again, ImportedTokenizer)
  assert (again.bos_id, again.eos_id, again.eos_ids) == (1, 2, {2, 3})
  assert again.encode("the cat") == tokenizer.encode("the cat")
  assert again.fingerprint == tokenizer.fingerprint
  (tmp_path / SPECIALS).unlink()
  train_tokenizer("byte", [], 257).save(tmp_path / "tokenizer.json")
  assert load_tokenizer(tmp_path / "tokenizer.json").encode("a") == [97]


# -- Files of others -----------------------------------------------------------------------


@pytest.mark.parametrize(
  ("kind", "names", "unknown"),
  [
    ("llama", ("<s>", "</s>"), "<unk>"),
    ("bert", ("[CLS]", "[SEP]"), "[UNK]"),
    ("t5", ("</s>", "</s>"), "<unk>"),
  ],
)
def test_any_tokenizer_can_be_named(tmp_path: Path, kind: str, names: Any, unknown: str):
  """Without the files of a checkpoint the names of its tokens say what they are for."""
  path = tmp_path / "tokenizer.json"
  path.write_text(MADE[kind]().to_str())
  found = load_tokenizer(path)
  assert (found.name_of(found.bos_id), found.name_of(found.eos_id)) in (
    names, ("<pad>", "</s>")  # T5 has no token that begins
  )  # fmt: skip
  assert found.name_of(found.unknown_id) == unknown
  assert found.token_bytes()[found.unknown_id] == 0
  assert f"ends with {names[1]}, by their names" in found.note
  assert found.framed(found.encode("the cat"), "text") == MADE[kind]().encode("the cat").ids
  found.save(tmp_path / "again.json")
  assert load_tokenizer(tmp_path / "again.json").note == ""


def test_settings_beside_a_tokenizer_come_before_names(tmp_path: Path):
  backend = llama()
  backend.add_special_tokens(["<stop>"])
  (tmp_path / "tokenizer.json").write_text(backend.to_str())
  settings = tmp_path / "tokenizer_config.json"
  settings.write_text('{"eos_token": {"content": "<stop>"}, "bos_token": null}')
  found = load_tokenizer(tmp_path / "tokenizer.json")
  assert (found.name_of(found.eos_id), found.name_of(found.bos_id)) == ("<stop>", "<s>")
  assert str(settings) in found.note
  settings.write_text("[]")
  with pytest.raises(DataError, match=r"tokenizer_config\.json cannot be read"):
    load_tokenizer(tmp_path / "tokenizer.json")


def test_a_prompt_begins_as_the_documents_that_are_learnt(tmp_path: Path):
  """Where a tokenizer adds nothing itself, as a byte-level one of another's making."""
  backend = gpt2()
  vocab = json.loads(backend.to_str())
  vocab["added_tokens"][0]["content"] = "<eos>"
  vocab["model"]["vocab"].pop("<|endoftext|>", None)
  (tmp_path / "tokenizer.json").write_text(json.dumps(vocab))
  found = load_tokenizer(tmp_path / "tokenizer.json")
  assert isinstance(found, ImportedTokenizer) and found.name_of(found.eos_id) == "<eos>"
  assert found.framed([7], "prompt") == [found.bos_id, 7]


def test_a_tokenizer_without_an_end_or_some_bytes_is_refused(tmp_path: Path):
  path = tmp_path / "tokenizer.json"
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, "a"))
  path.write_text(backend.to_str())
  with pytest.raises(DataError, match="no token that is known to end a text"):
    load_tokenizer(path)
  backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "</s>": 1}, []))
  backend.decoder = tokenizers.decoders.ByteLevel()
  path.write_text(backend.to_str())
  with pytest.raises(DataError, match="no id for 255 of the 256 bytes"):
    load_tokenizer(path)


DAMAGED = [
  "",
  "[]",
  "{}",
  '{"eos_ids": 1}',
  '{"eos_ids": ["2"], "prefix": [], "suffix": []}',
]
DAMAGED += [
  '{"eos_ids": [-1], "prefix": [], "suffix": []}',
  "\xff",
  '{"eos_ids": [], "x": 1}',
]


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_specials_are_refused(tmp_path: Path, text: str):
  (tmp_path / SPECIALS).write_text(text, "latin-1")
  with pytest.raises(DataError, match="import the checkpoint again"):
    Specials.load(tmp_path / SPECIALS)


# -- Which ids are special -----------------------------------------------------------------


def specials(said: dict[str, Any], ids: dict[str, Any], kind: str = "llama") -> Specials:
  return read_specials(MADE[kind](), Values(said, "said"), Values(ids, "ids"))


def test_numbers_come_before_names():
  said = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "<unk>"}
  by_name = specials(said, {})
  assert (by_name.bos_id, by_name.eos_ids, by_name.pad_id) == (1, (2,), 0)
  ids = {"bos_token_id": 9, "eos_token_id": [5, 6], "pad_token_id": -1}
  by_number = specials(said, ids)
  assert (by_number.bos_id, by_number.eos_ids, by_number.pad_id) == (9, (5, 6), 0)


def test_an_encoder_decoder_starts_with_its_own_id():
  ids = {"is_encoder_decoder": True, "decoder_start_token_id": 0, "eos_token_id": 1}
  found = specials({}, ids, "t5")
  assert (found.bos_id, found.eos_ids, found.suffix) == (0, (1,), (1,))


def test_a_beginning_that_only_the_config_adds_is_added_once():
  said = {"bos_token": "<s>", "add_bos_token": True}
  assert specials(said, {}, "llama").prefix == (1,)
  assert specials(said, {"bos_token_id": 5}, "gpt2").prefix == (5,)


ODD = st.one_of(
  st.none(), st.booleans(), st.integers(), st.text(max_size=3), st.just([1, 2])
)


@given(st.dictionaries(st.sampled_from(["bos_token", "mask_token", "add_bos_token"]), ODD),
       st.dictionaries(st.sampled_from(["eos_token_id", "bos_token_id"]), ODD))  # fmt: skip
def test_odd_settings_are_read_or_refused(said: dict, ids: dict):
  try:
    found = specials(said, ids)
  except CheckpointError:
    return
  assert json.dumps(found._asdict())
  assert np.all(np.array(found.eos_ids) >= 0)
