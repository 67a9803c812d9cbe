# SPDX-License-Identifier: Apache-2.0
"""`flaxlm train`."""

import argparse
import dataclasses
import typing
from collections.abc import Iterator
from types import UnionType
from typing import Any, Literal

from flaxlm.commands.parsing import DEFAULT_CONFIG, EXECUTED, read_config
from flaxlm.config import Config, flag, knobs


def add_train(commands: Any) -> None:
  parser = commands.add_parser(
    "train",
    help="train a config, or resume its run",
    usage="flaxlm train [CONFIG] [--section.field=value ...]",
    formatter_class=argparse.RawDescriptionHelpFormatter,
    description="Trains CONFIG, a file or a name in configs/, into runs/<name>/; "
    f"running it again resumes. Default: {DEFAULT_CONFIG}.\n{EXECUTED}",
    epilog=describe_knobs(),
  )
  # CONFIG is not declared: argparse would take the 2 of `--model.depth 2` for it.
  parser.set_defaults(run=run_train, takes_overrides=True)


def run_train(_: argparse.Namespace, arguments: list[str]) -> int:
  from flaxlm.training.loop import train

  return train(read_config(arguments), arguments)


def describe_knobs() -> str:
  """Every config field: its flag, meaning, type and default."""
  lines = ["config fields (--section.field=value):"]
  for name, about, kind, default in described_knobs():
    lines.append(f"  {flag(name)}  {about}  [{kind}, {default}]")
  return "\n".join(lines).replace("%", "%%")


def described_knobs() -> Iterator[tuple[str, str, str, str]]:
  """(dotted name, meaning, type, default) of every config field, as users read them."""
  for name, kind, field in knobs(Config):
    default = field.default
    if default is dataclasses.MISSING:
      default = field.default_factory()
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
      kind_text = "|".join(choices)
    elif typing.get_origin(kind) is UnionType:
      kind_text = choices[0].__name__
    else:
      kind_text = getattr(kind, "__name__", str(kind))
    text = str(default).lower() if default is None else str(default)
    yield name, field.metadata["help"], kind_text, text
