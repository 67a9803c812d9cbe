# SPDX-License-Identifier: Apache-2.0
"""Questions to learn from by rewards: records, splits, prompts, and their order."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from flaxlm.chat.templates import plain_chat
from flaxlm.config import Config, DataConfig, RewardConfig
from flaxlm.data.questions import Question, QuestionBatches, Questions, prepare_questions
from flaxlm.errors import ConfigError, DataError
from flaxlm.tokenizers import train_tokenizer

SUMS = [{"prompt": f"{a}+{b}", "answer": str(a + b)} for a in range(9) for b in range(9)]
TALK = {"messages": [{"role": "user", "content": "2+2"}], "answer": "4", "level": 3}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
  """A run, as far as questions are concerned: with a tokenizer and a chat template."""
  run = tmp_path / "run"
  run.mkdir()
  tokenizer = train_tokenizer("byte", [], 257)
  tokenizer.save(run / "tokenizer.json")
  (run / "chat.json").write_text(plain_chat(tokenizer, run).to_json())
  return run


def prepared(
  folder: Path, records: list[Any], corpus: str = "", whole: bool = False, **reward: Any
) -> Questions:
  path = folder.parent / "asked.jsonl"
  path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
  data = DataConfig(objective="reward", seq_len=48)
  cfg = Config(data=data, reward=RewardConfig(**{"max_new_tokens": 16} | reward))
  name = corpus or f"files:{path}"
  return prepare_questions(cfg, name, folder, "exact", lambda line: None, whole)


def test_questions_are_asked_in_the_chat_template(folder: Path):
  found = prepared(folder, [*SUMS, TALK], whole=True)
  asked = found.splits["whole"]
  texts = [found.tokenizer.decode(question.ids[1:]) for question in asked]
  assert texts[1] == "user:\n0+1\nassistant:\n" and texts[-1] == "user:\n2+2\nassistant:\n"
  assert asked[1].answer == "1" and asked[-1].fields == TALK
  assert asked[1].where.endswith("asked.jsonl, line 2")
  assert "asked in the chat template" in found.notes[0]


def test_without_a_template_a_prompt_is_continued(folder: Path):
  (folder / "chat.json").unlink()
  found = prepared(folder, SUMS, whole=True)
  (question, *_) = found.splits["whole"]
  assert found.tokenizer.decode(question.ids[1:]) == "0+0"
  assert question.ids == tuple(
    found.tokenizer.framed(found.tokenizer.encode("0+0"), "prompt")
  )
  assert "continued as they are" in found.notes[0]
  with pytest.raises(DataError, match="line 82 has messages, and the run has no chat"):
    prepared(folder, [*SUMS, TALK])


def test_one_in_twenty_is_held_out_and_none_is_in_both_splits(folder: Path):
  found = prepared(folder, [*SUMS, *SUMS])
  prompts = {
    split: {question.fields["prompt"] for question in questions}
    for split, questions in found.splits.items()
  }
  assert prompts["train"].isdisjoint(prompts["validation"])
  assert sum(map(len, prompts.values())) == len(SUMS)
  assert "prompts to learn from" in found.sizes


def test_what_it_depends_on_is_in_the_fingerprint(folder: Path):
  prints = {prepared(folder, SUMS[n:]).fingerprint for n in (0, 0, 1)}
  (folder / "chat.json").unlink()
  assert len(prints | {prepared(folder, SUMS).fingerprint}) == 3


def test_prompts_that_leave_no_room_are_left_out_and_counted(folder: Path):
  found = prepared(folder, [SUMS[0], {"prompt": "x" * 40, "answer": "y"}, *SUMS[1:]])
  assert sum(map(len, found.splits.values())) == len(SUMS)
  assert "prompts of more than 32 tokens: 1 left out, first" in found.notes[1]
  assert found.notes[1].endswith("asked.jsonl, line 2")
  with pytest.raises(DataError, match="has no train prompt of at most 8 tokens"):
    prepared(folder, SUMS, max_new_tokens=40)


@pytest.mark.parametrize(
  ("record", "told"),
  [
    ({"question": "2+2"}, "either 'prompt' or 'messages', but there is 'question'"),
    ({"prompt": "2+2"} | TALK, "either 'prompt' or 'messages'"),
    ({"prompt": "2+2"}, "no answer, which reward.function=exact needs"),
    ({"prompt": "2+2", "answer": 4}, "answer is 4, which is no text"),
    ({"prompt": "2+2", "answer": " "}, "answer is empty"),
    ({"prompt": "", "answer": "4"}, "prompt is '', which is no text"),
    ({"prompt": 4, "answer": "4"}, "prompt is 4, which is no text"),
    ({"messages": "2+2", "answer": "4"}, "not a list of objects"),
    ({"messages": [], "answer": "4"}, "there are no messages"),
    ({"messages": [{"content": "a"}], "answer": "4"}, "message 1 has no role"),
    (
      {"messages": [*TALK["messages"], {"role": "assistant", "content": "4"}]},
      "the last message is an answer",
    ),
    ({"messages": [{"role": "judge", "content": "a"}], "answer": "4"}, "no role judge"),
  ],
)
def test_records_that_are_no_questions(folder: Path, record: dict[str, Any], told: str):
  with pytest.raises(DataError, match=told) as raised:
    prepared(folder, [*SUMS[:2], record])
  assert "asked.jsonl, line 3" in raised.value.cause and "\n" not in raised.value.cause


def test_an_answer_may_be_unknown_to_a_function(folder: Path):
  found = prepared(folder, [{"prompt": "2+2"}, *SUMS], function="f.py:f", whole=True)
  assert found.splits["whole"][0].answer is None


@pytest.mark.parametrize(
  ("corpus", "error", "told"),
  [
    ("stdlib", ConfigError, "has no prompts, which data.objective=reward needs"),
    ("0.5 files:a.jsonl + 0.5 files:b.jsonl", ConfigError, "takes no mixture"),
    ("files:none.jsonl", DataError, "none.jsonl"),
  ],
)
def test_corpora_without_questions(folder: Path, corpus: str, error: Any, told: str):
  with pytest.raises(error, match=told):
    prepared(folder, SUMS, corpus)


def test_a_file_without_a_record(folder: Path):
  (folder / "blank.jsonl").write_text("\n \n")
  with pytest.raises(DataError, match=r"has no prompts: no record is in .*blank"):
    prepared(folder, SUMS, f"files:{folder / 'blank.jsonl'}")


# -- Order ---------------------------------------------------------------------------------


def numbered(count: int) -> list[Question]:
  return [Question({"prompt": str(n)}, None) for n in range(count)]  # type: ignore


@pytest.mark.parametrize("count", [7, 1030])
def test_each_epoch_has_every_question_once(count: int):
  batches = QuestionBatches(numbered(count), 5, seed=1, num_epochs=2)
  with batches.iterate() as rows:
    seen = [question.fields["prompt"] for batch in rows for question in batch]
  assert Counter(seen[:count]) == Counter(seen[count : 2 * count])
  assert len(set(seen[:count])) == count and 0 <= len(seen) - 2 * count < 5


def test_a_batch_follows_from_the_seed_and_its_number():
  batches, again = (QuestionBatches(numbered(30), 8, 1, None) for _ in range(2))
  with batches.iterate() as whole, again.iterate(7) as rest:
    for _ in range(7):
      next(whole)
    assert next(whole) == next(rest) == batches[7] != batches[8]
  assert QuestionBatches(numbered(30), 8, 2, None)[7] != batches[7]


def test_fewer_questions_than_in_a_batch():
  with pytest.raises(DataError, match="3 prompts to learn from, fewer than 4"):
    QuestionBatches(numbered(3), 4, 0, None)
