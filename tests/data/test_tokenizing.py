# SPDX-License-Identifier: Apache-2.0
"""Tokenizing by several processes, and after an interruption, gives the same arrays."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from flaxlm.config import TokenizerConfig
from flaxlm.data import encoding, tokenizing
from flaxlm.data.encoding import Encoders, encode, token_dtype
from flaxlm.data.prepare import prepare
from flaxlm.data.tokenizing import write_tokens
from flaxlm.errors import DataError
from flaxlm.tokenizers import Tokenizer, train_tokenizer

TEXTS = [f"text {n} é\n" * (n % 5) + "half \ud800" * (n == 7) for n in range(50)]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(tokenizing, "CHUNK_CHARACTERS", 100)


@pytest.fixture
def origin(tmp_path: Path) -> Path:
  train_tokenizer("bpe", TEXTS, 300).save(tmp_path / "t.json")
  return tmp_path / "t.json"


def write(folder: Path, origin: Path, texts: Sequence[str] = TEXTS, said=None):
  """(what is written, by its name; the counts)."""
  folder.mkdir(exist_ok=True)
  tokenizer = Tokenizer.load(origin)
  log = [].append if said is None else said.append
  about = write_tokens(texts, tokenizer, origin, folder / "train.npy", log)
  arrays = [np.load(folder / name).tolist() for name in ("train.npy", "train.bounds.npy")]
  return arrays, about


def expected(origin: Path):
  tokenizer = Tokenizer.load(origin)
  ids = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in TEXTS]
  bounds = np.cumsum([0, *map(len, ids)]).tolist()
  size = sum(len(text.encode("utf-8", "replace")) for text in TEXTS)
  about = {"num_documents": 50, "num_tokens": bounds[-1], "num_bytes": size}
  return [np.concatenate(ids).tolist(), bounds], about | {"gzip_bits_per_byte": None}


def test_chunks_add_up(tmp_path: Path, origin: Path, small_chunks: None):
  assert write(tmp_path / "a", origin) == expected(origin)


def test_several_processes_write_the_same(
  tmp_path: Path, origin: Path, small_chunks: None, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr(tokenizing, "PARALLEL_CHARACTERS", 0)
  monkeypatch.setattr(tokenizing, "num_processors", lambda: 2)
  monkeypatch.setattr(tokenizing, "encode", None)  # not in this process
  assert write(tmp_path / "a", origin) == expected(origin)


def test_a_process_that_ends_is_told(origin: Path):
  tokenizer = Tokenizer.load(origin)
  with Encoders(origin, 1) as encoders:
    (encoded,) = encoders.map([["a", ""]])
    one = encode(tokenizer, ["a", ""])
    assert encoded.tokens == one.tokens and encoded.num_bytes == one.num_bytes == 1
    assert encoded.lengths.tolist() == one.lengths.tolist() == [2, 1]
    assert len(one.tokens) == 3 * token_dtype(tokenizer).itemsize
    (process,) = encoders._processes
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(DataError, match=r"that tokenizes has ended \(-9\)"):
      list(encoders.map([["a"]]))


def test_a_process_ends_quietly_with_the_program_that_started_it(origin: Path):
  with subprocess.Popen(
    [sys.executable, "-m", "flaxlm.data.encoding", str(origin)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
  ) as process:
    assert process.stdout is not None and process.stdin is not None
    process.stdout.close()
    encoding._send(process.stdin, ["text"])
    assert process.communicate()[1] == b"" and process.returncode == 0


class Interrupted(Sequence[str]):
  """Texts that are read up to a number, and then raise."""

  def __init__(self, until: int, error: type[BaseException]):
    self.until, self.error = until, error

  def __len__(self) -> int:
    return len(TEXTS)

  def __getitem__(self, index):
    if index >= self.until:
      raise self.error
    return TEXTS[index]


@pytest.mark.parametrize("damage", ["", "tokens", "lengths", "journal", "cut", "bos"])
def test_it_goes_on_where_it_was_stopped(
  tmp_path: Path,
  origin: Path,
  small_chunks: None,
  monkeypatch: pytest.MonkeyPatch,
  damage: str,
):
  """Or begins anew where what is left cannot be trusted; what is done is not read again."""
  monkeypatch.setattr(tokenizing, "num_characters", lambda *_: 0)
  folder, said = tmp_path / "a", list[str]()
  with pytest.raises(KeyboardInterrupt):
    write(folder, origin, Interrupted(40, KeyboardInterrupt))
  journal = folder / "train.journal"
  _, *counts = map(json.loads, journal.read_text().splitlines())
  documents, tokens, _ = counts[-1]
  assert 30 < documents < 40 and len(counts) > 5
  # More was written than the journal says.
  for name in ("train.npy", "train.lengths"):
    with (folder / name).open("ab") as file:
      file.write(b"\x01" * 1000)
  if damage in ("tokens", "lengths"):
    path = folder / {"tokens": "train.npy", "lengths": "train.lengths"}[damage]
    path.write_bytes(path.read_bytes()[:50])
  elif damage == "journal":
    journal.write_text("?")
  elif damage == "cut":  # in the middle of a line
    journal.write_text(journal.read_text()[:-3])
  elif damage == "bos":
    bos_id = Tokenizer.load(origin).bos_id
    other = journal.read_text().replace(f" {bos_id},", f" {bos_id - 1},", 1)
    journal.write_text(other)
  read: list[int] = []

  class Read(Interrupted):
    def __getitem__(self, index):
      read.append(index)
      return TEXTS[index]

  assert write(folder, origin, Read(50, KeyError), said) == expected(origin)
  assert read == list(range(0 if damage else documents, 50))
  going_on = f"train: going on after document {documents} of 50"
  assert said == ([] if damage else [going_on]) and tokens


def test_a_killed_preparation_goes_on(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_chunks: None
):
  """By the same command, with the same result; after an error nothing is left."""
  monkeypatch.setenv("FLAXLM_DATA_DIR", str(tmp_path / "data"))
  (tmp_path / "c").mkdir()
  for n, text in enumerate(TEXTS):
    (tmp_path / "c" / f"{n}.txt").write_text(text.encode("utf-8", "replace").decode() + "!")
  corpus, cfg = f"files:{tmp_path / 'c'}", TokenizerConfig(vocab_size=300)
  add, said = tokenizing._Writer.add, list[str]()

  def stop(error: type[BaseException]):
    def add_and_stop(self, encoded):
      add(self, encoded)
      if self.documents > 20:
        raise error

    return add_and_stop

  tokens = tmp_path / "data" / "tokens"
  for error, left in ((KeyboardInterrupt, 1), (DataError("x"), 0), (SystemExit, 1)):
    with monkeypatch.context() as patch:
      patch.setattr(tokenizing._Writer, "add", stop(error))
      with pytest.raises(error if isinstance(error, type) else DataError):
        prepare(corpus, cfg, said.append)
    assert len([*tokens.iterdir()]) == left
  assert not any("going on" in line for line in said[:3])
  resumed = prepare(corpus, cfg, said.append)
  assert any("train: going on after document 2" in line for line in said)
  assert [path.name for path in tokens.iterdir()] == [resumed.fingerprint]
  assert {path.suffix for path in (tokens / resumed.fingerprint).iterdir()} == {
    ".npy",
    ".json",
  }
  monkeypatch.setenv("FLAXLM_DATA_DIR", str(tmp_path / "other"))
  whole = prepare(corpus, cfg)
  assert np.array_equal(whole.train.tokens, resumed.train.tokens)
  assert np.array_equal(whole.train.bounds, resumed.train.bounds)


def test_progress_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, origin: Path):
  monkeypatch.setattr(tokenizing, "SILENT_SECONDS", 0.0)
  seconds = iter(range(10**6))
  monkeypatch.setattr(time, "perf_counter", lambda: 60.0 * next(seconds))
  said: list[str] = []
  write(tmp_path / "a", origin, said=said)
  assert said[25] == "train: tokenizing document 26 of 50 (50%, 26 min left)"
