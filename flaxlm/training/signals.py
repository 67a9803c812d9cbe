# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and Ctrl-C: a run that is asked to stop saves its state first."""

import contextlib
import dataclasses
import signal
from collections.abc import Iterator
from typing import Any

from flaxlm.distributed.peers import Alone


@dataclasses.dataclass
class Stop:
  """The signal that asked this process to save and stop; 0 if there was none."""

  peers: Alone
  requested: int = 0

  def at(self, step: int) -> int:
    """The signal that makes all processes stop after this step, or 0."""
    return self.peers.stop_at(step, self.requested)


@contextlib.contextmanager
def stop_signals(peers: Alone) -> Iterator[Stop]:
  """The first SIGTERM or Ctrl-C requests a stop; the second one acts at once, as usual."""
  stop = Stop(peers)

  def request(number: int, _: Any) -> None:
    stop.requested = number
    signal.signal(number, previous[number])

  previous: dict[int, Any] = {}
  try:
    for wanted in (signal.SIGTERM, signal.SIGINT):
      previous[wanted] = signal.signal(wanted, request)
  except ValueError:  # not the main thread: our caller handles signals
    yield stop
    return
  try:
    yield stop
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
