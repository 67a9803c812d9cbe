# SPDX-License-Identifier: Apache-2.0
"""One table of what a GPU reaches, in under ten minutes.

    python -m benchmarks.gpu --output gpu.jsonl

Training steps of three models beside compiled PyTorch, decoding steps of two with narrow
weights, attention over packed documents by their offsets beside by a mask, and what stands
between a layer's products. Every side runs in a process of its own, one after the other,
and is checked before its speed counts. A part for which no time is left, or that lacks a
library or memory, is skipped with its reason; training is repeated while there is time,
with what was compiled before. The file is written anew after each part.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.gpu import decoding, documents, limits, neighbours, training
from benchmarks.gpu.cases import decode_models, train_cases
from benchmarks.writing import add_output, write
from flaxlm.benchmark.ceilings import ceilings_of, judge, this_device
from flaxlm.benchmark.compare import read_lines
from flaxlm.benchmark.report import Result
from flaxlm.errors import FlaxLMError
from flaxlm.platform import start_jax

MINUTES = 9.0
LEAST_SECONDS = 30.0  # less is not enough to start a process and to compile
MOST_SECONDS = 240.0  # of one process, so that none takes the time of all others
ALONE = {"neighbours": neighbours, "documents": documents}  # one process each
PARTS = ("train", "decode", *ALONE)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    "parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; none: all"
  )
  parser.add_argument("--minutes", type=float, default=MINUTES)
  parser.add_argument("--smoke", action="store_true", help="tiny shapes, as on a CPU")
  add_output(parser)
  args = parser.parse_args()
  if unknown := set(args.parts) - set(PARTS):
    parser.error(f"{', '.join(unknown)} is no part: {', '.join(PARTS)}")
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the parts need it all
  start_jax()
  log = lambda line: print(line, file=sys.stderr, flush=True)
  with tempfile.TemporaryDirectory() as folder:
    table = Table(Path(folder), args.minutes, args.smoke, log)
    for part in jobs(args.parts or PARTS, table):
      part()
      if args.output:
        write(table.results(), args)
  if not args.output:
    write(table.results(), args)


def jobs(parts: Sequence[str], table: "Table") -> list[Callable[[], None]]:
  """What is run in turn: what the table is about before what makes it surer."""
  trained: list[Callable[[], None]] = []
  decoded: list[Callable[[], None]] = []
  if "train" in parts:
    trained = [functools.partial(table.train, name) for name in table.cases]
  if "decode" in parts:
    decoded = [functools.partial(table.decode, name) for name in table.models]
  found = [table.measure_limits]
  for n in range(max(len(trained), len(decoded))):
    found += trained[n : n + 1] + decoded[n : n + 1]
  alone = [functools.partial(table.alone, name) for name in ALONE if name in parts]
  after_first = 1 + min(1, len(trained))  # model's speed
  found[after_first:after_first] = alone
  return found if table.smoke else found + trained


class Table:
  """The figures so far, and the time that is left."""

  def __init__(self, folder: Path, minutes: float, smoke: bool, log: Callable[[str], None]):
    self.folder, self.smoke, self.log = folder, smoke, log
    self.ends = time.monotonic() + 60 * minutes
    self.cases, self.models = train_cases(smoke), decode_models(smoke)
    self.rounds = dict.fromkeys(self.cases, 0)

  def results(self) -> list[Result]:
    """All figures, with their fractions of the peak and of the measured limit."""
    found = []
    for name, case in self.cases.items():
      runs = {side: self.lines(f"{name} {side}") for side in training.SIDES}
      try:
        found += training.summarise_case(name, case, runs)
      except FlaxLMError as e:  # the others have a speed
        self.log(f"no speed of {name}: {e}")
    for name in self.models:
      path = self.path(f"decode {name}")
      found += read_lines(path) if path.exists() else []
    for name in ALONE:
      path = self.path(name)
      found += read_lines(path) if path.exists() else []
    path = self.path("limits")
    measured = read_lines(path) if path.exists() else []
    judge(found, ceilings_of(measured), this_device())
    return measured + found

  @property
  def flag(self) -> str:
    """What tells a process whether its shapes are tiny."""
    return str(int(self.smoke))

  # -- Parts

  def measure_limits(self) -> None:
    self.run("limits", limits.__name__, str(self.path("limits")), self.flag)

  def train(self, name: str) -> None:
    """One round of both sides, in the other order the second time."""
    sides = training.SIDES[:: 1 if self.rounds[name] % 2 == 0 else -1]
    self.rounds[name] += 1
    for side in sides:
      if why := training.obstacle(self.cases[name], side):
        self.log(f"skipped {name} {side}: {why}")
        continue
      path = str(self.path(f"{name} {side}"))
      self.run(f"{name} {side}", training.__name__, side, name, path, self.flag)

  def decode(self, name: str) -> None:
    seconds = str(min(MOST_SECONDS, self.left) - LEAST_SECONDS)
    path = str(self.path(f"decode {name}"))
    module = decoding.__name__
    self.run(f"decode {name}", module, name, path, self.flag, seconds)

  def alone(self, name: str) -> None:
    self.run(name, ALONE[name].__name__, str(self.path(name)), self.flag)

  # -- Processes

  @property
  def left(self) -> float:
    return self.ends - time.monotonic()

  def path(self, what: str) -> Path:
    return self.folder / f"{what}.jsonl"

  def lines(self, what: str) -> list[dict]:
    path = self.path(what)
    text = path.read_text("utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]

  def run(self, what: str, module: str, *arguments: str) -> None:
    """Runs a module in a process, which is ended when its time is up, and says how it
    went; the lines that it had written by then are kept."""
    if self.left < LEAST_SECONDS:
      self.log(f"skipped {what}: {max(0.0, self.left):.0f} s are left")
      return
    self.log(f"{what} ...")
    started, allowed = time.monotonic(), min(self.left, MOST_SECONDS)
    command = [sys.executable, "-m", module, *arguments]
    with self.path("said").open("w+", encoding="utf-8") as said:
      env = training.environment(self.folder)
      child = subprocess.Popen(command, stdout=said, stderr=said, env=env)
      try:
        code = child.wait(allowed)
      except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        self.log(f"  ended after {allowed:.0f} s, which is all that it may take")
        return
      said.seek(0)
      last = said.read().strip().splitlines()[-1:] or ["no message"]
    seconds = time.monotonic() - started
    self.log(f"  failed: {last[0][:300]}" if code else f"  {seconds:.0f} s")


if __name__ == "__main__":
  main()
