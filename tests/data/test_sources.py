# SPDX-License-Identifier: Apache-2.0
"""Corpora: which files, which split, and a fingerprint that follows the content."""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds

from flaxlm.data.corpus import SPLITS, WHOLE, Corpus
from flaxlm.data.files import DOCUMENT_BYTES
from flaxlm.data.sources import find_corpus, read_documents, read_pairs
from flaxlm.data.storage import data_dir, locked
from flaxlm.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def own_data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
  monkeypatch.setenv("FLAXLM_DATA_DIR", str(tmp_path / "data"))
  return tmp_path / "data"


def write(root: Path, files: dict[str, str | bytes]) -> Path:
  for name, content in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
  return root


def many(number: int) -> dict[str, str | bytes]:
  return {f"{n % 7}/{n}.txt": f"text {n}\n" * (n + 1) for n in range(number)}


def names(corpus: Corpus, split: str) -> set[str]:
  return {document.name for document in corpus.documents if document.split == split}


def texts(corpus: Corpus, split: str) -> list[str]:
  return [document.read() for document in corpus.documents if document.split == split]


def test_every_file_is_in_one_split(tmp_path: Path):
  files = many(200)
  corpus = find_corpus(f"files:{write(tmp_path / 'corpus', files)}")
  train, validation = (names(corpus, split) for split in SPLITS)
  assert train | validation == set(files)
  assert not train & validation
  number_of = lambda name: int(hashlib.sha256(name.encode()).hexdigest(), 16)
  assert validation == {name for name in files if number_of(name) % 20 == 0}
  assert sorted(texts(corpus, "train") + texts(corpus, "validation")) == sorted(
    files.values()
  )


def test_more_files_do_not_move_the_others(tmp_path: Path):
  before = find_corpus(f"files:{write(tmp_path / 'corpus', many(100))}")
  after = find_corpus(f"files:{write(tmp_path / 'corpus', many(150))}")
  for split in SPLITS:
    assert names(before, split) < names(after, split)


@pytest.mark.parametrize("number", range(2, 12))
def test_few_files_fill_both_splits(tmp_path: Path, number: int):
  corpus = find_corpus(f"files:{write(tmp_path / 'corpus', many(number))}")
  assert names(corpus, "train")
  assert names(corpus, "validation")


@pytest.mark.parametrize(
  ("files", "validation"),
  [
    (["train.txt", "validation.txt"], {"validation.txt"}),
    (
      ["train/a", "train/b", "validation/c", "validation/d"],
      {"validation/c", "validation/d"},
    ),
    (["x/train/a", "x/validation/b"], {"x/validation/b"}),
    (["train/a", "b"], {"b"}),  # b is free to fill the empty split
    (["validation/a", "b"], {"validation/a"}),
  ],
)
def test_names_keep_their_split(tmp_path: Path, files: list[str], validation: set[str]):
  root = write(tmp_path / "corpus", dict.fromkeys(files, "text"))
  assert names(find_corpus(f"files:{root}"), "validation") == validation


def test_a_single_file_is_cut_at_a_line(tmp_path: Path):
  text = "".join(f"line {n} é\n" for n in range(5000))
  root = write(tmp_path, {"input.txt": text})
  corpus = find_corpus(f"files:{root}/input.txt")
  (train,), (validation,) = (texts(corpus, split) for split in SPLITS)
  assert train + validation == text
  assert validation.startswith("line ")
  assert len(validation.encode()) / len(text.encode()) == pytest.approx(0.05, abs=0.001)


def test_a_single_line_is_cut_at_a_character(tmp_path: Path):
  root = write(tmp_path, {"input.txt": "漢" * 90})
  corpus = find_corpus(f"files:{root}/input.txt")
  assert [texts(corpus, split) for split in SPLITS] == [["漢" * 86], ["漢" * 4]]


def test_large_files_become_several_documents(tmp_path: Path):
  lines = "".join(f"{n:030}\n" for n in range(5 * DOCUMENT_BYTES // 31))
  no_lines = "é" * (3 * DOCUMENT_BYTES)
  root = write(
    tmp_path / "corpus", {"train/a": lines, "train/b": no_lines, "validation": "x"}
  )
  documents = texts(find_corpus(f"files:{root}"), "train")
  assert "".join(documents) == lines + no_lines
  assert all(len(text.encode()) <= 2 * DOCUMENT_BYTES + 31 for text in documents)
  assert all(text.endswith("\n") for text in documents if "0" in text)


def test_only_visible_text_is_read(tmp_path: Path):
  files = many(20) | {
    "a.png": b"\x89PNG\xff",
    "cut.txt": "é".encode()[:1],
    "nul.bin": b"a\0b",
    "empty.txt": "",
    ".hidden": "secret",
    ".git/config": "secret",
  }
  root = write(tmp_path / "corpus", files)
  lines: list[str] = []
  corpus = find_corpus(f"files:{root}", lines.append)
  assert names(corpus, "train") | names(corpus, "validation") == set(many(20))
  reasons = (
    "hidden folders: 1, as .git; hidden files: 1, as .hidden; "
    "not UTF-8 text: 3, as a.png; empty files: 1, as empty.txt"
  )
  assert lines == [f"files:{root}: not read are {reasons}"]


UNREADABLE = ["x.arrow", "x.ORC", "x.txt.xz", "x.zip", "x.tar.zst", "x.tar.gz"]


@pytest.mark.parametrize("name", UNREADABLE)
@pytest.mark.parametrize("pattern", ["{0}/{1}", "{0}", "{0}/*"])
def test_formats_that_are_not_read_are_refused_by_name(
  tmp_path: Path, name: str, pattern: str
):
  root = write(tmp_path / "corpus", {name: '{"text": "a"}\n' * 50})
  with pytest.raises(DataError, match=name) as error:
    find_corpus("files:" + pattern.format(root, name))
  assert "does not read" in str(error.value) and ".txt" in error.value.cure


def test_among_text_they_are_counted_and_mark_up_is_named(tmp_path: Path):
  root = write(tmp_path / "corpus", many(5) | {"a.zip": "{}\n", "b/c.zip": "{}\n"})
  write(root, {"d.json": "[1]", "e.csv": "1,2", "f.csv": "3"})
  lines: list[str] = []
  corpus = find_corpus(f"files:{root}", lines.append)
  names_of_all = {document.name for document in corpus.documents}
  assert names_of_all == {*many(5), "d.json", "e.csv", "f.csv"}
  assert lines == [
    f"files:{root}: not read are .zip files: 2, as a.zip",
    f"files:{root}: read as they are, with their syntax: 1 .json, 2 .csv",
  ]


def test_linked_folders_are_read_and_nothing_twice(tmp_path: Path):
  """Links to elsewhere, to what is there already, to nowhere, and round in a ring."""
  elsewhere = write(tmp_path / "elsewhere", {"x.txt": "x", "deep/y.txt": "y"})
  root = write(tmp_path / "corpus", {"a/1.txt": "1", ".store/2.txt": "2"})
  (elsewhere / "ring").symlink_to(root)
  (root / "linked").symlink_to(elsewhere)
  (root / "part").symlink_to(elsewhere / "deep")  # is in `linked` too
  (root / "0").symlink_to(root / "a")
  (root / "kept").symlink_to(root / ".store")
  (root / "b.txt").symlink_to(root / "a" / "1.txt")
  (root / "c.txt").symlink_to(tmp_path / "none.txt")
  lines: list[str] = []
  found = find_corpus(f"files:{root}", lines.append)
  read = {"a/1.txt", "linked/x.txt", "part/y.txt", "kept/2.txt"}
  assert {document.name for document in found.documents} == read
  (line,) = lines
  for reason in (
    "folders that are read by another name: 3, as 0",
    "files that are read by another name: 1, as b.txt",
    "links to nowhere: 1, as c.txt",
    "hidden folders: 1, as .store",
  ):
    assert reason in line
  globbed = find_corpus(f"files:{root}/**", lambda line: None)
  assert sorted(d.read() for d in globbed.documents) == ["1", "2", "x", "y"]


def test_what_cannot_be_read_is_counted(tmp_path: Path):
  root = write(tmp_path / "corpus", many(3))
  os.mkfifo(root / "pipe")
  lines: list[str] = []
  find_corpus(f"files:{root}", lines.append)
  assert lines == [f"files:{root}: not read are neither files nor folders: 1, as pipe"]
  with pytest.raises(DataError, match=r"no documents matched .*not UTF-8 text: 1, as a"):
    find_corpus(f"files:{write(tmp_path / 'b', {'a.pdf': bytes([255])})}")


def test_a_whole_corpus_is_not_split(tmp_path: Path, own_data_dir: Path):
  root = write(tmp_path / "corpus", many(30) | {"train/a": "a", "validation/b": "b"})
  parts, whole = find_corpus(f"files:{root}"), find_corpus(f"files:{root}", whole=True)
  assert (parts.splits, whole.splits) == (SPLITS, (WHOLE,))
  assert sorted(texts(whole, WHOLE)) == sorted(
    texts(parts, "train") + texts(parts, "validation")
  )
  assert whole.fingerprint != parts.fingerprint
  assert list(read_documents(whole, WHOLE, own_data_dir)) == texts(whole, WHOLE)
  one = find_corpus(f"files:{write(tmp_path, {'one.txt': 'é'})}/one.txt", whole=True)
  assert texts(one, WHOLE) == ["é"], "too small to be split, but not to be read"
  translations = find_corpus("gettext:de", whole=True)
  assert {pair.split for pair in translations.pairs} == {WHOLE}


def test_a_whole_public_dataset_is_all_its_splits(own_data_dir: Path):
  root = own_data_dir / "tfds"
  LetterSet(data_dir=str(root), file_format="array_record").download_and_prepare()
  whole = find_corpus("tfds:letter_set", whole=True)
  found = list(read_documents(whole, WHOLE, root))
  assert sorted(found) == sorted(f"é{s} {n}" for s in LetterSet.SPLITS for n in range(40))
  assert whole.fingerprint != find_corpus("tfds:letter_set").fingerprint


def test_globs(tmp_path: Path):
  root = write(tmp_path / "corpus", {"a/1.txt": "1", "a/b/2.txt": "2", "a/3.md": "3"})
  write(root, {"a/.h/4.txt": "4", "[x].txt": "5\n6"})

  def found(pattern: str) -> set[str]:
    corpus = find_corpus(f"files:{root}/{pattern}")
    return {document.name for document in corpus.documents}

  assert found("**/*.txt") == {"a/1.txt", "a/b/2.txt", "[x].txt"}
  assert found("a/**") == {"1.txt", "b/2.txt", "3.md"}
  assert found("a/*.*") == {"1.txt", "3.md"}
  assert found("[x].txt") == {"[x].txt"}  # a file called so, not a pattern


def test_the_fingerprint_follows_names_and_content_only(tmp_path: Path):
  def fingerprints(root: Path) -> tuple[str, str]:
    corpus = find_corpus(f"files:{root}")
    return corpus.fingerprint, corpus.train_fingerprint

  files: dict[str, str | bytes] = {
    "train/a": "one",
    "train/b": "two",
    "validation/c": "three",
  }
  original = fingerprints(write(tmp_path / "1", files))
  assert fingerprints(write(tmp_path / "2", files)) == original
  changed = fingerprints(write(tmp_path / "3", files | {"train/a": "ONE"}))
  assert changed[0] != original[0]
  assert changed[1] != original[1]
  held_out = fingerprints(write(tmp_path / "4", files | {"validation/c": "THREE"}))
  assert held_out[0] != original[0]
  assert held_out[1] == original[1]  # the same tokenizer serves
  renamed = fingerprints(
    write(tmp_path / "5", {"train/A": "one", **dict(list(files.items())[1:])})
  )
  assert renamed[0] != original[0]


@pytest.mark.parametrize(
  ("name", "error", "cause"),
  [
    ("files:{0}/nothing", DataError, "no documents matched"),
    ("files:{0}/*.png", DataError, "no documents matched"),
    ("files:{0}/tiny.txt", DataError, "too small"),
    ("files:{0}/one_character.txt", DataError, "too small"),
    ("files:", ConfigError, "not a corpus"),
    ("stdlibs", ConfigError, "not a corpus"),
    ("tfds:no_such_dataset", DataError, "no dataset 'no_such_dataset'"),
    ("tfds:lm1b/no_such_config", DataError, "no_such_config not found"),
    ("tfds:..", DataError, "cannot open"),
    ("gettext:", ConfigError, "not a corpus"),
    ("gettext:xx", DataError, "no installed package has a catalogue for gettext:xx"),
    ("gettext:../de", DataError, "no installed package has a catalogue"),
  ],
)
def test_what_is_not_there(tmp_path: Path, name: str, error: type[DataError], cause: str):
  write(tmp_path, {"tiny.txt": "x", "one_character.txt": "漢", "a.png": b"\xff"})
  with pytest.raises(error, match=cause):
    find_corpus(name.format(tmp_path))


def test_unknown_datasets_get_the_nearest_name():
  with pytest.raises(DataError) as error:
    find_corpus("tfds:tiny_shakespere")
  assert error.value.cure == "did you mean tiny_shakespeare?"


def test_without_a_network_a_download_fails_at_once(monkeypatch: pytest.MonkeyPatch):
  # A proxy on a port where nobody listens is as good as no network.
  for variable in ("http_proxy", "https_proxy"):
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
  start = time.perf_counter()
  with pytest.raises(DataError, match="does not answer"):
    find_corpus("tfds:tiny_shakespeare")
  assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
  ("name", "version"),
  [("tfds:a/b", "10.0.0"), ("tfds:a/b:9.0.0", "9.0.0"), ("tfds:a/b/9.0.0", "9.0.0")],
)
def test_a_version_of_a_dataset(tmp_path, monkeypatch, name: str, version: str):
  """The newest by number, or the one that is named in TFDS's way or as its folders are."""
  monkeypatch.setenv("FLAXLM_DATA_DIR", str(tmp_path))
  for number in ("9.0.0", "10.0.0"):
    folder = tmp_path / "tfds" / "a" / "b" / number
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text(number)
  assert find_corpus(name).tfds_folder == tmp_path / "tfds" / "a" / "b" / version


class LetterSet(tfds.core.GeneratorBasedBuilder):
  """Somebody's TFDS dataset."""

  VERSION = tfds.core.Version("1.0.0")
  SPLITS: tuple[str, ...] = ("train", "validation", "test")
  FEATURES: ClassVar[dict[str, object]] = {
    "text": tfds.features.Text(),
    "title": tfds.features.Text(),
  }

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(self.FEATURES),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager: object) -> dict[str, object]:
    return {split: self._generate_examples(split) for split in self.SPLITS}

  def _generate_examples(self, split: str):
    for n in range(40):
      yield n, {name: f"é{split} {n}" if name != "number" else n for name in self.FEATURES}


class BodySet(LetterSet):
  SPLITS = ("train", "test")
  FEATURES: ClassVar[dict[str, object]] = {
    "body": tfds.features.Text(),
    "number": tfds.features.Scalar(np.int32),
  }


class TrainSet(LetterSet):
  SPLITS = ("train",)


class ConfiguredSet(LetterSet):
  BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [
    tfds.core.BuilderConfig(name="first"),
    tfds.core.BuilderConfig(name="second"),
  ]


class TwoTexts(LetterSet):
  FEATURES: ClassVar[dict[str, object]] = {
    "question": tfds.features.Text(),
    "answer": tfds.features.Text(),
  }


@pytest.mark.parametrize(
  ("builder", "train", "validation"),
  [
    (LetterSet, ("train", 0, 40), ("validation", 0, 40)),
    (BodySet, ("train", 0, 40), ("test", 0, 40)),
    (TrainSet, ("train", 0, 38), ("train", 38, 40)),
  ],
)
def test_public_datasets(
  own_data_dir: Path,
  capfd: pytest.CaptureFixture[str],
  builder: type[LetterSet],
  train: tuple[str, int, int],
  validation: tuple[str, int, int],
):
  root = own_data_dir / "tfds"
  builder(data_dir=str(root), file_format="array_record").download_and_prepare()
  capfd.readouterr()
  corpus = find_corpus(f"tfds:{builder.name}")
  for split, (source, start, end) in zip(SPLITS, (train, validation), strict=True):
    text = read_documents(corpus, split, root)
    assert list(text) == [f"é{source} {n}" for n in range(start, end)]
    assert text[1] == f"é{source} {start + 1}"
  assert capfd.readouterr() == ("", "")


class PairSet(LetterSet):
  """Somebody's translations: the text of each feature begins with its name."""

  FEATURES: ClassVar[dict[str, object]] = tfds.features.Translation(("de", "en"))
  KEYS: tuple[str, str] | None = None

  def _info(self) -> tfds.core.DatasetInfo:
    features = self.FEATURES
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(features) if type(features) is dict else features,
      supervised_keys=self.KEYS,
      disable_shuffling=True,
    )

  def _generate_examples(self, split: str):
    for n in range(40):
      yield n, {name: f"{name} é{split} {n}" for name in self.FEATURES}


class WmtSet(PairSet):
  # As in wmt14_translate, whose keys say the opposite of what people translate.
  KEYS = ("de", "en")
  BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [
    tfds.core.BuilderConfig(name="de-en")
  ]


class KeysSet(PairSet):
  SPLITS = ("train",)
  KEYS = ("en", "de")


class NamedSet(PairSet):
  FEATURES: ClassVar[dict[str, object]] = {
    name: tfds.features.Text() for name in ("domain", "source", "target")
  }


@pytest.mark.parametrize(
  ("builder", "name", "source", "target"),
  [
    (WmtSet, "wmt_set/de-en", "en", "de"),
    (KeysSet, "keys_set", "en", "de"),
    (NamedSet, "named_set", "source", "target"),
  ],
)
def test_public_pairs(
  own_data_dir: Path,
  capfd: pytest.CaptureFixture[str],
  builder: type[PairSet],
  name: str,
  source: str,
  target: str,
):
  root = own_data_dir / "tfds"
  builder(data_dir=str(root), file_format="array_record").download_and_prepare()
  capfd.readouterr()
  corpus = find_corpus(f"tfds:{name}")
  train = range(40) if "validation" in builder.SPLITS else range(38)
  sources, targets = read_pairs(corpus, "train", root)
  assert list(sources) == [f"{source} étrain {n}" for n in train]
  assert list(targets) == [f"{target} étrain {n}" for n in train]
  assert len(read_pairs(corpus, "validation", root)[0]) == (40 if len(train) == 40 else 2)
  assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("builder", [PairSet, LetterSet, TwoTexts])
def test_public_pairs_need_a_direction(own_data_dir: Path, builder: type[LetterSet]):
  root = own_data_dir / "tfds"
  builder(data_dir=str(root), file_format="array_record").download_and_prepare()
  with pytest.raises(DataError, match="no pairs of source and target: its text"):
    read_pairs(find_corpus(f"tfds:{builder.name}"), "train", root)


@pytest.mark.parametrize(
  ("name", "folder"),
  [
    ("configured_set", "configured_set/first/1.0.0"),
    ("configured_set/second", "configured_set/second/1.0.0"),
  ],
)
def test_public_datasets_are_prepared_once(own_data_dir: Path, name: str, folder: str):
  lines: list[str] = []
  first = find_corpus(f"tfds:{name}", lines.append)
  assert first.tfds_folder == own_data_dir / "tfds" / folder
  written = (first.tfds_folder / "dataset_info.json").stat().st_mtime_ns
  assert find_corpus(f"tfds:{name}", lines.append) == first
  assert (first.tfds_folder / "dataset_info.json").stat().st_mtime_ns == written
  assert len(lines) == 1
  assert "preparing" in lines[0]


def test_public_datasets_need_one_text_feature(own_data_dir: Path):
  root = own_data_dir / "tfds"
  TwoTexts(data_dir=str(root), file_format="array_record").download_and_prepare()
  corpus = find_corpus("tfds:two_texts")
  with pytest.raises(DataError, match="2 text features"):
    read_documents(corpus, "train", root)


def test_local_files_make_the_round_trip_through_tfds(
  tmp_path: Path, own_data_dir: Path, capfd: pytest.CaptureFixture[str]
):
  files = many(50) | {"0/odd.txt": "\r\n\t é漢🙂\n\n"}
  corpus = find_corpus(f"files:{write(tmp_path / 'corpus', files)}")
  for split in SPLITS:
    read = list(read_documents(corpus, split, own_data_dir))
    assert read == texts(corpus, split)
  assert capfd.readouterr() == ("", "")


def test_the_data_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
  assert data_dir() == tmp_path / "data"
  monkeypatch.delenv("FLAXLM_DATA_DIR")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert data_dir() == tmp_path / "flaxlm"
  monkeypatch.delenv("XDG_CACHE_HOME")
  monkeypatch.setenv("HOME", str(tmp_path))
  assert data_dir() == tmp_path / ".cache" / "flaxlm"


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
  """Data do not land in the working folder."""
  monkeypatch.setenv("FLAXLM_DATA_DIR", "")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert data_dir() == tmp_path / "flaxlm"
  monkeypatch.setenv("XDG_CACHE_HOME", "")
  assert data_dir() == Path.home() / ".cache" / "flaxlm"


def test_nobodys_home_is_told(monkeypatch: pytest.MonkeyPatch):
  def home() -> Path:
    raise RuntimeError("Could not determine home directory.")

  for name in ("FLAXLM_DATA_DIR", "XDG_CACHE_HOME"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(Path, "home", home)
  with pytest.raises(DataError, match="no folder for data") as caught:
    data_dir()
  assert "FLAXLM_DATA_DIR" in caught.value.cure


@pytest.mark.parametrize("folder", ["a file/below", "/dev/full/below", "/proc/none"])
def test_a_data_directory_that_cannot_be_written_is_told(tmp_path: Path, folder: str):
  (tmp_path / "a file").touch()
  refused = pytest.raises(DataError, match="cannot prepare data in")
  with refused as caught, locked(tmp_path / folder, print):
    raise AssertionError("nobody holds it")
  assert "Errno" not in caught.value.cause


def test_building_needs_neither_tensorflow_nor_jax(tmp_path: Path, own_data_dir: Path):
  write(tmp_path / "corpus", many(5))
  code = (
    "import sys\n"
    "from pathlib import Path\n"
    "from flaxlm.data.sources import find_corpus, read_documents\n"
    "corpus = find_corpus(f'files:{sys.argv[1]}')\n"
    "read_documents(corpus, 'train', Path(sys.argv[2]))\n"
    "heavy = {'jax', 'tensorflow', 'torch'} & set(sys.modules)\n"
    "assert not heavy, heavy\n"
  )
  arguments = [str(tmp_path / "corpus"), str(own_data_dir)]
  subprocess.run([sys.executable, "-c", code, *arguments], check=True)
