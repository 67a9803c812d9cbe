# SPDX-License-Identifier: Apache-2.0
"""What each row of a batch holds: a window of a text, or as many pairs or conversations
as fit.

Which tokens are in which row is decided when the store is opened. A row is a contiguous
part of the stored tokens, so it costs the same to read everywhere in the corpus. Where
documents begin in it is read from the store, and never told by a token: a text may hold
every token of the vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from flaxlm.config import DataConfig
from flaxlm.data.objectives import (
  Batch,
  Masking,
  Windows,
  answers,
  masked,
  next_token,
  seq2seq,
)
from flaxlm.data.stores import MixedStore, PairStore, Store, TokenStore
from flaxlm.errors import DataError

PADDING = -1  # the number of a row that fills up the last batch
CURE = "delete the data directory; it will be prepared again"


class TextRows:
  """Row i of a text is the window tokens[i*T : (i+1)*T + 1].

  Windows overlap by one token, so that in `next_token` every token except the first is a
  target exactly once.
  """

  def __init__(self, store: TokenStore, cfg: DataConfig, seed: int):
    """`seed` decides what is masked. Raises `DataError` without a `[MASK]` for that."""
    self.store, self.seq_len, self.seed = store, cfg.seq_len, seed
    self.num_rows = math.ceil((store.num_tokens - 1) / cfg.seq_len)
    self.masking = None
    if cfg.objective == "masked":
      if store.mask_id is None:
        raise DataError(
          "the tokenizer has no mask, which data.objective=masked needs",
          "leave --tokenizer.path out to train one",
        )
      ordinary_ids = np.setdiff1d(np.arange(store.vocab_size), store.special_ids)
      self.masking = Masking(cfg.mask_fraction, store.mask_id, ordinary_ids)

  def batch(self, rows_B: np.ndarray, places_B: np.ndarray) -> Batch:
    """The rows with these numbers.

    `places_B` are their places in the sequence of rows of all epochs, so that other tokens
    of a row are masked in each epoch.
    """
    windows = self.windows(rows_B)
    if self.masking is None:
      return next_token(windows, self.store.end_id)
    random_3BT = np.stack(
      [
        np.random.default_rng((self.seed, place)).random((3, self.seq_len))
        for place in places_B.tolist()
      ],
      axis=1,
    )
    tokens_BX, begins_BX, lengths_B, _ = windows
    return masked(
      Windows(tokens_BX[:, :-1], begins_BX[:, :-1], lengths_B), self.masking, random_3BT
    )

  def windows(self, rows_B: np.ndarray) -> Windows:
    """What the rows with these numbers are made of, T + 1 tokens each."""
    starts_B = np.maximum(rows_B, 0) * self.seq_len
    lengths_B = np.minimum(self.store.num_tokens - starts_B, self.seq_len + 1)
    lengths_B = np.where(rows_B == PADDING, 0, lengths_B)
    return _windows(self.store, starts_B, lengths_B, self.seq_len + 1)


class PairRows:
  """A row holds the next pairs, in stored order, whose sources and targets both fit.

  A pair that is too long even for a row of its own is cut.
  """

  def __init__(self, store: PairStore, cfg: DataConfig):
    """Raises `DataError` if the stored pairs are damaged."""
    self.store = store
    self.source_len, self.seq_len = cfg.source_length, cfg.seq_len
    source_P, target_P = store.source.bounds, store.target.bounds
    if len(source_P) != len(target_P):
      raise DataError(
        f"the stored pairs are damaged: {len(source_P) - 1} sources and "
        f"{len(target_P) - 1} targets",
        CURE,
      )
    first_R = _first_pairs((source_P, target_P), (self.source_len, self.seq_len))
    self.num_rows = len(first_R) - 1
    self.source_R, self.target_R = source_P[first_R], target_P[first_R]

  def batch(self, rows_B: np.ndarray, places_B: np.ndarray) -> Batch:
    """The rows with these numbers; their places do not matter."""
    source = self._side(self.store.source, self.source_R, rows_B, self.source_len)
    return seq2seq(source, self.windows(rows_B), self.store.end_id)

  def windows(self, rows_B: np.ndarray) -> Windows:
    """What the targets of the rows with these numbers are made of, T + 1 tokens each."""
    return self._side(self.store.target, self.target_R, rows_B, self.seq_len)

  def _side(
    self, store: TokenStore, starts_R: np.ndarray, rows_B: np.ndarray, width: int
  ) -> Windows:
    """The windows of one side; what follows the last text is its end."""
    lengths_B = np.minimum(starts_R[rows_B + 1] - starts_R[rows_B], width) + 1
    lengths_B = np.where(rows_B == PADDING, 0, lengths_B)
    return _windows(store, starts_R[rows_B], lengths_B, width + 1)


class ChatRows:
  """A row holds the next conversations, in stored order, that fit into T + 1 tokens.

  The last token of a row is only predicted. A conversation that is too long has a row of
  its own and is cut at its end; if nothing before the cut carries loss, it is dropped.
  """

  def __init__(self, store: TokenStore, cfg: DataConfig):
    """Raises `DataError` if all are dropped, or the stored conversations are damaged."""
    assert store.weights is not None, "the store is made for this objective"
    self.store, self.seq_len = store, cfg.seq_len
    starts_P, width = store.bounds, cfg.seq_len + 1
    first_R = _first_pairs((starts_P,), (width,))
    self.starts_R = starts_P[first_R[:-1]]
    self.lengths_R = np.minimum(starts_P[first_R[1:]] - self.starts_R, width)
    # A conversation that is whole carries loss; what is dropped was alone in its row.
    cut_R = np.flatnonzero(np.diff(starts_P[first_R]) > width)
    is_kept_R = np.ones(len(self.starts_R), bool)
    for row in cut_R:
      start = self.starts_R[row]
      is_kept_R[row] = store.weights[start + 1 : start + width].any()
    self.num_dropped = int(np.sum(~is_kept_R))
    self.num_cut = len(cut_R) - self.num_dropped
    self.starts_R, self.lengths_R = self.starts_R[is_kept_R], self.lengths_R[is_kept_R]
    self.num_rows = len(self.starts_R)
    if not self.num_rows:
      raise DataError(
        f"no conversation has an answer in its first {width} tokens",
        f"shorten them, or where the model's context allows it set --data.seq-len to more "
        f"than {cfg.seq_len}",
      )

  def batch(self, rows_B: np.ndarray, places_B: np.ndarray) -> Batch:
    """The rows with these numbers; their places do not matter."""
    return answers(self.windows(rows_B), self.store.end_id)

  def windows(self, rows_B: np.ndarray) -> Windows:
    """What the rows with these numbers are made of, T + 1 tokens each."""
    starts_B, width = self.starts_R[rows_B], self.seq_len + 1
    lengths_B = np.where(rows_B == PADDING, 0, self.lengths_R[rows_B])
    windows = _windows(self.store, starts_B, lengths_B, width)
    weights = self.store.weights
    assert weights is not None
    index_BX = (starts_B[:, None] + np.arange(width)) % len(weights)
    return windows._replace(weights_BX=weights[index_BX])

  @property
  def notes(self) -> list[str]:
    """What happened to conversations that are too long."""
    counts = (
      (self.num_cut, "cut at their end"),
      (self.num_dropped, "dropped, for no answer begins before that"),
    )
    said = [f"{count:,} {what}" for count, what in counts if count]
    if not said:
      return []
    most = self.seq_len + 1
    return [f"conversations of more than {most:,} tokens: {', '.join(said)}"]


class PreferenceRows(ChatRows):
  """A row holds the next pairs of answers, in stored order, that fit into T + 1 tokens.

  Of a pair both conversations are in one row, the chosen one first, so that whoever has
  some of the rows can compare. Document 2 p + 1 of a row, from 1, is chosen, and 2 p + 2
  rejected. A pair that is too long for a row is dropped.
  """

  def __init__(self, store: TokenStore, cfg: DataConfig):
    """Raises `DataError` if all are dropped, or the stored pairs are damaged."""
    self.store, self.seq_len = store, cfg.seq_len
    if store.num_documents % 2:
      raise DataError(
        f"the stored pairs are damaged: {store.num_documents} conversations", CURE
      )
    starts_P, width = store.bounds[::2], cfg.seq_len + 1
    bounds_R = starts_P[_first_pairs((starts_P,), (width,))]
    lengths_R = np.diff(bounds_R)
    fits_R = lengths_R <= width
    self.starts_R, self.lengths_R = bounds_R[:-1][fits_R], lengths_R[fits_R]
    self.num_cut, self.num_dropped = 0, int(np.sum(~fits_R))
    self.num_rows = len(self.starts_R)
    if not self.num_rows:
      raise DataError(
        f"no pair of chosen and rejected has at most {width} tokens together",
        f"shorten them, or where the model's context allows it "
        f"--data.seq-len={np.diff(starts_P).max() - 1} takes them all",
      )

  @property
  def notes(self) -> list[str]:
    """What happened to pairs that are too long."""
    if not self.num_dropped:
      return []
    return [f"pairs of more than {self.seq_len + 1:,} tokens: {self.num_dropped:,} dropped"]


class MixedRows:
  """The rows of several sources: those of the first, those of the second, and so on."""

  def __init__(self, store: MixedStore, cfg: DataConfig, seed: int):
    """Raises `DataError` if the rows of a source cannot be made."""
    self.sources = [_rows_of(one, cfg, seed) for one in store.sources.values()]
    self.weights = store.weights
    self.starts = np.cumsum([0, *(source.num_rows for source in self.sources)])
    self.num_rows = int(self.starts[-1])

  def batch(self, rows_B: np.ndarray, places_B: np.ndarray) -> Batch:
    """The rows with these numbers; see `TextRows.batch`."""
    batches = [
      self.sources[source].batch(rows, places_B[chosen])
      for source, chosen, rows in self._by_source(rows_B)
    ]
    return Batch(*self._in_order(rows_B, batches))

  def windows(self, rows_B: np.ndarray) -> Windows:
    """What the rows with these numbers are made of."""
    windows = [self.sources[s].windows(rows) for s, _, rows in self._by_source(rows_B)]
    return Windows(*self._in_order(rows_B, windows))

  def _by_source(self, rows_B: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(source, which of the rows are its, their numbers in it); padding is the first's."""
    source_B = np.searchsorted(self.starts, np.maximum(rows_B, 0), side="right") - 1
    for source in np.unique(source_B).tolist():
      (chosen,) = np.nonzero(source_B == source)
      rows = rows_B[chosen]
      yield source, chosen, np.where(rows == PADDING, rows, rows - self.starts[source])

  def _in_order(
    self, rows_B: np.ndarray, parts: Sequence[Sequence[np.ndarray | None]]
  ) -> Iterator[Any]:
    """The arrays of all parts together, with their rows in the order of the batch."""
    order_B = np.concatenate([chosen for _, chosen, _ in self._by_source(rows_B)])
    for arrays in zip(*parts, strict=True):
      if arrays[0] is None:
        yield None
        continue
      together = np.concatenate(arrays)
      array = np.empty_like(together)
      array[order_B] = together
      yield array


Rows = TextRows | PairRows | ChatRows | MixedRows


def make_rows(store: Store, cfg: DataConfig, seed: int) -> Rows:
  """The rows that the config's objective makes of a store. Raises `DataError`."""
  if isinstance(store, MixedStore):
    return MixedRows(store, cfg, seed)
  return _rows_of(store, cfg, seed)


def _rows_of(
  store: TokenStore | PairStore, cfg: DataConfig, seed: int
) -> TextRows | PairRows | ChatRows:
  if isinstance(store, PairStore):
    assert cfg.objective == "seq2seq", "the store is made for this objective"
    return PairRows(store, cfg)
  assert cfg.objective != "seq2seq", "the store is made for another objective"
  if cfg.objective == "chat":
    return ChatRows(store, cfg)
  if cfg.objective == "preference":
    return PreferenceRows(store, cfg)
  return TextRows(store, cfg, seed)


def text_bytes(windows: Windows, sizes_V: np.ndarray) -> int:
  """The bytes of text that the targets of windows stand for, by the bytes of each id.

  What ends a document has none, whatever that id stands for inside of a text, nor what has
  no weight.
  """
  is_text_BX = ~windows.begins_BX[:, 1:]
  if windows.weights_BX is not None:
    is_text_BX &= windows.weights_BX[:, 1:] > 0
  is_text_BX &= np.arange(1, windows.tokens_BX.shape[1]) < windows.lengths_B[:, None]
  return int(sizes_V[windows.tokens_BX[:, 1:][is_text_BX]].sum(dtype=np.int64))


def _windows(
  store: TokenStore, starts_B: np.ndarray, lengths_B: np.ndarray, width: int
) -> Windows:
  """`width` tokens from each start on; after the last token comes the first one, a bos.

  Raises `DataError` if a token is not in the store's vocabulary.
  """
  tokens, bounds = store.tokens, store.bounds
  tokens_BX = tokens[(starts_B[:, None] + np.arange(width)) % len(tokens)]
  if tokens_BX.max() >= store.vocab_size:
    raise DataError(
      f"the stored tokens are damaged: {tokens_BX.max()} is no id of the tokenizer", CURE
    )
  begins_BX = np.zeros(tokens_BX.shape, bool)
  first_B, last_B = np.searchsorted(bounds, (starts_B, starts_B + width))
  for row, start, first, last in zip(begins_BX, starts_B, first_B, last_B, strict=True):
    row[bounds[first:last] - start] = True
  return Windows(tokens_BX, begins_BX, lengths_B)


def _first_pairs(
  bounds_of_sides: Sequence[np.ndarray], limits: Sequence[int]
) -> np.ndarray:
  """The first pair of each row, and the number of pairs.

  The first pair of a row decides where the row ends, so the ends of the rows that would
  begin with each pair are computed together.
  """
  num_pairs = len(bounds_of_sides[0]) - 1
  ends_P = np.full(num_pairs, num_pairs)
  for starts_P, limit in zip(bounds_of_sides, limits, strict=True):
    fits_P = np.searchsorted(starts_P, starts_P[:-1] + limit, side="right") - 1
    ends_P = np.minimum(ends_P, fits_P)
  ends = np.maximum(ends_P, np.arange(1, num_pairs + 1)).tolist()  # one at least, if cut
  first = [0]
  while first[-1] < num_pairs:
    first.append(ends[first[-1]])
  return np.array(first)
