# SPDX-License-Identifier: Apache-2.0
"""Questions that a model learns to answer from rewards: read, split, and put in order.

A record has a `prompt`, or `messages` of which the last is not the assistant's, and maybe
the known `answer`; a reward may read whatever else it has. A run with a chat template asks
in it, another one continues the prompt as it is. Questions are split as conversations are:
by the hash of their messages, unless the file has the name of a split.
"""

import contextlib
import hashlib
import json
import math
import reprlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flaxlm.chat.templates import ASSISTANT, Chat, Talk, load_chat
from flaxlm.config import Config
from flaxlm.data.batches import order_of_source
from flaxlm.data.conversations import check_not_empty, hash_of, mistakes_of
from flaxlm.data.corpus import SPLITS, Corpus, Log
from flaxlm.data.mixtures import parse_mixture
from flaxlm.data.prepare import corpus_of
from flaxlm.data.records import Record, read_records
from flaxlm.data.texts import CODES, UNNAMED, split_codes
from flaxlm.errors import ConfigError, DataError, one_line
from flaxlm.tokenizers import AnyTokenizer, load_tokenizer

MEMBERS = 'as in {"prompt": "3+4", "answer": "7"}'


class Question(NamedTuple):
  """What is asked, and what is known of it."""

  fields: dict[str, Any]  # of its record
  talk: Talk
  ids: tuple[int, ...] = ()  # of the prompt

  @property
  def where(self) -> str:
    """File and line."""
    return self.talk.where

  @property
  def answer(self) -> str | None:
    return self.fields.get("answer")


@dataclass(frozen=True)
class Questions:
  """The questions of a corpus, ready to be asked."""

  tokenizer: AnyTokenizer
  splits: dict[str, list[Question]]
  fingerprint: str
  chat: Chat | None  # the template that they are asked in
  notes: list[str]

  @property
  def sizes(self) -> str:
    """How many there are of each split, in words."""
    train, validation = (len(self.splits[split]) for split in SPLITS)
    return f"{train:,} prompts to learn from, {validation:,} held out"


def prepare_questions(
  cfg: Config,
  corpus: str,
  folder: Path,
  judged_by: str,
  log: Log,
  whole: bool = False,
) -> Questions:
  """The questions of a corpus, for the tokenizer and the chat template of a run's `folder`.

  `judged_by`, a digest, is a part of their fingerprint. A prompt that leaves no room for an
  answer in `data.seq_len` is left out; a note says how many were. Raises `ConfigError` and
  `DataError`, with file and line for a record that is no question, or that has no answer
  where one is needed.
  """
  if parse_mixture(corpus) is not None:
    raise ConfigError(
      f"data.objective=reward takes no mixture: data.corpus={corpus!r}", "name files"
    )
  found = corpus_of(corpus, log, "reward", cfg.data.text_field, whole)
  tokenizer, chat = load_tokenizer(folder / "tokenizer.json"), load_chat(folder)
  needs_answer = cfg.reward.function == "exact"
  asked, codes = read_questions(found, needs_answer)
  check_not_empty(found, "prompts", len(asked))
  encoded = encode(asked, chat, tokenizer)
  room = cfg.data.seq_len - cfg.reward.max_new_tokens
  fits = [len(question.ids) <= room for question in encoded]
  splits = {
    split: [
      question
      for question, code, fit in zip(encoded, codes, fits, strict=True)
      if fit and code == CODES[split]
    ]
    for split in found.splits
  }
  for split, questions in splits.items():
    if not questions:
      raise DataError(
        f"{found.name} has no {split} prompt of at most {room} tokens "
        "(data.seq_len - reward.max_new_tokens)",
        "add some, or raise --data.seq-len",
      )
  notes = [
    f"prompts are asked in the chat template of {folder}"
    if chat is not None
    else f"{folder} has no chat template: prompts are continued as they are"
  ]
  if not all(fits):
    first = encoded[fits.index(False)].where
    count = len(fits) - sum(fits)
    notes.append(f"prompts of more than {room} tokens: {count:,} left out, first {first}")
  template = None if chat is None else chat.fingerprint
  parts = ("reward", found.fingerprint, tokenizer.fingerprint, template, judged_by)
  fingerprint = hashlib.sha256(json.dumps([*parts]).encode()).hexdigest()[:24]
  return Questions(tokenizer, splits, fingerprint, chat, notes)


# -- Records -------------------------------------------------------------------------------


def read_questions(corpus: Corpus, needs_answer: bool) -> tuple[list[Question], np.ndarray]:
  """(the questions of a corpus in order, the code of the split of each)."""
  questions, hashes, given = [], array("Q"), array("b")
  for file in corpus.record_files:
    for record in read_records(file.path):
      question = to_question(record, record.at(file.path), needs_answer)
      questions.append(question)
      hashes.append(hash_of(question.talk))
      given.append(UNNAMED if file.split is None else CODES[file.split])
  is_record = np.ones(len(hashes), bool)
  codes = split_codes(np.array(given), np.array(hashes), is_record, corpus.splits)
  return questions, codes


def to_question(record: Record, where: str, needs_answer: bool) -> Question:
  """The question of a record. Raises `DataError`."""
  fields, tools = record.fields, record.fields.get("tools") or None
  mistake = next(mistakes_in(fields, tools, needs_answer), None)
  if mistake is not None:
    raise DataError(one_line(f"{where}: {mistake}"), MEMBERS)
  messages = fields.get("messages") or [{"role": "user", "content": fields["prompt"]}]
  return Question(fields, Talk(messages, tools, where))


def mistakes_in(fields: dict[str, Any], tools: Any, needs_answer: bool) -> Iterator[str]:
  """What is wrong with the record of a question."""
  if ("prompt" in fields) == ("messages" in fields):
    others = ", ".join(map(repr, fields)) or "nothing"
    yield f"a question has either 'prompt' or 'messages', but there is {others}"
    return
  if "messages" in fields:
    yield from mistakes_of(fields["messages"], tools, learnt=False)
    if not fields["messages"]:
      yield "there are no messages"
    elif fields["messages"][-1].get("role") == ASSISTANT:
      yield "the last message is an answer: there is nothing to ask"
  elif not isinstance(fields["prompt"], str) or not fields["prompt"]:
    yield f"prompt is {reprlib.repr(fields['prompt'])}, which is no text"
  answer = fields.get("answer")
  if answer is None and needs_answer:
    yield "there is no answer, which reward.function=exact needs"
  elif not (answer is None or isinstance(answer, str)):
    yield f"answer is {reprlib.repr(answer)}, which is no text"
  elif answer is not None and not answer.strip():
    yield "answer is empty"


def encode(
  questions: Sequence[Question], chat: Chat | None, tokenizer: AnyTokenizer
) -> list[Question]:
  """The questions with their tokens: in the chat template, or as a text that goes on."""
  if chat is not None:
    texts = [*chat.prompts(question.talk for question in questions)]
    ids = [ids.tolist() for ids, _ in tokenizer.encode_chats(texts)] if texts else []
  else:
    for question in questions:
      if "messages" in question.fields:
        raise DataError(
          f"{question.where} has messages, and the run has no chat template",
          "use 'prompt', or begin from a run that has one",
        )
    prompts = (question.fields["prompt"] for question in questions)
    ids = [tokenizer.framed(tokenizer.encode(prompt), "prompt") for prompt in prompts]
  return [q._replace(ids=tuple(own)) for q, own in zip(questions, ids, strict=True)]


# -- Order ---------------------------------------------------------------------------------


class QuestionBatches:
  """Batches of questions: number n is a pure function of (seed, n).

  Each epoch has all questions, in an order of its own. The last batch is filled up with
  the first questions of another epoch.
  """

  def __init__(
    self,
    questions: Sequence[Question],
    size: int,
    seed: int,
    num_epochs: int | None,
    notes: Sequence[str] = (),
  ):
    """Raises `DataError` if there are fewer questions than in a batch."""
    if len(questions) < size:
      raise DataError(
        f"there are {len(questions):,} prompts to learn from, fewer than {size} "
        "(data.batch_size / reward.num_samples)",
        "add some, or lower --data.batch-size",
      )
    self._questions, self._size, self.notes = questions, size, notes
    self._order = order_of_source(len(questions), seed)
    self._num_batches = None
    if num_epochs is not None:
      self._num_batches = math.ceil(num_epochs * len(questions) / size)

  def __getitem__(self, n: int) -> list[Question]:
    if n < 0 or (self._num_batches is not None and n >= self._num_batches):
      raise IndexError(n)
    places = range(n * self._size, (n + 1) * self._size)
    return [self._questions[self._order(place)] for place in places]

  @contextlib.contextmanager
  def iterate(self, start: int = 0) -> Iterator[Iterator[list[Question]]]:
    """`with batches.iterate(n) as it`: batches n, n + 1, ..."""
    yield iter(self._from(start))

  def _from(self, n: int) -> Iterable[list[Question]]:
    while self._num_batches is None or n < self._num_batches:
      yield self[n]
      n += 1
