# SPDX-License-Identifier: Apache-2.0
"""`flaxlm tokenizer`: it trains the tokenizer that training uses, and counts right."""

import json
from pathlib import Path

import pytest

from flaxlm.cli import main
from flaxlm.commands import tokenizer as tokenizer_command
from flaxlm.config import TokenizerConfig
from flaxlm.data.prepare import prepare
from flaxlm.tokenizers import Tokenizer

TRAIN, HELD_OUT = (
  "the cat sat on the mat, the dog too\n" * 200,
  "the cat sat. Über 猫\n" * 9,
)


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> str:
  monkeypatch.setenv("FLAXLM_DATA_DIR", str(tmp_path / "data"))
  monkeypatch.chdir(tmp_path)
  Path("train.txt").write_text(TRAIN)
  Path("validation.txt").write_text(HELD_OUT)
  return "files:*.txt"


def test_it_trains_the_tokenizer_of_a_training_run(corpus, capsys):
  assert main(["tokenizer", "train", "--vocab-size=270", f"--corpus={corpus}"]) == 0
  assert "270 ids" in capsys.readouterr().out
  theirs = prepare(corpus, TokenizerConfig(vocab_size=270)).tokenizer
  assert Tokenizer.load("tokenizer.json").fingerprint == theirs.fingerprint


def test_compared_by_hand(corpus, capsys):
  main(["tokenizer", "train", "--vocab-size=270", f"--corpus={corpus}"])
  capsys.readouterr()
  names = ["byte", "bpe:270", "tokenizer.json"]
  assert main(["tokenizer", "compare", *names, f"--corpus={corpus}", "--json"]) == 0
  rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [row["tokenizer"] for row in rows] == names
  byte, bpe, file = rows
  num_bytes = len(HELD_OUT.encode())
  of = {"corpus": corpus, "split": "validation", "bytes": num_bytes}
  assert all(of.items() <= row.items() for row in rows)
  assert byte["tokens"] == num_bytes and byte["bytes_per_token"] == 1
  assert byte["tokens_per_word"] == num_bytes / (9 * 5)
  assert byte["ids_used"] == len(set(HELD_OUT.encode())) / 257
  assert bpe["tokens"] < num_bytes and bpe["vocab_size"] == 270
  assert all(row["lossless"] and row["megabytes_per_second"] > 0 for row in rows)
  for row in (bpe, file):
    row.pop("megabytes_per_second"), row.pop("tokenizer")
  assert bpe == file


def test_what_is_compared_on_is_told(corpus, capsys, monkeypatch):
  """It is a twentieth of a single file, and the beginning of a large corpus."""
  size = f"{len(HELD_OUT.encode())} bytes of what {corpus} holds out (its split validation)"
  for most, first in ((2**22, ""), (10, "the first ")):
    monkeypatch.setattr(tokenizer_command, "COMPARED_BYTES", most)
    assert main(["tokenizer", "compare", "byte", f"--corpus={corpus}"]) == 0
    assert capsys.readouterr().out.startswith(first + size)


def test_encoded(corpus, capsys):
  ask = ["tokenizer", "encode", "byte", f"--corpus={corpus}", "--text", "a\né"]
  assert main([*ask, "--json"]) == 0
  found = json.loads(capsys.readouterr().out)
  assert found == {
    "text": "a\né",
    "ids": [97, 10, 195, 169],
    "pieces": ["a", "↵", "\\xc3", "\\xa9"],
  }
  assert main(ask) == 0
  assert "4 tokens, 4 bytes, 3 characters" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("arguments", "code", "cause"),
  [
    (["train", "--vocab-size=3"], 2, "--vocab-size can be from 257"),
    (["train", "--kind=words"], 2, "argument --kind: invalid choice"),
    (["compare", "bpe"], 2, "is not a tokenizer"),
    (["compare", "no/such/run"], 2, "is not a tokenizer"),
    (["encode", "train.txt", "--text=a"], 3, "not a tokenizer.json"),
    (["train", "--output=no/such/folder.json", "--kind=byte"], 2, "cannot be written"),
    (["compare", "byte", "--corpus=files:nothing*"], 3, "nothing"),
    ([], 2, "ACTION"),
  ],
)
def test_bad_input(corpus, capsys, arguments, code, cause):
  if arguments and not any(a.startswith("--corpus") for a in arguments):
    arguments = [*arguments, f"--corpus={corpus}"]
  assert main(["tokenizer", *arguments]) == code
  assert cause in capsys.readouterr().err
