# SPDX-License-Identifier: Apache-2.0
"""Ends a run that makes no progress: all processes would wait for a stuck one for ever.

A collective has no time limit, and the heartbeat of a stuck process goes on: 512 GPUs
waited 33 minutes without a line (jax#38503), 704 processes 4.5 hours at a barrier
(marin#7344).
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

from flaxlm.errors import HangError

# Our own thread may never get the interpreter's lock. faulthandler's thread needs no lock:
# it ends the process this many seconds later.
SECOND_TRY = 30.0
SET_AGAIN = 10.0  # seconds at least: each time starts a thread


class Watchdog:
  """Ends the process if `progress` is not called for `seconds`; off until the first call,
  and while `resting`."""

  def __init__(self, seconds: float | None, say: Callable[[HangError], None]):
    """`say` is called with the error before the process ends with its exit code."""
    self.seconds, self._say = seconds, say
    self._deadline: float | None = None
    self._set_at = -SET_AGAIN
    self._changed = threading.Condition()
    self._closed = False
    if seconds is not None:
      threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

  def progress(self) -> None:
    """Starts the time again."""
    if self.seconds is None:
      return
    now = time.monotonic()
    with self._changed:
      if self._deadline is None:
        self._changed.notify()
      self._deadline = now + self.seconds
    if now - self._set_at > SET_AGAIN:
      self._set_at = now
      faulthandler.dump_traceback_later(self.seconds + SECOND_TRY, exit=True)

  @contextlib.contextmanager
  def resting(self) -> Iterator[None]:
    """Off for a block that may take long, such as compiling."""
    armed = self._deadline is not None
    self._disarm()
    try:
      yield
    finally:
      if armed:
        self.progress()

  def __enter__(self) -> "Watchdog":
    return self

  def __exit__(self, *_: object) -> None:
    self._closed = True
    self._disarm()

  def _disarm(self) -> None:
    if self.seconds is not None:
      with self._changed:
        self._deadline, self._set_at = None, -SET_AGAIN
        self._changed.notify()
      faulthandler.cancel_dump_traceback_later()

  def _watch(self) -> None:
    with self._changed:
      while not self._closed:
        if self._deadline is None:
          self._changed.wait()
          continue
        left = self._deadline - time.monotonic()
        if left > 0:
          self._changed.wait(left)
          continue
        break
      else:
        return
    error = HangError(
      f"no progress for {self.seconds:g} s; where every thread stands is above",
      "a longer --training.hang-seconds, or none, waits longer",
    )
    faulthandler.dump_traceback(all_threads=True)
    print(f"flaxlm: {error}", file=sys.stderr, flush=True)
    self._say(error)
    os._exit(error.exit_code)
