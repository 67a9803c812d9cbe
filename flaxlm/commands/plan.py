# SPDX-License-Identifier: Apache-2.0
"""`flaxlm plan` and `flaxlm shard`: a config on a mesh, before anything runs."""

import argparse
import dataclasses
import math
import os
from typing import Any

from flaxlm.commands.parsing import EXECUTED, name_and_overrides, read_config, write_result
from flaxlm.errors import ConfigError


def add_plan(commands: Any) -> None:
  parser = commands.add_parser(
    "plan",
    help="memory, time and cost of a config on a mesh of chips; none are needed",
    usage="flaxlm plan [CONFIG] [--mesh AXIS=SIZE,...] [--device NAME] [options] "
    "[--section.field=value ...]",
    description=f"CONFIG and its overrides are those of `flaxlm train`. {EXECUTED}",
  )
  flag = parser.add_flag
  flag("--mesh", str, "as in data=2@dcn,fsdp=8; with --devices, one axis may be -1")
  flag("--device", str, "as in h200 or v5e; without it: no times, no verdict")
  flag("--devices", int, "the number of devices", metavar="N")
  text = "bandwidth of a device between slices or hosts; default: the device table's"
  flag("--network", float, text, metavar="GB/s")
  text = "watts at which each device is held; default: those of its peaks"
  flag("--power", float, text, metavar="W")
  flag("--compile", bool, "also compile the step, for its real memory")
  flag("--search", bool, "rank every choice of mesh, remat and accumulation")
  flag("--decode", bool, "also the speed of decoding")
  flag("--no-training", bool, "decode: leave out what is about training")
  flag("--batch", list[int], "decode: rows")
  text = "decode: milliseconds for a token at most, instead of rows: as many as keep to it"
  flag("--latency", float, text, metavar="MS")
  flag("--context", list[int], "decode: tokens")
  flag(
    "--weights", ("float32", "bfloat16", "int8", "int4"), "decode: dtype of the matrices"
  )
  flag("--cache", ("int8",), "decode: dtype of keys and values")
  flag("--tokens", float, "tokens to train on; default: 20 per parameter")
  text = (
    "tokens per second that are read and made ready, by all processes; flaxlm bench data"
  )
  flag("--data-tokens-per-second", float, text, metavar="N")
  flag("--price", float, "price of one device for one hour")
  parser.add_output("one JSON object")
  parser.set_defaults(run=run_plan, takes_overrides=True)


def run_plan(args: argparse.Namespace, arguments: list[str]) -> int:
  from flaxlm.config import fields_in, is_shipped, parse_mesh
  from flaxlm.planning.decoding import Stored
  from flaxlm.planning.decoding_report import decoding_json, print_decoding
  from flaxlm.planning.planner import Questions, plan, plan_serving
  from flaxlm.planning.report import print_report, to_json
  from flaxlm.platform import leave_out_absent_tpu

  leave_out_absent_tpu(os.environ)
  cfg = read_config(arguments)
  config, overrides = name_and_overrides(arguments)
  numbers = (
    "devices",
    "network",
    "power",
    "tokens",
    "data_tokens_per_second",
    "price",
    "latency",
  )
  for name in (*numbers, "batch", "context"):
    given = getattr(args, name)
    for value in given if isinstance(given, list) else [given]:
      if value is not None and not 0 < value < math.inf:
        name = name.replace("_", "-")
        raise ConfigError(f"{name} is {value}", "it must be a number, more than 0")
  if not args.decode and (args.weights or args.cache or args.latency):
    names = "--weights, --cache and --latency"
    raise ConfigError(f"{names} are about decoding", "add --decode")
  if args.latency and args.batch:
    raise ConfigError("--latency and --batch", "give one of them")
  if args.no_training:
    check_decoding_alone(args)
  questions = Questions(
    mesh=cfg.mesh if args.mesh is None else parse_mesh(args.mesh),
    device=args.device,
    num_devices=args.devices,
    compiled=args.compile,
    searched=args.search,
    batches=(args.batch or [1, 8, 64]) if args.decode else [],
    latency=args.latency and args.latency / 1000,
    contexts=args.context or None,
    stored=Stored(args.weights, args.cache),
    tokens=args.tokens,
    data_rate=args.data_tokens_per_second,
    price=args.price,
    network=None if args.network is None else args.network * 1e9,
    power=args.power,
    own_batch=not is_shipped(config) or "data.batch_size" in fields_in(overrides),
  )
  if args.no_training:
    decoding = plan_serving(cfg, questions)
    write_result(args, decoding_json(decoding), lambda out: print_decoding(decoding, out))
    return 0
  report = plan(cfg, questions)
  write_result(args, to_json(report), lambda out: print_report(report, out))
  return 0


def check_decoding_alone(args: argparse.Namespace) -> None:
  """Raises `ConfigError` if --no-training leaves nothing, or something else asks of it."""
  if not args.decode:
    raise ConfigError("--no-training leaves nothing to plan", "add --decode")
  for name in ("compile", "search", "tokens", "data_tokens_per_second", "price"):
    if getattr(args, name):
      flag = f"--{name.replace('_', '-')}"
      raise ConfigError(f"--no-training and {flag}", f"{flag} is about training")


# -- shard -------------------------------------------------------------------------------


def add_shard(commands: Any) -> None:
  parser = commands.add_parser(
    "shard",
    help="how each parameter is sharded on a mesh, why, and a step's collectives",
    usage="flaxlm shard [CONFIG] [--mesh AXIS=SIZE,...] [--device NAME] [options] "
    "[--section.field=value ...]",
    description="CONFIG and its overrides are those of `flaxlm train`. The step compiles "
    "for simulated CPU devices, or with --device for real ones, which need not be present. "
    f"{EXECUTED}",
  )
  parser.add_flag("--mesh", str, "as in data=2@dcn,fsdp=4,tensor=2")
  parser.add_flag(
    "--device", str, "compile for this one, as in v5e (needs the extra [tpu])"
  )
  parser.add_flag("--compile", bool, "the default")
  parser.add_flag("--no-compile", bool, "only the parameters")
  parser.add_output("one JSON object")
  parser.set_defaults(run=run_shard, takes_overrides=True)


def run_shard(args: argparse.Namespace, arguments: list[str]) -> int:
  from flaxlm.config import parse_mesh
  from flaxlm.planning.planner import resolve
  from flaxlm.planning.sharding_report import print_sharding, report_sharding

  if args.compile and args.no_compile:
    raise ConfigError("--compile and --no-compile", "choose one")
  cfg = resolve(read_config(arguments))
  mesh = cfg.mesh if args.mesh is None else parse_mesh(args.mesh)
  if args.mesh is None and dict(mesh) == {"data": -1}:
    mesh = {"data": 1}  # neither the flag nor the config says anything about devices
  report = report_sharding(cfg, mesh, args.device, compiled=not args.no_compile)
  found = dataclasses.asdict(report)
  write_result(args, found, lambda out: print_sharding(report, out))
  return 0
