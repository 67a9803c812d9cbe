# SPDX-License-Identifier: Apache-2.0
"""Texts to ids, in this process or in several.

A process of `Encoders` runs this file: it reads chunks of texts from its standard input and
writes what they become to its standard output, until the input ends. So nothing depends on
how the program was started that tokenizes, which may have threads and no main module.
"""

import contextlib
import os
import queue
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from flaxlm.errors import DataError, first_line
from flaxlm.tokenizers import AnyTokenizer, load_tokenizer

_HEAD = struct.Struct("<3q")  # documents, bytes of tokens (-1: of an error), bytes of text


class Encoded(NamedTuple):
  """A chunk of documents as ids: each begins with bos."""

  tokens: bytes  # of `token_dtype`
  lengths: np.ndarray  # int64: the tokens of each document, its bos included
  num_bytes: int  # of text


def token_dtype(tokenizer: AnyTokenizer) -> np.dtype:
  return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


def encode(tokenizer: AnyTokenizer, texts: Sequence[str]) -> Encoded:
  """The ids of a chunk of texts."""
  dtype = token_dtype(tokenizer)
  bos = np.array([tokenizer.bos_id], dtype).tobytes()
  ids_of = tokenizer.encode_batch(texts)
  tokens = b"".join(bos + ids.astype(dtype).tobytes() for ids in ids_of)
  lengths = np.array([1 + len(ids) for ids in ids_of], np.int64)
  return Encoded(tokens, lengths, sum(len(x.encode("utf-8", "replace")) for x in texts))


def num_processors() -> int:
  """How many this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


class Encoders:
  """Processes that encode, with the tokenizer of a file. Use it in a `with` statement."""

  def __init__(self, tokenizer: Path, number: int):
    # The library would start as many threads in each. The path is that of this process,
    # wherever it was started.
    environment = {
      "TOKENIZERS_PARALLELISM": "false",
      "PYTHONPATH": os.pathsep.join(sys.path),
    }
    self._processes = [
      subprocess.Popen(
        [sys.executable, "-m", "flaxlm.data.encoding", str(tokenizer)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | environment,
        start_new_session=True,  # an interrupt of the terminal is not meant for them
      )
      for _ in range(number)
    ]
    self._idle = queue.SimpleQueue[subprocess.Popen[bytes]]()
    for process in self._processes:
      self._idle.put(process)
    self._threads = ThreadPoolExecutor(number)

  def __enter__(self) -> "Encoders":
    return self

  def __exit__(self, *_: object) -> None:
    for process in self._processes:
      process.kill()
    self._threads.shutdown(cancel_futures=True)
    for process in self._processes:
      process.communicate()

  def map(self, chunks: Iterable[Sequence[str]]) -> Iterator[Encoded]:
    """The chunks in their order, encoded; as many as there are processes are read ahead.

    Raises `DataError` for a text that cannot be encoded, or if a process ends.
    """
    waiting = deque[Future[Encoded]]()
    for chunk in chunks:
      waiting.append(self._threads.submit(self._encode, chunk))
      if len(waiting) > len(self._processes):
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()

  def _encode(self, chunk: Sequence[str]) -> Encoded:
    process = self._idle.get()
    assert process.stdin is not None and process.stdout is not None
    try:
      _send(process.stdin, chunk)
      encoded = _receive(process.stdout)
    except (OSError, EOFError) as e:
      raise DataError(
        f"a process that tokenizes has ended ({process.wait()}): {first_line(e)}",
        "start again: what is tokenized is kept; a machine may lack memory",
      ) from e
    self._idle.put(process)
    return encoded


def main() -> None:
  """What a process of `Encoders` does; it ends when nobody reads on."""
  try:
    _serve()
  except BrokenPipeError:  # the program was killed; Python would flush what is left
    os._exit(0)


def _serve() -> None:
  texts_in, out = sys.stdin.buffer, sys.stdout.buffer
  tokenizer = load_tokenizer(Path(sys.argv[1]))
  while chunk := _texts(texts_in):
    try:
      encoded = encode(tokenizer, chunk)
    except DataError as e:
      message = f"{e.cause}\n{e.cure}".encode()
      out.write(_HEAD.pack(len(message), -1, 0) + message)
    else:
      out.write(_HEAD.pack(len(chunk), len(encoded.tokens), encoded.num_bytes))
      out.write(encoded.lengths.tobytes())
      out.write(encoded.tokens)
    out.flush()


def _send(file: IO[bytes], texts: Sequence[str]) -> None:
  raws = [text.encode("utf-8", "replace") for text in texts]
  file.write(struct.pack("<q", len(raws)))
  file.write(np.array([len(raw) for raw in raws], np.int64).tobytes())
  file.write(b"".join(raws))
  file.flush()


def _texts(file: IO[bytes]) -> list[str]:
  """The next chunk; none at the end of the input."""
  with contextlib.suppress(EOFError):
    (number,) = struct.unpack("<q", _read(file, 8))
    ends = np.cumsum(np.frombuffer(_read(file, 8 * number), np.int64)).tolist()
    raw = _read(file, ends[-1])
    starts = [0, *ends[:-1]]
    return [raw[start:end].decode() for start, end in zip(starts, ends, strict=True)]
  return []


def _receive(file: IO[bytes]) -> Encoded:
  number, size, num_bytes = _HEAD.unpack(_read(file, _HEAD.size))
  if size < 0:
    cause, _, cure = _read(file, number).decode().partition("\n")
    raise DataError(cause, cure)
  lengths = np.frombuffer(_read(file, 8 * number), np.int64)
  return Encoded(_read(file, size), lengths, num_bytes)


def _read(file: IO[bytes], size: int) -> bytes:
  raw = file.read(size)
  if len(raw) < size:
    raise EOFError(f"{len(raw)} of {size} bytes")
  return raw


if __name__ == "__main__":
  main()
