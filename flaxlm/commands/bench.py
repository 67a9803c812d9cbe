# SPDX-License-Identifier: Apache-2.0
"""`flaxlm bench` and `flaxlm bench compare`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from flaxlm.commands.parsing import check_least, open_output
from flaxlm.errors import ConfigError
from flaxlm.strict_json import to_json

SUITES = {
  "matmul": "matrix products: square ones, a model's shapes, by dtype",
  "memory": "passes over arrays of growing size; transfers to the device and back",
  "collectives": "bus bandwidth by kind, mesh axis and size (--mesh, --simulated-devices)",
  "attention": "by path, forward and backward",
  "loss": "hidden vectors to logits to cross-entropy, by vocabulary",
  "optimizer": "an optimizer's update alone, by rule",
  "train": "training steps, in fresh processes",
  "decode": "prefill and decoding, by batch",
  "data": "training a tokenizer, encoding, and batches, on the host",
  "compile": "from a fresh process to its first step, without and with the compile cache",
}
# Former suites, which are now in the source's folder benchmarks/, for developers.
MOVED = ("families", "predictions")
DESCRIPTION = """Measures this machine against its published peak and its own limits: the
best matrix product and the memory bandwidth of the same run. Figures are medians over
rounds, with their range; every result is checked before its speed counts."""
PROCESSES = 3  # the fewest whose range says how much they differ
JSON_LINES, PAGES = (".json", ".jsonl"), (".html", ".htm")  # by the name of --output
SIZES = ("tiny", "small", "large")


def add_bench(commands: Any) -> None:
  rows = [f"  {name:12} {text}" for name, text in SUITES.items()]
  epilog = "\n".join(
    [
      "suites (none, or `all`, runs all of them):",
      *rows,
      "",
      "flaxlm bench compare A B compares two files of --json lines. Exit status 1: a case",
      "became slower by more than --threshold, beyond the ranges of both, and by more than",
      "the processes of either file differ; else 0.",
    ]
  )
  parser = commands.add_parser(
    "bench",
    help="the speed of this machine, against its limits",
    usage="flaxlm bench [SUITE ...] [options] | flaxlm bench compare A B [options]",
    description=DESCRIPTION,
    epilog=epilog,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("what", nargs="*", metavar="SUITE")
  flag = parser.add_flag
  peers = ("torch", "llama.cpp")
  flag("--vs", peers, "measure this peer too, in the suites that support it")
  flag("--json", bool, "one JSON object per figure")
  flag(
    "--output", str, "a file to write; .jsonl: JSON lines, .html: a page with a roofline"
  )
  text = f"fresh processes that measure all; default: {PROCESSES} for JSON lines, which "
  flag("--processes", int, f"{text}compare reads, else 1", metavar="N")
  flag("--rounds", int, "rounds of each case; default: 5", default=5)
  flag("--size", SIZES, "size of the cases; default: small on a CPU, else large")
  text = "compare: relative changes to ignore; default: 0.05"
  flag("--threshold", float, text, default=0.05)
  flag("--any-device", bool, "compare: also files from different devices")
  parser.add_devices()
  parser.set_defaults(run=run_bench)


def run_bench(args: argparse.Namespace, _: list[str]) -> int:
  what = args.what or ["all"]
  if what[0] == "compare":
    return run_compare(args, what[1:])
  if "all" in what:
    what = list(SUITES)
  for name in what:
    if name in MOVED:
      raise ConfigError(
        f"{name} is not a suite any more",
        f"python -m benchmarks.{name}, in a checkout of the source",
      )
    if name not in SUITES:
      raise ConfigError(f"unknown suite {name!r}", f"all, compare, {', '.join(SUITES)}")
  check_least(args, 1, "rounds", "processes")
  suffix = Path(args.output or "").suffix
  lines = suffix in JSON_LINES or (args.json and suffix not in PAGES)
  number = args.processes or (PROCESSES if lines else 1)
  if number > 1 and not lines:
    raise ConfigError(
      f"processes is {number}, but one page or table is of one process",
      "add --json or --output F.jsonl",
    )

  if number > 1:
    return repeat(args, what, number)

  from flaxlm.config import parse_mesh
  from flaxlm.platform import start_jax

  start_jax(args.simulated_devices)

  from flaxlm.benchmark.measure import BenchOptions
  from flaxlm.benchmark.suites.run import default_size, run_suites

  options = BenchOptions(
    size=args.size or default_size(),
    rounds=args.rounds,
    peer=args.vs,
    mesh=parse_mesh(args.mesh),
  )
  log = lambda line: print(line, file=sys.stderr)
  with open_output(args.output) as out:  # opened first: a bad path fails before the work
    results, ceilings = run_suites(what, options, log)
    write(results, ceilings, args, out)
  return 0


def repeat(args: argparse.Namespace, what: list[str], number: int) -> int:
  from flaxlm.benchmark.repeat import measure_in_processes
  from flaxlm.benchmark.report import print_json
  from flaxlm.benchmark.suites.run import check_peer

  check_peer(what, args.vs)
  options = {
    "rounds": args.rounds,
    "size": args.size,
    "vs": args.vs,
    "mesh": args.mesh,
    "simulated-devices": args.simulated_devices,
  }
  given = [f"--{name}={value}" for name, value in options.items() if value is not None]
  log = lambda line: print(line, file=sys.stderr)
  with open_output(args.output) as out:
    print_json(measure_in_processes(number, [*what, *given], log), out)
  return 0


def write(results: Any, ceilings: Any, args: argparse.Namespace, out: Any) -> None:
  from flaxlm.benchmark.ceilings import this_device
  from flaxlm.benchmark.page import bench_view
  from flaxlm.benchmark.report import print_json, print_results
  from flaxlm.look.page import to_html

  suffix = Path(args.output or "").suffix
  if suffix in PAGES:
    out.write(to_html(bench_view(results, ceilings, this_device())))
  elif args.json or suffix in JSON_LINES:
    print_json(results, out)
  else:
    print_results(results, out)


def run_compare(args: argparse.Namespace, paths: list[str]) -> int:
  if len(paths) != 2:
    raise ConfigError(f"compare takes two files, not {len(paths)}", "compare A B")
  if not 0 <= args.threshold < 1:
    raise ConfigError(
      f"threshold is {args.threshold}", "it must be at least 0 and below 1, like 0.05"
    )

  from flaxlm.benchmark.compare import (
    SLOWER,
    as_values,
    compare_files,
    print_verdicts,
    unrepeated,
  )

  before, after = map(Path, paths)
  verdicts = compare_files(before, after, args.threshold, args.any_device)
  for path in unrepeated(before, after):
    print(
      f"{path} is of one process: how much processes differ is not known, and may be what "
      f"is found here; flaxlm bench --json --processes {PROCESSES} tells it",
      file=sys.stderr,
    )
  with open_output(args.output) as out:
    if args.json:
      for verdict in verdicts:
        print(to_json(as_values(verdict)), file=out)
    else:
      print_verdicts(verdicts, out)
  return SLOWER if any(verdict.word == "slower" for verdict in verdicts) else 0
