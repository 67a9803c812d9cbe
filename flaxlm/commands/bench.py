# SPDX-License-Identifier: Apache-2.0
"""`flaxlm bench` and `flaxlm bench compare`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from flaxlm.commands.parsing import add_devices, open_output
from flaxlm.errors import ConfigError

SUITES = {
  "matmul": "matrix products: square ones, a model's shapes, by dtype",
  "memory": "passes over arrays of growing size; host to device and back",
  "collectives": "bus bandwidth by kind, mesh axis and size (--mesh, --simulated-devices)",
  "attention": "by path, forward and backward",
  "loss": "hidden vectors to logits to cross-entropy, by vocabulary",
  "optimizer": "the update alone, by rule",
  "train": "a training step, in fresh processes",
  "decode": "prompts and answers, by batch",
  "data": "tokenizers and Grain's batches, on the host",
  "compile": "a fresh process's way to its first step, cold and from the compile cache",
  "predictions": "what the planner predicts from this run's ceilings, and the clock",
  "families": "decoder, RNN, encoder, encoder-decoder trained and compared (minutes)",
}
DESCRIPTION = """Measures what this machine achieves, of its published peak and of its own
measured limits: best matrix product and memory bandwidth of the same run. Figures are
medians over rounds, with their range; each is checked for correctness before it counts."""
SIZES = ("tiny", "small", "large")


def add_bench(commands: Any) -> None:
  rows = [f"  {name:12} {text}" for name, text in SUITES.items()]
  epilog = "\n".join(
    [
      "suites (none or `all` = all but families):",
      *rows,
      "",
      "flaxlm bench compare A B: two files of --json lines. Exit status 0: nothing became",
      "slower; 1: something did, beyond the ranges of both and --threshold.",
    ]
  )
  parser = commands.add_parser(
    "bench",
    help="achieved speed on this machine",
    usage="flaxlm bench [SUITE ...] [options] | flaxlm bench compare A B [options]",
    description=DESCRIPTION,
    epilog=epilog,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("what", nargs="*", metavar="SUITE")
  parser.add_argument(
    "--vs", choices=("torch", "llama.cpp"), help="a peer, measured in turn where it can"
  )
  parser.add_argument("--json", action="store_true", help="one JSON object per figure")
  parser.add_argument(
    "--output", help="write here; FILE.jsonl: JSON lines, FILE.html: a page with a roofline"
  )
  parser.add_argument("--rounds", type=int, default=5, help="of each case; default: 5")
  parser.add_argument(
    "--size", choices=SIZES, help="of the cases; default: small on a CPU, else large"
  )
  parser.add_argument(
    "--threshold", type=float, default=0.05, help="compare: changes that are none; 0.05"
  )
  parser.add_argument(
    "--any-device", action="store_true", help="compare: figures of different devices too"
  )
  add_devices(parser)
  parser.set_defaults(run=run_bench)


def run_bench(args: argparse.Namespace, _: list[str]) -> int:
  what = args.what or ["all"]
  if what[0] == "compare":
    return run_compare(args, what[1:])
  if "all" in what:
    what = [name for name in SUITES if name != "families"]
  for name in what:
    if name not in SUITES:
      raise ConfigError(f"unknown suite {name!r}", f"all, compare, {', '.join(SUITES)}")
  if args.rounds < 1:
    raise ConfigError(f"rounds is {args.rounds}", "it is at least 1")

  from flaxlm.config import parse_mesh
  from flaxlm.platform import start_jax

  start_jax(args.simulated_devices)

  from flaxlm.benchmark.measure import Setting
  from flaxlm.benchmark.suites import default_size, run_suites

  setting = Setting(
    size=args.size or default_size(),  # type: ignore[arg-type]
    rounds=args.rounds,
    peer=args.vs,
    mesh=parse_mesh(args.mesh),
  )
  log = lambda line: print(line, file=sys.stderr)
  with open_output(args.output) as out:  # before minutes of work
    write(*run_suites(what, setting, log), args, out)
  return 0


def write(results: Any, ceilings: Any, args: argparse.Namespace, out: Any) -> None:
  from flaxlm.benchmark.ceilings import this_device
  from flaxlm.benchmark.page import render
  from flaxlm.benchmark.report import print_json, print_results

  suffix = Path(args.output or "").suffix
  if suffix in (".html", ".htm"):
    out.write(render(results, ceilings, this_device()))
  elif args.json or suffix in (".json", ".jsonl"):
    print_json(results, out)
  else:
    print_results(results, out)


def run_compare(args: argparse.Namespace, paths: list[str]) -> int:
  if len(paths) != 2:
    raise ConfigError(f"compare takes two files, not {len(paths)}", "compare A B")
  if not 0 <= args.threshold < 1:
    raise ConfigError(f"threshold is {args.threshold}", "it is a share, as 0.05")

  from flaxlm.benchmark.compare import SLOWER, as_values, compare_files, print_verdicts

  before, after = map(Path, paths)
  verdicts = compare_files(before, after, args.threshold, args.any_device)
  with open_output(args.output) as out:
    if args.json:
      for verdict in verdicts:
        print(json.dumps(as_values(verdict)), file=out)
    else:
      print_verdicts(verdicts, out)
  return SLOWER if any(verdict.word == "slower" for verdict in verdicts) else 0
