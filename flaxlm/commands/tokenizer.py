# SPDX-License-Identifier: Apache-2.0
"""`flaxlm tokenizer train`, `compare`, `encode` and `merges`."""

import argparse
import dataclasses
import functools
import math
import re
import sys
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from flaxlm.commands.parsing import (
  Parser,
  check_least,
  open_output,
  read_config,
  read_text,
  write_result,
)
from flaxlm.config import Config, ModelConfig, TokenizerConfig, check_config, is_file
from flaxlm.errors import ConfigError
from flaxlm.strict_json import to_json

COMPARED_BYTES = 2**22  # of held-out text, at most
KINDS = typing.get_args(typing.get_type_hints(TokenizerConfig)["kind"])
SOURCES = (
  "a tokenizer.json, a SentencePiece model, a run, or a method, trained on the corpus: "
  f"{', '.join(KINDS)}, or with a size, as bpe:1024"
)
SENTENCE = "    return unbelievable[naïve] + 12345  # 漢字 🙂"
HEADINGS = (
  "      ids      tokens tokens/word tokens/byte unknown ids used    MB/s   embedding "
  "lossless"
)
COLOURS = ("black on cyan", "black on yellow", "black on green", "black on magenta")
UNKNOWN_COLOUR = "bold white on red"


def add_tokenizer(commands: Any) -> None:
  parser = commands.add_parser("tokenizer", help="train, compare and try tokenizers")
  actions = parser.add_subparsers(
    dest="action", required=True, metavar="ACTION", parser_class=Parser
  )
  made = actions.add_parser("train", help="train on a corpus, and write a tokenizer.json")
  made.add_flag("--kind", KINDS, "default: bpe", default="bpe")
  made.add_flag("--output", str, "default: tokenizer.json", default="tokenizer.json")
  made.set_defaults(run=run_train)
  add_compare(actions)
  text = "print the ids of a text, and what each stands for"
  encode = actions.add_parser("encode", help=text)
  encode.add_argument("tokenizer", metavar="TOKENIZER", help=SOURCES)
  encode.add_flag("--text", str, "- for standard input", required=True)
  encode.add_flag("--json", bool, "one JSON object")
  encode.set_defaults(run=run_encode)
  merges = actions.add_parser("merges", help="how BPE makes a word's tokens, step by step")
  merges.add_argument("word", metavar="WORD", help="as it stands in a text, blanks and all")
  merges.add_flag("--tokenizer", str, f"default: bpe; {SOURCES}", default="bpe")
  merges.add_output("one JSON object")
  merges.set_defaults(run=run_merges)
  for action in actions.choices.values():
    text = "a corpus, as in data.corpus; default: stdlib"
    action.add_flag("--corpus", str, text, default="stdlib")
    action.add_flag("--text-field", str, "that of records; default: text", default="text")
    text = "of a method without a size; default: that of tokenizer.vocab_size"
    action.add_flag("--vocab-size", int, text)


def add_compare(actions: Any) -> None:
  text = "one sentence under each tokenizer, and what each makes of the same held-out text"
  compare = actions.add_parser("compare", help=text)
  text = f"default: all methods; {SOURCES}"
  compare.add_argument("tokenizers", nargs="*", metavar="TOKENIZER", help=text)
  compare.add_flag("--text", str, "the sentence; - for standard input", default=SENTENCE)
  text = f"of the embedding that is counted; default: {ModelConfig().width}"
  compare.add_flag("--width", int, text, default=ModelConfig().width)
  text = (
    "train a small model with each for so long, and say how many bits per byte it needs; "
    "--section.field=value changes the model, which is that of stdlib_tiny"
  )
  compare.add_flag("--train-seconds", float, text)
  compare.add_output("one JSON object per tokenizer")
  compare.set_defaults(run=run_compare, takes_overrides=True)


def run_train(args: argparse.Namespace, _: list[str]) -> int:
  wanted = method(args.kind, args.vocab_size, "--vocab-size")
  tokenizer = Finder(args).make(wanted)
  with open_output(args.output) as file:
    file.write(tokenizer.to_json())
  note = f"; {tokenizer.note}" if tokenizer.note else ""
  print(f"{args.output}: {args.kind}, {tokenizer.vocab_size:,} ids of {args.corpus}{note}")
  return 0


def run_compare(args: argparse.Namespace, rest: list[str]) -> int:
  from flaxlm.data.prepare import held_out_texts
  from flaxlm.look.pieces import describe

  check_least(args, 1, "width")
  cfg = trial_config(args, rest)
  finder = Finder(args)
  wanted = {name: finder.wanted(name) for name in args.tokenizers or KINDS}
  found = {name: finder.make(wanted[name]) for name in wanted}
  for note in dict.fromkeys(tokenizer.note for tokenizer in found.values()):
    if note:
      print(note, file=sys.stderr)
  texts = held_out_texts(finder.parts(), COMPARED_BYTES)
  size = sum(map(num_bytes, texts))
  sentence = read_text("-") if args.text == "-" else args.text
  rows = []
  for name, tokenizer in found.items():
    row = {"tokenizer": name} | measure(tokenizer, texts, size, args.width)
    row |= {"corpus": args.corpus, "split": "validation", "bytes": size}
    row["pieces"] = [p.label for p in describe(tokenizer, tokenizer.encode(sentence))]
    if cfg is not None:
      row |= try_out(cfg, wanted[name], args.train_seconds)
    rows.append(row)
  with open_output(args.output) as file:
    if args.json:
      file.writelines(to_json(row) + "\n" for row in rows)
    else:
      show_sentence(file, sentence, found)
      show_table(file, rows)
  return 0


def run_encode(args: argparse.Namespace, _: list[str]) -> int:
  from flaxlm.look.pieces import describe

  tokenizer = Finder(args).find(args.tokenizer)
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


def run_merges(args: argparse.Namespace, _: list[str]) -> int:
  from flaxlm.look.pieces import spelled
  from flaxlm.tokenizers.merges import trace_merges

  tokenizer = Finder(args).find(args.tokenizer)
  words = trace_merges(tokenizer, args.word)
  shown = functools.partial(spelled, tokenizer)

  def show(out: TextIO) -> None:
    for word in words:
      print(f"{'':>8}  {' '.join(map(shown, word.pieces))}", file=out)
      for step in word.steps:
        pieces = " ".join(map(shown, step.pieces))
        pair = f"{shown(step.left)} + {shown(step.right)}"
        print(f"{step.rank:>8,}  {pieces}    ({pair})", file=out)
    print("the number of a merge is when it was learnt, from 0 on", file=out)

  values = [
    {
      "pieces": [shown(piece) for piece in word.pieces],
      "merges": [
        {"rank": s.rank, "pair": [shown(s.left), shown(s.right)],
         "pieces": [shown(piece) for piece in s.pieces]}
        for s in word.steps
      ],
    }
    for word in words
  ]  # fmt: skip
  write_result(args, {"text": args.word, "words": values}, show)
  return 0


# -- What the command line names -----------------------------------------------------------


class Finder:
  """Tokenizers of files, of runs, and of a corpus, which is found when it is needed."""

  def __init__(self, args: argparse.Namespace):
    from flaxlm.data.prepare import find_parts

    self.vocab_size = args.vocab_size
    self.parts: Callable[[], Any] = functools.cache(
      lambda: find_parts(args.corpus, text_field=args.text_field)
    )

  def find(self, name: str) -> Any:
    """The tokenizer of a name; what is guessed about it goes to stderr."""
    tokenizer = self.make(self.wanted(name))
    if tokenizer.note:
      print(tokenizer.note, file=sys.stderr)
    return tokenizer

  def wanted(self, name: str) -> TokenizerConfig:
    """What a name stands for: see `SOURCES`. Raises `ConfigError` for any other."""
    path = Path(name)
    for file in (path, path / "tokenizer.json"):
      if is_file(file):
        return TokenizerConfig(path=str(file))
    kind, colon, size = name.partition(":")
    sized = bool(colon) and kind != "byte" and re.fullmatch("[0-9]{1,18}", size)
    if kind not in KINDS or (colon and not sized):
      raise ConfigError(f"{name!r} is not a tokenizer", f"use {SOURCES}")
    return method(kind, int(size) if sized else self.vocab_size, name)

  def make(self, wanted: TokenizerConfig) -> Any:
    """Loads a tokenizer, or trains it as training would; it is cached as training does.

    Raises `DataError` for a damaged file.
    """
    from flaxlm.data.prepare import corpus_tokenizer
    from flaxlm.tokenizers import load_tokenizer

    if wanted.path is not None:
      return load_tokenizer(Path(wanted.path))
    return corpus_tokenizer(self.parts(), wanted)


def method(kind: Any, vocab_size: int | None, asked_by: str) -> TokenizerConfig:
  """A method with its size. `asked_by` is what the user wrote for the size.

  Raises `ConfigError` for a size that it cannot have.
  """
  wanted = TokenizerConfig(kind=kind)
  if vocab_size is not None:
    wanted = dataclasses.replace(wanted, vocab_size=vocab_size)
  try:
    check_config(Config(tokenizer=wanted))
  except ConfigError as e:
    field = "tokenizer.vocab_size"
    causes = (text.replace(field, asked_by) for text in (e.cause, e.cure))
    raise ConfigError(*causes) from e
  return wanted


# -- What is measured ----------------------------------------------------------------------


def num_bytes(text: str) -> int:
  return len(text.encode("utf-8", "replace"))


def measure(
  tokenizer: Any, texts: list[str], size: int, width: int = ModelConfig().width
) -> dict[str, Any]:
  """How a tokenizer does on texts of `size` bytes: tokens, unknown ones, ids used, speed,
  whether decoding gives the text again, and the embedding (V, width) that it asks for."""
  start = time.perf_counter()
  encoded = tokenizer.encode_batch(texts)
  seconds = time.perf_counter() - start
  num_tokens = sum(map(len, encoded))
  used = len(set().union(*(ids.tolist() for ids in encoded)))
  unknown = -1 if tokenizer.unknown_id is None else tokenizer.unknown_id
  num_unknown = sum(int((ids == unknown).sum()) for ids in encoded) if unknown >= 0 else 0
  pairs = zip(texts, encoded, strict=True)
  rows = ModelConfig().resolve(tokenizer.vocab_size).vocab_size
  assert rows is not None, "it is resolved"
  return {
    "vocab_size": tokenizer.vocab_size,
    "tokens": num_tokens,
    "bytes_per_token": size / num_tokens if num_tokens else math.inf,
    "tokens_per_byte": num_tokens / max(1, size),
    "tokens_per_word": num_tokens / max(1, sum(len(text.split()) for text in texts)),
    "unknown": num_unknown / max(1, num_tokens),
    "ids_used": used / tokenizer.vocab_size,
    "megabytes_per_second": size / 1e6 / seconds,
    "embedding": [rows, width],
    "embedding_parameters": rows * width,
    "lossless": all(tokenizer.decode(ids.tolist()) == text for text, ids in pairs),
  }


def trial_config(args: argparse.Namespace, rest: list[str]) -> Config | None:
  """The small model that --train-seconds asks for. Raises `ConfigError` for fields of a
  config without it, and for those that the command has flags for."""
  if args.train_seconds is None:
    args.parser.refuse_unknown(rest, False)
    return None
  if not 0 < args.train_seconds < math.inf:
    raise ConfigError(f"--train-seconds is {args.train_seconds}", "it must be above 0")
  decided = ("__data.corpus", "__data.text_field", "__data.deduplicate")
  for word in rest:
    name = word.partition("=")[0].replace("-", "_")
    if name.startswith("__tokenizer.") or name in decided:
      raise ConfigError(
        f"{word} is what `tokenizer compare` decides",
        "name tokenizers, and use --corpus and --text-field",
      )
  cfg = read_config(rest)
  if cfg.data.objective != "next_token":
    raise ConfigError(
      f"data.objective={cfg.data.objective} has no bits per byte", "compare by next_token"
    )
  data = dataclasses.replace(cfg.data, corpus=args.corpus, text_field=args.text_field)
  return dataclasses.replace(cfg, data=data)


def try_out(cfg: Config, wanted: TokenizerConfig, seconds: float) -> dict[str, Any]:
  """What a small model reaches with a tokenizer in so many seconds."""
  from flaxlm.training.trial import train_for

  log = lambda line: print(line, file=sys.stderr)
  trial = train_for(dataclasses.replace(cfg, tokenizer=wanted), seconds, log)
  return {
    "train_seconds": seconds,
    "bits_per_byte": trial.bits_per_byte,
    "loss": trial.loss,
    "steps": trial.num_steps,
    "parameters": trial.num_parameters,
  }


# -- What is shown -------------------------------------------------------------------------


def show_sentence(file: TextIO, sentence: str, found: dict[str, Any]) -> None:
  """The sentence under each tokenizer: coloured on a terminal, else with | between."""
  from rich.console import Console
  from rich.text import Text

  from flaxlm.look.pieces import describe

  console = Console(file=file, highlight=False, soft_wrap=True)
  width = max(9, *map(len, found))
  for name, tokenizer in found.items():
    ids = tokenizer.encode(sentence)
    labels = [piece.label for piece in describe(tokenizer, ids)]
    line = Text(f"{name:{width}} {len(ids):4} ")
    for part, colour in colours(labels, ids, tokenizer.unknown_id, console.is_terminal):
      line.append(part, colour)
    console.print(line)
  console.print()


def colours(
  labels: Sequence[str], ids: Sequence[int], unknown: int | None, coloured: bool
) -> Iterator[tuple[str, str | None]]:
  """The parts of a line, and the style of each."""
  for number, (label, id_) in enumerate(zip(labels, ids, strict=True)):
    if coloured:
      yield label, UNKNOWN_COLOUR if id_ == unknown else COLOURS[number % len(COLOURS)]
    else:
      yield ("|" if number else "") + label, None


def show_table(file: TextIO, rows: list[dict[str, Any]]) -> None:
  size, corpus = rows[0]["bytes"], rows[0]["corpus"]
  first = "the first " if size >= COMPARED_BYTES else ""
  print(
    f"{first}{size:,} bytes of what {corpus} holds out (its split validation)", file=file
  )
  width = max(9, *(len(row["tokenizer"]) for row in rows))
  trained = "bits_per_byte" in rows[0]
  more = " bits/byte  steps" if trained else ""
  print(f"{'tokenizer':{width}} {HEADINGS}{more}", file=file)
  for row in rows:
    whole = "yes" if row["lossless"] else "no"
    more = f" {row['bits_per_byte']:9.3f} {row['steps']:6,}" if trained else ""
    print(
      f"{row['tokenizer']:{width}} {row['vocab_size']:9,} {row['tokens']:11,}"
      f" {row['tokens_per_word']:11.3f} {row['tokens_per_byte']:11.3f}"
      f" {row['unknown']:7.1%} {row['ids_used']:8.1%} {row['megabytes_per_second']:7.1f}"
      f" {row['embedding_parameters']:11,} {whole:>8}{more}",
      file=file,
    )
  shape = f"embedding: parameters of (ids, {rows[0]['embedding'][1]})"
  if trained:
    shape += f"; bits/byte: of a model trained for {rows[0]['train_seconds']:g} s"
    if any(row["unknown"] for row in rows):
      shape += ", where what is unknown costs 8 bits a byte"
  print(shape, file=file)
