# SPDX-License-Identifier: Apache-2.0
"""Preferences: a prompt, the answer that was chosen, and the one that was rejected.

A record has `prompt`, `chosen` and `rejected`, each a text or a list of messages (see
`conversations`): as texts they are what a user says, and two answers. Each record becomes
two conversations, the chosen one first, of which what follows the prompt carries loss.
They lie beside each other in the store. Pairs with the same prompt are in one split.
"""

import reprlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flaxlm.chat.templates import ASSISTANT, Chat, Talk
from flaxlm.data.conversations import Lesson, Talks, lessons, mistakes_of
from flaxlm.data.records import Record, read_records
from flaxlm.errors import DataError, one_line
from flaxlm.tokenizers import AnyTokenizer

FIELDS = ("prompt", "chosen", "rejected")
ROLES = ("user", ASSISTANT, ASSISTANT)  # of those that are texts
AS_IN = 'as in {"prompt": "2+2", "chosen": "4", "rejected": "5"}, or lists of messages'


def read_preferences(path: Path) -> Iterator[Talk]:
  """The conversations of a file: of each record the chosen one, then the rejected one.
  Raises `DataError`, with file and line, for a record that has no two."""
  for record in read_records(path):
    yield from to_pair(record, record.at(path))


def to_pair(record: Record, where: str) -> tuple[Talk, Talk]:
  """The conversations of a record: chosen, rejected."""
  fields = record.fields
  missing = [name for name in FIELDS if name not in fields]
  if missing:
    others = ", ".join(map(repr, fields)) or "nothing"
    names = " and ".join(map(repr, missing))
    raise DataError(one_line(f"{where} has no field {names}, but {others}"), AS_IN)
  prompt, chosen, rejected = (
    to_messages(name, fields[name], role, where)
    for name, role in zip(FIELDS, ROLES, strict=True)
  )
  if chosen == rejected:
    raise DataError(f"{where}: chosen and rejected are the same", "leave the record out")
  tools, since = fields.get("tools") or None, len(prompt)
  for name, messages in zip(FIELDS[1:], (chosen, rejected), strict=True):
    mistake = next(mistakes_of([*prompt, *messages], tools), None)
    if mistake is None and not any(x.get("role") == ASSISTANT for x in messages):
      mistake = f"no message has the role {ASSISTANT}, so there is nothing to learn"
    if mistake is not None:
      raise DataError(one_line(f"{where}: prompt and {name}: {mistake}"), AS_IN)
  return (
    Talk([*prompt, *chosen], tools, where, since),
    Talk([*prompt, *rejected], tools, where, since),
  )


def to_messages(name: str, value: Any, role: str, where: str) -> list[Any]:
  """The messages that a field holds."""
  if isinstance(value, str):
    return [{"role": role, "content": value}]
  if isinstance(value, list) and value:
    return value
  said = f"{name} is {reprlib.repr(value)}, neither a text nor a list of messages"
  raise DataError(one_line(f"{where}: {said}"), AS_IN)


class Preferences(Talks):
  """The conversations of a corpus of preferences: chosen, rejected, and so on."""

  unit = "pairs"
  read = staticmethod(read_preferences)

  def count(self, split: str) -> int:
    """The pairs of a split."""
    return super().count(split) // 2

  def lessons(
    self, talks: Iterable[Talk], chat: Chat, tokenizer: AnyTokenizer
  ) -> Iterator[Lesson]:
    """One for each conversation; see `pairs`."""
    for pair in pairs(talks, chat, tokenizer):
      yield from pair


def pairs(
  talks: Iterable[Talk], chat: Chat, tokenizer: AnyTokenizer
) -> Iterator[tuple[Lesson, Lesson]]:
  """The tokens of each pair, chosen and rejected.

  Raises `DataError`, with file and line, if a template writes a conversation as several
  texts, or both alike.
  """
  found = lessons(talks, chat, tokenizer)
  for chosen in found:
    rejected = next(found, None)
    # Of two conversations with several texts the first two may be of one conversation.
    if rejected is None or not are_pair(chosen.talk, rejected.talk):
      raise DataError(
        f"{chosen.talk.where}: the chat template writes an answer as several texts",
        "end the prompt before the last answer",
      )
    if np.array_equal(chosen.ids_T, rejected.ids_T):
      raise DataError(
        f"{chosen.talk.where}: the chat template writes chosen and rejected alike",
        "leave the record out",
      )
    yield chosen, rejected


def are_pair(chosen: Talk, rejected: Talk) -> bool:
  """Whether two conversations that follow one another are the two of one record."""
  return chosen is not rejected and chosen.where == rejected.where
