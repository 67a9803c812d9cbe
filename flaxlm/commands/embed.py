# SPDX-License-Identifier: Apache-2.0
"""`flaxlm embed`: sentence embeddings from an encoder."""

import argparse
import json
import sys
from typing import Any

from flaxlm.commands.parsing import open_output, open_run, read_text
from flaxlm.errors import ConfigError
from flaxlm.strict_json import to_json


def add_embed(commands: Any) -> None:
  parser = commands.add_parser("embed", help="sentence embeddings from an encoder's run")
  parser.add_run()
  parser.add_flag("--text", list[str], "a text to embed")
  text = "a text a line, or - for stdin; FILE.jsonl: an object with a `text` a line"
  parser.add_flag("--text-file", str, text, metavar="FILE")
  parser.add_flag("--normalise", bool, "scale to length 1")
  parser.add_output("one JSON object per text")
  parser.set_defaults(run=run_embed)


def read_texts(path: str) -> list[str]:
  """The texts of a file, a line each; of a .jsonl file, those under `text`."""
  lines = read_text(path).removesuffix("\n").split("\n")
  lines = [line.removesuffix("\r") for line in lines]
  for number, line in enumerate(lines, 1):
    if path.endswith(".jsonl"):
      try:
        value = json.loads(line)
        line = value["text"]
      except (ValueError, RecursionError, KeyError, TypeError):
        line = ""
      if not isinstance(line, str) or not line:
        raise ConfigError(f"{path}: line {number} has no text", 'as in {"text": "a cat"}')
      lines[number - 1] = line
    elif not line.strip():
      raise ConfigError(f"{path}: line {number} is empty", "each line is a text")
  return lines


def run_embed(args: argparse.Namespace, _: list[str]) -> int:
  texts = args.text + (read_texts(args.text_file) if args.text_file else [])
  if not texts:
    raise ConfigError("there is no text", 'give --text "..." or --text-file')
  run = open_run(args)

  from flaxlm.decoding.encoding import embed_texts

  warn = lambda line: print(line, file=sys.stderr)
  vectors = embed_texts(run, texts, args.normalise, warn)
  with open_output(args.output) as out:
    for text, vector_D in zip(texts, vectors, strict=True):
      values = [float(x) for x in vector_D]
      if args.json:
        print(to_json({"text": text, "embedding": values}), file=out)
      else:
        print(" ".join(f"{x:.6g}" for x in values), file=out)
  return 0
