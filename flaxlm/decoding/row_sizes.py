# SPDX-License-Identifier: Apache-2.0
"""How large a batch whose rows come and go is: few sizes, so that few programs compile."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flaxlm.decoding.prefill import CHUNK, bucket
from flaxlm.decoding.requests import (
  MOST_PADDING,
  SMALLEST_CACHE,
  EngineOptions,
  EngineRequest,
)
from flaxlm.decoding.rows import resize_cache
from flaxlm.nn.base import LanguageModel
from flaxlm.nn.models import init_cache


@dataclasses.dataclass(frozen=True)
class RowSizes:
  """The sizes of an engine's caches; `shards` is how many parts a batch is split into."""

  model: LanguageModel
  options: EngineOptions
  shards: int

  def bucket_of_slots(self, length: int) -> int:
    """The slots of the batch for rows of this length."""
    if self.model.cfg.family == "rnn":  # whose cache has none
      return SMALLEST_CACHE
    if self.options.shapes is not None:
      return least(self.options.shapes.slots, length)
    return bucket(length, SMALLEST_CACHE, fine=True)

  def bucket_of_reading(self, length: int) -> int:
    """The slots of a cache that prompts are read into."""
    if self.model.cfg.family == "rnn":
      return self.bucket_of_slots(length)
    if self.options.shapes is not None:
      return least(self.options.shapes.slots_of_reading, length)
    return bucket(length, SMALLEST_CACHE)

  def steps(
    self, before: tuple[int, int], after: tuple[int, int]
  ) -> Iterator[tuple[int, int]]:
    """The sizes (slots, source slots) that a cache takes one after another.

    With few shapes a size only becomes its neighbour: so many fewer programs, while the
    copies on the way are less than twice the last one's size together.
    """
    for slots in self._path(before[0], after[0]):
      yield slots, before[1]
    for source_slots in self._path(before[1], after[1]):
      yield after[0], source_slots

  def resized(self, cache: Any, before: tuple[int, int], after: tuple[int, int]) -> Any:
    """A cache of one size (slots, source slots) as one of another."""
    for to in self.steps(before, after):
      cache = resize_cache(self.model.cfg, cache, *to)
    return cache

  def _path(self, before: int, after: int) -> list[int]:
    if before == after or self.options.shapes is None:
      return [after] * (before != after)
    low, high = sorted((before, after))
    between = [size for size in self.options.shapes.slots if low < size < high]
    return [*(between if before == low else between[::-1]), after]

  def bucket_of_source(self, length: int) -> int:
    """The slots of a source of this length; none of no source."""
    if not length:
      return 0
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

  def fits(self, requests: Sequence[EngineRequest]) -> bool:
    """Whether the batch's cache is not too large when these requests reach their ends."""
    batch = self.bucket_of_rows(len(requests))
    slots = self.bucket_of_slots(max(request.final_length for request in requests))
    source = max(len(request.source or ()) for request in requests)
    source_slots = self.bucket_of_source(source)
    return self.has_room(batch, slots, source_slots)

  def has_room(self, batch: int, slots: int, source_slots: int) -> bool:
    """Whether a cache of this size is not too large."""
    most = self.options.most_bytes
    return most is None or cache_bytes(self.model, batch, slots, source_slots) <= most


def least(sizes: Sequence[int], number: int) -> int:
  """The least of some ascending sizes that is enough; the last if none is."""
  return next((size for size in sizes if size >= number), sizes[-1])


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
