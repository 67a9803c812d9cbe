# SPDX-License-Identifier: Apache-2.0
"""Objectives against token-by-token references, and the statistics of masks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flaxlm.data.objectives import Batch, Masking, Windows, masked, next_token, seq2seq

BOS, END = 3, 7


def parts(tokens, lengths) -> Windows:
  """Windows of documents that all begin with bos, which no text holds."""
  tokens = np.asarray(tokens)
  return Windows(tokens, tokens == BOS, np.asarray(lengths))


def reference(window: list[int], length: int) -> list[tuple[int, int, int, int, float]]:
  """(token, target, position, segment, weight) for each place of a row."""
  row = []
  position, segment = 0, 1
  for t in range(len(window) - 1):
    if t > 0 and window[t] == BOS:
      position, segment = 0, segment + 1
    if t + 1 < length:
      row.append((window[t], window[t + 1], position, segment, 1.0))
    else:
      row.append((0, 0, 0, 0, 0.0))
    position += 1
  return row


@given(st.data())
def test_next_token_against_the_reference(data: st.DataObject):
  shape = data.draw(st.tuples(st.integers(1, 4), st.integers(2, 12)))
  windows = data.draw(hnp.arrays(np.uint16, shape, elements=st.integers(0, 4)))
  lengths = data.draw(
    st.lists(st.integers(0, shape[1]), min_size=shape[0], max_size=shape[0])
  )
  batch = next_token(parts(windows, lengths), BOS)
  expected = [reference(w.tolist(), n) for w, n in zip(windows, lengths, strict=True)]
  assert np.stack(batch[:5], axis=-1).tolist() == np.array(expected).tolist()


def test_dtypes_and_an_example():
  window = np.array([[7, 8, 3, 9, 3, 3, 5]], np.uint16)
  batch = next_token(parts(window, [7]), BOS)
  assert [array.dtype.name for array in batch[:5]] == ["int32"] * 4 + ["float32"]
  assert set(batch[5:]) == {None}
  assert batch.tokens_BT.tolist() == [[7, 8, 3, 9, 3, 3]]
  assert batch.targets_BT.tolist() == [[8, 3, 9, 3, 3, 5]]
  assert batch.positions_BT.tolist() == [[0, 1, 0, 1, 0, 0]]
  assert batch.segments_BT.tolist() == [[1, 1, 2, 2, 3, 4]]


def test_documents_begin_where_they_were_joined():
  """An id that begins documents may also stand in their text; what ends them is another."""
  tokens = np.array([[BOS, 5, BOS, 6, BOS, BOS, 4]], np.uint16)
  begins = np.array([[True, False, False, False, True, False, False]])
  batch = next_token(Windows(tokens, begins, np.array([7])), END)
  assert batch.tokens_BT.tolist() == [[BOS, 5, BOS, 6, BOS, BOS]]
  assert batch.targets_BT.tolist() == [[5, BOS, 6, END, BOS, 4]]
  assert batch.positions_BT.tolist() == [[0, 1, 2, 3, 0, 1]]
  assert batch.segments_BT.tolist() == [[1, 1, 1, 1, 2, 2]]


MASK, NUM_IDS = 5, 40


def mask(tokens: np.ndarray, lengths: np.ndarray, fraction: float, seed: int) -> Batch:
  ordinary_ids = np.setdiff1d(np.arange(NUM_IDS), [BOS, MASK])
  random = np.random.default_rng(seed).random((3, *tokens.shape))
  return masked(parts(tokens, lengths), Masking(fraction, MASK, ordinary_ids), random)


@given(st.data())
def test_masked_hides_some_tokens_and_asks_for_them(data: st.DataObject):
  shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 12)))
  ids = st.integers(0, 4)  # no mask among them
  tokens = data.draw(hnp.arrays(np.uint16, shape, elements=ids))
  lengths = data.draw(hnp.arrays(np.int64, shape[0], elements=st.integers(0, shape[1] + 1)))
  fraction = data.draw(st.floats(0.001, 0.999))
  batch = mask(tokens, lengths, fraction, data.draw(st.integers(0, 9)))
  assert [array.dtype.name for array in batch[:5]] == ["int32"] * 4 + ["float32"]
  for b in range(shape[0]):
    text = [t for t in range(min(lengths[b], shape[1])) if tokens[b, t] != BOS]
    chosen = np.flatnonzero(batch.weights_BT[b]).tolist()
    assert set(chosen) <= set(text)
    assert len(chosen) == (max(1, round(fraction * len(text))) if text else 0)
    # Places are next_token's, and what was not chosen stays as it is.
    row = reference([*tokens[b].tolist(), 0], lengths[b] + 1)
    for t, (token, _, position, segment, _) in enumerate(row):
      assert batch.positions_BT[b, t] == position
      assert batch.segments_BT[b, t] == segment
      if t in chosen:
        assert batch.weights_BT[b, t] == 1
        assert batch.targets_BT[b, t] == token
      else:
        assert batch.tokens_BT[b, t] == token
        assert batch.targets_BT[b, t] == 0


def test_no_special_token_is_masked():
  """Also those in a text, as transformers' collator leaves them (special_tokens_mask)."""
  tokens = np.array([[9, MASK, 9, BOS, 9, 9]])
  begins = np.array([[True, False, False, False, False, False]])
  masking = Masking(0.999, MASK, np.array([9, 10]))
  windows = Windows(tokens, begins, np.array([6]))
  batch = masked(windows, masking, np.full((3, *tokens.shape), 0.5))
  assert batch.weights_BT.tolist() == [[0, 0, 1, 0, 1, 1]]
  assert batch.segments_BT.tolist() == [[1] * 6]


def test_eight_in_ten_are_masked_one_is_another_and_one_stays():
  rng = np.random.default_rng(0)
  ordinary_ids = [n for n in range(NUM_IDS) if n not in (BOS, MASK)]
  tokens = rng.choice(ordinary_ids, (400, 500))
  tokens[:, ::50] = BOS
  batch = mask(tokens, np.full(400, 500), 0.15, seed=1)
  chosen = batch.weights_BT == 1
  assert chosen.sum(1).tolist() == [round(0.15 * 490)] * 400
  # Every place is as likely: 400 rows, so 60 times +- 4 of 7.1 standard deviations.
  per_place = chosen.sum(0)[tokens[0] != BOS]
  assert 30 < per_place.min() < 60 < per_place.max() < 92
  tokens_then, tokens_now = tokens[chosen], batch.tokens_BT[chosen]
  stays, hidden = tokens_now == tokens_then, tokens_now == MASK
  others = tokens_now[~stays & ~hidden]
  num = chosen.sum()  # 29,600: a standard deviation of 0.2%
  assert hidden.sum() / num == pytest.approx(0.8, abs=0.01)
  # A random id is now and then the right one.
  assert stays.sum() / num == pytest.approx(0.1 + 0.1 / 38, abs=0.01)
  assert sorted(set(others.tolist())) == ordinary_ids
  counts = np.bincount(others, minlength=NUM_IDS)[ordinary_ids]
  assert 0.5 < counts.min() / counts.mean() < counts.max() / counts.mean() < 1.6
  # Which way a token goes has nothing to do with where it is.
  assert hidden[: num // 2].mean() == pytest.approx(hidden[num // 2 :].mean(), abs=0.02)


def test_seq2seq_by_an_example():
  # Two pairs (7 8 -> 9), (6 -> 4 2) in one row, and a row of padding.
  sources = np.array([[BOS, 7, 8, BOS, 6, BOS, 1], [BOS] * 7]), np.array([6, 0])
  targets = np.array([[BOS, 9, BOS, 4, 2, BOS, 1], [BOS] * 7]), np.array([6, 0])
  batch = seq2seq(parts(*sources), parts(*targets), BOS)
  padding = [0] * 6
  assert batch.tokens_BT.tolist() == [[BOS, 9, BOS, 4, 2, 0], padding]
  assert batch.targets_BT.tolist() == [[9, BOS, 4, 2, BOS, 0], padding]
  assert batch.positions_BT.tolist() == [[0, 1, 0, 1, 2, 0], padding]
  assert batch.segments_BT.tolist() == [[1, 1, 2, 2, 2, 0], padding]
  assert batch.weights_BT.tolist() == [[1, 1, 1, 1, 1, 0], padding]
  for source, expected in (
    (batch.source_BS, [7, 8, BOS, 6, BOS, 0]),
    (batch.source_positions_BS, [0, 1, 2, 0, 1, 0]),
    (batch.source_segments_BS, [1, 1, 1, 2, 2, 0]),
  ):
    assert source is not None
    assert source.dtype == np.int32
    assert source.tolist() == [expected, padding]
