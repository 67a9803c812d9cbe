# SPDX-License-Identifier: Apache-2.0
"""Batches as an index: batch number n is a pure function of (seed, n).

`rows` decides what is in a row; Grain shuffles the rows and groups them. Nothing has state,
so a run can resume at any batch and on any number of processes.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from flaxlm.config import DataConfig
from flaxlm.data.objectives import Batch
from flaxlm.data.rows import (
  PADDING,
  ChatRows,
  MixedRows,
  Rows,
  TextRows,
  make_rows,
  text_bytes,
)
from flaxlm.data.schedule import Schedule
from flaxlm.data.stores import Store, TokenStore, largest_id
from flaxlm.errors import DataError

PREFETCHED_BATCHES = 4
# Of few rows Grain's shuffle takes long to find one: 0.04 ms in 1,024, 39 ms in 2.
FEW_ROWS = 1024


class Batches:
  """The batches of a split, for one process of several: `batches[n]`, `iterate(start)`.

  `cfg.batch_size` counts the rows of all processes. A batch is cut into `num_parts` parts,
  and this process reads `parts` of them. All parts side by side are always the same batch.
  """

  def __init__(
    self,
    store: Store,
    cfg: DataConfig,
    *,
    vocab_size: int,
    seed: int | None = None,
    num_epochs: int | None = 1,
    parts: Sequence[int] = (0,),
    num_parts: int = 1,
    may_lack_ids: bool = False,
  ):
    """With a `seed` each epoch is shuffled in its own way; without, rows stay in order.

    There are `num_epochs` epochs (this is not the config's field); None: they never end.
    The rows of a mixture come from its sources by their weights, each in its own order and
    epochs; it ends where one of them would begin its epoch after the last.
    The last batch is filled up with rows of weight 0.
    Raises `DataError` if the tokenizer has more ids than the model's `vocab_size` (if the
    model `may_lack_ids`, as imported ones do: if the text has one of those) or, when rows
    are shuffled (training), if an epoch is smaller than one batch.
    """
    if store.vocab_size > vocab_size:
      check_ids(store, cfg, vocab_size, may_lack_ids)
    batch_size = cfg.batch_size
    self._rows = make_rows(store, cfg, seed or 0)
    num_rows = self._rows.num_rows
    if seed is not None and num_rows < batch_size:
      raise DataError(
        f"the corpus has {num_rows} rows of data.seq_len={cfg.seq_len} tokens, "
        f"fewer than data.batch_size={batch_size}",
        f"set --data.batch-size={max(1, num_rows)} or less, or add text",
      )
    if batch_size % num_parts:
      raise ValueError(f"batch_size={batch_size} does not divide by {num_parts}")
    self.num_batches: int | None = None
    rows = _order(self._rows, seed, num_epochs)
    if num_epochs is not None:
      self.num_batches = math.ceil(len(rows) / batch_size)
      missing = self.num_batches * batch_size - len(rows)
      rows = grain.MapDataset.concatenate(
        [rows, grain.MapDataset.source([PADDING] * missing)]
      )
    self.store, self.objective = store, cfg.objective
    self._size = batch_size // num_parts
    self._mine, self._num_parts = tuple(parts), num_parts
    self._parts = rows.batch(self._size, drop_remainder=True)
    first = self._parts[self._mine[0] :: num_parts]
    self._dataset = first.map_with_index(self._assemble)

  def __getitem__(self, n: int) -> Batch:
    if n < 0 or (self.num_batches is not None and n >= self.num_batches):
      raise IndexError(n)
    return self._dataset[n]

  @contextlib.contextmanager
  def iterate(self, start: int = 0) -> Iterator[Iterator[Batch]]:
    """`with batches.iterate(n) as it`: batches n, n + 1, ..., read ahead by a thread."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCHED_BATCHES)
    iterator = iter(self._dataset[start:].to_iter_dataset(options))
    try:
      yield iterator
    finally:
      iterator.close()

  @property
  def notes(self) -> list[str]:
    """What happened to text that did not fit into rows."""
    rows = self._rows
    sources = rows.sources if isinstance(rows, MixedRows) else [rows]
    return [note for one in sources if isinstance(one, ChatRows) for note in one.notes]

  def num_bytes(self, num_batches: int, sizes_V: np.ndarray) -> int:
    """The bytes of text that the targets of the first batches, of all processes, stand for.

    `sizes_V` are the bytes of each id. They are not asked for a whole text, whose bytes are
    known: an id may stand for other bytes than its own, as where a tokenizer drops blanks.
    """
    store = self.store
    if self.is_whole_text(num_batches):
      assert isinstance(store, TokenStore)
      return store.num_bytes
    return self.count(num_batches, sizes_V)

  def is_whole_text(self, num_batches: int) -> bool:
    """Whether the first batches are all of a text."""
    return num_batches == self.num_batches and isinstance(self._rows, TextRows)

  def count(self, num_batches: int, sizes_V: np.ndarray) -> int:
    """The sum of `sizes_V` over the targets of the first batches that are text."""
    parts = (self._parts[n] for n in range(num_batches * self._num_parts))
    return sum(text_bytes(self._rows.windows(rows_B), sizes_V) for rows_B in parts)

  def _assemble(self, n: int, first: np.ndarray) -> Batch:
    """This process's parts of batch n; `first` has the rows of the first part."""
    starts = [n * self._num_parts + part for part in self._mine]
    rows = [first, *(self._parts[start] for start in starts[1:])]
    places = [start * self._size + np.arange(self._size) for start in starts]
    return self._rows.batch(np.concatenate(rows), np.concatenate(places))


def check_ids(store: Store, cfg: DataConfig, vocab_size: int, may_lack_ids: bool) -> None:
  """Raises `DataError` for a tokenizer with more ids than the model's `vocab_size`; if the
  model `may_lack_ids`, only for a text that has one of those."""
  cause = f"the tokenizer has {store.vocab_size} ids, the model only {vocab_size}"
  if not may_lack_ids:
    cure = f"set --model.vocab-size={store.vocab_size} or more, or none"
    raise DataError(cause, cure)
  if cfg.objective == "masked":  # any id may replace a masked one
    raise DataError(cause, "begin from a run that has them all")
  if (largest := largest_id(store)) >= vocab_size:
    raise DataError(f"{cause}, and the text has id {largest}", "leave such text out")


def _order(rows: Rows, seed: int | None, num_epochs: int | None) -> grain.MapDataset:
  """The numbers of the rows of all epochs, in the order in which they are read."""
  if not isinstance(rows, MixedRows):
    return _epochs(rows.num_rows, seed, num_epochs)
  schedule = Schedule(rows.weights)
  seeds = [None] * len(rows.sources) if seed is None else _seeds(seed, len(rows.sources))
  orders = [
    order_of_source(source.num_rows, its_seed)
    for source, its_seed in zip(rows.sources, seeds, strict=True)
  ]
  length = None
  if num_epochs is not None:
    ends = [num_epochs * source.num_rows for source in rows.sources]
    length = min(schedule.place_of(source, end) for source, end in enumerate(ends))

  def row(n: int, _: int) -> int:
    source, j = schedule[n]
    return int(rows.starts[source]) + orders[source](j)

  numbers = grain.MapDataset.range(length or 1)
  return (numbers.repeat(None) if length is None else numbers).map_with_index(row)


def order_of_source(num_rows: int, seed: int | None) -> Callable[[int], int]:
  """The row that is read as the j-th of a source, for any j."""
  if seed is None or num_rows >= FEW_ROWS:
    return _epochs(num_rows, seed, None).__getitem__

  @functools.lru_cache(maxsize=2)
  def epoch_R(number: int) -> np.ndarray:
    return np.random.default_rng((seed, number)).permutation(num_rows)

  return lambda j: int(epoch_R(j // num_rows)[j % num_rows])


def _epochs(num_rows: int, seed: int | None, num_epochs: int | None) -> grain.MapDataset:
  rows = grain.MapDataset.range(num_rows)
  if seed is not None:
    rows = rows.seed(seed).shuffle()
  return rows.repeat(num_epochs)


def _seeds(seed: int, number: int) -> list[int]:
  """A seed for each source: two of one length are not shuffled alike."""
  return (np.random.SeedSequence(seed).generate_state(number) >> 1).tolist()
