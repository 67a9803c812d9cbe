# SPDX-License-Identifier: Apache-2.0
"""Ids of SentencePiece models beside those that SentencePiece itself gives."""

import io
import random
from pathlib import Path

import pytest
from conftest import ROOT, beside

from flaxlm.tokenizers import load_tokenizer

pytestmark = beside("sentencepiece")

OPTIONS = {
  "unigram": dict(model_type="unigram"),
  "bpe": dict(model_type="bpe"),
  "unigram-bytes": dict(model_type="unigram", byte_fallback=True, pad_id=3),
  "llama": dict(
    model_type="bpe",
    byte_fallback=True,
    split_digits=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
  ),
  "folded": dict(
    model_type="unigram", add_dummy_prefix=False, normalization_rule_name="nfkc_cf"
  ),
  "own-pieces": dict(
    model_type="bpe",
    user_defined_symbols=["<sep>", "def"],
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
  ),
}
CORPUS = [
  line
  for path in sorted((ROOT / "flaxlm/data").glob("*.py"))
  for line in path.read_text("utf-8").splitlines()
] + ["théâtre ☕ 漢字 かな", "Straße über", "ﬁne ① ½"] * 30
ODD = [
  "",
  " ",
  "  a  b ",
  "x\ny\tz",
  "def f(x):  # <sep> q",
  " ▁ a▁",
  "漢漢☃☃ ñ ẞ",
  "a\u3000b",
]


@pytest.mark.parametrize("options", OPTIONS)
def test_ids_are_those_of_sentencepiece(tmp_path: Path, options: str):
  """Of two ways to cut a word that are as probable, either may be taken. Left out are texts
  with the names of special tokens, which become these."""
  import sentencepiece

  written = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(CORPUS),
    model_writer=written,
    vocab_size=900,
    minloglevel=3,
    character_coverage=0.995,
    **OPTIONS[options],
  )
  path = tmp_path / "tokenizer.model"
  path.write_bytes(written.getvalue())
  theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
  ours = load_tokenizer(path)
  assert (ours.bos_id, ours.eos_id) == (theirs.bos_id(), theirs.eos_id())
  assert ours.vocab_size == theirs.vocab_size()
  draw = random.Random(0)
  drawn = ["".join(draw.choices(" abe(fé漢☃\n\t1.", k=20)) for _ in range(200)]
  same = 0
  texts = [*CORPUS, *ODD, *drawn]
  for text in texts:
    mine, other = ours.encode(text), theirs.encode(text)
    same += mine == other
    if "bpe" in OPTIONS[options].values():
      assert mine == other, text
    score = lambda ids: sum(map(theirs.get_score, ids))
    assert score(mine) == pytest.approx(score(other), abs=1e-3), text
    if ours.unknown_id not in mine and "▁ a▁" not in text:
      assert ours.decode(mine) == theirs.decode(mine), text
  assert same > 0.95 * len(texts)
