# SPDX-License-Identifier: Apache-2.0
"""Conversations: records of files become tokens, some of which an assistant has written.

A record has `messages`, a list of objects with `role` and `content`, and maybe `tools`, or
it has a `prompt` and a `completion`, which are a user's message and the answer. A chat
template writes it as text (see `flaxlm.chat`); what the assistant wrote is learnt.

Conversations are split as texts of records are (see `texts`), by the hash of their
messages.
"""

import contextlib
import hashlib
import itertools
import json
import reprlib
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flaxlm.chat.templates import ASSISTANT, Chat, Learnt, Talk
from flaxlm.data.corpus import Corpus, Log
from flaxlm.data.encoding import token_dtype
from flaxlm.data.records import Record, read_records
from flaxlm.data.texts import CODES, UNNAMED, split_codes
from flaxlm.data.tokenizing import SILENT_SECONDS
from flaxlm.errors import DataError, first_line, one_line
from flaxlm.tokenizers import AnyTokenizer

AT_A_TIME = 256  # texts that are encoded together
MEMBERS = 'as in {"messages": [{"role": "user", "content": "..."}, ...]}'
ITS_OWN_WAY = ("assistant", "tool")  # templates may write these messages in another form


class Lesson(NamedTuple):
  """The tokens of a text to learn from, and the weight of each in the loss."""

  talk: Talk  # it comes from
  ids_T: np.ndarray  # uint32
  weights_T: np.ndarray  # uint8
  num_bytes: int  # of the text


# -- Records -------------------------------------------------------------------------------


def read_talks(path: Path) -> Iterator[Talk]:
  """The conversations of a file. Raises `DataError`, with file and line, for a record that
  is none."""
  for record in read_records(path):
    yield to_talk(record, record.at(path))


def to_talk(record: Record, where: str) -> Talk:
  """The conversation of a record."""
  fields = record.fields
  if {"messages", "prompt", "completion"} <= fields.keys():  # many have one of these beside
    raise DataError(
      f"{where} has 'messages', and both 'prompt' and 'completion'", "leave one of them out"
    )
  if "messages" in fields:
    messages = fields["messages"]
  elif {"prompt", "completion"} <= fields.keys():
    for name in ("prompt", "completion"):
      if not isinstance(fields[name], str):
        said = f"{name} is {reprlib.repr(fields[name])}, which is no text"
        raise DataError(one_line(f"{where}: {said}"), f"conversations: {MEMBERS}")
    user = {"role": "user", "content": fields["prompt"]}
    messages = [user, {"role": ASSISTANT, "content": fields["completion"]}]
  else:
    others = ", ".join(map(repr, fields)) or "nothing"
    raise DataError(
      one_line(
        f"{where} has no field 'messages', and not both 'prompt' and 'completion', "
        f"but {others}"
      ),
      MEMBERS,
    )
  tools = fields.get("tools") or None
  mistake = next(mistakes_of(messages, tools), None)
  if mistake is not None:
    raise DataError(one_line(f"{where}: {mistake}"), MEMBERS)
  return Talk(messages, tools, where)


def mistakes_of(messages: Any, tools: Any, learnt: bool = True) -> Iterator[str]:
  """What is wrong with a conversation, which is to be `learnt` or to be continued."""
  are_objects = lambda x: isinstance(x, list) and all(isinstance(y, dict) for y in x)
  if not are_objects(messages):
    yield f"messages are {reprlib.repr(messages)}, not a list of objects"
    return
  if tools is not None and not are_objects(tools):
    yield f"tools are {reprlib.repr(tools)}, not a list of objects"
  for number, message in enumerate(messages, 1):
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
      yield (
        f"message {number} has no role"
        if role is None
        else (f"message {number} has the role {reprlib.repr(role)}, which is no text")
      )
    is_empty = not (content.strip() if isinstance(content, str) else content)
    if learnt and role == ASSISTANT and is_empty and not message.get("tool_calls"):
      yield f"message {number}, an answer, is empty"
    elif role != ASSISTANT and content is None:
      yield f"message {number} has no content"
  if learnt and not any(message.get("role") == ASSISTANT for message in messages):
    yield f"no message has the role {ASSISTANT}, so there is nothing to learn"


# -- Splits --------------------------------------------------------------------------------


class Talks:
  """The conversations of a corpus, in order, and the split of each."""

  unit = "conversations"
  read = staticmethod(read_talks)

  def __init__(self, corpus: Corpus):
    """Reads them all. Raises `DataError` for a record that is none."""
    self.corpus = corpus
    hashes, given = array("Q"), array("b")
    for file in corpus.record_files:
      code = UNNAMED if file.split is None else CODES[file.split]
      for talk in self.read(file.path):
        hashes.append(hash_of(talk))
        given.append(code)
    is_record = np.ones(len(hashes), bool)
    self.codes = split_codes(np.array(given), np.array(hashes), is_record, corpus.splits)
    check_not_empty(corpus, self.unit, len(hashes))
    for split in corpus.splits:
      if not self.count(split):
        raise DataError(f"{corpus.name} is too small: no {split} {self.unit}", "add some")

  def __iter__(self) -> Iterator[Talk]:
    files = self.corpus.record_files
    return itertools.chain.from_iterable(self.read(file.path) for file in files)

  def lessons(
    self, talks: Iterable[Talk], chat: Chat, tokenizer: AnyTokenizer
  ) -> Iterator[Lesson]:
    """The tokens of some of them; see `lessons`."""
    return lessons(talks, chat, tokenizer)

  def count(self, split: str) -> int:
    return int((self.codes == CODES[split]).sum())

  def texts(self, split: str) -> list[str]:
    """The conversations of a split, for a tokenizer to be trained on: much as the plain
    template writes them."""
    return [
      "".join(
        f"{message['role']}:\n{content}\n"
        for message in talk.messages
        if isinstance(content := message.get("content"), str)
      )
      for talk, code in zip(self, self.codes, strict=True)
      if code == CODES[split]
    ]


def check_not_empty(corpus: Corpus, unit: str, count: int) -> None:
  """Raises `DataError` for files in which there is no record at all."""
  if not count:
    files = corpus.record_files
    raise DataError(
      one_line(f"{corpus.name} has no {unit}: no record is in {files[0].path}")
      + (f" and {len(files) - 1} other files" if len(files) > 1 else ""),
      "write some, a line of JSON or a row each",
    )


def hash_of(talk: Talk) -> int:
  """What decides the split of a conversation: its messages or, of an answer to choose, the
  prompt's."""
  messages = talk.messages[: talk.since] if talk.since else talk.messages
  try:
    # A table may hold other values than JSON has, such as times.
    said = json.dumps([messages, talk.tools], sort_keys=True, default=str)
  except (RecursionError, TypeError) as e:  # names that are no texts cannot be sorted
    raise DataError(f"{talk.where} is no JSON: {first_line(e)}") from e
  digest = hashlib.sha256(said.encode("utf-8", "replace")).digest()
  return int.from_bytes(digest[:8], "big")


# -- Tokens --------------------------------------------------------------------------------


def write_lessons(
  folder: Path, talks: Talks, chat: Chat, tokenizer: AnyTokenizer, log: Log
) -> dict[str, dict[str, Any]]:
  """Writes the tokens of each split, where each conversation begins, and the weights of
  the tokens; returns the counts of each split."""
  names = {CODES[split]: split for split in talks.corpus.splits}
  ends = {split: array("q", [0]) for split in names.values()}
  counts = {split: {"num_learnt": 0, "num_bytes": 0} for split in names.values()}
  codes = iter(talks.codes)
  last, split = None, ""
  with contextlib.ExitStack() as stack:
    open_array = lambda name, kind: stack.enter_context(
      GrowingArray(folder / f"{name}.npy", np.dtype(kind))
    )
    tokens = {split: open_array(split, token_dtype(tokenizer)) for split in ends}
    weights = {split: open_array(f"{split}.weights", np.uint8) for split in ends}
    for lesson in talks.lessons(announced(talks, log), chat, tokenizer):
      if lesson.talk is not last:
        last, split = lesson.talk, names[next(codes)]
      tokens[split].append(lesson.ids_T)
      weights[split].append(lesson.weights_T)
      ends[split].append(ends[split][-1] + len(lesson.ids_T))
      counts[split]["num_learnt"] += int(lesson.weights_T.sum())
      counts[split]["num_bytes"] += lesson.num_bytes
  for split, bounds in ends.items():
    np.save(folder / f"{split}.bounds.npy", np.array(bounds), allow_pickle=False)
  return {
    split: {
      "num_documents": len(bounds) - 1,
      "num_tokens": bounds[-1],
      "gzip_bits_per_byte": None,
      **counts[split],
    }
    for split, bounds in ends.items()
  }


def announced(talks: Talks, log: Log) -> Iterator[Talk]:
  """The conversations; a line every ten seconds says how far they are."""
  told = time.perf_counter()
  for number, talk in enumerate(talks, 1):
    if time.perf_counter() - told > SILENT_SECONDS:
      told = time.perf_counter()
      log(f"{talks.corpus.name}: conversation {number:,} of {len(talks.codes):,}")
    yield talk


class GrowingArray:
  """A .npy file of one dim that is written from its start to its end."""

  def __init__(self, path: Path, dtype: np.dtype):
    self.dtype, self.size, self.file = dtype, 0, path.open("wb")
    self._write_header()

  def append(self, part: np.ndarray) -> None:
    self.file.write(part.astype(self.dtype).tobytes())
    self.size += len(part)

  def __enter__(self) -> "GrowingArray":
    return self

  def __exit__(self, *_: object) -> None:
    with self.file:
      self.file.seek(0)
      self._write_header()

  def _write_header(self) -> None:
    # NumPy leaves room in it for a length that is known later.
    header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.size,)}
    np.lib.format.write_array_header_1_0(self.file, header)


def lessons(talks: Iterable[Talk], chat: Chat, tokenizer: AnyTokenizer) -> Iterator[Lesson]:
  """The tokens of each text to learn from, in order; a few conversations have several.

  Raises `DataError`, with file and line, if the template fails or leaves a message out, or
  if nothing is learnt.
  """
  checked = (
    (talk, learnt) for talk, texts in chat.learn(talks) for learnt in check(talk, texts)
  )
  while some := [*itertools.islice(checked, AT_A_TIME)]:
    encoded = tokenizer.encode_chats([learnt.text for _, learnt in some])
    for (talk, learnt), (ids_T, offsets_T2) in zip(some, encoded, strict=True):
      weights_T = weigh(offsets_T2, learnt.spans)
      yield Lesson(talk, ids_T, weights_T, len(learnt.text.encode("utf-8", "replace")))


def check(talk: Talk, texts: Sequence[Learnt]) -> Sequence[Learnt]:
  """The texts of a conversation; `DataError` if the template has left a message out."""
  if not any(start < end for learnt in texts for start, end in learnt.spans):
    raise DataError(
      f"{talk.where}: the chat template writes nothing that carries loss",
      "it has {% generation %} marks, which are around no answer here",
    )
  answers = [n for n, m in enumerate(talk.messages) if m.get("role") == ASSISTANT]
  for number, message in enumerate(talk.messages[: answers[-1]], 1):
    role, content = message["role"], message.get("content")
    if role in ITS_OWN_WAY or not isinstance(content, str):
      continue
    if not any(is_in(content, learnt.text) for learnt in texts):
      raise DataError(
        one_line(
          f"{talk.where}: the chat template leaves out message {number}, whose role is "
          f"{reprlib.repr(role)}"
        ),
        "use a role that it knows, or put the message into another",
      )
  return texts


def is_in(part: str, text: str) -> bool:
  """Whether a text has a part, but for its blanks."""
  return part.strip() in text or "".join(part.split()) in "".join(text.split())


def weigh(offsets_T2: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
  """1 for each token that is wholly or in part in a span, else 0, as transformers has it.

  The first token has no weight: nothing is before it from which it could be predicted.
  """
  starts_T, ends_T = offsets_T2.T
  weights_T = np.zeros(len(offsets_T2), bool)
  for start, end in spans:
    weights_T |= (starts_T < end) & (ends_T > start)
  weights_T[:1] = False
  return weights_T.astype(np.uint8)
