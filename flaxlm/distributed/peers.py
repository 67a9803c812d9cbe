# SPDX-License-Identifier: Apache-2.0
"""The processes of a job while it runs: which are still there, and what all agree on.

The connections of the rendezvous stay open. When a process dies the kernel closes its
connection, so process 0 knows at once and tells the others. A process that is silent for
longer than the heartbeat counts as lost. JAX would notice a dead process only after its own
heartbeat, and then abort with a C++ stack; a collective with it would fail or hang.
"""

import contextlib
import faulthandler
import math
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from flaxlm.distributed.lines import Garbage
from flaxlm.distributed.rendezvous import Card, Meeting
from flaxlm.errors import ConfigError, FlaxLMError, HangError, PeerLostError, exit_code_of

T = TypeVar("T")

EXPLAIN = 1.0  # seconds to learn of another's death, which takes milliseconds
LINGER = 0.5  # seconds, at most, until the others have heard why this process ends
CURE = "its own log says why; the same command resumes from the last checkpoint"


class Alone:
  """A process that is the whole job: there is nothing to agree on, and no network."""

  process, num_processes = 0, 1

  def decide(self, function: Callable[[], T]) -> T:
    """Returns what process 0 computes, on every process; it has to be a JSON value."""
    return function()

  def agree(self, name: str, value: str = "") -> None:
    """Waits for all processes. Raises `ConfigError` if they have different values."""

  def stop_at(self, step: int, requested: int) -> int:
    """Call it before each step: returns the signal for which all stop now, else 0."""
    return requested

  def leave(self, error: BaseException | None = None) -> None:
    """Says goodbye; after an error the others end too."""

  def explain(self) -> None:
    """Call it after an error that another process may have caused: returns if none did."""


class Peers(Alone):
  """All processes of a job, seen from one of them."""

  def __init__(self, process: int, meeting: Meeting, heartbeat_seconds: float):
    self.process, self.num_processes = process, len(meeting.cards)
    self._lines, self._cards = meeting.lines, meeting.cards
    self._heartbeat = heartbeat_seconds
    self._changed = threading.Condition()
    self._sending = threading.Lock()
    # Process 0's answer, and the votes, in each round of `decide` and `agree`.
    self._round = 0
    self._said: dict[int, Any] = {}
    self._votes: dict[int, dict[int, str]] = {}
    # About stopping: steps begun, the signal, and the step after which all stop.
    self._begun = 0
    self._asked = False
    self._signal: int | None = None
    self._begun_by: dict[int, int] = {}
    self._last_step: int | None = None
    self._leaving = False
    self._done: set[int] = set()  # said goodbye
    self._gone: set[int] = set()  # closed their connection
    # Why this process ends because of another, and when at the latest.
    self._failure: PeerLostError | None = None
    self._end = math.inf
    self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
    self._thread.start()

  # -- What all agree on -----------------------------------------------------------------

  def decide(self, function: Callable[[], T]) -> T:
    number = self._next_round()
    if self.process:
      return self._hear(number)
    value = function()
    self._tell({"said": [number, value]})
    return value

  def agree(self, name: str, value: str = "") -> None:
    number = self._next_round()
    if self.process:
      self._tell({"vote": [number, value]})
      error = self._hear(number)
    else:
      with self._changed:
        self._votes.setdefault(number, {})[0] = value
        self._changed.wait_for(lambda: len(self._votes[number]) == self.num_processes)
        votes = self._votes.pop(number)
      others = [str(self._cards[n]) for n in sorted(votes) if votes[n] != value]
      error = f"{name} is not the same on process 0 and on {', '.join(others[:3])}"
      error = error if others else None
      self._tell({"said": [number, error]})
    if error is not None:
      raise ConfigError(error, "all processes need the same files, at the same paths")

  def _next_round(self) -> int:
    self._round += 1
    return self._round

  def _hear(self, number: int) -> Any:
    with self._changed:
      self._changed.wait_for(lambda: number in self._said)
      return self._said.pop(number)

  # -- Stopping after the same step ------------------------------------------------------

  def stop_at(self, step: int, requested: int) -> int:
    """All stop after the latest step that any process had begun when it was told to.

    A process that is told reports its step, and begins no other until it knows the last
    one. JAX's own preemption service works like this too, but not for Ctrl-C.
    """
    with self._changed:
      if requested and not self._asked:
        self._asked = True
        self._tell({"stop": requested})
        if self.process == 0:
          self._freeze(requested)
      self._changed.wait_for(lambda: self._signal is None or self._last_step is not None)
      if self._last_step is not None and step >= self._last_step:
        return self._signal or 0
      self._begun = max(self._begun, step + 1)
      return 0

  def _freeze(self, number: int) -> None:
    """Process 0 has heard of a signal, and asks all processes for their steps."""
    if self._signal is None:
      self._signal = number
      self._begun_by[0] = self._begun
      self._tell({"freeze": number})

  # -- Coming and going ------------------------------------------------------------------

  def leave(self, error: BaseException | None = None) -> None:
    self._leaving = True
    message: dict[str, Any] = {"bye": 0, "process": self.process}
    if error is not None:
      why = getattr(error, "cause", None) or f"{type(error).__name__}: {error}"
      short = next(iter(str(why).splitlines()), "")[:500]
      message |= {"bye": exit_code_of(error), "why": short}
    self._tell(message)
    self._say_no_more()
    if error is not None:
      self._thread.join(LINGER)  # the others close their connections when they hear it

  def _say_no_more(self) -> None:
    for line in self._lines.values():
      with contextlib.suppress(OSError):
        line.socket.shutdown(socket.SHUT_WR)

  def _fail(self, error: PeerLostError, message: dict[str, Any]) -> None:
    """On the watch's thread: ends this process because of another one.

    The others hear of each other through process 0 alone, so it passes `message` on first.
    The watch then reads until they have closed their connections, or for `LINGER` seconds:
    a process that ends while anything is unread, even a heartbeat, resets the connection,
    and the message is lost.
    """
    if self.process:
      die(error)
    self._tell(message)
    self._say_no_more()
    self._failure, self._end = error, time.monotonic() + LINGER

  def explain(self) -> None:
    time.sleep(EXPLAIN)  # the watch ends the process if a peer is gone

  def _tell(self, message: dict[str, Any]) -> None:
    """Sends a message: process 0 to all others, the others to process 0."""
    for number, line in self._lines.items():
      # The watch notices closed connections.
      with self._sending, contextlib.suppress(OSError):
        if number not in self._gone:
          line.send(message)

  # -- The watch, on its own thread ------------------------------------------------------

  def _watch(self) -> None:
    """Reads until all peers have closed their connections; after a failure, see `_fail`."""
    heard = dict.fromkeys(self._lines, time.monotonic())
    beat = now = 0.0
    with selectors.DefaultSelector() as selector:
      for number, line in self._lines.items():
        selector.register(line.socket, selectors.EVENT_READ, number)
      while len(self._gone) < len(self._lines) and now < self._end:
        left = max(0.0, self._end - time.monotonic())
        for key, _ in selector.select(min(self._heartbeat / 4, left)):
          number = key.data
          heard[number] = time.monotonic()
          if not self._listen(number):
            selector.unregister(key.fileobj)
            self._gone.add(number)
        now = time.monotonic()
        if self._failure is None and now - beat >= self._heartbeat / 4:
          beat = now
          self._tell({"beat": 1})
        for number in heard.keys() - self._gone:
          if self._failure is None and now - heard[number] > self._heartbeat:
            self._lost(number, f"silent for {self._heartbeat:.0f} s")
    if self._failure is not None:
      die(self._failure)

  def _listen(self, number: int) -> bool:
    """Reads once what a peer says; False when it has closed its connection."""
    try:
      messages = self._lines[number].receive()
    except (Garbage, OSError):
      messages = None
    if messages is None:
      if self._failure is None and not self._leaving and number not in self._done:
        self._lost(number, "its connection closed without a word")
      return False
    for message in messages:
      if self._failure is not None:
        break  # it is read so that the connection closes cleanly
      if "bye" in message:
        self._bye(number, message)
      with self._changed:
        self._take(number, message)
        self._changed.notify_all()
    return True

  def _take(self, number: int, message: dict[str, Any]) -> None:
    if "said" in message:
      self._said[message["said"][0]] = message["said"][1]
    elif "vote" in message:
      round_number, value = message["vote"]
      self._votes.setdefault(round_number, {})[number] = value
    elif "stop" in message:
      self._freeze(message["stop"])
    elif "freeze" in message:
      self._signal = message["freeze"]
      self._tell({"begun": self._begun})
    elif "last_step" in message:
      self._last_step = message["last_step"]
    elif "begun" in message:
      self._begun_by[number] = message["begun"]
    if len(self._begun_by) == self.num_processes and self._last_step is None:
      self._last_step = max(self._begun_by.values())
      self._tell({"last_step": self._last_step})

  def _bye(self, number: int, message: dict[str, Any]) -> None:
    """A peer is done, or has failed and says why."""
    code = message["bye"]
    if code == 0:
      self._done.add(number)
    if code == 0 or self._leaving:
      return
    card = self._cards[message["process"]]
    if code == HangError.exit_code:  # where this process hangs may explain it
      faulthandler.dump_traceback(all_threads=True)
    why = f"{card} ended with exit code {code}: {message['why']}"
    self._fail(PeerLostError(why, CURE), message)

  def _lost(self, number: int, why: str) -> None:
    card: Card = self._cards[number]
    error = PeerLostError(f"lost {card}: {why}", CURE)
    self._fail(error, {"bye": error.exit_code, "why": why, "process": number})


def die(error: FlaxLMError) -> NoReturn:
  """Ends the process at once, from any thread: the main one may hang in a collective."""
  print(f"flaxlm: {error}", file=sys.stderr, flush=True)
  with contextlib.suppress(OSError, ValueError):
    sys.stdout.flush()
  os._exit(error.exit_code)
