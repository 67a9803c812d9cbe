# SPDX-License-Identifier: Apache-2.0
"""TFDS datasets: our own, built from local files, and the public ones.

They are always read from array_record files by `as_data_source`, because TFDS's default
format needs TensorFlow.
"""

import contextlib
import difflib
import io
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from absl import logging as absl_logging

from flaxlm.data.corpus import WHOLE, Corpus, Document, Log, Pair, Texts, read_in_order
from flaxlm.errors import DataError, first_line

FILE_FORMAT = "array_record"
REACHABLE_SECONDS = 4.0
PAIR_FEATURES: tuple[str, ...] = ("source", "target")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Silences TFDS: no progress bars, no log messages, nothing on stdout."""
  tfds.disable_progress_bar()
  verbosity = absl_logging.get_verbosity()
  absl_logging.set_verbosity(absl_logging.ERROR)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    absl_logging.set_verbosity(verbosity)


class LocalConfig(tfds.core.BuilderConfig):
  """A corpus under a name that changes with its content: TFDS prepares each name once."""

  def __init__(self, corpus: Corpus):
    kind = corpus.name.partition(":")[0]
    super().__init__(name=f"{kind}-{corpus.fingerprint[:16]}")
    self.parts: Sequence[Document | Pair] = corpus.documents or corpus.pairs
    self.splits = corpus.splits


class LocalText(tfds.core.GeneratorBasedBuilder):
  """Local text files as a TFDS dataset."""

  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS: Sequence[Any] = []
  FEATURES: tuple[str, ...] = ("text", "path")

  def _info(self) -> tfds.core.DatasetInfo:
    features = {name: tfds.features.Text() for name in self.FEATURES}
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(features),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    parts = self.builder_config.parts
    return {
      split: self._generate_examples([part for part in parts if part.split == split])
      for split in self.builder_config.splits
    }

  def _generate_examples(self, parts: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    for number, values in enumerate(self._values(parts)):
      yield number, dict(zip(self.FEATURES, values, strict=True))

  def _values(self, parts: Sequence[Any]) -> Iterator[tuple[str, ...]]:
    return zip(read_in_order(parts), (part.name for part in parts), strict=True)


class LocalPairs(LocalText):
  """The pairs of local catalogues as a TFDS dataset."""

  VERSION = tfds.core.Version("1.0.0")
  FEATURES = (*PAIR_FEATURES, "domain")

  def _values(self, parts: Sequence[Any]) -> Iterator[tuple[str, ...]]:
    return ((part.source, part.target, part.domain) for part in parts)


class TextSource(Texts):
  """The texts of a TFDS data source."""

  def __init__(self, records: Sequence[Mapping[str, Any]], feature: str):
    self._records, self._feature = records, feature

  def __len__(self) -> int:
    return len(self._records)

  def read(self, number: int) -> str:
    text = self._records[number][self._feature]
    return text if isinstance(text, str) else text.decode("utf-8", "replace")


@_quiet()
def read_texts(corpus: Corpus, split: str, root: Path, paired: bool) -> list[TextSource]:
  """[the documents] of a split or, with `paired`, [the sources, the targets].

  The first call copies a local corpus into a TFDS dataset in `root`. In a public dataset
  without a `validation` split, `test` stands in, or else the last 5% of `train`.
  """
  folder, features = corpus.tfds_folder, PAIR_FEATURES if paired else ("text",)
  if folder is None:
    kind = LocalPairs if paired else LocalText
    builder = kind(config=LocalConfig(corpus), data_dir=str(root), file_format=FILE_FORMAT)
    try:
      builder.download_and_prepare()
    except RuntimeError as e:  # of array_record's writer, in C++
      raise DataError(
        f"cannot prepare data in {root}: {first_line(e)}",
        "free some space, or set FLAXLM_DATA_DIR to another folder",
      ) from e
    records = builder.as_data_source(split)
  else:
    builder = tfds.builder_from_directory(str(folder))
    declared = builder.info.features.items()
    texts = [name for name, f in declared if isinstance(f, tfds.features.Text)]
    find = _pair_features if paired else _document_feature
    features = find(builder, folder, texts)
    records = _records(builder, folder, split)
  return [TextSource(records, feature) for feature in features]


def _document_feature(builder: Any, folder: Path, texts: Sequence[str]) -> tuple[str, ...]:
  """The only text feature of a dataset, or the one called `text`."""
  if "text" in texts:
    return ("text",)
  if len(texts) == 1:
    return tuple(texts)
  raise DataError(
    f"{folder} has {len(texts)} text features ({', '.join(texts) or 'none'})",
    "a corpus needs one, or one called `text`",
  )


def _pair_features(builder: Any, folder: Path, texts: Sequence[str]) -> tuple[str, ...]:
  """The features of a dataset of pairs that are source and target.

  Features called `source` and `target` are used as such. In a configuration A-B of two
  languages, such as wmt14_translate/de-en, B (English) is the source and A the target.
  Other datasets say themselves which feature is the input.
  """
  named = tuple((builder.info.config_name or "").split("-")[::-1])
  for way in (PAIR_FEATURES, named, builder.info.supervised_keys or ()):
    if len(way) == 2 and all(feature in texts for feature in way):
      return tuple(way)
  raise DataError(
    f"{folder} has no pairs of source and target: its text features are "
    f"{', '.join(texts) or 'none'}",
    "use a translation dataset, as tfds:wmt14_translate/de-en",
  )


def _records(builder: Any, folder: Path, split: str) -> Sequence[Any]:
  choices = {"train": "train", "validation": "validation", WHOLE: "all"}
  if "validation" not in builder.info.splits:
    choices["validation"] = "test"
    if "test" not in builder.info.splits:
      choices |= {"train": "train[:95%]", "validation": "train[95%:]"}
  try:
    return builder.as_data_source(choices[split])
  except (NotImplementedError, ValueError) as e:  # another file format, no such split
    raise DataError(f"cannot read {choices[split]} of {folder}: {_first_line(e)}") from e


@_quiet()
def download(dataset: str, root: Path, log: Log) -> Path:
  """Prepares the public dataset NAME[/CONFIG] below `root`; returns its folder."""
  try:
    builder = tfds.builder(dataset, data_dir=str(root), file_format=FILE_FORMAT)
  except tfds.core.DatasetNotFoundError as e:
    name = re.split("[:/]", dataset)[0]
    near = difflib.get_close_matches(name, _public_names(str(e)), 3)
    cure = f"did you mean {' or '.join(near)}?" if near else "see tensorflow.org/datasets"
    raise DataError(f"TFDS has no dataset {name!r}", cure) from e
  except Exception as e:  # a dataset's own code runs here, and may raise anything
    raise DataError(f"cannot open tfds:{dataset}: {_first_line(e)}") from e
  if not builder.is_prepared():
    urls = [url for url in builder.url_infos or () if url.startswith("http")]
    if urls and not _reachable(urls[0]):
      raise DataError(
        f"cannot download tfds:{dataset}: {urls[0]} does not answer",
        f"prepare it where there is a network and copy {root}, or use files:GLOB",
      )
    log(f"tfds:{dataset} is not in {root} yet: preparing it")
    try:
      builder.download_and_prepare()
    except Exception as e:
      raise DataError(f"cannot prepare tfds:{dataset}: {_first_line(e)}") from e
  return Path(builder.data_dir)


def _public_names(message: str) -> set[str]:
  # The error message is the only list: tfds.list_builders() imports TensorFlow.
  return {line[3:] for line in message.splitlines() if line.startswith("\t- ")}


def _reachable(url: str) -> bool:
  """Whether a server answers soon; TFDS itself would keep trying for minutes."""
  answers = []

  def ask() -> None:
    request = urllib.request.Request(url, method="HEAD")
    try:
      urllib.request.urlopen(request, timeout=REACHABLE_SECONDS).close()
      answers.append(True)
    except urllib.error.HTTPError:
      answers.append(True)  # it answers, even if it refuses HEAD
    except (OSError, ValueError):
      pass

  # In a thread, because the timeout does not cover the name look-up.
  thread = threading.Thread(target=ask, daemon=True)
  thread.start()
  thread.join(REACHABLE_SECONDS)
  return bool(answers)


def _first_line(error: Exception) -> str:
  return f"{type(error).__name__}: {error}".splitlines()[0]
