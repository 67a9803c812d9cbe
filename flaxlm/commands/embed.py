# SPDX-License-Identifier: Apache-2.0
"""`flaxlm embed`: sentence embeddings from an encoder."""

import argparse
from typing import Any

from flaxlm.commands.parsing import open_output, open_run
from flaxlm.errors import ConfigError
from flaxlm.strict_json import to_json


def add_embed(commands: Any) -> None:
  parser = commands.add_parser("embed", help="sentence embeddings from an encoder's run")
  parser.add_run()
  parser.add_flag("--text", list[str], "a text to embed")
  parser.add_flag("--normalise", bool, "scale to length 1")
  parser.add_output("one JSON object per text")
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
        print(to_json({"text": text, "embedding": values}), file=out)
      else:
        print(" ".join(f"{x:.6g}" for x in values), file=out)
  return 0
