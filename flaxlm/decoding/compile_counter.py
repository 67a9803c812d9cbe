# SPDX-License-Identifier: Apache-2.0
"""Counts the programs that XLA compiles while something runs, and how long that takes."""

import collections
import contextlib
from collections.abc import Iterator

import jax

EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
  """Compiled programs and seconds; a program loaded from the cache on disk counts too."""

  def __init__(self) -> None:
    self.programs, self.seconds = 0, 0.0
    self.names: collections.Counter[str] = collections.Counter()  # of compiled functions

  def add(self, event: str, duration_secs: float, **about: str | int) -> None:
    if event == EVENT:
      self.programs += 1
      self.seconds += duration_secs
      self.names[str(about.get("fun_name", "?"))] += 1

  def __str__(self) -> str:
    return f"{self.programs} programs compiled in {self.seconds:.1f} s"


@contextlib.contextmanager
def count_compilations() -> Iterator[CompileCounter]:
  counter = CompileCounter()
  jax.monitoring.register_event_duration_secs_listener(counter.add)
  try:
    yield counter
  finally:
    jax.monitoring.unregister_event_duration_listener(counter.add)
