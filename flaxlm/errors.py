# SPDX-License-Identifier: Apache-2.0
"""Errors for users: one line of cause, one line of cure, one exit code each."""


class FlaxLMError(Exception):
  """An error that the user can fix. `cause` says what is wrong, `cure` what would work."""

  exit_code = 1

  def __init__(self, cause: str, cure: str = ""):
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


def first_line(error: BaseException) -> str:
  """The first line of a library's message, or the error's type if it has none."""
  return next(iter(str(error).splitlines()), type(error).__name__)


def reason(error: OSError) -> str:
  """Why the system refused: without the number and the path that `str` puts around it."""
  return error.strerror or first_line(error)


def exit_code_of(error: BaseException) -> int:
  """The exit code of a process that ends with an uncaught `error`."""
  if isinstance(error, FlaxLMError):
    return error.exit_code
  if isinstance(error, KeyboardInterrupt):
    return INTERRUPTED
  if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
    return OutOfMemoryError.exit_code  # XLA's status for it
  return 1
