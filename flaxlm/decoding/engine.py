# SPDX-License-Identifier: Apache-2.0
"""The engine: requests come and go, and share one batch whose rows are never idle for long.

Each prompt is read into a cache of its own, a chunk at a time between blocks of decode
steps. Then it takes a free row of the batch, and is decoded with all others. A row that has
ended takes the next request after the block. The batch follows what is there: it has as
many rows, and each as many slots, as the active requests need, rounded up to buckets, so
that few programs are compiled.

One thread drives it: `submit`, `cancel` and `step`, which returns what has happened.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flaxlm.config import ResolvedModel
from flaxlm.decoding.constraint import (
  FREE,
  NO_AUTOMATON,
  Automaton,
  build_automaton,
  build_part,
)
from flaxlm.decoding.generate import StaticSampling
from flaxlm.decoding.prefill import (
  BLOCK_STEPS,
  CHUNK,
  SMALLEST_BUCKET,
  Request,
  bucket,
  init_cache_with_source,
  logits_of_hidden,
  pad_rows,
  prefill_chunk,
)
from flaxlm.decoding.prefill import take_rows as take_read
from flaxlm.decoding.prefix_store import (
  PIECE,
  PrefixStore,
  cut_piece,
  has_pieces,
  put_piece,
)
from flaxlm.decoding.rows import (
  Rows,
  Steps,
  decode_rows,
  draw_first,
  insert_rows,
  renumber,
  resize_cache,
  take_rows,
)
from flaxlm.decoding.sampling import (
  HISTORY_RULES,
  RULES,
  Sampling,
  SamplingSettings,
  TokenHistory,
  check_rows,
  rules_in_use,
  stack_rows,
)
from flaxlm.decoding.weights import prepare_params
from flaxlm.errors import ConfigError, FlaxLMError, NonFiniteError
from flaxlm.nn.base import LanguageModel
from flaxlm.nn.models import init_cache
from flaxlm.sharding import batch_shards, on_host, use_mesh
from flaxlm.tokenizers import AnyTokenizer

MOST_PADDING = 32  # tokens of padding, which cost no more than a pass of their own
SMALLEST_CACHE = 64  # slots
# Where shapes are given: biases and stops of a row; expressions, states, kinds of tokens.
LEAST_BIASES, LEAST_STOPS, LEAST_AUTOMATON = 512, 8, (4, 256, 64)
IDLE = SamplingSettings(temperature=0.0)


# -- What goes in, and what comes out ------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineRequest:
  """One answer to one prompt, as token ids.

  `source` is what an encoder-decoder reads; its prompt is what it has written so far. The
  answer ends after a token of `stop_tokens`, which are all of them: no other id is special.
  What depends on the text or the time is the client's, who cancels.
  """

  prompt: Sequence[int]
  max_new_tokens: int
  settings: SamplingSettings = IDLE  # greedy
  source: Sequence[int] | None = None
  num_top: int = 0  # likeliest tokens to report at each step
  stop_tokens: Collection[int] = ()


class Event(NamedTuple):
  """New tokens of a request, with their log-probabilities and the likeliest of each step.

  The last event of a request has the reason of its end: "stop" (a stop token, which is the
  last of `tokens`), "length", or "error", which is told by `error`.
  """

  number: int  # as `submit` has returned
  tokens: list[int]
  logprobs: list[float]
  top_tokens: list[list[int]]
  top_logprobs: list[list[float]]
  finish_reason: str | None = None
  error: FlaxLMError | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
  """The few shapes that an engine may use; each combination of them is a program.

  Sizes ascend, and the last of each is enough for every request.
  """

  rows: Sequence[int]  # of the batch
  slots: Sequence[int]  # of a row, and for an encoder-decoder of its source
  rules: Sequence[tuple[str, ...]]  # each set has all rules of those before it
  num_tops: Sequence[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
  """How large the batch may become, and which shapes it may have.

  Without `shapes` it takes what suits the requests, and compiles it when it is first
  needed. With them `warming.warm` compiles all programs before the first request.
  """

  rows: int = 16  # the most requests that are decoded together
  most_read: int | None = CHUNK  # prompt tokens between two blocks; None: whole prompts
  most_steps: int = BLOCK_STEPS  # of a block
  most_bytes: int | None = None  # of the batch's cache, on all devices together
  prefix_bytes: int = 0  # of past texts that are kept, on all devices together
  shapes: Shapes | None = None


def few_shapes(cfg: ResolvedModel, rows: int, most_top: int = 20) -> Shapes:
  """Shapes for a server: few programs, for requests of all kinds."""
  last = -(-(cfg.context + MOST_PADDING) // SMALLEST_CACHE) * SMALLEST_CACHE
  slots = [n for n in (256, 1024, 4096, 16_384) if 2 * n <= last] + [last]
  without_history = tuple(name for name in RULES if name not in HISTORY_RULES)
  return Shapes(
    rows=sorted({1, -(-rows // 4), rows}),
    slots=slots,
    rules=[("temperature",), without_history, tuple(RULES)],
    num_tops=sorted({0, min(most_top, cfg.num_ids)}),
  )


@dataclasses.dataclass
class Counters:
  """What an engine has done so far."""

  read_tokens: int = 0  # of prompts, by the model
  cached_tokens: int = 0  # of prompts, taken from the prefix cache
  drawn_tokens: int = 0
  steps: int = 0  # of decoding
  blocks: int = 0


# -- What the engine knows of its requests -------------------------------------------------


@dataclasses.dataclass(eq=False)
class _Job:
  """A request on its way: waiting, being read, in a row, or done."""

  number: int
  request: EngineRequest
  is_queued: bool = True
  row: int | None = None
  in_cache: int = 0  # tokens, at most, after all blocks that were started
  tokens: list[int] = dataclasses.field(default_factory=list)  # drawn, and told
  is_done: bool = False

  @property
  def text(self) -> tuple:
    """What is read: equal for samples of one prompt."""
    return tuple(self.request.prompt), tuple(self.request.source or ())

  @property
  def final_length(self) -> int:
    """Tokens that its cache holds in the end: the last one is never read."""
    return len(self.request.prompt) + self.request.max_new_tokens - 1

  @property
  def left(self) -> int:
    return self.request.max_new_tokens - len(self.tokens)


@dataclasses.dataclass
class _Reading:
  """Some prompts that are read together into a cache of their own, and who waits."""

  texts: list[tuple]
  waiting: list[list[_Job]]  # for each text
  cache: Any
  last_RD: Any
  starts: list[int]  # tokens of each prompt that the cache had already
  position: int = 0  # tokens of each prompt, from there on, that were read
  logits_RV: Any = None  # after the last token of each

  @property
  def rest(self) -> list[Sequence[int]]:
    """What is still to be read of each prompt."""
    starts = [start + self.position for start in self.starts]
    return [prompt[at:] for (prompt, _), at in zip(self.texts, starts, strict=True)]


class _Block(NamedTuple):
  """Steps that were started, and whose rows they are."""

  jobs: list[tuple[int, _Job]]  # (row, job)
  steps: Steps
  num_steps: Any
  is_decoded: bool = True  # and not drawn from the prompts' last tokens


# -- The engine ----------------------------------------------------------------------------


class Engine:
  """Decodes requests in the rows of one batch. See the module.

  Args:
    model: of any family that writes text.
    params: its parameters, sharded over `mesh`.
    num_ids: how many ids can be written.
    mesh: where `params` live; None for a single device.
    tokenizer: for requests with a regex.
  """

  def __init__(
    self,
    model: LanguageModel,
    params: Any,
    num_ids: int,
    mesh: Mesh | None = None,
    tokenizer: AnyTokenizer | None = None,
    options: EngineOptions | None = None,
  ):
    self.model, self.mesh, self.tokenizer = model, mesh, tokenizer
    self.options = options or EngineOptions()
    if (most_read := self.options.most_read) is not None and most_read < SMALLEST_BUCKET:
      raise ConfigError(f"most_read is {most_read}", f"use {SMALLEST_BUCKET} or more")
    self.num_ids = num_ids
    with use_mesh(mesh):
      self.params = prepare_params(params, model.cfg)
    self.shards = 1 if mesh is None else batch_shards(mesh.shape)
    self.counters = Counters()
    self.runs_ahead = jax.default_backend() != "cpu"
    self._numbers = itertools.count()
    self._queue: collections.deque[_Job] = collections.deque()
    self._jobs: dict[int, _Job] = {}  # those that are not done
    self._reading: _Reading | None = None
    self._rows: list[_Job | None] = []
    self._state: Rows | None = None
    self._slots = self._source_slots = 0
    self._blocks: collections.deque[_Block] = collections.deque()
    self._store: PrefixStore | None = None
    if self.options.prefix_bytes and has_pieces(model.cfg):
      self._store = PrefixStore(self.options.prefix_bytes)
    self._owes_block = False  # the rows that decode have waited for prompts already
    # Of the rows as they are; None when they have changed.
    self._batch_sampling: tuple[Sampling, StaticSampling, Any] | None = None
    self._num_ids = jnp.int32(num_ids)
    self._expressions: list[str] = []
    self._starts: dict[str, int] = {}  # the first state of each
    self._automaton = self.automaton_of([])

  # -- What a client calls

  def submit(self, request: EngineRequest) -> int:
    """Queues a request, and returns its number.

    Raises `ConfigError` for one that could never be answered: it does not fit the model's
    context, or `most_bytes`, or its settings are wrong.
    """
    sources = None if request.source is None else [request.source]
    whole = Request(
      [request.prompt], request.max_new_tokens, self.num_ids, sources, request.num_top
    )
    whole.check(self.model.cfg)
    request.settings.check()
    regex = request.settings.regex
    if regex is not None:
      if self.tokenizer is None:
        raise ConfigError("a regex needs the tokenizer")
      build_part(regex, self.tokenizer)
    unformed = dataclasses.replace(request.settings, regex=None)
    check_rows(stack_rows([unformed], NO_AUTOMATON, {None: FREE}), 1, self.num_ids)
    shapes = self.options.shapes
    if shapes is not None and request.num_top > shapes.num_tops[-1]:
      raise ConfigError(
        f"top-logprobs is {request.num_top}", f"it can be 0 to {shapes.num_tops[-1]}"
      )
    job = _Job(next(self._numbers), request)
    if not self._fits([job]):
      raise ConfigError(
        f"a request of {job.final_length + 1} tokens needs a cache of more than "
        f"{self.options.most_bytes} bytes",
        "ask for fewer new tokens",
      )
    self._queue.append(job)
    self._jobs[job.number] = job
    return job.number

  def cancel(self, number: int) -> None:
    """Ends a request without another event; of one that has ended, nothing happens."""
    job = self._jobs.get(number)
    if job is not None:
      with use_mesh(self.mesh):
        self._keep_answer(job)
      self._release(job)

  @property
  def is_idle(self) -> bool:
    """Whether all requests have ended."""
    return not self._jobs

  @property
  def num_waiting(self) -> int:
    """Requests that no row has taken yet."""
    being_read = [] if self._reading is None else self._reading.waiting
    return len(self._queue) + sum(map(len, being_read))

  @property
  def num_active(self) -> int:
    return sum(job is not None for job in self._rows)

  def step(self) -> list[Event]:
    """Reads a part of the prompts that wait, or starts a block of decode steps, or both.

    Returns the tokens that are known: on a CPU all of them, elsewhere those of the block
    before, so that the device never waits for the host.
    """
    with use_mesh(self.mesh):
      if not self._owes_block:
        self._read_prompts()
      is_first = bool(self._blocks) and not self.runs_ahead  # tokens, to be told at once
      if self.num_active and not is_first:
        self._start_block()
      self._owes_block = is_first
      events: list[Event] = []
      while len(self._blocks) > (1 if self.runs_ahead and self.num_active else 0):
        events += self._collect(self._blocks.popleft())
    if not self._jobs:
      self._blocks.clear()
    return events

  # -- Reading prompts

  def _read_prompts(self) -> None:
    """Reads prompts for free rows, at most `most_read` tokens while others are decoded."""
    left = most = self.options.most_read
    while True:
      if self._reading is None:
        self._reading = self._begin_reading()
        if self._reading is None:
          return
        if left is not None:
          left -= sum(len(source) for _, source in self._reading.texts)
      if self._reading.logits_RV is None:
        is_urgent = not self.num_active  # nobody waits
        limit = most if is_urgent else left
        if limit is not None and limit < SMALLEST_BUCKET:
          return
        num_read = self._read_chunk(self._reading, limit)
        left = None if left is None else left - num_read
      if self._reading.logits_RV is not None and not self._insert(self._reading):
        return

  def _begin_reading(self) -> _Reading | None:
    """The next prompts to be read, if there are rows for them."""
    active = [job for job in self._rows if job is not None]
    texts: dict[tuple, list[_Job]] = {}
    while self._queue:
      job = self._queue[0]
      if job.text not in texts:
        is_full = len(active) >= self.options.rows or len(texts) >= self.read_together
        if is_full or not self._fits([*active, job]):
          break
        active.append(job)
      texts.setdefault(job.text, []).append(self._queue.popleft())
      job.is_queued = False
    if not texts:
      return None
    batch = self.shards * bucket(-(-len(texts) // self.shards), smallest=1)
    found = [self._store.find(prompt) if self._store else [] for prompt, _ in texts]
    starts = [len(pieces) * PIECE for pieces in found]
    lengths = [len(text[0]) - at for text, at in zip(texts, starts, strict=True)]
    slots = self.bucket_of_reading(max(starts) + max(lengths) + MOST_PADDING)
    sources = [source for _, source in texts]
    if any(sources):
      longest = self.bucket_of_source(max(map(len, sources)))
      source_BS, lengths_B = pad_rows(sources, batch, longest)
      self.counters.read_tokens += sum(map(len, sources))
      args = (self.model, self.params, source_BS, lengths_B, slots)
      cache = init_cache_with_source(*args)
    else:
      cache = init_cache(self.model, batch, slots)
    for row, pieces in enumerate(found):
      for n, piece in enumerate(pieces):
        cache = put_piece(cache, piece, np.int32(row), np.int32(n * PIECE))
    self.counters.cached_tokens += sum(starts)
    last_RD = np.zeros((batch, self.model.cfg.width), self.model.execution.dtype)
    return _Reading([*texts], [*texts.values()], cache, last_RD, starts)

  @property
  def read_together(self) -> int:
    """Prompts of one pass. A CPU gains nothing by more than it must take."""
    return self.shards if jax.default_backend() == "cpu" else 8 * self.shards

  def _read_chunk(self, reading: _Reading, limit: int | None) -> int:
    """Reads at most `limit` more tokens of each prompt; returns how many, with padding."""
    rest = reading.rest
    size = chunk_size(max(map(len, rest)), CHUNK if limit is None else limit)
    chunk = [tokens[:size] for tokens in rest]
    tokens_RT, num_new_R = pad_rows(chunk, reading.last_RD.shape[0], size)
    reading.last_RD, reading.cache = prefill_chunk(
      self.model, self.params, tokens_RT, num_new_R, reading.cache, reading.last_RD
    )
    reading.position += size
    self.counters.read_tokens += sum(map(len, chunk))
    if not any(reading.rest):
      reading.logits_RV = logits_of_hidden(self.model, self.params, reading.last_RD)
      if self._store is not None:
        for row, (prompt, _) in enumerate(reading.texts):
          self._store.add(prompt, self._cutter(reading.cache, row))
    return size * len(reading.texts)

  def _cutter(self, cache: Any, row: int) -> Callable[[int], Any]:
    return lambda start: cut_piece(cache, np.int32(row), np.int32(start))

  def _keep_answer(self, job: _Job) -> None:
    """Keeps what a row has written, for a prompt that goes on from it."""
    if self._store is not None and job.row is not None:
      assert self._state is not None
      tokens = [*job.request.prompt, *job.tokens[:-1]]
      self._store.add(tokens, self._cutter(self._state.cache, job.row))

  # -- Rows

  def _insert(self, reading: _Reading) -> bool:
    """Gives free rows to requests whose prompts were read; False if some still wait."""
    batch = reading.last_RD.shape[0]
    while any(reading.waiting):
      active = [job for job in self._rows if job is not None]
      most = min(batch, self.options.rows - len(active))
      now: list[tuple[int, _Job]] = []
      for n, job in ((n, job) for n, jobs in enumerate(reading.waiting) for job in jobs):
        if len(now) == most or not self._fits([*active, *(job for _, job in now), job]):
          break
        now.append((n, job))
      if not now:
        return False
      for n, job in now:
        reading.waiting[n].remove(job)
      self._insert_together(reading, now)
    self._reading = None
    return True

  def _insert_together(self, reading: _Reading, now: Sequence[tuple[int, _Job]]) -> None:
    """Draws the first token of some requests, and puts their caches into free rows.

    Each comes with the number of its text. A pass has as many rows as the reading, so the
    first request is repeated.
    """
    batch = reading.last_RD.shape[0]
    texts, jobs = zip(*now, strict=True)
    for job in jobs:
      job.in_cache = len(job.request.prompt)
    self._take_expressions(jobs)
    self._make_room(jobs, reading.cache)
    free = [row for row, job in enumerate(self._rows) if job is None]
    for row, job in zip(free, jobs, strict=False):
      self._rows[row], job.row = job, row
    self._batch_sampling = None
    padded = [*jobs, *[jobs[0]] * (batch - len(jobs))]
    picked = [*texts, *[texts[0]] * (batch - len(texts))]
    logits_RV, cache = reading.logits_RV, reading.cache
    if picked != [*range(batch)]:
      logits_RV, cache = take_read(logits_RV, cache, np.array(picked, np.int32))
    assert self._state is not None
    history = self._history_of(padded) if self._has_history else None
    left_R = np.array([job.request.max_new_tokens for job in padded], np.int32)
    sampling, static, stops_RE = self._sampling_of(padded)
    new, step = draw_first(
      *(logits_RV, cache.lengths_B, left_R, history),
      *(sampling, stops_RE, self._num_ids, static),
    )
    new = new._replace(cache=self._resized(cache))
    rows_R = np.array([job.row for job in padded], np.int32)
    self._state = insert_rows(self._state, new, rows_R)
    self._blocks.append(_Block([*enumerate(jobs)], step, 1, False))
    self._free_spent_rows()

  def _resized(self, cache: Any) -> Any:
    return resize_cache(self.model.cfg, cache, self._slots, self._source_slots)

  def _make_room(self, jobs: Sequence[_Job], cache: Any) -> None:
    """Makes the batch large enough for some requests more, which have been read."""
    sources = [len(job.request.source or ()) for job in jobs]
    if not self.num_active:  # nothing is to be kept
      self._state, self._rows, self._slots, self._source_slots = None, [], 0, 0
    needs_history = any(self._needs_history(job) for job in jobs)
    slots = max(self._slots, self.bucket_of_slots(max(job.in_cache for job in jobs)))
    source_slots = self._source_slots
    if any(sources):
      source_slots = max(source_slots, self.bucket_of_source(max(sources)))
    if self._state is None:
      batch = self.bucket_of_rows(self._wanted_rows(len(jobs)))
      self._slots, self._source_slots = slots, source_slots
      idle = jnp.zeros(cache.lengths_B.shape[0], jnp.int32)
      rows_B = np.zeros(batch, np.int32)
      same = Rows(self._resized(cache), idle, idle)
      self._state = take_rows(same, rows_B, rows_B > 0)
      self._rows = [None] * batch
    else:
      self._resize(slots, source_slots)
      self._rearrange(self._wanted_rows(len(jobs)))
    if needs_history and not self._has_history:
      shape = (len(self._rows), self.model.cfg.vocab_size)
      self._state = self._state._replace(history=empty_history(*shape))

  def _wanted_rows(self, num_new: int = 0) -> int:
    """Rows for the active requests, some new ones and, if they fit, all that wait."""
    if self.options.most_bytes is not None:
      return self.num_active + num_new
    return min(self.options.rows, len(self._jobs))

  def _resize(self, slots: int, source_slots: int) -> None:
    if (slots, source_slots) == (self._slots, self._source_slots):
      return
    assert self._state is not None
    self._slots, self._source_slots = slots, source_slots
    self._state = self._state._replace(cache=self._resized(self._state.cache))

  def _rearrange(self, count: int) -> None:
    """Gives the batch room for `count` rows, and not for many more."""
    batch = self.bucket_of_rows(count)
    if batch == len(self._rows):
      return
    assert self._state is not None
    kept = [row for row, job in enumerate(self._rows) if job is not None]
    rows_B, is_kept_B = np.zeros(batch, np.int32), np.arange(batch) < len(kept)
    rows_B[: len(kept)] = kept
    self._state = take_rows(self._state, rows_B, is_kept_B)
    self._rows = [self._rows[row] for row in kept] + [None] * (batch - len(kept))
    for row, job in enumerate(self._rows):
      if job is not None:
        job.row = row
    self._batch_sampling = None

  def _free_spent_rows(self) -> None:
    """Frees the rows of requests that the blocks so far bring to their length."""
    for row, job in enumerate(self._rows):
      if job is not None and job.in_cache >= job.final_length:
        self._rows[row], job.row = None, None
        self._batch_sampling = None

  def _release(self, job: _Job) -> None:
    """Forgets a request that has ended or is cancelled, wherever it is."""
    job.is_done = True
    del self._jobs[job.number]
    if job.row is not None:
      self._rows[job.row], job.row = None, None
      self._batch_sampling = None
    elif job.is_queued:
      self._queue.remove(job)
    elif self._reading is not None:
      for jobs in self._reading.waiting:
        if job in jobs:
          jobs.remove(job)
      if not any(self._reading.waiting):
        self._reading = None

  # -- Decoding

  def _start_block(self) -> None:
    """Starts a block of decode steps of all active rows."""
    assert self._state is not None
    active = [job for job in self._rows if job is not None]
    num_steps = self.options.most_steps
    if not self.runs_ahead:
      num_steps = min(num_steps, max(job.left for job in active))
    lengths = [min(job.final_length, job.in_cache + num_steps) for job in active]
    slots = self.bucket_of_slots(max(lengths))
    if slots > self._slots or 3 * slots <= 2 * self._slots:
      self._resize(slots, self._source_slots)
    if self.bucket_of_rows(self._wanted_rows()) < len(self._rows):
      self._rearrange(self._wanted_rows())
    if self._has_history and not any(map(self._needs_history, active)):
      self._state = self._state._replace(history=None)
      self._batch_sampling = None
    if self._batch_sampling is None:
      self._batch_sampling = self._sampling_of(self._rows)
    sampling, static, stops_BE = self._batch_sampling
    self._state, steps, num_steps_run = decode_rows(
      self.model,
      self.params,
      self._state,
      np.array([job is not None for job in self._rows]),
      sampling,
      stops_BE,
      self._num_ids,
      np.int32(num_steps),
      np.bool_(self.num_waiting > 0),
      self.options.most_steps,
      not self.runs_ahead,
      static,
    )
    jobs = [(row, job) for row, job in enumerate(self._rows) if job is not None]
    self._blocks.append(_Block(jobs, steps, num_steps_run))
    self.counters.blocks += 1
    if self.runs_ahead:
      for job, length in zip(active, lengths, strict=True):
        job.in_cache = length
      self._free_spent_rows()

  def _collect(self, block: _Block) -> Iterator[Event]:
    """What a block has brought; waits for it."""
    steps, num_steps = jax.tree.map(on_host, block.steps), int(block.num_steps)
    self.counters.steps += num_steps if block.is_decoded else 0
    for row, job in block.jobs:
      if job.is_done:
        continue
      columns = [x_T[:num_steps, row] for x_T in steps]
      event = self._next_event(job, *columns)
      self.counters.drawn_tokens += len(event.tokens)
      if not self.runs_ahead and job.row is not None and num_steps > 0:
        job.in_cache = len(job.request.prompt) + len(job.tokens) - 1
      if event.finish_reason is not None:
        broken = job.row if event.error else None
        if event.error is None:
          self._keep_answer(job)
        self._release(job)
        if broken is not None:
          self._clear(broken)
      yield event

  def _next_event(self, job: _Job, *columns: np.ndarray) -> Event:
    """The event of a request's new tokens, up to the one that ends it."""
    tokens_T, logprobs_T, top_tokens_TX, top_logprobs_TX, finite_T = columns
    request, count, reason, error = job.request, 0, None, None
    for token, is_finite in zip(tokens_T.tolist(), finite_T.tolist(), strict=True):
      if not is_finite:
        reason = "error"
        error = NonFiniteError(
          "the logits are NaN or infinite", "the parameters are damaged"
        )
        break
      count += 1
      job.tokens.append(token)
      if token in request.stop_tokens:
        reason = "stop"
      elif len(job.tokens) == request.max_new_tokens:
        reason = "length"
      if reason is not None:
        break
    top = request.num_top
    return Event(
      job.number,
      tokens_T[:count].tolist(),
      logprobs_T[:count].tolist(),
      top_tokens_TX[:count, :top].tolist(),
      top_logprobs_TX[:count, :top].tolist(),
      reason,
      error,
    )

  def _clear(self, row: int) -> None:
    """Empties a row: NaN times a weight of 0 would be NaN for whoever reads it."""
    assert self._state is not None
    rows_R = np.full(self.shards, row, np.int32)
    zeros = take_rows(self._state, rows_R, rows_R < 0)
    zeros = jax.tree.map(jnp.zeros_like, zeros)
    self._state = insert_rows(self._state, zeros, rows_R)

  # -- Shapes, and what they need

  def bucket_of_slots(self, length: int) -> int:
    """The slots of the batch for rows of this length."""
    if self.model.cfg.family == "rnn":  # whose cache has none
      return SMALLEST_CACHE
    if self.options.shapes is not None:
      return least(self.options.shapes.slots, length)
    return bucket(length, SMALLEST_CACHE, fine=True)

  def bucket_of_reading(self, length: int) -> int:
    """The slots of a cache that prompts are read into."""
    if self.options.shapes is not None or self.model.cfg.family == "rnn":
      return self.bucket_of_slots(length)
    return bucket(length, SMALLEST_CACHE)

  def bucket_of_source(self, length: int) -> int:
    if self.options.shapes is not None:
      return least(self.options.shapes.slots, length)
    return bucket(length)

  def bucket_of_rows(self, count: int) -> int:
    """The rows of a batch for `count` requests: all there may be, or a quarter as often."""
    sizes = [self.options.rows]
    while sizes[-1] > 1:
      sizes.append(max(1, sizes[-1] // 4))
    if self.options.shapes is not None:
      sizes = [*self.options.shapes.rows]
    return -(-least(sorted(sizes), count) // self.shards) * self.shards

  def _fits(self, jobs: Sequence[_Job]) -> bool:
    """Whether the batch's cache is not too large when these requests reach their ends."""
    most = self.options.most_bytes
    if most is None:
      return True
    batch = self.bucket_of_rows(len(jobs))
    slots = self.bucket_of_slots(max(job.final_length for job in jobs))
    source = max(len(job.request.source or ()) for job in jobs)
    source_slots = self.bucket_of_source(source) if source else 0
    return cache_bytes(self.model, batch, slots, source_slots) <= most

  # -- Sampling

  def _sampling_of(
    self, jobs: Sequence[_Job | None]
  ) -> tuple[Sampling, StaticSampling, np.ndarray]:
    """The settings of some rows, the part that is compiled in, and their stop tokens."""
    shapes, with_history = self.options.shapes, self._has_history
    settings = [IDLE if job is None else job.request.settings for job in jobs]
    automaton, states = self._automaton
    sampling = stack_rows(settings, automaton, states)
    rules = rules_in_use(sampling)
    num_top = max((job.request.num_top for job in jobs if job is not None), default=0)
    least_stops = 4
    if shapes is not None:
      least_stops = LEAST_STOPS
      needed = {*rules, *(HISTORY_RULES if with_history else ())}
      rules = next(names for names in shapes.rules if needed <= {*names})
      if "bias" in rules:
        sampling = stack_rows(settings, automaton, states, LEAST_BIASES)
      num_top = least(shapes.num_tops, num_top)
    elif num_top:
      num_top = min(bucket(num_top, smallest=1), self.model.cfg.num_ids)
    stops = [() if job is None else [*job.request.stop_tokens] for job in jobs]
    width = bucket(max(map(len, stops)), smallest=least_stops)
    stops_BE = np.full((len(jobs), width), -1, np.int32)
    for row, of_row in enumerate(stops):
      stops_BE[row, : len(of_row)] = of_row
    return jax.tree.map(jnp.asarray, sampling), StaticSampling(rules, num_top), stops_BE

  def _take_expressions(self, jobs: Sequence[_Job]) -> None:
    """Adds the regular expressions of new requests to the automaton of the batch, and drops
    those that no row uses any more."""
    of = lambda jobs: {job.request.settings.regex for job in jobs if job is not None}
    used = of(self._rows)
    new = sorted(of(jobs) - {*self._expressions, None})
    if not new:
      return
    before = self._expressions
    self._expressions = [e for e in before if e in used] + new
    assert self.tokenizer is not None
    parts = [build_part(e, self.tokenizer) for e in self._expressions]
    first = itertools.accumulate((part.num_states for part in parts), initial=1)
    starts = dict(zip(self._expressions, first, strict=False))
    if self._has_history and before != self._expressions[: len(before)]:
      assert self._state is not None
      moved_X = np.zeros(self._automaton[0].next_XY.shape[0], np.int32)  # FREE: dropped
      for expression, start in self._starts.items():
        if expression in used:
          count = build_part(expression, self.tokenizer).num_states
          moved_X[start : start + count] = starts[expression] + np.arange(count)
      self._state = renumber(self._state, moved_X)
    self._starts = starts
    self._automaton = self.automaton_of(self._expressions)
    self._batch_sampling = None

  def automaton_of(self, expressions: Sequence[str]) -> tuple[Automaton, dict]:
    """The automaton on the device, and the initial state of each expression."""
    if self.tokenizer is None:
      return NO_AUTOMATON, {None: FREE}
    sizes = (1, 1, 1) if self.options.shapes is None else LEAST_AUTOMATON
    automaton, initial = build_automaton(expressions, self.tokenizer, sizes)
    states = dict(zip(expressions, initial, strict=True))
    return jax.tree.map(jnp.asarray, automaton), {None: FREE, **states}

  @property
  def _has_history(self) -> bool:
    return self._state is not None and self._state.history is not None

  def _needs_history(self, job: _Job) -> bool:
    settings = job.request.settings
    is_neutral = settings.repetition_penalty == 1 and settings.presence_penalty == 0
    return not (is_neutral and settings.frequency_penalty == 0 and settings.regex is None)

  def _history_of(self, jobs: Sequence[_Job]) -> TokenHistory:
    """The history of requests that have drawn nothing yet."""
    shape = (len(jobs), self.model.cfg.vocab_size)
    in_prompt_BV = np.zeros(shape, bool)
    for row, job in enumerate(jobs):
      in_prompt_BV[row, [*job.request.prompt]] = True
    states = [self._automaton[1][job.request.settings.regex] for job in jobs]
    counts_BV, states_B = np.zeros(shape, np.int32), np.array(states, np.int32)
    return TokenHistory(*map(jax.device_put, (in_prompt_BV, counts_BV, states_B)))


def least(sizes: Sequence[int], number: int) -> int:
  """The least of some ascending sizes that is enough; the last if none is."""
  return next((size for size in sizes if size >= number), sizes[-1])


@functools.partial(jax.jit, static_argnames=("batch", "num_tokens"))
def empty_history(batch: int, num_tokens: int) -> TokenHistory:
  shape = (batch, num_tokens)
  states_B = jnp.full(batch, FREE, jnp.int32)
  return TokenHistory(jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32), states_B)


def chunk_size(length: int, most: int) -> int:
  """How many tokens, with padding, the next pass reads of `length` that are left.

  All of them if there is little padding; otherwise as many as need none.
  """
  sizes = [size for size in CHUNK_SIZES if size <= most]
  enough = next((size for size in sizes if size >= length), None)
  if enough is not None and (enough - length <= MOST_PADDING or length < sizes[0]):
    return enough
  return max(size for size in sizes if size <= length)


CHUNK_SIZES = sorted({bucket(n) for n in range(1, CHUNK + 1)})


@functools.lru_cache(maxsize=256)
def cache_bytes(model: LanguageModel, batch: int, slots: int, source_slots: int) -> int:
  """The size of a cache, on all devices together."""
  cache = jax.eval_shape(lambda: init_cache(model, batch, slots))
  num_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
  if source_slots:
    cfg = model.cfg
    numbers = 2 * cfg.depth * cfg.num_kv_heads * cfg.head_dim
    width = jnp.dtype(model.execution.dtype).itemsize
    num_bytes += batch * source_slots * (numbers * width + 4)
  return num_bytes
