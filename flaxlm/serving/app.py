# SPDX-License-Identifier: Apache-2.0
"""The application: paths, who may ask, what is read of a request, how answers are sent.

No header is trusted to say where a request came from or where to go. Without keys, only a
loopback address is served, and only under a loopback name: a page of another site, whose
name an attacker lets point to 127.0.0.1, gets nothing. No other site may read answers (no
CORS), and bodies must say that they are JSON, which a page cannot send without asking.
"""

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flaxlm.decoding.jobs import read_object
from flaxlm.errors import ConfigError, FlaxLMError
from flaxlm.serving import page
from flaxlm.serving.bodies import read_chat, read_completion, read_embedding
from flaxlm.serving.endpoints import Reply, chat, complete, describe, embed
from flaxlm.serving.errors import ApiError, api_error
from flaxlm.serving.generation import timed_out
from flaxlm.serving.limits import BODY_SECONDS
from flaxlm.serving.metrics import CONTENT_TYPE
from flaxlm.serving.service import Service, draining
from flaxlm.strict_json import to_json

T = TypeVar("T")
SEND_SECONDS = 30.0  # to take an answer, after the time of the request
# What anyone may ask who reaches the server: it tells nothing of anybody.
OPEN_PATHS = {"/health", *page.FILES}
PATHS = {"/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/models"}
PATHS |= {"/metrics", *OPEN_PATHS}


class StrictJSON(JSONResponse):
  """JSON that every reader takes."""

  def render(self, content: Any) -> bytes:
    return to_json(content, separators=(",", ":")).encode()


def build_app(service: Service, keys: Iterable[str] = ()) -> ASGIApp:
  """The application of a service that has started; with keys, for those who have one."""
  read_of: dict[str, tuple[Callable, Callable]] = {
    "/v1/completions": (read_completion, complete),
    "/v1/chat/completions": (read_chat, chat),
    "/v1/embeddings": (lambda values, _: read_embedding(values), embed),
  }

  def posts(path: str) -> Route:
    read, answer = read_of[path]

    async def endpoint(request: Request) -> Response:
      values = await read_body(request, service.limits.max_body)
      body = read(values, service.limits)
      with contextlib.ExitStack() as stack:
        reply = await answer(service, body, stack)
        return await respond(service, request, reply)

    return Route(path, endpoint, methods=["POST"])

  async def models(request: Request) -> Response:
    return StrictJSON({"object": "list", "data": [describe(service)]})

  async def model(request: Request) -> Response:
    if request.path_params["name"] != service.name:
      raise ApiError(404, f"there is only {service.name}", code="model_not_found")
    return StrictJSON(describe(service))

  async def health(request: Request) -> Response:
    broken = service.worker.error is not None
    status = "broken" if broken else "draining" if service.is_draining else "ok"
    return StrictJSON({"status": status}, 200 if status == "ok" else 503)

  async def metrics(request: Request) -> Response:
    load, limits = service.worker.load, service.limits
    text = service.metrics.text(load, limits, service.num_open, service.compiled)
    return Response(text, media_type=CONTENT_TYPE)

  routes = [
    *map(posts, read_of),
    Route("/v1/models", models),
    Route("/v1/models/{name:path}", model),
    Route("/health", health),
    Route("/metrics", metrics),
    *(Route(path, page.respond) for path in page.FILES),
  ]
  handlers: Mapping[Any, Callable] = {
    HTTPException: refused,
    ClientDisconnect: nobody_there,
    ApiError: failed,
    FlaxLMError: failed,
    Exception: failed,
  }
  inner = Starlette(routes=routes, exception_handlers=handlers)
  inner.router.redirect_slashes = False  # it would believe the Host header
  return Door(inner, service, keys)


async def refused(_: Request, error: Exception) -> Response:
  """For a path or a method that is not there."""
  assert isinstance(error, HTTPException)
  codes = {404: "not_found", 405: "method_not_allowed"}
  status = error.status_code
  allowed = dict(error.headers or {})
  message = "there is no such path" if status == 404 else str(error.detail)
  return error_response(ApiError(status, message, code=codes.get(status), headers=allowed))


async def failed(_: Request, error: Exception) -> Response:
  return error_response(api_error(error))


async def nobody_there(request: Request, _: Exception) -> Response:
  return Silence()


class Silence(Response):
  """For a client that has gone: nothing is sent."""

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    pass


def error_response(error: ApiError) -> Response:
  return StrictJSON(error.as_json(), error.status, headers=dict(error.headers))


# -- The door ------------------------------------------------------------------------------


class Door:
  """What every request passes: who asks, and what every answer has."""

  def __init__(self, inner: ASGIApp, service: Service, keys: Iterable[str]):
    self.inner, self.service = inner, service
    self.digests = [hashlib.sha256(key.encode()).digest() for key in keys]

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
      await self.inner(scope, receive, send)
      return
    path, has_begun = scope["path"], False

    async def counted(message: Message) -> None:
      nonlocal has_begun
      if message["type"] == "http.response.start":
        has_begun = True
        known = path if path in PATHS else "other"
        self.service.metrics.requests[known, message["status"]] += 1
        message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
        if path not in page.FILES:
          message["headers"].append((b"cache-control", b"no-store"))
      await send(message)

    try:
      self.check(scope)
    except ApiError as e:
      await error_response(e)(scope, receive, counted)
      return
    try:
      await self.inner(scope, receive, counted)
    except asyncio.CancelledError:  # the server has waited long enough for it
      if not has_begun:
        await error_response(draining(1))(scope, receive, counted)

  def check(self, scope: Scope) -> None:
    """Raises `ApiError` for a request that is not answered, before any of it is read."""
    headers = {name: value for name, value in scope["headers"]}
    if self.digests:
      self.check_key(scope["path"], headers.get(b"authorization", b""))
    elif not is_loopback_name(headers.get(b"host", b"").decode("latin-1")):
      raise ApiError(403, "without keys, only localhost is served", code="wrong_host")
    if scope["method"] != "POST":
      return
    kind = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0]
    if kind.strip().lower() != "application/json":
      message = "the body must be JSON: Content-Type: application/json"
      raise ApiError(415, message, code="not_json")
    if self.service.is_draining:
      raise draining(self.service.limits.grace)

  def check_key(self, path: str, given: bytes) -> None:
    """Compares with all keys, in the same time whatever is given."""
    scheme, _, key = given.partition(b" ")
    digest, found = hashlib.sha256(key.strip()).digest(), False
    for known in self.digests:
      found |= hmac.compare_digest(digest, known)
    if path not in OPEN_PATHS and not (found and scheme.lower() == b"bearer"):
      raise ApiError(
        401,
        "the API key is missing or wrong: Authorization: Bearer KEY",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
      )


def is_loopback_name(host: str) -> bool:
  """Whether a Host header names this machine: no name of a domain does."""
  before, colon, port = host.rpartition(":")
  name = before if colon and port.isdecimal() else host
  name = name.removeprefix("[").removesuffix("]").rstrip(".").lower()
  try:
    return name in ("", "localhost") or ipaddress.ip_address(name).is_loopback
  except ValueError:
    return False


# -- Bodies in, answers out ----------------------------------------------------------------


async def read_body(request: Request, most: int) -> dict[str, Any]:
  """The JSON object of a body. Raises `ApiError` for one that is none, or too large."""
  too_large = ApiError(
    413,
    f"the body has more than {most} bytes",
    code="body_too_large",
    headers={"Connection": "close"},
  )
  said = request.headers.get("content-length", "")
  if said.isdecimal() and int(said[:20]) > most:
    raise too_large
  data = bytearray()
  try:
    async with asyncio.timeout(BODY_SECONDS):
      async for part in request.stream():
        data += part
        if len(data) > most:
          raise too_large
  except TimeoutError as e:
    headers = {"Connection": "close"}
    raise ApiError(408, "the body did not come", code="timeout", headers=headers) from e
  try:
    return read_object(data.decode())
  except UnicodeDecodeError as e:
    raise ApiError(400, "the body is not UTF-8", code="not_json") from e
  except ConfigError as e:
    raise ApiError(400, f"the body is not JSON: {e.cause}", code="not_json") from e


async def respond(service: Service, request: Request, reply: Reply) -> Response:
  """The response to a reply. A client that goes away ends the work for it."""
  headers = {"X-Request-Id": reply.own_id}
  if reply.ignored:
    headers["X-Flaxlm-Ignored"] = ", ".join(reply.ignored)
  if reply.warnings:
    headers["X-Flaxlm-Warning"] = "; ".join(reply.warnings)
  if reply.chunks is not None:
    # What the reply needs is closed by the stream, which has not been sent yet.
    return EventStream(service, reply, reply.stack.pop_all(), headers)
  assert reply.whole is not None
  try:
    async with asyncio.timeout_at(reply.deadline + SEND_SECONDS):
      found = await unless_gone(request.receive, reply.whole())
  except TimeoutError as e:
    raise timed_out() from e
  except ClientDisconnect:
    service.metrics.num_left += 1
    raise
  return StrictJSON(found, headers=headers)


class EventStream(Response):
  """Server-sent events: an object each, then [DONE]; or an error."""

  def __init__(
    self,
    service: Service,
    reply: Reply,
    stack: contextlib.ExitStack,
    headers: Mapping[str, str],
  ):
    self.service, self.reply, self.stack = service, reply, stack
    self.status_code, self.background = 200, None
    self.body = b""
    self.init_headers({**headers, "content-type": "text/event-stream; charset=utf-8"})
    del self.headers["content-length"]

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    with self.stack:
      try:
        async with asyncio.timeout_at(self.reply.deadline + SEND_SECONDS):
          await unless_gone(receive, self.send_all(send))
      except ClientDisconnect:
        self.service.metrics.num_left += 1

  async def send_all(self, send: Send) -> None:
    start = {"status": 200, "headers": self.raw_headers}
    await send({"type": "http.response.start", **start})
    part = lambda text: {
      "type": "http.response.body",
      "body": f"data: {text}\n\n".encode(),
      "more_body": True,
    }
    assert self.reply.chunks is not None
    try:
      async with contextlib.aclosing(self.reply.chunks) as chunks:
        async for chunk in chunks:
          await send(part(to_json(chunk, separators=(",", ":"))))
      await send(part("[DONE]"))
    except ApiError as e:
      await send(part(to_json(e.as_json())))
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
  """What `work` returns. Raises `ClientDisconnect`, and cancels it, if the client goes."""
  task, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected(receive))
  both: set[asyncio.Future] = {task, gone}
  try:
    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
      raise ClientDisconnect
    return task.result()
  finally:
    for one in both:
      one.cancel()
    await asyncio.gather(*both, return_exceptions=True)


async def disconnected(receive: Callable[[], Awaitable[Message]]) -> None:
  while (await receive())["type"] != "http.disconnect":
    pass
