# SPDX-License-Identifier: Apache-2.0
"""The answers to one request, while the engine writes them."""

import asyncio
import collections
import dataclasses
from collections.abc import AsyncGenerator, Sequence

from flaxlm.decoding.completions import Completion, GrowingCompletion, Stopping
from flaxlm.decoding.loading import Run
from flaxlm.decoding.prefill import Request
from flaxlm.decoding.requests import Event
from flaxlm.decoding.sampling import SamplingSettings
from flaxlm.serving.errors import OVERLOADED, ApiError, api_error
from flaxlm.serving.worker import Accepted, Ticket, Worker


@dataclasses.dataclass(frozen=True)
class Piece:
  """What an answer has got more: certain text, and new tokens with what was likely."""

  index: int  # of the answer
  text: str
  tokens: list[int]
  logprobs: list[float]
  top: list[list[tuple[int, float]]]
  finish_reason: str | None = None  # of the last piece: stop, length or time


@dataclasses.dataclass(eq=False)
class _Answer:
  index: int
  grows: GrowingCompletion
  cached: int = 0  # tokens of its prompt that had been read before
  ticket: Ticket | None = None


class Generation:
  """Some answers, and what is still to come of them.

  Answer i is sample i % n of prompt i // n. Close it in the end, and whatever happens: then
  no row works for it.
  """

  def __init__(
    self,
    run: Run,
    worker: Worker,
    request: Request,
    settings: SamplingSettings,
    stop: Stopping,
    n: int,
    deadline: float,  # of the loop's clock
  ):
    self._worker, self._deadline, self._n = worker, deadline, n
    self._events: asyncio.Queue[tuple[_Answer, object]] = asyncio.Queue()
    self._early: collections.deque[tuple[_Answer, object]] = collections.deque()
    self._answers: list[_Answer] = []
    self._requests = []
    for row in range(len(request.prompts)):
      for of_sample in dataclasses.replace(settings, row=row).for_samples(n):
        grows = GrowingCompletion(Completion(""), run.tokenizer, stop)
        self._answers.append(_Answer(len(self._answers), grows))
        self._requests.append(grows.request(request, of_sample, row))

  @property
  def num_tokens(self) -> int:
    """Tokens that were written so far."""
    return sum(len(answer.grows.result.tokens) for answer in self._answers)

  @property
  def num_cached(self) -> int:
    """Tokens of the prompts that had been read for earlier requests, so far as is known."""
    first = self._answers[:: self._n]  # the samples of a prompt read it together
    return sum(answer.cached for answer in first)

  async def start(self) -> None:
    """Waits until the engine has taken all of them. Raises `ApiError` if it does not."""
    for answer, request in zip(self._answers, self._requests, strict=True):
      tell = lambda item, to=answer: self._events.put_nowait((to, item))
      answer.ticket = self._worker.submit(request, tell)
    missing = len(self._answers)
    while missing:
      try:
        async with asyncio.timeout_at(self._deadline):
          answer, item = await self._events.get()
      except TimeoutError as e:
        raise timed_out() from e
      if isinstance(item, Exception):
        raise api_error(item)
      if isinstance(item, Accepted):
        missing -= 1
      else:
        self._early.append((answer, item))

  async def pieces(self) -> AsyncGenerator[Piece, None]:
    """What is written, as soon as it is certain, until every answer has ended.

    Raises `ApiError` if the engine fails, or if the time is up before the first token.
    """
    left = len(self._answers)
    while left:
      try:
        async with asyncio.timeout_at(self._deadline):
          answer, item = await self._next()
      except TimeoutError as e:
        if not self.num_tokens:
          raise timed_out() from e
        for piece in self._cut_off():
          yield piece
        return
      if isinstance(item, Exception):
        raise api_error(item)
      assert isinstance(item, Event)
      if item.error is not None:
        raise api_error(item.error)
      piece = self._grown(answer, item)
      if piece.finish_reason is not None:
        left -= 1
        self._cancel(answer)
      yield piece

  def close(self) -> None:
    for answer in self._answers:
      self._cancel(answer)

  async def _next(self) -> tuple[_Answer, object]:
    """Of an answer that has not ended."""
    while True:
      found = self._early.popleft() if self._early else await self._events.get()
      if found[0].grows.result.finish_reason is None:
        return found

  def _grown(self, answer: _Answer, event: Event) -> Piece:
    answer.cached = event.cached
    result, before = answer.grows.result, len(answer.grows.result.tokens)
    text = answer.grows.extend(*event[1:5])
    if event.finish_reason == "length":
      text += answer.grows.finish("length")
    return Piece(
      answer.index,
      text,
      result.tokens[before:],
      result.logprobs[before:],
      [] if result.top_logprobs is None else result.top_logprobs[before:],
      result.finish_reason,
    )

  def _cut_off(self) -> Sequence[Piece]:
    """The ends of the answers whose time is up."""
    left = [a for a in self._answers if a.grows.result.finish_reason is None]
    return [Piece(a.index, a.grows.finish("time"), [], [], [], "time") for a in left]

  def _cancel(self, answer: _Answer) -> None:
    if answer.ticket is not None:
      self._worker.cancel(answer.ticket)


def timed_out() -> ApiError:
  return ApiError(
    503,
    "the time of the request is up, and nothing has been written",
    OVERLOADED,
    code="timeout",
    headers={"Retry-After": "1"},
  )
