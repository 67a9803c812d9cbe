# SPDX-License-Identifier: Apache-2.0
"""Two models or tokenizers on one text: each as it is alone, on the same bytes."""

import json
from pathlib import Path
from typing import Any

import pytest
from look_runs import make_run, page_of, save_run

from flaxlm.cli import main
from flaxlm.errors import ConfigError
from flaxlm.look.beside import Side, look_beside
from flaxlm.look.pieces import make_reading
from flaxlm.look.tokens import look_tokens
from flaxlm.tokenizers import train_tokenizer

TEXT = "to be or not to be, é:\n  that is"
PIECES = train_tokenizer("bpe", [TEXT] * 50, 300)


@pytest.fixture(scope="module")
def sides() -> tuple[Side, Side]:
  """A model that reads bytes, and one that reads pieces."""
  run = make_run(depth=1)
  other = make_run(depth=1, name="other")._replace(tokenizer=PIECES)
  return Side("one", run.tokenizer, run), Side("other", PIECES, other)


def test_each_side_is_as_it_is_alone_and_words_are_the_sums(sides):
  view = look_beside(sides, TEXT, None, 99)
  figures = page_of(view).view["figures"]
  for number, side in enumerate(sides):
    own = figures["sides"][number]
    alone = look_tokens(
      side.run, make_reading(side.run.model.cfg, side.tokenizer, TEXT, None, 99), 99
    ).figures
    assert own["bits_per_byte"] == pytest.approx(alone["bits_per_byte"])
    assert own["num_bytes"] == len(TEXT.encode()) and own["num_words"] == 9
    assert own["tokens_per_word"] == own["num_tokens"] / 9
    assert [t["id"] for t in own["tokens"]] == [t["id"] for t in alone["tokens"]]
    words = figures["words"]
    assert sum(word["bits"][number] for word in words) == pytest.approx(own["bits"])
    pieces = [label for word in words for label in word["pieces"][number]]
    assert pieces == [t["label"] for t in own["tokens"] if not t["special"]]
  assert [word["word"] for word in figures["words"]][-3:] == ["·é:", "↵··that", "·is"]
  assert figures["sides"][1]["num_tokens"] < figures["sides"][0]["num_tokens"]
  assert figures["sides"][1]["tokens"][2]["at"] == len(
    bytes.fromhex(figures["sides"][1]["tokens"][1]["hex"])
  )


def test_both_read_the_same_part_of_a_long_text(sides):
  view = look_beside(sides, "to be or not " * 30, None, 20)
  one, other = view.figures["sides"]
  assert one["num_bytes"] == other["num_bytes"] == 19, "of the one that reads bytes"
  assert one["num_tokens"] == 19 > other["num_tokens"]
  assert "390 characters both read the first 19" in view.cuts[0]


def test_a_tokenizer_alone_has_no_probabilities(sides):
  view = look_beside([Side("bytes", sides[0].tokenizer), sides[1]], TEXT, None, 99)
  alone, model = view.figures["sides"]
  assert "bits" not in alone and model["bits"] > 0
  assert "bytes is a tokenizer alone" in view.notes[0]
  assert view.figures["words"][0]["bits"][0] is None


def test_what_a_tokenizer_does_not_keep_is_not_set_beside_the_words(sides):
  lossy = Side("lossy", train_tokenizer("word", ["two words"] * 9, 300))
  view = look_beside([lossy, sides[0]], "two gnus", None, 99)
  assert any("lossy does not keep the text" in note for note in view.notes)
  assert view.figures["words"][0]["pieces"] == [None, ["t", "w", "o"]]
  assert "at" not in view.figures["sides"][0]["tokens"][0]


def test_a_part_without_probability_is_told(sides):
  run = sides[0].run

  class Bare:
    """A tokenizer that sets nothing before a text, as some imported ones do."""

    def __getattr__(self, name: str) -> Any:
      return getattr(run.tokenizer, name)

    def framed(self, ids: list[int], role: str) -> list[int]:
      return ids

  bare = Side("bare", Bare(), run._replace(tokenizer=Bare()))
  view = look_beside([bare, sides[0]], "abc", None, 99)
  assert any(
    "bare has no probability for 1 of its tokens, in which are 1 of the 3" in note
    for note in view.notes
  )


@pytest.mark.parametrize(
  ("text", "source", "words"),
  [(None, None, "no text"), ("", None, "empty"), ("a", "b", "neither side reads")],
)
def test_a_text_that_is_missing_is_refused(sides, text, source, words):
  with pytest.raises(ConfigError, match=words):
    look_beside(sides, text, source, 99)


# -- The command ---------------------------------------------------------------------------


def test_the_command(sides, tmp_path: Path, capsys: Any, monkeypatch: Any):
  monkeypatch.chdir(tmp_path)
  folder = save_run(sides[0].run, tmp_path / "runs" / "one")
  asked = ["look", "tokens", "one", str(folder / "tokenizer.json"), "--text", "ab c"]
  assert main([*asked, "--json"]) == 0
  figures = json.loads(capsys.readouterr().out)
  assert figures["output"] == "one_and_one_tokenizer_tokens.html"
  assert Path(figures["output"]).stat().st_size == figures["bytes"]
  assert [side["num_tokens"] for side in figures["sides"]] == [4, 4]
  assert "bits_per_byte" in figures["sides"][0]
  for more, words in (
    (["--output", "a.png"], "no picture"),
    (["--chat-file", "a.jsonl"], "--chat-file is for one run"),
    (["--text-file", "a"], "give one of them"),
    (["--max-tokens", "1"], "at least 2"),
  ):
    assert main([*asked, *more]) == 2
    assert words in capsys.readouterr().err
  assert main(asked[:4]) == 2
  assert "there is no text" in capsys.readouterr().err
