# SPDX-License-Identifier: Apache-2.0
"""`flaxlm eval`."""

import argparse
import contextlib
import dataclasses
import sys
from typing import Any

from flaxlm.commands.parsing import (
  check_least,
  open_output,
  open_run,
  read_text,
  write_result,
)
from flaxlm.config import flag as flag_of
from flaxlm.errors import ConfigError
from flaxlm.strict_json import to_json

BEAMS, PAIRS = 4, 500  # of --bleu


def add_eval(commands: Any) -> None:
  parser = commands.add_parser("eval", help="loss and bits per byte on held-out text")
  parser.add_run()
  text = "default: all of a corpus that is named, else validation"
  parser.add_flag("--split", ("validation", "train"), text)
  text = "scored whole; default: what the run's own corpus holds out"
  parser.add_flag("--corpus", str, text)
  text = "the field of that corpus's records; default: that of the run"
  parser.add_flag("--text-field", str, text)
  parser.add_flag("--batches", int, "use at most so many; default: all")
  parser.add_flag("--bleu", bool, "translate the pairs of the split, and score the result")
  parser.add_flag("--beams", int, f"bleu: number of beams (default: {BEAMS})")
  text = f"bleu: use at most so many pairs (default: {PAIRS})"
  parser.add_flag("--pairs", int, text)
  text = (
    "instead: tasks with known answers, a JSON object a line; --output gets the answers"
  )
  parser.add_flag("--tasks", str, text, metavar="FILE")
  parser.add_output("one JSON object")
  parser.set_defaults(run=run_eval)


def check_read(args: argparse.Namespace) -> None:
  """Raises `ConfigError` for a flag that what is evaluated does not read."""
  excluded = {
    "tasks": ("bleu", "split", "corpus", "text_field", "batches", "pairs", "beams"),
    "bleu": ("batches",),
  }
  for what, others in excluded.items():
    for name in others:
      if getattr(args, what) and getattr(args, name):
        raise ConfigError(f"--{what} with {flag_of(name)}", "leave one of them out")
  for name in ("pairs", "beams"):
    if getattr(args, name) and not args.bleu:
      raise ConfigError(f"{flag_of(name)} without --bleu", "add --bleu")
  if args.text_field is not None and args.corpus is None:
    raise ConfigError("--text-field without --corpus", "add --corpus")


def run_eval(args: argparse.Namespace, _: list[str]) -> int:
  check_least(args, 1, "batches", "pairs", "beams")
  check_read(args)
  if args.tasks is not None:
    return run_tasks(args)
  run = open_run(args)
  if args.text_field is not None:
    run = reading(run, args.text_field)

  from flaxlm.training.evaluation import describe_evaluation, evaluate_run, translate_run

  log = lambda line: print(line, file=sys.stderr)
  which = (run, args.corpus, args.split)
  if args.bleu:
    result = translate_run(*which, args.pairs or PAIRS, args.beams or BEAMS, log)
    values: dict[str, Any] = {"eval/bleu": result.bleu, "eval/copy_bleu": result.copy_bleu}
    values |= {"corpus": result.corpus, "split": result.split, "pairs": result.num_pairs}
    text = (
      f"BLEU {result.bleu:.1f} on {result.num_pairs} pairs of {result.corpus} "
      f"({result.split}); copying the source: {result.copy_bleu:.1f} ({result.signature})"
    )
    for source, reference, translation in result.examples:
      text += f"\n  {source!r}\n    => {translation!r}\n    ({reference!r})"
  else:
    values = evaluate_run(*which, args.batches, log)
    size = (
      f"{values['questions']:,} questions"
      if "questions" in values
      else f"{values['tokens']:,} tokens, {values['bytes']:,} bytes"
    )
    of = f"{size} of {values['corpus']} ({values['split']})"
    text = f"{describe_evaluation(values)}; {of}"
  text = f"{run.path} at step {run.step}: {text}"
  write_result(args, {"step": run.step, **values}, lambda out: print(text, file=out))
  return 0


def reading(run: Any, text_field: str) -> Any:
  """The run with another name for the field that has the text of a record."""
  data = run.cfg.data
  if data.objective not in ("next_token", "masked"):
    raise ConfigError(
      f"--text-field is not read with data.objective={data.objective}", "leave it out"
    )
  data = dataclasses.replace(data, text_field=text_field)
  return run._replace(cfg=dataclasses.replace(run.cfg, data=data))


def run_tasks(args: argparse.Namespace) -> int:
  """Figures go to stdout, and the answer to each task to --output."""
  from flaxlm.decoding.tasks import evaluate_tasks, join_notes, read_tasks

  # Mistakes in the file show before a checkpoint is read.
  tasks = read_tasks(read_text(args.tasks), args.tasks)
  for note in join_notes(tasks):
    print(note, file=sys.stderr)
  run = open_run(args)
  from rich.console import Console
  from rich.progress import Progress

  total = sum(len(getattr(task, "choices", [None])) for task in tasks)
  with contextlib.ExitStack() as stack:
    out = stack.enter_context(open_output(args.output)) if args.output else None
    progress = stack.enter_context(Progress(console=Console(stderr=True)))
    bar = progress.add_task("tasks", total=total)
    done = lambda count: progress.advance(bar, count)
    figures, answers = evaluate_tasks(run, tasks, done)
    for answer in answers if out else []:
      print(to_json(answer), file=out)
  if args.json:
    print(to_json({"step": run.step, "tasks": args.tasks, **figures}))
  else:
    print(f"{run.path} at step {run.step}: {describe_tasks(figures)} of {args.tasks}")
  return 0


def describe_tasks(figures: dict[str, Any]) -> str:
  def shown(name: str) -> str:
    error = figures[f"{name}_stderr"]
    return f"{figures[name]:.1%}" + ("" if error is None else f" ± {100 * error:.1f}")

  parts = []
  if "acc" in figures:
    parts.append(
      f"accuracy {shown('acc')}, by length {shown('acc_norm')}, on "
      f"{figures['num_multiple_choice']:,} multiple-choice tasks"
    )
  if "exact_match" in figures:
    parts.append(
      f"exact match {shown('exact_match')} on {figures['num_questions']:,} questions"
    )
  if figures["num_cut"]:
    parts.append(f"{figures['num_cut']:,} prompts cut from the left")
  return "; ".join(parts)
