# SPDX-License-Identifier: Apache-2.0
"""`flaxlm infer` and `flaxlm embed`."""

import argparse
import contextlib
import json
import sys
import typing
from pathlib import Path
from typing import Any

from flaxlm.commands.parsing import (
  add_devices,
  open_output,
  open_run,
  read_text,
)
from flaxlm.errors import ConfigError

# Flags that are a row's settings: kind and help.
SETTINGS: dict[str, tuple[type, str]] = {
  "temperature": (float, "0 is greedy"),
  "top_k": (int, "draw from the k likeliest tokens"),
  "top_p": (float, "draw from the likeliest tokens of this mass"),
  "min_p": (float, "draw from tokens at least so likely, next to the likeliest"),
  "typical_p": (float, "draw from tokens of this mass whose surprise is nearest the mean"),
  "repetition_penalty": (float, "above 1: less of what prompt and answer hold"),
  "presence_penalty": (float, "taken from logits of tokens in the answer, once"),
  "frequency_penalty": (float, "taken from them for each time"),
  "regex": (str, "that the whole answer fits"),
  "seed": (int, "sample n draws with seed + n"),
}


def add_infer(commands: Any) -> None:
  parser = commands.add_parser("infer", help="continue prompts with a trained run")
  parser.add_argument("path", nargs="?", metavar="RUN", help="default: the newest run")
  parser.add_argument(
    "--prompt", action="append", default=[], help="may be repeated; read, or continued"
  )
  parser.add_argument(
    "--fill", action="append", default=[], help="a text with [MASK]s for an encoder"
  )
  parser.add_argument(
    "--prompt-file", help="one prompt, or - for stdin; FILE.jsonl: a prompt a line"
  )
  parser.add_argument("--output", help="write to this file instead of stdout")
  parser.add_argument("--interactive", action="store_true", help="a turn per line")
  parser.add_argument(
    "--no-chat", action="store_true", help="interactive: without the run's chat template"
  )
  parser.add_argument("--max-new-tokens", type=int)
  for name, (kind, text) in SETTINGS.items():
    default = {"temperature": 0.8, "seed": 0}.get(name)
    parser.add_argument(flag(name), type=kind, default=default, help=text)
  parser.add_argument(
    "--logit-bias", action="append", default=[], metavar="ID=X", help="may be repeated"
  )
  parser.add_argument(
    "--ban", action="append", default=[], type=int, metavar="ID", help="may be repeated"
  )
  parser.add_argument("--json-schema", metavar="FILE", help="of what the answer is to be")
  parser.add_argument("--stop", action="append", default=[], help="may be repeated")
  parser.add_argument(
    "--stop-token",
    action="append",
    default=[],
    type=int,
    metavar="ID",
    help="may be repeated",
  )
  parser.add_argument("--max-seconds", type=float, help="for each batch of prompts")
  parser.add_argument("--num-samples", type=int, default=1, help="completions per prompt")
  parser.add_argument("--beams", type=int, help="search for the likeliest, with so many")
  parser.add_argument(
    "--length-penalty", type=float, help="beams: 0 prefers short texts (default: 0.6)"
  )
  parser.add_argument(
    "--batch-size", type=int, default=16, help="rows of FILE.jsonl at a time"
  )
  parser.add_argument(
    "--top-logprobs", type=int, default=0, metavar="N", help="json: tell the N likeliest"
  )
  parser.add_argument(
    "--weights", choices=("float32", "bfloat16", "int8"), help="default: as in the run"
  )
  parser.add_argument("--cache", choices=("int8",), help="keys and values in a quarter")
  parser.add_argument(
    "--draft", metavar="RUN", help="a smaller run that guesses ahead, or ngram: the text"
  )
  parser.add_argument("--draft-tokens", type=int, default=4, help="guesses at a time")
  parser.add_argument("--json", action="store_true", help="one JSON object per sample")
  parser.add_argument("--verbose", action="store_true", help="tell what was compiled")
  parser.add_argument("--runs-dir", default="runs")
  add_devices(parser)
  parser.set_defaults(run=run_infer)


def flag(name: str) -> str:
  return "--" + name.replace("_", "-")


def run_infer(args: argparse.Namespace, _: list[str]) -> int:
  check(args)
  from flaxlm.decoding.completions import Stopping
  from flaxlm.decoding.constraint import regex_of_schema
  from flaxlm.decoding.sampling import Settings

  if args.json_schema is not None:
    args.regex = regex_of_schema(read_text(args.json_schema))
  given = {name: getattr(args, name) for name in SETTINGS}
  settings = Settings(
    **{name: value for name, value in given.items() if value is not None},
    logit_bias=dict(map(read_bias, args.logit_bias)),
    banned_tokens=args.ban,
  )
  settings.check()  # a mistake here should not wait for the checkpoint
  stop = Stopping(strings=args.stop, tokens=args.stop_token, max_seconds=args.max_seconds)
  stop.check()
  if args.prompt_file and args.prompt_file.endswith(".jsonl"):
    run_file(args, settings, stop)
    return 0
  prompts = [*args.prompt]
  if args.prompt_file:
    prompts.append(read_text(args.prompt_file))
  run = open_decoder(args)
  with open_output(args.output) as out, told(args.verbose):
    if args.fill:
      fill(run, args, out)
    if prompts:
      answer(run, prompts, settings, stop, args, out)
    if args.interactive:
      converse(run, settings, stop, args, out)
  return 0


def check(args: argparse.Namespace) -> None:
  """Refuses flags that do not go together, before anything is loaded."""
  if not (args.prompt or args.prompt_file or args.interactive or args.fill):
    raise ConfigError("there is no prompt", 'give --prompt "..." or --interactive')
  for name in ("num_samples", "batch_size"):
    if getattr(args, name) < 1:
      raise ConfigError(f"{flag(name)[2:]} is {getattr(args, name)}", "it is at least 1")
  if args.beams is None and args.length_penalty is not None:
    raise ConfigError("--length-penalty without --beams", "add --beams 4")
  if args.beams is not None and args.draft is not None:
    raise ConfigError("--draft with --beams", "leave one of them out")
  if args.regex is not None and args.json_schema is not None:
    raise ConfigError("--regex with --json-schema", "leave one of them out")
  if args.regex is not None or args.json_schema is not None:
    for name in ("beams", "draft"):
      if getattr(args, name) is not None:
        raise ConfigError(
          f"an answer of a given form with --{name}", "leave one of them out"
        )
  if args.length_penalty is not None and args.length_penalty < 0:
    raise ConfigError(f"length-penalty is {args.length_penalty}", "it is at least 0")
  if args.beams is not None and args.beams < args.num_samples:
    raise ConfigError(
      f"{args.num_samples} samples of {args.beams} beams", f"--beams {args.num_samples}"
    )


def read_bias(text: str) -> tuple[int, float]:
  token, _, bias = text.partition("=")
  try:
    return int(token), float(bias)
  except ValueError as e:
    raise ConfigError(f"logit-bias is {text!r}", "as in 50256=-5") from e


def open_decoder(args: argparse.Namespace) -> Any:
  from flaxlm.decoding.loading import prepare_for_decoding

  run = open_run(args)
  if run.cfg.model.family == "encoder":
    return run
  run = prepare_for_decoding(run, args.weights, args.cache == "int8")
  return run if args.draft is None else with_draft(run, args)


def with_draft(run: Any, args: argparse.Namespace) -> Any:
  """The run with who guesses for it: another run, or the text itself."""
  from flaxlm.decoding.loading import load_run, prepare_for_decoding
  from flaxlm.decoding.speculative import Draft
  from flaxlm.runs import find_run

  draft = Draft(num_tokens=args.draft_tokens)
  if args.draft != "ngram":
    small = prepare_for_decoding(load_run(find_run(args.draft, args.runs_dir), run.mesh))
    if small.tokenizer.fingerprint != run.tokenizer.fingerprint:
      raise ConfigError(
        f"{args.draft} has another tokenizer", "draft with one that shares it"
      )
    draft = Draft(small.model, small.params, args.draft_tokens)
  return run._replace(draft=draft)


@contextlib.contextmanager
def told(verbose: bool) -> typing.Iterator[None]:
  """Tells what was compiled meanwhile, if somebody wants to know."""
  if not verbose:
    yield
    return
  from flaxlm.decoding.compiled import count_compiled

  with count_compiled() as compiled:
    yield
  print(compiled, file=sys.stderr)


def run_file(args: argparse.Namespace, settings: Any, stop: Any) -> None:
  """A job from a JSON-lines file, with a progress bar on stderr."""
  if not args.output or args.prompt or args.interactive or args.beams or args.fill:
    raise ConfigError(
      "prompts from a .jsonl file go to a file, alone, without beams", "--output out.jsonl"
    )
  from flaxlm.decoding.jobs import Job, read_jobs, run_jobs

  defaults = Job("", settings, stop, args.max_new_tokens, args.num_samples)
  jobs = read_jobs(read_text(args.prompt_file), defaults)
  run = open_decoder(args)
  from rich.console import Console
  from rich.progress import Progress

  with told(args.verbose), Progress(console=Console(stderr=True)) as progress:
    task = progress.add_task("prompts", total=len(jobs))
    advance = lambda count: progress.advance(task, count)
    output = Path(args.output)
    run_jobs(run, jobs, output, args.batch_size, args.top_logprobs, advance)


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
  run: Any,
  prompts: list[str],
  settings: Any,
  stop: Any,
  args: argparse.Namespace,
  out: typing.TextIO,
) -> None:
  """Writes the completions of some prompts; a single one as it grows."""
  from flaxlm.decoding.completions import complete, search
  from flaxlm.decoding.sampling import stack_settings

  rows = [prompt for prompt in prompts for _ in range(args.num_samples)]
  streams = len(rows) == 1 and not args.json
  show = lambda _, piece: print(piece, end="", file=out, flush=True)
  reads = run.cfg.model.family == "encoder_decoder"
  if streams and not reads:
    show(0, rows[0])
  if args.beams is not None:
    alpha = 0.6 if args.length_penalty is None else args.length_penalty
    results = search(run, prompts, args.beams, alpha, args.max_new_tokens, args.num_samples)
    if streams:
      show(0, results[0].completion)
  else:
    results = complete(
      run,
      rows,
      stack_settings(settings.samples(len(rows)), run.tokenizer),
      args.max_new_tokens,
      stop,
      on_text=show if streams else None,
      num_top=args.top_logprobs,
    )
  for number, result in enumerate(results, 1):
    if args.json:
      print(json.dumps(result.as_json()), file=out)
    elif streams:
      print(file=out)
    elif reads:
      print(f"--- {number}\n{result.prompt}\n=> {result.completion}", file=out)
    else:
      print(f"--- {number}\n{result.prompt}{result.completion}", file=out)


def converse(
  run: Any, settings: Any, stop: Any, args: argparse.Namespace, out: typing.TextIO
) -> None:
  """A turn for each line; Ctrl-C ends the turn. With a chat template the whole
  conversation is the prompt, of which only what is new is read."""
  from flaxlm.decoding.chat import load_chat
  from flaxlm.decoding.completions import complete
  from flaxlm.decoding.generate import Memory
  from flaxlm.decoding.sampling import stack_settings

  chat = None if args.no_chat else load_chat(run.path)
  memory, messages = Memory(), []
  for line in read_lines():
    if chat is None:
      with contextlib.suppress(KeyboardInterrupt):
        answer(run, [line], settings, stop, args, out)
      continue
    pieces: list[str] = []

    def show(_: int, piece: str, pieces: list[str] = pieces) -> None:
      pieces.append(piece)
      print(piece, end="", file=out, flush=True)

    messages.append({"role": "user", "content": line})
    sampling = stack_settings([settings], run.tokenizer)
    with contextlib.suppress(KeyboardInterrupt):
      rest = (args.max_new_tokens, stop, show, 0, memory)
      complete(run, [chat(messages)], sampling, *rest)
    print(file=out, flush=True)
    messages.append({"role": "assistant", "content": "".join(pieces)})


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
