# SPDX-License-Identifier: Apache-2.0
"""Keys and values of past texts, in pieces of `PIECE` tokens, for texts that begin alike.

A piece is found by its tokens and by the piece before it, so that a text shares what it
has in common with any earlier one. There is a limit of bytes: what was not used for longest
goes first, and of a text its end before its beginning.
"""

import collections
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from flaxlm.config import ResolvedModel

PIECE = 64  # tokens


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
  has_rings = "L" in cfg.period and cfg.ring_slots is not None
  return cfg.family == "decoder" and not has_rings


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
