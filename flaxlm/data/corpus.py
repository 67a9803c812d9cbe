# SPDX-License-Identifier: Apache-2.0
"""What a corpus is: documents, records or pairs, how they are split, and a fingerprint."""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, overload

from flaxlm.data.records import open_plain

Log = Callable[[str], None]
SPLITS = ("train", "validation")
WHOLE = "whole"  # the only split of a corpus that is evaluated on, not learnt from
_LISTING_VERSION = 1  # a part of fingerprints: raise it when the rules for splits change


class Texts(Sequence[str]):
  """Texts that lie somewhere else: `texts[i]` reads one, `texts[i:j]` a list of them."""

  @abstractmethod
  def read(self, number: int) -> str:
    """The text with that number, 0 to `len(self) - 1`."""

  @overload
  def __getitem__(self, index: int) -> str: ...
  @overload
  def __getitem__(self, index: slice) -> list[str]: ...
  def __getitem__(self, index: Any) -> Any:
    numbers = range(len(self))[index]  # IndexError past the end; -1 is the last one
    return self.read(numbers) if isinstance(numbers, int) else [*map(self.read, numbers)]

  def __iter__(self) -> Iterator[str]:
    return map(self.read, range(len(self)))


class Document(NamedTuple):
  """A document of `split`: the bytes start..end of a file, as they are uncompressed."""

  split: str
  name: str
  path: Path
  start: int
  end: int
  digest: str  # of the whole file

  def read(self) -> str:
    (text,) = read_in_order([self])
    return text


def read_in_order(documents: Iterable[Document]) -> Iterator[str]:
  """The text of each document; those of one file that come in order are read in one go."""
  path, file = None, None
  try:
    for document in documents:
      if document.path != path:
        if file is not None:
          file.close()
        path, file = document.path, open_plain(document.path)
      yield _read(file, document)
  finally:
    if file is not None:
      file.close()


def _read(file: BinaryIO | None, document: Document) -> str:
  assert file is not None
  file.seek(document.start)
  return file.read(document.end - document.start).decode("utf-8", "replace")


class RecordFile(NamedTuple):
  """A file of records, each of which is a document; they are counted when they are read."""

  split: str | None  # None: the hash of each record decides
  name: str
  path: Path
  digest: str  # of the file as it is
  text_field: str


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
  record_files: tuple[RecordFile, ...] = field(default=(), repr=False)  # beside these
  pairs: tuple[Pair, ...] = field(default=(), repr=False)  # of catalogues
  tfds_folder: Path | None = None  # of a public dataset
  splits: tuple[str, ...] = SPLITS


def hash_of(text: str) -> int:
  """What decides the split of a name or of a text."""
  return int(hashlib.sha256(text.encode("utf-8", "replace")).hexdigest(), 16)


def split_of_hash(number: int) -> str:
  """One in twenty is held out."""
  return SPLITS[number % 20 == 0]


def split_by_hash(
  named: Mapping[str, str | None], whole: bool, filled: bool = True
) -> dict[str, str]:
  """The split of each name: what is given, or else what its hash says.

  If the splits are to be `filled`, one that would be empty gets the name with the smallest
  hash; a name whose split is given moves only if there are no others.
  """
  if whole:
    return dict.fromkeys(named, WHOLE)
  hashes = {name: hash_of(name) for name in named}
  splits = {name: named[name] or split_of_hash(hashes[name]) for name in named}
  for split in SPLITS if filled else ():
    if split not in splits.values():
      candidates = [name for name in named if named[name] is None] or named
      splits[min(candidates, key=hashes.__getitem__)] = split
  return splits


def fingerprints(
  parts: Sequence[Document | RecordFile | Pair],
) -> tuple[str, str]:
  """The fingerprints of all parts, and of what may be in the train split."""
  in_train = lambda part: part.split == "train" or isinstance(part, RecordFile)
  return _fingerprint(parts), _fingerprint([part for part in parts if in_train(part)])


def _fingerprint(parts: Sequence[Document | RecordFile | Pair]) -> str:
  # The path is left out: it does not matter where a file lies.
  listing = [tuple(x for x in part if not isinstance(x, Path)) for part in parts]
  return hashlib.sha256(json.dumps([_LISTING_VERSION, listing]).encode()).hexdigest()
