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
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flaxlm.decoding.prefill import SMALLEST_BUCKET, Request
from flaxlm.decoding.prefill import take_rows as take_read
from flaxlm.decoding.prefix_store import Row, RowStore
from flaxlm.decoding.reader import Reader, Reading, Text
from flaxlm.decoding.requests import Counters, EngineOptions, EngineRequest, Event
from flaxlm.decoding.row_settings import RowSampling, RowSettings, empty_history
from flaxlm.decoding.row_sizes import RowSizes
from flaxlm.decoding.rows import (
  Rows,
  Steps,
  decode_rows,
  draw_first,
  insert_rows,
  renumber,
  take_rows,
)
from flaxlm.decoding.weights import prepare_params
from flaxlm.errors import ConfigError, NonFiniteError
from flaxlm.nn.base import LanguageModel
from flaxlm.sharding import batch_shards, on_host, use_mesh, wait_on_cpu
from flaxlm.tokenizers import AnyTokenizer

# Between two chunks of prompts. More rows cost a step little more, so that the free ones
# are filled first; but those that are decoded do not stand still.
STEPS_WHILE_READING = 1
# While requests may come for free rows, which wait for the end of a block: who has got an
# answer often asks again at once. A block's start costs a CPU 1 to 2 ms.
STEPS_AFTER_END, STEPS_WHILE_FREE = 1, 4


@dataclasses.dataclass(eq=False)
class _Job:
  """A request on its way: waiting, being read, in a row, or done."""

  number: int
  request: EngineRequest
  needs_history: bool
  is_queued: bool = True
  row: int | None = None
  in_cache: int = 0  # tokens, at most, after all blocks that were started
  cached: int = 0  # tokens of its prompt that had been read before
  slots_read: int = 0  # of the cache that its prompt was read into
  tokens: list[int] = dataclasses.field(default_factory=list)  # drawn, and told
  is_done: bool = False

  @property
  def text(self) -> Text:
    """What is read: equal for samples of one prompt."""
    return tuple(self.request.prompt), tuple(self.request.source or ())

  @property
  def left(self) -> int:
    return self.request.max_new_tokens - len(self.tokens)


class _Block(NamedTuple):
  """Steps that were started, and whose rows they are."""

  jobs: list[tuple[int, _Job]]  # (row, job)
  steps: Steps
  num_steps: Any
  is_decoded: bool = True  # and not drawn from the prompts' last tokens


class Engine:
  """Decodes requests in the rows of one batch:

      engine = Engine(run.model, run.params, run.num_ids, run.mesh, run.tokenizer)
      number = engine.submit(EngineRequest(prompt=ids, max_new_tokens=20))
      while not engine.is_idle:
        for event in engine.step():
          ...  # more tokens of request `event.number`

  Whoever finds in them what ends an answer, or waits no longer, calls `cancel`.

  Args:
    model: of any family that writes text.
    params: its parameters, sharded over `mesh`.
    num_ids: how many ids can be written.
    mesh: where `params` live; None for a single device.
    tokenizer: for requests with a regex.
    past: for a conversation, what engines before this one have read, and where this one
      keeps what it reads; an encoder-decoder has no use for it.
  """

  def __init__(
    self,
    model: LanguageModel,
    params: Any,
    num_ids: int,
    mesh: Mesh | None = None,
    tokenizer: AnyTokenizer | None = None,
    options: EngineOptions | None = None,
    past: RowStore | None = None,
  ):
    self.model, self.mesh, self.tokenizer = model, mesh, tokenizer
    self.options = options or EngineOptions()
    if (most_read := self.options.most_read) is not None and most_read < SMALLEST_BUCKET:
      raise ConfigError(f"most_read is {most_read}", f"use {SMALLEST_BUCKET} or more")
    self.num_ids = num_ids
    with use_mesh(mesh):
      self.params = prepare_params(params, model.cfg)
    self.shards = 1 if mesh is None else batch_shards(mesh.shape)
    self.sizes = RowSizes(model, self.options, self.shards)
    self.counters = Counters()
    self.runs_ahead = jax.default_backend() != "cpu"
    self._numbers = itertools.count()
    self._queue: collections.deque[_Job] = collections.deque()
    self._jobs: dict[int, _Job] = {}  # those that are not done
    self.reader = Reader(model, self.params, self.options, self.sizes, self.counters, past)
    self._reading: Reading | None = None
    self._waiting: list[list[_Job]] = []  # for each text of the reading
    self._rows: list[_Job | None] = []
    self._state: Rows | None = None
    self._slots = self._source_slots = 0
    self._blocks: collections.deque[_Block] = collections.deque()
    self._owes_block = False  # the rows that decode have waited for prompts already
    self._has_ended = False  # an answer, in the block that was collected last
    # Of the rows as they are; None when they have changed.
    self._batch_sampling: RowSampling | None = None
    self.settings = RowSettings(model.cfg, num_ids, self.options.shapes, tokenizer)

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
    self.settings.check(request)
    job = _Job(next(self._numbers), request, self.settings.needs_history(request))
    if not self.sizes.fits([request]):
      raise ConfigError(
        f"a request of {job.request.final_length + 1} tokens needs a cache of more than "
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

  def rest(self) -> None:
    """Gives the memory of the batch back, where no more requests are expected soon."""
    if self.is_idle:
      self._empty()

  @property
  def is_idle(self) -> bool:
    """Whether all requests have ended."""
    return not self._jobs

  @property
  def num_waiting(self) -> int:
    """Requests that no row has taken yet."""
    return len(self._queue) + sum(map(len, self._waiting))

  @property
  def num_active(self) -> int:
    return sum(job is not None for job in self._rows)

  @property
  def _active_requests(self) -> list[EngineRequest]:
    return [job.request for job in self._rows if job is not None]

  @property
  def _has_history(self) -> bool:
    return self._state is not None and self._state.history is not None

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
        num_read = self.reader.read(self._reading, limit)
        left = None if left is None else left - num_read
      if self._reading.logits_RV is not None and not self._insert(self._reading):
        return

  def _begin_reading(self) -> Reading | None:
    """The next prompts to be read, if there are rows for them."""
    active = self._active_requests
    texts: dict[Text, list[_Job]] = {}
    while self._queue:
      job = self._queue[0]
      if job.text not in texts:
        is_full = len(active) >= self.options.rows
        is_full = is_full or not self.reader.may_read_together([*texts, job.text])
        if is_full or not self.sizes.fits([*active, job.request]):
          break
        active.append(job.request)
      texts.setdefault(job.text, []).append(self._queue.popleft())
      job.is_queued = False
    if not texts:
      return None
    self._waiting = [*texts.values()]
    ends = [job.request.final_length for jobs in self._waiting for job in jobs]
    return self.reader.begin([*texts], max(ends))

  def _keep_answer(self, job: _Job, has_ended: bool = False) -> None:
    """Keeps what a row has written; if it `has_ended`, it has written no more."""
    if job.row is not None:
      assert self._state is not None
      tokens = [*job.request.prompt, *job.tokens[:-1]]
      is_end = has_ended or job.in_cache == len(tokens)
      row = Row(self._state.cache, job.row, self._slots)
      self.reader.keep(tokens, row, job.slots_read, is_end)

  # -- Rows

  def _insert(self, reading: Reading) -> bool:
    """Gives free rows to requests whose prompts were read; False if some still wait."""
    while any(self._waiting):
      active = self._active_requests
      most = min(reading.num_rows, self.options.rows - len(active))
      now: list[tuple[int, _Job]] = []
      for n, job in ((n, job) for n, jobs in enumerate(self._waiting) for job in jobs):
        active.append(job.request)
        if len(now) == most or not self.sizes.fits(active):
          break
        now.append((n, job))
      if not now:
        return False
      for n, job in now:
        self._waiting[n].remove(job)
      self._insert_together(reading, now)
      wait_on_cpu(self._state)
    self._reading = None
    return True

  def _insert_together(self, reading: Reading, now: Sequence[tuple[int, _Job]]) -> None:
    """Draws the first token of some requests, and puts their caches into free rows.

    Each comes with the number of its text. A pass has as many rows as the reading, so the
    first request is repeated.
    """
    batch = reading.num_rows
    texts, jobs = zip(*now, strict=True)
    for n, job in now:
      job.in_cache, job.slots_read = len(job.request.prompt), reading.slots[0]
      job.cached = reading.starts[n]
    requests = [job.request for job in jobs]
    moved_X = self.settings.admit(requests, self._active_requests)
    if moved_X is not None and self._has_history:
      assert self._state is not None
      self._state = renumber(self._state, moved_X)
    padded = [*requests, *[requests[0]] * (batch - len(jobs))]
    picked = [*texts, *[texts[0]] * (batch - len(texts))]
    logits_RV, cache = reading.logits_RV, reading.cache
    if picked != [*range(batch)]:
      logits_RV, cache = take_read(logits_RV, cache, np.array(picked, np.int32))
    is_all = len(jobs) == batch and not any(self._waiting)
    if not self.num_active:
      self._empty()
    size = self._size_with(jobs)
    cache = self.sizes.resized(cache, reading.slots, size)
    self._make_room(jobs, cache, size, is_all)
    free = [row for row, job in enumerate(self._rows) if job is None]
    for row, job in zip(free, jobs, strict=False):
      self._rows[row], job.row = job, row
    self._batch_sampling = None
    has_history = self._has_history
    if self._state is None:  # these rows are the batch
      has_history = any(job.needs_history for job in jobs)
    history = self.settings.history_of(padded) if has_history else None
    left_R = np.array([request.max_new_tokens for request in padded], np.int32)
    drawing, static = self.settings.sampling_of(padded)
    new, step = draw_first(logits_RV, cache.lengths_B, left_R, history, drawing, static)
    new = new._replace(cache=cache)
    into = [job.row for job in jobs]
    rows_R = np.array([*into, *[into[0]] * (batch - len(into))], np.int32)
    self._state = new if self._state is None else insert_rows(self._state, new, rows_R)
    self._blocks.append(_Block([*enumerate(jobs)], step, 1, False))
    self._free_spent_rows()

  def _empty(self) -> None:
    """Drops a batch of which nothing is to be kept."""
    self._state, self._rows, self._slots, self._source_slots = None, [], 0, 0
    self._batch_sampling = None

  def _size_with(self, jobs: Sequence[_Job]) -> tuple[int, int]:
    """The slots, also of sources, that the batch needs with some requests more."""
    longest = max(self._room_of(job) for job in jobs)
    sources = [len(job.request.source or ()) for job in jobs]
    return (
      max(self._slots, self.sizes.bucket_of_slots(longest)),
      max(self._source_slots, self.sizes.bucket_of_source(max(sources))),
    )

  def _make_room(
    self, jobs: Sequence[_Job], cache: Any, size: tuple[int, int], is_all: bool
  ) -> None:
    """Makes the batch large enough for some requests more, of which there is a cache.

    If `is_all` that was read, and the batch would consist of it, there is no other state.
    """
    if self._state is None:
      batch = self.sizes.bucket_of_rows(self._wanted_rows(len(jobs)))
      self._slots, self._source_slots = size
      self._rows = [None] * batch
      if is_all and batch == len(jobs):
        return
      idle = jnp.zeros(cache.lengths_B.shape, jnp.int32)
      rows_B = np.zeros(batch, np.int32)
      self._state = take_rows(Rows(cache, idle, idle), rows_B, rows_B > 0)
    else:
      self._resize(*size)
      self._rearrange(self._wanted_rows(len(jobs)))
    if any(job.needs_history for job in jobs) and not self._has_history:
      shape = (len(self._rows), self.model.cfg.vocab_size)
      self._state = self._state._replace(history=empty_history(*shape))

  def _room_of(self, job: _Job, num_steps: int = 0) -> int:
    """Tokens that a row's cache must have room for in the next steps."""
    final = job.request.final_length
    return final if self.options.whole_rows else min(final, job.in_cache + num_steps)

  def _wanted_rows(self, num_new: int = 0) -> int:
    """Rows for the active requests, some new ones and, if they fit, all that wait."""
    if self.options.most_bytes is not None:
      return self.num_active + num_new
    return min(self.options.rows, len(self._jobs))

  def _resize(self, slots: int, source_slots: int) -> None:
    before = self._slots, self._source_slots
    if (slots, source_slots) == before:
      return
    assert self._state is not None
    self._slots, self._source_slots = slots, source_slots
    cache = self.sizes.resized(self._state.cache, before, (slots, source_slots))
    self._state = self._state._replace(cache=cache)

  def _rearrange(self, count: int) -> None:
    """Gives the batch room for `count` rows, and not for many more."""
    batch = self.sizes.bucket_of_rows(count)
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
      if job is not None and job.in_cache >= job.request.final_length:
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
    else:
      for jobs in self._waiting:
        if job in jobs:
          jobs.remove(job)
      if not any(self._waiting):
        self._reading = None

  # -- Decoding

  def _start_block(self) -> None:
    """Starts a block of decode steps of all active rows."""
    assert self._state is not None
    active = [job for job in self._rows if job is not None]
    num_steps = self._num_steps(active)
    lengths = [min(job.request.final_length, job.in_cache + num_steps) for job in active]
    slots = self.sizes.bucket_of_slots(max(self._room_of(j, num_steps) for j in active))
    may_shrink = not self.options.whole_rows
    if slots > self._slots or (may_shrink and 3 * slots <= 2 * self._slots):
      self._resize(slots, self._source_slots)
    may_shrink = may_shrink and not (self.options.is_open and self._has_ended)
    if may_shrink and self.sizes.bucket_of_rows(self._wanted_rows()) < len(self._rows):
      self._rearrange(self._wanted_rows())
    if self._has_history and not any(job.needs_history for job in active):
      self._state = self._state._replace(history=None)
      self._batch_sampling = None
    if self._batch_sampling is None:
      requests = [None if job is None else job.request for job in self._rows]
      self._batch_sampling = self.settings.sampling_of(requests)
    drawing, static = self._batch_sampling
    self._state, steps, num_steps_run = decode_rows(
      self.model,
      self.params,
      self._state,
      np.array([job is not None for job in self._rows]),
      drawing,
      np.int32(num_steps),
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

  def _num_steps(self, active: Sequence[_Job]) -> int:
    """The most steps of the next block, which ends before if a row does."""
    most = self.options.most_steps
    if self.runs_ahead:
      return most
    if self._reading is not None and self._reading.logits_RV is None:
      most = STEPS_WHILE_READING
    elif self.options.is_open and len(active) < self.options.rows:
      most = min(most, STEPS_AFTER_END if self._has_ended else STEPS_WHILE_FREE)
    return min(most, max(job.left for job in active))

  def _collect(self, block: _Block) -> Iterator[Event]:
    """What a block has brought; waits for it."""
    steps, num_steps = jax.tree.map(on_host, block.steps), int(block.num_steps)
    self.counters.steps += num_steps if block.is_decoded else 0
    self._has_ended = False
    for row, job in block.jobs:
      if job.is_done:
        continue
      columns = [x_T[:num_steps, row] for x_T in steps]
      event = self._next_event(job, *columns)
      self.counters.drawn_tokens += len(event.tokens)
      if not self.runs_ahead and job.row is not None and num_steps > 0:
        job.in_cache = len(job.request.prompt) + len(job.tokens) - 1
      if event.finish_reason is not None:
        self._has_ended = True
        broken = job.row if event.error else None
        # Whole, as no idle step has written over its last key: on a CPU the block has ended
        # with it, and elsewhere a row that is full has been freed before.
        if broken is None:
          self._keep_answer(job, has_ended=True)
        if event.error is not None:
          self.reader.forget()
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
      job.cached,
    )

  def _clear(self, row: int) -> None:
    """Empties a row: NaN times a weight of 0 would be NaN for whoever reads it."""
    assert self._state is not None
    rows_R = np.full(self.shards, row, np.int32)
    zeros = take_rows(self._state, rows_R, rows_R < 0)
    zeros = jax.tree.map(jnp.zeros_like, zeros)
    self._state = insert_rows(self._state, zeros, rows_R)
