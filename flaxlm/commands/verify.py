# SPDX-License-Identifier: Apache-2.0
"""`flaxlm verify`: the laws of docs/design.md on a config, shrunk, on simulated devices."""

import argparse
import dataclasses
import math
import sys
from typing import Any

from flaxlm.commands.parsing import EXECUTED, read_config, write_result


def add_verify(commands: Any) -> None:
  parser = commands.add_parser(
    "verify",
    help="checks what a model must obey on a config of yours, shrunk, on this CPU",
    usage="flaxlm verify [CONFIG] [--mesh AXIS=SIZE,...] [options] "
    "[--section.field=value ...]",
    description="CONFIG and its overrides are those of `flaxlm train`. Its model is shrunk "
    "by a rule that is printed, and every law is checked on simulated CPU devices. Exit "
    f"status 1: a law fails. {EXECUTED}",
  )
  parser.add_flag(
    "--mesh", str, "as in fsdp=2,tensor=2; of more than 8 devices: 2 along each axis"
  )
  parser.add_flag("--law", list[str], 'only this one, as in "cached"')
  parser.add_output("one JSON list: law, result, largest_error, seconds")
  parser.set_defaults(run=run_verify, takes_overrides=True)


def run_verify(args: argparse.Namespace, arguments: list[str]) -> int:
  from flaxlm.config import parse_mesh
  from flaxlm.data.storage import data_dir
  from flaxlm.planning.planner import resolve
  from flaxlm.platform import compile_quickly, start_jax
  from flaxlm.verify.laws import FAILS, check_laws, choose_laws, print_results
  from flaxlm.verify.shrink import MOST_DEVICES, shrink_mesh

  laws = choose_laws(args.law)
  cfg = resolve(read_config(arguments))
  if args.mesh is not None:
    cfg = dataclasses.replace(cfg, mesh=parse_mesh(args.mesh))
  devices = math.prod(shrink_mesh(cfg.mesh, cfg.model).values())
  start_jax(max(devices, MOST_DEVICES), data_dir() / "xla")
  compile_quickly()
  results = check_laws(cfg, lambda line: print(line, file=sys.stderr), laws)
  values = [dataclasses.asdict(result) for result in results]
  write_result(args, values, lambda out: print_results(results, out))
  return int(any(result.result == FAILS for result in results))
