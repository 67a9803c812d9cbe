# SPDX-License-Identifier: Apache-2.0
"""The output options that the measurements in this folder share."""

import argparse
from collections.abc import Sequence

from flaxlm.benchmark.report import Result, print_json, print_results
from flaxlm.commands.parsing import open_output


def add_output(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--json", action="store_true", help="one JSON object per figure")
  parser.add_argument("--output", help="a file to write; .jsonl: JSON lines")


def write(results: Sequence[Result], args: argparse.Namespace) -> None:
  """Prints a table or JSON lines, to `--output` or to stdout."""
  in_json = args.json or (args.output or "").endswith((".json", ".jsonl"))
  with open_output(args.output) as out:
    (print_json if in_json else print_results)(results, out)
