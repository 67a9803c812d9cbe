# SPDX-License-Identifier: Apache-2.0
"""Measures the same in several fresh processes, one after the other.

What varies between processes (where memory lies, which cores, what else runs) does not show
in the rounds of one, and is often more than what they show.
"""

import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flaxlm.benchmark.compare import read_lines
from flaxlm.benchmark.measure import run_python
from flaxlm.benchmark.report import Result

# How figures that may be missing are merged.
MERGED: dict[str, Callable[[list[float]], float]] = {
  **dict.fromkeys(("peak_fraction", "measured_limit_fraction"), statistics.median),
  **dict.fromkeys(("ratio", "seconds", "first_seconds"), statistics.median),
  "ratio_low": min,
  "ratio_high": max,
}


def measure_in_processes(
  count: int, arguments: Sequence[str], log: Callable[[str], None]
) -> list[Result]:
  """The results of `flaxlm bench ARGUMENTS` in so many processes: a line of each case."""
  groups: dict[tuple[str, str, str | None], list[Result]] = {}
  with tempfile.TemporaryDirectory() as folder:
    output = Path(folder) / "results.jsonl"
    for number in range(count):
      log(f"process {number + 1} of {count} ...")
      command = ("-m", "flaxlm.cli", "bench", *arguments, "--processes=1")
      run_python(*command, f"--output={output}")
      for result in read_lines(output):
        key = (result.suite, result.case, result.peer)
        groups.setdefault(key, []).append(result)
  return list(map(of_processes, groups.values()))


def of_processes(results: Sequence[Result]) -> Result:
  """One result of several: medians of them, the range of all rounds, and their drift."""
  medians = [result.median for result in results]
  known = {
    name: [value for result in results if (value := getattr(result, name)) is not None]
    for name in MERGED
  }
  merged: dict[str, Any] = {n: MERGED[n](values) for n, values in known.items() if values}
  drift = max(medians) / min(medians) - 1 if min(medians) > 0 else None
  return dataclasses.replace(
    results[0],
    median=statistics.median(medians),
    low=min(result.low for result in results),
    high=max(result.high for result in results),
    processes=len(results),
    drift=drift if len(results) > 1 else None,
    **merged,
  )
