# SPDX-License-Identifier: Apache-2.0
"""Text to tokens, once: a corpus becomes one long array of ids per split, on disk.

Each document is `bos` and its ids, documents follow one another in a fixed order. What
was prepared is found again by the fingerprints of the corpus and of the tokenizer, and
then costs no more than hashing the corpus.
"""

import contextlib
import hashlib
import json
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flaxlm.config import TokenizerConfig
from flaxlm.data.sources import (
  SPLITS,
  Corpus,
  Log,
  data_dir,
  find_corpus,
  locked,
  to_stderr,
)
from flaxlm.errors import DataError
from flaxlm.tokenizers import Tokenizer, train_tokenizer

# Enters the keys of all that is stored: raise it when this file stores anything else,
# or `train_tokenizer` makes another tokenizer from the same texts.
_FORMAT = 1
CHUNK_CHARACTERS = 2**22  # tokenized at a time
# A tokenizer is trained on pieces spread evenly over the corpus. On the standard
# library with 4,096 ids that takes a sixth of the time that all of it takes, and makes
# 3.56 bytes per held-out token instead of 3.58.
SAMPLE_CHARACTERS_PER_ID = 512
SAMPLE_PIECE = 4096


@dataclass(frozen=True)
class TokenStore:
  """The tokens of a split: one array, mapped from disk; bos begins each document."""

  tokens: np.ndarray
  bos_id: int
  vocab_size: int  # every token is below it
  num_documents: int
  num_bytes: int  # of text
  gzip_bits_per_byte: float | None  # of the text under `gzip -9`; validation only


@dataclass(frozen=True)
class Prepared:
  """A corpus ready to be cut into batches."""

  tokenizer: Tokenizer
  train: TokenStore
  validation: TokenStore
  fingerprint: str


def prepare(corpus: str | Corpus, cfg: TokenizerConfig, log: Log = to_stderr) -> Prepared:
  """The tokens of a corpus, found or to be found, from the store if they are there.

  Several processes may call this at once: one prepares, the others wait. `log` takes
  lines about progress. Raises `DataError`.
  """
  found = find_corpus(corpus, log) if isinstance(corpus, str) else corpus
  root = data_dir()
  prepared = _find(found, cfg, root)
  if prepared is not None:
    return prepared
  with locked(root, log):
    prepared = _find(found, cfg, root)  # another process may have been faster
    if prepared is None:
      _build(found, cfg, root, log)
      prepared = _find(found, cfg, root)
  assert prepared is not None, "just built"
  return prepared


def _tokenizer_path(corpus: Corpus, cfg: TokenizerConfig, root: Path) -> Path:
  """The tokenizer.json given, or where the one trained on this corpus is kept."""
  if cfg.path is not None:
    return Path(cfg.path)
  key = _key(corpus.train_fingerprint, cfg.kind, cfg.vocab_size)
  return root / "tokenizers" / f"{key}.json"


def _find(corpus: Corpus, cfg: TokenizerConfig, root: Path) -> Prepared | None:
  """What was prepared before, if it is there and whole."""
  try:
    tokenizer = Tokenizer.load(_tokenizer_path(corpus, cfg, root))
  except DataError:
    if cfg.path is not None:
      raise
    return None
  fingerprint = _key(corpus.fingerprint, tokenizer.fingerprint)
  folder = root / "tokens" / fingerprint
  try:
    meta = json.loads((folder / "meta.json").read_text())
    train, validation = (_open(folder, meta, split, tokenizer) for split in SPLITS)
  except (OSError, ValueError, KeyError, TypeError):
    return None
  return Prepared(tokenizer, train, validation, fingerprint)


def _open(
  folder: Path, meta: dict[str, Any], split: str, tokenizer: Tokenizer
) -> TokenStore:
  """A stored split. Raises `ValueError` unless it is as long as `meta` says."""
  about = meta[split]
  tokens = np.load(folder / f"{split}.npy", mmap_mode="r")
  if len(tokens) != about["num_tokens"]:
    raise ValueError(f"{len(tokens)} tokens instead of {about['num_tokens']}")
  return TokenStore(
    tokens,
    tokenizer.bos_id,
    tokenizer.vocab_size,
    about["num_documents"],
    about["num_bytes"],
    about["gzip_bits_per_byte"],
  )


def _build(corpus: Corpus, cfg: TokenizerConfig, root: Path, log: Log) -> None:
  """Trains the tokenizer if there is none, then tokenizes both splits."""
  start = time.perf_counter()
  texts = {split: corpus.read(split, root / "tfds") for split in SPLITS}
  counts = ", ".join(f"{len(texts[split]):,} {split}" for split in SPLITS)
  log(f"{corpus.name}: {counts} documents ({time.perf_counter() - start:.1f} s)")
  tokenizer = _load_or_train(corpus, texts["train"], cfg, root, log)
  folder = root / "tokens" / _key(corpus.fingerprint, tokenizer.fingerprint)
  with _new_folder(folder) as partial:
    meta: dict[str, Any] = {"corpus": corpus.name, "format": _FORMAT}
    for split in SPLITS:
      start = time.perf_counter()
      about = meta[split] = _tokenize(texts[split], tokenizer, partial / f"{split}.npy")
      if not about["num_bytes"]:
        raise DataError(f"the {split} split of {corpus.name} has no text")
      if split == "validation":
        about["gzip_bits_per_byte"] = _gzip_bits_per_byte(texts[split])
      log(
        f"{split}: {about['num_tokens']:,} tokens of {about['num_bytes']:,} bytes "
        f"({time.perf_counter() - start:.1f} s)"
      )
    (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def _load_or_train(
  corpus: Corpus, texts: Sequence[str], cfg: TokenizerConfig, root: Path, log: Log
) -> Tokenizer:
  path = _tokenizer_path(corpus, cfg, root)
  with contextlib.suppress(DataError):  # none yet, or damaged; a given one is whole
    return Tokenizer.load(path)
  start = time.perf_counter()
  sample = _sample(texts, cfg.vocab_size * SAMPLE_CHARACTERS_PER_ID)
  tokenizer = train_tokenizer(cfg.kind, sample, cfg.vocab_size)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix(".partial")
  tokenizer.save(partial)
  partial.replace(path)
  seconds = time.perf_counter() - start
  log(f"tokenizer: {cfg.kind}, {tokenizer.vocab_size:,} ids ({seconds:.1f} s)")
  return tokenizer


def _sample(texts: Sequence[str], size: int) -> Iterator[str]:
  """About `size` characters of `texts`, in pieces as evenly spaced as can be."""
  step = len(texts) // 1000 + 1
  total = step * sum(len(texts[n]) for n in range(0, len(texts), step))
  stride = max(SAMPLE_PIECE, SAMPLE_PIECE * total // size)
  start = 0
  for text in texts:
    yield from (text[n : n + SAMPLE_PIECE] for n in range(start, len(text), stride))
    start = (start - len(text)) % stride


def _tokenize(texts: Sequence[str], tokenizer: Tokenizer, path: Path) -> dict[str, Any]:
  """Writes the ids of all documents to a .npy file; returns the counts."""
  dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
  bos = np.array([tokenizer.bos_id], dtype)
  num_tokens = num_bytes = 0
  with path.open("wb") as file:
    # NumPy leaves room in the header for the length to grow: it is written twice.
    header = {"descr": dtype.str, "fortran_order": False, "shape": (0,)}
    np.lib.format.write_array_header_1_0(file, header)
    for chunk in _chunks(texts):
      num_bytes += sum(len(text.encode("utf-8", "replace")) for text in chunk)
      for ids in tokenizer.encode_batch(chunk):
        file.write(bos.tobytes() + ids.astype(dtype).tobytes())
        num_tokens += 1 + len(ids)
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, header | {"shape": (num_tokens,)})
  return {
    "num_documents": len(texts),
    "num_tokens": num_tokens,
    "num_bytes": num_bytes,
    "gzip_bits_per_byte": None,
  }


def _chunks(texts: Sequence[str]) -> Iterator[list[str]]:
  chunk: list[str] = []
  size = 0
  for text in texts:
    chunk.append(text)
    size += len(text)
    if size >= CHUNK_CHARACTERS:
      yield chunk
      chunk, size = [], 0
  yield chunk


def _gzip_bits_per_byte(texts: Sequence[str]) -> float:
  """What `gzip -9` makes of the text: the mark that a language model has to beat."""
  gzip = zlib.compressobj(9, wbits=31)
  num_bytes = compressed = 0
  for text in texts:
    raw = text.encode("utf-8", "replace")
    num_bytes += len(raw)
    compressed += len(gzip.compress(raw))
  return 8 * (compressed + len(gzip.flush())) / num_bytes


def _key(*parts: Any) -> str:
  """A short name for all that a stored result depends on."""
  return hashlib.sha256(json.dumps([_FORMAT, *parts]).encode()).hexdigest()[:24]


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
  """A folder that gets its name when it is complete, in place of a damaged one."""
  partial = folder.with_suffix(".partial")  # ours alone: `locked`
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  yield partial
  shutil.rmtree(folder, ignore_errors=True)
  partial.rename(folder)
