# SPDX-License-Identifier: Apache-2.0
"""`flaxlm bench`."""

import argparse
from typing import Any

from flaxlm.commands.parsing import (
  open_output,
)
from flaxlm.errors import ConfigError


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
