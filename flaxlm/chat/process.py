# SPDX-License-Identifier: Apache-2.0
"""A process that renders the templates of others, with bounds of time and memory.

It takes a fifth of a second to start, so one process renders many conversations. Each of
them has the whole time for itself.
"""

import contextlib
import itertools
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

# Bounds of a conversation, far beyond what those of models need.
MAX_SECONDS = 4  # of a processor
MAX_WAIT_SECONDS = 8
MAX_BYTES = 512 * 2**20
MAX_CHARACTERS = 2**24
TOO_LATE = (signal.SIGXCPU, signal.SIGKILL, signal.SIGALRM)  # what ends it after that
PROGRAM = Path(__file__).with_name("template.py")
AT_A_TIME = 64  # conversations that are sent to the process

# The name of a "template", its "values", whether to "learn", and "since" which message.
Job = Mapping[str, Any]


def answers(templates: Mapping[str, str], jobs: Iterable[Job]) -> Iterator[dict[str, Any]]:
  """The answer to each job, in order: a "text", "texts" to learn from, or an "error".

  Jobs are read ahead. An error that ends the process is the last answer.
  """
  try:
    child = start_child()
  except OSError as e:
    yield no_child(e)
    return
  rest = iter(jobs)
  try:
    write_line(child, first_line(templates))
    while some := [*itertools.islice(rest, AT_A_TIME)]:
      # It reads all of them before it answers, so the two never wait for each other.
      write_line(child, some)
      for _ in some:
        yield read_line(child)
  except (BrokenPipeError, ValueError, RecursionError):
    yield {"error": what_ended(child)}
  finally:
    end_child(child)


class Renderer:
  """A process that stays, and renders one conversation after another, for any
  thread."""

  def __init__(self, templates: Mapping[str, str]):
    self._templates = templates
    self._lock = threading.Lock()
    self._child: subprocess.Popen | None = None

  def answer(self, job: Job) -> dict[str, Any]:
    """A "text", or an "error". After one that has ended the process, another is started."""
    with self._lock:
      try:
        if self._child is None:
          self._child = start_child()
          write_line(self._child, first_line(self._templates))
        write_line(self._child, [job])
        return read_line(self._child)
      except (BrokenPipeError, ValueError, RecursionError):
        child, self._child = self._child, None
        if child is None:
          return {"error": "its process broke down"}
        cause = what_ended(child)
        end_child(child)
        return {"error": cause}
      except OSError as e:
        return no_child(e)

  def close(self) -> None:
    with self._lock:
      if self._child is not None:
        end_child(self._child)
        self._child = None


def first_line(templates: Mapping[str, str]) -> dict[str, Any]:
  """What the process is told first."""
  limits = {
    "seconds": MAX_SECONDS,
    "wait_seconds": MAX_WAIT_SECONDS,
    "bytes": MAX_BYTES,
    "characters": MAX_CHARACTERS,
  }
  return {"templates": templates, "limits": limits}


def start_child() -> subprocess.Popen:
  # -P: its folder has modules of ours, which are not for it to import.
  return subprocess.Popen(
    [sys.executable, "-P", str(PROGRAM)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    encoding="utf-8",
  )


def no_child(error: OSError) -> dict[str, Any]:
  return {"error": f"no process can be started for it: {error.strerror}"}


def end_child(child: subprocess.Popen) -> None:
  child.kill()
  for pipe in (child.stdin, child.stdout):
    with contextlib.suppress(BrokenPipeError):
      pipe.close()  # type: ignore[union-attr]
  child.wait()


def write_line(child: subprocess.Popen, value: Any) -> None:
  """Raises `BrokenPipeError` if the process has ended."""
  assert child.stdin is not None
  # NaN is for it to print, and so is what only tables hold, such as times.
  child.stdin.write(f"{json.dumps(value, allow_nan=True, default=str)}\n")
  child.stdin.flush()


def read_line(child: subprocess.Popen) -> dict[str, Any]:
  """Raises `BrokenPipeError` if the process has ended."""
  assert child.stdout is not None
  line = child.stdout.readline()
  if not line.endswith("\n"):
    raise BrokenPipeError
  return json.loads(line)


def what_ended(child: subprocess.Popen) -> str:
  """Why there is no answer."""
  with contextlib.suppress(BrokenPipeError):
    child.stdin.close()  # type: ignore[union-attr] # it ends at the latest now
  if -child.wait() in TOO_LATE:
    return f"it takes more than {MAX_SECONDS} s"
  return "its process broke down"
