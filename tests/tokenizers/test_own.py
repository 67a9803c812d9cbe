# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: no text loses anything, and bad files fail cleanly."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from flaxlm.errors import DataError
from flaxlm.tokenizers import END_OF_TEXT, MASK, Tokenizer, train_tokenizer
from flaxlm.tokenizers.own import byte_alphabet

CORPUS = [path.read_text("utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]
TOKENIZERS = {
  "byte": train_tokenizer("byte", [], 0),
  "char": train_tokenizer("char", CORPUS, 400),
  "word": train_tokenizer("word", CORPUS, 400),
  "wordpiece": train_tokenizer("wordpiece", CORPUS, 700),
  "unigram": train_tokenizer("unigram", CORPUS, 400),
  "bpe": train_tokenizer("bpe", CORPUS, 400),
  "masked": train_tokenizer("bpe", CORPUS, 400, masked=True),
}
KINDS = pytest.mark.parametrize("kind", TOKENIZERS)
LOSSLESS = pytest.mark.parametrize("kind", [kind for kind in TOKENIZERS if kind != "word"])
# Any text without lone surrogates, and text that looks like source code.
TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.text(
  st.sampled_from(" \t\n\r\v\f\0ab_1.,()[]\"'#é漢🙂")
)


@LOSSLESS
@given(text=TEXTS)
def test_decoding_inverts_encoding(kind: str, text: str):
  tokenizer = TOKENIZERS[kind]
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


@KINDS
@given(text=TEXTS)
def test_fast_path_agrees_with_hugging_face(kind: str, text: str):
  # What others get who load our tokenizer.json.
  backend = tokenizers.Tokenizer.from_str(TOKENIZERS[kind]._backend.to_str())
  backend.encode_special_tokens = True
  assert TOKENIZERS[kind].encode(text) == backend.encode(text).ids


@KINDS
def test_fast_path_agrees_with_hugging_face_on_source_code(kind: str):
  tokenizer = TOKENIZERS[kind]
  assert tokenizer._split
  fast, slow = tokenizer.encode_batch(CORPUS), tokenizer._encode_with_backend(CORPUS)
  assert all(map(np.array_equal, fast, slow))


@KINDS
@given(ids=st.lists(st.integers(0, 450)))
def test_streaming_gives_the_same_text_in_whole_characters(kind: str, ids: list[int]):
  tokenizer = TOKENIZERS[kind]
  stream = tokenizer.stream()
  pieces = [stream.push(token_id) for token_id in ids]
  assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


def test_streaming_waits_for_the_end_of_a_character():
  stream = TOKENIZERS["byte"].stream()
  assert [stream.push(byte) for byte in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]
  assert stream.push(0xF0) == ""
  assert stream.flush() == "\ufffd"


def test_byte_ids_are_bytes():
  tokenizer = TOKENIZERS["byte"]
  text = "".join(map(chr, range(0x800)))
  assert tokenizer.encode(text) == list(text.encode())
  assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (257, 256, 256)


@LOSSLESS
def test_special_tokens_are_never_made_from_text_nor_into_text(kind: str):
  tokenizer = TOKENIZERS[kind]
  text = f"a{END_OF_TEXT}b {MASK}c"
  ids = tokenizer.encode(text)
  assert not set(tokenizer.special_ids) & set(ids)
  assert tokenizer.decode([*tokenizer.special_ids, *ids, tokenizer.eos_id]) == text
  assert not tokenizer.token_bytes()[list(tokenizer.special_ids)].any()


@LOSSLESS
def test_lone_surrogates_become_question_marks(kind: str):
  tokenizer = TOKENIZERS[kind]
  assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_training_again_gives_the_same_tokenizer():
  again = train_tokenizer("bpe", iter(CORPUS), 400)
  assert again.fingerprint == TOKENIZERS["bpe"].fingerprint
  other = train_tokenizer("bpe", [*CORPUS, "zyx " * 1000], 400)
  assert other.fingerprint != again.fingerprint


def test_vocabulary_size_counts_the_special_token():
  assert TOKENIZERS["bpe"].vocab_size == 400
  assert train_tokenizer("bpe", CORPUS, 257).vocab_size == 257
  assert train_tokenizer("bpe", ["ab"], 400).vocab_size == 258  # one merge is all it has


def test_tokenizers_of_masked_models_have_a_mask():
  for kind in ("byte", "bpe"):
    tokenizer = TOKENIZERS[kind]
    assert tokenizer.mask_id is None
    assert tokenizer.special_ids == (tokenizer.bos_id,)
    with pytest.raises(DataError, match=r"has no \[MASK\]"):
      tokenizer.encode_masked("a [MASK]")
  masked = TOKENIZERS["masked"]
  assert (masked.vocab_size, masked.bos_id, masked.mask_id) == (400, 398, 399)
  assert masked.special_ids == (398, 399)
  tokenizer = train_tokenizer("byte", [], 0, masked=True)
  assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.mask_id) == (258, 256, 257)


def test_masks_in_a_prompt():
  tokenizer = TOKENIZERS["masked"]
  mask = tokenizer.mask_id
  before, after = tokenizer.encode("def f(x):\n "), tokenizer.encode(" x\n")
  for text, expected in {
    "def f(x):\n  [MASK] x\n": [*before, mask, *after],  # the blank belongs to the mask
    "[MASK] [MASK][MASK] x\n": [mask, mask, mask, *after],
    " x\n": after,
    "": [],
    "<|endoftext|>[MASK]": [*tokenizer.encode("<|endoftext|>"), mask],
  }.items():
    assert tokenizer.encode_masked(text) == expected
  # Others who load our tokenizer.json get the same (between words).
  backend = tokenizers.Tokenizer.from_str(tokenizer._backend.to_str())
  text = "return [MASK], None[MASK](x)"
  assert backend.encode(text).ids == tokenizer.encode_masked(text)


def test_the_mask_changes_nothing_else(tmp_path: Path):
  """Runs and stored tokens of the other objectives stay what they were."""
  state = json.loads(TOKENIZERS["bpe"]._backend.to_str())
  assert [token["content"] for token in state["added_tokens"]] == [END_OF_TEXT]
  TOKENIZERS["masked"].save(tmp_path / "tokenizer.json")
  assert Tokenizer.load(tmp_path / "tokenizer.json").mask_id == 399
  one_less = train_tokenizer("bpe", CORPUS, 399)
  assert one_less.encode("".join(CORPUS)) == TOKENIZERS["masked"].encode("".join(CORPUS))


@KINDS
def test_saving_and_loading(kind: str, tmp_path: Path):
  TOKENIZERS[kind].save(tmp_path / "tokenizer.json")
  loaded = Tokenizer.load(tmp_path / "tokenizer.json")
  assert loaded.fingerprint == TOKENIZERS[kind].fingerprint
  text = f"def f(x):\n  return {END_OF_TEXT!r}\n"
  assert loaded.encode(text) == TOKENIZERS[kind].encode(text)


def test_loading_a_foreign_tokenizer(tmp_path: Path):
  # GPT-2's layout: another pre-tokenizer, a non-special added token, and truncation on.
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=[END_OF_TEXT],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  backend.train_from_iterator(CORPUS, trainer)
  backend.add_tokens(["  é  "])
  backend.enable_truncation(4)
  backend.enable_padding()
  backend.save(str(tmp_path / "tokenizer.json"))
  tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
  text = "a long text with  é  in it"
  assert tokenizer.decode(tokenizer.encode(text)) == text
  assert len(tokenizer.encode_batch(["a", text])[0]) == 1
  assert tokenizer.token_bytes()[tokenizer.encode("  é  ")].tolist() == [6]


def _byte_level(vocab: dict[str, int]) -> str:
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.add_special_tokens([END_OF_TEXT])
  return backend.to_str()


def test_foreign_ids_may_leave_gaps_and_stand_for_what_is_no_byte(tmp_path: Path):
  vocab = {name: 2 * byte for byte, name in enumerate(byte_alphabet())} | {"a b": 1000}
  (tmp_path / "tokenizer.json").write_text(_byte_level(vocab))
  tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
  text = "a b\n\u00e9"
  ids = tokenizer.encode(text)
  assert ids == [2 * byte for byte in text.encode()]
  assert tokenizer.decode(ids) == text
  assert 1000 < tokenizer.vocab_size == len(tokenizer.token_bytes()) <= 1002
  assert tokenizer.bytes_of(1000) == b"a b" and tokenizer.bytes_of(1) == b""


def _without_some_bytes() -> str:
  """The library leaves out, without a word, what has no id."""
  return _byte_level({name: n for n, name in enumerate(byte_alphabet()[:200])})


def _not_byte_level() -> str:
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({END_OF_TEXT: 0}))
  return backend.to_str()


def _without_end_of_text() -> str:
  state = json.loads(TOKENIZERS["byte"]._backend.to_str())
  return json.dumps(state | {"added_tokens": []})


@pytest.mark.parametrize(
  ("content", "cause"),
  [
    (None, "cannot read"),
    (b"", "not a tokenizer.json"),
    (b"{}", "not a tokenizer.json"),
    (b'{"model": {"type": "BPE"', "not a tokenizer.json"),
    (b"\xff", "cannot read"),
    (_not_byte_level().encode(), "not byte-level"),
    (_without_some_bytes().encode(), "no id for 56 of the 256 bytes, as 0xc8"),
    (_without_end_of_text().encode(), "has no <|endoftext|>"),
  ],
)
def test_bad_files(tmp_path: Path, content: bytes | None, cause: str):
  path = tmp_path / "tokenizer.json"
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(DataError, match=cause) as error:
    Tokenizer.load(path)
  assert str(path) in error.value.cause
  assert error.value.cure
  assert error.value.exit_code == 3


def test_huge_files_are_not_parsed(tmp_path: Path):
  path = tmp_path / "tokenizer.json"
  with path.open("wb") as file:
    file.truncate(65 * 2**20)
  with pytest.raises(DataError, match="larger than 64 MB"):
    Tokenizer.load(path)


def test_importing_loads_no_framework():
  code = (
    "import sys, flaxlm.tokenizers, flaxlm.data.prepare, flaxlm.data.objectives\n"
    "heavy = {'jax', 'tensorflow', 'torch', 'tensorflow_datasets', 'grain'}\n"
    "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
