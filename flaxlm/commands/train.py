# SPDX-License-Identifier: Apache-2.0
"""`flaxlm train` and `flaxlm eval`."""

import argparse
import dataclasses
import typing
from types import UnionType
from typing import Any, Literal

from flaxlm.commands.parsing import (
  DEFAULT_CONFIG,
  check_least,
  open_run,
  read_config,
  write_result,
)
from flaxlm.config import Config, flag, knobs


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
  parser.add_run()
  splits = ("validation", "train")
  parser.add_flag("--split", splits, "default: validation", default="validation")
  parser.add_flag("--corpus", str, "default: the corpus that the run was trained on")
  parser.add_flag("--batches", int, "use at most so many; default: all")
  parser.add_flag("--bleu", bool, "translate the pairs of the split, and score the result")
  parser.add_flag("--beams", int, "bleu: number of beams", default=4)
  parser.add_flag("--pairs", int, "bleu: use at most so many pairs", default=500)
  parser.add_output("one JSON object")
  parser.set_defaults(run=run_eval)


def run_eval(args: argparse.Namespace, _: list[str]) -> int:
  check_least(args, 1, "batches", "pairs")
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
  text = f"{run.path} at step {run.step}: {text}"
  write_result(args, {"step": run.step, **values}, lambda out: print(text, file=out))
  return 0
