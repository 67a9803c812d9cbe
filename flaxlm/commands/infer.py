# SPDX-License-Identifier: Apache-2.0
"""`flaxlm infer`: prompts from flags, a file or a terminal are completed and printed."""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from flaxlm.commands.parsing import (
  check_least,
  open_output,
  open_run,
  read_text,
  standard_input,
)
from flaxlm.config import flag as flag_of
from flaxlm.errors import ConfigError, DataError
from flaxlm.strict_json import to_json

# Flags that are fields of `SamplingSettings`: type and help.
SAMPLING_FLAGS: dict[str, tuple[type, str]] = {
  "temperature": (float, "0 is greedy"),
  "top_k": (int, "draw from the k likeliest tokens"),
  "top_p": (float, "draw from the likeliest tokens, up to this probability in all"),
  "min_p": (float, "draw from tokens at least this share as likely as the likeliest"),
  "typical_p": (float, "as --top-p, from tokens whose -log p is nearest to the entropy"),
  "repetition_penalty": (float, "above 1: tokens of prompt and answer become less likely"),
  "presence_penalty": (float, "subtracted from the logits of tokens in the answer, once"),
  "frequency_penalty": (float, "the same, for each time that the token occurs"),
  "regex": (str, "a regular expression that the whole answer matches"),
  "seed": (int, "the same seed draws the same answers"),
}
DEFAULT_LENGTH_PENALTY = 0.6
DEFAULT_BATCH_SIZE = 16


# -- What the command reads ----------------------------------------------------------------


def add_infer(commands: Any) -> None:
  parser = commands.add_parser("infer", help="continue prompts with a trained run")
  parser.add_run()
  parser.add_output("one JSON object per sample")
  flag = parser.add_flag
  text = "with --json: also the N likeliest tokens of each step"
  flag("--top-logprobs", int, text, metavar="N")
  flag("--verbose", bool, "say how many programs were compiled")
  # What is read.
  flag("--prompt", list[str], "a text to continue, or to read (encoder_decoder)")
  flag("--prompt-file", str, "one prompt, or - for stdin; FILE.jsonl: a prompt a line")
  flag("--interactive", bool, "a turn per line")
  flag("--no-chat", bool, "interactive: do not use the run's chat template")
  flag("--system", str, "interactive: the system's message, before all others")
  flag("--tools", str, "interactive: a JSON list of functions to call", metavar="FILE")
  flag("--fill", list[str], "a text with [MASK]s for an encoder")
  # How tokens are drawn.
  for name, (kind, text) in SAMPLING_FLAGS.items():
    flag(flag_of(name), kind, text)
  flag("--json-schema", str, "a JSON schema that the whole answer matches", metavar="FILE")
  flag("--logit-bias", list[str], "add X to a token's logit", metavar="ID=X")
  flag("--ban", list[int], "never draw this token", metavar="ID")
  flag("--num-samples", int, "completions per prompt", default=1)
  # Where they end.
  flag("--max-new-tokens", int)
  flag("--max-seconds", float, "for all prompts together, or each of FILE.jsonl")
  flag("--stop", list[str], "end before this text")
  flag("--stop-token", list[int], "end with this token", metavar="ID")
  # Beam search.
  flag("--beams", int, "search for the likeliest completions with so many beams")
  text = f"beams: 0 prefers short texts (default: {DEFAULT_LENGTH_PENALTY})"
  flag("--length-penalty", float, text)
  # Speed.
  text = f"samples of FILE.jsonl at a time (default: {DEFAULT_BATCH_SIZE})"
  flag("--batch-size", int, text)
  flag("--weights", ("float32", "bfloat16", "int8", "int4"), "default: as in the run")
  text = "products with narrow weights by a kernel for NVIDIA GPUs; not measured yet"
  flag("--weights-kernel", ("pallas",), text)
  flag("--cache", ("int8",), "keys and values in a quarter of the memory")
  text = "a smaller run that guesses tokens ahead; ngram: guess from the text so far"
  flag("--draft", str, text, metavar="RUN")
  flag("--draft-tokens", int, "draft: guesses at a time (default: 4)")
  parser.set_defaults(run=run_infer)


def check(args: argparse.Namespace) -> None:
  """Raises `ConfigError` for flags that do not go together, before anything is loaded."""
  from flaxlm.decoding.sampling import MOST_SAMPLES

  if not (args.prompt or args.prompt_file or args.interactive or args.fill):
    raise ConfigError("there is no prompt", 'give --prompt "..." or --interactive')
  check_least(args, 1, "max_new_tokens", "beams", "draft_tokens")
  check_least(args, 0, "top_logprobs", "length_penalty")
  check_least(args, 1, "num_samples", "batch_size", most=MOST_SAMPLES)
  alone = ("regex", "json_schema", "draft", "beams")
  given = [flag_of(name) for name in alone if getattr(args, name) is not None]
  if len(given) > 1:
    raise ConfigError(f"{given[0]} with {given[1]}", "leave one of them out")
  if args.beams is not None and (drawn := given_for_drawing(args)):
    raise ConfigError(
      f"--beams with {drawn[0]}", "leave one of them out: a search draws nothing"
    )
  for name, (is_read, reader) in readers(args).items():
    if getattr(args, name) is not None and not is_read:
      raise ConfigError(f"{flag_of(name)} without {reader}", f"add {reader}")
  if args.beams is not None and args.beams < args.num_samples:
    raise ConfigError(
      f"{args.num_samples} samples of {args.beams} beams", f"--beams {args.num_samples}"
    )
  for name in ("system", "tools"):
    if getattr(args, name) is not None and (not args.interactive or args.no_chat):
      raise ConfigError(f"--{name} is for a chat", "give --interactive, and no --no-chat")
  others = args.prompt or args.interactive or args.beams or args.fill
  if reads_jobs(args) and (others or not args.output):
    raise ConfigError(
      "a .jsonl file of prompts needs --output, and goes without other prompts and beams",
      "--output out.jsonl",
    )
  if reads_jobs(args) and Path(args.output).is_dir():
    raise ConfigError(f"--output {args.output} is a folder", "--output out.jsonl")
  if reads_jobs(args) and Path(args.output).resolve() == Path(args.prompt_file).resolve():
    raise ConfigError(f"--output {args.output} would replace the prompts", "name another")


def given_for_drawing(args: argparse.Namespace) -> list[str]:
  """The flags for answers that are drawn, or that end early; a beam search reads none."""
  lists = ("logit_bias", "ban", "stop", "stop_token")
  given = [name for name in lists if getattr(args, name)]
  others = (*SAMPLING_FLAGS, "top_logprobs", "max_seconds")
  given += [name for name in others if getattr(args, name) is not None]
  return [*map(flag_of, given)]


def readers(args: argparse.Namespace) -> dict[str, tuple[bool, str]]:
  """For each flag that another one needs: whether that is there, and how to give it."""
  jobs = reads_jobs(args)
  return {
    "length_penalty": (args.beams is not None, "--beams 4"),
    "draft_tokens": (args.draft is not None, "--draft ngram"),
    "batch_size": (jobs, "--prompt-file FILE.jsonl"),
    "top_logprobs": (args.json or jobs, "--json"),
  }


def reads_jobs(args: argparse.Namespace) -> bool:
  return bool(args.prompt_file) and args.prompt_file.endswith(".jsonl")


def read_sampling(args: argparse.Namespace) -> Any:
  """The `SamplingSettings` of the flags, checked."""
  from flaxlm.decoding.completions import DEFAULT_TEMPERATURE
  from flaxlm.decoding.constraint import check_expressions
  from flaxlm.decoding.sampling import SamplingSettings
  from flaxlm.decoding.schemas import regex_of_schema

  values = {name: getattr(args, name) for name in SAMPLING_FLAGS}
  given = {name: value for name, value in values.items() if value is not None}
  if args.json_schema is not None:
    given["regex"] = regex_of_schema(read_text(args.json_schema))
  settings = SamplingSettings(
    **{"temperature": DEFAULT_TEMPERATURE} | given,
    logit_bias=dict(map(read_bias, args.logit_bias)),
    banned_tokens=args.ban,
  )
  settings.check()
  if settings.regex is not None:
    check_expressions([settings.regex])
  return settings


def read_bias(text: str) -> tuple[int, float]:
  token, _, bias = text.partition("=")
  try:
    return int(token), float(bias)
  except ValueError as e:
    raise ConfigError(f"logit-bias is {text!r}", "as in 50256=-5") from e


def read_tools(path: str) -> list[dict[str, Any]]:
  """The functions that a model may call: a JSON list of objects."""
  try:
    tools = json.loads(read_text(path))
  except (ValueError, RecursionError) as e:
    raise ConfigError(f"{path} is not JSON: {e}") from e
  if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
    raise ConfigError(
      f"{path} is not a list of tools", 'as in [{"type": "function", "function": {...}}]'
    )
  return tools


def read_lines() -> Iterator[str]:
  """Prompts typed one by one, until the end of input."""
  while True:
    print("> ", end="", file=sys.stderr, flush=True)
    line = standard_input().readline()
    if not line:
      return
    yield line.decode("utf-8", "surrogateescape").rstrip("\r\n")


# -- What it does --------------------------------------------------------------------------


def run_infer(args: argparse.Namespace, _: list[str]) -> int:
  from flaxlm.decoding.completions import Stopping

  # Mistakes in the flags show before a checkpoint is read.
  check(args)
  args.tools = None if args.tools is None else read_tools(args.tools)
  settings = read_sampling(args)
  stop = Stopping(strings=args.stop, tokens=args.stop_token, max_seconds=args.max_seconds)
  stop.check()
  if reads_jobs(args):
    complete_file(args, settings, stop)
    return 0
  prompts = args.prompt + ([read_text(args.prompt_file)] if args.prompt_file else [])
  run = open_decoder(args)
  with open_output(args.output) as out, report_compilations(args.verbose):
    if args.fill:
      print_filled(run, args, out)
    if prompts:
      print_completions(run, prompts, settings, stop, args, out)
    if args.interactive:
      converse(run, settings, stop, args, out)
  return 0


def open_decoder(args: argparse.Namespace) -> Any:
  """The run, its parameters laid out for decoding, with the draft that was asked for."""
  from flaxlm.decoding.loading import equip_for_decoding

  run = open_run(args)
  drafted = (args.draft, args.draft_tokens, args.runs_dir)
  return equip_for_decoding(run, args.weights, args.cache, *drafted, args.weights_kernel)


def complete_file(args: argparse.Namespace, settings: Any, stop: Any) -> None:
  """Completes the prompts of a JSON-lines file, with a progress bar on stderr."""
  from flaxlm.decoding.jobs import PromptJob, complete_jobs, read_jobs

  defaults = PromptJob("", settings, stop, args.max_new_tokens, args.num_samples)
  jobs = read_jobs(read_text(args.prompt_file), defaults)
  run = open_decoder(args)
  from rich.console import Console
  from rich.progress import Progress

  console = Console(stderr=True)
  with report_compilations(args.verbose), Progress(console=console) as progress:
    task = progress.add_task("prompts", total=len(jobs))
    complete_jobs(
      run,
      jobs,
      Path(args.output),
      args.batch_size or DEFAULT_BATCH_SIZE,
      args.top_logprobs or 0,
      on_done=lambda count: progress.advance(task, count),
    )


def converse(
  run: Any, settings: Any, stop: Any, args: argparse.Namespace, out: TextIO
) -> None:
  """Answers one line at a time; Ctrl-C ends an answer.

  A line that cannot be answered, after others that could, does not end the conversation.
  """
  from flaxlm.decoding.completions import as_texts

  answer = answer_in_chat(run, settings, stop, args, out)
  if answer is None:
    answer = lambda line: print_completions(run, [line], settings, stop, args, out)
  answered = False
  for line in read_lines():
    try:
      as_texts(line)
      with contextlib.suppress(KeyboardInterrupt):
        answer(line)
      answered = True
    except (ConfigError, DataError) as e:
      if not answered:
        raise
      print(e, file=sys.stderr)


def answer_in_chat(
  run: Any, settings: Any, stop: Any, args: argparse.Namespace, out: TextIO
) -> Callable[[str], None] | None:
  """A function that answers what the user says, in the run's chat template; None without.

  The prompt is the whole conversation, of which only what is new is read.
  """
  from flaxlm.chat.templates import load_chat
  from flaxlm.decoding.chat import Conversation
  from flaxlm.decoding.completions import complete_request, make_request
  from flaxlm.decoding.prefix_store import RowStore

  chat = None if args.no_chat else load_chat(run.path)
  if chat is None:
    if args.system is not None or args.tools is not None:
      raise ConfigError(
        f"{run.path} has no chat template", "leave out --system and --tools"
      )
    return None
  given = {"json": args.json, "beams": args.beams, "num_samples": args.num_samples > 1}
  if unread := [flag_of(name) for name, value in given.items() if value]:
    raise ConfigError(f"a chat has no {unread[0]}", "leave it out, or give --no-chat")
  conversation = Conversation(chat, run, args.system, args.tools)
  past = RowStore(run.model.cfg)

  def answer(line: str) -> None:
    pieces: list[str] = []

    def show(_: int, piece: str) -> None:
      pieces.append(piece)
      print(piece, end="", file=out, flush=True)

    prompt = conversation.ask(line, args.max_new_tokens)
    if prompt.num_dropped:
      print(
        f"the conversation is longer than model.context={run.model.cfg.context}: "
        f"turns dropped, from the oldest: {prompt.num_dropped}",
        file=sys.stderr,
      )
    text = [prompt.text]
    request = make_request(run, text, args.max_new_tokens, has_specials=True)
    try:
      complete_request(run, request, text, [settings], stop, show, past)
    finally:
      print(file=out, flush=True)
      conversation.answer("".join(pieces))

  return answer


# -- What it prints ------------------------------------------------------------------------


def print_completions(
  run: Any,
  prompts: list[str],
  settings: Any,
  stop: Any,
  args: argparse.Namespace,
  out: TextIO,
) -> None:
  """Completes prompts and prints the results; a single one is printed as it grows."""
  from flaxlm.decoding.completions import complete_samples, search

  streams = len(prompts) * args.num_samples == 1 and not args.json
  show = lambda _, piece: print(piece, end="", file=out, flush=True)
  reads_prompt = run.cfg.model.family == "encoder_decoder"
  if streams and not reads_prompt:
    show(0, prompts[0])
  if args.beams is not None:
    alpha = DEFAULT_LENGTH_PENALTY if args.length_penalty is None else args.length_penalty
    results = search(run, prompts, args.beams, alpha, args.max_new_tokens, args.num_samples)
    if streams:
      show(0, results[0].completion)
  else:
    results = complete_samples(
      run,
      prompts,
      settings,
      args.num_samples,
      args.max_new_tokens,
      stop,
      on_text=show if streams else None,
      num_top=args.top_logprobs or 0,
    )
  arrow = "\n=> " if reads_prompt else ""
  for number, result in enumerate(results, 1):
    if args.json:
      print(to_json(result.as_json()), file=out)
    elif streams:
      print(file=out)
    else:
      print(f"--- {number}\n{result.prompt}{arrow}{result.completion}", file=out)


def print_filled(run: Any, args: argparse.Namespace, out: TextIO) -> None:
  """Prints texts with their masks filled in, and the candidates for each mask."""
  from flaxlm.decoding.encoding import fill_masks

  for result in fill_masks(run, args.fill):
    if args.json:
      print(to_json(result._asdict()), file=out)
      continue
    print(result.filled, file=out)
    for number, candidates in enumerate(result.candidates, 1):
      shown = ", ".join(f"{token!r} {chance:.0%}" for token, chance in candidates)
      print(f"  mask {number}: {shown}", file=out)


@contextlib.contextmanager
def report_compilations(verbose: bool) -> Iterator[None]:
  """If `verbose`, prints on stderr how many programs were compiled meanwhile."""
  if not verbose:
    yield
    return
  from flaxlm.decoding.compile_counter import count_compilations

  with count_compilations() as counter:
    yield
  print(counter, file=sys.stderr)
