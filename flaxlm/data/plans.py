# SPDX-License-Identifier: Apache-2.0
"""What is to be prepared of a corpus, and where it is kept: keys and paths.

A result is found again by the fingerprints of the corpus and of the tokenizer, which costs
only the time to hash the corpus.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flaxlm.chat.templates import Chat, plain_chat
from flaxlm.config import TALKS, TokenizerConfig
from flaxlm.data.conversations import Talks
from flaxlm.data.corpus import Corpus, Log
from flaxlm.data.duplicates import Chosen, kept_texts
from flaxlm.data.preferences import Preferences
from flaxlm.data.sources import read_documents, read_pairs
from flaxlm.data.storage import new_folder
from flaxlm.strict_json import to_json
from flaxlm.tokenizers import AnyTokenizer

# A part of the keys of everything that is stored: raise it when something else is stored,
# or when `train_tokenizer` makes another tokenizer from the same texts.
FORMAT = 1
SIDES = ("source", "target")  # of a pair
LEFT_OUT = "left_out.json"  # how many texts are no part of what is kept


@dataclass(frozen=True)
class Plan:
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
    name = key(train, self.cfg.kind, self.cfg.vocab_size, *self.kind, *self.chosen)
    return self.root / "tokenizers" / f"{name}.json"

  def fingerprint(self, tokenizer: AnyTokenizer) -> str:
    """The fingerprint of the tokens."""
    kind, chat = self.kind if self.objective != "masked" else (), self.chat_for(tokenizer)
    kind += () if chat is None else (chat.fingerprint,)
    return key(self.corpus.fingerprint, tokenizer.fingerprint, *kind, *self.chosen)

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
    folder = self._kept_folder
    if not folder.is_dir():
      joined = {s: map("\0".join, zip(*texts[s].values(), strict=True)) for s in texts}
      kept = kept_texts(joined, near=self.deduplicate == "near")
      with new_folder(folder) as partial:
        for split in kept:
          np.save(partial / f"{split}.npy", kept[split], allow_pickle=False)
        total = sum(len(next(iter(sides.values()))) for sides in texts.values())
        gone = total - sum(map(len, kept.values()))
        (partial / LEFT_OUT).write_text(to_json({"count": gone, "total": total}), "utf-8")
    self.tell_left_out(log)
    return {split: np.load(folder / f"{split}.npy") for split in texts}

  def tell_left_out(self, log: Log) -> None:
    """Says how many texts are left out, once that is known."""
    if self.deduplicate == "none":
      return
    # An earlier release wrote no file. One that is damaged costs a line of the log alone.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
      values = json.loads((self._kept_folder / LEFT_OUT).read_text("utf-8"))
      nearly = "nearly " if self.deduplicate == "near" else ""
      log(
        f"{self.corpus.name}: {values['count']:,} of {values['total']:,} documents are "
        f"left out, as {nearly}the same text is there already"
      )

  @property
  def _kept_folder(self) -> Path:
    return self.root / "kept" / key(*self.chosen, *self.kind)

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


def key(*parts: Any) -> str:
  """A short name made of everything that a stored result depends on."""
  return hashlib.sha256(json.dumps([FORMAT, *parts]).encode()).hexdigest()[:24]
