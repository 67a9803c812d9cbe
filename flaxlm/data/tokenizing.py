# SPDX-License-Identifier: Apache-2.0
"""Writes the tokens of many texts, in several processes if they are long, and goes on where
an earlier process was stopped.

A journal beside the tokens says after each chunk how many documents, tokens and bytes of
text are on disk; what was written after its last line is written again.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from flaxlm.data.corpus import Log
from flaxlm.data.encoding import Encoded, Encoders, encode, num_processors, token_dtype
from flaxlm.strict_json import to_json
from flaxlm.tokenizers import AnyTokenizer

CHUNK_CHARACTERS = 2**22  # tokenized at a time
# Below this, starting processes takes longer than they save.
PARALLEL_CHARACTERS = 2**25
MOST_PROCESSES = 16  # one process reads the texts for all of them
SILENT_SECONDS = 10.0
LONG_LINE = 2**18  # characters: without blanks, this may take a tokenizer seconds


def write_tokens(
  texts: Sequence[str], tokenizer: AnyTokenizer, origin: Path, path: Path, log: Log
) -> dict[str, Any]:
  """Writes the ids of all documents to `path`, a .npy file, and their bounds beside it, to
  NAME.bounds.npy; returns counts. `origin` is the file of the tokenizer."""
  with _Writer(path, tokenizer, len(texts)) as writer:
    if writer.documents:
      log(f"{path.stem}: going on after document {writer.documents:,} of {len(texts):,}")
    left = _announced(texts, writer.documents, path.stem, log)
    characters = num_characters(texts, writer.documents)
    with _encoder(tokenizer, origin, characters) as encode_all:
      for encoded in encode_all(_chunks(left)):
        writer.add(encoded)
    return writer.finish()


def forget_progress(folder: Path) -> None:
  """Deletes what only unfinished arrays need."""
  for path in (*folder.glob("*.lengths"), *folder.glob("*.journal")):
    path.unlink()


def num_characters(texts: Sequence[str], start: int = 0) -> int:
  """The number of characters from a text on, estimated from a thousand texts."""
  step = (len(texts) - start) // 1000 + 1
  return step * sum(len(texts[n]) for n in range(start, len(texts), step))


@contextlib.contextmanager
def _encoder(
  tokenizer: AnyTokenizer, origin: Path, characters: int
) -> Iterator[Callable[[Iterable[list[str]]], Iterator[Encoded]]]:
  """What encodes chunks: this process, or as many as there are processors."""
  number = min(num_processors(), MOST_PROCESSES, characters // CHUNK_CHARACTERS)
  if characters < PARALLEL_CHARACTERS or number == 1:
    yield lambda chunks: (encode(tokenizer, chunk) for chunk in chunks)
    return
  with Encoders(origin, number) as encoders:
    yield encoders.map


def _announced(texts: Sequence[str], start: int, name: str, log: Log) -> Iterator[str]:
  """The texts from `start` on; a line every ten seconds says how far they are, and one at
  once about the first line that is so long that it may take seconds by itself."""
  began = told = time.perf_counter()
  warned = False
  for number in range(start, len(texts)):
    text = texts[number]
    warn = not warned and len(text) >= LONG_LINE and _longest(text) >= LONG_LINE
    now = time.perf_counter()
    if warn or now - told > SILENT_SECONDS:
      told, warned = now, warned or warn
      line = f"{name}: tokenizing document {number + 1:,} of {len(texts):,}"
      if warn:
        line += f", a line of which has {_longest(text):,} characters"
      elif number > start:
        seconds = (now - began) / (number - start) * (len(texts) - number)
        line += f" ({number / len(texts):.0%}, {seconds / 60:.0f} min left)"
      log(line)
    yield text


def _longest(text: str) -> int:
  return max(map(len, text.split("\n")))


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
  chunk: list[str] = []
  size = 0
  for text in texts:
    chunk.append(text)
    size += len(text)
    if size >= CHUNK_CHARACTERS:
      yield chunk
      chunk, size = [], 0
  if chunk:
    yield chunk


class _Writer:
  """A .npy file of tokens that grows, and the lengths of its documents."""

  def __init__(self, path: Path, tokenizer: AnyTokenizer, num_documents: int):
    self._path, self._dtype = path, token_dtype(tokenizer)
    # One tokenizer.json may serve with several bos.
    self._about = [num_documents, tokenizer.bos_id, self._dtype.str]
    self.documents = self.tokens = self.num_bytes = 0

  def __enter__(self) -> "_Writer":
    resumed = self._resume()
    with contextlib.ExitStack() as stack:
      mode = "r+b" if resumed else "w+b"
      self._file: IO[bytes] = stack.enter_context(self._path.open(mode))
      self._lengths: IO[bytes] = stack.enter_context(self._beside("lengths").open(mode))
      self._journal = stack.enter_context(self._beside("journal").open("w"))
      self._write_header()
      for file, size in (
        (self._file, self._file.tell() + self.tokens * self._dtype.itemsize),
        (self._lengths, 8 * self.documents),
      ):
        file.truncate(size)
        file.seek(size)
      self._write_line(self._about)
      self._write_line([self.documents, self.tokens, self.num_bytes])
      self._files = stack.pop_all()
    return self

  def __exit__(self, *_: object) -> None:
    self._files.close()

  def add(self, encoded: Encoded) -> None:
    """Appends a chunk; when this returns it is on disk."""
    for file, raw in (
      (self._file, encoded.tokens),
      (self._lengths, encoded.lengths.tobytes()),
    ):
      file.write(raw)
      file.flush()
      os.fsync(file.fileno())
    self.documents += len(encoded.lengths)
    self.tokens += len(encoded.tokens) // self._dtype.itemsize
    self.num_bytes += encoded.num_bytes
    self._write_line([self.documents, self.tokens, self.num_bytes])

  def finish(self) -> dict[str, Any]:
    """Writes the number of tokens and the bounds; returns the counts."""
    self._file.seek(0)
    self._write_header()
    self._lengths.seek(0)
    lengths = np.frombuffer(self._lengths.read(), np.int64)
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    np.save(self._beside("bounds.npy"), bounds, allow_pickle=False)
    return {
      "num_documents": self.documents,
      "num_tokens": self.tokens,
      "num_bytes": self.num_bytes,
      "gzip_bits_per_byte": None,
    }

  def _beside(self, what: str) -> Path:
    return self._path.with_suffix(f".{what}")

  def _write_header(self) -> None:
    # It is written again when the length is known: NumPy leaves room for it.
    header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.tokens,)}
    np.lib.format.write_array_header_1_0(self._file, header)

  def _write_line(self, values: list[Any]) -> None:
    self._journal.write(to_json(values) + "\n")
    self._journal.flush()

  def _resume(self) -> bool:
    """Takes over the last counts of the journal; False if there are none that fit."""
    with contextlib.suppress(OSError, ValueError, TypeError, IndexError):
      about, *counts = map(json.loads, self._beside("journal").read_text().splitlines())
      sizes = [path.stat().st_size for path in (self._path, self._beside("lengths"))]
      documents, tokens, num_bytes = counts[-1]
      whole = sizes[0] > tokens * self._dtype.itemsize and sizes[1] >= 8 * documents
      if about == self._about and whole and documents:
        self.documents, self.tokens, self.num_bytes = documents, tokens, num_bytes
        return True
    return False
