# SPDX-License-Identifier: Apache-2.0
"""Compiles all programs of an engine before its first request.

What a request needs then is there, unless it has more biases or stop tokens than
`LEAST_BIASES` and `LEAST_STOPS`, or regular expressions whose automaton is larger than
`LEAST_AUTOMATON`: each next power of two is compiled once.
"""

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np

from flaxlm.decoding.compile_counter import count_compilations
from flaxlm.decoding.engine import Engine
from flaxlm.decoding.prefill import (
  CHUNK,
  init_cache_with_source,
  logits_of_hidden,
  no_hidden,
  pad_rows,
  prefill_chunk,
)
from flaxlm.decoding.prefill import take_rows as take_read
from flaxlm.decoding.prefix_store import Row
from flaxlm.decoding.requests import EngineRequest
from flaxlm.decoding.row_settings import empty_history
from flaxlm.decoding.row_sizes import CHUNK_SIZES
from flaxlm.decoding.rows import (
  Rows,
  decode_rows,
  draw_first,
  insert_rows,
  renumber,
  resize_cache,
  take_rows,
)
from flaxlm.nn.models import init_cache
from flaxlm.sharding import use_mesh

FIRST_REQUEST = EngineRequest(prompt=[0], max_new_tokens=1)


def warm(engine: Engine) -> int:
  """Compiles the programs of the options' `shapes`; returns how many there were."""
  assert engine.options.shapes is not None and engine.is_idle
  with count_compilations() as counter, use_mesh(engine.mesh):
    # The largest come first, and the memory that they have had is enough for the others.
    for size in _sizes(engine)[::-1]:
      read = [_warm_reading(engine, num, size) for num in _together(engine, size)]
      for count in _counts(engine)[::-1]:
        if _may_be(engine, count, size):
          _warm_batch(engine, count, size, read)
  return counter.programs


Size = tuple[int, int]  # slots of a row, and of its source


def _sizes(engine: Engine) -> list[Size]:
  """The sizes that a cache may have."""
  assert engine.options.shapes is not None
  slots = [*dict.fromkeys(map(engine.sizes.bucket_of_slots, engine.options.shapes.slots))]
  is_pair = engine.model.cfg.family == "encoder_decoder"
  sources = engine.options.shapes.slots if is_pair else [0]
  return [*itertools.product(slots, sources)]


def _counts(engine: Engine) -> list[int]:
  """The rows that the batch may have."""
  assert engine.options.shapes is not None
  return sorted({engine.sizes.bucket_of_rows(n) for n in engine.options.shapes.rows})


def _may_be(engine: Engine, count: int, size: Size) -> bool:
  """Whether the batch may be so large; one request always may, or it is refused."""
  return count == min(_counts(engine)) or engine.sizes.has_room(count, *size)


def _together(engine: Engine, size: Size) -> list[int]:
  """The prompts that may be read together into rows of this size."""
  counts = [engine.shards]
  while (more := 2 * counts[-1]) <= engine.reader.together:
    if not engine.sizes.has_room(more, *size):
      break
    counts.append(more)
  return counts


def _resize_to_neighbours(engine: Engine, cache: Any, size: Size) -> None:
  """To all sizes that one step leads to."""
  for to in {next(engine.sizes.steps(size, to)) for to in _sizes(engine) if to != size}:
    resize_cache(engine.model.cfg, cache, *to)


def _warm_reading(engine: Engine, together: int, size: Size) -> Rows:
  """Reads prompts into a cache of this size, in chunks of all lengths, and draws their
  first tokens."""
  model, params, (slots, source) = engine.model, engine.params, size
  if source:
    source_BS, lengths_B = pad_rows([[0]] * together, together, source)
    cache = init_cache_with_source(model, params, source_BS, lengths_B, slots)
  else:
    cache = init_cache(model, together, slots)
  last_RD = no_hidden(model, together)
  if slots == engine.sizes.bucket_of_reading(slots):
    most = engine.options.most_read or CHUNK
    if model.cfg.family != "rnn":
      most = min(most, slots)
    for length in [length for length in CHUNK_SIZES if length <= most]:
      tokens_RT, num_new_R = pad_rows([[0]] * together, together, length)
      last_RD, cache = prefill_chunk(model, params, tokens_RT, num_new_R, cache, last_RD)
    if (store := engine.reader.store) is not None:
      cache = store.put_back(Row(cache, 0, slots))
  logits_RV = logits_of_hidden(model, params, last_RD)
  logits_RV, cache = take_read(logits_RV, cache, np.zeros(together, np.int32))
  _resize_to_neighbours(engine, cache, size)
  requests = [FIRST_REQUEST] * together
  history = engine.settings.history_of(requests)
  drawing, static = engine.settings.sampling_of(requests)
  left_R = np.zeros(together, np.int32)
  new, _ = draw_first(logits_RV, cache.lengths_B, left_R, history, drawing, static)
  return new._replace(cache=cache)


def _warm_batch(engine: Engine, count: int, size: Size, read: list[Rows]) -> None:
  """All that happens to a batch of this size, into which these rows are put."""
  cfg, batch = engine.model.cfg, None
  rows_B = np.zeros(count, np.int32)
  for new in read:
    rows_R = np.zeros(new.left_B.shape[0], np.int32)
    idle = jnp.zeros(rows_R.shape, jnp.int32)
    batch = take_rows(Rows(new.cache, idle, idle), rows_B, rows_B > 0)
    batch = batch._replace(history=empty_history(count, cfg.vocab_size))
    batch = insert_rows(batch, new, rows_R)
  assert batch is not None
  drawing, static = engine.settings.sampling_of([None] * count)
  batch, *_ = decode_rows(
    engine.model,
    engine.params,
    batch,
    rows_B > 0,
    drawing,
    np.int32(0),
    engine.options.most_steps,
    not engine.runs_ahead,
    static,
  )
  if engine.reader.store is not None:
    engine.reader.store.cut(Row(batch.cache, 0, size[0]), 0)
  _resize_to_neighbours(engine, batch.cache, size)
  num_states = engine.settings.automaton.next_XY.shape[0]
  batch = renumber(batch, np.zeros(num_states, np.int32))
  for other in {*_counts(engine), engine.shards}:
    if not _may_be(engine, other, size):
      continue
    others_B = np.zeros(other, np.int32)
    take_rows(batch, others_B, others_B > 0)
