# SPDX-License-Identifier: Apache-2.0
"""`flaxlm ckpt`, `flaxlm import` and `flaxlm export`: stored checkpoints."""

import argparse
import contextlib
import re
import sys
from pathlib import Path
from typing import Any

from flaxlm.commands.parsing import find_named_run, open_run
from flaxlm.errors import CheckpointError, ConfigError
from flaxlm.strict_json import to_json


def add_ckpt(commands: Any) -> None:
  parser = commands.add_parser("ckpt", help="list checkpoints, or verify their files")
  parser.add_argument("action", choices=("list", "verify"))
  parser.add_run(devices=False)
  parser.add_flag(
    "--json",
    bool,
    "one JSON object per checkpoint; verify: and one, without step, for the other files",
  )
  parser.set_defaults(run=run_ckpt)


def run_ckpt(args: argparse.Namespace, _: list[str]) -> int:
  from flaxlm.checkpoint.manifest import damage, saved_steps
  from flaxlm.origin import read_origin
  from flaxlm.runs import CHECKPOINTS, describe_files, files_damage

  run_dir, verifies, whole = find_named_run(args), args.action == "verify", True

  def report(step: int | None, size: int, problems: list[str]) -> None:
    nonlocal whole
    whole &= not problems
    if args.json:
      print(to_json({"step": step, "bytes": size, "problems": problems}))
      return
    name = "config, tokenizer, metrics" if step is None else f"step {step:>8}"
    verdict = "  whole" if verifies and not problems else ""
    print(f"{name}  {size / 1e6:10.1f} MB{verdict}")
    for problem in problems:
      print(f"  {problem}")

  origin = read_origin(run_dir)
  if origin is not None and not args.json:
    print(f"begins from {origin}")
  directory = run_dir / CHECKPOINTS
  steps = saved_steps(directory)
  for step in steps:
    size = 0
    with contextlib.suppress(FileNotFoundError):  # training goes on, and deletes the step
      files = [path for path in (directory / str(step)).rglob("*") if path.is_file()]
      size = sum(path.stat().st_size for path in files)
    report(step, size, damage(directory / str(step)) if verifies else [])
  if verifies:
    size = sum(entry.size for entry in describe_files(run_dir).values())
    report(None, size, files_damage(run_dir))
  if verifies and not steps:
    raise CheckpointError(f"{run_dir} has no checkpoint", "train it first")
  return 0 if whole else CheckpointError.exit_code


def add_import(commands: Any) -> None:
  text = "make a run from a Hugging Face checkpoint or a GGUF file"
  parser = commands.add_parser("import", help=text)
  text = (
    "a folder with config.json and safetensors, a GGUF file, or a name on the Hugging Face "
    "hub, org/name or org/name/FILE.gguf, which is looked for in the local cache"
  )
  parser.add_argument("source", metavar="SOURCE", help=text)
  text = "the run directory to make (default: runs/ and the last part of SOURCE)"
  parser.add_argument("path", metavar="RUN", nargs="?", help=text)
  parser.add_flag("--download", bool, "get SOURCE from the hub, or what is new of it")
  parser.add_flag("--revision", str, "the branch, tag or commit of a name on the hub")
  parser.add_flag("--base", str, "SOURCE is an adapter of PEFT: the run that it adapts")
  parser.add_dtype("default: the checkpoint's")
  parser.add_devices()
  parser.set_defaults(run=run_import)


def run_import(args: argparse.Namespace, _: list[str]) -> int:
  from flaxlm.config import parse_mesh
  from flaxlm.data.storage import data_dir
  from flaxlm.interop.adapters import import_adapter
  from flaxlm.interop.hub import find_source
  from flaxlm.interop.transfer import import_run
  from flaxlm.platform import start_jax
  from flaxlm.sharding import make_mesh

  start_jax(args.simulated_devices, data_dir() / "xla")
  mesh = make_mesh(parse_mesh(args.mesh))
  source = find_source(args.source, args.download, args.revision)
  run_dir = Path(args.path or Path("runs", Path(args.source).name.removesuffix(".gguf")))
  if args.base is not None:
    if args.dtype is not None:
      raise ConfigError("adapters have the dtype of their base", "leave out --dtype")
    cfg, notes = import_adapter(source, run_dir, Path(args.base), mesh)
    for note in notes:
      print(note, file=sys.stderr)
    print(f"{run_dir}: adapters of rank {cfg.lora.rank} over {args.base}")
    return 0
  loaded, notes = import_run(source, run_dir, mesh, args.dtype)
  for note in notes:
    print(note, file=sys.stderr)
  family = loaded.family.model_type
  print(f"{run_dir}: {family}, {loaded.num_parameters:,} parameters in {loaded.dtype}")
  return 0


def add_export(commands: Any) -> None:
  parser = commands.add_parser("export", help="write a run as a Hugging Face checkpoint")
  parser.add_argument("path", metavar="RUN")
  parser.add_argument("folder", metavar="DIR", help="the directory (gguf: file) to make")
  formats = ("safetensors", "gguf")
  text = "default: safetensors; gguf is the format of llama.cpp"
  parser.add_flag("--format", formats, text, default="safetensors")
  parser.add_dtype("default: the run's")
  parser.add_flag("--adapter", bool, "write a run's adapters alone, for PEFT")
  text = "largest size of a file (default: 5GB)"
  parser.add_flag("--shard-size", str, text, default="5GB")
  text = "licence that the model card names, as the hub calls it: apache-2.0, mit, other"
  parser.add_flag("--license", str, f"{text} (default: unknown, or an import's own)")
  parser.add_flag("--runs-dir", default="runs")
  parser.add_devices()
  parser.set_defaults(run=run_export)


def run_export(args: argparse.Namespace, _: list[str]) -> int:
  from flaxlm.interop.card import check_license

  most = parse_size(args.shard_size)
  check_license(args.license)
  run = open_run(args, needs_text=args.format == "gguf")

  from flaxlm.interop.adapters import export_adapter
  from flaxlm.interop.files import CONFIG
  from flaxlm.interop.gguf import export_gguf
  from flaxlm.interop.transfer import export_run
  from flaxlm.interop.values import read_json

  if args.adapter:
    if args.format == "gguf":
      raise ConfigError("--adapter writes safetensors", "leave out --format")
    family, notes = export_adapter(run, Path(args.folder), args.dtype, args.license)
    for note in notes:
      print(note, file=sys.stderr)
    print(f"{args.folder}: adapter of a {family.model_type}")
    return 0
  if args.format == "gguf":
    name = export_gguf(run, Path(args.folder), args.dtype, args.license)
    print(f"{args.folder}: {name}")
    return 0

  family = export_run(run, Path(args.folder), args.dtype, most, args.license)
  (architecture,) = read_json(Path(args.folder, CONFIG))["architectures"]
  print(f"{args.folder}: {family.model_type} ({architecture})")
  return 0


def parse_size(text: str) -> int:
  """`5GB` -> 5,000,000,000 bytes."""
  units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
  number, unit = text[: -len(text.lstrip("0123456789"))] or text, text.lstrip("0123456789")
  # Of 18 digits at most: Python refuses to read thousands.
  if (
    not re.fullmatch("[0-9]{1,18}", number)
    or (unit and unit.upper() not in units)
    or int(number) < 1
  ):
    raise ConfigError(f"shard-size is {text!r}", "as in 500MB, 5GB or 4GiB")
  return int(number) * units.get(unit.upper(), 1)
