# SPDX-License-Identifier: Apache-2.0
"""Stored tokens: correct, reused, rebuilt when damaged, safe for several processes."""

import gzip
import hashlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import slow

from flaxlm.config import TokenizerConfig
from flaxlm.data.prepare import Prepared, prepare, prepare_whole
from flaxlm.data.sources import find_corpus
from flaxlm.data.stores import PairStore, TokenStore
from flaxlm.data.tokenizing import LONG_LINE
from flaxlm.errors import DataError
from flaxlm.tokenizers import ImportedTokenizer, Specials, train_tokenizer

BPE = TokenizerConfig(kind="bpe", vocab_size=300)
BYTE = TokenizerConfig(kind="byte")


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
  """Forty small files; prepared data go to a directory of the test's own."""
  monkeypatch.setenv("FLAXLM_DATA_DIR", str(tmp_path / "data"))
  folder = tmp_path / "corpus"
  folder.mkdir()
  for n in range(40):
    (folder / f"{n}.txt").write_text(f"the quick brown fox nr {n} is é\n" * (n + 1))
  return f"files:{folder}"


def documents(store: TokenStore) -> list[list[int]]:
  bounds = store.bounds.tolist()
  return [
    store.tokens[start + 1 : end].tolist() for start, end in itertools.pairwise(bounds)
  ]


def stored(root: Path) -> dict[Path, int]:
  """When each file below `root` was written last."""
  return {
    path: path.stat().st_mtime_ns
    for path in root.rglob("*")
    if path.is_file() and path.name != "lock"
  }


@pytest.mark.parametrize("cfg", [BPE, BYTE])
def test_the_store_holds_the_text(corpus: str, cfg: TokenizerConfig):
  prepared = prepare(corpus, cfg)
  found = find_corpus(corpus)
  for split in ("train", "validation"):
    store = getattr(prepared, split)
    expected = [d.read() for d in found.documents if d.split == split]
    assert [prepared.tokenizer.decode(ids) for ids in documents(store)] == expected
    bos_id = prepared.tokenizer.bos_id
    assert store.bounds[:-1].tolist() == np.flatnonzero(store.tokens == bos_id).tolist()
    assert store.end_id == prepared.tokenizer.eos_id
    assert store.tokens.max() < store.vocab_size == prepared.tokenizer.vocab_size
    assert store.tokens.dtype == np.uint16
    assert store.num_documents == len(expected)
    assert store.num_bytes == len("".join(expected).encode())
    assert prepared.tokenizer.token_bytes()[store.tokens].sum() == store.num_bytes


def test_the_gzip_mark(corpus: str):
  validation = prepare(corpus, BYTE).validation
  text = b"".join(bytes(ids) for ids in documents(validation))
  mark = 8 * len(gzip.compress(text, 9, mtime=0)) / len(text)
  assert validation.gzip_bits_per_byte == pytest.approx(mark, rel=1e-12)


def test_a_second_call_writes_and_says_nothing(corpus: str, tmp_path: Path):
  lines: list[str] = []
  first = prepare(corpus, BPE, lines.append)
  assert lines
  before = stored(tmp_path / "data")
  lines.clear()
  second = prepare(corpus, BPE, lines.append)
  assert lines == []
  assert stored(tmp_path / "data") == before
  assert second.fingerprint == first.fingerprint
  assert np.array_equal(second.train.tokens, first.train.tokens)


def test_a_second_call_imports_no_tfds(corpus: str):
  prepare(corpus, BPE)
  code = (
    "import sys\n"
    "from flaxlm.config import TokenizerConfig\n"
    "from flaxlm.data.prepare import prepare\n"
    "prepare(sys.argv[1], TokenizerConfig(vocab_size=300))\n"
    "heavy = {'jax', 'tensorflow', 'tensorflow_datasets', 'grain'} & set(sys.modules)\n"
    "assert not heavy, heavy\n"
  )
  subprocess.run([sys.executable, "-c", code, corpus], check=True)


def test_changed_text_is_prepared_again(corpus: str, tmp_path: Path):
  first = prepare(corpus, BPE)
  (tmp_path / "corpus" / "new.txt").write_text("something else\n")
  second = prepare(corpus, BPE)
  assert second.fingerprint != first.fingerprint
  assert "something else\n" in map(
    second.tokenizer.decode, documents(second.train) + documents(second.validation)
  )


def test_preparing_elsewhere_gives_the_same_tokens(
  corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
  first = prepare(corpus, BPE)
  monkeypatch.setenv("FLAXLM_DATA_DIR", str(tmp_path / "elsewhere"))
  second = prepare(corpus, BPE)
  assert second.fingerprint == first.fingerprint
  assert np.array_equal(second.train.tokens, first.train.tokens)


def spoil(tmp_path: Path, damaged: str, damage: str) -> tuple[Path, bytes]:
  """Damages the stored file of this name; returns its path and what it held."""
  (path,) = (tmp_path / "data").rglob(damaged)
  content = path.read_bytes()
  if damage == "delete":
    path.unlink()
  else:
    path.write_bytes(content[:-2] if damage == "truncate" else b"?" * len(content))
  return path, content


@pytest.mark.parametrize(
  "damaged",
  ["train.npy", "validation.npy", "train.bounds.npy", "meta.json", "tokenizers/*.json"],
)
@pytest.mark.parametrize("damage", ["truncate", "garble", "delete"])
def test_damaged_stores_are_built_again(
  corpus: str, tmp_path: Path, damaged: str, damage: str
):
  first = prepare(corpus, BPE)
  expected = documents(first.train)
  path, content = spoil(tmp_path, damaged, damage)
  second = prepare(corpus, BPE)
  if "bounds" not in damaged or damage != "delete":  # what is told by bos is not missed
    assert path.read_bytes() == content
  assert documents(second.train) == expected


def test_what_a_killed_process_left_is_removed(corpus: str, tmp_path: Path):
  check_leftovers(lambda: prepare(corpus, BYTE), tmp_path, "meta.json")


def check_leftovers(prepare: Callable[[], Prepared], tmp_path: Path, missing: str):
  """A folder that was never finished, without its `missing` file, is replaced."""
  fingerprint = prepare().fingerprint
  folder = tmp_path / "data" / "tokens" / fingerprint
  partial = folder.rename(folder.with_suffix(".partial"))
  (partial / missing).unlink()
  assert prepare().fingerprint == fingerprint
  assert [path.name for path in folder.parent.iterdir()] == [fingerprint]


def test_several_processes_at_once(corpus: str):
  code = (
    "import sys\n"
    "from flaxlm.config import TokenizerConfig\n"
    "from flaxlm.data.prepare import prepare\n"
    "print(prepare(sys.argv[1], TokenizerConfig(vocab_size=300)).fingerprint)\n"
  )
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", code, corpus],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for _ in range(3)
  ]
  results = [process.communicate(timeout=60) for process in processes]
  assert [process.returncode for process in processes] == [0, 0, 0]
  assert len({output for output, _ in results}) == 1
  assert sum("tokenizer: bpe" in errors for _, errors in results) == 1  # trained once


def test_a_given_tokenizer(corpus: str, tmp_path: Path):
  tokenizer = train_tokenizer("bpe", ["fox " * 9], 260)
  tokenizer.save(tmp_path / "mine.json")
  prepared = prepare(corpus, TokenizerConfig(path=str(tmp_path / "mine.json")))
  assert prepared.tokenizer.fingerprint == tokenizer.fingerprint
  assert not (tmp_path / "data" / "tokenizers").exists()
  with pytest.raises(DataError, match="cannot read the tokenizer"):
    prepare(corpus, TokenizerConfig(path=str(tmp_path / "none.json")))


def test_more_than_65536_ids_need_wider_tokens(corpus: str, tmp_path: Path):
  state = json.loads(train_tokenizer("byte", [], 0)._backend.to_str())
  vocab = state["model"]["vocab"]
  vocab |= {f"{n:06}": len(vocab) + 1 + n for n in range(2**16)}
  (tmp_path / "wide.json").write_text(json.dumps(state))
  prepared = prepare(corpus, TokenizerConfig(path=str(tmp_path / "wide.json")))
  assert prepared.tokenizer.vocab_size == 2**16 + 257
  assert prepared.train.tokens.dtype == np.uint32
  assert len(prepared.train.tokens) == (
    prepared.train.num_bytes + prepared.train.num_documents
  )


def test_a_data_directory_that_cannot_be_written(
  corpus: str, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setenv("FLAXLM_DATA_DIR", "/proc/flaxlm")
  with pytest.raises(DataError, match="cannot prepare data in /proc/flaxlm") as error:
    prepare(corpus, BYTE)
  assert "FLAXLM_DATA_DIR" in error.value.cure
  assert error.value.exit_code == 3


# -- Pairs, and tokenizers with a mask -----------------------------------------------------


@pytest.fixture
def pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
  """What Django says in German; prepared data go to a directory of the test's own."""
  monkeypatch.setenv("FLAXLM_DATA_DIR", str(tmp_path / "data"))
  return "gettext:de"


def prepare_pairs(corpus: str, cfg: TokenizerConfig = BPE, **arguments) -> Prepared:
  return prepare(corpus, cfg, objective="seq2seq", **arguments)


def stored_pairs(prepared: Prepared, split: str) -> list[tuple[str, str]]:
  store, decode = getattr(prepared, split), prepared.tokenizer.decode
  assert isinstance(store, PairStore)
  sides = (map(decode, documents(side)) for side in (store.source, store.target))
  return list(zip(*sides, strict=True))


@pytest.mark.parametrize("cfg", [BPE, BYTE])
def test_the_store_holds_the_pairs(pairs: str, cfg: TokenizerConfig):
  prepared = prepare_pairs(pairs, cfg)
  found = find_corpus(pairs)
  for split in ("train", "validation"):
    expected = [(p.source, p.target) for p in found.pairs if p.split == split]
    assert stored_pairs(prepared, split) == expected
    store = getattr(prepared, split)
    assert store.source.num_documents == store.target.num_documents == len(expected)
    assert store.num_tokens == len(store.source.tokens) + len(store.target.tokens)
    assert store.source.num_bytes == len("".join(s for s, _ in expected).encode())
    assert store.vocab_size == prepared.tokenizer.vocab_size
    assert store.end_id == prepared.tokenizer.eos_id
    assert store.gzip_bits_per_byte is None


def test_the_tokenizer_of_pairs_knows_both_sides(pairs: str):
  both = prepare_pairs(pairs, TokenizerConfig(vocab_size=1000))
  texts = tuple(zip(*stored_pairs(both, "train"), strict=True))
  for store, other in ((both.train.source, texts[1]), (both.train.target, texts[0])):
    num_tokens = store.num_tokens - store.num_documents
    assert store.num_bytes / num_tokens > 2.4
    of_other_side = train_tokenizer("bpe", other, 1000)
    this = texts[0] if other is texts[1] else texts[1]
    assert num_tokens < 0.9 * sum(map(len, of_other_side.encode_batch(this)))


def test_a_second_call_for_pairs_writes_nothing_and_says_only_what_is_left_out(
  pairs: str, tmp_path: Path
):
  lines: list[str] = []
  first = prepare_pairs(pairs, log=lines.append)
  left_out, prepared = lines[:2]
  assert "; left out are " in left_out and " pairs (" in prepared
  before = stored(tmp_path / "data")
  lines.clear()
  second = prepare_pairs(pairs, log=lines.append)
  assert lines == [left_out]
  assert stored(tmp_path / "data") == before
  assert second.fingerprint == first.fingerprint
  assert np.array_equal(second.train.target.tokens, first.train.target.tokens)


@pytest.mark.parametrize(
  ("damage", "damaged"),
  [
    ("truncate", "train.source.npy"),
    slow("garble", "validation.target.npy"),
    slow("delete", "train.source.npy"),
  ],
)
def test_damaged_pairs_are_built_again(
  pairs: str, tmp_path: Path, damaged: str, damage: str
):
  first = prepare_pairs(pairs, BYTE)
  expected = {split: stored_pairs(first, split) for split in ("train", "validation")}
  path, content = spoil(tmp_path, damaged, damage)
  second = prepare_pairs(pairs, BYTE)
  assert path.read_bytes() == content
  assert {split: stored_pairs(second, split) for split in expected} == expected


def test_what_a_killed_process_left_of_pairs_is_removed(pairs: str, tmp_path: Path):
  check_leftovers(lambda: prepare_pairs(pairs, BYTE), tmp_path, "train.target.npy")


@pytest.mark.parametrize("objective", ["next_token", "masked"])
def test_pairs_are_no_documents(pairs: str, objective: str):
  with pytest.raises(DataError, match="gettext:de is made of pairs") as error:
    prepare(pairs, BYTE, objective=objective)
  assert "data.objective=seq2seq" in error.value.cure


def test_documents_are_no_pairs(corpus: str):
  with pytest.raises(DataError, match="has no pairs of source and target") as error:
    prepare_pairs(corpus)
  assert "pip install Django" in error.value.cure


def test_a_masked_model_has_a_tokenizer_of_its_own(corpus: str, tmp_path: Path):
  plain = prepare(corpus, BPE)
  before = stored(tmp_path / "data")
  masked = prepare(corpus, BPE, objective="masked")
  assert plain.tokenizer.mask_id is None
  assert plain.train.mask_id is None
  mask_id = masked.train.vocab_size - 1
  assert masked.train.mask_id == masked.tokenizer.mask_id == mask_id
  assert masked.train.special_ids == (mask_id - 1, mask_id)
  assert mask_id not in masked.train.tokens
  assert masked.train.gzip_bits_per_byte == plain.train.gzip_bits_per_byte
  # What was there stays, and is found again.
  assert stored(tmp_path / "data").items() >= before.items()
  assert prepare(corpus, BPE).fingerprint == plain.fingerprint


def test_a_given_tokenizer_needs_a_mask(corpus: str, tmp_path: Path):
  path = tmp_path / "mine.json"
  cfg = TokenizerConfig(path=str(path))
  train_tokenizer("byte", [], 0).save(path)
  with pytest.raises(
    DataError, match=r"special token \[MASK\], which .*mine.json"
  ) as error:
    prepare(corpus, cfg, objective="masked")
  assert "--tokenizer.path" in error.value.cure
  train_tokenizer("byte", [], 0, masked=True).save(path)
  assert prepare(corpus, cfg, objective="masked").train.mask_id == 257


def test_keys_of_what_is_stored_do_not_change(corpus: str, tmp_path: Path):
  """Texts that users have prepared are found again: these are the first release's keys."""

  def key(*parts: str | int) -> str:
    return hashlib.sha256(json.dumps([1, *parts]).encode()).hexdigest()[:24]

  prepared, found = prepare(corpus, BYTE), find_corpus(corpus)
  assert prepared.fingerprint == key(found.fingerprint, prepared.tokenizer.fingerprint)
  (path,) = (tmp_path / "data" / "tokenizers").iterdir()
  assert path.stem == key(found.train_fingerprint, "byte", 4096)
  assert path.stem == "c4953ce5820f04719d907fbb"  # the documents' fingerprint too


END = "<|im_end|>"


def chat_tokenizer(path: Path, **specials: Any) -> str:
  """A tokenizer with no bos, as many have: its end of text stands in, also inside texts."""
  backend = train_tokenizer("byte", [], 0)._backend
  backend.encode_special_tokens = False
  backend.add_special_tokens([END])
  imported = ImportedTokenizer(backend, Specials(**{"eos_ids": (257,), **specials}))
  path.mkdir()
  imported.save(path / "tokenizer.json")
  return str(path / "tokenizer.json")


@pytest.fixture
def chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
  monkeypatch.setenv("FLAXLM_DATA_DIR", str(tmp_path / "data"))
  folder = tmp_path / "chats"
  folder.mkdir()
  for n in range(8):
    (folder / f"{n}.txt").write_text(f"hi {END} nr {n}{END}\n" * 3)
  return f"files:{folder}"


def test_documents_begin_where_files_do_and_never_where_an_id_stands(
  chats: str, tmp_path: Path
):
  cfg = TokenizerConfig(path=chat_tokenizer(tmp_path / "t"))
  prepared = prepare(chats, cfg)
  found = find_corpus(chats)
  for split in ("train", "validation"):
    store = getattr(prepared, split)
    expected = [d.read() for d in found.documents if d.split == split]
    assert store.num_documents == len(expected)
    assert documents(store) == list(map(prepared.tokenizer.encode, expected))
    assert (store.tokens[store.bounds[:-1]] == 257).all() and store.end_id == 257
    assert sum(257 in ids for ids in documents(store)) == len(expected)
    assert prepared.tokenizer.token_bytes()[np.concatenate(documents(store))].sum() == (
      store.num_bytes
    )


def test_what_was_stored_before_boundaries_were_is_read_again_or_made_again(
  corpus: str, chats: str, tmp_path: Path
):
  def forget() -> dict[Path, int]:
    for path in (tmp_path / "data").rglob("*.bounds.npy"):
      path.unlink()
    return stored(tmp_path / "data")

  plain = documents(prepare(corpus, BYTE).train)
  before = forget()
  assert documents(prepare(corpus, BYTE).train) == plain
  assert stored(tmp_path / "data") == before  # no text of ours holds a bos
  cfg = TokenizerConfig(path=chat_tokenizer(tmp_path / "t"))
  with_specials = documents(prepare(chats, cfg).train)
  forget()
  assert documents(prepare(chats, cfg).train) == with_specials
  assert len(list((tmp_path / "data").rglob("*.bounds.npy"))) == 2


def test_a_document_ends_with_the_end_of_text_where_it_is_not_the_start(
  chats: str, tmp_path: Path
):
  cfg = TokenizerConfig(path=chat_tokenizer(tmp_path / "t", bos_id=256))
  assert prepare(chats, TokenizerConfig(path=chat_tokenizer(tmp_path / "s"))).train.end_id
  store = prepare(chats, cfg).train  # not what the other made of the same tokenizer.json
  assert (store.tokens[store.bounds[:-1]] == 256).all()
  assert store.end_id == 257
  without = TokenizerConfig(path=chat_tokenizer(tmp_path / "u", bos_id=256, eos_ids=()))
  assert prepare(chats, without).train.end_id == 256


def test_a_whole_corpus(corpus: str, tmp_path: Path):
  tokenizer = train_tokenizer("byte", [], 0)
  tokenizer.save(tmp_path / "mine.json")
  lines: list[str] = []
  store = prepare_whole(corpus, tmp_path / "mine.json", lines.append)
  assert isinstance(store, TokenStore)
  texts = [d.read() for d in find_corpus(corpus, whole=True).documents]
  assert [tokenizer.decode(ids) for ids in documents(store)] == texts
  assert store.num_bytes == len("".join(texts).encode()) and len(texts) == 40
  assert store.gzip_bits_per_byte is not None
  lines.clear()
  prepare_whole(corpus, tmp_path / "mine.json", lines.append)
  assert lines == []


def test_a_long_line_is_announced(corpus: str, tmp_path: Path):
  (tmp_path / "corpus" / "0.txt").write_text("a" * LONG_LINE)
  lines: list[str] = []
  prepare(corpus, BYTE, lines.append)
  (line,) = (line for line in lines if "tokenizing" in line)
  assert "a line of which has 262,144 characters" in line


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory: pytest.TempPathFactory):
  """(what `prepare` makes of the standard library, seconds of a second call)."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("FLAXLM_DATA_DIR", str(tmp_path_factory.mktemp("data")))
    prepared = prepare("stdlib", TokenizerConfig())
    start = time.perf_counter()
    prepare("stdlib", TokenizerConfig())
    yield prepared, time.perf_counter() - start


@pytest.mark.slow
def test_the_standard_library(stdlib: tuple[Prepared, float]):
  prepared, seconds = stdlib
  assert seconds < 2  # 0.12 s where nothing else runs
  assert prepared.tokenizer.vocab_size == 4096
  for store in (prepared.train, prepared.validation):
    assert store.num_bytes / len(store.tokens) > 3.2
  assert prepared.train.num_bytes > 8_000_000
  assert 0.02 < prepared.validation.num_bytes / prepared.train.num_bytes < 0.1
  text = "".join(map(prepared.tokenizer.decode, documents(prepared.train)))
  assert Path(os.__file__).read_text("utf-8") in text
