# SPDX-License-Identifier: Apache-2.0
"""What each path answers: a body in, an object or a stream of objects out."""

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, NamedTuple

from flaxlm.decoding.encoding import ROWS_AT_A_TIME, embed_rows
from flaxlm.decoding.prefill import Request
from flaxlm.decoding.prompt_scores import PromptScores, score_prompt
from flaxlm.serving import shapes
from flaxlm.serving.bodies import (
  Answering,
  ChatBody,
  CompletionBody,
  EmbeddingBody,
  check_model,
)
from flaxlm.serving.errors import refuse
from flaxlm.serving.generation import Generation, Piece
from flaxlm.serving.service import Service
from flaxlm.serving.tool_calls import CallFinder, Part, writes_calls

Chunks = AsyncGenerator[dict[str, Any], None]


class Reply(NamedTuple):
  """An answer: its chunks, or the coroutine of a whole one. `stack` holds what it needs,
  and is closed when it is sent, or nobody wants it any more."""

  own_id: str
  stack: contextlib.ExitStack
  deadline: float
  ignored: list[str]
  chunks: Chunks | None = None
  whole: Callable[[], Any] | None = None
  warnings: Sequence[str] = ()


class _Clock:
  """Notes when the first token of a request has come."""

  def __init__(self, service: Service):
    self.service, self.started, self.is_first = service, time.monotonic(), True

  def see(self, piece: Piece) -> None:
    if self.is_first and piece.tokens:
      self.service.metrics.first_token.add(time.monotonic() - self.started)
      self.is_first = False


async def begun(
  service: Service,
  body: Answering,
  stack: contextlib.ExitStack,
  prepare: Callable[[Any], Request],
  count: int,
) -> tuple[Request, Generation, float]:
  """A request that the engine has taken, unless nothing is to be written."""
  check_model(body.model, [service.name])
  service.check_writes()
  deadline = asyncio.get_running_loop().time() + service.limits.time_limit
  stack.enter_context(service.admit(count))
  request = await service.prepare(prepare, body)
  generation = service.generation(request, body, deadline)
  stack.callback(generation.close)
  if body.max_tokens != 0:
    await generation.start()
  return request, generation, deadline


def num_read(request: Request) -> int:
  return sum(map(len, request.sources or request.prompts))


def usage_of(request: Request, generation: Generation) -> dict[str, Any]:
  num_read_before = generation.num_cached
  return shapes.usage_of(num_read(request), generation.num_tokens, num_read_before)


def reply_of(
  writer: "_TextWriter | _ChatWriter",
  body: Answering,
  stack: contextlib.ExitStack,
  deadline: float,
) -> Reply:
  reply = Reply(writer.own_id, stack, deadline, body.ignored)
  if body.stream:
    return reply._replace(chunks=writer.chunks())
  return reply._replace(whole=writer.whole)


async def gathered(
  parts: AsyncGenerator[tuple[int, Any, Any, Any], None], count: int
) -> list[list[tuple[Any, ...]]]:
  """Of each of `count` answers: what its parts have, their logprobs, and why they end."""
  told: list[list[list[Any]]] = [[] for _ in range(count)]
  async with contextlib.aclosing(parts):
    async for index, *part in parts:
      told[index].append(part)
  return [[*zip(*of_answer, strict=True)] for of_answer in told]


# -- Completions ---------------------------------------------------------------------------


async def complete(
  service: Service, body: CompletionBody, stack: contextlib.ExitStack
) -> Reply:
  """Raises `ApiError` for what the engine refuses."""
  clock, count = _Clock(service), len(body.prompts) * body.n
  request, generation, deadline = await begun(
    service, body, stack, service.request_of_prompts, count
  )
  if body.echo and request.sources is not None:
    refuse("echo", "echo is not supported: an encoder-decoder does not continue its prompt")
  echo = [] if not body.echo else await echoes(service, body, request)
  writer = _TextWriter(service, body, request, generation, echo, clock)
  return reply_of(writer, body, stack, deadline)


class Echo(NamedTuple):
  """A prompt that an answer begins with."""

  text: str
  prompt: Sequence[int]
  scores: PromptScores | None


async def echoes(service: Service, body: CompletionBody, request: Request) -> list[Echo]:
  found = []
  for given, prompt in zip(body.prompts, request.prompts, strict=True):
    text = given if isinstance(given, str) else service.run.tokenizer.decode(given)
    scores = None
    if body.num_top is not None:
      score = functools.partial(score_prompt, service.run, prompt, body.num_top)
      scores = await service.worker.call(score)
    found.append(Echo(text, prompt, scores))
  return found


class _TextWriter:
  """Writes the answers to one request as completions."""

  def __init__(
    self,
    service: Service,
    body: CompletionBody,
    request: Request,
    generation: Generation,
    echo: list[Echo],
    clock: _Clock,
  ):
    self.service, self.body, self.request = service, body, request
    self.generation, self.echo, self.clock = generation, echo, clock
    self.own_id = shapes.new_id("cmpl")
    self.count = len(body.prompts) * body.n
    num_top, tokenizer = body.num_top or 0, service.run.tokenizer
    self.logprobs = [shapes.TextLogprobs(tokenizer, num_top) for _ in range(self.count)]

  def _head(self) -> dict[str, Any]:
    return shapes.head("text_completion", self.own_id, self.service.name)

  def _echoed(self, index: int) -> tuple[str, dict | None]:
    of = self.echo[index // self.body.n]
    if of.scores is None:
      return of.text, None
    return of.text, self.logprobs[index].of_prompt(of.prompt, of.scores)

  async def _parts(self) -> AsyncGenerator[tuple[int, str, dict | None, str | None], None]:
    """(index, text, logprobs, finish_reason) of each part of an answer."""
    is_empty = self.body.max_tokens == 0
    if self.echo:
      for index in range(self.count):
        yield (index, *self._echoed(index), "length" if is_empty else None)
    if is_empty:
      return
    async with contextlib.aclosing(self.generation.pieces()) as pieces:
      async for piece in pieces:
        self.clock.see(piece)
        scored = self.body.num_top is not None
        logprobs = self.logprobs[piece.index].of_piece(piece) if scored else None
        yield piece.index, piece.text, logprobs, piece.finish_reason

  async def chunks(self) -> Chunks:
    more = {"usage": None} if self.body.include_usage else {}
    async with contextlib.aclosing(self._parts()) as parts:
      async for index, text, logprobs, reason in parts:
        if text or logprobs or reason:
          choice = shapes.text_choice(index, text, logprobs, reason)
          yield {**self._head(), "choices": [choice], **more}
    if self.body.include_usage:
      yield {
        **self._head(),
        "choices": [],
        "usage": usage_of(self.request, self.generation),
      }

  async def whole(self) -> dict[str, Any]:
    scored, choices = self.body.num_top is not None, []
    answers = await gathered(self._parts(), self.count)
    for index, (texts, logprobs, reasons) in enumerate(answers):
      joined = shapes.joined_logprobs([*filter(None, logprobs)]) if scored else None
      choices.append(shapes.text_choice(index, "".join(texts), joined, reasons[-1]))
    usage = usage_of(self.request, self.generation)
    return {**self._head(), "choices": choices, "usage": usage}


# -- Chats ---------------------------------------------------------------------------------


async def chat(service: Service, body: ChatBody, stack: contextlib.ExitStack) -> Reply:
  """Raises `ApiError` for what the template or the engine refuses."""
  clock = _Clock(service)
  request, generation, deadline = await begun(
    service, body, stack, service.request_of_chat, body.n
  )
  writer = _ChatWriter(service, body, request, generation, clock)
  return reply_of(writer, body, stack, deadline)


class _ChatWriter:
  """Writes the answers to one request as messages."""

  def __init__(
    self,
    service: Service,
    body: ChatBody,
    request: Request,
    generation: Generation,
    clock: _Clock,
  ):
    self.service, self.body, self.request = service, body, request
    self.generation, self.clock = generation, clock
    self.own_id = shapes.new_id("chatcmpl")
    self.finders: list[CallFinder] = []  # of each answer; none if there is nothing to call
    if body.tools is not None and service.chat is not None and writes_calls(service.chat):
      self.finders = [CallFinder() for _ in range(body.n)]

  async def _parts(self) -> AsyncGenerator[tuple[int, Part, dict | None, str | None], None]:
    """(index, text and calls, logprobs, finish_reason) of each part of an answer."""
    tokenizer, num_top = self.service.run.tokenizer, self.body.num_top
    ends = {*tokenizer.eos_ids}
    async with contextlib.aclosing(self.generation.pieces()) as pieces:
      async for piece in pieces:
        self.clock.see(piece)
        logprobs = None
        if num_top is not None:
          logprobs = shapes.chat_logprobs(tokenizer, piece, num_top, ends)
        part, reason = Part(piece.text, []), piece.finish_reason
        if self.finders:
          finder = self.finders[piece.index]
          part = finder.push(piece.text, is_last=reason is not None)
          reason = "tool_calls" if reason == "stop" and finder.count else reason
        yield piece.index, part, logprobs, reason

  async def chunks(self) -> Chunks:
    more = {"usage": None} if self.body.include_usage else {}
    head = lambda: shapes.head("chat.completion.chunk", self.own_id, self.service.name)
    for index in range(self.body.n):
      first = {"role": "assistant", "content": "", "refusal": None}
      yield {**head(), "choices": [shapes.delta_choice(index, first, None, None)], **more}
    async with contextlib.aclosing(self._parts()) as parts:
      async for index, (text, calls), logprobs, reason in parts:
        has_logprobs = bool(logprobs and logprobs["content"])
        delta: dict[str, Any] = {"content": text} if text or has_logprobs else {}
        delta |= {"tool_calls": calls} if calls else {}
        if delta or reason:
          choice = shapes.delta_choice(index, delta, logprobs, reason)
          yield {**head(), "choices": [choice], **more}
    if self.body.include_usage:
      yield {**head(), "choices": [], "usage": usage_of(self.request, self.generation)}

  async def whole(self) -> dict[str, Any]:
    scored, choices = self.body.num_top is not None, []
    answers = await gathered(self._parts(), self.body.n)
    for index, (parts, logprobs, reasons) in enumerate(answers):
      text = "".join(part.text for part in parts)
      calls = [call for part in parts for call in part.calls]
      content = [
        token for of_part in logprobs for token in (of_part or {}).get("content", [])
      ]
      joined = {"content": content, "refusal": None} if scored else None
      choices.append(shapes.message_choice(index, text, calls, joined, reasons[-1]))
    head = shapes.head("chat.completion", self.own_id, self.service.name)
    return {**head, "choices": choices, "usage": usage_of(self.request, self.generation)}


# -- Embeddings, and what is served --------------------------------------------------------


async def embed(
  service: Service, body: EmbeddingBody, stack: contextlib.ExitStack
) -> Reply:
  """Raises `ApiError` for a run that is no encoder, and for texts that do not fit."""
  check_model(body.model, [service.name])
  deadline = asyncio.get_running_loop().time() + service.limits.time_limit
  stack.enter_context(service.admit(1))
  rows, warnings = await service.prepare(service.rows_of_texts, body)
  pooling = service.pooling
  assert pooling is not None

  async def whole() -> dict[str, Any]:
    data: list[dict[str, Any]] = []
    for start in range(0, len(rows), ROWS_AT_A_TIME):
      some = rows[start : start + ROWS_AT_A_TIME]
      compute = functools.partial(embed_rows, service.run, some, pooling)
      for vector_D in await service.worker.call(compute):
        if body.dimensions not in (None, len(vector_D)):
          message = f"vectors have {len(vector_D)} dimensions, and no others"
          refuse("dimensions", message, "unsupported_parameter")
        data.append(shapes.embedding(len(data), vector_D, body.is_base64))
    num_tokens = sum(map(len, rows))
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "data": data, "model": service.name, "usage": usage}

  own_id = shapes.new_id("embd")
  return Reply(own_id, stack, deadline, body.ignored, whole=whole, warnings=warnings)


def describe(service: Service) -> dict[str, Any]:
  """The run as a model of OpenAI's API, and what it can be asked for."""
  return {
    "id": service.name,
    "object": "model",
    "created": service.started,
    "owned_by": "flaxlm",
    "max_model_len": service.run.model.cfg.context,
    "endpoints": service.endpoints,
  }
