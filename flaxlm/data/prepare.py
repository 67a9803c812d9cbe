# SPDX-License-Identifier: Apache-2.0
"""Text to tokens, once: a corpus becomes one long array of ids per split, on disk.

Each document is `bos` and its ids; documents follow one another in a fixed order. Where
each begins is stored beside the ids: tokenizers of others may find `bos` inside of a text
too. A corpus of pairs becomes two such arrays, of the sources and of the targets. Of
conversations each token's weight in the loss is stored too, and a chat template writes all
of their special tokens. The results are found again by the fingerprints of the corpus and
of the tokenizer, which costs only the time to hash the corpus.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flaxlm.chat.templates import Chat, check_jinja, load_chat, plain_chat
from flaxlm.config import TALKS, TokenizerConfig
from flaxlm.data.conversations import Talks, write_lessons
from flaxlm.data.corpus import WHOLE, Corpus, Log
from flaxlm.data.duplicates import Chosen, kept_texts
from flaxlm.data.mixtures import Mixture, parse_mixture
from flaxlm.data.preferences import Preferences
from flaxlm.data.sources import TEXT_FIELD, find_corpus, read_documents, read_pairs
from flaxlm.data.storage import data_dir, locked, new_folder, to_stderr
from flaxlm.data.stores import MixedStore, PairStore, Store, TokenStore
from flaxlm.data.tokenizing import forget_progress, num_characters, write_tokens
from flaxlm.errors import ConfigError, DataError
from flaxlm.strict_json import to_json
from flaxlm.tokenizers import MASK, AnyTokenizer, load_tokenizer, train_tokenizer

# A part of the keys of everything that is stored: raise it when this file stores something
# else, or when `train_tokenizer` makes another tokenizer from the same texts.
_FORMAT = 1
# A tokenizer is trained on pieces spread evenly over the corpus. For the standard library
# and 4,096 ids this takes a sixth of the time that the whole corpus would take, and gives
# 3.56 bytes per held-out token instead of 3.58.
SAMPLE_CHARACTERS_PER_ID = 512
SAMPLE_PIECE = 4096
SIDES = ("source", "target")  # of a pair


@dataclass(frozen=True)
class Prepared:
  """A corpus ready to be cut into batches."""

  tokenizer: AnyTokenizer
  train: Store
  validation: Store
  fingerprint: str
  chat: Chat | None = None  # that conversations are written in

  @property
  def sizes(self) -> str:
    """How much text there is of each split, in words."""
    train, validation = self.train.num_tokens, self.validation.num_tokens
    return f"{train:,} tokens to learn from, {validation:,} held out"


class _Found(NamedTuple):
  """What is stored of a corpus."""

  tokenizer: AnyTokenizer
  stores: tuple[Store, ...]  # one of each split
  fingerprint: str
  chat: Chat | None


def prepare(
  corpus: str,
  cfg: TokenizerConfig,
  log: Log = to_stderr,
  objective: str = "next_token",
  meanwhile: Callable[[], object] = lambda: None,
  text_field: str = TEXT_FIELD,
  deduplicate: str = "none",
  chat_folder: Path | None = None,
) -> Prepared:
  """The tokens of `corpus`, which may be a mixture (see `find_corpus`, `parse_mixture`);
  they are made only if they are not stored.

  The objective (see `DataConfig`) decides what is read: pairs for seq2seq, whose stores are
  `PairStore`s, conversations for chat and preference, of which the latter has two for each
  pair, and documents otherwise. For masked the tokenizer
  has `[MASK]`. The chat template is that of `chat_folder`, a run or where a tokenizer.json
  is; by default that of the config's tokenizer, or else a plain one. A mixture
  has one tokenizer, trained on a sample in its shares; its stores are `MixedStore`s.
  Several processes may call this at once: one prepares, the others wait. `log` takes lines
  about progress. `meanwhile` is called before long work, so that it can start other work in
  parallel. Raises `DataError`.
  """
  mixture, chat = parse_mixture(corpus), _load_chat(cfg, objective, chat_folder)
  plans = []
  for name in (corpus,) if mixture is None else mixture.corpora:
    found_corpus = corpus_of(name, log, objective, text_field)
    plans.append(_Plan(found_corpus, cfg, objective, data_dir(), deduplicate, chat))
  if mixture is not None and cfg.path is None:
    plans = _with_one_tokenizer(plans, mixture, log, meanwhile)
  found = [_find_or_build(plan, log, meanwhile) for plan in plans]
  tokenizer, (train, validation), fingerprint, chat = _together(found, mixture)
  if tokenizer.note:
    log(tokenizer.note)
  return Prepared(tokenizer, train, validation, fingerprint, chat)


def prepare_whole(
  corpus: str,
  tokenizer: Path,
  log: Log = to_stderr,
  objective: str = "next_token",
  text_field: str = TEXT_FIELD,
) -> Store:
  """All tokens of a corpus by the tokenizer of a file, not split; see `prepare`."""
  mixture, cfg = parse_mixture(corpus), TokenizerConfig(path=str(tokenizer))
  found, chat = [], _load_chat(cfg, objective, None)
  for name in (corpus,) if mixture is None else mixture.corpora:
    part = corpus_of(name, log, objective, text_field, whole=True)
    found.append(_find_or_build(_Plan(part, cfg, objective, data_dir(), chat=chat), log))
  (store,) = _together(found, mixture).stores
  return store


def corpus_of(
  name: str, log: Log, objective: str, text_field: str, whole: bool = False
) -> Corpus:
  """`find_corpus`; it has the conversations or prompts that the objective needs, or
  `ConfigError` or `DataError`."""
  needs = f"which data.objective={objective} needs"
  what = {"reward": "prompts"} | dict.fromkeys(TALKS, "conversations")
  if objective in what and not name.startswith("files:"):
    raise ConfigError(
      f"data.corpus={name!r} has no {what[objective]}, {needs}",
      f"name files of them, as in --data.corpus=files:{what[objective]}.jsonl",
    )
  corpus = find_corpus(name, log, whole, text_field)
  if objective in what and not corpus.record_files:
    raise DataError(
      f"{name} has no files of {what[objective]}, {needs}",
      "they are lines of .jsonl, or rows of .parquet",
    )
  if objective in what and corpus.documents:
    others = {document.name for document in corpus.documents}
    log(f"{name}: not read are files without records: {len(others)}, as {min(others)}")
  return corpus


def _load_chat(cfg: TokenizerConfig, objective: str, folder: Path | None) -> Chat | None:
  """The template for conversations; None for the plain one, and where there are none."""
  if objective not in TALKS:
    return None
  check_jinja(f"data.objective={objective}")
  if folder is None and cfg.path is not None:
    folder = Path(cfg.path).parent
  return None if folder is None else load_chat(folder)


def _together(found: Sequence[_Found], mixture: Mixture | None) -> _Found:
  """What is stored of a corpus, or of the sources of a mixture."""
  if mixture is None:
    (only,) = found
    return only
  splits = zip(*(source.stores for source in found), strict=True)
  named = [dict(zip(mixture.corpora, stores, strict=True)) for stores in splits]
  stores = tuple(MixedStore(sources, mixture.weights) for sources in named)
  prints = [source.fingerprint for source in found]
  fingerprint = _key("mixture", mixture.weights, prints)
  return _Found(found[0].tokenizer, stores, fingerprint, found[0].chat)


def _with_one_tokenizer(
  plans: Sequence["_Plan"],
  mixture: Mixture,
  log: Log,
  meanwhile: Callable[[], object],
) -> list["_Plan"]:
  """The plans of a mixture's sources with the tokenizer that is trained on all of them."""
  first, total = plans[0], sum(mixture.weights)
  trained_on = [plan.corpus.train_fingerprint for plan in plans]
  about = (first.cfg.kind, first.cfg.vocab_size, *first.kind)
  about += tuple(key for plan in plans for key in plan.chosen)
  key = _key("mixture", mixture.weights, trained_on, *about)
  path = first.root / "tokenizers" / f"{key}.json"
  try:
    load_tokenizer(path)
  except DataError:
    _import_tfds()
    meanwhile()
    with locked(first.root, log):
      parts = [
        (texts, weight / total / len(sides))
        for plan, weight in zip(plans, mixture.weights, strict=True)
        for sides in [plan.texts(log)["train"].values()]
        for texts in sides
      ]
      _load_or_train(path, first, parts, log)
  cfg = dataclasses.replace(first.cfg, path=str(path))
  return [dataclasses.replace(plan, cfg=cfg) for plan in plans]


def _import_tfds() -> None:
  """While TFDS is imported it replaces Python's import function, so no other thread may
  import anything at that time, and compiling does."""
  from flaxlm.data import builders  # noqa: F401


def _find_or_build(
  plan: "_Plan", log: Log, meanwhile: Callable[[], object] = lambda: None
) -> _Found:
  found = _find(plan)
  if found is not None:
    return found
  _import_tfds()
  meanwhile()
  with locked(plan.root, log):
    found = _find(plan)  # another process may have been faster
    if found is None:
      _build(plan, log)
      found = _find(plan)
  assert found is not None, "it has just been built"
  return found


class Parts(NamedTuple):
  """A corpus of documents that was found, or the sources of a mixture."""

  corpora: tuple[Corpus, ...]
  mixture: Mixture | None


def find_parts(corpus: str, log: Log = to_stderr, text_field: str = TEXT_FIELD) -> Parts:
  """What `corpus_tokenizer` and `held_out_texts` read; see `prepare` for the names."""
  mixture = parse_mixture(corpus)
  names = (corpus,) if mixture is None else mixture.corpora
  found = (find_corpus(name, log, text_field=text_field) for name in names)
  return Parts(tuple(found), mixture)


def corpus_tokenizer(
  parts: Parts, cfg: TokenizerConfig, log: Log = to_stderr
) -> AnyTokenizer:
  """The tokenizer that `prepare` would use for documents, without tokenizing them."""
  plans = [_Plan(corpus, cfg, "next_token", data_dir()) for corpus in parts.corpora]
  if parts.mixture is not None:
    plans = _with_one_tokenizer(plans, parts.mixture, log, lambda: None)
    return load_tokenizer(plans[0].tokenizer_path)
  (plan,) = plans
  with locked(plan.root, log):
    (texts,) = plan.texts(log)["train"].values()
    return _load_or_train(plan.tokenizer_path, plan, [(texts, 1)], log)


def held_out_texts(parts: Parts, most_bytes: int, log: Log = to_stderr) -> list[str]:
  """The first documents of the validation split, about `most_bytes` of them; of a mixture
  each source has its share."""
  root, found = data_dir(), list[str]()
  weights = (1,) if parts.mixture is None else parts.mixture.weights
  with locked(root, log):
    for corpus, weight in zip(parts.corpora, weights, strict=True):
      size, share = 0, most_bytes * weight / sum(weights)
      for text in read_documents(corpus, "validation", root / "tfds", log):
        found.append(text)
        size += len(text)
        if size >= share:
          break
  return found


@dataclass(frozen=True)
class _Plan:
  """What is to be prepared, and where it is kept."""

  corpus: Corpus
  cfg: TokenizerConfig
  objective: str
  root: Path
  deduplicate: str = "none"
  chat: Chat | None = None

  @property
  def kind(self) -> tuple[str, ...]:
    """The part of a key for what a result depends on besides text and tokenizer."""
    kinds = {"next_token": (), "seq2seq": ("pairs",)}
    return kinds.get(self.objective, (self.objective,))

  @property
  def chosen(self) -> tuple[str, ...]:
    """The part of a key for which texts are left out."""
    # What is held out decides which texts are learnt.
    all_text = self.corpus.fingerprint
    return () if self.deduplicate == "none" else (self.deduplicate, all_text)

  @property
  def tokenizer_path(self) -> Path:
    """The tokenizer.json that was given, or the place of the one trained on this corpus."""
    if self.cfg.path is not None:
      return Path(self.cfg.path)
    train = self.corpus.train_fingerprint
    key = _key(train, self.cfg.kind, self.cfg.vocab_size, *self.kind, *self.chosen)
    return self.root / "tokenizers" / f"{key}.json"

  def fingerprint(self, tokenizer: AnyTokenizer) -> str:
    """The fingerprint of the tokens."""
    kind, chat = self.kind if self.objective != "masked" else (), self.chat_for(tokenizer)
    kind += () if chat is None else (chat.fingerprint,)
    return _key(self.corpus.fingerprint, tokenizer.fingerprint, *kind, *self.chosen)

  def chat_for(self, tokenizer: AnyTokenizer) -> Chat | None:
    """The template of conversations; the plain one depends on the tokenizer."""
    if self.objective not in TALKS or self.chat is not None:
      return self.chat
    return plain_chat(tokenizer, self.tokenizer_path.parent)

  def texts(self, log: Log) -> dict[str, dict[str, Sequence[str]]]:
    """The texts of each split, by the name of the file for their tokens."""
    texts = {split: self._all_texts(split, log) for split in self.corpus.splits}
    if self.deduplicate == "none":
      return texts
    kept = self._kept(texts, log)
    return {
      split: {name: Chosen(all_texts, kept[split]) for name, all_texts in sides.items()}
      for split, sides in texts.items()
    }

  def _kept(
    self, texts: Mapping[str, Mapping[str, Sequence[str]]], log: Log
  ) -> dict[str, np.ndarray]:
    """The numbers of the texts of each split that are no duplicates; found once."""
    folder = self.root / "kept" / _key(*self.chosen, *self.kind)
    if not folder.is_dir():
      joined = {s: map("\0".join, zip(*texts[s].values(), strict=True)) for s in texts}
      kept = kept_texts(joined, near=self.deduplicate == "near")
      with new_folder(folder) as partial:
        for split in kept:
          np.save(partial / f"{split}.npy", kept[split], allow_pickle=False)
    kept = {split: np.load(folder / f"{split}.npy") for split in texts}
    total = sum(len(next(iter(sides.values()))) for sides in texts.values())
    gone = total - sum(map(len, kept.values()))
    log(
      f"{self.corpus.name}: {gone:,} of {total:,} documents are left out, as "
      f"{'nearly ' if self.deduplicate == 'near' else ''}the same text is there already"
    )
    return kept

  def talks(self) -> Talks:
    """The conversations of the corpus."""
    kind = Preferences if self.objective == "preference" else Talks
    return kind(self.corpus)

  def _all_texts(self, split: str, log: Log) -> dict[str, Sequence[str]]:
    folder = self.root / "tfds"
    if self.objective in TALKS:
      return {split: self.talks().texts(split)}
    if self.objective != "seq2seq":
      return {split: read_documents(self.corpus, split, folder, log)}
    sides = zip(SIDES, read_pairs(self.corpus, split, folder), strict=True)
    return {f"{split}.{side}": texts for side, texts in sides}


def _find(plan: _Plan) -> _Found | None:
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
  return _Found(tokenizer, stores, fingerprint, plan.chat_for(tokenizer))


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


def _build(plan: _Plan, log: Log) -> None:
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
  tokenizer = _load_or_train(plan.tokenizer_path, plan, shares, log)
  folder = plan.root / "tokens" / plan.fingerprint(tokenizer)
  with new_folder(folder, resumed=True) as partial:
    meta: dict[str, Any] = {"corpus": corpus.name, "format": _FORMAT}
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


def _build_chats(plan: _Plan, log: Log) -> None:
  """The same of conversations."""
  start, corpus = time.perf_counter(), plan.corpus
  talks = plan.talks()
  counts = ", ".join(f"{talks.count(split):,} {split}" for split in corpus.splits)
  log(f"{corpus.name}: {counts} {talks.unit} ({time.perf_counter() - start:.1f} s)")
  parts = [(talks.texts("train"), 1.0)] if plan.cfg.path is None else []
  tokenizer = _load_or_train(plan.tokenizer_path, plan, parts, log)
  chat = plan.chat_for(tokenizer)
  assert chat is not None
  start = time.perf_counter()
  with new_folder(plan.root / "tokens" / plan.fingerprint(tokenizer)) as partial:
    found = write_lessons(partial, talks, chat, tokenizer, log)
    meta = {"corpus": corpus.name, "format": _FORMAT, **found}
    (partial / "meta.json").write_text(to_json(meta, indent=2) + "\n")
  for split, about in found.items():
    log(
      f"{split}: {about['num_tokens']:,} tokens, of which {about['num_learnt']:,} carry "
      f"loss ({time.perf_counter() - start:.1f} s)"
    )


def _load_or_train(
  path: Path, plan: _Plan, parts: Sequence[tuple[Sequence[str], float]], log: Log
) -> AnyTokenizer:
  """The tokenizer at `path`, trained if need be on texts and their shares of a sample.

  The texts are documents, or the sources and the targets of pairs.
  """
  cfg = plan.cfg
  # There may be none yet, or a damaged one; one that was given has been checked.
  with contextlib.suppress(DataError):
    return load_tokenizer(path)
  start = time.perf_counter()
  size = cfg.vocab_size * SAMPLE_CHARACTERS_PER_ID
  take = _sample_whole if plan.objective == "seq2seq" else _sample
  sample = itertools.chain.from_iterable(
    take(texts, max(1, int(size * share))) for texts, share in parts
  )
  masked = plan.objective == "masked"
  tokenizer = train_tokenizer(cfg.kind, sample, cfg.vocab_size, masked)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix(".partial")
  try:
    tokenizer.save(partial)
    partial.replace(path)
  finally:
    partial.unlink(missing_ok=True)
  seconds = time.perf_counter() - start
  log(f"tokenizer: {cfg.kind}, {tokenizer.vocab_size:,} ids ({seconds:.1f} s)")
  return tokenizer


def _sample(texts: Sequence[str], size: int) -> Iterator[str]:
  """About `size` characters of `texts`, in evenly spaced pieces."""
  stride = max(SAMPLE_PIECE, SAMPLE_PIECE * num_characters(texts) // size)
  start = 0
  for text in texts:
    yield from (text[n : n + SAMPLE_PIECE] for n in range(start, len(text), stride))
    start = (start - len(text)) % stride


def _sample_whole(texts: Sequence[str], size: int) -> Iterator[str]:
  """About `size` characters of texts that are shorter than a piece: every n-th text."""
  step = max(1, num_characters(texts) // size)
  return (texts[n] for n in range(0, len(texts), step))


def _gzip_bits_per_byte(texts: Sequence[str]) -> float:
  """Bits per byte of `gzip -9`: what a language model has to beat."""
  gzip = zlib.compressobj(9, wbits=31)
  num_bytes = compressed = 0
  for text in texts:
    raw = text.encode("utf-8", "replace")
    num_bytes += len(raw)
    compressed += len(gzip.compress(raw))
  return 8 * (compressed + len(gzip.flush())) / num_bytes


def _key(*parts: Any) -> str:
  """A short name made of everything that a stored result depends on."""
  return hashlib.sha256(json.dumps([_FORMAT, *parts]).encode()).hexdigest()[:24]
