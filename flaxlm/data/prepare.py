# SPDX-License-Identifier: Apache-2.0
"""Text to tokens, once: a corpus, or a mixture of several, becomes stores of tokens."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from flaxlm.chat.templates import Chat, check_jinja, load_chat
from flaxlm.config import TALKS, DataConfig, TokenizerConfig
from flaxlm.data.corpus import Corpus, Log
from flaxlm.data.mixtures import Mixture, parse_mixture
from flaxlm.data.plans import Plan, key
from flaxlm.data.sources import TEXT_FIELD, find_corpus, read_documents
from flaxlm.data.storage import data_dir, locked, to_stderr
from flaxlm.data.stored import Found, build, find_stored
from flaxlm.data.stores import MixedStore, Store
from flaxlm.data.texts import tell_skipped
from flaxlm.data.tokenizer_of import load_or_train
from flaxlm.errors import ConfigError, DataError
from flaxlm.tokenizers import AnyTokenizer, load_tokenizer


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
    plans.append(Plan(found_corpus, cfg, objective, data_dir(), deduplicate, chat))
  if mixture is not None and cfg.path is None:
    plans = _with_one_tokenizer(plans, mixture, log, meanwhile)
  found = [_find_or_build(plan, log, meanwhile) for plan in plans]
  tokenizer, (train, validation), fingerprint, chat = _together(found, mixture)
  if tokenizer.note:
    log(tokenizer.note)
  return Prepared(tokenizer, train, validation, fingerprint, chat)


def prepare_data(
  data: DataConfig,
  cfg: TokenizerConfig,
  log: Log = to_stderr,
  meanwhile: Callable[[], object] = lambda: None,
) -> Prepared:
  """`prepare` of what a config says of its data."""
  return prepare(
    data.corpus,
    cfg,
    log,
    data.objective,
    meanwhile,
    data.text_field,
    data.deduplicate,
  )


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
    found.append(_find_or_build(Plan(part, cfg, objective, data_dir(), chat=chat), log))
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
  if objective not in what:
    tell_skipped(corpus, data_dir() / "tfds", log)
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


def _together(found: Sequence[Found], mixture: Mixture | None) -> Found:
  """What is stored of a corpus, or of the sources of a mixture."""
  if mixture is None:
    (only,) = found
    return only
  splits = zip(*(source.stores for source in found), strict=True)
  named = [dict(zip(mixture.corpora, stores, strict=True)) for stores in splits]
  stores = tuple(MixedStore(sources, mixture.weights) for sources in named)
  prints = [source.fingerprint for source in found]
  fingerprint = key("mixture", mixture.weights, prints)
  return Found(found[0].tokenizer, stores, fingerprint, found[0].chat)


def _with_one_tokenizer(
  plans: Sequence[Plan],
  mixture: Mixture,
  log: Log,
  meanwhile: Callable[[], object],
) -> list[Plan]:
  """The plans of a mixture's sources with the tokenizer that is trained on all of them."""
  first, total = plans[0], sum(mixture.weights)
  trained_on = [plan.corpus.train_fingerprint for plan in plans]
  about = (first.cfg.kind, first.cfg.vocab_size, *first.kind)
  about += tuple(part for plan in plans for part in plan.chosen)
  name = key("mixture", mixture.weights, trained_on, *about)
  path = first.root / "tokenizers" / f"{name}.json"
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
      load_or_train(path, first, parts, log)
  cfg = dataclasses.replace(first.cfg, path=str(path))
  return [dataclasses.replace(plan, cfg=cfg) for plan in plans]


def _import_tfds() -> None:
  """While TFDS is imported it replaces Python's import function, so no other thread may
  import anything at that time, and compiling does."""
  from flaxlm.data import builders  # noqa: F401


def _find_or_build(
  plan: Plan, log: Log, meanwhile: Callable[[], object] = lambda: None
) -> Found:
  found = find_stored(plan)
  if found is not None:
    plan.tell_left_out(log)
    return found
  _import_tfds()
  meanwhile()
  with locked(plan.root, log):
    found = find_stored(plan)  # another process may have been faster
    if found is None:
      build(plan, log)
      found = find_stored(plan)
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
  found = tuple(find_corpus(name, log, text_field=text_field) for name in names)
  for one in found:
    tell_skipped(one, data_dir() / "tfds", log)
  return Parts(found, mixture)


def corpus_tokenizer(
  parts: Parts, cfg: TokenizerConfig, log: Log = to_stderr
) -> AnyTokenizer:
  """The tokenizer that `prepare` would use for documents, without tokenizing them."""
  plans = [Plan(corpus, cfg, "next_token", data_dir()) for corpus in parts.corpora]
  if parts.mixture is not None:
    plans = _with_one_tokenizer(plans, parts.mixture, log, lambda: None)
    return load_tokenizer(plans[0].tokenizer_path)
  (plan,) = plans
  with locked(plan.root, log):
    (texts,) = plan.texts(log)["train"].values()
    return load_or_train(plan.tokenizer_path, plan, [(texts, 1)], log)


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
