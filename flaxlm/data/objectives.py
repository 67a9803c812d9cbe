# SPDX-License-Identifier: Apache-2.0
"""What is predicted from what: windows of tokens become batches of arrays."""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
  """One step's rows, int32 but for the float32 weights; jax sees it as a pytree.

  A row may hold (parts of) several documents. `segments_BT` numbers them from 1, and is
  0 on padding; `positions_BT` starts again at 0 in each. A token counts in the loss by
  its weight, which is 0 on padding. Only seq2seq has sources: the source and the target
  of a pair have the same number in their segments.
  """

  tokens_BT: np.ndarray
  targets_BT: np.ndarray
  positions_BT: np.ndarray
  segments_BT: np.ndarray
  weights_BT: np.ndarray
  source_BS: np.ndarray | None = None
  source_positions_BS: np.ndarray | None = None
  source_segments_BS: np.ndarray | None = None


class Masking(NamedTuple):
  """What `masked` needs to know besides the text."""

  fraction: float  # of the tokens to be predicted
  mask_id: int
  ordinary_ids: np.ndarray  # all ids but the special ones


def next_token(windows: np.ndarray, lengths_B: np.ndarray, bos_id: int) -> Batch:
  """Each token predicts the next, a document's last one the next document's bos.

  `windows` is (B, T + 1) ids, of which row b has lengths_B[b]; the rest is padding.
  """
  tokens_BT, targets_BT = windows[:, :-1], windows[:, 1:]
  real_BT = np.arange(tokens_BT.shape[1]) < lengths_B[:, None] - 1
  positions_BT, segments_BT = _places(tokens_BT, real_BT, bos_id)
  return Batch(
    tokens_BT=np.where(real_BT, tokens_BT, 0).astype(np.int32),
    targets_BT=np.where(real_BT, targets_BT, 0).astype(np.int32),
    positions_BT=positions_BT,
    segments_BT=segments_BT,
    weights_BT=real_BT.astype(np.float32),
  )


def masked(
  tokens_BT: np.ndarray,
  lengths_B: np.ndarray,
  bos_id: int,
  masking: Masking,
  random_3BT: np.ndarray,
) -> Batch:
  """Some tokens are hidden, and predicted from all others (Devlin et al., 2019, 3.1).

  Of the tokens to be predicted, the same share of each row and at least one, 80% become
  the mask, 10% another id at random, and 10% stay: the model cannot know that a token is
  right. bos is never among them. `random_3BT`, uniform in [0, 1), decides all of it.
  """
  real_BT = np.arange(tokens_BT.shape[1]) < lengths_B[:, None]
  positions_BT, segments_BT = _places(tokens_BT, real_BT, bos_id)
  text_BT = real_BT & (tokens_BT != bos_id)
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


def seq2seq(
  sources: tuple[np.ndarray, np.ndarray],
  targets: tuple[np.ndarray, np.ndarray],
  bos_id: int,
) -> Batch:
  """Each target, token by token from bos to its end, is predicted from its source.

  Both are windows and their lengths as `next_token` takes them, (B, S + 1) and
  (B, T + 1), and hold the same pairs in the same order, each text after its bos. A
  source is given without bos but with its end, which is the bos that follows.
  """
  source, target = next_token(*sources, bos_id), next_token(*targets, bos_id)
  return target._replace(
    source_BS=source.targets_BT,
    source_positions_BS=source.positions_BT,
    source_segments_BS=source.segments_BT,
  )


def _places(
  tokens_BT: np.ndarray, real_BT: np.ndarray, bos_id: int
) -> tuple[np.ndarray, np.ndarray]:
  """(positions, segments) of the documents, each of which begins with bos."""
  index_T = np.arange(tokens_BT.shape[1], dtype=np.int32)
  starts_BT = tokens_BT == bos_id
  starts_BT[:, :1] = True
  start_of_BT = np.maximum.accumulate(np.where(starts_BT, index_T, 0), axis=1)
  positions_BT = np.where(real_BT, index_T - start_of_BT, 0).astype(np.int32)
  segments_BT = np.where(real_BT, np.cumsum(starts_BT, axis=1), 0).astype(np.int32)
  return positions_BT, segments_BT
