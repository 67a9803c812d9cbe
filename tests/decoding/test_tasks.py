# SPDX-License-Identifier: Apache-2.0
"""Tasks: a model that knows frequencies only gives answers that can be counted by hand."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from meshes import mesh_of
from parameters import random_params

from flaxlm.config import Config, ModelConfig
from flaxlm.decoding.loading import Run
from flaxlm.decoding.tasks import (
  Choice,
  Question,
  evaluate_tasks,
  join_notes,
  mean_and_error,
  read_tasks,
)
from flaxlm.errors import ConfigError
from flaxlm.nn.models import abstract_params, build_model
from flaxlm.tokenizers import train_tokenizer

TOKENIZER = train_tokenizer("byte", [], 0)
# The logits of some bytes, wherever they stand; those of all others are 0. The model has
# more ids than the tokenizer, and these have no probability.
LOGITS = {"a": 5.0, "b": 4.0, "c": 2.0}
OTHERS = TOKENIZER.vocab_size - len(LOGITS)
NORM = math.log(OTHERS + sum(map(math.exp, LOGITS.values())))


def logprob(text: str) -> float:
  return sum(LOGITS.get(letter, 0.0) - NORM for letter in text.encode().decode("latin-1"))


@pytest.fixture(scope="module")
def run() -> Run:
  """All parameters are zero but the bias of the head: the logits are that bias."""
  sizes = dict(depth=1, width=4, num_heads=1, vocab_size=320, context=16)
  cfg = Config(name="frequencies", model=ModelConfig(**sizes, head_biased=True))
  model, mesh = build_model(cfg.model), mesh_of()
  params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_params(model, mesh))
  for letter, logit in LOGITS.items():
    params["head_bias"][ord(letter)] = logit
  return Run(Path("nowhere"), cfg, TOKENIZER, 0, model, params, mesh)


def tasks_of(*lines: dict[str, Any]) -> list[Choice | Question]:
  return read_tasks("\n".join(map(json.dumps, lines)), "tasks.jsonl")


def test_the_likeliest_choice_is_the_answer(run: Run):
  """By itself, by its characters and by its bytes, without the blanks before it."""
  tasks = tasks_of(
    dict(prompt="x", choices=["b", "a"], answer=1),
    dict(prompt="x", choices=["b", "a"], answer="b", id="mine"),
    dict(prompt="", choices=["c", "aaaa"], answer="aaaa"),
    dict(prompt="x" * 40, choices=["xa", "éaaa"], answer=0),
    dict(prompt="x ", choices=["  bb", "  c"], answer=0),
    dict(prompt="x", choices=["   a", "x"], answer=1),
  )
  figures, answers = evaluate_tasks(run, tasks)
  for task, answer in zip(tasks, answers, strict=True):
    blank = task.prompt[len(task.prompt.rstrip()) :]
    expected = [logprob(blank + choice) for choice in task.choices]
    assert answer["logprobs"] == pytest.approx(expected, rel=1e-5)
  assert [answer["chosen"] for answer in answers] == [1, 1, 0, 0, 1, 1]
  assert [answer["acc"] for answer in answers] == [True, False, False, True, False, True]
  assert [answer["acc_norm"] for answer in answers] == [True, False, True, True, True, True]
  by_bytes = [answer["acc_bytes"] for answer in answers]
  assert by_bytes == [True, False, True, False, True, True]
  assert answers[1]["id"] == "mine" and "id" not in answers[0]
  assert [answer["line"] for answer in answers] == [1, 2, 3, 4, 5, 6]
  assert (figures["num_tasks"], figures["num_multiple_choice"]) == (6, 6)
  assert figures["num_cut"] == 1 and "exact_match" not in figures
  assert (figures["acc"], figures["acc_norm"]) == (3 / 6, 5 / 6)
  assert figures["acc_stderr"] == pytest.approx(np.std([1, 0, 0, 1, 0, 1], ddof=1) / 6**0.5)


def test_an_answer_is_written_up_to_its_stop(run: Run):
  tasks = tasks_of(
    dict(prompt="x", answer=" aaa ", max_new_tokens=3),
    dict(prompt="x", answer="aaa", max_new_tokens=4),
    dict(prompt="x", answer="a", stop="aaa", max_new_tokens=5),
    dict(prompt="x" * 30, answer="a" * 8),
    dict(prompt="x", choices=["b", "a"], answer="a"),
  )
  done: list[int] = []
  figures, answers = evaluate_tasks(run, tasks, done.append)
  written = [answer.get("completion") for answer in answers]
  assert written == ["aaa", "aaaa", "", "a" * 8, None]
  right = [answer.get("exact_match") for answer in answers]
  assert right == [True, False, False, True, None]
  assert [answer["finish_reason"] for answer in answers[:4]] == [
    *("length", "length", "stop", "length")
  ]
  assert (figures["exact_match"], figures["acc"], figures["acc_stderr"]) == (0.5, 1, None)
  assert (figures["num_questions"], figures["num_cut"], sum(done)) == (4, 1, 6)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["rnn", "encoder_decoder"])
def test_other_families(family: str):
  """Alone or together, cut or not: what is asked first changes nothing."""
  sizes = dict(depth=1, width=16, num_heads=1, vocab_size=320, context=16)
  cfg = Config(name="random", model=ModelConfig(family=family, **sizes))
  model = build_model(cfg.model)
  params = random_params(model, spread=0.5)
  run = Run(
    Path("nowhere"), cfg, train_tokenizer("byte", [], 0), 0, model, params, mesh_of()
  )
  tasks = tasks_of(
    dict(prompt="ab", choices=[" c", " de"], answer=0),
    dict(prompt="x" * 30, answer="y", max_new_tokens=3),
    dict(prompt="abc", answer="y", stop=[]),
  )
  figures, together = evaluate_tasks(run, tasks)
  assert (figures["num_cut"], figures["num_tasks"]) == (1, 3)
  for task, answer in zip(tasks, together, strict=True):
    [alone] = evaluate_tasks(run, [task])[1]
    assert alone.pop("logprobs", []) == pytest.approx(answer.pop("logprobs", []), rel=1e-5)
    assert alone == answer


def test_an_answer_is_a_line_unless_the_known_one_has_several():
  stops = [
    task.job.stop.strings
    for task in tasks_of(
      dict(prompt="", answer="one\n"),
      dict(prompt="", answer="one\ntwo"),
      dict(prompt="", answer="one", stop=["#", "."]),
      dict(prompt="", answer="one", stop=[]),
    )
  ]
  assert stops == [("\n",), (), ("#", "."), ()]


@pytest.mark.parametrize(
  ("line", "complaint"),
  [
    ("{", "Expecting property name"),
    ("[]", "is not a JSON object"),
    ('{"prompt": "a", "prompt": "b", "answer": "c"}', "prompt"),
    ('{"prompt": "a", "answer": "b", "choice": ["a", "b"]}', "did you mean choices"),
    ('{"prompt": "a", "choices": ["a", "b"], "answer": 0, "stop": "x"}', "'stop' is not"),
    ('{"answer": "b"}', "there is no prompt"),
    ('{"prompt": "a"}', "there is no answer"),
    ('{"prompt": "a", "answer": null}', "there is no answer"),
    ('{"prompt": 3, "answer": "b"}', "the prompt is not a string"),
    ('{"prompt": "\\ud800", "answer": "b"}', "is not UTF-8"),
    ('{"prompt": "a", "answer": 3}', "answer is 3"),
    ('{"prompt": "a", "answer": " "}', "the answer is empty"),
    ('{"prompt": "a", "answer": "b", "id": [1]}', r"id is \[1\]"),
    ('{"prompt": "a", "answer": "b", "stop": 3}', "stop is 3"),
    ('{"prompt": "a", "answer": "b", "stop": [""]}', "a stop string is empty"),
    ('{"prompt": "a", "answer": "b", "stop": [3]}', "stop string 1 is 3"),
    ('{"prompt": "a", "answer": "b", "max_new_tokens": 0}', "max_new_tokens is 0"),
    ('{"prompt": "a", "answer": "b", "max_new_tokens": true}', "max_new_tokens is True"),
    ('{"prompt": "a", "choices": "ab", "answer": "a"}', "choices is 'ab'"),
    ('{"prompt": "a", "choices": ["a"], "answer": "a"}', r"choices is \['a'\]"),
    ('{"prompt": "a", "choices": ["a", 2], "answer": "a"}', "choice 2 is 2"),
    ('{"prompt": "a", "choices": ["a", ""], "answer": "a"}', "choice 2 is empty"),
    (
      '{"prompt": "a", "choices": ["a", "b", "a"], "answer": 0}',
      "choice 3 is there before",
    ),
    ('{"prompt": "a", "choices": ["a", "b"], "answer": "c"}', "none of the choices"),
    ('{"prompt": "a", "choices": ["a", "b"], "answer": 2}', "answer is 2"),
    ('{"prompt": "a", "choices": ["a", "b"], "answer": -1}', "answer is -1"),
    ('{"prompt": "a", "choices": ["a", "b"], "answer": true}', "answer is True"),
    ('{"prompt": "a", "choices": ["a", "b"], "answer": 0.0}', "answer is 0.0"),
    ('{"prompt": "a", "choices": ["a", "b"], "answer": ["a"]}', r"answer is \['a'\]"),
  ],
)
def test_a_bad_line_is_named(line: str, complaint: str):
  good = '{"prompt": "a", "answer": "b"}'
  with pytest.raises(ConfigError, match=complaint) as e:
    read_tasks(f"{good}\n\n{line}\n{good}", "mine.jsonl")
  assert e.value.cause.startswith("mine.jsonl, line 3: ") and e.value.cure


def test_a_file_without_tasks():
  with pytest.raises(ConfigError, match=r"mine\.jsonl has no tasks"):
    read_tasks("\n \n", "mine.jsonl")


@pytest.mark.parametrize(
  ("line", "complaint"),
  [
    (dict(prompt="x", choices=["a", "b" * 17], answer=0), r"17 tokens > model\.context=16"),
    (dict(prompt="x", answer="a", max_new_tokens=16), "leaves no room"),
  ],
)
def test_a_task_that_does_not_fit_is_named(run: Run, line: dict, complaint: str):
  with pytest.raises(ConfigError, match=complaint) as e:
    evaluate_tasks(run, tasks_of(dict(prompt="x", answer="a"), line))
  assert e.value.cause.startswith("tasks.jsonl, line 2: ")


def test_choices_that_continue_a_word_are_told():
  fine = dict(prompt="is", choices=[" so", " no"], answer=0)
  glued = fine | dict(choices=["so", "no"])
  assert join_notes(tasks_of(fine, fine | dict(prompt="2+2=", choices=["4", "5"]))) == []
  [note] = join_notes(tasks_of(fine, glued, glued))
  assert "on 2 lines, first on line 2" in note


def test_means_and_their_errors():
  """As lm-evaluation-harness has them: the deviation is a sample's."""
  assert mean_and_error("x", []) == {}
  assert mean_and_error("x", [True]) == {"x": 1.0, "x_stderr": None}
  values = [1, 0, 0, 1, 1]
  expected = {"x": 0.6, "x_stderr": np.std(values, ddof=1) / len(values) ** 0.5}
  assert mean_and_error("x", values) == pytest.approx(expected)
