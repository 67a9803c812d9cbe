# SPDX-License-Identifier: Apache-2.0
"""What judges completions: a check for the known answer, or a Python function of the user.

`FILE.py:NAME` names a function that is called as

    NAME(questions: list[dict], completions: list[str]) -> list of numbers

with the record of each completion's question, as its line of the corpus has it, and
returns as many rewards as there are completions; more is better. The file is code that is
executed, by choice, as a config file is.
"""

import hashlib
import reprlib
import runpy
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flaxlm.data.questions import Question
from flaxlm.decoding.sampling import is_number
from flaxlm.errors import ConfigError, DataError, first_line, one_line

EXACT = "exact"
LARGEST = 1e30  # float32 holds its differences
CURE = "as in def NAME(questions, completions): return [0.0 for _ in completions]"


class Judge(NamedTuple):
  """A function of rewards, its name for messages, and a digest of its file."""

  function: Callable[..., Any]
  name: str
  path: Path | None = None
  digest: str = EXACT

  def rewards(
    self, questions: Sequence[Question], completions: Sequence[str]
  ) -> np.ndarray:
    """The reward of each completion of a question (float64).

    Raises `DataError`, of one line, if the function fails or returns something else than
    a finite number for each, with file and line of the question.
    """
    records = [dict(question.fields) for question in questions]
    try:
      found = self.function(records, [*completions])
      if isinstance(found, Iterable):  # a generator fails only while it is read
        found = [*found]
    except (Exception, SystemExit) as e:  # whatever a user's function may raise
      raise DataError(*failure(self.path, self.name, e)) from e
    if not isinstance(found, list):
      said = f"{self.name} returned {reprlib.repr(found)}, which is no list"
      raise DataError(one_line(said), CURE)
    if len(found) != len(completions):
      raise DataError(
        f"{self.name} returned {len(found)} rewards for {len(completions)} completions",
        CURE,
      )
    for reward, question, completion in zip(found, questions, completions, strict=True):
      is_one = is_number(reward) or isinstance(reward, (bool, np.bool_))
      if not (is_one and abs(reward) <= LARGEST):  # NaN is not
        raise DataError(
          one_line(
            f"{question.where}: {self.name} gives the completion "
            f"{reprlib.repr(completion)} the reward {reprlib.repr(reward)}"
          ),
          f"a reward is a finite number, at most {LARGEST:g}",
        )
    return np.array([float(reward) for reward in found])


def is_exact(answer: str | None, completion: str) -> bool:
  """Whether it is the known answer; blanks around both do not count."""
  return answer is not None and completion.strip() == answer.strip()


def exact_answers(
  questions: Sequence[dict[str, Any]], completions: Sequence[str]
) -> list[bool]:
  """1 for the known answer, else 0."""
  pairs = zip(questions, completions, strict=True)
  return [is_exact(question["answer"], completion) for question, completion in pairs]


def load_judge(function: str) -> Judge:
  """The judge that `reward.function` names: `exact`, or FILE.py:NAME.

  Raises `ConfigError` if there is no such file or function, or the file fails.
  """
  if function == EXACT:
    return Judge(exact_answers, EXACT)
  file, _, name = function.rpartition(":")
  path = Path(file)
  if not file or not name.isidentifier() or path.suffix != ".py":
    raise ConfigError(
      f"reward.function={reprlib.repr(function)} is not {EXACT}, nor FILE.py:NAME", CURE
    )
  try:
    text = path.read_bytes()
  except OSError as e:
    raise ConfigError(
      f"reward.function: {path} cannot be read: {first_line(e)}", "name another file"
    ) from e
  try:
    names = runpy.run_path(str(path))
  except (Exception, SystemExit) as e:
    raise ConfigError(*failure(path, str(path), e)) from e
  if not callable(names.get(name)):
    raise ConfigError(f"{path} defines no function {name}", CURE)
  digest = hashlib.sha256(text).hexdigest()
  return Judge(names[name], f"{path}:{name}", path, digest)


def failure(path: Path | None, name: str, error: BaseException) -> tuple[str, str]:
  """(cause, cure) of what a user's code raised, with the line where it did."""
  frames = traceback.extract_tb(error.__traceback__)
  lines = [frame.lineno for frame in frames if frame.filename == str(path)]
  if isinstance(error, SyntaxError) and error.filename == str(path):
    lines = [error.lineno]
  where = f"{path}:{lines[-1]}: " if lines else ""
  why = f"{type(error).__name__}: {first_line(error)}"
  return one_line(f"{where}{name} failed: {why}"), ""
