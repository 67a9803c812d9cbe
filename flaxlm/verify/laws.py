# SPDX-License-Identifier: Apache-2.0
"""All laws, one after the other, on one config; and how the results are shown."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from flaxlm.config import ResolvedConfig
from flaxlm.errors import ConfigError, first_line
from flaxlm.planning.tables import print_table, wide_console
from flaxlm.sharding import describe_mesh
from flaxlm.verify import (
  attention_laws,
  data_laws,
  decoding_laws,
  execution_laws,
  layer_laws,
  model_laws,
  run_laws,
  training_laws,
)
from flaxlm.verify.case import Case, Finding, Law
from flaxlm.verify.shrink import RULE, describe

LAWS: tuple[Law, ...] = (
  *(*model_laws.LAWS, *attention_laws.LAWS, *layer_laws.LAWS),
  *(*decoding_laws.LAWS, *training_laws.LAWS, *execution_laws.LAWS),
  *(*data_laws.LAWS, *run_laws.LAWS),
)

HOLDS, FAILS, DOES_NOT_APPLY = "holds", "fails", "does not apply"


@dataclasses.dataclass(frozen=True)
class Result:
  """One law on one config. The fields are the schema that scripts rely on
  (docs/design.md, section 2)."""

  law: str
  says: str
  result: str  # holds, fails, or does not apply
  largest_error: float | None  # None where it does not apply, or nothing was measured
  tolerance: float
  tolerance_reason: str
  seconds: float
  reason: str  # why it fails or does not apply


def choose_laws(names: Sequence[str]) -> tuple[Law, ...]:
  """The laws of these names; all if there is none. Raises `ConfigError` for others."""
  known = [law.name for law in LAWS]
  for name in names:
    if name not in known:
      raise ConfigError(f"there is no law {name!r}", f"laws are {', '.join(known)}")
  return tuple(law for law in LAWS if law.name in names or not names)


def check_laws(
  cfg: ResolvedConfig, log: Callable[[str], None], laws: Sequence[Law]
) -> list[Result]:
  """Checks every law on a config, which is shrunk; `log` is told how, and of each law."""
  case = Case.of(cfg)
  log(f"shrunk: {RULE}")
  log(f"so here: {describe(cfg, case.model_cfg) or 'nothing changes'}")
  log(f"mesh of simulated devices: {describe_mesh(case.sizes)}")
  results = []
  for law in laws:
    result = check(law, case)
    log(f"{result.law}: {result.result}, {result.seconds:.1f} s")
    results.append(result)
  return results


def check(law: Law, case: Case) -> Result:
  """What a law's check finds. An error that it raises is a failure of the law."""
  start = time.perf_counter()
  try:
    found = law.check(case)
    result, reason = judge(law, found), found.reason or "; ".join(found.details)
  except Exception as error:
    found, result = Finding(None), FAILS
    reason = f"{type(error).__name__}: {first_line(error)}"
  seconds = time.perf_counter() - start
  return Result(
    law.name, law.says, result, found.error, law.tolerance, law.why, seconds, reason
  )


def judge(law: Law, found: Finding) -> str:
  if found.error is None:
    return DOES_NOT_APPLY
  return FAILS if found.details or not found.error <= law.tolerance else HOLDS


def print_results(results: Sequence[Result], out: TextIO) -> None:
  """One line for each law, and the sum of them."""
  columns = ("law", "says", "largest error", "tolerance", "time", "result")
  rows = [
    (
      *(result.law, result.says),
      *(number(result.largest_error), number(result.tolerance)),
      f"{result.seconds:.1f} s",
      f"{result.result}: {result.reason}" if result.reason else result.result,
    )
    for result in results
  ]
  console = wide_console(out)
  print_table(console, "laws", columns, rows, left=len(columns))
  counts = {kind: sum(r.result == kind for r in results) for kind in (HOLDS, FAILS)}
  seconds = sum(result.seconds for result in results)
  others = len(results) - sum(counts.values())
  console.print(
    f"{counts[HOLDS]} hold, {counts[FAILS]} fail, {others} do not apply; {seconds:.0f} s"
  )


def number(value: float | None) -> str:
  return "" if value is None else f"{value:.1e}" if value else "0"
