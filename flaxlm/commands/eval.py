# SPDX-License-Identifier: Apache-2.0
"""`flaxlm eval`."""

import argparse
import sys
from typing import Any

from flaxlm.commands.parsing import check_least, open_run, write_result


def add_eval(commands: Any) -> None:
  parser = commands.add_parser("eval", help="loss and bits per byte on held-out text")
  parser.add_run()
  text = "default: all of a corpus that is named, else validation"
  parser.add_flag("--split", ("validation", "train"), text)
  text = "scored whole; default: what the run's own corpus holds out"
  parser.add_flag("--corpus", str, text)
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

  log = lambda line: print(line, file=sys.stderr)
  which = (run, args.corpus, args.split)
  if args.bleu:
    result = translate_run(*which, args.pairs, args.beams, log)
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
    text = (
      f"{describe_evaluation(values)}; {values['tokens']:,} tokens, "
      f"{values['bytes']:,} bytes of {values['corpus']} ({values['split']})"
    )
  text = f"{run.path} at step {run.step}: {text}"
  write_result(args, {"step": run.step, **values}, lambda out: print(text, file=out))
  return 0
