# SPDX-License-Identifier: Apache-2.0
"""The thread that owns the engine, and the bridge to it.

JAX has one user: nothing else runs programs, so that a pass over a prompt for its scores,
or a batch of embeddings, comes between two blocks of decode steps. Everything else is on
asyncio's side. Commands go over a queue, and what happens comes back by
`call_soon_threadsafe`, once for each step.
"""

import asyncio
import collections
import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from flaxlm.decoding.engine import Engine
from flaxlm.decoding.requests import Counters, EngineRequest, Event
from flaxlm.serving.errors import BROKEN, ApiError

Tell = Callable[[Any], None]
REST_SECONDS = 10.0  # without a request, until memory is given back


class Accepted(NamedTuple):
  """The engine has taken a request."""


@dataclasses.dataclass(eq=False)
class Ticket:
  """A request of a client. `tell` is called, on the client's loop, with `Accepted`, then
  with `Event`s up to the last, or with an exception, which is the last."""

  request: EngineRequest
  tell: Tell
  loop: asyncio.AbstractEventLoop
  number: int | None = None  # as the engine knows it
  is_open: bool = True


class Load(NamedTuple):
  """How busy the engine is, as of the last step."""

  num_waiting: int = 0
  num_active: int = 0
  counters: Counters = Counters()


def broken(error: BaseException) -> ApiError:
  return ApiError(
    500, f"the engine has broken down: {type(error).__name__}", BROKEN, code="engine_error"
  )


class Worker:
  """The thread. Its methods are for others; those with an underscore run in it.

  `on_error` and `on_rest` are called in it: when it breaks, and when nobody has asked for
  anything for `REST_SECONDS`.
  """

  def __init__(
    self,
    engine: Engine | None,
    on_error: Callable[[BaseException], None] = lambda _: None,
    on_rest: Callable[[], None] = lambda: None,
  ):
    self.load = Load()
    self.error: BaseException | None = None  # that has ended it
    self._engine, self._on_error, self._on_rest = engine, on_error, on_rest
    self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    self._calls: collections.deque[Callable[[], None]] = collections.deque()
    self._tickets: dict[int, Ticket] = {}
    self._lock = threading.Lock()
    self._open: set[Ticket | asyncio.Future] = set()  # who must be told if it breaks
    self._is_stopped = False
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

  def start(self) -> None:
    self._thread.start()

  def stop(self, seconds: float = 10.0) -> None:
    """Ends the thread after its step, and waits for it."""
    self._commands.put(self._stop)
    self._thread.join(seconds)

  # -- From asyncio

  def submit(self, request: EngineRequest, tell: Tell) -> Ticket:
    """Queues a request. Raises `ApiError` if the engine has broken down."""
    ticket = Ticket(request, tell, asyncio.get_running_loop())
    self._register(ticket)
    self._commands.put(lambda: self._submit(ticket))
    return ticket

  def cancel(self, ticket: Ticket) -> None:
    """Nothing more is told of a request, and its row becomes free."""
    if ticket.is_open:
      ticket.is_open = False
      with self._lock:
        self._open.discard(ticket)
      self._commands.put(lambda: self._cancel(ticket))

  def end_all(self, error: Exception) -> None:
    """Tells an error to all that wait, who are on this loop, and frees their rows."""
    for one in [*self._open]:
      if isinstance(one, Ticket):
        self.cancel(one)
        one.tell(error)
      elif not one.done():
        one.set_exception(error)

  async def call(self, function: Callable[[], Any]) -> Any:
    """What a function returns that runs programs, or its exception."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future = loop.create_future()
    self._register(future)
    self._commands.put(lambda: self._calls.append(lambda: self._call(function, future)))
    try:
      return await future
    finally:
      with self._lock:
        self._open.discard(future)

  def _register(self, what: Ticket | asyncio.Future) -> None:
    with self._lock:
      if self.error is not None:
        raise broken(self.error)
      self._open.add(what)

  # -- In the thread

  def _run(self) -> None:
    try:
      while not self._is_stopped:
        self._take_commands()
        if self._calls:
          self._calls.popleft()()
        if self._engine is not None and not self._engine.is_idle:
          self._tell(self._engine.step())
        self._note_load()
    except BaseException as e:  # whoever waits must know, whatever it is
      self._break(e)

  def _take_commands(self) -> None:
    """Runs all that have come; waits for one if there is nothing else to do."""
    is_idle = self._engine is None or self._engine.is_idle
    if is_idle and not self._calls:
      self._next_command()()
    with contextlib.suppress(queue.Empty):
      while True:
        self._commands.get(block=False)()

  def _next_command(self) -> Callable[[], None]:
    with contextlib.suppress(queue.Empty):
      return self._commands.get(timeout=REST_SECONDS)
    self._on_rest()
    return self._commands.get()

  def _stop(self) -> None:
    self._is_stopped = True

  def _submit(self, ticket: Ticket) -> None:
    if not ticket.is_open or self._engine is None:
      return
    try:
      ticket.number = self._engine.submit(ticket.request)
    except Exception as e:  # nothing of it has been taken
      self._send({ticket.loop: [(ticket, e)]})
      return
    self._tickets[ticket.number] = ticket
    self._send({ticket.loop: [(ticket, Accepted())]})

  def _cancel(self, ticket: Ticket) -> None:
    if ticket.number is not None and ticket.number in self._tickets:
      del self._tickets[ticket.number]
      assert self._engine is not None
      self._engine.cancel(ticket.number)
      self._note_load()

  def _call(self, function: Callable[[], Any], future: asyncio.Future) -> None:
    if future.cancelled():
      return
    try:
      result, error = function(), None
    except Exception as e:
      result, error = None, e

    def settle() -> None:
      if not future.done():
        future.set_exception(error) if error else future.set_result(result)

    with contextlib.suppress(RuntimeError):  # its loop has ended
      future.get_loop().call_soon_threadsafe(settle)

  def _tell(self, events: list[Event]) -> None:
    told: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Any]]] = {}
    for event in events:
      ticket = self._tickets.get(event.number)
      if ticket is not None:
        told.setdefault(ticket.loop, []).append((ticket, event))
        if event.finish_reason is not None:
          del self._tickets[event.number]
    self._send(told)

  def _send(self, told: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Any]]]) -> None:
    for loop, items in told.items():
      with contextlib.suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(self._deliver, items)

  def _deliver(self, items: list[tuple[Ticket, Any]]) -> None:
    """On the clients' loop."""
    for ticket, item in items:
      is_last = isinstance(item, Exception) or (
        isinstance(item, Event) and item.finish_reason is not None
      )
      if ticket.is_open:
        if is_last:
          ticket.is_open = False
          with self._lock:
            self._open.discard(ticket)
        ticket.tell(item)

  def _note_load(self) -> None:
    if self._engine is not None:
      counters = dataclasses.replace(self._engine.counters)
      self.load = Load(self._engine.num_waiting, self._engine.num_active, counters)

  def _break(self, error: BaseException) -> None:
    with self._lock:  # from now on nobody registers
      self.error = error
      still_open = [*self._open]
    for one in still_open:
      if isinstance(one, Ticket):
        self._send({one.loop: [(one, broken(error))]})
      else:
        settle = lambda f=one: f.done() or f.set_exception(broken(error))
        with contextlib.suppress(RuntimeError):
          one.get_loop().call_soon_threadsafe(settle)
    self._on_error(error)
