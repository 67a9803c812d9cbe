# SPDX-License-Identifier: Apache-2.0
"""Runs with the tokenizers that leave something out, or are of others: trained, evaluated,
decoded from, resumed and exported (slow)."""

import json
from pathlib import Path

import pytest
import tokenizers
from conftest import fuzz, tiny
from test_sentencepiece import BYTES, LETTERS, MERGED, PLAIN, START, model

from flaxlm.errors import DataError

pytestmark = pytest.mark.slow

DIGITS = [(letter, -9.0, 1) for letter in "0123456789.\n"]
MODELS = {
  "bytes.model": model([*START, *BYTES, *LETTERS, *MERGED], {3: 2, 35: 1}, PLAIN),
  "letters.model": model([*START, *LETTERS, *DIGITS], {3: 1}, PLAIN),
}


@pytest.mark.parametrize("named", ["word", "bytes.model", fuzz("letters.model")])
def test_from_text_to_export(in_process, corpus: str, tmp_path: Path, named: str):
  flags = {"tokenizer__kind": named, "tokenizer__vocab_size": 257}
  if named in MODELS:
    Path(named).write_bytes(MODELS[named])
    flags = {"tokenizer__path": named}
  for num_steps in (2, 3):  # the second goes on with the first
    ask = tiny(corpus, name="mine", training__num_steps=num_steps, **flags)
    run = in_process("train", *(word for word in ask if "kind=byte" not in word))
    assert run.returncode == 0, run.stderr
  said = {
    "word": "words that the vocabulary lacks are unknown ([UNK]), and are lost",
    "bytes.model": "a text begins with <s> and ends with </s>, as its model says",
  }
  assert said.get(named, "") in run.stderr
  run = in_process("eval", "runs/mine", "--json")
  values = json.loads(run.stdout)
  loses = named != "bytes.model"  # of "3 times 4 is 12."
  assert (values["eval/unknown"] > 0) == loses and values["eval/bits_per_byte"] > 0
  assert ("unknown, at 8 bits" in in_process("eval", "runs/mine").stdout) == loses
  run = in_process("infer", "runs/mine", "--prompt=3 times", "--max-new-tokens=4", "--json")
  assert run.returncode == 0, run.stderr
  run = in_process("export", "runs/mine", "out")
  assert run.returncode == 0, run.stderr
  exported = tokenizers.Tokenizer.from_file("out/tokenizer.json")
  run = in_process("tokenizer", "encode", "runs/mine", "--text=3 times", "--json")
  assert exported.encode("3 times").ids[1:] == json.loads(run.stdout)["ids"]


def test_a_model_that_is_damaged_ends_training_with_a_line(in_process, corpus: str):
  Path("a.model").write_bytes(MODELS["bytes.model"][:-9])
  run = in_process("train", *tiny(corpus, tokenizer__path="a.model"))
  assert run.returncode == DataError.exit_code
  assert "flaxlm: a.model is not a SentencePiece model: it is damaged" in run.stderr
  assert "Traceback" not in run.stderr
