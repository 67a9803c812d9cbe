# SPDX-License-Identifier: Apache-2.0
"""Tasks with known answers, from a JSON-lines file: how many a model gets right.

A line with `choices` is multiple choice: the model's answer is the choice that it finds
likeliest after the prompt. A line without is a question: the model writes its answer
greedily, and it has to be the known one. Figures have the names and the definitions of
lm-evaluation-harness (Gao et al., 2021).
"""

import dataclasses
import difflib
import math
import re
import reprlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from flaxlm.decoding.completions import (
  DEFAULT_NEW_TOKENS,
  Completion,
  Stopping,
  as_texts,
  complete_request,
)
from flaxlm.decoding.jobs import (
  PromptJob,
  SizedJob,
  batch_jobs,
  check_count,
  list_of,
  read_id,
  read_object,
)
from flaxlm.decoding.loading import Run, prepare_for_decoding
from flaxlm.decoding.prefill import MOST_NEW_TOKENS, Request
from flaxlm.decoding.sampling import SamplingSettings, is_number
from flaxlm.decoding.scoring import (
  Likelihood,
  check_scores,
  cut_to_fit,
  encode_pair,
  read_ids,
  score_tokens,
)
from flaxlm.errors import ConfigError

CHOICE_KEYS = {"prompt", "choices", "answer", "id"}
QUESTION_KEYS = {"prompt", "answer", "stop", "max_new_tokens", "id"}
EXAMPLE = 'as in {"prompt": "The sky is", "choices": [" blue", " green"], "answer": 0}'
WRITTEN_AT_A_TIME = 16  # answers


class Place(NamedTuple):
  """Where a task stands, for messages and for its answer."""

  file: str
  line: int  # from 1
  id: str | float | None = None  # the user's own, which the answer repeats

  def error(self, e: ConfigError, cure: str = "") -> ConfigError:
    """The error with its place."""
    return ConfigError(f"{self.file}, line {self.line}: {e.cause}", e.cure or cure)

  def as_json(self) -> dict[str, Any]:
    return {"line": self.line} | ({} if self.id is None else {"id": self.id})


class Choice(NamedTuple):
  """A multiple-choice task."""

  place: Place
  prompt: str
  choices: tuple[str, ...]
  answer: int  # of the choices, from 0


class Question(NamedTuple):
  """A task whose answer is written."""

  place: Place
  job: PromptJob
  answer: str


# -- What is read --------------------------------------------------------------------------


def read_tasks(text: str, file: str) -> list[Choice | Question]:
  """The tasks of a JSON-lines text; `file` is its name, for messages.

  Raises `ConfigError`, with file and line, for a line that is not a task, and for a text
  that has none.
  """
  tasks: list[Choice | Question] = []
  # Only \n ends a line: see `read_jobs`.
  for number, line in enumerate(text.split("\n"), 1):
    if line.strip():
      place = Place(file, number)
      try:
        tasks.append(read_task(read_object(line), place))
      except ConfigError as e:
        raise place.error(e, EXAMPLE) from e
  if not tasks:
    raise ConfigError(f"{file} has no tasks", EXAMPLE)
  return tasks


def read_task(values: dict[str, Any], place: Place) -> Choice | Question:
  """The task of a JSON object; a field that is null is left out.

  Raises `ConfigError` for a field that is wrong.
  """
  values = {name: value for name, value in values.items() if value is not None}
  known = CHOICE_KEYS if "choices" in values else QUESTION_KEYS
  if unknown := sorted(set(values) - known):
    near = difflib.get_close_matches(unknown[0], known | {"choices"}, 1)
    raise ConfigError(
      f"{reprlib.repr(unknown[0])} is not one of {', '.join(sorted(known))}",
      f"did you mean {near[0]}?" if near else "",
    )
  for name in ("prompt", "answer"):
    if name not in values:
      raise ConfigError(f"there is no {name}")
  if not isinstance(values["prompt"], str):
    raise ConfigError("the prompt is not a string")
  as_texts(values["prompt"])
  place = place._replace(id=read_id(values))
  if "choices" in values:
    choices = read_choices(values["choices"])
    return Choice(place, values["prompt"], choices, read_answer(values["answer"], choices))
  return read_question(values, place)


def read_choices(choices: Any) -> tuple[str, ...]:
  if not isinstance(choices, list) or len(choices) < 2:
    raise ConfigError(f"choices is {reprlib.repr(choices)}", "use a list of two or more")
  choices = as_texts(choices, "choice")
  for number, choice in enumerate(choices, 1):
    if not choice:
      raise ConfigError(f"choice {number} is empty", "give it a word")
    if choice in choices[: number - 1]:
      raise ConfigError(f"choice {number} is there before: {reprlib.repr(choice)}")
  return tuple(choices)


def read_answer(answer: Any, choices: tuple[str, ...]) -> int:
  """The place of the answer, which is given as one, or as the choice itself."""
  if isinstance(answer, str) and answer in choices:
    return choices.index(answer)
  if is_number(answer, whole=True) and 0 <= answer < len(choices):
    return answer
  raise ConfigError(
    f"answer is {reprlib.repr(answer)}, which is none of the choices",
    f"use one of them, or its place, 0 to {len(choices) - 1}",
  )


def read_question(values: dict[str, Any], place: Place) -> Question:
  if not isinstance(values["answer"], str):
    raise ConfigError(
      f"answer is {reprlib.repr(values['answer'])}", "use a string, or give choices"
    )
  [answer] = as_texts(values["answer"], "answer")
  if not answer.strip():
    raise ConfigError("the answer is empty")
  # Without a stop the answer is a line, unless the known one has several.
  default = [] if "\n" in answer.strip() else ["\n"]
  stop = Stopping(strings=list_of(values, "stop", default))
  stop.check()
  num_new = values.get("max_new_tokens")
  if num_new is not None:
    check_count("max_new_tokens", num_new, MOST_NEW_TOKENS)
  settings = SamplingSettings(temperature=0)
  return Question(place, PromptJob(values["prompt"], settings, stop, num_new), answer)


def join_notes(tasks: Sequence[Choice | Question]) -> list[str]:
  """A line about choices that continue a word of their prompts, if there are any."""
  choices = [task for task in tasks if isinstance(task, Choice)]
  joint = lambda task: task.prompt[-1:] + task.choices[0][:1]
  joined = [task for task in choices if re.fullmatch("[A-Za-z]{2}", joint(task))]
  if not joined:
    return []
  place = joined[0].place
  return [
    f"{place.file}: choices follow their prompts as they are; on {len(joined)} lines, "
    f"first on line {place.line}, they continue its last word: begin them with a blank"
  ]


# -- What is done --------------------------------------------------------------------------


def evaluate_tasks(
  run: Run,
  tasks: Sequence[Choice | Question],
  on_done: Callable[[int], None] = lambda _: None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """(the figures of all tasks, an answer for each).

  Prompts that are too long are cut from the left; `num_cut` says of how many. `on_done(n)`
  is called whenever n more choices are scored or answers are written. Raises `ConfigError`,
  with file and line, for a task that does not fit the model.
  """
  choices = [task for task in tasks if isinstance(task, Choice)]
  questions = [task for task in tasks if isinstance(task, Question)]
  answers: dict[Place, dict[str, Any]] = {}
  num_cut = 0
  if choices:
    for task, likelihoods in zip(
      choices, score_choices(run, choices, on_done), strict=True
    ):
      num_cut += any(likelihood.num_cut for likelihood in likelihoods)
      answers[task.place] = judge_choice(task, likelihoods)
  if questions:
    fitted = []
    for question in questions:
      try:
        fitted.append(fit_job(run, question.job))
      except ConfigError as e:
        raise question.place.error(e) from e
    for question, job, completion in zip(
      questions, fitted, write_answers(run, fitted, on_done), strict=True
    ):
      num_cut += job.was_cut
      answers[question.place] = judge_question(question, completion)
  ordered = [answers[task.place] for task in tasks]
  figures: dict[str, Any] = {"num_tasks": len(tasks), "num_cut": num_cut}
  for name, count in (("num_multiple_choice", choices), ("num_questions", questions)):
    figures |= {name: len(count)} if count else {}
  for name in ("acc", "acc_norm", "acc_bytes", "exact_match"):
    figures |= mean_and_error(name, [x[name] for x in ordered if name in x])
  return figures, ordered


def score_choices(
  run: Run, tasks: Sequence[Choice], on_done: Callable[[int], None]
) -> list[list[Likelihood]]:
  """The likelihood of each choice of each task."""
  check_scores(run)
  pairs = []
  for task in tasks:
    try:
      of_task = [encode_pair(run, task.prompt, choice) for choice in task.choices]
      for pair in of_task:
        cut_to_fit(pair, run.model.cfg.context)
    except ConfigError as e:
      raise task.place.error(e) from e
    pairs += of_task
  scored = iter(score_tokens(run, pairs, on_done))
  return [[next(scored) for _ in task.choices] for task in tasks]


def judge_choice(task: Choice, likelihoods: Sequence[Likelihood]) -> dict[str, Any]:
  """The answer to a task: the likeliest choice, and the likeliest per character and per
  byte, where blanks before a choice do not count. Of equals it is the first."""
  logprobs = [likelihood.logprob for likelihood in likelihoods]
  texts = [choice.lstrip() or choice for choice in task.choices]
  per = {
    "acc": [1] * len(texts),
    "acc_norm": [len(text) for text in texts],
    "acc_bytes": [len(text.encode()) for text in texts],
  }
  right, chosen = {}, {}
  for name, sizes in per.items():
    values = [x / size for x, size in zip(logprobs, sizes, strict=True)]
    chosen[name] = values.index(max(values))
    right[name] = chosen[name] == task.answer
  return {
    **task.place.as_json(),
    "prompt": task.prompt,
    "choices": [*task.choices],
    "answer": task.answer,
    "chosen": chosen["acc"],
    "chosen_norm": chosen["acc_norm"],
    "logprobs": logprobs,
    **right,
  }


def judge_question(task: Question, completion: Completion) -> dict[str, Any]:
  """The answer to a task, right if it is the known one; blanks around both do not count."""
  return {
    **task.place.as_json(),
    "prompt": task.job.prompt,
    "answer": task.answer,
    "completion": completion.completion,
    "finish_reason": completion.finish_reason,
    "exact_match": completion.completion.strip() == task.answer.strip(),
  }


def mean_and_error(name: str, values: Sequence[float]) -> dict[str, float | None]:
  """The mean, and its standard error: that of a sample, so None for a single value."""
  if not values:
    return {}
  count = len(values)
  mean = sum(values) / count
  error = None
  if count > 1:
    error = math.sqrt(sum((x - mean) ** 2 for x in values) / (count - 1) / count)
  return {name: mean, f"{name}_stderr": error}


# -- Answers that are written --------------------------------------------------------------


class FittedJob(NamedTuple):
  """A job as ids that fit the model together with the answer."""

  job: PromptJob
  read: list[int]  # of an encoder-decoder: what it has written so far
  source: list[int] | None
  num_new: int
  was_cut: bool  # from the left


def fit_job(run: Run, job: PromptJob) -> FittedJob:
  """A prompt that is too long is cut from the left. Raises `ConfigError` for more new
  tokens than the model's context holds."""
  context, source = run.model.cfg.context, None
  num_new = job.max_new_tokens or min(DEFAULT_NEW_TOKENS, max(1, context // 2))
  if num_new >= context:
    raise ConfigError(
      f"max_new_tokens is {num_new}, which leaves no room in model.context={context}",
      f"it can be 1 to {context - 1}",
    )
  if run.model.cfg.family == "encoder_decoder":
    ids = run.tokenizer.framed(run.tokenizer.encode(job.prompt), "source")
    read, source, most = run.tokenizer.framed([], "prompt"), ids[-context:], context
  else:
    ids, most = read_ids(run, job.prompt), context - num_new
    read = ids[-most:]
  stop = dataclasses.replace(job.stop, max_tokens=num_new)
  return FittedJob(job._replace(stop=stop), read, source, num_new, len(ids) > most)


def write_answers(
  run: Run,
  jobs: Sequence[FittedJob],
  on_done: Callable[[int], None] = lambda _: None,
  batch_size: int = WRITTEN_AT_A_TIME,
) -> list[Completion]:
  """What the model writes after each prompt, in batches of similar length."""
  run = prepare_for_decoding(run)
  written: dict[int, Completion] = {}
  sized = [SizedJob(n, x.job, len(x.read), x.num_new) for n, x in enumerate(jobs)]
  for batch in batch_jobs(sized, batch_size, run.model.cfg.context):
    rows = [jobs[x.number] for x in batch]
    sources = [row.source for row in rows if row.source is not None]
    num_new = max(row.num_new for row in rows)
    completions = complete_request(
      run,
      Request([row.read for row in rows], num_new, run.num_ids, sources or None),
      [row.job.prompt for row in rows],
      [row.job.settings for row in rows],
      [row.job.stop for row in rows],
    )
    written |= dict(zip((x.number for x in batch), completions, strict=True))
    on_done(len(batch))
  return [written[number] for number in range(len(jobs))]
