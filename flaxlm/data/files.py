# SPDX-License-Identifier: Apache-2.0
"""Corpora of local files: which are read, how they are split, and a fingerprint of them.

A file of UTF-8 text is one document; if it is longer than 2 MiB it is cut at line ends into
several. A file or folder called `train` or `validation` belongs to that split, also as in
`train-00000-of-00002.parquet`; any other file is in validation if the SHA-256 of its
relative path is 0 modulo 20. A split that would be empty gets the file with the smallest
hash. Of a single file the last 5% are validation. Each record of a file of records is a
document, and is split by its own hash: see `texts`. A compressed file is read as what it
was before. Linked folders are followed, and no file is read twice under two names. What is
not read is counted, and a line says so; a corpus of nothing else is refused.
"""

import codecs
import glob
import hashlib
import io
import os
import re
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from flaxlm.data.corpus import (
  SPLITS,
  WHOLE,
  Corpus,
  Document,
  Log,
  RecordFile,
  fingerprints,
  split_by_hash,
)
from flaxlm.data.records import damage_errors, holds_records, kind_of, open_plain
from flaxlm.errors import DataError, first_line

# Some Python distributions ship the tests, others do not.
STDLIB_EXCLUDED = frozenset(
  ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")
)
DOCUMENT_BYTES = 2**20
EMPTY = "empty files"  # a reason
# Formats that hold text but are no text: to read one as it is would teach its syntax.
UNREAD = {
  **dict.fromkeys((".arrow", ".feather", ".avro", ".orc"), "a table"),
  **dict.fromkeys((".tfrecord", ".array_record", ".arrayrecord", ".mds"), "records"),
  **dict.fromkeys((".xz", ".bz2", ".lz4", ".br"), "compressed data"),
  **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), "an archive"),
}
# Text with a syntax of its own, which may be what somebody wants to learn.
MARKED_UP = (".json", ".csv", ".tsv", ".html", ".htm", ".xml", ".ipynb")


def stdlib_corpus(name: str, log: Log, whole: bool) -> Corpus:
  """The source of the standard library of the running Python."""
  root = Path(sysconfig.get_paths()["stdlib"])
  return _local_corpus(name, root, _python_files(root), log, _Unread(), whole, "")


def files_corpus(name: str, pattern: str, log: Log, whole: bool, text_field: str) -> Corpus:
  """The files of a glob, a folder, or one file."""
  unread = _Unread()
  return _local_corpus(name, *_match(pattern, unread), log, unread, whole, text_field)


class _Unread:
  """What was found and is not read, by the reason."""

  def __init__(self) -> None:
    self.names: dict[str, list[str]] = {}
    self.formats: list[str] = []  # names of files that hold text, but are no text

  def __bool__(self) -> bool:
    return bool(self.names)

  def add(self, reason: str, name: str | Path) -> None:
    self.names.setdefault(reason, []).append(_shown(name))

  def __str__(self) -> str:
    return "; ".join(
      f"{reason}: {len(names)}, as {min(names)}" for reason, names in self.names.items()
    )


def _shown(name: str | Path) -> str:
  """A name as text: it may be bytes, and it may hold anything but a NUL."""
  text = str(name).encode("utf-8", "backslashreplace").decode()
  return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _python_files(root: Path) -> Iterator[tuple[Path, str]]:
  """(path, path) of the standard library's modules."""
  for folder, subfolders, files in os.walk(root):
    subfolders[:] = [s for s in subfolders if s not in STDLIB_EXCLUDED and s[0] != "."]
    paths = (Path(folder, file) for file in files if file[0] != ".")
    yield from ((path, str(path)) for path in paths if path.suffix == ".py")


def _walk(root: Path, unread: _Unread) -> Iterator[tuple[Path, str]]:
  """(path, where it really lies) of the files below `root`, but for hidden ones.

  Linked folders are followed, but each folder is entered once: links may form a ring.
  """
  real_root = os.path.realpath(root)
  real_of, entered = {str(root): real_root}, {real_root}

  def refuse(error: OSError) -> None:
    unread.add("folders that cannot be read", Path(error.filename).relative_to(root))

  for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
    real_folder, kept = real_of.pop(folder), []
    for subfolder in sorted(subfolders):
      path = Path(folder, subfolder)
      linked, relative = path.is_symlink(), path.relative_to(root)
      real = os.path.realpath(path) if linked else str(Path(real_folder, subfolder))
      if subfolder[0] == ".":
        unread.add("hidden folders", relative)
      elif real in entered or (linked and _is_visible_below(real, real_root)):
        unread.add("folders that are read by another name", relative)
      else:
        entered.add(real)
        real_of[str(path)] = real
        kept.append(subfolder)
    subfolders[:] = kept
    for file in files:
      path = Path(folder, file)
      if file[0] == ".":
        unread.add("hidden files", path.relative_to(root))
      else:
        linked = path.is_symlink()
        yield path, os.path.realpath(path) if linked else str(Path(real_folder, file))


def _is_visible_below(real: str, root: str) -> bool:
  """Whether walking through `root` comes by."""
  path = Path(real)
  return path.is_relative_to(root) and not any(
    part[0] == "." for part in path.relative_to(root).parts
  )


def _match(pattern: str, unread: _Unread) -> tuple[Path, Iterator[tuple[Path, str]]]:
  """(the folder to which names are relative, the files) of a glob, a folder or a file;
  with each file where it really lies."""
  path = Path(os.path.expanduser(pattern))  # noqa: PTH111 - Path's raises for ~nobody
  if path.is_dir():
    return path, _walk(path, unread)
  if path.is_file():
    return path.parent, iter([(path, str(path))])
  parts = path.parts
  literal = next((n for n, part in enumerate(parts) if glob.has_magic(part)), len(parts))
  # Not Path.glob, which finds hidden files too.
  found = glob.iglob(str(path), recursive=True)  # noqa: PTH207
  files = ((Path(one), os.path.realpath(one)) for one in found if not Path(one).is_dir())
  return Path(*parts[: min(literal, len(parts) - 1)]), files


def _local_corpus(
  name: str,
  root: Path,
  found: Iterator[tuple[Path, str]],
  log: Log,
  unread: _Unread,
  whole: bool,
  text_field: str,
) -> Corpus:
  files: dict[str, tuple[Path, str]] = {}
  for path in _each_once(found, root, unread):
    relative = path.relative_to(root).as_posix()
    relative = relative.encode("utf-8", "backslashreplace").decode()  # names may be bytes
    digest = _digest(path, relative, unread)
    if digest is not None:
      files[relative] = path, digest
  _report_unread(name, files, log, unread)
  named = {relative: _named_split(relative) for relative in files}
  tables = {
    relative: files[relative] for relative in files if holds_records(Path(relative))
  }
  texts = {relative: named[relative] for relative in files if relative not in tables}
  # Where there are records, these fill both splits.
  splits = split_by_hash(texts, whole, filled=not tables)
  documents = []
  for relative in texts:
    path, digest = files[relative]
    split_of_all = splits[relative] if whole or len(files) > 1 else None
    for split, start, end in _cut(path, split_of_all):
      documents.append(Document(split, relative, path, start, end, digest))
  records = [
    RecordFile(WHOLE if whole else named[relative], relative, path, digest, text_field)
    for relative, (path, digest) in tables.items()
  ]
  wanted = (WHOLE,) if whole else SPLITS
  missing = set(wanted) - {document.split for document in documents}
  if missing and not records:
    raise DataError(f"{name} is too small: no {missing.pop()} text", "add a file")
  prints = fingerprints([*documents, *records])
  return Corpus(name, *prints, tuple(documents), tuple(records), splits=wanted)


def _each_once(
  found: Iterator[tuple[Path, str]], root: Path, unread: _Unread
) -> Iterator[Path]:
  """The files in order. Of the names of one file, that counts which is no link: a text that
  is learnt and held out under two names would look like one that the model can predict."""
  real_root, name_of = os.path.realpath(root), dict[str, Path]()
  is_own = lambda path, real: str(Path(real_root, path.relative_to(root))) == real
  for path, real in sorted(found, key=lambda pair: (not is_own(*pair), pair[0])):
    if name_of.setdefault(real, path) is not path:
      unread.add("files that are read by another name", path.relative_to(root))
  yield from sorted(name_of.values())


def _report_unread(
  name: str, files: Mapping[str, tuple[Path, str]], log: Log, unread: _Unread
) -> None:
  """Says what is not read, and what is read with its syntax; `DataError` if nothing is."""
  if not files:
    if unread.formats:
      first = min(unread.formats)
      kind = UNREAD[kind_of(Path(first))[0]]
      raise DataError(
        f"{name}: {first} is no text but {kind}, which flaxlm does not read ({unread})",
        "write each text into a .txt file of its own, and name those",
      )
    if set(unread.names) == {EMPTY}:
      raise DataError(f"there is nothing in {name} ({unread})", "write something into it")
    cause = f": not read are {unread}" if unread else ""
    raise DataError(
      f"no documents matched {name}{cause}",
      "files: takes UTF-8 text, lines of .jsonl and rows of .parquet",
    )
  if unread:
    log(f"{name}: not read are {unread}")
  suffixes = [kind_of(Path(relative))[0] for relative in files]
  marked_up = [f"{suffixes.count(s)} {s}" for s in MARKED_UP if s in suffixes]
  if marked_up and name != "stdlib":
    log(f"{name}: read as they are, with their syntax: {', '.join(marked_up)}")


def _digest(path: Path, name: str, unread: _Unread) -> str | None:
  """SHA-256 of a file's text, or of a file of records as it is; None if it is neither."""
  if kind_of(path)[0] in UNREAD:
    unread.formats.append(_shown(name))
    unread.add(f"{path.suffix.lower()} files", name)
    return None
  try:
    if not path.is_file():
      exists = path.exists()
      unread.add("neither files nor folders" if exists else "links to nowhere", name)
      return None
    if not path.stat().st_size:
      unread.add(EMPTY, name)
      return None
    if holds_records(path):
      with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
    digest = _digest_of_text(path)
  except OSError as e:
    unread.add(f"files that cannot be read ({e.strerror or first_line(e)})", name)
    return None
  if digest is None:
    unread.add("not UTF-8 text", name)
  return digest


def _digest_of_text(path: Path) -> str | None:
  """SHA-256 of a text; None if it is not UTF-8 (a NUL byte means it is not).

  Raises `OSError` if it cannot be read, also where it is compressed and damaged.
  """
  digest = hashlib.sha256()
  decoder = codecs.getincrementaldecoder("utf-8")()
  try:
    with open_plain(path) as file:
      while block := file.read(2**20):
        digest.update(block)
        if "\0" in decoder.decode(block):
          return None
    decoder.decode(b"", final=True)
  except UnicodeDecodeError:
    return None
  except damage_errors(path) as e:
    raise e if isinstance(e, OSError) else OSError(first_line(e)) from e
  return digest.hexdigest()


def _named_split(name: str) -> str | None:
  *folders, file = Path(name).parts
  if kind_of(Path(file))[1]:
    file = Path(file).stem
  # The name of one of several, as the Hugging Face hub has them.
  stem = re.sub(r"-\d+-of-\d+$", "", Path(file).stem)
  return next((s for s in SPLITS if s in (*folders, stem)), None)


def _cut(path: Path, split: str | None) -> Iterator[tuple[str, int, int]]:
  """(split, start, end) of each document in a file; without a split, 95% and 5% of it."""
  # The buffer saves a compressed file from being read again for each step back.
  with (
    open_plain(path) as raw,
    io.BufferedReader(cast(Any, raw), 4 * DOCUMENT_BYTES) as file,
  ):
    size = file.seek(0, os.SEEK_END)
    if split is None:
      middle = _line_start(file, size * 95 // 100, size)
      parts = [("train", 0, middle), ("validation", middle, size)]
    else:
      parts = [(split, 0, size)]
    for part, start, end in parts:
      while end - start > 2 * DOCUMENT_BYTES:
        middle = _line_start(file, start + DOCUMENT_BYTES, end)
        yield part, start, middle
        start = middle
      if end > start:
        yield part, start, end


def _line_start(file: BinaryIO, position: int, end: int) -> int:
  """Where the next line starts after `position`; if none starts soon, a character."""
  file.seek(position)
  if file.readline(DOCUMENT_BYTES).endswith(b"\n") and file.tell() < end:
    return file.tell()
  file.seek(position)
  while (byte := file.read(1)) and byte[0] & 0xC0 == 0x80:  # inside a character
    position += 1
  return position
