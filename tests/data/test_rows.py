# SPDX-License-Identifier: Apache-2.0
"""Rows of pairs against a reference that packs one pair after the other."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flaxlm.config import DataConfig
from flaxlm.data.rows import PADDING, PairRows, TextRows
from flaxlm.data.stores import PairStore, TokenStore
from flaxlm.errors import DataError

BOS = 9
Ids = list[int]
Pairs = list[tuple[Ids, Ids]]

TEXTS = st.lists(st.integers(0, BOS), max_size=7)  # a text may hold bos too
PAIRS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=12)
LENGTHS = st.integers(1, 12)


def make_side(texts: list[Ids]) -> TokenStore:
  tokens = np.array([token for ids in texts for token in (BOS, *ids)], np.uint16)
  bounds = np.cumsum([0, *(1 + len(ids) for ids in texts)])
  return TokenStore(tokens, bounds, BOS, 10, len(tokens), None)


def make_rows(pairs: Pairs, source_len: int | None, seq_len: int) -> PairRows:
  store = PairStore(*(make_side(list(side)) for side in zip(*pairs, strict=True)))
  cfg = DataConfig(objective="seq2seq", source_len=source_len, seq_len=seq_len)
  return PairRows(store, cfg)


def reference(pairs: Pairs, source_len: int, seq_len: int) -> list[Pairs]:
  """(source and its end, bos and target) of each pair of each row, long ones cut."""
  rows: list[Pairs] = []
  for source, target in pairs:
    pair = [*source, BOS][:source_len], [BOS, *target][:seq_len]
    row = rows[-1] if rows else []
    taken = [sum(len(other[side]) for other in row) + len(pair[side]) for side in (0, 1)]
    if row and taken[0] <= source_len and taken[1] <= seq_len:
      row.append(pair)
    else:
      rows.append([pair])
  return rows


def texts_of(tokens: np.ndarray, segments: np.ndarray, positions: np.ndarray) -> list[Ids]:
  """What a row holds by its segments, which must be numbered and contiguous."""
  real = segments > 0
  assert real.tolist() == sorted(real.tolist(), reverse=True)  # padding at the end
  assert not tokens[~real].any()
  texts = []
  for number in range(1, segments.max(initial=0) + 1):
    index = np.flatnonzero(segments == number)
    assert index.tolist() == list(range(index[0], index[0] + len(index)))
    assert positions[index].tolist() == list(range(len(index)))
    texts.append(tokens[index].tolist())
  return texts


@settings(max_examples=200)
@given(pairs=PAIRS, source_len=LENGTHS, seq_len=LENGTHS)
def test_rows_hold_the_pairs_that_fit(pairs: Pairs, source_len: int, seq_len: int):
  rows = make_rows(pairs, source_len, seq_len)
  expected = reference(pairs, source_len, seq_len)
  assert rows.num_rows == len(expected)
  numbers = np.array([*range(rows.num_rows), PADDING])
  batch = rows.batch(numbers, numbers)
  assert batch.source_BS is not None
  assert batch.source_positions_BS is not None
  assert batch.source_segments_BS is not None
  assert batch.source_BS.shape == (len(numbers), source_len)
  assert batch.tokens_BT.shape == (len(numbers), seq_len)
  found: list[Pairs] = []
  for b in range(len(numbers)):
    sources = texts_of(
      batch.source_BS[b], batch.source_segments_BS[b], batch.source_positions_BS[b]
    )
    targets = texts_of(batch.tokens_BT[b], batch.segments_BT[b], batch.positions_BT[b])
    found.append(list(zip(sources, targets, strict=True)))
  assert found == [*expected, []]
  assert (batch.weights_BT == (batch.segments_BT > 0)).all()
  # Each target token is followed by the next of its text, the last one by the end.
  ends = iter([[*target, BOS] for _, target in pairs])
  for row, targets_T, segments_T in zip(
    found, batch.targets_BT, batch.segments_BT, strict=True
  ):
    for number in range(1, len(row) + 1):
      assert targets_T[segments_T == number].tolist() == next(ends)[:seq_len]


def test_sources_are_as_long_as_targets_unless_told():
  pairs: Pairs = [([1, 2, 3], [4])] * 4
  assert make_rows(pairs, None, 8).num_rows == 2
  assert make_rows(pairs, 16, 8).num_rows == 1
  assert make_rows(pairs, 16, 7).num_rows == 2


def test_a_text_that_was_cut_has_no_end():
  rows = make_rows([([1, 2, 3], [4]), ([5], [6, 7, 8])], source_len=3, seq_len=3)
  batch = rows.batch(np.array([0, 1]), np.array([0, 1]))
  assert batch.source_BS is not None
  assert batch.source_BS.tolist() == [[1, 2, 3], [5, BOS, 0]]
  assert batch.targets_BT.tolist() == [[4, BOS, 0], [6, 7, 8]]


@pytest.mark.parametrize("side", ["source", "target"])
def test_damaged_pairs(side: str):
  pairs: Pairs = [([1], [2]), ([3], [4]), ([5], [6])]
  store = make_rows(pairs, 8, 8).store
  bounds = getattr(store, side).bounds
  short = dataclasses.replace(getattr(store, side), bounds=np.delete(bounds, 1))
  store = dataclasses.replace(store, **{side: short})
  with pytest.raises(DataError, match="stored pairs are damaged") as error:
    PairRows(store, DataConfig(objective="seq2seq"))
  assert "delete the data directory" in error.value.cure


def test_masking_puts_in_ordinary_ids_only_and_follows_seed_and_place():
  vocab_size, special_ids = 6, (1, 3, BOS)
  tokens = np.tile(np.array([0, 2, 4, 5], np.uint16), 5000)
  bounds = np.array([0, len(tokens)])
  store = TokenStore(tokens, bounds, BOS, 10, len(tokens), None, 3, special_ids)
  store = dataclasses.replace(store, vocab_size=vocab_size)
  cfg = DataConfig(objective="masked", mask_fraction=0.9, seq_len=20)
  rows = np.arange(64)
  batch = TextRows(store, cfg, seed=0).batch(rows, rows)
  assert set(batch.tokens_BT.ravel().tolist()) == {0, 2, 4, 5, 3}
  for seed, places in ((1, rows), (0, rows + 64)):
    other = TextRows(store, cfg, seed).batch(rows, places)
    assert (other.weights_BT != batch.weights_BT).any(1).sum() > 32
  # Each row by itself: which others are in the batch plays no part.
  part = TextRows(store, cfg, seed=0).batch(rows[40:], rows[40:])
  assert np.array_equal(part.tokens_BT, batch.tokens_BT[40:])


def test_masking_needs_a_mask():
  with pytest.raises(DataError, match="has no mask"):
    TextRows(make_side([[1, 2]]), DataConfig(objective="masked"), seed=0)
