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
  Path("text.model").write_text(HELD_OUT)
  titles = [f"a dog and {number} cats" for number in range(90)]
  lines = [json.dumps({"title": title, "text": TRAIN[:400]}) for title in titles]
  Path("records.jsonl").write_text("\n".join(lines))
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
    assert f"\n{first}{size}" in capsys.readouterr().out


def test_all_methods_are_compared(corpus, capsys):
  """Each shows the sentence, and says what it leaves out."""
  ask = ["tokenizer", "compare", "--vocab-size=600", f"--corpus={corpus}", "--json"]
  assert main([*ask, "--text=the owl 猫", "--width=8"]) == 0
  captured = capsys.readouterr()
  rows = {row["tokenizer"]: row for row in map(json.loads, captured.out.splitlines())}
  assert [*rows] == ["byte", "char", "word", "bpe", "wordpiece", "unigram"]
  assert "words that the vocabulary lacks are unknown" in captured.err
  assert rows["word"]["pieces"] == ["the", "[UNK]", "[UNK]"]
  assert {name for name, row in rows.items() if not row["lossless"]} == {"word"}
  # Of "the cat sat. Über 猫\n", five words, two are unknown: " Über" and " 猫\n" is two.
  encoded = rows["word"]["tokens"]
  assert 0 < rows["word"]["unknown"] == pytest.approx(9 * 3 / encoded, abs=0.2)
  for row in rows.values():
    assert row["tokens_per_byte"] == pytest.approx(1 / row["bytes_per_token"])
    assert row["embedding"] == [-(-row["vocab_size"] // 64) * 64, 8]
    assert row["embedding_parameters"] == row["embedding"][0] * 8


def test_the_sentence_is_coloured_on_a_terminal(monkeypatch):
  monkeypatch.delenv("NO_COLOR", raising=False)
  parts = [*tokenizer_command.colours(["the", "[UNK]", "."], [3, 0, 4], 0, True)]
  assert [text for text, _ in parts] == ["the", "[UNK]", "."]
  assert parts[1][1] == tokenizer_command.UNKNOWN_COLOUR
  assert parts[0][1] != parts[2][1]  # neighbours can be told apart
  plain = tokenizer_command.colours(["the", "[UNK]", "."], [3, 0, 4], 0, False)
  assert "".join(text for text, _ in plain) == "the|[UNK]|."


def test_mixtures_and_records_are_read_as_training_reads_them(corpus, capsys):
  mixture = "3 files:*.txt + 1 files:records.jsonl"
  ask = ["tokenizer", "train", "--vocab-size=280", f"--corpus={mixture}"]
  assert main([*ask, "--text-field=title"]) == 0
  theirs = prepare(mixture, TokenizerConfig(vocab_size=280), text_field="title").tokenizer
  assert Tokenizer.load("tokenizer.json").fingerprint == theirs.fingerprint
  capsys.readouterr()
  ask = ["tokenizer", "compare", "byte", f"--corpus={mixture}", "--json"]
  assert main([*ask, "--text-field=title"]) == 0
  assert json.loads(capsys.readouterr().out)["bytes"] > len(HELD_OUT.encode())


def test_merges_are_shown(corpus, capsys):
  ask = ["tokenizer", "merges", " cat", "--tokenizer=bpe:300", f"--corpus={corpus}"]
  assert main(ask) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].split() == ["·", "c", "a", "t"]
  assert lines[-2].split()[1] == "·cat"
  assert main([*ask, "--json"]) == 0
  (word,) = json.loads(capsys.readouterr().out)["words"]
  assert word["pieces"] == ["·", "c", "a", "t"]
  assert word["merges"][-1]["pieces"] == ["·cat"] and len(word["merges"]) == 3
  ranks = [step["rank"] for step in word["merges"]]
  assert [int(line.split()[0]) for line in lines[1:-1]] == ranks


@pytest.mark.slow
def test_bits_per_byte_of_small_models(in_process, corpus):
  """A model of each is trained for so long, and its figures are those of an evaluation."""
  sizes = {"model.depth": 1, "model.width": 16, "model.num_heads": 2, "data.seq_len": 32}
  flags = [f"--{name}={value}" for name, value in sizes.items()]
  run = in_process(
    *("tokenizer", "compare", "byte", "word:300", f"--corpus={corpus}", "--json"),
    *("--train-seconds=1", *flags),
  )
  assert run.returncode == 0, run.stderr
  byte, word = map(json.loads, run.stdout.splitlines())
  for row in (byte, word):
    assert row["steps"] >= 1 and row["train_seconds"] == 1
    assert 0 < row["bits_per_byte"] < 9
  unknown_bytes = len("Über猫") + 3
  assert word["bits_per_byte"] > 8 * 9 * unknown_bytes / word["bytes"]


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
    (["train", "--kind=wordpiece", "--vocab-size=512"], 2, "--vocab-size=512 has no room"),
    (["compare", "bpe:"], 2, "is not a tokenizer"),
    (["compare", "byte:300"], 2, "is not a tokenizer"),
    (["compare", "no/such/run"], 2, "is not a tokenizer"),
    (["compare", "byte", "--width=0"], 2, "--width is 0"),
    (["compare", "byte", "--model.width=64"], 2, "unknown argument --model.width=64"),
    (["compare", "byte", "--train-seconds=0"], 2, "--train-seconds is 0"),
    (["compare", "byte", "--train-seconds=1", "--tokenizer.kind=char"], 2, "decides"),
    (
      [
        "compare",
        "byte",
        "--train-seconds=1",
        "--model.family=encoder",
        "--data.objective=masked",
      ],
      2,
      "has no bits per byte",
    ),
    (["compare", "text.model"], 3, "text.model is not a SentencePiece model"),
    (["merges", ""], 2, "there is no word"),
    (["merges", "cat", "--tokenizer=unigram"], 3, "does not merge: its model is Unigram"),
    (["train", "--corpus=files:records.jsonl", "--text-field=words"], 3, "words"),
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
