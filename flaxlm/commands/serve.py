# SPDX-License-Identifier: Apache-2.0
"""`flaxlm serve`: a run behind OpenAI's protocol, until SIGTERM."""

import argparse
import stat
import sys
from pathlib import Path
from typing import Any

from flaxlm.commands.parsing import check_least, open_run, read_text
from flaxlm.errors import ConfigError

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000
MOST_SLOTS = 4096


def add_serve(commands: Any) -> None:
  parser = commands.add_parser("serve", help="answer as OpenAI's API does, from a run")
  parser.add_run()
  flag = parser.add_flag
  flag("--host", str, f"default: {DEFAULT_HOST}; others need keys", default=DEFAULT_HOST)
  flag("--port", int, f"default: {DEFAULT_PORT}; 0: a free one", default=DEFAULT_PORT)
  flag("--api-key-file", str, "a key a line; only who has one is served", metavar="FILE")
  flag("--slots", int, "answers that are written together", default=16)
  flag("--max-queue", int, "answers that may wait besides", default=64)
  flag("--max-tokens", int, "new tokens of an answer", default=4096)
  flag("--max-body", int, "bytes of a request", default=4 * 2**20)
  flag("--time-limit", float, "seconds of a request", default=600.0)
  flag("--grace", float, "seconds for running requests, after SIGTERM", default=30.0)
  flag("--cache-bytes", int, "keys and values of all slots; default: a quarter of memory")
  flag("--prefix-bytes", int, "of past texts that are kept; 0: none", default=2**28)
  flag("--warm", bool, "compile before the first request")
  flag("--weights", ("float32", "bfloat16", "int8", "int4"), "default: as in the run")
  text = "products with narrow weights by a kernel for NVIDIA GPUs; not measured yet"
  flag("--weights-kernel", ("pallas",), text)
  flag("--cache", ("int8",), "keys and values in a quarter of the memory")
  parser.set_defaults(run=run_serve)


def check(args: argparse.Namespace) -> None:
  """Raises `ConfigError` for flags that cannot be, before anything is loaded."""
  check_least(args, 0, "port", most=65535)
  check_least(args, 1, "slots", most=MOST_SLOTS)
  check_least(args, 0, "max_queue", most=100_000)
  check_least(args, 1, "max_tokens", most=2**20)
  check_least(args, 1024, "max_body", most=2**30)
  check_least(args, 1, "time_limit", most=86400)
  check_least(args, 1, "cache_bytes", most=2**50)
  check_least(args, 0, "prefix_bytes", most=2**50)
  check_least(args, 0, "grace", most=86400)


def read_keys(path: str) -> list[str]:
  """The keys of a file, one a line. Raises `ConfigError` if there is none, or if one is
  nothing that a header can hold."""
  keys = [line.strip() for line in read_text(path).split("\n") if line.strip()]
  if not keys:
    raise ConfigError(f"{path} has no key", "a line each, as openssl rand -hex 32 makes it")
  for number, key in enumerate(keys, 1):
    if not key.isascii() or not key.isprintable() or " " in key:
      raise ConfigError(f"{path}: key {number} has blanks or characters beyond ASCII")
  if path != "-" and Path(path).stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
    print(f"{path} can be read by others: chmod 600", file=sys.stderr)
  return keys


def run_serve(args: argparse.Namespace, _: list[str]) -> int:
  check(args)
  keys = [] if args.api_key_file is None else read_keys(args.api_key_file)
  try:
    import starlette
    import uvicorn  # noqa: F401

    del starlette
  except ImportError as e:
    raise ConfigError(
      "a server needs starlette and uvicorn", "pip install 'flaxlm[serve]'"
    ) from e
  from flaxlm.decoding.loading import equip_for_decoding
  from flaxlm.serving.limits import Limits
  from flaxlm.serving.server import open_socket, serve

  # What others hold shows before a checkpoint is read.
  sock = open_socket(args.host, args.port, bool(keys))
  with sock:
    limits = Limits(
      slots=args.slots,
      max_queue=args.max_queue,
      max_tokens=args.max_tokens,
      max_body=args.max_body,
      time_limit=args.time_limit,
      grace=args.grace,
      cache_bytes=args.cache_bytes,
      prefix_bytes=args.prefix_bytes,
    )
    narrow = dict(weights=args.weights, cache=args.cache)
    run = equip_for_decoding(open_run(args), **narrow, weights_kernel=args.weights_kernel)

    def say(url: str) -> None:
      print(f"{url}/v1", flush=True)
      print(f"serving {run.path.name}; SIGTERM or Ctrl-C ends it", file=sys.stderr)

    return serve(run, limits, sock, keys, args.warm, say)
