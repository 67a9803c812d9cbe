# SPDX-License-Identifier: Apache-2.0
"""A benchmark's results: what was measured, with its spread, where, and against whom."""

import dataclasses
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TextIO


@dataclasses.dataclass
class Result:
  """One figure of one case; fractions and ratios are None where nothing is to divide."""

  suite: str
  case: str
  median: float
  low: float
  high: float
  unit: str
  peak_fraction: float | None = None
  measured_limit_fraction: float | None = None
  peer: str | None = None
  ratio: float | None = None  # ours / peer's, the median of paired rounds
  ratio_low: float | None = None
  ratio_high: float | None = None
  correct: str | None = None  # what the correctness gate saw
  versions: dict[str, str] = dataclasses.field(default_factory=dict)
  device: str = ""
  commit: str | None = None


def summarise(
  suite: str,
  case: str,
  rounds: Sequence[float],
  unit: str,
  peer_rounds: Sequence[float] = (),
) -> Result:
  """Median and range over rounds; ratios are taken round by round, since machines drift."""
  result = Result(suite, case, statistics.median(rounds), min(rounds), max(rounds), unit)
  result.versions, result.device, result.commit = versions(), device(), commit()
  if peer_rounds:
    ratios = [ours / theirs for ours, theirs in zip(rounds, peer_rounds, strict=True)]
    result.ratio = statistics.median(ratios)
    result.ratio_low, result.ratio_high = min(ratios), max(ratios)
  return result


def versions() -> dict[str, str]:
  found = {"python": platform.python_version()}
  for package in ("flaxlm", "jax", "jaxlib", "flax", "optax", "torch"):
    try:
      found[package] = metadata.version(package)
    except metadata.PackageNotFoundError:
      continue
  return found


def device() -> str:
  """The processor's own name and the number of cores that this process may use."""
  name = platform.processor() or platform.machine()
  try:
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    name = next(
      line.split(":")[1].strip() for line in lines if line.startswith("model name")
    )
  except (OSError, StopIteration):
    pass
  return f"{name}, {len(os.sched_getaffinity(0))} cores"


def commit() -> str | None:
  """The commit of the checkout that runs, if it is one."""
  command = ["git", "rev-parse", "--short", "HEAD"]
  try:
    result = subprocess.run(
      command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
  except (OSError, subprocess.CalledProcessError):
    return None
  return result.stdout.strip()


def print_results(results: Sequence[Result], as_json: bool, out: TextIO) -> None:
  for result in results:
    if as_json:
      print(json.dumps(dataclasses.asdict(result)), file=out)
      continue
    print(
      f"{result.suite} {result.case}: {result.median:,.0f} {result.unit} "
      f"({result.low:,.0f}-{result.high:,.0f})",
      file=out,
    )
    if result.ratio is not None:
      print(
        f"  {result.ratio:.2f}x {result.peer} "
        f"({result.ratio_low:.2f}-{result.ratio_high:.2f}); {result.correct}",
        file=out,
      )
