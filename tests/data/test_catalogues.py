# SPDX-License-Identifier: Apache-2.0
"""Pairs from gettext catalogues: Django's, and some that are made here."""

import gettext
import json
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import django
import pytest
import tensorflow_datasets as tfds

from flaxlm.data.corpus import SPLITS, Corpus
from flaxlm.data.sources import find_corpus, read_pairs
from flaxlm.errors import DataError

POLISH = (
  "nplurals=3; plural=(n==1 ? 0 : n%10>=2 && n%10<=4 && (n%100<12 || n%100>14) ? 1 : 2);"
)
HEADER = f"Content-Type: text/plain; charset=UTF-8\nPlural-Forms: {POLISH}\n"


def catalogue(messages: dict[str, str], order: str = "<", header: str = HEADER) -> bytes:
  """A .mo file (GNU gettext manual, section 10.3)."""
  entries = sorted((k.encode(), v.encode()) for k, v in {"": header, **messages}.items())
  strings = [key for key, _ in entries] + [value for _, value in entries]
  count, tables, data = len(entries), b"", b""
  start = 28 + 16 * count
  for string in strings:
    tables += struct.pack(f"{order}2I", len(string), start + len(data))
    data += string + b"\0"
  numbers = 0x950412DE, 0, count, 28, 28 + 8 * count, 0, start
  return struct.pack(f"{order}7I", *numbers) + tables + data


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
  """Puts catalogues of the language xx where packages are installed."""
  monkeypatch.setenv("FLAXLM_DATA_DIR", str(tmp_path / "data"))
  root = tmp_path / "site-packages"
  monkeypatch.setattr(sys, "path", [*sys.path, str(root)])

  def add(name: str, content: dict[str, str] | bytes, language: str = "xx") -> None:
    path = root / name / "locale" / language / "LC_MESSAGES" / f"{Path(name).name}.mo"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else catalogue(content))

  return add


def pairs(corpus: Corpus) -> list[tuple[str, str]]:
  return [(pair.source, pair.target) for pair in corpus.pairs]


def test_django_in_german():
  corpus = find_corpus("gettext:de")
  by_source = dict(pairs(corpus))
  assert len(by_source) > 600
  assert by_source["Enter a valid value."] == "Bitte einen gültigen Wert eingeben."
  # Nothing in it but language: no header, no context, nothing that is left in English.
  assert not any("\4" in text or "\0" in text for pair in pairs(corpus) for text in pair)
  assert not any("Project-Id-Version" in target for target in by_source.values())
  assert all(source.strip() and target.strip() for source, target in pairs(corpus))
  assert all(source != target for source, target in pairs(corpus))
  assert len(set(pairs(corpus))) == len(corpus.pairs)


def test_django_says_the_same():
  folder = Path(django.__file__).parent / "conf" / "locale"
  translation = gettext.translation("django", folder, ["de"])
  found = set(pairs(find_corpus("gettext:de")))  # other packages may say it differently
  for source in ("January", "Enter a number.", "This field is required."):
    assert (source, translation.gettext(source)) in found
  one, many = "%(num)d year", "%(num)d years"
  ones = translation.npgettext("x", one, many, 1), translation.ngettext(one, many, 1)
  assert any((one, german) in found for german in ones)
  assert (many, translation.ngettext(one, many, 7)) in found


@pytest.mark.parametrize("language", ["de", "fr", "ar", "ja", "pt_BR"])
def test_no_source_is_in_both_splits(language: str):
  corpus = find_corpus(f"gettext:{language}")
  train, validation = (
    {pair.source for pair in corpus.pairs if pair.split == split} for split in SPLITS
  )
  assert train
  assert validation
  assert not train & validation
  assert 0.02 < len(validation) / len(train | validation) < 0.09


def test_finding_again_gives_the_same():
  code = (
    "import json, sys\n"
    "from flaxlm.data.sources import find_corpus\n"
    "corpus = find_corpus('gettext:de')\n"
    "print(json.dumps([corpus.fingerprint, corpus.pairs]))\n"
    "heavy = {'django', 'jax', 'tensorflow_datasets', 'numpy'} & set(sys.modules)\n"
    "assert not heavy, heavy\n"
  )
  result = subprocess.run(
    [sys.executable, "-W", "error", "-c", code], capture_output=True, check=True
  )
  corpus = find_corpus("gettext:de")
  fingerprint, there = json.loads(result.stdout)
  assert fingerprint == corpus.fingerprint
  assert [tuple(pair) for pair in there] == list(corpus.pairs)


def sorted_reasons(line: str) -> str:
  """Their order is that of the catalogue, which is that of its sources' bytes."""
  head, reasons = line.split("are ")
  return f"{head}are {', '.join(sorted(reasons.split(', ')))}"


@pytest.mark.parametrize("order", ["<", ">"])
def test_what_a_catalogue_gives(install: Callable, order: str):
  messages = {
    "Yes": "Tak",
    "verb\4Open": "Otwórz",
    "adjective\4Open": "Otwarty",
    "%d file\0%d files": "%d plik\0%d pliki\0%d plików",
    "menu\4%d day\0%d days": "%d dzień\0%d dni\0%d dni",
    "OK": "OK",
    "Empty": "",
    "Blank": " \n",
    " ": "?",
    "  Indented\n": "  Wcięty\n",
  }
  install("p", catalogue(messages, order))
  install("q", {"Yes": "Tak"})
  told: list[str] = []
  left_out = "1 the same in both languages, 1 there already, 3 empty"
  corpus = find_corpus("gettext:xx", told.append)
  assert [*map(sorted_reasons, told)] == [f"gettext:xx: 8 pairs; left out are {left_out}"]
  assert sorted(pairs(corpus)) == [
    ("  Indented\n", "  Wcięty\n"),
    ("%d day", "%d dzień"),
    ("%d days", "%d dni"),
    ("%d file", "%d plik"),
    ("%d files", "%d plików"),
    ("Open", "Otwarty"),
    ("Open", "Otwórz"),
    ("Yes", "Tak"),
  ]


def test_a_pair_comes_once_and_every_translation_of_a_source_in_one_split(
  install: Callable,
):
  install("b/second", {f"word {n}": f"drugie {n}" for n in range(100)})
  install("a/first", {f"word {n}": f"słowo {n}" for n in range(100)})
  install("c/third", {f"word {n}": f"słowo {n}" for n in range(100)})
  corpus = find_corpus("gettext:xx")
  assert len(corpus.pairs) == 200
  assert {pair.domain for pair in corpus.pairs} == {"first", "second"}
  assert [pair.domain for pair in corpus.pairs[:100]] == ["first"] * 100
  splits = {(pair.source, pair.split) for pair in corpus.pairs}
  assert len(splits) == 100
  assert 0 < sum(split == "validation" for _, split in splits) < 15


def test_the_fingerprint_follows_the_pairs(install: Callable):
  messages = {f"word {n}": f"słowo {n}" for n in range(100)}
  install("a", messages)
  before = find_corpus("gettext:xx")
  install("b", {"word 1": "słowo 1"})  # nothing new
  install("c", {"other": "inny"}, language="yy")  # another language
  assert find_corpus("gettext:xx") == before
  install("b", {"word 1": "słówko 1"})
  after = find_corpus("gettext:xx")
  assert after.fingerprint != before.fingerprint
  assert set(after.pairs) - set(before.pairs) == {
    next(p for p in before.pairs if p.source == "word 1")._replace(
      target="słówko 1", domain="b"
    )
  }


def test_a_text_may_be_called_like_a_split(install: Callable):
  messages = {"train": "pociąg", "validation": "walidacja", "validation/x": "x/y"}
  install("a", messages | {f"word {n}": f"słowo {n}" for n in range(40)})
  splits = {pair.source: pair.split for pair in find_corpus("gettext:xx").pairs}
  assert {splits[source] for source in messages} == {"train"}  # by their hashes


def test_languages_are_taken_at_their_word(install: Callable):
  for language in ("xx", "xx_AA", "xx@latin"):
    install("a", {"one": f"1 {language}", "two": f"2 {language}"}, language)
  for language in ("xx", "xx_AA", "xx@latin"):
    assert {target for _, target in pairs(find_corpus(f"gettext:{language}"))} == {
      f"1 {language}",
      f"2 {language}",
    }
  with pytest.raises(DataError) as error:
    find_corpus("gettext:xx_BB")
  assert "did you mean gettext:xx_AA" in error.value.cure
  with pytest.raises(DataError) as error:
    find_corpus("gettext:*")
  assert "pip install Django" in error.value.cure
  assert error.value.exit_code == 3


def test_without_any_catalogue(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
  monkeypatch.setattr(sys, "path", [str(tmp_path)])
  monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
  with pytest.raises(DataError, match="no installed package") as error:
    find_corpus("gettext:de")
  assert error.value.cure == (
    "pip install Django gramps brings those of many languages, as gettext:de; here are none"
  )


@pytest.mark.parametrize(
  "damaged",
  [
    b"",
    b"\xde\x12\x04\x95",
    b"not a catalogue at all, but longer than a header",
    catalogue({"one": "jeden"})[:-8],
    catalogue({"one": "jeden"})[:40],
    catalogue({"one": "jeden"}).replace(b"UTF-8", b"UTF-9"),
    catalogue({"one": "jeden"}).replace(b"jeden", b"\xff\xff\xff\xff\xff"),
    catalogue({"one": "jeden"}, header="Content-Type: text/plain\n"),
    catalogue({"one\0two": "1\0002"}, header=HEADER.replace(POLISH, "plural=n%0;")),
    catalogue({"one\0two": "1\0002"}, header=HEADER.replace(POLISH, "nplurals=2; p")),
    catalogue({"a": "b"}, header=HEADER.replace(POLISH, "nplurals=1; plural=exit(n);")),
  ],
)
def test_damaged_catalogues_are_skipped(install: Callable, damaged: bytes):
  install("a", damaged)
  install("b", {"one": "jeden", "two": "dwa"})
  lines: list[str] = []
  corpus = find_corpus("gettext:xx", lines.append)
  assert pairs(corpus) == [("one", "jeden"), ("two", "dwa")]
  assert {pair.split for pair in corpus.pairs} == set(SPLITS)
  assert lines == [
    "gettext:xx: skipped what is not a catalogue: 1, as a/locale/xx/LC_MESSAGES/a.mo"
  ]


@pytest.mark.parametrize("messages", [{}, {"one": "jeden"}, {"one": "one", "two": ""}])
def test_too_few_texts(install: Callable, messages: dict[str, str]):
  install("a", messages)
  with pytest.raises(DataError, match="gettext:xx is too small") as error:
    find_corpus("gettext:xx")
  assert "pip install Django" in error.value.cure


def test_pairs_make_the_round_trip_through_tfds(
  tmp_path: Path, install: Callable, capfd: pytest.CaptureFixture[str]
):
  messages = {f"word\n{n}\t": f"słowo 漢🙂\r\n{n}" for n in range(50)}
  install("words", messages)
  corpus = find_corpus("gettext:xx")
  root = tmp_path / "tfds"
  for split in SPLITS:
    expected = [(p.source, p.target) for p in corpus.pairs if p.split == split]
    sources, targets = read_pairs(corpus, split, root)
    assert list(zip(sources, targets, strict=True)) == expected
  assert capfd.readouterr() == ("", "")
  # It is a dataset like any other, named for what is in it.
  (folder,) = root.glob(f"local_pairs/gettext-{corpus.fingerprint[:16]}/1.0.0")
  builder = tfds.builder_from_directory(str(folder))
  assert {*builder.info.features} == {"source", "target", "domain"}
  assert builder.as_data_source("train")[0]["domain"] == b"words"
