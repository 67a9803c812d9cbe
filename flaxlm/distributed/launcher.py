# SPDX-License-Identifier: Apache-2.0
"""Starts several processes of one job on this machine, relays their output, and ends them
together."""

import contextlib
import ctypes
import itertools
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from flaxlm.distributed.detect import ADDRESS, COUNT, LOCAL, LOOPBACK, PROCESS, TOKEN
from flaxlm.distributed.rendezvous import free_port
from flaxlm.errors import INTERRUPTED, PREEMPTED, PeerLostError

GOOD_ENDS = (0, PREEMPTED, INTERRUPTED)
# When a process fails, others fail within milliseconds because of it. All are watched for
# so many seconds before one is said to be the first.
LOOK_AROUND = 1.0


def launch(command: Sequence[str], num_processes: int, grace_seconds: float = 10.0) -> int:
  """Runs `command` as processes 0 to N - 1 of one job; returns the exit code of the job.

  Each line of output gets the prefix `[n] `, except process 0's stdout, which is the result
  of the job. Signals are forwarded to all processes. If one fails, the others are ended: by
  SIGTERM, and after `grace_seconds` by SIGKILL. The one that failed first decides the exit
  code, which is 128 + n after signal n.
  """
  shared = {
    ADDRESS: f"{LOOPBACK}:{free_port()}",
    COUNT: str(num_processes),
    LOCAL: str(num_processes),
    TOKEN: os.environ.get(TOKEN) or secrets.token_hex(16),
  }
  children: list[subprocess.Popen[bytes]] = []
  try:
    with forwarded_signals(children) as forwarded:
      for number in range(num_processes):
        environment = os.environ | shared | {PROCESS: str(number)}
        children.append(start(command, environment))
      forwarded.catch_up()
      threads = [relays(n, child) for n, child in enumerate(children)]
      code = wait(children, threads, grace_seconds, forwarded)
      for thread in itertools.chain.from_iterable(threads):
        thread.join(timeout=2.0)  # a grandchild may hold the pipe open
    return code
  finally:
    for child in children:
      if child.poll() is None:
        child.kill()


def start(command: Sequence[str], environment: Mapping[str, str]) -> Any:
  """One process in a session of its own, so that Ctrl-C reaches it once, through us."""
  return subprocess.Popen(
    command,
    env=environment,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    start_new_session=True,
    preexec_fn=end_with_parent if sys.platform == "linux" else None,
  )


def end_with_parent() -> None:
  """Asks the kernel for a SIGTERM when the launcher dies, however it dies."""
  pr_set_pdeathsig = 1  # linux/prctl.h
  ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def wait(
  children: Sequence[Any],
  relayed: Sequence[Sequence[threading.Thread]],
  grace_seconds: float,
  forwarded: "Forwarded",
) -> int:
  """Waits until all have ended, by themselves or because one failed; returns the exit code.

  A failure is reported after the output of the ended processes, which the threads in
  `relayed` pass on.
  """
  while True:
    codes = [forwarded.meaning(child.poll()) for child in children]
    good = [code for code in codes if code in GOOD_ENDS]
    if len(good) == len(codes):
      return max(good, key=GOOD_ENDS.index)
    if any(code is not None and code not in GOOD_ENDS for code in codes):
      break
    time.sleep(0.05)
  let_end(children, LOOK_AROUND)
  codes = [forwarded.meaning(child.poll()) for child in children]
  for code, threads in zip(codes, relayed, strict=True):
    for thread in threads if code is not None else ():
      thread.join(timeout=0.2)
  first = first_to_fail(codes)
  code = codes[first]
  assert code is not None, "a process that has failed has ended"
  print(
    f"flaxlm launch: process {first} {describe(code)}; ending the others",
    file=sys.stderr,
    flush=True,
  )
  for child in children:
    if child.poll() is None:
      child.terminate()
  let_end(children, grace_seconds)
  for child in children:
    if child.poll() is None:
      child.kill()
    child.wait()
  return exit_code(code)


def let_end(children: Sequence[Any], seconds: float) -> None:
  """Waits until all children have ended, for so many seconds at most."""
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline and any(child.poll() is None for child in children):
    time.sleep(0.05)


def first_to_fail(codes: Sequence[int | None]) -> int:
  """The process whose end explains the others: a signal, else an error, an abort, a peer
  that is lost.

  JAX aborts a process when another one is gone, so an abort explains less than another end
  does; but a process that has lost a peer says that the reason is elsewhere.
  """

  def rank(number: int) -> int:
    code = codes[number]
    if code is None or code in GOOD_ENDS:
      return 4
    if code == PeerLostError.exit_code:
      return 3
    if code == -signal.SIGABRT:
      return 2
    return 0 if code < 0 else 1

  return min(range(len(codes)), key=rank)


def describe(code: int) -> str:
  if code < 0:
    return f"died of {signal.Signals(-code).name} (exit code {exit_code(code)})"
  return f"ended with exit code {code}"


def exit_code(code: int) -> int:
  """The exit code as a shell gives it: 128 + n after signal n."""
  return 128 - code if code < 0 else code


# -- Output and signals --------------------------------------------------------------------


def relays(number: int, child: Any) -> list[threading.Thread]:
  """Threads that pass a child's output on, line by line."""
  prefix = f"[{number}] ".encode()
  plain = b"" if number == 0 else prefix
  pairs = [
    (child.stdout, sys.stdout.buffer, plain),
    (child.stderr, sys.stderr.buffer, prefix),
  ]
  threads = [threading.Thread(target=relay, args=pair, daemon=True) for pair in pairs]
  for thread in threads:
    thread.start()
  return threads


def relay(source: IO[bytes], target: IO[bytes], prefix: bytes) -> None:
  for line in source:
    whole = line if line.endswith(b"\n") else line + b"\n"
    with contextlib.suppress(
      BrokenPipeError, ValueError
    ):  # go on emptying the child's pipe
      target.write(prefix + whole)  # in one call, so that lines of two processes do not mix
      target.flush()


class Forwarded:
  """The signals that all children get, also those that start later."""

  def __init__(self, children: Sequence[Any]):
    self.children = children
    self._got: dict[int, set[int]] = {}  # the processes that have got each signal

  def __call__(self, number: int, _: Any) -> None:
    got = self._got.setdefault(number, set())
    for child in self.children:
      if child.poll() is None:
        got.add(child.pid)
        child.send_signal(number)

  def catch_up(self) -> None:
    """To be called when all have started: a signal may have come between two of them."""
    for number, got in list(self._got.items()):
      for child in self.children:
        if child.pid not in got and child.poll() is None:
          child.send_signal(number)

  def meaning(self, code: int | None) -> int | None:
    """The exit code of a child. One that was told to stop may not handle signals yet, or
    may lose a peer that has stopped before it: then it ends as it was told to."""
    for number, stopped in ((signal.SIGTERM, PREEMPTED), (signal.SIGINT, INTERRUPTED)):
      if number in self._got and code in (-number, PeerLostError.exit_code):
        return stopped
    return code


@contextlib.contextmanager
def forwarded_signals(children: Sequence[Any]) -> Iterator[Forwarded]:
  """Forwards every SIGTERM and Ctrl-C to all children."""
  forwarded = Forwarded(children)
  numbers = (signal.SIGTERM, signal.SIGINT)
  before = {number: signal.signal(number, forwarded) for number in numbers}
  try:
    yield forwarded
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
