# SPDX-License-Identifier: Apache-2.0
"""`flaxlm launch`: several processes of one job on this machine."""

import argparse
import sys
from typing import Any

from flaxlm.commands.parsing import EXECUTED, check_least
from flaxlm.errors import ConfigError

MOST_PROCESSES = 1024  # on one machine


def add_launch(commands: Any) -> None:
  parser = commands.add_parser(
    "launch",
    help="train with several processes on this machine",
    usage="flaxlm launch --processes N -- train [CONFIG] [--section.field=value ...]",
    description="Starts N processes of one job, which share this machine's GPUs. With "
    "--simulated-devices=M, each of them has M devices. If one fails, all are ended. For "
    "several machines see docs/launch/. " + EXECUTED,
  )
  parser.add_flag("--processes", int, required=True, metavar="N")
  parser.add_flag("--grace-seconds", float, "from SIGTERM to SIGKILL", default=10.0)
  parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- train ...")
  parser.set_defaults(run=run_launch)


def run_launch(args: argparse.Namespace, _: list[str]) -> int:
  from flaxlm.distributed.launcher import launch

  arguments = args.arguments[args.arguments[:1] == ["--"] :]
  check_least(args, 1, "processes", most=MOST_PROCESSES)
  check_least(args, 0, "grace_seconds")
  if not arguments or arguments[0] != "train":
    what = f"{arguments[0]} does not" if arguments else "nothing to"
    raise ConfigError(
      f"{what} run as several processes",
      f"flaxlm launch --processes {args.processes} -- train ...",
    )
  command = [sys.executable, "-m", "flaxlm.cli", *arguments]
  return launch(command, args.processes, args.grace_seconds)
