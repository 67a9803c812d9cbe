# SPDX-License-Identifier: Apache-2.0
"""`flaxlm look`: pictures of a model's parts."""

import argparse
import sys
from pathlib import Path
from typing import Any

from flaxlm.commands.parsing import (
  EXECUTED,
  Parser,
  check_least,
  find_named_run,
  open_run,
  open_run_at,
  read_config,
  read_text,
)
from flaxlm.config import is_file
from flaxlm.errors import ConfigError
from flaxlm.strict_json import to_json

LARGE = ("gpt3_175b", "bloom_176b")  # the cards that a story compares a run with


def add_look(commands: Any) -> None:
  parser = commands.add_parser("look", help="pictures of a model's parts, as pages or PNGs")
  subjects = parser.add_subparsers(
    dest="subject", required=True, metavar="SUBJECT", parser_class=Parser
  )
  attention = add_subject(
    subjects, "attention", "what each head of each layer attends to", run_attention
  )
  attention.add_run()
  add_text(attention, 256)
  attention.add_flag("--layer", int, "only this layer, counted from 0")
  attention.add_flag("--head", int, "only this head of each layer")

  embeddings = add_subject(
    subjects, "embeddings", "the embedding table as a map", run_embeddings
  )
  embeddings.add_run()
  embeddings.add_flag("--tokens", int, "ids (default: 4096)", metavar="N")

  positions = add_subject(
    subjects, "positions", "what the model's positions do", run_positions
  )
  positions.usage = (
    "flaxlm look positions [RUN | CONFIG [--section.field=value ...]] [options]"
  )
  positions.description += f". {EXECUTED}"
  positions.add_flag("--runs-dir", default="runs")
  positions.add_devices()
  positions.set_defaults(takes_overrides=True)

  tokens = add_subject(
    subjects, "tokens", "a text in tokens, and how likely each was", run_tokens
  )
  tokens.add_run()
  text = "a second run: both side by side; each may also be a tokenizer.json or *.model"
  tokens.add_argument("other", nargs="?", metavar="OTHER", help=text)
  add_text(tokens, 1024)
  text = "a conversation to learn from: a file of them, and what carries loss"
  tokens.add_flag("--chat-file", str, text, metavar="FILE")
  tokens.add_flag("--record", int, "which conversation of the file", default=1)
  tokens.add_flag("--rejected", bool, "of a preference the answer that was rejected")

  text = "how the model reads a text and goes on, on one page, in its own numbers"
  story = add_subject(subjects, "story", text, run_story)
  story.add_run()
  add_text(story, 256)
  story.add_flag("--layer", int, "the layer to open, from 0 (default: the middle one)")
  text = "of the completion; default: 0, which is greedy"
  story.add_flag("--temperature", float, text, default=0.0)
  story.add_flag("--seed", int, "the same seed draws the same tokens", default=0)

  text = "a run's curves, samples and config; of several runs also what differs"
  run = add_subject(subjects, "run", text, run_run)
  text = "default: the newest; several: together on one page"
  run.add_argument("paths", nargs="*", metavar="RUN", help=text)
  run.add_flag("--runs-dir", default="runs")


def add_subject(subjects: Any, name: str, text: str, run: Any) -> Any:
  parser = subjects.add_parser(name, help=text, description=text)
  parser.add_flag("--output", str, "a .html or .png file; default: look/ in the run")
  parser.add_flag("--json", bool, "also print the figures")
  parser.set_defaults(run=run)
  return parser


def add_text(parser: Any, most: int) -> None:
  parser.add_flag("--text", str, "the text that the model reads (encoder_decoder: writes)")
  parser.add_flag("--text-file", str, "a file with the text, or - for stdin")
  parser.add_flag("--source", str, "encoder_decoder: the text that it reads")
  text = f"cut the text to so many (default: {most})"
  parser.add_flag("--max-tokens", int, text, default=most)


def run_attention(args: argparse.Namespace, _: list[str]) -> int:
  from flaxlm.look.attention import check_attention, look_attention

  path, reading = open_text(args, lambda cfg: check_attention(cfg, args.layer, args.head))
  run = open_run(args)
  view = look_attention(run, reading, args.max_tokens, args.layer, args.head)
  return finish(args, view, path)


def run_tokens(args: argparse.Namespace, _: list[str]) -> int:
  from flaxlm.look.tokens import look_tokens

  if args.rejected and args.chat_file is None:
    raise ConfigError("--rejected is of a file of preferences", "add --chat-file FILE")
  if args.other is not None:
    return run_beside(args)
  open_ = open_text if args.chat_file is None else open_chat
  path, reading = open_(args)
  return finish(args, look_tokens(open_run(args), reading, args.max_tokens), path)


def run_beside(args: argparse.Namespace) -> int:
  """Two runs, or tokenizers, on one text."""
  from flaxlm.look.beside import look_beside

  check_output(args)
  check_least(args, 2, "max_tokens")
  if args.chat_file is not None:
    raise ConfigError("--chat-file is for one run", f"leave out {args.other}")
  if args.output is not None and args.output.endswith(".png"):
    raise ConfigError(
      "two side by side are a page, and no picture", "as in --output a.html"
    )
  text = given_text(args)
  if not text:
    raise ConfigError("there is no text to set side by side", 'give --text "..."')
  names = [args.path, args.other]
  sides = [open_side(args, name) for name in names]
  view = look_beside(sides, text, args.source, args.max_tokens)
  return finish(args, view, None, "_and_".join(map(file_name, names)) + "_tokens.html")


def open_side(args: argparse.Namespace, name: str) -> Any:
  """A run, or the tokenizer of a file."""
  from flaxlm.look.beside import Side
  from flaxlm.runs import find_run
  from flaxlm.tokenizers import load_tokenizer

  if is_file(Path(name)):
    return Side(name, load_tokenizer(Path(name)))
  run = open_run_at(find_run(name, args.runs_dir), args)
  return Side(name, run.tokenizer, run)


def file_name(name: str) -> str:
  """What a picture is called after a run, or after a file and its folder."""
  path = Path(name)
  return f"{path.resolve().parent.name}_{path.stem}" if is_file(path) else path.name


def run_story(args: argparse.Namespace, _: list[str]) -> int:
  from flaxlm.decoding.sampling import SamplingSettings
  from flaxlm.look.story import check_story, look_story
  from flaxlm.planning.planner import resolve

  settings = SamplingSettings(temperature=args.temperature, seed=args.seed)
  settings.check()
  path, reading = open_text(args, lambda cfg: check_story(cfg, args.layer))
  cards = {name: resolve(read_config([name])) for name in LARGE}
  view = look_story(open_run(args), reading, args.layer, settings, cards)
  return finish(args, view, path)


def run_embeddings(args: argparse.Namespace, _: list[str]) -> int:
  from flaxlm.look.embeddings import look_embeddings

  check_least(args, 2, "tokens")
  path = find(args)
  return finish(args, look_embeddings(open_run(args), args.tokens), path)


def run_positions(args: argparse.Namespace, arguments: list[str]) -> int:
  from flaxlm.look.positions import check_positions, look_positions
  from flaxlm.runs import CONFIG, load_config_of

  named = arguments[0] if arguments and not arguments[0].startswith("--") else None
  candidates = [Path(named), Path(args.runs_dir) / named] if named else []
  of_run = named is None and not arguments
  if not of_run and not any(is_file(path / CONFIG) for path in candidates):
    check_output(args)
    cfg = read_config(arguments)
    model = cfg.model.resolve(cfg.tokenizer.vocab_size)
    view = look_positions(model, str(cfg.name), f"config {cfg.name}")
    return finish(args, view, None, f"{cfg.name}_positions.html")
  if arguments[1:]:
    cure = f"leave out {arguments[1]}, or name a config file, like configs/NAME.py"
    raise ConfigError(f"{named} is a run, whose config cannot be overridden", cure)
  args.path = named
  path = find(args)
  model_cfg = load_config_of(path).model
  check_positions(model_cfg)
  params = None
  if model_cfg.positions in ("learned", "relative"):
    params = open_run(args, needs_text=False).params
  view = look_positions(model_cfg, path.name, str(path), params)
  return finish(args, view, path)


def run_run(args: argparse.Namespace, _: list[str]) -> int:
  from flaxlm.look.compare import look_runs
  from flaxlm.look.runs import look_run
  from flaxlm.runs import find_run

  if len(args.paths) < 2:
    args.path = next(iter(args.paths), None)
    path = find(args)
    return finish(args, look_run(path), path)
  check_output(args)
  paths = [find_run(path, args.runs_dir) for path in args.paths]
  return finish(args, look_runs(paths), None, f"{paths[0].name}_and_others.html")


def find(args: argparse.Namespace) -> Path:
  """The run's directory. Checks first that the picture can be written."""
  check_output(args)
  return find_named_run(args)


def open_chat(args: argparse.Namespace) -> tuple[Path, Any]:
  """The run's directory, and a conversation as the run learns it.

  Raises `ConfigError` for wrong arguments, before the checkpoint is read.
  """
  from flaxlm.chat.templates import check_jinja, load_chat, plain_chat
  from flaxlm.look.tokens import read_chat
  from flaxlm.runs import TOKENIZER, load_config_of
  from flaxlm.tokenizers import load_tokenizer

  check_least(args, 1, "record")
  check_least(args, 2, "max_tokens")
  if any(x is not None for x in (args.text, args.text_file, args.source)):
    raise ConfigError("--chat-file with another text", "give one of them")
  path = find(args)
  model_cfg, tokenizer = load_config_of(path).model, load_tokenizer(path / TOKENIZER)
  check_jinja("--chat-file")
  chat = load_chat(path) or plain_chat(tokenizer, path)
  file = Path(args.chat_file)
  most = args.max_tokens
  which = (args.record, most, args.rejected)
  return path, read_chat(model_cfg, tokenizer, chat, file, *which)


def open_text(args: argparse.Namespace, check: Any = lambda cfg: None) -> tuple[Path, Any]:
  """The run's directory, and the text as the model's family reads it.

  Raises `ConfigError` for wrong arguments, before the checkpoint is read.
  """
  from flaxlm.look.pieces import make_reading
  from flaxlm.runs import TOKENIZER, load_config_of
  from flaxlm.tokenizers import load_tokenizer

  check_least(args, 2, "max_tokens")
  text = given_text(args)
  path = find(args)
  cfg = load_config_of(path)
  check(cfg.model)
  tokenizer = load_tokenizer(path / TOKENIZER)
  reading = make_reading(cfg.model, tokenizer, text, args.source, args.max_tokens)
  return path, reading


def given_text(args: argparse.Namespace) -> str | None:
  """The text of --text or --text-file, if there is one. Raises `ConfigError` for both."""
  if args.text is not None and args.text_file is not None:
    raise ConfigError("--text and --text-file", "give one of them")
  return read_text(args.text_file) if args.text_file else args.text


def check_output(args: argparse.Namespace) -> None:
  from flaxlm.look import page

  if args.output is not None:
    page.check_output(Path(args.output))


def finish(args: argparse.Namespace, view: Any, path: Path | None, name: str = "") -> int:
  """Writes the picture, and prints its path; with --json, its figures."""
  from flaxlm.look.links import FOLDER, link_pages
  from flaxlm.look.page import save_view

  own = path / FOLDER / f"{args.subject}.html" if path is not None else Path(name)
  where = Path(args.output) if args.output is not None else own
  save_view(view, where)
  if path is not None and where == own:
    link_pages(own.parent)
  size = where.stat().st_size
  for cut in view.cuts:
    print(cut, file=sys.stderr)
  if args.json:
    figures = {"output": str(where), "bytes": size, **view.figures}
    print(to_json(figures))
  else:
    print(f"{where} ({size / 1e3:,.0f} kB)")
  return 0
