# SPDX-License-Identifier: Apache-2.0
"""All processes of a job meet before JAX starts, and compare what has to be the same.

JAX itself aborts with a C++ stack when a process is missing, and trains on when configs
differ. Here process 0 listens, all others connect and say who they are, and all get the
same verdict: welcome, or one line that names the processes that are missing or differ.
"""

import contextlib
import hmac
import os
import selectors
import socket
import struct
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flaxlm.distributed.detect import LOOPBACK, Job, is_loopback
from flaxlm.distributed.lines import Garbage, Line
from flaxlm.errors import ConfigError, FlaxLMError, PeerLostError

VERSION = 1  # of the protocol
ODD_ONES_OUT = 5.0  # seconds to wait for the others once something differs
STRANGER = 10.0  # seconds within which a connection has to say who it is
REPORT = 30.0  # seconds between lines about the processes that are missing
MOST_DIFFERENCES = 3  # in one line

Claims = Mapping[str, str]


class Card(NamedTuple):
  """The identity of a process, for messages about it; a list in JSON."""

  process: int
  host: str
  pid: int

  def __str__(self) -> str:
    return f"process {self.process} ({self.host}, pid {self.pid})"


@dataclass(frozen=True)
class Meeting:
  """The result of the rendezvous: connections that stay open, and JAX's coordinator."""

  lines: dict[int, Line]  # from process 0 to all others, or from another to process 0
  cards: dict[int, Card]
  coordinator: str
  bind: str


def meet(
  job: Job,
  claims: Claims,
  seconds: float,
  bind: str | None = None,
  token: str = "",
  log: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> Meeting:
  """Returns when all processes have come and have the same claims.

  `bind` is the address or the interface on which process 0 listens; None: loopback on one
  host, else the address of the job's `host`. Connections without `token` are refused.
  Raises `PeerLostError` if a process is still missing after `seconds`, and `ConfigError` if
  claims differ.
  """
  claims = {"number of processes": str(job.num_processes), **claims}
  card = Card(job.process, socket.gethostname(), os.getpid())
  deadline = time.monotonic() + seconds
  if job.process == 0:
    gathering = Gathering(job, token, log, {0: claims}, {0: card})
    return gathering.meet(deadline, listen_address(job, bind))
  return _join(job, card, claims, seconds, token)


# -- Process 0 ---------------------------------------------------------------------------


@dataclass
class Gathering:
  """Process 0, and the processes that have connected to it; it is among them."""

  job: Job
  token: str
  log: Callable[[str], None]
  claims: dict[int, Claims]
  cards: dict[int, Card]
  lines: dict[int, Line] = field(default_factory=dict)
  twice: list[tuple[Card, Card]] = field(default_factory=list)
  turned_away: list[Line] = field(default_factory=list)

  def meet(self, deadline: float, address: str) -> Meeting:
    """Listens at `address` until all have come, and tells all of them the verdict."""
    started = time.monotonic()
    with _listener(self.job, address) as listener:
      self.wait(listener, deadline)
      error = self.verdict()
      if error is None and len(self.claims) < self.job.num_processes:
        error = PeerLostError(
          f"waited {time.monotonic() - started:.0f} s: {self.missing()} did not come",
          "see their own logs; --job.start-seconds waits longer",
        )
      if error is not None:
        refusal = {"refused": error.cause, "cure": error.cure, "code": error.exit_code}
        for line in [*self.lines.values(), *self.turned_away]:
          with contextlib.suppress(OSError):
            line.send(refusal)
          line.close()
        raise error
      port = free_port(address, self.job.port + 1)
    # The others know how they have reached process 0; JAX listens at the same address.
    welcome = {
      "port": port,
      "cards": sorted(self.cards.values()),
    }
    for number, line in self.lines.items():
      try:
        line.send(welcome)
      except OSError as e:
        raise PeerLostError(f"{self.cards[number]} left before the start: {e}") from e
    where = _join_address(address, port)
    return Meeting(self.lines, self.cards, where, where)

  def wait(self, listener: socket.socket, deadline: float) -> None:
    """Waits until all have come or the deadline has passed; once something differs, only
    `ODD_ONES_OUT` seconds more."""
    arrived: dict[Line, float] = {}
    report = time.monotonic() + REPORT
    with selectors.DefaultSelector() as selector:
      selector.register(listener, selectors.EVENT_READ)
      while len(self.claims) < self.job.num_processes and time.monotonic() < deadline:
        for key, _ in selector.select(min(0.5, max(0.0, deadline - time.monotonic()))):
          if key.fileobj is listener:
            line = Line(listener.accept()[0])
            line.socket.setblocking(False)
            arrived[line] = time.monotonic()
            selector.register(line.socket, selectors.EVENT_READ, line)
            continue
          line = key.data
          try:
            messages = line.receive()
          except Garbage:
            messages = None
          if messages == []:
            continue
          selector.unregister(line.socket)
          arrived.pop(line)
          if not messages or not self.admit(line, messages[0]):
            line.close()
        for line in [x for x, at in arrived.items() if time.monotonic() - at > STRANGER]:
          selector.unregister(line.socket)
          arrived.pop(line)
          line.close()
        if self.verdict() is not None:
          deadline = min(deadline, time.monotonic() + ODD_ONES_OUT)
          # From here on it waits only for the claims of the others.
          if len(self.claims) + len(self.twice) >= self.job.num_processes:
            deadline = 0.0
        if time.monotonic() > report:
          report += REPORT
          self.log(f"waiting for {self.missing()}")
    for line in arrived:
      line.close()

  def admit(self, line: Line, message: dict[str, Any]) -> bool:
    """Adds a process of our job to the others; False for anything else."""
    try:
      given = str(message["token"]).encode()
      is_ours = hmac.compare_digest(given, self.token.encode())
      if message["rendezvous"] != VERSION or not is_ours:
        return False
      card = _hear(message["card"])
      claims = {str(key): str(value) for key, value in message["claims"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
      return False
    line.socket.setblocking(True)
    if card.process in self.cards:
      self.twice.append((self.cards[card.process], card))
      self.turned_away.append(line)
    else:
      self.claims[card.process], self.cards[card.process] = claims, card
      self.lines[card.process] = line
    return True

  def verdict(self) -> FlaxLMError | None:
    """What is wrong with the processes that have come, in one line; or None."""
    if self.twice:
      pairs = (f"{first} and {second}" for first, second in self.twice[:MOST_DIFFERENCES])
      return ConfigError(
        f"{' and '.join(pairs)} have the same process number",
        "give each process a number of its own",
      )
    lines = []
    for key in sorted({key for said in self.claims.values() for key in said}):
      sayings = defaultdict(list)
      for process, said in sorted(self.claims.items()):
        sayings[said.get(key, "nothing")].append(process)
      if len(sayings) > 1:
        lines.append(f"{key} is {_who_says_what(sayings, self.cards)}")
    count = self.job.num_processes
    outside = [card for process, card in self.cards.items() if process >= count]
    if not lines and outside:
      lines = [f"{outside[0]} is one too many: the job has {count} processes"]
    if not lines:
      return None
    if len(lines) > MOST_DIFFERENCES:
      lines[MOST_DIFFERENCES:] = [f"{len(lines) - MOST_DIFFERENCES} more"]
    return ConfigError(
      "the processes differ: " + "; ".join(lines),
      "start all of them with the same command, code and packages",
    )

  def missing(self) -> str:
    """`processes 2, 4-5 of 8`: those that have not come."""
    count = self.job.num_processes
    absent = [n for n in range(count) if n not in self.cards]
    return f"process{'es' * (len(absent) > 1)} {_ranges(absent)} of {count}"


def _who_says_what(sayings: Mapping[str, list[int]], cards: Mapping[int, Card]) -> str:
  """`16 on process 1 (host, pid 7), 32 on processes 0, 2, 3`: the fewest first."""
  parts = []
  for value, processes in sorted(sayings.items(), key=lambda item: len(item[1])):
    who = f"processes {_ranges(processes)}"
    parts.append(f"{value} on {cards[processes[0]] if len(processes) == 1 else who}")
  return ", ".join(parts)


def _ranges(numbers: list[int]) -> str:
  """`0-2, 5` of 0, 1, 2, 5."""
  parts: list[list[int]] = []
  for number in numbers:
    if parts and number == parts[-1][-1] + 1:
      parts[-1] = [parts[-1][0], number]
    else:
      parts.append([number])
  return ", ".join("-".join(map(str, part)) for part in parts)


# -- The other processes -----------------------------------------------------------------


def _join(job: Job, card: Card, claims: Claims, seconds: float, token: str) -> Meeting:
  deadline = time.monotonic() + seconds
  about = {"token": token, "card": card, "claims": dict(claims)}
  hello = {"rendezvous": VERSION, **about}
  reason, pause = "", 0.1
  while True:
    left = deadline - time.monotonic()
    if left <= 0:
      raise PeerLostError(
        f"process 0 of {job.num_processes} did not answer at {job.host}:{job.port}: "
        f"{reason}",
        f"see its log; {job.source} says that it is there",
      )
    try:
      sock = socket.create_connection((job.host, job.port), timeout=min(left, 10.0))
    except OSError as e:
      reason = str(e)
    else:
      # Process 0 has listened for some time already, and gives up after as many seconds.
      sock.settimeout(seconds + 2 * ODD_ONES_OUT)
      line = Line(sock)
      answer = _ask(line, hello)
      if answer is not None:
        sock.settimeout(None)
        return _welcomed(job, line, answer)
      reason = "it closed the connection; is FLAXLM_JOB_TOKEN the same on all processes?"
      line.close()
    time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
    pause = min(2 * pause, 2.0)


def _ask(line: Line, hello: dict[str, Any]) -> dict[str, Any] | None:
  """The verdict of process 0, which may take long; None if it closes the connection."""
  try:
    line.send(hello)
    messages: list[dict[str, Any]] | None = []
    while messages == []:
      messages = line.receive()
    return messages[0] if messages else None
  except (OSError, Garbage):
    return None


def _welcomed(job: Job, line: Line, answer: dict[str, Any]) -> Meeting:
  if "refused" in answer:
    line.close()
    kind = PeerLostError if answer.get("code") == PeerLostError.exit_code else ConfigError
    raise kind(str(answer["refused"]), str(answer.get("cure", "")))
  cards = {card.process: card for card in map(_hear, answer["cards"])}
  # The address that has answered, because a name may have several.
  host = line.socket.getpeername()[0]
  return Meeting({0: line}, cards, _join_address(host, int(answer["port"])), "")


def _hear(said: Any) -> Card:
  process, host, pid = said
  if not (isinstance(process, int) and 0 <= process < 10**9 and isinstance(pid, int)):
    raise ValueError("not a card")
  return Card(process, str(host)[:255], pid)


# -- Where to listen -----------------------------------------------------------------------


def listen_address(job: Job, bind: str | None) -> str:
  """The one address on which process 0 listens. Raises `ConfigError`."""
  if bind is not None:
    return interface_address(bind) or _resolve(bind, "FLAXLM_BIND")
  address = _resolve(job.host, f"process 0, by {job.source},")
  if is_loopback(address) and not job.one_host:
    raise ConfigError(
      f"{job.host} is {address} on this machine: other hosts could not reach it",
      "set FLAXLM_BIND to the address or the interface of the cluster's network",
    )
  return address


def _resolve(host: str, what: str) -> str:
  try:
    return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
  except OSError as e:
    raise ConfigError(f"{what} is {host!r}: {e}", "name an address of this machine") from e


def interface_address(name: str) -> str | None:
  """The IPv4 address of a network interface such as eth0; None if it does not exist."""
  if sys.platform != "linux" or len(name) > 15 or "/" in name:
    return None
  import fcntl

  siocgifaddr = 0x8915  # linux/sockios.h
  with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    request = struct.pack("256s", name.encode())
    try:
      reply = fcntl.ioctl(sock.fileno(), siocgifaddr, request)
    except OSError:
      return None
  return socket.inet_ntoa(reply[20:24])


@contextlib.contextmanager
def _listener(job: Job, address: str) -> Iterator[socket.socket]:
  family = socket.AF_INET6 if ":" in address else socket.AF_INET
  with socket.socket(family, socket.SOCK_STREAM) as sock:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      sock.bind((address, job.port))
      sock.listen(job.num_processes)  # two that bind at once are found out only here
    except OSError as e:
      raise ConfigError(
        f"process 0 cannot listen at {_join_address(address, job.port)}: {e.strerror}",
        "another job uses the port, or a process 0 runs already: choose another "
        "JAX_COORDINATOR_PORT; or the address is another machine's: set FLAXLM_BIND",
      ) from e
    yield sock


def free_port(address: str = LOOPBACK, wanted: int = 0) -> int:
  """The port `wanted` if it is free, else any that is now, and most likely in a moment."""
  family = socket.AF_INET6 if ":" in address else socket.AF_INET
  for port in (wanted, 0):
    with socket.socket(family, socket.SOCK_STREAM) as sock, contextlib.suppress(OSError):
      sock.bind((address, port))
      return int(sock.getsockname()[1])
  return wanted


def _join_address(host: str, port: int) -> str:
  return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
