# SPDX-License-Identifier: Apache-2.0
"""The key/value cache: what a decoder remembers, layer by layer, and how it is written."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flaxlm.config import MAX_NEW_IN_RING, ResolvedModel
from flaxlm.nn.masks import Placement
from flaxlm.nn.quantized import Narrow, narrowed
from flaxlm.sharding import constrain

MOST_WRITES = 16  # up to so many rows are written one by one, which XLA does in place
CACHE_NAMES = ("batch", "act_kv_heads", "key_length", "head_dim")


def num_slots(kv: Any) -> int:
  """Slots of one layer's keys and values."""
  return jax.tree.leaves(kv)[0].shape[2]


class KVCache(NamedTuple):
  """Keys and values of the tokens so far; functions take a cache and return a new one.

  Each layer has its own arrays, (k_BKSH, v_BKSH), because one stacked array would be copied
  at every token. Token number s of row b is in slot s; slots from `lengths_B[b]` on are
  empty. The slots of a local layer are a ring, as large as its window needs
  (`ResolvedModel.ring_slots`). In an encoder-decoder, `source` has each layer's keys and
  values of the source.
  """

  layers: tuple[tuple[Any, Any], ...]  # arrays, or Narrow
  lengths_B: jax.Array
  source: "SourceCache | None" = None

  def of_layers(self) -> list[tuple]:
    """(keys, values) of each layer, followed by those of the source, if there is one."""
    if self.source is None:
      return [*self.layers]
    pairs = zip(self.layers, self.source.layers, strict=True)
    return [(*kv, *source_kv) for kv, source_kv in pairs]

  def take(self, rows_R: jax.Array) -> "KVCache":
    """The cache of these rows, in this order."""
    return jax.tree.map(lambda x: x[rows_R], self)

  def put(self, rows: "KVCache", rows_R: jax.Array) -> "KVCache":
    """The cache with `rows`, of as many slots, in place of its rows `rows_R`."""
    put = lambda old, new: put_rows(old, new, rows_R)
    return jax.tree.map(put, self, rows).constrained()

  def constrained(self) -> "KVCache":
    """The same cache, each array in its one layout on a mesh."""
    pin = lambda x: constrain(x, *CACHE_NAMES) if x.ndim == 4 else x
    lengths_B = constrain(self.lengths_B, "batch")
    return jax.tree.map(pin, self)._replace(lengths_B=lengths_B)

  def resized(self, cfg: ResolvedModel, slots: int) -> "KVCache":
    """The same tokens with room for `slots` of them; `slots` must be enough for all.

    A ring that is cut or grows has not turned: token number s is in slot s there, too.
    """

    def resize(kind: str, x_BKSH: jax.Array) -> jax.Array:
      size = cfg.cache_slots(kind, slots)
      missing = max(0, size - x_BKSH.shape[2])
      return jnp.pad(x_BKSH, ((0, 0), (0, 0), (0, missing), (0, 0)))[:, :, :size]

    layers = tuple(
      jax.tree.map(functools.partial(resize, kind), kv)
      for kind, kv in zip(cfg.layer_kinds(), self.layers, strict=True)
    )
    return self._replace(layers=layers)


class SourceCache(NamedTuple):
  """Each decoder layer's keys and values of the source: computed once, then only read."""

  layers: tuple[tuple[jax.Array, jax.Array], ...]  # (k_BKSH, v_BKSH) each
  segments_BS: jax.Array

  def resized(self, slots: int) -> "SourceCache":
    """The same source, padded or cut to `slots`, which must be enough for all rows."""

    def resize(x: jax.Array, dim: int) -> jax.Array:
      missing = [(0, 0)] * x.ndim
      missing[dim] = (0, max(0, slots - x.shape[dim]))
      return jax.lax.slice_in_dim(jnp.pad(x, missing), 0, slots, axis=dim)

    layers = jax.tree.map(lambda x_BKSH: resize(x_BKSH, 2), self.layers)
    return SourceCache(layers, resize(self.segments_BS, 1))


def empty_cache(
  cfg: ResolvedModel, batch: int, slots: int, dtype: jnp.dtype = jnp.float32
) -> KVCache:
  """An empty cache for `batch` rows of up to `slots` tokens."""

  def empty(kind: str) -> jax.Array | Narrow:
    shape = (batch, cfg.num_kv_heads, cfg.cache_slots(kind, slots), cfg.head_dim)
    zeros_BKSH = constrain(jnp.zeros(shape, jnp.float32), *CACHE_NAMES)
    return narrowed(zeros_BKSH) if dtype == jnp.int8 else zeros_BKSH.astype(dtype)

  layers = tuple((empty(kind), empty(kind)) for kind in cfg.layer_kinds())
  return KVCache(layers, jnp.zeros((batch,), jnp.int32))


def is_widened(old: jax.Array) -> bool:
  """Whether XLA's CPU compiler would widen a whole array to write into it, and round it
  again, once for each row that it writes. One row it writes in place."""
  return old.dtype == jnp.bfloat16 and len(old) > 1


def moved_as_bits(write: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """`write(old, new, *where)`, in which no array `is_widened`."""

  @functools.wraps(write)
  def run(old: jax.Array, new: jax.Array, *where: jax.Array, **static: int) -> jax.Array:
    plain = functools.partial(write, **static)
    if not is_widened(old):
      return plain(old, new, *where)

    def bits(old: jax.Array, new: jax.Array, *where: jax.Array) -> jax.Array:
      old, new = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (old, new))
      return jax.lax.bitcast_convert_type(plain(old, new, *where), jnp.bfloat16)

    return jax.lax.platform_dependent(old, new, *where, cpu=bits, default=plain)

  return run


@moved_as_bits
def put_rows(old: jax.Array, new: jax.Array, rows_R: jax.Array, dim: int = 0) -> jax.Array:
  """`old` with the rows of `new` in place of its rows `rows_R` along `dim`.

  Of rows that are named twice, the first one counts.
  """
  if jax.sharding.get_abstract_mesh().size > 1:  # a write in place would gather the rows
    is_new_BR = jnp.arange(old.shape[dim])[:, None] == rows_R
    spread = jnp.take(new, is_new_BR.argmax(1), dim)
    shape = [-1 if n == dim else 1 for n in range(old.ndim)]
    return jnp.where(is_new_BR.any(1).reshape(shape), spread, old)
  for row in reversed(range(new.shape[dim])):
    one = jax.lax.slice_in_dim(new, row, row + 1, axis=dim)
    old = jax.lax.dynamic_update_slice_in_dim(old, one, rows_R[row], dim)
  return old


# -- Rings: what local layers keep ---------------------------------------------------------


def slot_in_ring(tokens: jax.Array, num_slots: int, sink_tokens: int) -> jax.Array:
  """The slot of token number n: sink tokens keep theirs, all others take turns."""
  turn = sink_tokens + (tokens - sink_tokens) % (num_slots - sink_tokens)
  return jnp.where(tokens < sink_tokens, tokens, turn)


def tokens_in_ring(ends_B: jax.Array, num_slots: int, sink_tokens: int) -> jax.Array:
  """(B, S): the number of the last token before `ends_B` that lies in each slot.

  An empty slot gets a number far in the future, which no query sees.
  """
  slots_S = jnp.arange(num_slots)
  newest_B1 = ends_B[:, None] - 1 - sink_tokens
  turns_BS = newest_B1 - (newest_B1 - (slots_S - sink_tokens)) % (num_slots - sink_tokens)
  never = jnp.iinfo(jnp.int32).max // 2
  turns_BS = jnp.where(turns_BS < 0, never, turns_BS + sink_tokens)
  return jnp.where(slots_S < sink_tokens, slots_S, turns_BS)


class CacheSlots(NamedTuple):
  """Where a layer's new tokens go in its cache."""

  first_slots_B: jax.Array
  # In a ring that takes several new tokens at once: the number of the token in each slot.
  # None: the new tokens take consecutive slots, from the first one on.
  ring_BS: jax.Array | None = None


def cached_keys(
  cfg: ResolvedModel, cache: KVCache, kind: str, where: Placement
) -> tuple[Placement, int, CacheSlots]:
  """For the layers of one kind: the placement of their keys, their number of slots, and
  where the new tokens go."""
  num_new, first_slots_B = where.query_slots_BT.shape[1], where.query_slots_BT[:, 0]
  num_keys = num_slots(cache.layers[cfg.layer_kinds().index(kind)])
  if kind == "G" or cfg.ring_slots is None:
    return where, num_keys, CacheSlots(first_slots_B)
  ring = (num_keys, cfg.sink_tokens)
  tokens_BS = tokens_in_ring(first_slots_B + num_new, *ring)
  where = where._replace(key_slots_BS=tokens_BS)
  if num_new == 1:
    return where, num_keys, CacheSlots(slot_in_ring(first_slots_B, *ring))
  # More new tokens would overwrite keys that the first of them still sees.
  assert num_keys < cfg.ring_slots or num_new <= MAX_NEW_IN_RING, "prompts come in chunks"
  return where, num_keys, CacheSlots(first_slots_B, tokens_BS)


# -- Writing ------------------------------------------------------------------------------


def write(cache: Any, new: Any, slots: CacheSlots) -> Any:
  """A layer's (keys, values) with T new ones of each row, (B, T, K, H), written in."""
  pairs = zip(cache, new, strict=True)
  new = tuple(narrowed(x) if isinstance(old, Narrow) else x for old, x in pairs)

  def put(old_BKSH: jax.Array, new_BTKH: jax.Array) -> jax.Array:
    new_BKTH = new_BTKH.swapaxes(1, 2).astype(old_BKSH.dtype)
    if slots.ring_BS is not None:
      return write_ring(old_BKSH, new_BKTH, slots.ring_BS - slots.first_slots_B[:, None])
    return write_slots(old_BKSH, new_BKTH, slots.first_slots_B)

  return jax.tree.map(put, cache, new)


def write_slots(
  old_BKSH: jax.Array, new_BKTH: jax.Array, first_slots_B: jax.Array
) -> jax.Array:
  """Writes T new entries of each row from its own first slot on.

  The caller makes sure that they fit: JAX would shift a write past the end back.
  """
  arrays = (old_BKSH, new_BKTH, first_slots_B)
  if not is_widened(old_BKSH) or new_BKTH.shape[2] > 1:
    return write_in_place(*arrays)
  # The bits would be copied twice at every token, 9 of 41 ms of eight rows of 124M.
  return jax.lax.platform_dependent(*arrays, cpu=write_over, default=write_in_place)


def write_over(
  old_BKSH: jax.Array, new_BK1H: jax.Array, first_slots_B: jax.Array
) -> jax.Array:
  """`write_slots` of one entry, as a choice for each slot."""
  is_new_BS = jnp.arange(old_BKSH.shape[2]) == first_slots_B[:, None]
  return jnp.where(is_new_BS[:, None, :, None], new_BK1H, old_BKSH)


@moved_as_bits
def write_in_place(
  old_BKSH: jax.Array, new_BKTH: jax.Array, first_slots_B: jax.Array
) -> jax.Array:
  """`write_slots`, one row after the other."""
  batch, write_at = old_BKSH.shape[0], jax.lax.dynamic_update_slice
  if batch > MOST_WRITES or jax.sharding.get_abstract_mesh().size > 1:
    write_row = lambda old_KSH, new_KTH, at: write_at(old_KSH, new_KTH, (0, at, 0))
    return jax.vmap(write_row)(old_BKSH, new_BKTH, first_slots_B)
  for row in range(batch):
    at = (row, 0, first_slots_B[row], 0)
    old_BKSH = write_at(old_BKSH, new_BKTH[row : row + 1], at)
  return old_BKSH


def write_ring(old_BKSH: jax.Array, new_BKTH: jax.Array, index_BS: jax.Array) -> jax.Array:
  """Writes the new entry number `index_BS` into each slot, where there is such a one."""
  is_new_BS = (index_BS >= 0) & (index_BS < new_BKTH.shape[2])
  index_BS = jnp.where(is_new_BS, index_BS, 0)
  spread_BKSH = jnp.take_along_axis(new_BKTH, index_BS[:, None, :, None], 2)
  return jnp.where(is_new_BS[:, None, :, None], spread_BKSH, old_BKSH)
