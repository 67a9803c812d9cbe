# SPDX-License-Identifier: Apache-2.0
"""Reads an engine's prompts, a chunk at a time, into caches of their own.

What was read is kept, as the engine's options or a conversation want it, and prompts that
begin alike are read from there on.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from flaxlm.decoding.prefill import (
  CHUNK,
  bucket,
  init_cache_with_source,
  logits_of_hidden,
  no_hidden,
  pad_rows,
  padded_length,
  prefill_chunk,
)
from flaxlm.decoding.prefix_store import Found, Row, RowStore, copy_rows, store_of_texts
from flaxlm.decoding.requests import MOST_PADDING, Counters, EngineOptions
from flaxlm.decoding.row_sizes import RowSizes, chunk_size
from flaxlm.nn.base import LanguageModel
from flaxlm.nn.models import init_cache
from flaxlm.sharding import wait_on_cpu

# What is read for a request: its prompt, and its source or ().
Text = tuple[Sequence[int], Sequence[int]]


@dataclasses.dataclass
class Reading:
  """Some prompts that are read together into a cache of their own."""

  texts: Sequence[Text]
  cache: Any
  last_RD: Any  # the hidden vector of each row's last token so far
  slots: tuple[int, int]  # of a row of the cache, and of its source
  starts: list[int]  # tokens of each prompt that the cache had already
  stop: int = 0  # tokens of each prompt, from there on, after which a chunk ends
  position: int = 0  # tokens of each prompt, from there on, that were read
  kept: int = 0  # tokens of each prompt, when they were last kept on the way
  logits_RV: Any = None  # after the last token of each; None until all were read

  @property
  def num_rows(self) -> int:
    """Rows of the cache; more than texts, perhaps."""
    return self.last_RD.shape[0]

  @property
  def rest(self) -> list[Sequence[int]]:
    """What is still to be read of each prompt."""
    starts = [start + self.position for start in self.starts]
    return [prompt[at:] for (prompt, _), at in zip(self.texts, starts, strict=True)]


class Reader:
  """Begins readings, and goes on with them; counts what it reads.

  `past` is that of `Engine`.
  """

  def __init__(
    self,
    model: LanguageModel,
    params: Any,
    options: EngineOptions,
    sizes: RowSizes,
    counters: Counters,
    past: RowStore | None = None,
  ):
    self.model, self.params, self.options = model, params, options
    self.sizes, self.shards, self.counters = sizes, sizes.shards, counters
    self._past = None if model.cfg.family == "encoder_decoder" else past
    self.store = store_of_texts(options.prefix_bytes if past is None else 0, sizes)

  @property
  def together(self) -> int:
    """Prompts of one pass. A CPU gains nothing by more than it must take."""
    return self.shards if jax.default_backend() == "cpu" else 8 * self.shards

  def may_read_together(self, texts: Sequence[Text]) -> bool:
    """Whether one pass reads so many prompts. Short ones gain by it on a CPU, too."""
    if len(texts) == 1:
      return True
    longest = max(len(prompt) for prompt, _ in texts)
    is_short = self.options.whole_rows and len(texts) * bucket(longest) <= CHUNK
    if len(texts) > self.together and not is_short:
      return False
    slots = self.sizes.bucket_of_reading(longest + MOST_PADDING)
    source_slots = self.sizes.bucket_of_source(max(len(source) for _, source in texts))
    return self.sizes.has_room(self._batch_of(len(texts)), slots, source_slots)

  def _batch_of(self, count: int) -> int:
    """The rows of a cache for so many texts."""
    return self.shards * bucket(-(-count // self.shards), smallest=1)

  def begin(self, texts: Sequence[Text], final_length: int) -> Reading:
    """A reading of these texts, of which the longest answer ends at `final_length`."""
    batch = self._batch_of(len(texts))
    found, kept = Found(0, []), None
    if self.store is not None:  # all begin at once: nothing is written past the end
      found = self.store.find([prompt for prompt, _ in texts])
    starts = [found.length] * len(texts)
    if self._past is not None and len(texts) == 1:
      starts[0], kept = self._past.find(texts[0][0])
    lengths = [len(prompt) - at for (prompt, _), at in zip(texts, starts, strict=True)]
    slots = self.sizes.bucket_of_reading(starts[0] + max(lengths) + MOST_PADDING)
    if self.options.whole_rows:  # no other size is needed afterwards
      end = max(final_length, starts[0] + padded_length(max(lengths)))
      slots = max(slots, self.sizes.bucket_of_slots(end))
    sources = [source for _, source in texts]
    source_slots = self.sizes.bucket_of_source(max(map(len, sources)))
    if source_slots:
      source_BS, lengths_B = pad_rows(sources, batch, source_slots)
      self.counters.read_tokens += sum(map(len, sources))
      args = (self.model, self.params, source_BS, lengths_B, slots)
      cache = init_cache_with_source(*args)
    elif kept is not None:
      rows_R = np.zeros(batch, np.int32)
      cache = copy_rows(self.model.cfg, kept, rows_R, np.int32(starts[0]), slots)
    else:
      cache = init_cache(self.model, batch, slots)
    for number, of_text in enumerate(found.kept):
      assert self.store is not None
      cache = self.store.put(Row(cache, number, slots), of_text, found.length)
    self.counters.cached_tokens += sum(starts)
    last_RD = no_hidden(self.model, batch)
    stop = found.stop - found.length
    return Reading(texts, cache, last_RD, (slots, source_slots), starts, stop)

  def read(self, reading: Reading, limit: int | None) -> int:
    """Reads at most `limit` more tokens of each prompt; returns how many, with padding."""
    rest, most = reading.rest, CHUNK if limit is None else limit
    longest = max(map(len, rest))
    if reading.position < reading.stop:
      longest = min(longest, reading.stop - reading.position)
    size = chunk_size(longest, most)
    if self.options.whole_rows:
      size = bucket(min(longest, most))
    count = min(size, longest)
    chunk = [tokens[:count] for tokens in rest]
    tokens_RT, num_new_R = pad_rows(chunk, reading.num_rows, size)
    reading.last_RD, reading.cache = prefill_chunk(
      self.model, self.params, tokens_RT, num_new_R, reading.cache, reading.last_RD
    )
    wait_on_cpu(reading.last_RD)
    reading.position += count
    self.counters.read_tokens += sum(map(len, chunk))
    self._keep_read(reading, chunk)
    if not any(reading.rest):
      reading.logits_RV = logits_of_hidden(self.model, self.params, reading.last_RD)
    return size * len(reading.texts)

  # -- What was read before

  def _keep_read(self, reading: Reading, chunk: Sequence[Sequence[int]]) -> None:
    """Keeps the prompts that had part in a chunk, as far as they were read.

    Of a long one not after every chunk, which would cost its length each time.
    """
    length = reading.starts[0] + reading.position
    is_stop = reading.position == reading.stop or 4 * length >= 5 * reading.kept
    for number, (prompt, _) in enumerate(reading.texts):
      is_whole = length >= len(prompt)
      if chunk[number] and (is_stop or is_whole):
        row = Row(reading.cache, number, reading.slots[0])
        if self.store is not None:
          self.store.add(prompt[:length], row, is_end=True)
        if is_whole:
          self._keep_whole(prompt, row, row.slots, is_end=True)
    reading.kept = length if is_stop else reading.kept

  def keep(self, tokens: Sequence[int], row: Row, slots: int, is_end: bool) -> None:
    """Keeps what a row has read and written, for a prompt that goes on from it.

    If it is kept whole, as a row of so many slots; `is_end`: these are all of its tokens.
    """
    if self.store is not None:
      self.store.add(tokens, row, is_end)
    self._keep_whole(tokens, row, slots, is_end)

  def _keep_whole(self, tokens: Sequence[int], row: Row, slots: int, is_end: bool) -> None:
    if self._past is not None:
      rows_R, length = np.full(self.shards, row.number, np.int32), np.int32(len(tokens))
      copy = lambda: copy_rows(self.model.cfg, row.cache, rows_R, length, slots)
      self._past.add(tokens, is_end, copy)

  def forget(self) -> None:
    """Drops a conversation's rows: NaN behind a text would reach what begins alike."""
    if self._past is not None:
      self._past.clear()
