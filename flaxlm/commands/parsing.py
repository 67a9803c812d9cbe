# SPDX-License-Identifier: Apache-2.0
"""Shared by the commands: the parser, the config, the run, files to read and write."""

import argparse
import contextlib
import dataclasses
import difflib
import math
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from flaxlm.config import Config, check_config, fields_in, knobs, load_config, override
from flaxlm.config import flag as flag_of
from flaxlm.errors import ConfigError, first_line, writing
from flaxlm.strict_json import to_json

MOST_SHOWN = 200  # characters
DEFAULT_CONFIG = "stdlib_tiny"
FIELDS = {name for name, _, _ in knobs(Config)}
# For the help of every command that takes a CONFIG.
EXECUTED = (
  "A config file is a Python program, and flaxlm executes it: name none that you would not "
  "run."
)


class Parser(argparse.ArgumentParser):
  """An argument parser with our errors: a line of cause, a line of cure, exit code 2."""

  def __init__(self, *args: Any, **kwargs: Any):
    super().__init__(*args, **{"allow_abbrev": False, **kwargs})
    self.set_defaults(takes_overrides=False, parser=self)
    self.flags: list[str] = []

  def error(self, message: str) -> typing.NoReturn:
    raise ConfigError(message, f"{self.prog} --help")

  def add_flag(
    self, name: str, kind: Any = str, text: str | None = None, **options: Any
  ) -> None:
    """Adds a flag. A `kind` of bool makes a switch, and a tuple lists the values to choose
    from; a flag of `list[int]` may be repeated. `options` are those of `add_argument`."""
    if kind is bool:
      options["action"] = "store_true"
    elif isinstance(kind, tuple):
      options["choices"] = kind
    elif typing.get_origin(kind) is list:
      (options["type"],) = typing.get_args(kind)
      options |= {"action": "append", "default": []}
      text = f"{text}; may be repeated"
    else:
      options["type"] = kind
    self.flags.append(name)
    self.add_argument(name, help=text, **options)

  def refuse_unknown(self, arguments: Sequence[str], takes_overrides: bool) -> None:
    """Raises `ConfigError` for the first argument that is no flag, with the nearest one.

    With `takes_overrides` the others are fields of the config: only what is nearly a flag
    of the command itself is refused.
    """
    for argument in arguments:
      name = argument.partition("=")[0]
      near = self.near(name, 0.7 if takes_overrides else 0.5)
      if not takes_overrides:
        cure = f"did you mean {near[0]}?" if near and name.startswith("--") else ""
        raise ConfigError(
          f"unknown argument {printable(argument)}", cure or f"{self.prog} --help"
        )
      if near and name[2:].replace("-", "_") not in FIELDS:
        raise ConfigError(f"unknown argument {name}", f"did you mean {near[0]}?")

  def near(self, flag: str, cutoff: float) -> list[str]:
    """The flag that is spelled most like it, if one is: without the hyphens, which all
    begin with."""
    names = [name[2:] for name in self.flags]
    near = difflib.get_close_matches(flag.removeprefix("--"), names, 1, cutoff)
    return [f"--{name}" for name in near]

  def add_run(self, devices: bool = True) -> None:
    """RUN, where to look for it, and the devices to open it on: see `open_run`."""
    self.add_argument("path", nargs="?", metavar="RUN", help="default: the newest run")
    self.add_flag("--runs-dir", default="runs")
    if devices:
      self.add_devices()

  def add_devices(self) -> None:
    self.add_flag("--mesh", str, "as in data=2,tensor=4", default="data=-1")
    self.add_flag("--simulated-devices", int, "CPU only")

  def add_output(self, json_text: str | None = None) -> None:
    """Where the result is written, and whether as JSON."""
    self.add_flag("--json", bool, json_text)
    self.add_flag("--output", str, "write to this file instead of stdout")

  def add_dtype(self, default: str) -> None:
    self.add_flag("--dtype", ("float32", "bfloat16"), f"of the parameters; {default}")


def printable(text: str) -> str:
  """A word of the command line as a message can show it: on one line, and not too long."""
  if len(text) > MOST_SHOWN:
    text = text[:MOST_SHOWN] + "..."
  return text if text.isprintable() and text else repr(text)


def with_hyphens(arguments: Sequence[str]) -> list[str]:
  """The arguments with flags spelled in one way: `--top_p=0.9` becomes `--top-p=0.9`.

  Both spellings are accepted. Values, and whatever follows a `--` alone, stay as they are.
  """
  spelled: list[str] = []
  for number, argument in enumerate(arguments):
    if argument == "--":
      return [*spelled, *arguments[number:]]
    if argument.startswith("--"):
      name, equals, value = argument.partition("=")
      argument = name.replace("_", "-") + equals + value
    spelled.append(argument)
  return spelled


def name_and_overrides(arguments: list[str]) -> tuple[str, list[str]]:
  """The config that `[CONFIG] [--section.field=value ...]` names, and what changes it."""
  if arguments and not arguments[0].startswith("--"):
    return arguments[0], arguments[1:]
  return DEFAULT_CONFIG, arguments


def read_config(arguments: list[str]) -> Any:
  """The checked config from `[CONFIG] [--section.field=value ...]`."""
  from flaxlm.origin import adopt

  name, overrides = name_and_overrides(arguments)
  base = load_config(name)
  cfg = override(base, overrides)
  cfg = dataclasses.replace(cfg, name=base.name if cfg.name is None else cfg.name)
  given = fields_in(overrides)
  if cfg.data.objective != base.data.objective and "training.sample_prompt" not in given:
    # The config's is for what the config itself would learn.
    training = dataclasses.replace(cfg.training, sample_prompt="")
    cfg = dataclasses.replace(cfg, training=training)
  cfg = adopt(cfg, given)
  check_config(cfg)
  return cfg


def check_least(
  args: argparse.Namespace, least: int, *names: str, most: float = math.inf
) -> None:
  """Raises `ConfigError` for a flag whose number is given and not `least` to `most`."""
  for name in names:
    value = getattr(args, name)
    if value is not None and not least <= value <= most:
      above = "" if most == math.inf else f", at most {most:g}"
      raise ConfigError(
        f"{flag_of(name)} is {value}", f"it must be at least {least}{above}"
      )


def find_named_run(args: argparse.Namespace) -> Path:
  """The directory of the run that the command line names; else of the newest, and says so.

  Once found, `args.path` names it: what asks again gets the same run, and says nothing.
  """
  from flaxlm.runs import find_run

  path = find_run(args.path, args.runs_dir)
  if args.path is None:
    print(f"no RUN is named: taking the newest, {path}", file=sys.stderr)
    args.path = str(path)
  return path


def open_run(args: argparse.Namespace, needs_text: bool = True) -> Any:
  """Opens the run that the command line names, on the devices that it names."""
  return open_run_at(find_named_run(args), args, needs_text)


def open_run_at(path: Path, args: argparse.Namespace, needs_text: bool = True) -> Any:
  """Opens a run on the devices that the command line names."""
  from flaxlm.config import parse_mesh
  from flaxlm.data.storage import data_dir
  from flaxlm.decoding.loading import load_run
  from flaxlm.platform import start_jax
  from flaxlm.sharding import make_mesh

  warn = lambda line: print(line, file=sys.stderr)
  for flag in start_jax(args.simulated_devices, data_dir() / "xla"):
    warn(flag.line)
  return load_run(path, make_mesh(parse_mesh(args.mesh)), warn, needs_text)


@contextlib.contextmanager
def open_output(path: str | None) -> Iterator[TextIO]:
  """The file to write to, or stdout, which stays open.

  Raises `ConfigError` if it cannot be opened, `WriteError` if the disk does not take it.
  """
  if path is None:
    yield sys.stdout
    return
  try:
    file = Path(path).open("w", encoding="utf-8")  # noqa: SIM115 - it is closed below
  except (OSError, ValueError) as e:
    raise ConfigError(f"{printable(path)} cannot be written: {first_line(e)}") from e
  with writing(path), file:
    yield file


def write_result(args: argparse.Namespace, values: Any, show: Any) -> None:
  """Writes `values` as one line of JSON, or what `show` prints for people, to --output."""
  with open_output(args.output) as out:
    if args.json:
      print(to_json(values), file=out)
    else:
      show(out)


def standard_input() -> BinaryIO:
  """Its bytes. Raises `ConfigError` where a shell has closed it."""
  if sys.stdin is None:
    raise ConfigError("standard input is closed", "open it, as in < FILE")
  return sys.stdin.buffer


def read_text(path: str) -> str:
  """A file's text, or all of standard input for "-", without a byte order mark. Its ends of
  lines are as they stand, since a corpus is read so, too."""
  try:
    data = standard_input().read() if path == "-" else Path(path).read_bytes()
    text = data.decode("utf-8")
  except (OSError, ValueError) as e:  # not there, not UTF-8, not even a path
    raise ConfigError(f"{printable(path)} cannot be read: {first_line(e)}") from e
  return text.removeprefix("\N{BYTE ORDER MARK}")
