# SPDX-License-Identifier: Apache-2.0
"""What a corpus is: documents or pairs, each of a split, and a fingerprint of them all."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

Log = Callable[[str], None]
SPLITS = ("train", "validation")
WHOLE = "whole"  # the only split of a corpus that is evaluated on, not learnt from


class Document(NamedTuple):
  """A document of `split`: the bytes start..end of a file."""

  split: str
  name: str
  path: Path
  start: int
  end: int
  digest: str  # of the whole file

  def read(self) -> str:
    with self.path.open("rb") as file:
      file.seek(self.start)
      return file.read(self.end - self.start).decode("utf-8", "replace")


class Pair(NamedTuple):
  """A text of `split` in two languages."""

  split: str
  source: str
  target: str
  domain: str  # gettext's name for the catalogue that it comes from


@dataclass(frozen=True)
class Corpus:
  """A corpus that was found: where its documents are, or its pairs themselves.

  `sources.read_documents` and `sources.read_pairs` read the text.
  """

  name: str
  fingerprint: str  # of all text and of how it is split
  train_fingerprint: str  # of the train split, on which alone a tokenizer depends
  documents: tuple[Document, ...] = field(default=(), repr=False)  # of local files
  pairs: tuple[Pair, ...] = field(default=(), repr=False)  # of catalogues
  tfds_folder: Path | None = None  # of a public dataset
  splits: tuple[str, ...] = SPLITS
