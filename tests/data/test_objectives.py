# SPDX-License-Identifier: Apache-2.0
"""next_token against a reference that goes token by token."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flaxlm.data.objectives import next_token

BOS = 3


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


@settings(deadline=None)
@given(st.data())
def test_next_token_against_the_reference(data: st.DataObject):
  shape = data.draw(st.tuples(st.integers(1, 4), st.integers(2, 12)))
  windows = data.draw(hnp.arrays(np.uint16, shape, elements=st.integers(0, 4)))
  lengths = data.draw(
    st.lists(st.integers(0, shape[1]), min_size=shape[0], max_size=shape[0])
  )
  batch = next_token(windows, np.array(lengths), BOS)
  expected = [reference(w.tolist(), n) for w, n in zip(windows, lengths, strict=True)]
  assert np.stack(batch, axis=-1).tolist() == np.array(expected).tolist()


def test_dtypes_and_an_example():
  batch = next_token(np.array([[7, 8, 3, 9, 3, 3, 5]], np.uint16), np.array([7]), BOS)
  assert [array.dtype.name for array in batch] == ["int32"] * 4 + ["float32"]
  assert batch.tokens_BT.tolist() == [[7, 8, 3, 9, 3, 3]]
  assert batch.targets_BT.tolist() == [[8, 3, 9, 3, 3, 5]]
  assert batch.positions_BT.tolist() == [[0, 1, 0, 1, 0, 0]]
  assert batch.segments_BT.tolist() == [[1, 1, 2, 2, 3, 4]]
