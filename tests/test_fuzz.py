# SPDX-License-Identifier: Apache-2.0
"""Random command lines and rows of jobs: whatever comes in, a plain answer comes out.

An exit code of the contract, at most two lines about a mistake, no traceback; little
processor time and memory. Nothing here trains: no corpus and no whole run is there.
"""

import argparse
import json
import resource
import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from conftest import commands_in_process

from flaxlm.cli import build_parser
from flaxlm.config import Config, flag, knobs
from flaxlm.decoding.completions import Stopping
from flaxlm.decoding.jobs import JOB_KEYS, PromptJob, read_jobs
from flaxlm.decoding.sampling import SamplingSettings
from flaxlm.errors import ConfigError

MOST_SECONDS = 10  # of processor time, for one command line or row
MOST_BYTES = 2**30
CONTRACT = {0, 1, 2, 3, 4, 5, 6, 7, 8, 75, 130}
SLOW = pytest.mark.slow
MANY = (SLOW, pytest.mark.fuzz, pytest.mark.timeout(3600))
# What has been typed, pasted or computed wrongly.
VALUES = (
  *("", " ", "a", "-1", "0", "1", "2", "1.5", "1e4", "1e999", "nan", "inf", "9" * 20),
  *(
    "9" * 5000,
    "none",
    "true",
    "1,2",
    "a\nb",
    "a\tb",
    "é漢",
    "\udcff",
    "\u2028",
    "x" * 300,
  ),
  *(
    "..",
    "/",
    ".",
    "/dev/null",
    "~",
    "*",
    "a/b",
    "{",
    "[]",
    "{}",
    "null",
    "(",
    "a{9999999}",
  ),
  *("=", "==", "data=0", "data=-1", "data=9999999999", "data=2@dcn", "5=1", "5=nan"),
  *("files:", "files:none/*", "tfds:", "gettext:", "byte", "bpe", "bpe:300", "bpe:x"),
  *(
    "absent",
    "stdlib_tiny",
    "a.jsonl",
    "text.txt",
    "damaged",
    "-",
    "float32",
    "cpu",
    "h100",
  ),
)
# Whatever would train, measure or start processes, if it were not for these.
FIXED = {
  "train": ["--data.corpus=files:absent"],
  "launch": ["--", "eval"],
  "bench": ["compare"],
}
# Other than a moment: compilers, searches over thousands of meshes, and the network.
HEAVY = {"--compile", "--search", "--interactive", "--download"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
  folder = tmp_path_factory.mktemp("fuzz")
  (folder / "text.txt").write_text("some text\n" * 50)
  (folder / "a.jsonl").write_text('{"prompt": "a"}\n')
  damaged = folder / "damaged"
  damaged.mkdir()
  (damaged / "config.json").write_text('{"model": 3}')
  (damaged / "tokenizer.json").write_text("{")
  with pytest.MonkeyPatch.context() as patch, commands_in_process(folder / "data") as run:
    patch.chdir(folder)
    yield run


class Limit:
  """Within it, a test fails that takes more processor time or memory."""

  def __enter__(self) -> None:
    signal.signal(signal.SIGPROF, self.stop)
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
    self.before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

  def __exit__(self, *_: object) -> None:
    signal.setitimer(signal.ITIMER_PROF, 0)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (after - self.before) * 1024 < MOST_BYTES

  @staticmethod
  def stop(*_: object) -> None:
    raise AssertionError(f"more than {MOST_SECONDS} s")


def commands() -> dict[tuple[str, ...], list[argparse.Action]]:
  """The arguments of each command, by its words."""
  found: dict[tuple[str, ...], list[argparse.Action]] = {}

  def walk(parser: argparse.ArgumentParser, words: tuple[str, ...]) -> None:
    inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for action in inner:
      for name, child in action.choices.items():
        walk(child, (*words, name))
    if not inner:
      found[words] = [action for action in parser._actions if action.dest != "help"]

  walk(build_parser(), ())
  return found


def random_line(rng: np.random.Generator) -> list[str]:
  """A command with some of its flags, or nearly, and with any values."""
  every = commands()
  words = [*every][rng.integers(len(every))]
  pick = lambda choices: str(choices[rng.integers(len(choices))])
  line = []
  for action in every[words]:
    if set(action.option_strings) & HEAVY or (rng.random() < 0.7 and not action.required):
      continue
    values = [*action.choices] if action.choices and rng.random() < 0.8 else VALUES
    if not action.option_strings:
      line.append(pick(values))
    elif action.nargs == 0:
      line.append(action.option_strings[0])
    else:
      line.append(f"{spoiled(action.option_strings[0], rng)}={pick(values)}")
  if words[0] in ("train", "plan", "shard"):
    fields = [name for name, _, _ in knobs(Config) if name != "data.corpus"]
    for _ in range(rng.integers(1, 4)):
      line.append(f"{spoiled(flag(pick(fields)), rng)}={pick(VALUES)}")
  fixed = FIXED.get(words[0], [])
  return [*words, *line, *fixed] if fixed[:1] != ["compare"] else [*words, *fixed, *line]


def spoiled(name: str, rng: np.random.Generator) -> str:
  """The name of a flag, sometimes with underscores, sometimes mistyped."""
  chance = rng.random()
  if chance < 0.1:
    place = int(rng.integers(2, len(name)))
    return name[:place] + name[place + 1 :]
  return "--" + name[2:].replace("-", "_") if chance < 0.3 else name


@pytest.mark.parametrize(
  ("first", "count"), [(0, 40), pytest.param(1000, 2000, marks=MANY)]
)
def test_command_lines(run: Callable[..., Any], first: int, count: int):
  for seed in range(first, first + count):
    line = random_line(np.random.default_rng(seed))
    with Limit():
      result = run(*line)
    assert result.returncode in CONTRACT, (seed, line)
    assert "Traceback" not in result.stderr, (seed, line)
    assert "[Errno" not in result.stderr, (seed, line, result.stderr)
    if result.returncode in (2, 3, 4):
      told = result.stderr.partition("flaxlm: ")[2]
      assert 1 <= len(told.splitlines()) <= 2, (seed, line, result.stderr)
      assert len(told) < 3000, (seed, line, told)


def random_value(rng: np.random.Generator, depth: int = 0) -> Any:
  kinds: list[Callable[[], Any]] = [
    lambda: VALUES[rng.integers(len(VALUES))],
    lambda: float(rng.choice([0, 1, -1, 0.5, 1e30, 1e300])),
    lambda: int(rng.choice([0, 1, 2, 3, -1, 97, 256, 257, 10**9, 2**31, 2**62])),
    lambda: [None, True, False][rng.integers(3)],
    lambda: [random_value(rng, depth + 1) for _ in range(rng.integers(3))],
    lambda: {str(random_value(rng, 9)): random_value(rng, depth + 1) for _ in range(2)},
    lambda: random_schema(rng, depth + 1),
  ]
  return kinds[rng.integers(4 if depth > 3 else len(kinds))]()


def random_schema(rng: np.random.Generator, depth: int = 0) -> dict[str, Any]:
  words = (
    "type",
    "enum",
    "const",
    "minLength",
    "maxLength",
    "pattern",
    "minimum",
    "format",
  )
  words += ("items", "minItems", "properties", "required", "anyOf", "oneOf", "$ref", "not")
  kinds = ("string", "integer", "number", "array", "object", "null", "boolean")
  schema: dict[str, Any] = {"type": str(rng.choice(kinds))}
  for _ in range(rng.integers(3)):
    word = str(rng.choice(words))
    likely: dict[str, Any] = {"type": str(rng.choice(kinds)), "pattern": "^[a-z]+$"}
    likely |= {"minLength": 2, "maxLength": 3, "minimum": 4, "minItems": 2, "$ref": "#"}
    if depth < 3:
      likely["items"] = random_schema(rng, depth + 1)
      likely["properties"] = {"a": random_schema(rng, depth + 1)}
      likely["anyOf"] = likely["oneOf"] = [random_schema(rng, depth + 1)] * 2
    is_likely = word in likely and rng.random() < 0.7
    schema[word] = likely[word] if is_likely else random_value(rng, depth + 1)
  return schema


def random_row(rng: np.random.Generator) -> str:
  """A line of a jobs file: a job with a few fields of any value, sometimes damaged."""
  row: dict[str, Any] = {"prompt": "a"} if rng.random() < 0.9 else {}
  for name in rng.choice(sorted(JOB_KEYS), rng.integers(4), replace=False):
    row[str(name)] = random_value(rng)
  if rng.random() < 0.3:
    row["json_schema"] = random_schema(rng)
  text = json.dumps(row, ensure_ascii=bool(rng.random() < 0.5))
  if rng.random() < 0.1:
    place = int(rng.integers(len(text)))
    text = (
      text[:place] + str(rng.choice(["", "\0", "[" * 9999, '"', "NaN"])) + text[place + 1 :]
    )
  return text


@pytest.mark.parametrize(
  ("first", "count"), [(0, 60), pytest.param(1000, 2000, marks=SLOW)]
)
def test_rows_of_jobs(first: int, count: int):
  """What is accepted is a job whose fields are in range; all else is refused by line."""
  defaults = PromptJob("", SamplingSettings(), Stopping(), 4)
  accepted = 0
  for seed in range(first, first + count):
    text = random_row(np.random.default_rng(seed))
    with Limit():
      try:
        jobs = read_jobs(text, defaults)
      except ConfigError as e:
        told = str(e)
        assert len(told.splitlines()) <= 2, (seed, text, told)
        assert len(told) < 1500, (seed, text, told)
        continue
    for job in jobs:
      job.settings.check()
      job.stop.check()
    accepted += 1
  assert count / 20 < accepted < count, "both happen, or this says nothing"
