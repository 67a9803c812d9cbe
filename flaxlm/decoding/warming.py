# SPDX-License-Identifier: Apache-2.0
"""Compiles all programs of an engine before its first request.

What a request needs then is there, unless it has more biases or stop tokens than
`LEAST_BIASES` and `LEAST_STOPS`, or regular expressions whose automaton is larger than
`LEAST_AUTOMATON`: each next power of two is compiled once.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.decoding.compile_counter import count_compilations
from flaxlm.decoding.constraint import FREE
from flaxlm.decoding.engine import Engine
from flaxlm.decoding.generate import StaticSampling
from flaxlm.decoding.prefill import (
  CHUNK,
  init_cache_with_source,
  logits_of_hidden,
  no_hidden,
  pad_rows,
  prefill_chunk,
)
from flaxlm.decoding.prefill import take_rows as take_read
from flaxlm.decoding.prefix_store import cut_piece, has_pieces, put_piece
from flaxlm.decoding.requests import IDLE, EngineRequest
from flaxlm.decoding.row_settings import (
  LEAST_BIASES,
  LEAST_STOPS,
  RowSettings,
  empty_history,
)
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
from flaxlm.decoding.sampling import HISTORY_RULES, stack_rows
from flaxlm.nn.models import init_cache
from flaxlm.sharding import use_mesh

FIRST = np.int32(0), np.int32(0)  # row and token
FIRST_REQUEST = EngineRequest(prompt=[0], max_new_tokens=1)


def warm(engine: Engine) -> int:
  """Compiles the programs of the options' `shapes`; returns how many there were."""
  assert engine.options.shapes is not None and engine.is_idle
  with count_compilations() as counter, use_mesh(engine.mesh):
    for slots, source in _sizes(engine):
      for count in _counts(engine):
        _warm_batch(engine, count, slots, source, _warm_reading(engine, slots, source))
  return counter.programs


def _sizes(engine: Engine) -> list[tuple[int, int]]:
  """The slots that a row may have, and its source."""
  assert engine.options.shapes is not None
  slots = [*dict.fromkeys(map(engine.sizes.bucket_of_slots, engine.options.shapes.slots))]
  is_pair = engine.model.cfg.family == "encoder_decoder"
  sources = engine.options.shapes.slots if is_pair else [0]
  return [*itertools.product(slots, sources)]


def _counts(engine: Engine) -> list[int]:
  """The rows that the batch may have."""
  assert engine.options.shapes is not None
  return sorted({engine.sizes.bucket_of_rows(n) for n in engine.options.shapes.rows})


def _settings(engine: Engine) -> RowSettings:
  """Those of an engine that has no requests: its automaton is the smallest."""
  return RowSettings(engine.model.cfg, engine.options.shapes, engine.tokenizer)


def _ways(engine: Engine, count: int) -> Iterator[tuple[Any, StaticSampling, Any, Any]]:
  """All ways to sample: arrays of so many rows, what is compiled in, stops, history."""
  assert engine.options.shapes is not None
  automaton = _settings(engine).automaton
  for rules, num_top in itertools.product(
    engine.options.shapes.rules, engine.options.shapes.num_tops
  ):
    biases = LEAST_BIASES if "bias" in rules else 0
    sampling = stack_rows([IDLE] * count, automaton, {None: FREE}, biases)
    stops_BE = np.full((count, LEAST_STOPS), -1, np.int32)
    history = None
    if HISTORY_RULES & {*rules}:
      history = empty_history(count, engine.model.cfg.vocab_size)
    arrays = jax.device_put(sampling)
    yield arrays, StaticSampling(rules, num_top), stops_BE, history


def _warm_reading(engine: Engine, slots: int, source: int) -> list[Rows]:
  """Reads prompts into caches of these sizes, as many together as the engine does.

  Returns what is read, with a history and without.
  """
  model, params = engine.model, engine.params
  read: list[Rows] = []
  together = engine.shards
  while together <= engine.reader.together:
    if source:
      source_BS, lengths_B = pad_rows([[0]] * together, together, source)
      cache = init_cache_with_source(model, params, source_BS, lengths_B, slots)
    else:
      cache = init_cache(model, together, slots)
    last_RD = no_hidden(model, together)
    most = min(engine.options.most_read or CHUNK, slots)
    if model.cfg.family == "rnn":
      most = engine.options.most_read or CHUNK
    for size in [size for size in CHUNK_SIZES if size <= most]:
      tokens_RT, num_new_R = pad_rows([[0]] * together, together, size)
      last_RD, cache = prefill_chunk(model, params, tokens_RT, num_new_R, cache, last_RD)
    logits_RV = logits_of_hidden(model, params, last_RD)
    logits_RV, cache = take_read(logits_RV, cache, np.zeros(together, np.int32))
    if engine.options.prefix_bytes and has_pieces(model.cfg):
      cache = put_piece(
        cache, cut_piece(cache, np.int32(0), np.int32(0)), np.int32(0), np.int32(0)
      )
    left_R = np.zeros(together, np.int32)
    found = {}
    for sampling, static, stops_RE, history in _ways(engine, together):
      if history is not None:  # made as that of requests that have drawn nothing yet
        history = _settings(engine).history_of([FIRST_REQUEST] * together)
      new, _ = draw_first(
        *(logits_RV, cache.lengths_B, left_R, history),
        *(sampling, stops_RE, jnp.int32(engine.num_ids), static),
      )
      found[history is None] = new._replace(cache=cache)
    read += found.values()
    together *= 2
  return read


def _warm_batch(
  engine: Engine, count: int, slots: int, source: int, read: list[Rows]
) -> None:
  """All that happens to a batch of this size."""
  cfg, batch = engine.model.cfg, None
  rows_B = np.zeros(count, np.int32)
  for new in read:
    for size in _sizes(engine):
      resized = resize_cache(cfg, new.cache, *size)
      if size != (slots, source):
        continue
      rows_R = np.zeros(new.left_B.shape[0], np.int32)
      idle = jnp.zeros(rows_R.shape, jnp.int32)
      batch = take_rows(Rows(resized, idle, idle), rows_B, rows_B > 0)
      if new.history is not None:
        batch = batch._replace(history=empty_history(count, cfg.vocab_size))
      batch = insert_rows(batch, new._replace(cache=resized), rows_R)
  assert batch is not None
  for sampling, static, stops_BE, history in _ways(engine, count):
    batch, *_ = decode_rows(
      engine.model,
      engine.params,
      batch._replace(history=history),
      rows_B > 0,
      sampling,
      stops_BE,
      jnp.int32(engine.num_ids),
      np.int32(0),
      np.bool_(False),
      engine.options.most_steps,
      not engine.runs_ahead,
      static,
    )
  if engine.options.prefix_bytes and has_pieces(cfg):
    cut_piece(batch.cache, *FIRST)
  for size in _sizes(engine):
    resize_cache(cfg, batch.cache, *size)
  with_history = batch._replace(history=empty_history(count, cfg.vocab_size))
  num_states = _settings(engine).automaton.next_XY.shape[0]
  with_history = renumber(with_history, np.zeros(num_states, np.int32))
  for rows in (with_history, with_history._replace(history=None)):
    for other in {*_counts(engine), engine.shards}:
      others_B = np.zeros(other, np.int32)
      take_rows(rows, others_B, others_B > 0)
