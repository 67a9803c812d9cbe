# SPDX-License-Identifier: Apache-2.0
"""How many programs XLA compiled while something ran, and for how long."""

import contextlib
from collections.abc import Iterator

import jax

EVENT = "/jax/core/compile/backend_compile_duration"


class Compiled:
  """Programs and seconds, counted as they are compiled; from the cache on disk too."""

  def __init__(self) -> None:
    self.programs, self.seconds = 0, 0.0

  def add(self, event: str, duration_secs: float, **_: str | int) -> None:
    if event == EVENT:
      self.programs += 1
      self.seconds += duration_secs

  def __str__(self) -> str:
    return f"{self.programs} programs compiled in {self.seconds:.1f} s"


@contextlib.contextmanager
def count_compiled() -> Iterator[Compiled]:
  compiled = Compiled()
  jax.monitoring.register_event_duration_secs_listener(compiled.add)
  try:
    yield compiled
  finally:
    jax.monitoring.unregister_event_duration_listener(compiled.add)
