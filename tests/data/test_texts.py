# SPDX-License-Identifier: Apache-2.0
"""Corpora of records and of compressed files: each text once, wholly in one split."""

import gzip
import hashlib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from flaxlm.config import TokenizerConfig
from flaxlm.data.corpus import SPLITS, WHOLE
from flaxlm.data.files import DOCUMENT_BYTES
from flaxlm.data.prepare import prepare, prepare_whole
from flaxlm.data.sources import find_corpus, read_documents, read_pairs
from flaxlm.data.stores import TokenStore
from flaxlm.errors import DataError
from flaxlm.tokenizers import train_tokenizer

ZSTD = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"


@pytest.fixture(autouse=True)
def own_data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
  monkeypatch.setenv("FLAXLM_DATA_DIR", str(tmp_path / "data"))
  return tmp_path / "data"


def lines(texts: Sequence[Any], field: str = "text") -> bytes:
  return "".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts).encode()


def table(texts: Sequence[Any], field: str = "text") -> bytes:
  pyarrow = pytest.importorskip("pyarrow")
  file = io.BytesIO()
  columns = pyarrow.table({"id": range(len(texts)), field: texts})
  pytest.importorskip("pyarrow.parquet").write_table(columns, file)
  return file.getvalue()


def write(root: Path, files: dict[str, bytes]) -> str:
  for name, content in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
  return f"files:{root}"


def read(name: str, data: Path, said: list[str] | None = None, **options: Any):
  """{split: its texts} of a corpus."""
  log = [].append if said is None else said.append
  corpus = find_corpus(name, log, **options)
  return {split: list(read_documents(corpus, split, data, log)) for split in corpus.splits}


def is_held_out(text: str) -> bool:
  raw = text.encode("utf-8", "replace")
  return int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") % 20 == 0


TEXTS = [f"text {n} é\n\u2028" * (1 + n % 3) for n in range(200)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "jsonl.gz", "jsonl.zst"])
def test_each_record_is_a_document_of_one_split(
  tmp_path: Path, own_data_dir: Path, kind: str
):
  content = table(TEXTS) if kind == "parquet" else lines(TEXTS)
  if kind.endswith(".gz"):
    content = gzip.compress(content)
  elif kind.endswith(".zst"):
    content = pytest.importorskip(ZSTD).compress(content)
  corpus = write(tmp_path / "c", {f"a.{kind}": content})
  found = read(corpus, own_data_dir)
  assert found["validation"] == [text for text in TEXTS if is_held_out(text)]
  assert found["train"] == [text for text in TEXTS if not is_held_out(text)]
  assert 3 < len(found["validation"]) < 20
  assert read(corpus, own_data_dir, whole=True) == {WHOLE: TEXTS}


def test_folders_of_everything(tmp_path: Path, own_data_dir: Path):
  """Texts and records, compressed and not; some have the name of a split."""
  long = "".join(f"line {n} é\n" for n in range(5 * DOCUMENT_BYTES // 12))
  files = {
    "train/a.txt": b"a",
    "train/long.md.gz": gzip.compress(long.encode()),
    "validation/b.txt.gz": gzip.compress(b"b"),
    "validation-00000-of-00002.jsonl": lines(["c", "d"]),
    "train.jsonl.gz": gzip.compress(lines(["e"])),
    "train-00001-of-00002.parquet": table(["f"]),
    "x.jsonl": lines(TEXTS),
  }
  said: list[str] = []
  found = read(write(tmp_path / "c", files), own_data_dir, said)
  texts = [text for text in found["train"] if len(text) < 1000]
  cut = [text for text in found["train"] if len(text) >= 1000]
  assert "".join(cut) == long and len(cut) == 6
  assert all(text.endswith("\n") for text in cut)
  assert set(texts) - set(TEXTS) == {"a", "e", "f"}
  assert set(found["validation"]) - set(TEXTS) == {"b", "c", "d"}
  assert len(texts) + len(found["validation"]) == 6 + len(TEXTS)
  assert said == []


@pytest.mark.parametrize(
  ("files", "train", "validation"),
  [
    ({"a.jsonl": ["x", "y"]}, 1, 1),  # the smallest hash is held out
    ({"train.jsonl": TEXTS}, 191, 9),  # the only one: its name says nothing
    ({"train.jsonl": ["x"], "b.jsonl": ["y"]}, 1, 1),
    ({"a.jsonl": ["x", "x", "y", "y", "y"]}, 3, 2),  # what is the same stays together
  ],
)
def test_both_splits_have_text(
  tmp_path: Path,
  own_data_dir: Path,
  files: dict[str, list[str]],
  train: int,
  validation: int,
):
  contents = {name: lines(texts) for name, texts in files.items()}
  found = read(write(tmp_path / "c", contents), own_data_dir)
  assert [len(found[split]) for split in SPLITS] == [train, validation]
  assert not set(found["train"]) & set(found["validation"])


def test_what_is_no_record_is_counted_and_the_first_named(
  tmp_path: Path, own_data_dir: Path
):
  content = lines(TEXTS[:9]) + b'\n{"text": \n' + lines(["", None, "last"]) + b"\xff\n"
  corpus = write(tmp_path / "c", {"a.jsonl": content})
  said: list[str] = []
  found = read(corpus, own_data_dir, said)
  assert sorted(found["train"] + found["validation"]) == sorted([*TEXTS[:9], "last"])
  (line,) = said
  path = tmp_path / "c" / "a.jsonl"
  assert line.startswith(
    f"{corpus}: 4 records skipped, the first is {path}, line 11: not J"
  )


def test_what_was_skipped_is_told_again_from_the_cache(tmp_path: Path):
  """Of the files where they lie now: their place is no part of the fingerprint."""
  half = rb'{"text": "\ud83d"}' + b"\n"
  first = write(tmp_path / "c", {"b.jsonl": lines(TEXTS) + half * 2})
  told = []
  for corpus in (first, first, write(tmp_path / "d", {"b.jsonl": lines(TEXTS) + half * 2})):
    said: list[str] = []
    prepare(corpus, TokenizerConfig(kind="byte"), said.append)
    told.append([line for line in said if "records skipped" in line])
  assert not any("tokens of" in line for line in said)
  where = [f"{tmp_path / name / 'b.jsonl'}, line {len(TEXTS) + 1}: not U" for name in "cd"]
  for found, path in zip(told, (where[0], where[0], where[1]), strict=True):
    (line,) = found
    assert f"2 records skipped, the first is {path}" in line


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("texts", [["a", "b"], [["a"], ["b"]]])
def test_a_record_without_its_field_is_refused(
  tmp_path: Path, own_data_dir: Path, kind: str, texts: list[Any]
):
  has_field = isinstance(texts[0], list)
  make = table if kind == "parquet" else lines
  corpus = write(tmp_path / "c", {f"a.{kind}": make(texts, "text" if has_field else "t")})
  with pytest.raises(DataError) as error:
    read(corpus, own_data_dir)
  where = f"{tmp_path}/c/a.{kind}, {'row' if kind == 'parquet' else 'line'} 1"
  assert error.value.cause.startswith(where)
  expected = (
    "'text' is ['a'], which is no text"
    if has_field
    else "has no field 'text', but 'id', 't'"
  )
  assert expected in error.value.cause
  assert "--data.text-field" in error.value.cure
  if not has_field:
    found = read(corpus, own_data_dir, text_field="t")
    assert sorted(found["train"] + found["validation"]) == ["a", "b"]


def test_too_few_records(tmp_path: Path, own_data_dir: Path):
  for name, content in {"one": lines(["x"]), "none": b"{}]\n", "same": lines("xx")}.items():
    with pytest.raises(DataError, match="is too small: no ") as error:
      read(write(tmp_path / name, {"a.jsonl": content}), own_data_dir)
    assert ("a.jsonl, line 1: not JSON" in error.value.cause) == (name == "none")
    assert ("mend these" in error.value.cure) == (name == "none")
    assert not [*own_data_dir.rglob("*.bin")], "nothing unfinished is left"


@pytest.mark.parametrize(
  "content",
  [b"\x1f\x8bgarbage", gzip.compress(b"a" * 9999, mtime=0)[:-9]],
  ids=["garbage", "cut short"],
)
def test_damaged_compressed_texts_are_counted(
  tmp_path: Path, own_data_dir: Path, content: bytes
):
  files = {f"{n}.txt": b"text" for n in range(3)} | {"bad.txt.gz": content}
  said: list[str] = []
  found = read(write(tmp_path / "c", files), own_data_dir, said)
  assert len(found["train"] + found["validation"]) == 3
  assert "files that cannot be read" in said[0] and "as bad.txt.gz" in said[0]


def test_a_single_compressed_text_is_cut(tmp_path: Path, own_data_dir: Path):
  text = "".join(f"line {n}\n" for n in range(1000))
  write(tmp_path / "c", {"a.txt.gz": gzip.compress(text.encode())})
  found = read(f"files:{tmp_path}/c/a.txt.gz", own_data_dir)
  assert found["train"][0] + found["validation"][0] == text
  assert len(found["validation"][0]) / len(text) == pytest.approx(0.05, abs=0.002)


def test_records_are_tokenized_as_other_texts(tmp_path: Path):
  corpus = write(tmp_path / "c", {"a.jsonl": lines(TEXTS)})
  prepared = prepare(corpus, TokenizerConfig(kind="byte"))
  store = prepared.train
  assert isinstance(store, TokenStore)
  texts = [text for text in TEXTS if not is_held_out(text)]
  starts = zip(store.bounds[:-1], store.bounds[1:], strict=True)
  decode = prepared.tokenizer.decode
  assert [decode(store.tokens[a + 1 : b].tolist()) for a, b in starts] == texts
  train_tokenizer("byte", [], 0).save(tmp_path / "t.json")
  whole = prepare_whole(corpus, tmp_path / "t.json")
  assert isinstance(whole, TokenStore) and whole.num_documents == len(TEXTS)
  again: list[str] = []
  prepare(corpus, TokenizerConfig(kind="byte"), again.append)
  assert again == []


def test_the_field_is_a_part_of_the_fingerprint(tmp_path: Path):
  corpus = write(tmp_path / "c", {"a.jsonl": lines(TEXTS)})
  prints = {find_corpus(corpus, text_field=name).fingerprint for name in ("text", "id")}
  assert len(prints) == 2


def test_records_are_no_pairs(tmp_path: Path, own_data_dir: Path):
  found = find_corpus(write(tmp_path / "c", {"a.jsonl": lines(TEXTS)}))
  with pytest.raises(DataError, match="has no pairs"):
    read_pairs(found, "train", own_data_dir)
