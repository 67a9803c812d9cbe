# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and Ctrl-C: a run that is asked to stop saves its state first."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

from flaxlm.distributed.peers import Alone

# The signal for which all processes stop after this step, or 0.
StopAt = Callable[[int], int]


@contextlib.contextmanager
def stop_signals(peers: Alone) -> Iterator[StopAt]:
  """The first SIGTERM or Ctrl-C requests a stop; the second one acts at once, as usual."""
  requested = 0
  previous: dict[int, Any] = {}

  def request(number: int, _: Any) -> None:
    nonlocal requested
    requested = number
    signal.signal(number, previous[number])

  # Outside the main thread our caller handles signals.
  with contextlib.suppress(ValueError):
    for wanted in (signal.SIGTERM, signal.SIGINT):
      previous[wanted] = signal.signal(wanted, request)
  try:
    yield lambda step: peers.stop_at(step, requested)
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
