# SPDX-License-Identifier: Apache-2.0
"""`flaxlm tokenizer train`, `compare` and `encode`."""

import argparse
import dataclasses
import functools
import math
import re
import time
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flaxlm.commands.parsing import Parser, open_output, read_text
from flaxlm.config import Config, TokenizerConfig, check_config, is_file
from flaxlm.errors import ConfigError
from flaxlm.strict_json import to_json

COMPARED_BYTES = 2**22  # of held-out text, at most
SOURCES = "a tokenizer.json, a run, or byte or bpe:SIZE, trained on the corpus"
HEADINGS = "      ids      tokens bytes/token tokens/word ids used    MB/s lossless"


def add_tokenizer(commands: Any) -> None:
  parser = commands.add_parser("tokenizer", help="train, compare and try tokenizers")
  actions = parser.add_subparsers(
    dest="action", required=True, metavar="ACTION", parser_class=Parser
  )
  made = actions.add_parser("train", help="train on a corpus, and write a tokenizer.json")
  made.add_flag("--kind", kinds(), "default: bpe", default="bpe")
  made.add_flag("--vocab-size", int, "default: that of tokenizer.vocab_size")
  made.add_flag("--output", str, "default: tokenizer.json", default="tokenizer.json")
  made.set_defaults(run=run_train)
  text = "compare tokenizers on the same held-out text"
  compare = actions.add_parser("compare", help=text)
  compare.add_argument("tokenizers", nargs="+", metavar="TOKENIZER", help=SOURCES)
  compare.add_output("one JSON object per tokenizer")
  compare.set_defaults(run=run_compare)
  text = "print the ids of a text, and what each stands for"
  encode = actions.add_parser("encode", help=text)
  encode.add_argument("tokenizer", metavar="TOKENIZER", help=SOURCES)
  encode.add_flag("--text", str, "- for standard input", required=True)
  encode.add_flag("--json", bool, "one JSON object")
  encode.set_defaults(run=run_encode)
  text = "a corpus, as in data.corpus; default: stdlib"
  for action in (made, compare, encode):
    action.add_flag("--corpus", str, text, default="stdlib")


def kinds() -> tuple[str, ...]:
  """The kinds of tokenizers that can be trained."""
  return typing.get_args(typing.get_type_hints(TokenizerConfig)["kind"])


def run_train(args: argparse.Namespace, _: list[str]) -> int:
  tokenizer = train(corpus_of(args), args.kind, args.vocab_size, "--vocab-size")
  with open_output(args.output) as file:
    file.write(tokenizer.to_json())
  print(f"{args.output}: {args.kind}, {tokenizer.vocab_size:,} ids of {args.corpus}")
  return 0


def run_compare(args: argparse.Namespace, _: list[str]) -> int:
  from flaxlm.data.prepare import held_out_texts

  corpus = corpus_of(args)
  found = {name: find_tokenizer(name, corpus) for name in args.tokenizers}
  texts = held_out_texts(corpus(), COMPARED_BYTES)
  size = sum(map(num_bytes, texts))
  of = {"corpus": args.corpus, "split": "validation", "bytes": size}
  rows = [{"tokenizer": name} | measure(found[name], texts, size) | of for name in found]
  with open_output(args.output) as file:
    if args.json:
      file.writelines(to_json(row) + "\n" for row in rows)
      return 0
    first = "the first " if size >= COMPARED_BYTES else ""
    print(
      f"{first}{size:,} bytes of what {args.corpus} holds out (its split validation)",
      file=file,
    )
    width = max(9, *map(len, found))
    print(f"{'tokenizer':{width}} {HEADINGS}", file=file)
    for row in rows:
      whole = "yes" if row["lossless"] else "no"
      print(
        f"{row['tokenizer']:{width}} {row['vocab_size']:9,} {row['tokens']:11,}"
        f" {row['bytes_per_token']:11.3f} {row['tokens_per_word']:11.3f}"
        f" {row['ids_used']:8.1%} {row['megabytes_per_second']:7.1f} {whole:>8}",
        file=file,
      )
  return 0


def run_encode(args: argparse.Namespace, _: list[str]) -> int:
  from flaxlm.look.pieces import describe

  tokenizer = find_tokenizer(args.tokenizer, corpus_of(args))
  text = read_text("-") if args.text == "-" else args.text
  ids = tokenizer.encode(text)
  pieces = describe(tokenizer, ids)
  if args.json:
    print(to_json({"text": text, "ids": ids, "pieces": [p.label for p in pieces]}))
    return 0
  for piece in pieces:
    print(f"{piece.id:>8}  {piece.label:20}  {piece.hex}".rstrip())
  print(f"{len(ids)} tokens, {num_bytes(text)} bytes, {len(text)} characters")
  return 0


def corpus_of(args: argparse.Namespace) -> Callable[[], Any]:
  """A function that finds the corpus of the command line, at its first call only."""
  from flaxlm.data.sources import find_corpus

  return functools.cache(lambda: find_corpus(args.corpus))


def find_tokenizer(name: str, corpus: Callable[[], Any]) -> Any:
  """The tokenizer of a file or a run, or one trained on the corpus.

  Raises `ConfigError` for a name that is none of these, `DataError` for a damaged file.
  """
  from flaxlm.tokenizers import load_tokenizer

  path = Path(name)
  for file in (path, path / "tokenizer.json"):
    if is_file(file):
      return load_tokenizer(file)
  kind, _, size = name.partition(":")
  if name == "byte" or (kind == "bpe" and re.fullmatch("[0-9]{1,18}", size)):
    return train(corpus, kind, int(size) if size else None, name)
  raise ConfigError(f"{name!r} is not a tokenizer", f"use {SOURCES}")


def train(
  corpus: Callable[[], Any], kind: Any, vocab_size: int | None, asked_by: str
) -> Any:
  """The tokenizer that training would use; cached as training caches it.

  `asked_by` is what the user wrote for the size. Raises `ConfigError`.
  """
  from flaxlm.data.prepare import corpus_tokenizer

  wanted = TokenizerConfig(kind=kind)
  if vocab_size is not None:
    wanted = dataclasses.replace(wanted, vocab_size=vocab_size)
  try:
    check_config(Config(tokenizer=wanted))
  except ConfigError as e:
    field = "tokenizer.vocab_size"
    causes = (text.replace(field, asked_by) for text in (e.cause, e.cure))
    raise ConfigError(*causes) from e
  return corpus_tokenizer(corpus(), wanted)


def num_bytes(text: str) -> int:
  return len(text.encode("utf-8", "replace"))


def measure(tokenizer: Any, texts: list[str], size: int) -> dict[str, Any]:
  """How a tokenizer does on texts of `size` bytes: tokens, ids used, speed, and whether
  decoding gives the text again."""
  start = time.perf_counter()
  encoded = tokenizer.encode_batch(texts)
  seconds = time.perf_counter() - start
  num_tokens = sum(map(len, encoded))
  used = len(set().union(*(ids.tolist() for ids in encoded)))
  pairs = zip(texts, encoded, strict=True)
  return {
    "vocab_size": tokenizer.vocab_size,
    "tokens": num_tokens,
    "bytes_per_token": size / num_tokens if num_tokens else math.inf,
    "tokens_per_word": num_tokens / max(1, sum(len(text.split()) for text in texts)),
    "ids_used": used / tokenizer.vocab_size,
    "megabytes_per_second": size / 1e6 / seconds,
    "lossless": all(tokenizer.decode(ids.tolist()) == text for text, ids in pairs),
  }
