# SPDX-License-Identifier: Apache-2.0
"""The tokens of a corpus on disk: written once, and opened.

Each document is `bos` and its ids; documents follow one another in a fixed order. Where
each begins is stored beside the ids: tokenizers of others may find `bos` inside of a text
too. A corpus of pairs becomes two such arrays, of the sources and of the targets. Of
conversations each token's weight in the loss is stored too, and a chat template writes all
of their special tokens.
"""

import json
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flaxlm.chat.templates import Chat
from flaxlm.config import TALKS
from flaxlm.data.conversations import write_lessons
from flaxlm.data.corpus import WHOLE, Log
from flaxlm.data.plans import FORMAT, SIDES, Plan
from flaxlm.data.storage import new_folder
from flaxlm.data.stores import PairStore, Store, TokenStore
from flaxlm.data.tokenizer_of import load_or_train
from flaxlm.data.tokenizing import forget_progress, write_tokens
from flaxlm.errors import DataError
from flaxlm.strict_json import to_json
from flaxlm.tokenizers import MASK, AnyTokenizer, load_tokenizer


class Found(NamedTuple):
  """What is stored of a corpus."""

  tokenizer: AnyTokenizer
  stores: tuple[Store, ...]  # one of each split
  fingerprint: str
  chat: Chat | None


def find_stored(plan: Plan) -> Found | None:
  """What was prepared before, if it is complete; else None."""
  try:
    tokenizer = load_tokenizer(plan.tokenizer_path)
  except DataError:
    if plan.cfg.path is not None:
      raise
    return None
  if plan.objective == "masked" and tokenizer.mask_id is None:
    raise DataError(
      f"data.objective=masked needs the special token {MASK}, which "
      f"{plan.tokenizer_path} does not have",
      "add it, or leave --tokenizer.path out to train one",
    )
  fingerprint = plan.fingerprint(tokenizer)
  folder = plan.root / "tokens" / fingerprint
  try:
    meta = json.loads((folder / "meta.json").read_text())
    stores = tuple(
      _open_split(plan.objective, folder, meta, split, tokenizer)
      for split in plan.corpus.splits
    )
  except (OSError, ValueError, KeyError, TypeError):
    return None
  return Found(tokenizer, stores, fingerprint, plan.chat_for(tokenizer))


def _open_split(
  objective: str, folder: Path, meta: dict[str, Any], name: str, tokenizer: AnyTokenizer
) -> Store:
  if objective == "seq2seq":
    return PairStore(*(_open(folder, meta, f"{name}.{side}", tokenizer) for side in SIDES))
  if objective not in TALKS:
    return _open(folder, meta, name, tokenizer)
  weights = np.load(folder / f"{name}.weights.npy", mmap_mode="r")
  if len(weights) != meta[name]["num_tokens"]:
    raise ValueError(f"{len(weights)} weights of {meta[name]['num_tokens']} tokens")
  return _open(folder, meta, name, tokenizer, weights)


def _open(
  folder: Path,
  meta: dict[str, Any],
  name: str,
  tokenizer: AnyTokenizer,
  weights: np.ndarray | None = None,
) -> TokenStore:
  """A stored array. Raises `ValueError` if its length is not the one in `meta`."""
  about = meta[name]
  tokens = np.load(folder / f"{name}.npy", mmap_mode="r")
  if len(tokens) != about["num_tokens"]:
    raise ValueError(f"{len(tokens)} tokens instead of {about['num_tokens']}")
  # One tokenizer.json may serve with several. A conversation begins as its template says.
  if weights is None and tokens[0] != tokenizer.bos_id:
    raise ValueError(f"documents begin with {tokens[0]}")
  bounds = _open_bounds(folder / f"{name}.bounds.npy", tokens, tokenizer.bos_id)
  if len(bounds) != about["num_documents"] + 1:
    raise ValueError(f"{len(bounds) - 1} documents instead of {about['num_documents']}")
  return TokenStore(
    tokens,
    bounds,
    end_id=tokenizer.bos_id if tokenizer.eos_id < 0 else tokenizer.eos_id,
    vocab_size=tokenizer.vocab_size,
    num_bytes=about["num_bytes"],
    gzip_bits_per_byte=about["gzip_bits_per_byte"],
    mask_id=tokenizer.mask_id,
    special_ids=tokenizer.special_ids,
    weights=weights,
  )


def _open_bounds(path: Path, tokens: np.ndarray, bos_id: int) -> np.ndarray:
  """Where the documents of an array begin, and where the last one ends.

  The first releases did not store it. What they stored is used if no text holds a bos,
  which its number of documents tells.
  """
  if not path.is_file():
    return np.append(np.flatnonzero(tokens == bos_id), len(tokens))
  bounds = np.load(path, mmap_mode="r")
  if bounds.dtype != np.int64 or bounds[0] != 0 or bounds[-1] != len(tokens):
    raise ValueError(f"{path} does not fit the tokens")
  return bounds


def build(plan: Plan, log: Log) -> None:
  """Trains the tokenizer if there is none, then tokenizes both splits."""
  if plan.objective in TALKS:
    _build_chats(plan, log)
    return
  start, corpus = time.perf_counter(), plan.corpus
  texts = plan.texts(log)
  counts = ", ".join(f"{len(next(iter(texts[s].values()))):,} {s}" for s in texts)
  parts = "pairs" if plan.objective == "seq2seq" else "documents"
  log(f"{corpus.name}: {counts} {parts} ({time.perf_counter() - start:.1f} s)")
  learnt = texts[corpus.splits[0]].values()
  shares = [(side, 1 / len(learnt)) for side in learnt]
  tokenizer = load_or_train(plan.tokenizer_path, plan, shares, log)
  folder = plan.root / "tokens" / plan.fingerprint(tokenizer)
  with new_folder(folder, resumed=True) as partial:
    meta: dict[str, Any] = {"corpus": corpus.name, "format": FORMAT}
    for name, part in (item for split in texts for item in texts[split].items()):
      start = time.perf_counter()
      path = partial / f"{name}.npy"
      about = write_tokens(part, tokenizer, plan.tokenizer_path, path, log)
      meta[name] = about
      if not about["num_bytes"]:
        raise DataError(f"the {name} split of {corpus.name} has no text")
      if name in ("validation", WHOLE):
        about["gzip_bits_per_byte"] = _gzip_bits_per_byte(part)
      log(
        f"{name}: {about['num_tokens']:,} tokens of {about['num_bytes']:,} bytes "
        f"({time.perf_counter() - start:.1f} s)"
      )
    forget_progress(partial)
    (partial / "meta.json").write_text(to_json(meta, indent=2) + "\n")


def _build_chats(plan: Plan, log: Log) -> None:
  """The same of conversations."""
  start, corpus = time.perf_counter(), plan.corpus
  talks = plan.talks()
  counts = ", ".join(f"{talks.count(split):,} {split}" for split in corpus.splits)
  log(f"{corpus.name}: {counts} {talks.unit} ({time.perf_counter() - start:.1f} s)")
  parts = [(talks.texts("train"), 1.0)] if plan.cfg.path is None else []
  tokenizer = load_or_train(plan.tokenizer_path, plan, parts, log)
  chat = plan.chat_for(tokenizer)
  assert chat is not None
  start = time.perf_counter()
  with new_folder(plan.root / "tokens" / plan.fingerprint(tokenizer)) as partial:
    found = write_lessons(partial, talks, chat, tokenizer, log)
    meta = {"corpus": corpus.name, "format": FORMAT, **found}
    (partial / "meta.json").write_text(to_json(meta, indent=2) + "\n")
  for split, about in found.items():
    log(
      f"{split}: {about['num_tokens']:,} tokens, of which {about['num_learnt']:,} carry "
      f"loss ({time.perf_counter() - start:.1f} s)"
    )


def _gzip_bits_per_byte(texts: Sequence[str]) -> float:
  """Bits per byte of `gzip -9`: what a language model has to beat."""
  gzip = zlib.compressobj(9, wbits=31)
  num_bytes = compressed = 0
  for text in texts:
    raw = text.encode("utf-8", "replace")
    num_bytes += len(raw)
    compressed += len(gzip.compress(raw))
  return 8 * (compressed + len(gzip.flush())) / num_bytes
