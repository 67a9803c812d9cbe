# SPDX-License-Identifier: Apache-2.0
"""Compares two files of results: which cases became faster or slower beyond the noise.

Two figures differ only if their ranges over rounds do not overlap and their medians differ
by more than a threshold (default 5 %) and by more than the processes of either file differ
(`drifts`): the rounds of one process do not show what varies between processes. A figure of
a single round has no range, and one of a single process no drift; then the threshold alone
decides.
"""

import dataclasses
import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from flaxlm.benchmark.report import UNITS, Result, number
from flaxlm.errors import ConfigError, DataError

THRESHOLD = 0.05
SLOWER = 1  # the exit status


@dataclasses.dataclass(frozen=True)
class Verdict:
  """The comparison of one case; `change` is the new speed / the old one."""

  suite: str
  case: str
  word: str  # faster, slower, same, noise, changed, missing, new
  before: Result | None = None
  after: Result | None = None
  change: float | None = None
  drift: float | None = None  # what processes of the same program differ by


def compare_files(
  before: Path, after: Path, threshold: float = THRESHOLD, any_device: bool = False
) -> list[Verdict]:
  """A verdict for every case of either file.

  Raises `DataError` for a file that does not hold results, `ConfigError` if the files come
  from different devices or have no case in common.
  """
  old, new = merged(read_lines(before)), merged(read_lines(after))
  drift_of = drifts((old, new))
  common = old.keys() & new.keys()
  if not common:
    raise ConfigError(
      f"{before} and {after} have no case in common", "run the same suites for both"
    )
  for key in common:
    if old[key].device != new[key].device and not any_device:
      raise ConfigError(
        f"{before} is of {old[key].device}, {after} of {new[key].device}",
        "--any-device compares them all the same",
      )
  return [
    judge(*key, old.get(key), new.get(key), threshold, drift_of.get(key))
    for key in {**old, **new}
  ]


def judge(
  suite: str,
  case: str,
  a: Result | None,
  b: Result | None,
  threshold: float,
  drift: float | None = None,
) -> Verdict:
  if a is None or b is None:
    return Verdict(suite, case, "new" if a is None else "missing", a, b)
  if a.unit != b.unit:
    raise DataError(
      f"{suite} {case} is in {a.unit} in one file and in {b.unit} in the other",
      "measure both with the same version of flaxlm",
    )
  better = UNITS[a.unit].better
  if not better:
    return Verdict(suite, case, "same" if a.median == b.median else "changed", a, b)
  change = b.median / a.median if better > 0 else a.median / b.median
  overlap = b.low <= a.high and a.low <= b.high
  if 1 - threshold <= change <= 1 + threshold:
    word = "same"
  elif overlap or max(change, 1 / change) <= 1 + (drift or 0.0):
    word = "noise"
  else:
    word = "faster" if change > 1 else "slower"
  return Verdict(suite, case, word, a, b, change, drift)


def drifts(files: Sequence[Mapping[tuple[str, str], Result]]) -> dict[Any, float]:
  """How much the processes of one file differ, by suite and case.

  It is that of the file in which they differ more, or that which is usual in the suite: a
  few processes may agree by chance.
  """
  own: dict[tuple[str, str], float] = {}
  for key, result in (item for results in files for item in results.items()):
    if result.drift is not None:
      own[key] = max(result.drift, own.get(key, 0.0))
  usual = {
    suite: statistics.median(drift for (other, _), drift in own.items() if other == suite)
    for suite, _ in own
  }
  return {key: max(drift, usual[key[0]]) for key, drift in own.items()}


def unrepeated(*paths: Path) -> list[Path]:
  """The files that were measured by one process."""
  return [path for path in paths if all(r.processes == 1 for r in read_lines(path))]


# -- Files ---------------------------------------------------------------------------------


def read_lines(path: Path) -> list[Result]:
  """The results in a file of JSON lines. Raises `DataError`, which names the line."""
  try:
    text = path.read_text("utf-8")
  except (OSError, UnicodeDecodeError) as e:
    raise DataError(f"{path} cannot be read: {e}") from e
  results = []
  for place, line in enumerate(text.splitlines(), 1):
    if line.strip():
      results.append(parse_line(line, f"{path}:{place}"))
  if not results:
    raise DataError(
      f"{path} has no results", "flaxlm bench --json --output FILE writes them"
    )
  return results


def parse_line(line: str, where: str) -> Result:
  try:
    values: Any = json.loads(line)
  except (json.JSONDecodeError, RecursionError) as e:
    raise DataError(
      f"{where} is not JSON: {e}", "flaxlm bench --json writes JSON lines"
    ) from e
  if not isinstance(values, dict):
    raise DataError(f"{where} is not a JSON object")
  for name in ("suite", "case", "unit", "device"):
    if not isinstance(values.get(name), str):
      raise DataError(f"{where} has no {name}", "every line of flaxlm bench --json has one")
  if (unit := values["unit"]) not in UNITS:
    raise DataError(f"{where}: unit {unit!r} is not known", f"known: {', '.join(UNITS)}")
  for name in ("low", "median", "high"):
    value: Any = values.get(name)
    if type(value) not in (int, float) or not 0 <= value < float("inf"):
      raise DataError(f"{where}: {name} is {value!r}", "it must be a number, 0 or more")
    if UNITS[unit].better and value == 0:
      raise DataError(f"{where}: {name} is 0", "speeds and times must be above 0")
  if not values["low"] <= values["median"] <= values["high"]:
    raise DataError(f"{where}: low <= median <= high does not hold")
  known = {field.name for field in dataclasses.fields(Result)}
  return Result(**{key: value for key, value in values.items() if key in known})


def merged(results: Sequence[Result]) -> dict[tuple[str, str], Result]:
  """By suite and case. Repeated lines (other peers, other runs) become one wider range."""
  groups: dict[tuple[str, str], list[Result]] = {}
  for result in results:
    groups.setdefault((result.suite, result.case), []).append(result)
  return {
    key: dataclasses.replace(
      group[0],
      median=statistics.median(result.median for result in group),
      low=min(result.low for result in group),
      high=max(result.high for result in group),
      drift=max((r.drift for r in group if r.drift is not None), default=None),
    )
    for key, group in groups.items()
  }


# -- For people ----------------------------------------------------------------------------

# The words in the order in which they are printed, each with its explanation.
NOTES = {
  "slower": "",
  "faster": "",
  "noise": "  (the medians differ, but so do rounds or processes)",
  "changed": "",
  "missing": "  (only in the first file)",
  "new": "  (only in the second file)",
  "same": "",
}


def print_verdicts(verdicts: Sequence[Verdict], out: TextIO) -> None:
  """The slower cases first, the worst of them on top; then how many there are of each."""
  order = list(NOTES)
  ranked = sorted(verdicts, key=lambda v: (order.index(v.word), v.change or 1.0))
  width = max(len(f"{v.suite} {v.case}") for v in verdicts)
  for v in ranked:
    figures = " -> ".join(figure(result) for result in (v.before, v.after) if result)
    unit = " or ".join({result.unit for result in (v.before, v.after) if result})
    change = "" if v.change is None else f"{v.change:.2f}x"
    name = f"{v.suite} {v.case}".ljust(width)
    print(f"{v.word:8}{change:>6}  {name}  {figures} {unit}{NOTES[v.word]}", file=out)
  counts = Counter(v.word for v in ranked)
  print("; ".join(f"{count} {word}" for word, count in counts.items()), file=out)


def figure(result: Result) -> str:
  if result.low == result.high:
    return number(result.median)
  return f"{number(result.median)} ({number(result.low)}-{number(result.high)})"


def as_values(verdict: Verdict) -> dict[str, Any]:
  """For `--json`; `before` and `after` are medians."""
  return {
    "suite": verdict.suite,
    "case": verdict.case,
    "verdict": verdict.word,
    "change": verdict.change,
    "drift": verdict.drift,
    "before": verdict.before and verdict.before.median,
    "after": verdict.after and verdict.after.median,
  }
