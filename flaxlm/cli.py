# SPDX-License-Identifier: Apache-2.0
"""The command line: finds the command, runs it, and turns errors into exit codes."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from flaxlm.errors import (
  DISK_ERRORS,
  INTERRUPTED,
  PREEMPTED,
  ConfigError,
  FlaxLMError,
  OutOfMemoryError,
  first_line,
  one_line,
  write_error,
)
from flaxlm.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs one command and returns its exit code (docs/training.md lists them)."""
  arguments = list(sys.argv[1:] if arguments is None else arguments)
  debug = os.environ.get("FLAXLM_DEBUG") == "1"
  # When XLA loads a program from the compile cache, it takes two compiler hints for missing
  # processor features, and prints pages about them.
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  if hasattr(sys.stdout, "reconfigure"):  # what it cannot encode is escaped, as on stderr
    sys.stdout.reconfigure(errors="backslashreplace")
  try:
    with early_signals():
      code = run_command(build_parser(), arguments)
    if sys.stdout is not None:  # it is, where a shell has closed it
      sys.stdout.flush()
    return code
  except FlaxLMError as e:
    return end_with(e, debug)
  except KeyboardInterrupt:
    return INTERRUPTED
  except BrokenPipeError:  # the reader of our output has ended, as `| head` does
    discard_output()
    return 0
  except OSError as e:
    if e.errno not in DISK_ERRORS:
      raise
    discard_output()
    return end_with(write_error(e, "the output"), debug)
  except ValueError as e:  # JAX reads its settings while it is imported
    if not ("JAX flag" in str(e) or "environment 'JAX_" in str(e)) or debug:
      raise
    return end_with(ConfigError(first_line(e), "correct or unset JAX_..."), debug)
  except RuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e) or debug:
      raise
    error = OutOfMemoryError(
      f"out of device memory: {first_line(e)}",
      "lower --data.batch-size, raise --training.accumulation-steps, or "
      "use --training.remat=full",
    )
    return end_with(error, debug)


@contextlib.contextmanager
def early_signals() -> Iterator[None]:
  """SIGTERM and Ctrl-C end the process with their exit codes from the first moment on:
  importing JAX takes a second, preparing data longer, and there is nothing to save yet.

  They end it at once where an exception would be lost, in C++ that is importing. A run that
  trains takes the signals over (`training.signals`).
  """

  def terminate(number: int, frame: Any) -> None:
    with contextlib.suppress(OSError):
      os.write(2, b"flaxlm: stopped by SIGTERM\n")
    os._exit(PREEMPTED)

  def interrupt(number: int, frame: Any) -> None:
    while frame is not None:
      if frame.f_code.co_filename.startswith("<frozen importlib"):
        os._exit(INTERRUPTED)
      frame = frame.f_back
    raise KeyboardInterrupt

  before: dict[int, Any] = {}
  with contextlib.suppress(ValueError):  # outside the main thread our caller handles them
    before[signal.SIGTERM] = signal.signal(signal.SIGTERM, terminate)
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # it may be ignored
      before[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def run_command(parser: Any, arguments: Sequence[str]) -> int:
  from flaxlm.commands.parsing import with_hyphens

  try:
    args, rest = parser.parse_known_args(with_hyphens(arguments))
  except SystemExit as e:  # --help and --version have printed
    return int(e.code or 0)
  args.parser.refuse_unknown(rest, args.takes_overrides)
  return args.run(args, rest)


def end_with(error: FlaxLMError, debug: bool) -> int:
  """Prints an error, where that can be printed, and returns its exit code."""
  with contextlib.suppress(OSError):  # stderr may be on the disk that is full
    if debug:
      import traceback

      traceback.print_exc()
    print(f"flaxlm: {one_line(error.cause)}", file=sys.stderr, flush=True)
    if error.cure:
      print(f"  {one_line(error.cure)}", file=sys.stderr, flush=True)
  return error.exit_code


def discard_output() -> None:
  """What is left of the output cannot be written, at the end of the process either."""
  sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - it must outlive us


def build_parser() -> Any:
  """The parser of all commands. They are imported here, when signals are handled."""
  from flaxlm.commands.bench import add_bench
  from flaxlm.commands.checkpoints import add_ckpt, add_export, add_import
  from flaxlm.commands.embed import add_embed
  from flaxlm.commands.eval import add_eval
  from flaxlm.commands.infer import add_infer
  from flaxlm.commands.launch import add_launch
  from flaxlm.commands.look import add_look
  from flaxlm.commands.parsing import Parser
  from flaxlm.commands.plan import add_plan, add_shard
  from flaxlm.commands.serve import add_serve
  from flaxlm.commands.tokenizer import add_tokenizer
  from flaxlm.commands.train import add_train
  from flaxlm.commands.verify import add_verify

  parser = Parser(prog="flaxlm", description="Language models in JAX and Flax.")
  parser.add_argument("--version", action="version", version=f"flaxlm {__version__}")
  commands = parser.add_subparsers(
    dest="command", required=True, metavar="COMMAND", parser_class=Parser
  )
  for add in (
    *(add_train, add_launch, add_infer, add_embed, add_eval, add_look, add_tokenizer),
    *(
      add_plan,
      add_shard,
      add_verify,
      add_ckpt,
      add_bench,
      add_import,
      add_export,
      add_serve,
    ),
  ):
    add(commands)
  return parser


if __name__ == "__main__":
  sys.exit(main())
