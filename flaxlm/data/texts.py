# SPDX-License-Identifier: Apache-2.0
"""The texts of records, copied once into one file, where each can be read by its number.

TFDS writes 6,000 documents a second and reads 8,000; a table of a million records has to be
read faster. Each record is one document, wholly in one split: that of its file, if the file
has the name of one, or else validation if the SHA-256 of its text (the first 8 bytes) is 0
modulo 20, so that a text that occurs twice is never in both. If a split would be empty,
names do not count; if it is still empty, it gets the record with the smallest hash.
"""

import contextlib
import hashlib
import json
import reprlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from flaxlm.data.corpus import SPLITS, WHOLE, Corpus, Log, RecordFile, Texts, read_in_order
from flaxlm.data.records import Record, Skipped, read_records
from flaxlm.data.storage import new_folder
from flaxlm.errors import DataError, one_line
from flaxlm.strict_json import to_json

CODES = {split: code for code, split in enumerate((*SPLITS, WHOLE))}
UNNAMED = -1
FLUSHED_BYTES = 2**22
SKIPPED = "skipped.json"  # how many records were skipped, and the first
NAME_IT = (
  "name the field of the text: --data.text-field of train, --text-field of eval and "
  "tokenizer"
)


class StoredTexts(Texts):
  """Texts of one split, one behind the other in a file."""

  def __init__(self, path: Path, bounds: np.ndarray, numbers: np.ndarray):
    """`numbers` are those of the texts in the file at `path`."""
    self._raw = np.memmap(path, np.uint8, "r")
    self._bounds, self._numbers = bounds, numbers

  def __len__(self) -> int:
    return len(self._numbers)

  def read(self, number: int) -> str:
    number = self._numbers[number]
    return self._raw[self._bounds[number] : self._bounds[number + 1]].tobytes().decode()


def read_texts(corpus: Corpus, split: str, root: Path, log: Log) -> StoredTexts:
  """The documents and the records of a split; the first call copies them below `root`.

  `log` takes a line about what is skipped. Raises `DataError` if a record has no text
  field, or if there is not a text for each split.
  """
  folder = folder_of(corpus, root)
  if not folder.is_dir():
    with new_folder(folder) as partial:
      _copy(corpus, partial, log)
  codes = np.load(folder / "splits.npy")
  bounds = np.load(folder / "bounds.npy", mmap_mode="r")
  return StoredTexts(folder / "texts.bin", bounds, np.flatnonzero(codes == CODES[split]))


def _copy(corpus: Corpus, folder: Path, log: Log) -> None:
  """Writes all texts, where each begins, and the split of each."""
  skipped = Skipped()
  ends, hashes, given = array("q", [0]), array("Q"), array("b")
  with (folder / "texts.bin").open("wb", FLUSHED_BYTES) as file:
    for split, text in _read(corpus, skipped):
      raw = text.encode("utf-8", "replace")
      file.write(raw)
      ends.append(ends[-1] + len(raw))
      hashes.append(int.from_bytes(hashlib.sha256(raw).digest()[:8], "big"))
      given.append(UNNAMED if split is None else CODES[split])
  is_record = np.arange(len(hashes)) >= len(corpus.documents)
  codes = split_codes(np.array(given), np.array(hashes), is_record, corpus.splits)
  for split in corpus.splits:
    if CODES[split] not in codes:
      about, cure = (f" ({skipped})", "mend these, or ") if skipped.count else ("", "")
      raise DataError(
        f"{corpus.name} is too small: no {split} text{about}", f"{cure}add text"
      )
  if skipped.count:
    log(f"{corpus.name}: {skipped}")
  np.save(folder / "bounds.npy", np.array(ends), allow_pickle=False)
  np.save(folder / "splits.npy", codes, allow_pickle=False)
  # Not where the file lies now: the same files may lie elsewhere when this is told again.
  beginnings = [one_line(f"{file.path}, ") for file in corpus.record_files]
  told = next((n for n, b in enumerate(beginnings) if skipped.first.startswith(b)), None)
  about = skipped.first if told is None else skipped.first.removeprefix(beginnings[told])
  values = {"count": skipped.count, "file": told, "about": about}
  (folder / SKIPPED).write_text(to_json(values) + "\n", "utf-8")


def tell_skipped(corpus: Corpus, root: Path, log: Log) -> None:
  """Says again what was skipped, if the records of a corpus were copied below `root`
  before."""
  # An earlier release wrote no file. One that is damaged costs a line of the log alone.
  with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError):
    values = json.loads((folder_of(corpus, root) / SKIPPED).read_text("utf-8"))
    file, about = values["file"], values["about"]
    beginning = "" if file is None else f"{corpus.record_files[file].path}, "
    if values["count"]:
      log(f"{corpus.name}: {Skipped(values['count'], one_line(f'{beginning}{about}'))}")


def folder_of(corpus: Corpus, root: Path) -> Path:
  return root / "records" / corpus.fingerprint[:32]


def _read(corpus: Corpus, skipped: Skipped) -> Iterator[tuple[str | None, str]]:
  """(split, text) of each document, then of each record that has text."""
  texts = read_in_order(corpus.documents)
  yield from ((d.split, text) for d, text in zip(corpus.documents, texts, strict=True))
  for file in corpus.record_files:
    for record in read_records(file.path, skipped, [file.text_field]):
      if text := _text(record, file, skipped):
        yield file.split, text


def _text(record: Record, file: RecordFile, skipped: Skipped) -> str:
  """The text of a record; none, and counted, if it is empty. Raises `DataError` if the
  record has no such field, or something else in it."""
  name = file.text_field
  if name not in record.fields:
    others = ", ".join(map(repr, record.fields)) or "nothing"
    raise DataError(
      one_line(f"{record.at(file.path)} has no field {name!r}, but {others}"),
      NAME_IT,
    )
  text = record.fields[name]
  if not (text is None or isinstance(text, str)):
    raise DataError(
      one_line(
        f"{record.at(file.path)}: {name!r} is {reprlib.repr(text)}, which is no text"
      ),
      NAME_IT,
    )
  if not text:
    skipped.add(record.at(file.path), f"{name!r} is empty")
  return text or ""


def split_codes(
  given: np.ndarray, hashes: np.ndarray, is_record: np.ndarray, splits: Sequence[str]
) -> np.ndarray:
  """The code of each text's split, by the rules at the top of this file."""
  by_hash = np.where(hashes % 20, CODES["train"], CODES["validation"])
  codes = np.where(given == UNNAMED, by_hash, given)
  missing = [CODES[split] for split in splits if CODES[split] not in codes]
  if missing and is_record.any() and splits == SPLITS:
    codes = np.where(is_record, by_hash, given)
    for code in map(CODES.__getitem__, splits):
      if code not in codes:
        codes[is_record & (hashes == hashes[is_record].min())] = code
  return codes.astype(np.int8)
