# SPDX-License-Identifier: Apache-2.0
"""`flaxlm infer` and `flaxlm embed`."""

import argparse
import dataclasses
import json
import sys
import typing
from typing import Any

from flaxlm.commands.parsing import (
  add_devices,
  open_output,
  open_run,
  read_text,
)
from flaxlm.errors import ConfigError


def add_infer(commands: Any) -> None:
  parser = commands.add_parser("infer", help="continue prompts with a trained run")
  parser.add_argument("path", nargs="?", metavar="RUN", help="default: the newest run")
  parser.add_argument(
    "--prompt", action="append", default=[], help="may be repeated; read, or continued"
  )
  parser.add_argument(
    "--fill", action="append", default=[], help="a text with [MASK]s for an encoder"
  )
  parser.add_argument("--prompt-file", help="a file with one prompt, or - for stdin")
  parser.add_argument("--output", help="write to this file instead of stdout")
  parser.add_argument(
    "--interactive", action="store_true", help="read prompts line by line"
  )
  parser.add_argument("--max-new-tokens", type=int)
  parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
  parser.add_argument("--top-k", type=int)
  parser.add_argument("--top-p", type=float)
  parser.add_argument("--min-p", type=float)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--stop", action="append", default=[], help="may be repeated")
  parser.add_argument("--num-samples", type=int, default=1, help="completions per prompt")
  parser.add_argument("--beams", type=int, help="search for the likeliest, with so many")
  parser.add_argument(
    "--length-penalty", type=float, help="beams: 0 prefers short texts (default: 0.6)"
  )
  parser.add_argument("--json", action="store_true", help="one JSON object per sample")
  parser.add_argument("--runs-dir", default="runs")
  add_devices(parser)
  parser.set_defaults(run=run_infer)


def run_infer(args: argparse.Namespace, _: list[str]) -> int:
  prompts = [*args.prompt]
  if args.prompt_file:
    prompts.append(read_text(args.prompt_file))
  if not prompts and not args.interactive and not args.fill:
    raise ConfigError("there is no prompt", 'give --prompt "..." or --interactive')
  if args.num_samples < 1:
    raise ConfigError(f"num-samples is {args.num_samples}", "it is at least 1")
  if args.beams is None and args.length_penalty is not None:
    raise ConfigError("--length-penalty without --beams", "add --beams 4")
  if args.length_penalty is not None and args.length_penalty < 0:
    raise ConfigError(f"length-penalty is {args.length_penalty}", "it is at least 0")
  if args.beams is not None and args.beams < args.num_samples:
    raise ConfigError(
      f"{args.num_samples} samples of {args.beams} beams", f"--beams {args.num_samples}"
    )

  from flaxlm.decoding.sampling import make_sampling

  def sampling(num_rows: int) -> Any:
    names = ("temperature", "top_k", "top_p", "min_p", "seed")
    return make_sampling(num_rows, **{name: getattr(args, name) for name in names})

  sampling(1)  # a mistake here should not wait for the checkpoint
  run = open_run(args)
  with open_output(args.output) as out:
    if args.fill:
      fill(run, args, out)
    if prompts:
      answer(run, prompts, sampling, args, out)
    if args.interactive:
      for line in read_lines():
        answer(run, [line], sampling, args, out)
  return 0


def fill(run: Any, args: argparse.Namespace, out: typing.TextIO) -> None:
  """Writes texts with their masks filled in, and what else could stand there."""
  from flaxlm.decoding.encoding import fill_masks

  for result in fill_masks(run, args.fill):
    if args.json:
      print(json.dumps(result._asdict()), file=out)
      continue
    print(result.filled, file=out)
    for number, candidates in enumerate(result.candidates, 1):
      shown = ", ".join(f"{token!r} {chance:.0%}" for token, chance in candidates)
      print(f"  mask {number}: {shown}", file=out)


def answer(
  run: Any, prompts: list[str], sampling: Any, args: argparse.Namespace, out: typing.TextIO
) -> None:
  """Writes the completions of some prompts; a single one as it grows."""
  from flaxlm.decoding.completions import complete, search

  rows = [prompt for prompt in prompts for _ in range(args.num_samples)]
  streams = len(rows) == 1 and not args.json
  show = lambda _, piece: print(piece, end="", file=out, flush=True)
  lead = "" if run.cfg.model.family == "encoder_decoder" else rows[0]
  if streams:
    show(0, lead)
  if args.beams is not None:
    alpha = 0.6 if args.length_penalty is None else args.length_penalty
    results = search(run, prompts, args.beams, alpha, args.max_new_tokens, args.num_samples)
    if streams:
      show(0, results[0].completion)
  else:
    results = complete(
      run,
      rows,
      sampling(len(rows)),
      args.max_new_tokens,
      args.stop,
      on_text=show if streams else None,
    )
  for number, result in enumerate(results, 1):
    if args.json:
      print(json.dumps(dataclasses.asdict(result)), file=out)
    elif streams:
      print(file=out)
    elif run.cfg.model.family == "encoder_decoder":
      print(f"--- {number}\n{result.prompt}\n=> {result.completion}", file=out)
    else:
      print(f"--- {number}\n{result.prompt}{result.completion}", file=out)


def read_lines() -> typing.Iterator[str]:
  """Prompts typed one by one, until the end of input."""
  while True:
    print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
      return
    yield line.rstrip("\n")


def add_embed(commands: Any) -> None:
  parser = commands.add_parser("embed", help="sentence embeddings from an encoder's run")
  parser.add_argument("path", nargs="?", metavar="RUN", help="default: the newest run")
  parser.add_argument("--text", action="append", default=[], help="may be repeated")
  parser.add_argument("--normalise", action="store_true", help="scale to length 1")
  parser.add_argument("--json", action="store_true", help="one JSON object per text")
  parser.add_argument("--output", help="write to this file instead of stdout")
  parser.add_argument("--runs-dir", default="runs")
  add_devices(parser)
  parser.set_defaults(run=run_embed)


def run_embed(args: argparse.Namespace, _: list[str]) -> int:
  if not args.text:
    raise ConfigError("there is no text", 'give --text "..."')
  run = open_run(args)

  from flaxlm.decoding.encoding import embed_texts

  vectors = embed_texts(run, args.text, args.normalise)
  with open_output(args.output) as out:
    for text, vector_D in zip(args.text, vectors, strict=True):
      values = [float(x) for x in vector_D]
      if args.json:
        print(json.dumps({"text": text, "embedding": values}), file=out)
      else:
        print(" ".join(f"{x:.6g}" for x in values), file=out)
  return 0
