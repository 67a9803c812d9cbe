# SPDX-License-Identifier: Apache-2.0
"""Rows of conversations against a reference that packs one after the other."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flaxlm.config import DataConfig
from flaxlm.data.rows import PADDING, ChatRows, text_bytes
from flaxlm.data.stores import TokenStore
from flaxlm.errors import DataError

Talk = list[tuple[int, int]]  # (token, weight) of a conversation

# The first token has no weight, and some other has one: as they are stored.
TALKS = st.lists(
  st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1)), min_size=2, max_size=9)
  .map(lambda talk: [(talk[0][0], 0), *talk[1:]])
  .filter(lambda talk: any(weight for _, weight in talk)),
  min_size=1,
  max_size=12,
)


def make_store(talks: list[Talk]) -> TokenStore:
  tokens, weights = np.array([pair for talk in talks for pair in talk]).T
  bounds = np.cumsum([0, *map(len, talks)])
  store = (tokens.astype(np.uint16), bounds, 9, 10, len(tokens), None)
  return TokenStore(*store, weights=weights.astype(np.uint8))


def reference(talks: list[Talk], width: int) -> tuple[list[list[Talk]], int, int]:
  """The conversations of each row, and how many were cut and dropped."""
  rows: list[list[Talk]] = []
  num_cut = num_dropped = 0
  full = True
  for talk in talks:
    if len(talk) > width:
      full = True
      if any(weight for _, weight in talk[:width]):
        num_cut += 1
        rows.append([talk[:width]])
      else:
        num_dropped += 1
      continue
    if full or sum(map(len, rows[-1])) + len(talk) > width:
      rows.append([])
    rows[-1].append(talk)
    full = False
  return rows, num_cut, num_dropped


def predicted(talk: Talk) -> list[tuple[tuple[int, ...], int]]:
  """What each weighted token of a conversation is predicted from, and the token."""
  ids = [token for token, _ in talk]
  return [(tuple(ids[:n]), ids[n]) for n, (_, weight) in enumerate(talk) if weight]


@settings(max_examples=50)
@given(TALKS, st.integers(1, 12))
def test_rows_hold_the_conversations_that_fit(talks: list[Talk], seq_len: int):
  """Each answer's tokens are predicted once, from their own conversation alone."""
  expected, num_cut, num_dropped = reference(talks, seq_len + 1)
  cfg = DataConfig(objective="chat", seq_len=seq_len)
  if not expected:
    with pytest.raises(DataError, match=f"first {seq_len + 1} tokens"):
      ChatRows(make_store(talks), cfg)
    return
  rows = ChatRows(make_store(talks), cfg)
  assert (rows.num_rows, rows.num_cut, rows.num_dropped) == (
    len(expected),
    num_cut,
    num_dropped,
  )
  numbers = np.array([*range(rows.num_rows), PADDING])
  batch = rows.batch(numbers, numbers)
  for row, talks_of_row in enumerate([*expected, []]):
    found = []
    for t in np.flatnonzero(batch.weights_BT[row]):
      assert batch.weights_BT[row, t] == 1
      segment = batch.segments_BT[row, t]
      seen = np.flatnonzero(batch.segments_BT[row, : t + 1] == segment)
      assert batch.positions_BT[row, seen].tolist() == list(range(len(seen)))
      found.append((tuple(batch.tokens_BT[row, seen]), batch.targets_BT[row, t]))
    assert segment_is_real(batch, row)
    assert found == [pair for talk in talks_of_row for pair in predicted(talk)]
  sizes = np.arange(10, dtype=np.int32)
  num_bytes = sum(id_ for row in expected for talk in row for _, id_ in predicted(talk))
  assert text_bytes(rows.windows(numbers), sizes) == num_bytes


def segment_is_real(batch, row: int) -> bool:
  """Weights, positions and tokens are 0 on padding."""
  padding = batch.segments_BT[row] == 0
  return not any(x[row][padding].any() for x in batch if x is not None)


def test_what_is_cut_and_dropped_is_said():
  late = [(1, 0)] * 8 + [(2, 1)]
  talks = [[(1, 0), (2, 1)], late, [(1, 0), (2, 1)] * 4, late]
  rows = ChatRows(make_store(talks), DataConfig(objective="chat", seq_len=4))
  assert rows.notes == [
    "conversations of more than 5 tokens: 1 cut at their end, "
    "2 dropped, for no answer begins before that"
  ]
  assert not ChatRows(make_store(talks), DataConfig(objective="chat", seq_len=8)).notes
