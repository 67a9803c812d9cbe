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
  start = {
    "templates": templates,
    "limits": {
      "seconds": MAX_SECONDS,
      "wait_seconds": MAX_WAIT_SECONDS,
      "bytes": MAX_BYTES,
      "characters": MAX_CHARACTERS,
    },
  }
  try:
    # -P: its folder has modules of ours, which are not for it to import.
    child = subprocess.Popen(
      [sys.executable, "-P", str(PROGRAM)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      encoding="utf-8",
    )
  except OSError as e:
    yield {"error": f"no process can be started for it: {e.strerror}"}
    return
  rest = iter(jobs)
  try:
    write_line(child, start)
    while some := [*itertools.islice(rest, AT_A_TIME)]:
      # It reads all of them before it answers, so the two never wait for each other.
      write_line(child, some)
      for _ in some:
        yield read_line(child)
  except (BrokenPipeError, ValueError, RecursionError):
    yield {"error": what_ended(child)}
  finally:
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
