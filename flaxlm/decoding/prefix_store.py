# SPDX-License-Identifier: Apache-2.0
"""What was read of past texts, for texts that begin as they did.

Many texts are kept in pieces of `PIECE` tokens, each of which is found by its tokens and by
the piece before it, so that a text shares what it has in common with any earlier one. There
is a limit of bytes: what was not used for longest goes first, and of a text its end before
its beginning. Of a conversation the last rows are kept whole: to their last token, and also
what cannot be cut in pieces.
"""

import collections
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.config import MAX_NEW_IN_RING, ResolvedModel

PIECE = 64  # tokens
MOST_KEPT = 2  # whole rows: that of a prompt, and that of its answer


class PrefixStore:
  """The pieces, at most `most_bytes` of them on all devices together."""

  def __init__(self, most_bytes: int):
    self.most_bytes, self.num_bytes = most_bytes, 0
    self._pieces: collections.OrderedDict[bytes, Any] = collections.OrderedDict()

  def find(self, tokens: Sequence[int]) -> list[Any]:
    """The pieces that the text begins with; at least one of its tokens is in none."""
    keys = []
    for key in keys_of(tokens[:-1]):
      if key not in self._pieces:
        break
      keys.append(key)
    for key in reversed(keys):
      self._pieces.move_to_end(key)
    return [self._pieces[key] for key in keys]

  def add(self, tokens: Sequence[int], cut: Callable[[int], Any]) -> None:
    """Keeps the pieces of a text; `cut(n)` gives the one that begins at token n."""
    keys = [*keys_of(tokens)]
    for number, key in enumerate(keys):
      if key in self._pieces:
        continue
      piece = cut(number * PIECE)
      size = sum(x.nbytes for x in jax.tree.leaves(piece))
      if (number + 1) * size > self.most_bytes:  # it would push its own beginning out
        keys = keys[:number]
        break
      self._pieces[key] = piece
      self.num_bytes += size
    for key in reversed(keys):
      self._pieces.move_to_end(key)
    while self.num_bytes > self.most_bytes:
      _, oldest = self._pieces.popitem(last=False)
      self.num_bytes -= sum(x.nbytes for x in jax.tree.leaves(oldest))


def has_pieces(cfg: ResolvedModel) -> bool:
  """Whether a model's past can be cut: not the state of an RNN, nor rings, in which later
  tokens take the place of earlier ones, nor what was written for another source."""
  return cfg.family == "decoder" and not has_rings(cfg)


def has_rings(cfg: ResolvedModel) -> bool:
  return "L" in cfg.period and cfg.ring_slots is not None


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

  def put(x_BKSH: jax.Array, piece_1KSH: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(x_BKSH, piece_1KSH, (row, 0, start, 0))

  layers = jax.tree.map(put, cache.layers, piece)
  end = start + jax.tree.leaves(piece)[0].shape[2]
  lengths_B = cache.lengths_B.at[row].set(end)
  return cache._replace(layers=layers, lengths_B=lengths_B).constrained()


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
