# SPDX-License-Identifier: Apache-2.0
"""Errors for users: one line of cause, one line of cure, one exit code each."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

MOST_SHOWN = 1400  # characters of a line


class FlaxLMError(Exception):
  """An error that the user can fix. `cause` says what is wrong, `cure` what would work."""

  exit_code = 1

  def __init__(self, cause: str, cure: str = ""):
    cause = re.sub(r"\[Errno -?\d+\] ", "", cause)  # a number that says nothing to a user
    super().__init__(f"{cause}\n  {cure}" if cure else cause)
    self.cause, self.cure = cause, cure


class ConfigError(FlaxLMError):
  """A config file, a flag or another input of the command line is wrong."""

  exit_code = 2


class DataError(FlaxLMError):
  """A corpus or a tokenizer is missing, empty, damaged or does not fit."""

  exit_code = 3


class CheckpointError(FlaxLMError):
  """A checkpoint is missing, damaged, or belongs to another configuration."""

  exit_code = 4


class WriteError(FlaxLMError):
  """A file could not be written: the disk is full, or does not take it."""

  exit_code = 4


class NonFiniteError(FlaxLMError):
  """The loss, the gradient or the logits became NaN or infinite."""

  exit_code = 5


class HangError(FlaxLMError):
  """A step made no progress for `training.hang_seconds`."""

  exit_code = 6


class PeerLostError(FlaxLMError):
  """Another process of the job did not start, ended, or stopped responding."""

  exit_code = 7


class OutOfMemoryError(FlaxLMError):
  """The accelerator's memory does not hold the program."""

  exit_code = 8


PREEMPTED = 75  # EX_TEMPFAIL: the run was told to stop, saved its state, and can resume
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


# What the system says of a disk that takes no more: full, a quota, a file as large as it
# may get, mounted for reading, broken.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@contextlib.contextmanager
def writing(path: Path | str, cure: str = "") -> Iterator[None]:
  """Turns an `OSError` of its block, which writes to `path`, into a `WriteError`."""
  try:
    yield
  except BrokenPipeError:  # nobody reads on; no disk is to blame
    raise
  except OSError as e:
    raise write_error(e, path, cure) from e


def write_error(error: OSError, path: Path | str, cure: str = "") -> WriteError:
  """The error for a file, or for what the system's error names."""
  cause = f"{error.filename or path} cannot be written: {first_line(error)}"
  return WriteError(cause, cure or "free some space, or write elsewhere")


def one_line(text: str) -> str:
  """A line that any terminal shows: control characters and halves of surrogate pairs, as a
  path or a value may have them, are escaped, and what is too long is cut."""
  text = text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
  escape = lambda letter: letter.encode("unicode_escape").decode()
  return "".join(x if x.isprintable() else escape(x) for x in text)


def first_line(error: BaseException) -> str:
  """The first line of a library's message, or the error's type if it has none; of an error
  of the system, or of a disk, what the system says, without numbers."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  text = str(error)
  if isinstance(error, OSError) and re.fullmatch(r"\d+ requested and \d+ written", text):
    return os.strerror(errno.ENOSPC)  # NumPy's words, when a disk takes only a part
  for number in DISK_ERRORS:
    if os.strerror(number) in text:  # as C++ passes it on, among paths and positions
      return os.strerror(number)
  return next(iter(text.splitlines()), type(error).__name__)


def exit_code_of(error: BaseException) -> int:
  """The exit code of a process that ends with an uncaught `error`."""
  if isinstance(error, FlaxLMError):
    return error.exit_code
  if isinstance(error, KeyboardInterrupt):
    return INTERRUPTED
  if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
    return OutOfMemoryError.exit_code  # XLA's status for it
  return 1
