# SPDX-License-Identifier: Apache-2.0
"""What is predicted from what: windows of tokens become batches of arrays."""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
  """One step's rows, int32 but for the float32 weights; jax sees it as a pytree.

  A row may hold (parts of) several documents. `segments_BT` numbers them from 1, and is
  0 on padding; `positions_BT` starts again at 0 in each. A token counts in the loss by
  its weight, which is 0 on padding.
  """

  tokens_BT: np.ndarray
  targets_BT: np.ndarray
  positions_BT: np.ndarray
  segments_BT: np.ndarray
  weights_BT: np.ndarray
  # seq2seq: what is read, each document with the number of its target.
  source_BS: np.ndarray | None = None
  source_positions_BS: np.ndarray | None = None
  source_segments_BS: np.ndarray | None = None


def next_token(windows: np.ndarray, lengths_B: np.ndarray, bos_id: int) -> Batch:
  """Each token predicts the next, a document's last one the next document's bos.

  `windows` is (B, T + 1) ids, of which row b has lengths_B[b]; the rest is padding.
  """
  tokens_BT, targets_BT = windows[:, :-1], windows[:, 1:]
  index_T = np.arange(tokens_BT.shape[1], dtype=np.int32)
  real_BT = index_T < lengths_B[:, None] - 1
  starts_BT = tokens_BT == bos_id
  starts_BT[:, :1] = True
  start_of_BT = np.maximum.accumulate(np.where(starts_BT, index_T, 0), axis=1)
  return Batch(
    tokens_BT=np.where(real_BT, tokens_BT, 0).astype(np.int32),
    targets_BT=np.where(real_BT, targets_BT, 0).astype(np.int32),
    positions_BT=np.where(real_BT, index_T - start_of_BT, 0).astype(np.int32),
    segments_BT=np.where(real_BT, np.cumsum(starts_BT, axis=1), 0).astype(np.int32),
    weights_BT=real_BT.astype(np.float32),
  )
