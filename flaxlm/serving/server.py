# SPDX-License-Identifier: Apache-2.0
"""The process that serves: its socket, its signals, and how it ends."""

import asyncio
import contextlib
import ipaddress
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from flaxlm.decoding.compile_counter import count_compilations
from flaxlm.decoding.loading import Run
from flaxlm.errors import INTERRUPTED, ConfigError, first_line
from flaxlm.serving.app import build_app
from flaxlm.serving.limits import HEAD_SECONDS, KEEP_ALIVE_SECONDS, MOST_CONNECTIONS, Limits
from flaxlm.serving.service import Service, draining

BACKLOG = 512
LAST_SECONDS = 3  # for answers that were cut off, and are being sent


# -- Where it listens ----------------------------------------------------------------------


def open_socket(host: str, port: int, has_keys: bool) -> socket.socket:
  """A socket that is bound, and not listening yet: clients are refused until all is ready.

  Raises `ConfigError` for an address that others can reach, unless there are keys, and for
  one that is in use.
  """
  try:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
  except (OSError, UnicodeError) as e:
    raise ConfigError(f"--host {host}: {first_line(e)}", "--host 127.0.0.1") from e
  family, kind, protocol, _, address = found[0]
  if not has_keys and not ipaddress.ip_address(address[0]).is_loopback:
    raise ConfigError(
      f"--host {host} can be reached from elsewhere, and there are no keys",
      "give --api-key-file FILE, or leave --host out",
    )
  sock = socket.socket(family, kind, protocol)
  sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  with in_use(sock, host, port):
    sock.bind(address)
  return sock


@contextlib.contextmanager
def in_use(sock: socket.socket, host: str, port: int) -> Iterator[None]:
  """Turns an error of the system into a `ConfigError`."""
  try:
    yield
  except OSError as e:
    sock.close()
    cause = f"{host}:{port} cannot be served: {first_line(e)}"
    raise ConfigError(cause, "--port 0 takes a free one") from e


def url_of(sock: socket.socket) -> str:
  host, port = sock.getsockname()[:2]
  return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


# -- How it runs and ends ------------------------------------------------------------------


class QuietServer(uvicorn.Server):
  """Without handlers of its own for signals, which would end answers in the middle."""

  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    yield


class TimedProtocol(H11Protocol):
  """HTTP/1.1 with a time limit for the head of a request, which uvicorn has not: else
  clients that connect and say nothing would hold all connections."""

  _timer: asyncio.TimerHandle | None = None

  def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
    super().connection_made(transport)
    self._timer = self.loop.call_later(HEAD_SECONDS, transport.close)

  def data_received(self, data: bytes) -> None:
    super().data_received(data)
    if self.cycle is not None and not self.cycle.response_complete:
      self._stop_timer()  # the head is here
    elif self._timer is None:
      self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

  def connection_lost(self, exc: Exception | None) -> None:
    self._stop_timer()
    super().connection_lost(exc)

  def _stop_timer(self) -> None:
    if self._timer is not None:
      self._timer.cancel()
      self._timer = None


def build_server(app: Any) -> QuietServer:
  """HTTP/1.1 alone, with no trust in headers of proxies, and no log of requests."""
  return QuietServer(
    uvicorn.Config(
      app,
      loop="asyncio",
      http=TimedProtocol,
      ws="none",
      lifespan="off",
      log_config=None,
      log_level="error",
      access_log=False,
      proxy_headers=False,
      server_header=False,
      limit_concurrency=MOST_CONNECTIONS,
      backlog=BACKLOG,
      timeout_keep_alive=KEEP_ALIVE_SECONDS,
      timeout_graceful_shutdown=LAST_SECONDS,
    )
  )


def serve(
  run: Run,
  limits: Limits,
  sock: socket.socket,
  keys: Sequence[str] = (),
  is_warm: bool = False,
  on_ready: Callable[[str], None] = lambda url: None,
) -> int:
  """Answers until SIGTERM or Ctrl-C; returns the exit code.

  Then it refuses new requests, and has `limits.grace` seconds for those that run; a second
  signal ends them at once. One that `is_warm` compiles before it answers anybody.
  `on_ready` gets the URL. Raises what has ended the engine, if that breaks down.
  """
  ending, hurry = asyncio.Event(), asyncio.Event()
  exit_code = 0

  async def run_it() -> None:
    loop = asyncio.get_running_loop()

    def broke(_: BaseException) -> None:
      loop.call_soon_threadsafe(ending.set)

    service = Service(run, limits, broke)
    with contextlib.closing(service), count_compilations() as service.compiled:
      if is_warm:
        service.warm()
      service.start()
      with taking_signals(loop, told):
        await listen(service)
    if service.worker.error is not None:
      raise service.worker.error

  def told(number: int) -> None:
    nonlocal exit_code
    if ending.is_set():
      hurry.set()
    ending.set()
    exit_code = INTERRUPTED if number == signal.SIGINT else 0

  async def listen(service: Service) -> None:
    host, port = sock.getsockname()[:2]
    with in_use(sock, host, port):
      sock.listen(BACKLOG)
    server = build_server(build_app(service, keys))
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    on_ready(url_of(sock))
    waiting = asyncio.create_task(ending.wait())
    await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
    service.is_draining = True
    if service.worker.error is None:
      await drained(service, hurry)
    server.should_exit = True
    await serving

  asyncio.run(run_it())
  return exit_code


async def drained(service: Service, hurry: asyncio.Event) -> None:
  """Waits until all answers are sent, the time of grace is over, or it is in a hurry."""
  with contextlib.suppress(TimeoutError):
    async with asyncio.timeout(service.limits.grace):
      while service.num_open and not hurry.is_set():
        await asyncio.sleep(0.02)
  service.worker.end_all(draining(1))


@contextlib.contextmanager
def taking_signals(
  loop: asyncio.AbstractEventLoop, told: Callable[[int], None]
) -> Iterator[None]:
  """SIGTERM and Ctrl-C are told on the loop, instead of ending what runs."""
  numbers = (signal.SIGTERM, signal.SIGINT)
  before = {number: signal.getsignal(number) for number in numbers}
  for number in numbers:
    loop.add_signal_handler(number, told, number)
  try:
    yield
  finally:
    for number in numbers:
      loop.remove_signal_handler(number)
      signal.signal(number, before[number])
