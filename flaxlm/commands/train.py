# SPDX-License-Identifier: Apache-2.0
"""`flaxlm train` and `flaxlm eval`."""

import argparse
import dataclasses
import json
import typing
from types import UnionType
from typing import Any, Literal

from flaxlm.commands.parsing import (
  DEFAULT_CONFIG,
  add_devices,
  open_output,
  open_run,
  read_config,
)
from flaxlm.config import Config, flag, knobs
from flaxlm.errors import ConfigError


def add_train(commands: Any) -> None:
  parser = commands.add_parser(
    "train",
    help="train a config, or resume its run",
    usage="flaxlm train [CONFIG] [--section.field=value ...]",
    formatter_class=argparse.RawDescriptionHelpFormatter,
    description="Trains CONFIG, a file or a name in configs/, into runs/<name>/; "
    f"running it again resumes. Default: {DEFAULT_CONFIG}.",
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
    lines.append(f"  {flag(name)}  {field.metadata['help']}  [{kind_text}, {text}]")
  return "\n".join(lines).replace("%", "%%")


def add_eval(commands: Any) -> None:
  parser = commands.add_parser("eval", help="loss and bits per byte on held-out text")
  parser.add_argument("path", nargs="?", metavar="RUN", help="default: the newest run")
  parser.add_argument("--split", choices=("validation", "train"), default="validation")
  parser.add_argument("--corpus", help="default: the corpus that the run was trained on")
  parser.add_argument("--batches", type=int, help="use at most so many; default: all")
  parser.add_argument(
    "--bleu",
    action="store_true",
    help="translate the pairs of the split, and score the result",
  )
  parser.add_argument("--beams", type=int, default=4, help="bleu: number of beams")
  parser.add_argument(
    "--pairs", type=int, default=500, help="bleu: use at most so many pairs"
  )
  parser.add_argument("--json", action="store_true")
  parser.add_argument("--output", help="write to this file instead of stdout")
  parser.add_argument("--runs-dir", default="runs")
  add_devices(parser)
  parser.set_defaults(run=run_eval)


def run_eval(args: argparse.Namespace, _: list[str]) -> int:
  if args.batches is not None and args.batches < 1:
    raise ConfigError(f"batches is {args.batches}", "it is at least 1")
  if args.pairs < 1:
    raise ConfigError(f"pairs is {args.pairs}", "it is at least 1")
  run = open_run(args)

  from flaxlm.training.evaluation import describe_evaluation, evaluate_run, translate_run

  corpus = args.corpus or run.cfg.data.corpus
  if args.bleu:
    result = translate_run(run, corpus, args.split, args.pairs, args.beams)
    values: dict[str, Any] = {"eval/bleu": result.bleu, "eval/copy_bleu": result.copy_bleu}
    text = (
      f"BLEU {result.bleu:.1f} on {result.num_pairs} pairs; "
      f"copying the source: {result.copy_bleu:.1f} ({result.signature})"
    )
    for source, reference, translation in result.examples:
      text += f"\n  {source!r}\n    => {translation!r}\n    ({reference!r})"
  else:
    values = evaluate_run(run, corpus, args.split, args.batches)
    text = describe_evaluation(values)
  with open_output(args.output) as out:
    if args.json:
      print(json.dumps({"step": run.step, **values}), file=out)
    else:
      print(f"{run.path} at step {run.step}: {text}", file=out)
  return 0
