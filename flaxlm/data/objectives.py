# SPDX-License-Identifier: Apache-2.0
"""What is predicted from what: makes batches of arrays from windows of tokens."""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
  """One step's rows, int32 but for the float32 weights; jax sees it as a pytree.

  A row may hold (parts of) several documents. `segments_BT` numbers them from 1, and is
  0 on padding; `positions_BT` starts again at 0 in each. Without segments every row is
  one document without padding, and kernels need no mask. A token counts in the loss by its
  weight, which is 0 on padding. Only seq2seq has sources: the source and the target
  of a pair have the same number in their segments. Only rewards have advantages: by how
  much more than the others of its group a completion was worth.
  """

  tokens_BT: np.ndarray
  targets_BT: np.ndarray
  positions_BT: np.ndarray
  segments_BT: np.ndarray | None
  weights_BT: np.ndarray
  source_BS: np.ndarray | None = None
  source_positions_BS: np.ndarray | None = None
  source_segments_BS: np.ndarray | None = None
  advantages_BT: np.ndarray | None = None


class Windows(NamedTuple):
  """Parts of a text, one in each row."""

  tokens_BX: np.ndarray
  begins_BX: np.ndarray  # whether a document begins with this token
  lengths_B: np.ndarray  # what comes after so many tokens is padding
  weights_BX: np.ndarray | None = None  # of conversations: what each token counts


class Masking(NamedTuple):
  """The settings of `masked`."""

  fraction: float  # the share of tokens to predict
  mask_id: int
  ordinary_ids: np.ndarray  # all ids but the special ones


def next_token(windows: Windows, end_id: int) -> Batch:
  """Each token predicts the next; the last one of a document predicts `end_id`.

  `windows` are of T + 1 tokens.
  """
  tokens_BT, targets_BT = windows.tokens_BX[:, :-1], windows.tokens_BX[:, 1:]
  real_BT = _real(windows)[:, 1:]
  positions_BT, segments_BT = _places(windows.begins_BX[:, :-1], real_BT)
  # What begins a document stands for the end of the one before.
  targets_BT = np.where(windows.begins_BX[:, 1:], end_id, targets_BT)
  return Batch(
    tokens_BT=np.where(real_BT, tokens_BT, 0).astype(np.int32),
    targets_BT=np.where(real_BT, targets_BT, 0).astype(np.int32),
    positions_BT=positions_BT,
    segments_BT=segments_BT,
    weights_BT=real_BT.astype(np.float32),
  )


def answers(windows: Windows, end_id: int) -> Batch:
  """Each token predicts the next one of its conversation, which counts by its weight.

  `windows` are of T + 1 tokens, and have weights.
  """
  assert windows.weights_BX is not None
  batch = next_token(windows, end_id)
  weights_BT = np.where(windows.begins_BX, 0, windows.weights_BX)[:, 1:]
  return batch._replace(weights_BT=batch.weights_BT * weights_BT.astype(np.float32))


def masked(windows: Windows, masking: Masking, random_3BT: np.ndarray) -> Batch:
  """Some tokens are hidden and predicted from all others (Devlin et al., 2019, 3.1).

  The same share of each row, but at least one token, is predicted. 80% of these become the
  mask, 10% a random id, and 10% stay, so that the model never knows whether a token that it
  sees is right. Special tokens are never predicted, nor is what begins a document.
  `random_3BT`, uniform in [0, 1), decides it all. `windows` are of T tokens.
  """
  tokens_BT, begins_BT, *_ = windows
  real_BT = _real(windows)
  positions_BT, segments_BT = _places(begins_BT, real_BT)
  text_BT = real_BT & ~begins_BT & np.isin(tokens_BT, masking.ordinary_ids)
  num_text_B = text_BT.sum(1)
  num_chosen_B = np.maximum(np.rint(masking.fraction * num_text_B), num_text_B > 0)
  choice_BT, way_BT, other_BT = random_3BT
  rank_BT = np.where(text_BT, choice_BT, 1.0).argsort(1).argsort(1)
  chosen_BT = text_BT & (rank_BT < num_chosen_B[:, None])
  other_BT = masking.ordinary_ids[(other_BT * len(masking.ordinary_ids)).astype(int)]
  hidden_BT = np.where(way_BT < 0.8, masking.mask_id, other_BT)
  hidden_BT = np.where(chosen_BT & (way_BT < 0.9), hidden_BT, tokens_BT)
  return Batch(
    tokens_BT=np.where(real_BT, hidden_BT, 0).astype(np.int32),
    targets_BT=np.where(chosen_BT, tokens_BT, 0).astype(np.int32),
    positions_BT=positions_BT,
    segments_BT=segments_BT,
    weights_BT=chosen_BT.astype(np.float32),
  )


def seq2seq(source: Windows, target: Windows, end_id: int) -> Batch:
  """Each target is predicted from its source, token by token from bos to the end.

  The windows are of S + 1 and of T + 1 tokens, and hold the same pairs in the same order,
  each text after its bos. In the batch a source has no bos before it, but its end.
  """
  read, written = next_token(source, end_id), next_token(target, end_id)
  return written._replace(
    source_BS=read.targets_BT,
    source_positions_BS=read.positions_BT,
    source_segments_BS=read.segments_BT,
  )


def _real(windows: Windows) -> np.ndarray:
  return np.arange(windows.tokens_BX.shape[1]) < windows.lengths_B[:, None]


def _places(begins_BT: np.ndarray, real_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(positions, segments) of tokens; a row begins anew even within a document."""
  index_T = np.arange(begins_BT.shape[1], dtype=np.int32)
  starts_BT = begins_BT.copy()
  starts_BT[:, :1] = True
  start_of_BT = np.maximum.accumulate(np.where(starts_BT, index_T, 0), axis=1)
  positions_BT = np.where(real_BT, index_T - start_of_BT, 0).astype(np.int32)
  segments_BT = np.where(real_BT, np.cumsum(starts_BT, axis=1), 0).astype(np.int32)
  return positions_BT, segments_BT
