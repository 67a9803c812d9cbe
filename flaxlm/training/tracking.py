# SPDX-License-Identifier: Apache-2.0
"""Sends a run's metrics to a tracker, which is never waited for and never ends a run."""

import contextlib
import json
import math
import os
import queue
import re
import sys
import threading
from collections.abc import Callable, Mapping

from flaxlm.checkpoint.manifest import write_atomically
from flaxlm.config import ResolvedConfig
from flaxlm.errors import ConfigError, first_line, one_line, writing
from flaxlm.runs import METRICS
from flaxlm.strict_json import to_json
from flaxlm.training.trackers import SINKS, Sink

IDS = ".tracked"  # in the run's folder: by which ids the trackers know the run
MOST_WAITING = 10_000  # lines of metrics that a tracker is behind
FINISH_SECONDS = 60.0  # that what is left may take when a run has ended
STOP_SECONDS = 10.0  # the same of one that was stopped: whoever stops it soon kills it
SECRET_NAMES = re.compile("KEY|TOKEN|PASSWORD|SECRET")


class Tracker:
  """A thread that sends lines of metrics to a sink. The thread that trains has `log` and
  `finish`; it says what went wrong by `say`, once."""

  def __init__(
    self,
    name: str,
    sink: Sink,
    say: Callable[[str], None],
    finish_seconds: float = FINISH_SECONDS,
  ):
    self._name, self._sink, self._say = name, sink, say
    self._finish_seconds = finish_seconds
    self._waiting: queue.Queue[Callable[[], None] | None] = queue.Queue(MOST_WAITING)
    self._asked = self._done = 0
    self._problem = ""
    self._told = False
    self._thread = threading.Thread(target=self._work, name=f"track {name}", daemon=True)
    self._thread.start()

  def log(self, step: int, values: Mapping[str, float]) -> None:
    """Sends a line, without its values that are not finite."""
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    self._ask(lambda: self._sink.log(step, finite))
    self._tell()

  def finish(self, exit_code: int) -> None:
    """Sends what is left, as long as that takes no longer than `finish_seconds`."""
    self._ask(lambda: self._sink.finish(exit_code))
    self._put(None)
    most = self._finish_seconds if exit_code == 0 else STOP_SECONDS
    self._thread.join(min(most, self._finish_seconds))
    self._tell()
    if self._done < self._asked:
      self._say(f"{self._name} has not got all of the run: {METRICS} has it")

  def _ask(self, call: Callable[[], None]) -> None:
    self._asked += 1
    self._put(call)

  def _put(self, call: Callable[[], None] | None) -> None:
    with contextlib.suppress(queue.Full):  # what was asked is counted
      self._waiting.put_nowait(call)

  def _work(self) -> None:
    while (call := self._waiting.get()) is not None:
      try:
        call()
        self._done += 1
      except Exception as e:  # whatever a library may raise
        self._problem = self._problem or without_secrets(first_line(e))

  def _tell(self) -> None:
    if self._problem and not self._told:
      self._told = True
      self._say(f"{self._name} fails, and training goes on: {self._problem}")


def start_tracking(
  cfg: ResolvedConfig, first_step: int, say: Callable[[str], None]
) -> Tracker | None:
  """The tracker that the config asks for; a run that resumes goes on in the same place.

  Raises `ConfigError` if it cannot be reached and the run is at its beginning. A run that
  resumes, which may be at night, goes on without it.
  """
  if cfg.track == "none":
    return None
  ids = read_ids(cfg) if first_step else {}
  try:
    with contextlib.redirect_stdout(sys.stderr):
      sink = SINKS[cfg.track](cfg, ids.get(cfg.track))
  except Exception as e:
    problem = f"{cfg.track} cannot be started: {without_secrets(first_line(e))}"
    if not first_step:
      raise ConfigError(problem, "see docs/training.md, or leave --track out") from e
    say(f"{problem}; training goes on")
    return None
  with writing(cfg.run_dir):
    write_atomically(cfg.run_dir / IDS, to_json({**ids, cfg.track: sink.id}))
  say(f"tracked by {cfg.track}: {without_secrets(sink.place)}")
  return Tracker(cfg.track, sink, say)


def read_ids(cfg: ResolvedConfig) -> dict[str, str]:
  """The ids of the run by tracker; none of a file that cannot be read."""
  with contextlib.suppress(OSError, ValueError):
    found = json.loads((cfg.run_dir / IDS).read_text("utf-8"))
    if isinstance(found, dict):
      return {name: id for name, id in found.items() if isinstance(id, str)}
  return {}


def without_secrets(text: str) -> str:
  """A line of a library without what gives access: passwords in addresses, and values of
  environment variables that are called keys, tokens or the like."""
  for name, value in os.environ.items():
    if SECRET_NAMES.search(name.upper()) and len(value) >= 8:
      text = text.replace(value, "***")
  text = re.sub(r"//[^/@\s]+@", "//***@", text)
  text = re.sub(r"(?i)((?:token|key|password|secret)=)[^&\s]+", r"\1***", text)
  return one_line(text)
