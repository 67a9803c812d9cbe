# SPDX-License-Identifier: Apache-2.0
"""The command line: parses, and calls one function per command.

Each command imports what it needs when it runs, so that --help is instant.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import traceback
import typing
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal

from flaxlm import __version__
from flaxlm.configfile import knobs, load_config, override
from flaxlm.errors import (
  INTERRUPTED,
  CheckpointError,
  ConfigError,
  FlaxLMError,
  OutOfMemoryError,
)

DEFAULT_CONFIG = "stdlib_tiny"


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs one command and returns its exit code (DESIGN: 0, 2-8, 75, 130)."""
  arguments = list(sys.argv[1:] if arguments is None else arguments)
  debug = os.environ.get("FLAXLM_DEBUG") == "1"
  # XLA reports two compiler hints as missing processor features, pages of it, each time
  # that it loads a program from the compile cache.
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  try:
    args, rest = build_parser().parse_known_args(arguments)
    if rest and not args.takes_overrides:
      raise ConfigError(f"unknown argument {rest[0]}", f"flaxlm {args.command} --help")
    return args.run(args, rest)
  except FlaxLMError as e:
    if debug:
      traceback.print_exc()
    print(f"flaxlm: {e}", file=sys.stderr)
    return e.exit_code
  except KeyboardInterrupt:
    return INTERRUPTED
  except BrokenPipeError:  # the reader of our output went away, as `| head` does
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - it must outlive us
    return 0
  except RuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e) or debug:
      raise
    error = OutOfMemoryError(
      f"out of device memory: {str(e).splitlines()[0]}",
      "lower --data.batch_size, raise --training.accumulation_steps, or "
      "use --training.remat=full",
    )
    print(f"flaxlm: {error}", file=sys.stderr)
    return error.exit_code


def build_parser() -> argparse.ArgumentParser:
  parser = Parser(prog="flaxlm", description="Language models in JAX and Flax.")
  parser.add_argument("--version", action="version", version=f"flaxlm {__version__}")
  commands = parser.add_subparsers(
    dest="command", required=True, metavar="COMMAND", parser_class=Parser
  )
  for add in (
    *(add_train, add_infer, add_embed, add_eval),
    *(add_plan, add_ckpt, add_bench, add_import, add_export),
  ):
    add(commands)
  return parser


class Parser(argparse.ArgumentParser):
  """argparse whose errors are ours: one line of cause, one of cure, exit code 2."""

  def __init__(self, *args: Any, **kwargs: Any):
    super().__init__(*args, **{"allow_abbrev": False, **kwargs})
    self.set_defaults(takes_overrides=False)

  def error(self, message: str) -> typing.NoReturn:
    raise ConfigError(message, f"{self.prog} --help")


# -- train -------------------------------------------------------------------------------


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
  # Not an argument: argparse would take the value of `--model.depth 2` for it.
  parser.set_defaults(run=run_train, takes_overrides=True)


def run_train(_: argparse.Namespace, arguments: list[str]) -> int:
  from flaxlm.training.loop import train

  return train(read_config(arguments))


def read_config(arguments: list[str]) -> Any:
  """The config of `[CONFIG] [--section.field=value ...]`, checked."""
  named = bool(arguments) and not arguments[0].startswith("--")
  base = load_config(arguments[0] if named else DEFAULT_CONFIG)
  cfg = override(base, arguments[1:] if named else arguments)
  cfg = dataclasses.replace(cfg, name=base.name if cfg.name is None else cfg.name)
  cfg.check()
  return cfg


def describe_knobs() -> str:
  """Every config field: how to spell it, its type and default, and what it means."""
  lines = ["config fields (--section.field=value):"]
  for name, kind, field in knobs():
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
    lines.append(f"  --{name}  {field.metadata['help']}  [{kind_text}, {text}]")
  return "\n".join(lines).replace("%", "%%")


# -- infer -------------------------------------------------------------------------------


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


def add_devices(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--mesh", default="data=-1", help="as in data=2,tensor=4")
  parser.add_argument("--simulated-devices", type=int, help="CPU only")


def open_run(args: argparse.Namespace, needs_text: bool = True) -> Any:
  """The run that the command line names, on the devices that it names."""
  from flaxlm.configfile import parse_mesh
  from flaxlm.data.sources import data_dir
  from flaxlm.decoding.runs import find_run, load_run
  from flaxlm.sharding import make_mesh, start_jax

  path = find_run(args.path, args.runs_dir)
  start_jax(args.simulated_devices, data_dir() / "xla")
  warn = lambda line: print(line, file=sys.stderr)
  return load_run(path, make_mesh(parse_mesh(args.mesh)), warn, needs_text)


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
    rules = (args.temperature, args.top_k, args.top_p, args.min_p, args.seed)
    return make_sampling(num_rows, *rules)

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


def read_text(path: str) -> str:
  """A file's text, or all of standard input for "-"."""
  try:
    return sys.stdin.read() if path == "-" else Path(path).read_text("utf-8")
  except (OSError, UnicodeDecodeError) as e:
    raise ConfigError(f"{path} cannot be read: {e}") from e


def read_lines() -> typing.Iterator[str]:
  """Prompts typed one by one, until the end of input."""
  while True:
    print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
      return
    yield line.rstrip("\n")


def open_output(path: str | None) -> Any:
  """The file to write to, or stdout left open."""
  if path is None:
    return contextlib.nullcontext(sys.stdout)
  try:
    return Path(path).open("w", encoding="utf-8")
  except OSError as e:
    raise ConfigError(f"{path} cannot be written: {e}") from e


# -- embed -------------------------------------------------------------------------------


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


# -- eval --------------------------------------------------------------------------------


def add_eval(commands: Any) -> None:
  parser = commands.add_parser("eval", help="loss and bits per byte on held-out text")
  parser.add_argument("path", nargs="?", metavar="RUN", help="default: the newest run")
  parser.add_argument("--split", choices=("validation", "train"), default="validation")
  parser.add_argument("--corpus", help="default: the corpus that the run was trained on")
  parser.add_argument("--batches", type=int, help="at most so many; default: all")
  parser.add_argument(
    "--bleu", action="store_true", help="translate the split's pairs and score them"
  )
  parser.add_argument("--beams", type=int, default=4, help="bleu: beams of the search")
  parser.add_argument("--pairs", type=int, default=500, help="bleu: at most so many pairs")
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


# -- plan --------------------------------------------------------------------------------


def add_plan(commands: Any) -> None:
  parser = commands.add_parser(
    "plan",
    help="memory, time and cost of a config on a mesh of chips that you need not have",
    usage="flaxlm plan [CONFIG] [--mesh AXIS=SIZE,...] [--device NAME] [options] "
    "[--section.field=value ...]",
    description="CONFIG and its overrides are those of `flaxlm train`.",
  )
  parser.add_argument("--mesh", help="as in fsdp=8; an axis may be -1 with --devices")
  parser.add_argument("--device", help="as in h200 or v5e; none = no times, no verdict")
  parser.add_argument("--devices", type=int, metavar="N", help="how many there are")
  parser.add_argument("--compile", action="store_true", help="ask the real compiler too")
  parser.add_argument(
    "--search", action="store_true", help="every mesh, remat and accumulation, ranked"
  )
  parser.add_argument("--decode", action="store_true", help="speed of decoding as well")
  parser.add_argument("--batch", action="append", type=int, help="rows; may be repeated")
  parser.add_argument("--context", action="append", type=int, help="may be repeated")
  parser.add_argument("--tokens", type=float, help="to train on; none = 20 per parameter")
  parser.add_argument("--price", type=float, help="of one device for one hour")
  parser.add_argument("--json", action="store_true", help="one JSON object")
  parser.add_argument("--output", help="write to this file instead of stdout")
  parser.set_defaults(run=run_plan, takes_overrides=True)


def run_plan(args: argparse.Namespace, arguments: list[str]) -> int:
  from flaxlm.configfile import parse_mesh
  from flaxlm.planning.planner import Questions, plan
  from flaxlm.planning.report import print_report, to_json

  cfg = read_config(arguments)
  for name in ("devices", "tokens", "price", "batch", "context"):
    given = getattr(args, name)
    for value in given if isinstance(given, list) else [given]:
      if value is not None and value <= 0:
        raise ConfigError(f"{name} is {value}", "it is more than 0")
  questions = Questions(
    mesh=cfg.mesh if args.mesh is None else parse_mesh(args.mesh),
    device=args.device,
    num_devices=args.devices,
    compiled=args.compile,
    searched=args.search,
    batches=(args.batch or [1, 8, 64]) if args.decode else [],
    contexts=args.context,
    tokens=args.tokens,
    price=args.price,
  )
  report = plan(cfg, questions)
  with open_output(args.output) as out:
    if args.json:
      print(json.dumps(to_json(report)), file=out)
    else:
      print_report(report, out)
  return 0


# -- ckpt --------------------------------------------------------------------------------


def add_ckpt(commands: Any) -> None:
  parser = commands.add_parser("ckpt", help="what is stored, and whether it is whole")
  parser.add_argument("action", choices=("list", "verify"))
  parser.add_argument("path", nargs="?", metavar="RUN", help="default: the newest run")
  parser.add_argument("--json", action="store_true")
  parser.add_argument("--runs-dir", default="runs")
  parser.set_defaults(run=run_ckpt)


def run_ckpt(args: argparse.Namespace, _: list[str]) -> int:
  from flaxlm.checkpoint.manifest import damage, saved_steps
  from flaxlm.decoding.runs import CHECKPOINTS, find_run

  directory = find_run(args.path, args.runs_dir) / CHECKPOINTS
  whole = True
  for step in saved_steps(directory):
    files = [path for path in (directory / str(step)).rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    problems = damage(directory / str(step)) if args.action == "verify" else []
    whole &= not problems
    if args.json:
      print(json.dumps({"step": step, "bytes": size, "problems": problems}))
    else:
      verdict = {"list": "", "verify": "  whole"}[args.action]
      print(f"step {step:>8}  {size / 1e6:10.1f} MB{'' if problems else verdict}")
      for problem in problems:
        print(f"  {problem}")
  return 0 if whole else CheckpointError.exit_code


# -- bench -------------------------------------------------------------------------------


def add_bench(commands: Any) -> None:
  parser = commands.add_parser("bench", help="achieved speed on this machine")
  parser.add_argument("suite", choices=("train", "families"))
  parser.add_argument("--vs", choices=("torch",), help="a peer, measured in turn")
  parser.add_argument("--json", action="store_true", help="one JSON object per case")
  parser.add_argument("--output", help="write to this file instead of stdout")
  parser.set_defaults(run=run_bench)


def run_bench(args: argparse.Namespace, _: list[str]) -> int:
  from flaxlm.benchmark.report import print_results

  if args.suite == "families":
    if args.vs is not None:
      raise ConfigError("families have no peer", "leave --vs out")
    from flaxlm.benchmark.families import bench_families

    results = bench_families()
  else:
    from flaxlm.benchmark.train import bench_train

    results = bench_train(args.vs)
  with open_output(args.output) as out:
    print_results(results, args.json, out)
  return 0


# -- import, export ----------------------------------------------------------------------


def add_import(commands: Any) -> None:
  parser = commands.add_parser("import", help="a run from a Hugging Face checkpoint")
  parser.add_argument("folder", metavar="DIR", help="config.json and safetensors")
  parser.add_argument("path", metavar="RUN", help="the run directory to make")
  add_dtype(parser, "default: the checkpoint's")
  add_devices(parser)
  parser.set_defaults(run=run_import)


def add_dtype(parser: argparse.ArgumentParser, default: str) -> None:
  choices = ("float32", "bfloat16")
  parser.add_argument("--dtype", choices=choices, help=f"of the parameters; {default}")


def run_import(args: argparse.Namespace, _: list[str]) -> int:
  from flaxlm.configfile import parse_mesh
  from flaxlm.data.sources import data_dir
  from flaxlm.interop.transfer import import_run
  from flaxlm.sharding import make_mesh, start_jax

  start_jax(args.simulated_devices, data_dir() / "xla")
  mesh = make_mesh(parse_mesh(args.mesh))
  loaded, notes = import_run(Path(args.folder), Path(args.path), mesh, args.dtype)
  for note in notes:
    print(note, file=sys.stderr)
  family = loaded.family.model_type
  print(f"{args.path}: {family}, {loaded.num_parameters:,} parameters in {loaded.dtype}")
  return 0


def add_export(commands: Any) -> None:
  parser = commands.add_parser("export", help="a run as a Hugging Face checkpoint")
  parser.add_argument("path", metavar="RUN")
  parser.add_argument("folder", metavar="DIR", help="the directory to make")
  add_dtype(parser, "default: the run's")
  parser.add_argument("--shard-size", default="5GB", help="most of a file (default: 5GB)")
  parser.add_argument("--runs-dir", default="runs")
  add_devices(parser)
  parser.set_defaults(run=run_export)


def run_export(args: argparse.Namespace, _: list[str]) -> int:
  most = parse_size(args.shard_size)
  run = open_run(args, needs_text=False)

  from flaxlm.interop.transfer import export_run

  family = export_run(run, Path(args.folder), args.dtype, most)
  print(f"{args.folder}: {family.model_type} ({family.architectures[0]})")
  return 0


def parse_size(text: str) -> int:
  """`5GB` -> 5,000,000,000 bytes."""
  units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
  number, unit = text[: -len(text.lstrip("0123456789"))] or text, text.lstrip("0123456789")
  if not number.isdecimal() or (unit and unit.upper() not in units) or int(number) < 1:
    raise ConfigError(f"shard-size is {text!r}", "as in 500MB, 5GB or 4GiB")
  return int(number) * units.get(unit.upper(), 1)


if __name__ == "__main__":
  sys.exit(main())
