# SPDX-License-Identifier: Apache-2.0
"""Finds corpora, and reads their text: which documents or pairs there are, how they are
split, and a fingerprint of all of it.

`find_corpus` lists and hashes files with the standard library alone, in 0.1 s for `stdlib`,
so that a second run, whose tokens are stored already, has nothing to import. The text
itself is read by `texts` where there are records, and else through TFDS, by `builders`.

`gettext:LANG` consists of pairs: the messages of programs in English and in LANG. They come
from the catalogues of installed Python packages, which are read as data and never imported.
A pair is in validation if the SHA-256 of its source is 0 modulo 20, so that no source is in
both splits.
"""

import difflib
import gettext
import hashlib
import io
import os
import re
import struct
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from flaxlm.data.corpus import SPLITS, WHOLE, Corpus, Log, Pair, fingerprints, split_by_hash
from flaxlm.data.files import files_corpus, stdlib_corpus
from flaxlm.data.mixtures import parse_mixture
from flaxlm.data.storage import data_dir, locked, to_stderr
from flaxlm.errors import ConfigError, DataError

# A number for which most languages use the plural form of "many".
MANY = 5
TEXT_FIELD = "text"  # of records, if no other is named
_LISTING_VERSION = 1  # a part of fingerprints: raise it when the rules of this file change


def find_corpus(
  name: str, log: Log = to_stderr, whole: bool = False, text_field: str = TEXT_FIELD
) -> Corpus:
  """The corpus `stdlib`, `files:GLOB` (or folder, or file), `tfds:NAME[/CONFIG][:VERSION]`
  or `gettext:LANG`; a `whole` one is not split. `text_field` is that of records in files.

  Downloads a TFDS dataset that is not there yet. Raises `DataError` if nothing is found.
  """
  kind, _, rest = name.partition(":")
  if name == "stdlib":
    return stdlib_corpus(name, log, whole)
  if kind == "files" and rest:
    return files_corpus(name, rest, log, whole, text_field)
  if kind == "tfds" and rest:
    return _tfds_corpus(name, rest, log, whole)
  if kind == "gettext" and rest:
    return _gettext_corpus(name, rest, log, whole)
  if parse_mixture(name):
    raise ConfigError(f"{name!r} is a mixture", "name one of its corpora here")
  known = ["stdlib", "files:GLOB", "tfds:NAME", "gettext:LANG"]
  near = difflib.get_close_matches(name, known, 1)
  raise ConfigError(
    f"data.corpus={name!r} is not a corpus",
    f"did you mean {near[0]}?" if near else f"it can be {', '.join(known)}",
  )


def read_documents(
  corpus: Corpus, split: str, root: Path, log: Log = to_stderr
) -> Sequence[str]:
  """The documents of a split, in a fixed order; copies of texts are kept in `root`.

  Raises `DataError` if the corpus is made of pairs, or a record of it has no text.
  """
  if corpus.pairs:
    raise DataError(
      f"{corpus.name} is made of pairs, not of documents",
      "set --model.family=encoder_decoder --data.objective=seq2seq",
    )
  if corpus.record_files:
    from flaxlm.data.texts import read_texts  # finding a corpus does without numpy

    return read_texts(corpus, split, root, log)
  from flaxlm.data import builders  # importing TFDS costs 0.5 s

  (documents,) = builders.read_texts(corpus, split, root, paired=False)
  return documents


def read_pairs(
  corpus: Corpus, split: str, root: Path
) -> tuple[Sequence[str], Sequence[str]]:
  """The sources and the targets of a split, in a fixed order.

  Raises `DataError` if the corpus is made of documents.
  """
  from flaxlm.data import builders  # importing TFDS costs 0.5 s

  if corpus.documents or corpus.record_files:
    raise DataError(
      f"{corpus.name} has no pairs of source and target",
      "use gettext:LANG (as gettext:de, after `pip install Django`) or a translation "
      "dataset of TFDS (as tfds:wmt14_translate/de-en)",
    )
  source, target = builders.read_texts(corpus, split, root, paired=True)
  return source, target


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
  splits = split_by_hash(dict.fromkeys(sources), whole)
  pairs = [Pair(splits[pair[0]], *pair, domain) for pair, domain in found.items()]
  wanted = (WHOLE,) if whole else SPLITS
  return Corpus(name, *fingerprints(pairs), pairs=tuple(pairs), splits=wanted)


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
