# SPDX-License-Identifier: Apache-2.0
"""What one server has: the run, the thread of the engine, its limits, and who is served."""

import asyncio
import concurrent.futures
import contextlib
import itertools
import math
import reprlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from flaxlm.chat.templates import Chat, Talk, load_chat
from flaxlm.decoding.compile_counter import CompileCounter
from flaxlm.decoding.completions import make_request
from flaxlm.decoding.constraint import build_part
from flaxlm.decoding.encoding import ROWS_AT_A_TIME, embed_rows, rows_to_embed
from flaxlm.decoding.engine import Engine
from flaxlm.decoding.loading import Run
from flaxlm.decoding.pooling import load_pooling
from flaxlm.decoding.prefill import SMALLEST_BUCKET, Request
from flaxlm.decoding.prompt_scores import score_prompt
from flaxlm.decoding.requests import EngineOptions, few_shapes
from flaxlm.decoding.warming import warm
from flaxlm.errors import ConfigError
from flaxlm.platform import free_memory, release_freed_memory
from flaxlm.serving.bodies import Answering, ChatBody, CompletionBody, EmbeddingBody, Tokens
from flaxlm.serving.errors import OVERLOADED, ApiError, api_error, refuse
from flaxlm.serving.generation import Generation
from flaxlm.serving.limits import FORM_THREADS, MOST_TOP, PREPARING_THREADS, Limits
from flaxlm.serving.metrics import Metrics
from flaxlm.serving.worker import Worker
from flaxlm.sharding import use_mesh

T = TypeVar("T")
CACHE_SHARE = 4  # of memory, of which the batch has one: moved, it is there twice


class Service:
  """A run that answers. Start it before it is asked, and close it in the end.

  `on_error` is called, in the engine's thread, when that has broken down.
  """

  def __init__(
    self,
    run: Run,
    limits: Limits,
    on_error: Callable[[BaseException], None] = lambda _: None,
  ):
    self.run, self.limits, self.metrics = run, limits, Metrics()
    self.name, self.started = run.path.name or "model", int(time.time())
    self.is_encoder = run.cfg.model.family == "encoder"
    self.chat: Chat | None = None if self.is_encoder else load_chat(run.path)
    self.pooling = load_pooling(run.path) if self.is_encoder else None
    self.compiled = CompileCounter()
    self.is_draining = False
    self.num_open = 0  # answers that are written or wait
    self.mean_seconds = 1.0  # of the last requests
    self.engine = None if self.is_encoder else build_engine(run, limits)
    self.worker = Worker(self.engine, on_error, self._rest)
    self._renderer = self.chat.renderer() if self.chat else None
    pool = concurrent.futures.ThreadPoolExecutor
    self._threads = pool(PREPARING_THREADS, "prepare")
    self._forms = pool(FORM_THREADS, "forms")  # nobody else waits for slow automata

  def start(self) -> None:
    self.worker.start()

  def warm(self) -> None:
    """Compiles what requests need, before the start."""
    self._compile()
    release_freed_memory()

  def _compile(self) -> None:
    lengths = [SMALLEST_BUCKET]
    while self.run.model.cfg.family != "rnn" and lengths[-1] < self.run.model.cfg.context:
      lengths.append(min(2 * lengths[-1], self.run.model.cfg.context))
    if self.engine is not None:
      warm(self.engine)
      if self.run.model.cfg.family == "encoder_decoder":
        return
      for length, num_top in itertools.product(lengths, (0, 1, MOST_TOP)):
        score_prompt(self.run, [0] * length, num_top)
    counts = [1 << n for n in range(ROWS_AT_A_TIME.bit_length())]
    if self.pooling is not None:
      for length, count in itertools.product(lengths, counts):
        embed_rows(self.run, [[0] * length] * count, self.pooling)

  def close(self) -> None:
    self.worker.stop()
    for threads in (self._threads, self._forms):
      threads.shutdown(wait=False, cancel_futures=True)
    if self._renderer is not None:
      self._renderer.close()

  def _rest(self) -> None:
    """In the engine's thread. What the next requests need is mapped again: a quarter of a
    second for each GB."""
    if self.engine is not None:
      self.engine.rest()
    release_freed_memory()

  @property
  def endpoints(self) -> list[str]:
    """What this run can be asked for."""
    if self.is_encoder:
      return ["embeddings"]
    return ["completions", *(["chat/completions"] if self.chat else [])]

  # -- Who is served

  @contextlib.contextmanager
  def admit(self, count: int) -> Iterator[None]:
    """Room for some answers. Raises `ApiError` while the server ends, or is full."""
    if self.is_draining:
      raise draining(self.limits.grace)
    if self.num_open + count > self.limits.most_open:
      raise ApiError(
        429,
        f"{self.num_open} answers are written or wait, of at most {self.limits.most_open}",
        OVERLOADED,
        code="queue_full",
        headers={"Retry-After": str(self._seconds_of_queue())},
      )
    self.num_open += count
    started = time.monotonic()
    try:
      yield
    finally:
      self.num_open -= count
      seconds = time.monotonic() - started
      self.mean_seconds += 0.1 * (seconds - self.mean_seconds)
      self.metrics.seconds.add(seconds)

  def _seconds_of_queue(self) -> int:
    """When to ask again: when the queue is half as long, if all goes on as it did."""
    rounds = self.limits.max_queue / self.limits.slots / 2
    return min(60, max(1, math.ceil(self.mean_seconds * rounds)))

  # -- What comes before the engine, in threads of its own

  async def prepare(self, function: Callable[[Any], T], body: Any) -> T:
    """Runs a function that takes long and runs no programs. Raises `ApiError`."""
    has_form = isinstance(body, Answering) and body.settings.regex is not None
    threads = self._forms if has_form else self._threads
    try:
      return await asyncio.get_running_loop().run_in_executor(threads, function, body)
    except ConfigError as e:
      raise api_error(e) from e

  def check_writes(self) -> None:
    if self.is_encoder:
      refuse("model", f"{self.name} is an encoder: ask /v1/embeddings", "wrong_endpoint")

  def request_of_prompts(self, body: CompletionBody) -> Request:
    """The ids of a completion's prompts."""
    self._build(body)
    found = [self._encoded(prompt) for prompt in body.prompts]
    sources = [source for _, source in found if source is not None] or None
    prompts = [prompt for prompt, _ in found]
    return self._request(prompts, sources, body, "prompt")

  def request_of_chat(self, body: ChatBody) -> Request:
    """The ids of a conversation, as the run's template writes it."""
    if self.chat is None or self._renderer is None:
      refuse(
        "messages", f"{self.name} has no chat template: ask /v1/completions", "no_template"
      )
    self._build(body)
    try:
      text = self.chat.render_by(self._renderer, Talk(body.messages, body.tools))
    except ConfigError as e:  # it has no place for tools
      raise api_error(ConfigError(e.cause), "tools") from e
    request = make_request(self.run, [text], 1, has_specials=True)
    return self._request(request.prompts, request.sources, body, "messages")

  def rows_of_texts(self, body: EmbeddingBody) -> tuple[list[Tokens], list[str]]:
    """The ids of each input, and warnings of what was cut."""
    pooling, warnings = self.pooling, list[str]()
    if pooling is None:
      refuse("model", f"{self.name} is not an encoder", "wrong_endpoint")
    rows = []
    for number, one in enumerate(body.inputs, 1):
      if isinstance(one, str):
        try:
          rows += rows_to_embed(self.run, [one], pooling, warnings.append)
        except ConfigError as e:
          raise api_error(ConfigError(f"input {number}: {e.cause}", e.cure), "input") from e
        continue
      self._check_ids("input", one)
      if len(one) > self.run.model.cfg.context:
        context = self.run.model.cfg.context
        cause = f"input {number} has {len(one)} tokens > model.context={context}"
        raise api_error(ConfigError(cause, "shorten it"), "input")
      rows.append(one)
    return rows, sorted({*warnings})

  def _build(self, body: Answering) -> None:
    """The automaton of a form, which the engine then finds built."""
    if body.settings.regex is not None:
      build_part(body.settings.regex, self.run.tokenizer)

  def _encoded(self, prompt: str | Tokens) -> tuple[Sequence[int], Sequence[int] | None]:
    """What is continued, and what an encoder-decoder reads. Ids are taken as they are."""
    if isinstance(prompt, str):
      request = make_request(self.run, [prompt], 1)
      return request.prompts[0], None if request.sources is None else request.sources[0]
    self._check_ids("prompt", prompt)
    if self.run.cfg.model.family == "encoder_decoder":
      return self.run.tokenizer.framed([], "prompt"), prompt
    return prompt, None

  def _check_ids(self, name: str, ids: Tokens) -> None:
    num_ids = self.run.model.cfg.num_ids
    for token in (min(ids), max(ids)):
      if not 0 <= token < num_ids:
        shown = reprlib.repr(token)
        refuse(name, f"{name}: there is no token id {shown}; ids are 0 to {num_ids - 1}")

  def _request(
    self, prompts: Sequence[Sequence[int]], sources: Any, body: Answering, param: str
  ) -> Request:
    cfg = self.run.model.cfg
    most = body.max_tokens
    if most is None:
      room = math.inf if cfg.family == "rnn" else cfg.context - max(map(len, prompts))
      most = int(max(1, min(room, self.limits.max_tokens)))
    request = Request(prompts, max(1, most), self.run.num_ids, sources, body.num_top or 0)
    try:
      request.check(cfg)
    except ConfigError as e:
      raise api_error(e, param) from e
    for token in body.settings.logit_bias:
      if token >= self.run.num_ids:
        most = self.run.num_ids - 1
        refuse("logit_bias", f"logit_bias: there is no token id {token}; at most {most}")
    return request

  # -- The engine

  def generation(self, request: Request, body: Answering, deadline: float) -> Generation:
    return Generation(
      self.run, self.worker, request, body.settings, body.stop, body.n, deadline
    )


def build_engine(run: Run, limits: Limits) -> Engine:
  # Settings come in all combinations: few shapes, or something would be compiled all day.
  shapes = few_shapes(run.model.cfg, limits.slots, MOST_TOP)
  options = EngineOptions(
    rows=limits.slots,
    most_bytes=limits.cache_bytes or free_memory([*run.mesh.devices.flat]) // CACHE_SHARE,
    prefix_bytes=limits.prefix_bytes,
    is_open=True,
    shapes=shapes,
  )
  # Within its mesh, as all that the engine does: arrays made without are of another type,
  # for which programs would be compiled again.
  with use_mesh(run.mesh):
    return Engine(run.model, run.params, run.num_ids, run.mesh, run.tokenizer, options)


def draining(seconds: float) -> ApiError:
  """For requests that come while a server ends: another one may be there by then."""
  return ApiError(
    503,
    "the server is ending",
    OVERLOADED,
    code="draining",
    headers={"Retry-After": str(math.ceil(seconds))},
  )
