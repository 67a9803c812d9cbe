# SPDX-License-Identifier: Apache-2.0
"""Shared by the commands: the parser, the config, the run, files to read and write."""

import argparse
import contextlib
import dataclasses
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flaxlm.config import check_config, load_config, override
from flaxlm.errors import ConfigError

DEFAULT_CONFIG = "stdlib_tiny"


class Parser(argparse.ArgumentParser):
  """An argument parser with our errors: a line of cause, a line of cure, exit code 2."""

  def __init__(self, *args: Any, **kwargs: Any):
    super().__init__(*args, **{"allow_abbrev": False, **kwargs})
    self.set_defaults(takes_overrides=False)

  def error(self, message: str) -> typing.NoReturn:
    raise ConfigError(message, f"{self.prog} --help")


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


def read_config(arguments: list[str]) -> Any:
  """The checked config from `[CONFIG] [--section.field=value ...]`."""
  named = bool(arguments) and not arguments[0].startswith("--")
  base = load_config(arguments[0] if named else DEFAULT_CONFIG)
  cfg = override(base, arguments[1:] if named else arguments)
  cfg = dataclasses.replace(cfg, name=base.name if cfg.name is None else cfg.name)
  check_config(cfg)
  return cfg


def add_devices(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--mesh", default="data=-1", help="as in data=2,tensor=4")
  parser.add_argument("--simulated-devices", type=int, help="CPU only")


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
  from flaxlm.config import parse_mesh
  from flaxlm.data.sources import data_dir
  from flaxlm.decoding.loading import load_run
  from flaxlm.platform import start_jax
  from flaxlm.sharding import make_mesh

  path = find_named_run(args)
  warn = lambda line: print(line, file=sys.stderr)
  for flag in start_jax(args.simulated_devices, data_dir() / "xla"):
    warn(flag.line)
  return load_run(path, make_mesh(parse_mesh(args.mesh)), warn, needs_text)


def add_dtype(parser: argparse.ArgumentParser, default: str) -> None:
  choices = ("float32", "bfloat16")
  parser.add_argument("--dtype", choices=choices, help=f"of the parameters; {default}")


def open_output(path: str | None) -> Any:
  """A context with the file to write to, or with stdout, which stays open."""
  if path is None:
    return contextlib.nullcontext(sys.stdout)
  try:
    return Path(path).open("w", encoding="utf-8")
  except OSError as e:
    raise ConfigError(f"{path} cannot be written: {e}") from e


def read_text(path: str) -> str:
  """A file's text, or all of standard input for "-"."""
  try:
    return sys.stdin.read() if path == "-" else Path(path).read_text("utf-8")
  except (OSError, UnicodeDecodeError) as e:
    raise ConfigError(f"{path} cannot be read: {e}") from e
