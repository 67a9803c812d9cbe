# SPDX-License-Identifier: Apache-2.0
"""Preferences: what files of them say, their rows against a reference, what is wrong."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import CHATML, MARKED
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat_rows import Talk, make_store, predicted
from test_conversations import HI, YES, data_folder, prepare_chat, shown, write

from flaxlm.config import DataConfig, TokenizerConfig
from flaxlm.data.prepare import Prepared, prepare
from flaxlm.data.rows import PADDING, PreferenceRows
from flaxlm.errors import DataError, FlaxLMError
from flaxlm.tokenizers import train_tokenizer

__all__ = ["data_folder"]  # a fixture

BYTES = TokenizerConfig(kind="byte")
PAIR = {"prompt": "hi", "chosen": "yes", "rejected": "no"}


def prepare_pairs(path: Path, cfg: TokenizerConfig = BYTES) -> Prepared:
  return prepare(f"files:{path}", cfg, lambda line: None, "preference")


# -- Files ---------------------------------------------------------------------------------


def test_a_pair_becomes_two_conversations(tmp_path: Path):
  """As texts or as messages; of the latter the prompt's answers carry no loss."""
  long = {"prompt": [HI, YES, HI], "chosen": [YES], "rejected": "hm"}
  write(tmp_path / "pairs" / "train.jsonl", PAIR, long)
  write(tmp_path / "pairs" / "validation.jsonl", PAIR)
  prepared = prepare_pairs(tmp_path / "pairs")
  start = "<>user:\nhi\nassistant:\n"
  assert shown(prepared, prepared.train) == [
    f"{start}[yes<>]\n",
    f"{start}[no<>]\n",
    f"{start}yes<>\nuser:\nhi\nassistant:\n[yes<>]\n",
    f"{start}yes<>\nuser:\nhi\nassistant:\n[hm<>]\n",
  ]
  again = prepare_pairs(tmp_path / "pairs")
  assert again.fingerprint == prepared.fingerprint
  talks = [{"messages": [HI, YES]}]
  write(tmp_path / "chats" / "train.jsonl", *talks)
  write(tmp_path / "chats" / "validation.jsonl", *talks)
  assert prepare_chat(tmp_path / "chats").fingerprint != prepared.fingerprint


@pytest.mark.parametrize("template", [CHATML, MARKED["chatml"]], ids=["plain", "marked"])
def test_only_what_follows_the_prompt_is_learnt(tmp_path: Path, template: str):
  """By the template's marks, and without."""
  train_tokenizer("byte", [], 0).save(tmp_path / "tokenizer.json")
  (tmp_path / "chat_template.jinja").write_text(template)
  pair = {"prompt": [HI, YES, HI], "chosen": "yes", "rejected": "yes, but"}
  write(tmp_path / "pairs" / "train.jsonl", pair)
  write(tmp_path / "pairs" / "validation.jsonl", pair)
  cfg = TokenizerConfig(path=str(tmp_path / "tokenizer.json"))
  prepared = prepare_pairs(tmp_path / "pairs", cfg)
  learnt = [text[text.index("[") :] for text in shown(prepared, prepared.train)]
  assert [text.count("[") for text in shown(prepared, prepared.train)] == [1, 1]
  assert learnt[0].startswith("[yes<|im_end|>") and learnt[1].startswith("[yes, but<|im_")


def test_pairs_of_one_prompt_are_in_one_split(tmp_path: Path):
  records = [{**PAIR, "prompt": f"hi {n}", "chosen": c} for n in range(60) for c in "ab"]
  prepared = prepare_pairs(write(tmp_path / "pairs.jsonl", *records))
  splits = [shown(prepared, store) for store in (prepared.train, prepared.validation)]
  prompts = [{talk.partition("assistant")[0] for talk in split} for split in splits]
  assert len(prompts[0]) + len(prompts[1]) == 60 and prompts[1]
  assert [len(split) for split in splits] == [4 * len(some) for some in prompts]


WRONG: dict[str, tuple[Any, str]] = {
  "no field": ({"prompt": "a", "chosen": "b"}, "has no field 'rejected', but 'prompt', 'c"),
  "nothing": ({}, "has no field 'prompt' and 'chosen' and 'rejected', but nothing"),
  "a number": ({**PAIR, "chosen": 4}, "chosen is 4, neither a text nor a list of messages"),
  "no messages": ({**PAIR, "prompt": []}, "prompt is [], neither a text"),
  "no objects": ({**PAIR, "chosen": ["a"]}, "prompt and chosen: messages are"),
  "no role": ({**PAIR, "rejected": [{"content": "a"}]}, "message 2 has no role"),
  "no answer": ({**PAIR, "chosen": [HI]}, "no message has the role assistant"),
  "no new answer": (
    {**PAIR, "prompt": [HI, YES], "rejected": [HI]},
    "prompt and rejected: no message has the role assistant",
  ),
  "empty": ({**PAIR, "rejected": " "}, "prompt and rejected: message 2, an answer, is emp"),
  "the same": ({**PAIR, "rejected": "yes"}, "chosen and rejected are the same"),
  "the same otherwise": ({**PAIR, "rejected": [YES]}, "chosen and rejected are the same"),
  "another role": (
    {**PAIR, "prompt": [{"role": "x", "content": "a"}]},
    "fails: there is no role x",
  ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_preference(tmp_path: Path, name: str):
  """One line, with file and line."""
  record, told = WRONG[name]
  path = write(tmp_path / "pairs.jsonl", PAIR, {**PAIR, "prompt": "b"}, record)
  with pytest.raises(FlaxLMError) as error:
    prepare_pairs(path)
  cause = error.value.cause
  assert f"{path}, line 3" in cause and told in cause and "\n" not in cause


def test_a_template_that_writes_both_alike(tmp_path: Path):
  train_tokenizer("byte", [], 0).save(tmp_path / "tokenizer.json")
  (tmp_path / "chat_template.jinja").write_text(CHATML)  # trims contents
  pair = {**PAIR, "rejected": "yes "}
  path = write(tmp_path / "pairs.jsonl", PAIR, {**PAIR, "prompt": "b"}, pair)
  with pytest.raises(DataError, match="line 3: the chat template writes chosen and rejec"):
    prepare_pairs(path, TokenizerConfig(path=str(tmp_path / "tokenizer.json")))


# -- Rows ----------------------------------------------------------------------------------

# The first token has no weight, and the last one has: as they are stored.
ANSWERS = st.lists(
  st.lists(st.integers(0, 9), min_size=2, max_size=6).map(
    lambda ids: [(ids[0], 0), *((id_, id_ % 2) for id_ in ids[1:-1]), (ids[-1], 1)]
  ),
  min_size=2,
  max_size=16,
).map(lambda answers: answers[: len(answers) // 2 * 2])


def reference(answers: list[Talk], width: int) -> tuple[list[list[Talk]], int]:
  """The conversations of each row, and how many pairs were dropped."""
  rows: list[list[Talk]] = []
  num_dropped, full = 0, True
  for pair in zip(answers[::2], answers[1::2], strict=True):
    size = sum(map(len, pair))
    if size > width:
      num_dropped, full = num_dropped + 1, True
      continue
    if full or sum(map(len, rows[-1])) + size > width:
      rows.append([])
    rows[-1] += pair
    full = False
  return rows, num_dropped


@settings(max_examples=50)
@given(ANSWERS, st.integers(3, 16))
def test_rows_hold_whole_pairs(answers: list[Talk], seq_len: int):
  """Each answer's tokens are predicted once, from their own conversation alone, and the two
  of a pair have an odd number and the next."""
  expected, num_dropped = reference(answers, seq_len + 1)
  cfg = DataConfig(objective="preference", seq_len=seq_len)
  if not expected:
    with pytest.raises(DataError, match=f"at most {seq_len + 1} tokens"):
      PreferenceRows(make_store(answers), cfg)
    return
  rows = PreferenceRows(make_store(answers), cfg)
  assert (rows.num_rows, rows.num_dropped) == (len(expected), num_dropped)
  said = f"pairs of more than {seq_len + 1} tokens: {num_dropped} dropped"
  assert rows.notes == ([said] if num_dropped else [])
  numbers = np.array([*range(rows.num_rows), PADDING])
  batch = rows.batch(numbers, numbers)
  for row, talks in enumerate([*expected, []]):
    segments = batch.segments_BT[row]
    assert segments.max() == len(talks) and not batch.weights_BT[row, segments == 0].any()
    for number, talk in enumerate(talks, 1):
      (at,) = np.nonzero(segments == number)
      found = [
        (tuple(batch.tokens_BT[row, at[: n + 1]]), batch.targets_BT[row, t])
        for n, t in enumerate(at)
        if batch.weights_BT[row, t]
      ]
      assert found == predicted(talk)
      assert batch.positions_BT[row, at].tolist() == list(range(len(at)))


def test_half_a_pair_is_damage():
  with pytest.raises(DataError, match="damaged: 3 conversations"):
    PreferenceRows(make_store([[(1, 0), (2, 1)]] * 3), DataConfig(objective="preference"))


def test_a_pair_that_does_not_fit_tells_which_length_would():
  store = make_store([[(1, 0)] * 4 + [(2, 1)]] * 2)
  with pytest.raises(DataError, match=r"--data.seq-len=9 takes them all"):
    PreferenceRows(store, DataConfig(objective="preference", seq_len=8))
  assert not PreferenceRows(store, DataConfig(objective="preference", seq_len=9)).notes
