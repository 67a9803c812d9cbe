# SPDX-License-Identifier: Apache-2.0
"""A benchmark's results: what was measured, its range, on which machine, against whom."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple, TextIO

from flaxlm.benchmark.provenance import origin_of_run
from flaxlm.errors import FlaxLMError
from flaxlm.strict_json import to_json


class Unit(NamedTuple):
  """Whether more (1) or less (-1) of a unit is better, or neither (0), and its scale."""

  better: int
  scale: float = 1.0  # how many of the unit are one second, or one per second


UNITS = {
  "GFLOP/s": Unit(1, 1e-9),
  "GB/s": Unit(1, 1e-9),
  "MB/s": Unit(1, 1e-6),
  "MB": Unit(-1),
  "tokens/s": Unit(1),
  "batches/s": Unit(1),
  "s": Unit(-1),
  "ms": Unit(-1, 1e3),
  "ms per token": Unit(-1, 1e3),
  "us per operation": Unit(-1, 1e6),
  "nats per token": Unit(-1),
  "perplexity": Unit(-1),
  "parameters": Unit(0),
  "tokens": Unit(0),
  "predicted / measured": Unit(0),
  "of the time": Unit(0),  # a share
}


@dataclasses.dataclass(frozen=True)
class Demand:
  """The least that one call has to do, by formula: FLOPs, and bytes read and written.

  `footprint` is the number of distinct bytes, which decides which memory serves them.
  """

  flops: float
  bytes: float
  dtype: str = "float32"
  footprint: float | None = None


@dataclasses.dataclass
class Result:
  """One figure of one case; fractions and ratios are None where they are not known."""

  suite: str
  case: str
  median: float
  low: float
  high: float
  unit: str
  peak_fraction: float | None = None
  measured_limit_fraction: float | None = None
  peer: str | None = None
  ratio: float | None = None  # our speed / the peer's, the median over paired rounds
  ratio_low: float | None = None
  ratio_high: float | None = None
  correct: str | None = None  # what the correctness check found
  rounds: int = 1
  first_seconds: float | None = None  # of the first call, mostly compiling
  seconds: float | None = None  # of one later call, the median
  flops: float | None = None
  bytes: float | None = None
  footprint: float | None = None
  dtype: str | None = None
  versions: dict[str, str] = dataclasses.field(default_factory=dict)
  flags: dict[str, str] = dataclasses.field(default_factory=dict)
  device: str = ""
  commit: str | None = None
  processes: int = 1  # fresh ones that measured it, one after the other
  drift: float | None = None  # 0.1: the largest of their medians is 1.1 times the smallest

  @property
  def demand(self) -> Demand | None:
    if self.flops is None or self.bytes is None:
      return None
    return Demand(self.flops, self.bytes, self.dtype or "float32", self.footprint)


def summarise(
  suite: str,
  case: str,
  rounds: Sequence[float],
  unit: str,
  gate: str | None = None,
  demand: Demand | None = None,
) -> Result:
  """Median and range over rounds, and where they were measured.

  Raises `FlaxLMError` if a round has no finite figure.
  """
  assert unit in UNITS, unit
  if not all(map(math.isfinite, rounds)):
    raise FlaxLMError(f"{suite} {case}: a round has no figure: {rounds}")
  return Result(
    suite,
    case,
    statistics.median(rounds),
    min(rounds),
    max(rounds),
    unit,
    correct=gate,
    rounds=len(rounds),
    **(dataclasses.asdict(demand) if demand else {}),
    **origin_of_run(),
  )


def with_ratio(
  result: Result, peer: str, ours: Sequence[float], theirs: Sequence[float], gate: str
) -> Result:
  """A copy with our speed / the peer's, from the seconds of both sides, round by round
  because machines drift."""
  ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
  return dataclasses.replace(
    result,
    peer=peer,
    ratio=statistics.median(ratios),
    ratio_low=min(ratios),
    ratio_high=max(ratios),
    correct=gate,
  )


def figures(seconds: Sequence[float], unit: str, amount: float = 1.0) -> list[float]:
  """Seconds per call in a unit of rate (`amount` per second) or of time (per `amount`)."""
  better, scale = UNITS[unit]
  if better > 0:
    return [scale * amount / one for one in seconds]
  return [scale * one / amount for one in seconds]


def as_json(result: Result) -> str:
  return to_json(dataclasses.asdict(result))


def print_json(results: Sequence[Result], out: TextIO) -> None:
  for result in results:
    print(as_json(result), file=out)


# -- For people ----------------------------------------------------------------------------

# Each column and its alignment.
COLUMNS = {
  "suite": "<",
  "case": "<",
  "median": ">",
  "range": ">",
  "unit": "<",
  "of peak": ">",
  "of limit": ">",
  "ratio": "<",
}


def print_results(results: Sequence[Result], out: TextIO) -> None:
  """A table; below it what was checked, and on which machine."""
  if not results:
    return
  rows = [tuple(COLUMNS), *map(table_row, results)]
  widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
  layout = "  ".join(
    f"{{:{align}{width}}}" for align, width in zip(COLUMNS.values(), widths, strict=True)
  )
  for row in rows:
    print(layout.format(*row).rstrip(), file=out)
  print(file=out)
  for line in gates(results):
    print(line, file=out)
  print(origin(results[0]), file=out)


def table_row(result: Result) -> tuple[str, ...]:
  percent = lambda fraction: "" if fraction is None else f"{fraction:.0%}"
  spread = f"{number(result.low)}-{number(result.high)}" if result.rounds > 1 else ""
  ratio = "" if result.ratio is None else f"{result.ratio:.2f}x {result.peer}"
  if result.ratio_low is not None and result.rounds > 1:
    ratio += f" ({result.ratio_low:.2f}-{result.ratio_high:.2f})"
  return (
    result.suite,
    result.case,
    number(result.median),
    spread,
    result.unit,
    percent(result.peak_fraction),
    percent(result.measured_limit_fraction),
    ratio,
  )


def gates(results: Sequence[Result]) -> list[str]:
  """What was checked: a line for every ratio, and one for the rest of each suite."""
  lines, others = [], dict[str, list[Result]]()
  for result in results:
    if result.correct and result.peer:
      name = f"{result.suite} {result.case} vs {result.peer}"
      lines.append(f"checked: {name}: {result.correct}")
    elif result.correct:
      others.setdefault(result.suite, []).append(result)
  for suite, group in others.items():
    count = f", {len(group)} cases, the first" if len(group) > 1 else ""
    lines.append(f"checked: {suite}{count}: {group[0].correct}")
  return lines


def origin(result: Result) -> str:
  """One line: the device, the versions, the flags, the commit."""
  packages = ", ".join(f"{name} {version}" for name, version in result.versions.items())
  flags_text = " ".join(f"{name}={value}" for name, value in result.flags.items())
  parts = [result.device, packages, flags_text, f"commit {result.commit or 'unknown'}"]
  return "; ".join(part for part in parts if part)


def number(value: float) -> str:
  """Three or more significant digits, without exponents."""
  if value == 0:
    return "0"
  decimals = max(0, 2 - math.floor(math.log10(abs(value))))
  return f"{value:,.{min(decimals, 6)}f}"
