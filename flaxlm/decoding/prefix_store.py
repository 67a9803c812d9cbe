# SPDX-License-Identifier: Apache-2.0
"""What was read of past texts, for texts that begin as they did.

Many texts are kept within a limit of bytes; what was not used for longest goes first. Keys
and values are cut in pieces of `PIECE` tokens, each of which is found by its tokens and by
the piece before it, so that a text shares what it has in common with any earlier one. The
state of an RNN, and rings in which later tokens take the place of earlier ones, cannot be
cut: of them the row is kept as it was after chunks of a prompt, and after an answer. Where
a text and an earlier one part, a chunk ends, so that the next one finds a row there.

Of a conversation the last rows are kept whole, to their last token.
"""

import collections
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.config import MAX_NEW_IN_RING, ResolvedModel
from flaxlm.decoding.row_sizes import RowSizes, cache_bytes
from flaxlm.nn.cache import moved_as_bits

PIECE = 64  # tokens
MOST_KEPT = 2  # whole rows: that of a prompt, and that of its answer
MOST_KNOWN = 2**14  # pieces of texts whose rows may be kept again


class Row(NamedTuple):
  """A row of a cache, which has room for so many tokens of it."""

  cache: Any
  number: int
  slots: int


class Found(NamedTuple):
  """What is kept of some texts that are read together."""

  length: int  # tokens of each
  kept: list[Any]  # for each text; empty if there is nothing
  stop: int = 0  # tokens after which a row is to be kept, if more than `length`


class _Kept:
  """Arrays by a key, at most `most_bytes` of them on all devices together."""

  def __init__(self, most_bytes: int):
    self.most_bytes, self.num_bytes = most_bytes, 0
    self._kept: collections.OrderedDict[Any, Any] = collections.OrderedDict()

  def _add(self, key: Any, arrays: Any) -> None:
    self._kept[key] = arrays
    self.num_bytes += bytes_of(arrays)

  def _use(self, keys: Iterable[Any]) -> None:
    for key in keys:
      self._kept.move_to_end(key)

  def _drop(self, most_bytes: int) -> None:
    """What was not used for longest, until the rest is no larger."""
    while self.num_bytes > most_bytes:
      _, oldest = self._kept.popitem(last=False)
      self.num_bytes -= bytes_of(oldest)


def bytes_of(arrays: Any) -> int:
  return sum(x.nbytes for x in jax.tree.leaves(arrays))


# -- Pieces --------------------------------------------------------------------------------


class PieceStore(_Kept):
  """Pieces of texts; of a text its end goes before its beginning."""

  def find(self, texts: Sequence[Sequence[int]]) -> Found:
    """The pieces of each text; at least one token of it is in none."""
    found = []
    for tokens in texts:
      is_kept = self._kept.__contains__
      found.append([*itertools.takewhile(is_kept, keys_of(tokens[:-1]))])
    shared = min(map(len, found))
    for keys in found:
      self._use(reversed(keys))
    pieces = [[self._kept[key] for key in keys[:shared]] for keys in found]
    return Found(shared * PIECE, pieces)

  def add(self, tokens: Sequence[int], row: Row, is_end: bool) -> None:
    """Keeps the pieces of a text, which the row begins with; whether it ends with it does
    not matter."""
    keys = [*keys_of(tokens)]
    for number, key in enumerate(keys):
      if key in self._kept:
        continue
      piece = self.cut(row, number * PIECE)
      if (number + 1) * bytes_of(piece) > self.most_bytes:  # its beginning would go
        keys = keys[:number]
        break
      self._add(key, piece)
    self._use(reversed(keys))
    self._drop(self.most_bytes)

  def cut(self, row: Row, start: int) -> Any:
    return cut_piece(row.cache, np.int32(row.number), np.int32(start))

  def put(self, row: Row, pieces: Sequence[Any], length: int) -> Any:
    """The cache with the pieces of so many tokens in the row, which ends after them."""
    cache = row.cache
    for start, piece in zip(range(0, length, PIECE), pieces, strict=True):
      cache = put_piece(cache, piece, np.int32(row.number), np.int32(start))
    return cache

  def put_back(self, row: Row) -> Any:
    """The same cache, by way of all programs."""
    return self.put(row, [self.cut(row, 0)], PIECE)


def keys_of(tokens: Sequence[int]) -> Iterator[bytes]:
  """A key for each whole piece of a text, made of all tokens up to its end."""
  key = b""
  for end in range(PIECE, len(tokens) + 1, PIECE):
    data = np.asarray(tokens[end - PIECE : end], np.int64).tobytes()
    key = hashlib.blake2b(key + data, digest_size=16).digest()
    yield key


@functools.partial(jax.jit, static_argnames="length")
def cut_piece(cache: Any, row: jax.Array, start: jax.Array, length: int = PIECE) -> Any:
  """The keys and values of some tokens of a row, layer by layer, (1, K, S, H) each."""

  def cut(x_BKSH: jax.Array) -> jax.Array:
    x_1KSH = jax.lax.dynamic_slice_in_dim(x_BKSH, row, 1, 0)
    return jax.lax.dynamic_slice_in_dim(x_1KSH, start, length, 2)

  return jax.tree.map(cut, cache.layers)


@functools.partial(jax.jit, donate_argnames="cache")
def put_piece(cache: Any, piece: Any, row: jax.Array, start: jax.Array) -> Any:
  """The cache with a piece of a row written in; the row then ends after it."""

  @moved_as_bits
  def put(x_BKSH: jax.Array, piece_1KSH: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(x_BKSH, piece_1KSH, (row, 0, start, 0))

  layers = jax.tree.map(put, cache.layers, piece)
  end = start + jax.tree.leaves(piece)[0].shape[2]
  lengths_B = cache.lengths_B.at[row].set(end)
  return cache._replace(layers=layers, lengths_B=lengths_B).constrained()


# -- States --------------------------------------------------------------------------------


class StateStore(_Kept):
  """Rows as they were after some tokens, each found by all of these.

  A row is a cache of its own, repeated for each shard of a batch, with no more slots than
  a prompt of its length is read into.
  """

  def __init__(self, most_bytes: int, sizes: RowSizes):
    super().__init__(most_bytes)
    self.sizes = sizes
    self._known: collections.OrderedDict[bytes, None] = collections.OrderedDict()

  def find(self, texts: Sequence[Sequence[int]]) -> Found:
    """The rows after the most tokens, less than all, for which there is one of every text;
    and where the texts part from earlier ones."""
    lengths = sorted({length for length, _ in self._kept})
    found = [{*keys_at(tokens[:-1], lengths)} & self._kept.keys() for tokens in texts]
    start = max(set.intersection(*({n for n, _ in keys} for keys in found)), default=0)
    keys = [key for of_text in found for key in of_text if key[0] == start]
    self._use(keys)
    stops = [stop for text in texts if (stop := self._known_of(text)) > start]
    return Found(start, [self._kept[key] for key in keys], min(stops, default=0))

  def _known_of(self, tokens: Sequence[int]) -> int:
    """How many tokens, less than all, an earlier text began with, in whole pieces. From
    now on this one is known, too."""
    keys = [*keys_of(tokens[:-1])]
    shared = sum(1 for _ in itertools.takewhile(self._known.__contains__, keys))
    for key in reversed(keys):
      self._known[key] = None
      self._known.move_to_end(key)
    while len(self._known) > MOST_KNOWN:
      self._known.popitem(last=False)
    return shared * PIECE

  def add(self, tokens: Sequence[int], row: Row, is_end: bool) -> None:
    """Keeps a row if these are all of its tokens."""
    if not is_end:
      return
    (key,) = keys_at(tokens, [len(tokens)])
    if key in self._kept:
      self._use([key])
      return
    slots = self.sizes.bucket_of_reading(len(tokens))
    num_bytes = cache_bytes(self.sizes.model, self.sizes.shards, slots, 0)
    if num_bytes <= self.most_bytes:
      self._drop(self.most_bytes - num_bytes)  # before there is one more
      cache = self.cut(row, len(tokens))
      self._add(key, self.sizes.resized(cache, (row.slots, 0), (slots, 0)))

  def cut(self, row: Row, length: int) -> Any:
    rows_R = np.full(self.sizes.shards, row.number, np.int32)
    cfg = self.sizes.model.cfg
    return copy_rows(cfg, row.cache, rows_R, np.int32(length), row.slots)

  def put(self, row: Row, kept: Any, length: int) -> Any:
    """The cache with a row that was kept after so many tokens."""
    slots = self.sizes.bucket_of_reading(length)
    kept = self.sizes.resized(kept, (slots, 0), (row.slots, 0))
    return put_rows(row.cache, kept, np.full(self.sizes.shards, row.number, np.int32))

  def put_back(self, row: Row) -> Any:
    """The same cache, by way of all programs but those that give it another size."""
    return self.put(row, self.cut(row, 0), row.slots)


def keys_at(tokens: Sequence[int], lengths: Iterable[int]) -> Iterator[tuple[int, bytes]]:
  """(length, a key made of all tokens up to there) for ascending lengths of a text."""
  ids, hashed, before = np.asarray(tokens, np.int64), hashlib.blake2b(digest_size=16), 0
  for length in lengths:
    if length > len(ids):
      return
    hashed.update(ids[before:length].tobytes())
    yield length, hashed.copy().digest()
    before = length


@functools.partial(jax.jit, donate_argnames="cache")
def put_rows(cache: Any, rows: Any, rows_R: jax.Array) -> Any:
  """The cache with `rows`, of as many slots, in place of its `rows_R`."""
  return cache.put(rows, rows_R).constrained()


def store_of_texts(most_bytes: int, sizes: RowSizes) -> PieceStore | StateStore | None:
  """What keeps the texts that a model reads; None if it cannot, or nothing may be kept."""
  if not most_bytes or sizes.model.cfg.family == "encoder_decoder":
    return None  # what is written is written for one source
  if sizes.model.cfg.family == "rnn" or has_rings(sizes.model.cfg):
    return StateStore(most_bytes, sizes)
  return PieceStore(most_bytes)


def has_rings(cfg: ResolvedModel) -> bool:
  return "L" in cfg.period and cfg.ring_slots is not None


# -- Whole rows ----------------------------------------------------------------------------


class RowStore:
  """The rows of the last texts, at most `MOST_KEPT` of them.

  Keys and values serve any text that begins alike: a smaller length takes the rest back.
  The state of an RNN, and rings in which tokens may have taken the place of earlier ones,
  serve only texts that go on from their last token.
  """

  def __init__(self, cfg: ResolvedModel):
    self.cfg = cfg
    self._rows: list[tuple[Sequence[int], Any]] = []  # (tokens, cache), the newest last

  def find(self, tokens: Sequence[int]) -> tuple[int, Any]:
    """The most tokens that a row has of a text, less than all, and the row's cache, which
    may hold others behind them; (0, None) if none has any."""
    found = [(self._shared(kept, tokens[:-1]), cache) for kept, cache in self._rows]
    return max([(0, None), *found], key=lambda row: row[0])

  def add(self, tokens: Sequence[int], is_end: bool, copy: Callable[[], Any]) -> None:
    """Keeps the copy of a row, which ends with these tokens or may hold more."""
    can_rewind = self._can_rewind(tokens)
    has_all = lambda row: self._shared(row[0], tokens) == len(tokens)
    self._rows.sort(key=has_all)  # what is of use again is the newest
    if any(map(has_all, self._rows)) or not (is_end or can_rewind):
      return
    if can_rewind:  # rows that it goes on from are of no more use
      goes_on = lambda kept: common_length(kept, tokens) == len(kept)
      self._rows = [row for row in self._rows if not goes_on(row[0])]
    del self._rows[: 1 - MOST_KEPT]  # before there is one more, for the sake of memory
    self._rows.append((tuple(tokens), copy()))

  def clear(self) -> None:
    self._rows.clear()

  def _shared(self, kept: Sequence[int], tokens: Sequence[int]) -> int:
    """How many tokens of a text are to be had of the row of another one."""
    length = common_length(kept, tokens)
    return length if length == len(kept) or self._can_rewind(kept) else 0

  def _can_rewind(self, kept: Sequence[int]) -> bool:
    """Whether a smaller length alone gives a row of fewer tokens."""
    if not has_rings(self.cfg):
      return self.cfg.family != "rnn"
    # Padding, or steps ahead of the host, may lie behind the tokens.
    most = (self.cfg.ring_slots or 0) - self.cfg.sink_tokens - MAX_NEW_IN_RING
    return len(kept) <= most


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
  """How many tokens two texts begin with in common."""
  differ = (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
  return next(differ, min(len(first), len(second)))


@functools.partial(jax.jit, static_argnames=("cfg", "slots"))
def copy_rows(
  cfg: ResolvedModel, cache: Any, rows_R: jax.Array, length: jax.Array, slots: int
) -> Any:
  """A cache of the first `length` tokens of the rows `rows_R`, with room for `slots`."""
  cache = cache.take(rows_R)
  lengths_R = jnp.full_like(cache.lengths_B, length)
  return cache._replace(lengths_B=lengths_R).resized(cfg, slots).constrained()
