# SPDX-License-Identifier: Apache-2.0
"""Finds corpora, and reads their text: which documents or pairs there are, how they are
split, and a fingerprint of all of it.

`find_corpus` lists and hashes files with the standard library alone, in 0.1 s for `stdlib`,
so that a second run, whose tokens are stored already, has nothing to import. The text
itself is read through TFDS, by `builders`.

A local file of UTF-8 text is one document; if it is longer than 2 MiB it is cut at line
ends into several. A file or folder called `train` or `validation` belongs to that split;
any other file is in validation if the SHA-256 of its relative path is 0 modulo 20. A split
that would be empty gets the file with the smallest hash. Of a single file the last 5% are
validation. Linked folders are followed, and no file is read twice under two names. What is
not read is counted, and a line says so; a corpus of nothing else is refused.

`gettext:LANG` consists of pairs: the messages of programs in English and in LANG. They come
from the catalogues of installed Python packages, which are read as data and never imported.
A pair is in validation if the SHA-256 of its source is 0 modulo 20, so that no source is in
both splits.
"""

import codecs
import contextlib
import difflib
import fcntl
import gettext
import glob
import hashlib
import io
import json
import os
import re
import struct
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from flaxlm.data.corpus import SPLITS, WHOLE, Corpus, Document, Log, Pair
from flaxlm.errors import ConfigError, DataError, first_line

# Some Python distributions ship the tests, others do not.
STDLIB_EXCLUDED = frozenset(
  ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")
)
DOCUMENT_BYTES = 2**20
# A number for which most languages use the plural form of "many".
MANY = 5
# Formats that hold text but are no text: to read one as it is would teach its syntax.
UNREAD = {
  **dict.fromkeys((".jsonl", ".ndjson"), "JSON lines"),
  **dict.fromkeys((".parquet", ".arrow", ".feather", ".avro", ".orc"), "a table"),
  **dict.fromkeys((".tfrecord", ".array_record", ".arrayrecord", ".mds"), "records"),
  **dict.fromkeys((".gz", ".zst", ".xz", ".bz2", ".lz4", ".br"), "compressed data"),
  **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), "an archive"),
}
# Text with a syntax of its own, which may be what somebody wants to learn.
MARKED_UP = (".json", ".csv", ".tsv", ".html", ".htm", ".xml", ".ipynb")
_LISTING_VERSION = 1  # a part of fingerprints: raise it when the rules of this file change


def to_stderr(line: str) -> None:
  print(line, file=sys.stderr)


def data_dir() -> Path:
  """Where prepared data are kept. It may be deleted: data are then prepared again.

  A variable that is set but empty counts as one that is not set, as in the XDG rules.
  """
  if named := os.environ.get("FLAXLM_DATA_DIR"):
    return Path(named)
  if cache := os.environ.get("XDG_CACHE_HOME"):
    return Path(cache) / "flaxlm"
  try:
    return Path.home() / ".cache" / "flaxlm"
  except RuntimeError as e:  # as in a container whose user has no name
    raise DataError(
      f"there is no folder for data: {first_line(e)}", "set FLAXLM_DATA_DIR"
    ) from e


def find_corpus(name: str, log: Log = to_stderr, whole: bool = False) -> Corpus:
  """The corpus `stdlib`, `files:GLOB` (or folder, or file), `tfds:NAME[/CONFIG][:VERSION]`
  or `gettext:LANG`; a `whole` one is not split.

  Downloads a TFDS dataset that is not there yet. Raises `DataError` if nothing is found.
  """
  kind, _, rest = name.partition(":")
  if name == "stdlib":
    root = Path(sysconfig.get_paths()["stdlib"])
    return _local_corpus(name, root, _python_files(root), log, _Unread(), whole)
  if kind == "files" and rest:
    unread = _Unread()
    return _local_corpus(name, *_match(rest, unread), log, unread, whole)
  if kind == "tfds" and rest:
    return _tfds_corpus(name, rest, log, whole)
  if kind == "gettext" and rest:
    return _gettext_corpus(name, rest, log, whole)
  known = ["stdlib", "files:GLOB", "tfds:NAME", "gettext:LANG"]
  near = difflib.get_close_matches(name, known, 1)
  raise ConfigError(
    f"data.corpus={name!r} is not a corpus",
    f"did you mean {near[0]}?" if near else f"it can be {', '.join(known)}",
  )


def read_documents(corpus: Corpus, split: str, root: Path) -> Sequence[str]:
  """The documents of a split, in a fixed order; TFDS keeps its files in `root`.

  Raises `DataError` if the corpus is made of pairs.
  """
  from flaxlm.data import builders  # importing TFDS costs 0.5 s

  if corpus.pairs:
    raise DataError(
      f"{corpus.name} is made of pairs, not of documents",
      "set --model.family=encoder_decoder --data.objective=seq2seq",
    )
  (texts,) = builders.read_texts(corpus, split, root, paired=False)
  return texts


def read_pairs(
  corpus: Corpus, split: str, root: Path
) -> tuple[Sequence[str], Sequence[str]]:
  """The sources and the targets of a split, in a fixed order.

  Raises `DataError` if the corpus is made of documents.
  """
  from flaxlm.data import builders  # importing TFDS costs 0.5 s

  if corpus.documents:
    raise DataError(
      f"{corpus.name} has no pairs of source and target",
      "use gettext:LANG (as gettext:de, after `pip install Django`) or a translation "
      "dataset of TFDS (as tfds:wmt14_translate/de-en)",
    )
  source, target = builders.read_texts(corpus, split, root, paired=True)
  return source, target


@contextlib.contextmanager
def locked(root: Path, log: Log) -> Iterator[None]:
  """Lets one process at a time work in `root`; the system frees the lock of a dead process.

  Raises `DataError` for every `OSError`, also in the body: then `root` cannot be written.
  """
  try:
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        log(f"another process is preparing data in {root}; waiting for it")
        fcntl.flock(file, fcntl.LOCK_EX)
      yield
  except OSError as e:
    raise DataError(
      f"cannot prepare data in {root}: {first_line(e)}",
      "free some space, or set FLAXLM_DATA_DIR to another folder",
    ) from e


# -- Local files -----------------------------------------------------------------------


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
) -> Corpus:
  files: dict[str, tuple[Path, str]] = {}
  for path in _each_once(found, root, unread):
    relative = path.relative_to(root).as_posix()
    relative = relative.encode("utf-8", "backslashreplace").decode()  # names may be bytes
    digest = _digest_of_text(path, relative, unread)
    if digest is not None:
      files[relative] = path, digest
  _report_unread(name, files, log, unread)
  splits = _split({relative: _named_split(relative) for relative in files}, whole)
  documents = []
  for relative, (path, digest) in files.items():
    split_of_all = splits[relative] if whole or len(files) > 1 else None
    for split, start, end in _cut(path, split_of_all):
      documents.append(Document(split, relative, path, start, end, digest))
  wanted = (WHOLE,) if whole else SPLITS
  missing = set(wanted) - {document.split for document in documents}
  if missing:
    raise DataError(f"{name} is too small: no {missing.pop()} text", "add a file")
  prints = _fingerprints(documents)
  return Corpus(name, *prints, documents=tuple(documents), splits=wanted)


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
      kind = UNREAD[Path(first).suffix.lower()]
      raise DataError(
        f"{name}: {first} is no text but {kind}, which flaxlm does not read ({unread})",
        "write each text into a .txt file of its own, and name those",
      )
    cause = f": not read are {unread}" if unread else ""
    raise DataError(f"no documents matched {name}{cause}", "files: takes UTF-8 text")
  if unread:
    log(f"{name}: not read are {unread}")
  suffixes = [Path(relative).suffix.lower() for relative in files]
  marked_up = [f"{suffixes.count(s)} {s}" for s in MARKED_UP if s in suffixes]
  if marked_up and name != "stdlib":
    log(f"{name}: read as they are, with their syntax: {', '.join(marked_up)}")


def _digest_of_text(path: Path, name: str, unread: _Unread) -> str | None:
  """SHA-256 of a file; None if it is not UTF-8 text (a NUL byte means it is not)."""
  suffix = path.suffix.lower()
  if suffix in UNREAD:
    unread.formats.append(_shown(name))
    unread.add(f"{suffix} files", name)
    return None
  digest = hashlib.sha256()
  decoder = codecs.getincrementaldecoder("utf-8")()
  try:
    if not path.is_file():
      exists = path.exists()
      unread.add("neither files nor folders" if exists else "links to nowhere", name)
      return None
    if not path.stat().st_size:
      unread.add("empty files", name)
      return None
    with path.open("rb") as file:
      while block := file.read(2**20):
        digest.update(block)
        if "\0" in decoder.decode(block):
          raise ValueError("a NUL byte")
    decoder.decode(b"", final=True)
  except OSError as e:
    unread.add(f"files that cannot be read ({e.strerror})", name)
    return None
  except ValueError:
    unread.add("not UTF-8 text", name)
    return None
  return digest.hexdigest()


def _split(named: Mapping[str, str | None], whole: bool) -> dict[str, str]:
  """The split of each name, by the rule at the top of this file, if none is given."""
  if whole:
    return dict.fromkeys(named, WHOLE)
  hashes = {name: int(hashlib.sha256(name.encode()).hexdigest(), 16) for name in named}
  splits = {name: named[name] or SPLITS[hashes[name] % 20 == 0] for name in named}
  for split in SPLITS:
    if split not in splits.values():
      # A file of a named split moves only if there are no others.
      candidates = [name for name in named if named[name] is None] or named
      splits[min(candidates, key=hashes.__getitem__)] = split
  return splits


def _named_split(name: str) -> str | None:
  path = Path(name)
  return next((s for s in SPLITS if s in (*path.parts[:-1], path.stem)), None)


def _cut(path: Path, split: str | None) -> Iterator[tuple[str, int, int]]:
  """(split, start, end) of each document in a file; without a split, 95% and 5% of it."""
  size = path.stat().st_size
  with path.open("rb") as file:
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


def _fingerprints(parts: Sequence[Document | Pair]) -> tuple[str, str]:
  """The fingerprints of all parts, and of the train split alone."""
  return _fingerprint(parts), _fingerprint(
    [part for part in parts if part.split == "train"]
  )


def _fingerprint(parts: Sequence[Document | Pair]) -> str:
  # The path is left out: it does not matter where a file lies.
  listing = [tuple(x for x in part if not isinstance(x, Path)) for part in parts]
  return hashlib.sha256(json.dumps([_LISTING_VERSION, listing]).encode()).hexdigest()


# -- Catalogues ------------------------------------------------------------------------


def _gettext_corpus(name: str, language: str, log: Log, whole: bool) -> Corpus:
  """The pairs of all catalogues of a language, each pair once, in the catalogues' order.

  Messages that are empty or were left in English are skipped.
  """
  catalogues = _catalogues()
  if language not in catalogues:
    near = difflib.get_close_matches(language, catalogues, 3)
    raise DataError(
      f"no installed package has a catalogue for {name}",
      f"did you mean {' or '.join(f'gettext:{other}' for other in near)}?"
      if near
      else "pip install Django gramps brings those of many languages, as gettext:de; here "
      f"are {', '.join(sorted(catalogues)) or 'none'}",
    )
  found: dict[tuple[str, str], str] = {}  # the domain of each (source, target)
  skipped, left_out = [], Counter[str]()
  for relative, path in catalogues[language]:
    try:
      translations = list(_translations(path))
    # All that `GNUTranslations` may raise for a damaged file.
    except (OSError, ValueError, LookupError, ArithmeticError, struct.error):
      skipped.append(relative)
      continue
    for source, target in translations:
      if not (source.strip() and target.strip()):
        left_out["empty"] += 1
      elif source == target:
        left_out["the same in both languages"] += 1
      elif (source, target) in found:
        left_out["there already"] += 1
      else:
        found[source, target] = path.stem
  if skipped:
    log(f"{name}: skipped what is not a catalogue: {len(skipped)}, as {skipped[0]}")
  if left_out:
    counts = ", ".join(f"{number:,} {reason}" for reason, number in left_out.items())
    log(f"{name}: {len(found):,} pairs; left out are {counts}")
  sources = dict.fromkeys(source for source, _ in found)
  if len(sources) < len(SPLITS):
    raise DataError(f"{name} is too small: {len(sources)} texts", "pip install Django")
  splits = _split(dict.fromkeys(sources), whole)
  pairs = [Pair(splits[pair[0]], *pair, domain) for pair, domain in found.items()]
  wanted = (WHOLE,) if whole else SPLITS
  return Corpus(name, *_fingerprints(pairs), pairs=tuple(pairs), splits=wanted)


def _catalogues() -> dict[str, list[tuple[str, Path]]]:
  """(name, path) of the catalogues of each language, from all installed packages."""
  catalogues: dict[str, list[tuple[str, Path]]] = {}
  packages = ("site-packages", "dist-packages")
  roots = [root for root in map(Path, sys.path) if root.name in packages]
  # Desktop programs such as Gramps install their catalogues beside the packages.
  roots.append(Path(sysconfig.get_path("data"), "share", "locale"))
  for root in roots:
    for folder, subfolders, files in os.walk(root):
      subfolders[:] = [s for s in subfolders if s != "__pycache__" and s[0] != "."]
      # Many packages have many files: a `Path` of each would take a second.
      if os.path.basename(folder) == "LC_MESSAGES":  # noqa: PTH119
        paths = [Path(folder, file) for file in files if file.endswith(".mo")]
        found = [(path.relative_to(root).as_posix(), path) for path in paths]
        catalogues.setdefault(Path(folder).parent.name, []).extend(found)
  return {language: sorted(found) for language, found in catalogues.items() if found}


def _translations(path: Path) -> Iterator[tuple[str, str]]:
  """(English, translation) of each message of a .mo file; both forms of a plural message.

  `GNUTranslations` translates messages but does not list them, so they are read from the
  file, whose layout is in the manual of GNU gettext, section 10.3.
  """
  raw = path.read_bytes()
  translations = gettext.GNUTranslations(io.BytesIO(raw))
  order = "<" if raw[:4] == struct.pack("<I", translations.LE_MAGIC) else ">"
  count, table = struct.unpack_from(f"{order}2I", raw, 8)
  for n in range(count):
    length, start = struct.unpack_from(f"{order}2I", raw, table + 8 * n)
    message = raw[start : start + length].decode(translations.charset() or "ascii")
    if not message:  # the header, whose translation describes the file
      continue
    one, _, many = message.partition("\0")
    english = one.rpartition("\4")[2]  # after the context, if there is one
    if many:
      yield english, translations.ngettext(one, many, 1)
      yield many, translations.ngettext(one, many, MANY)
    else:
      yield english, translations.gettext(one)


# -- TFDS ------------------------------------------------------------------------------


def _version_of(folder: Path) -> list[int]:
  """10.0.0 comes after 9.0.0."""
  return [int(part) if part.isdecimal() else -1 for part in folder.name.split(".")]


def _tfds_corpus(name: str, dataset: str, log: Log, whole: bool) -> Corpus:
  root = data_dir() / "tfds"
  # TFDS writes NAME:1.0.0, and its folders are NAME/1.0.0.
  version = re.search(r"[:/](\d+\.\d+\.\d+)$", dataset)
  dataset = dataset[: version.start()] if version else dataset
  # Only TFDS knows the name of a default configuration, so it is asked each time.
  found = (root / dataset).glob(f"{version[1] if version else '*.*.*'}/dataset_info.json")
  if folders := sorted((path.parent for path in found), key=_version_of):
    folder = folders[-1]
  else:
    from flaxlm.data import builders  # importing TFDS costs 0.5 s

    with locked(data_dir(), log):
      asked = f"{dataset}:{version[1]}" if version else dataset
      folder = builders.download(asked, root, log)
  listing = (folder / "dataset_info.json").read_bytes()
  splits = (WHOLE,) if whole else SPLITS
  about = str(_LISTING_VERSION) + (WHOLE if whole else "")
  fingerprint = hashlib.sha256(about.encode() + listing).hexdigest()
  return Corpus(name, fingerprint, fingerprint, tfds_folder=folder, splits=splits)
