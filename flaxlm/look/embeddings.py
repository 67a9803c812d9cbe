# SPDX-License-Identifier: Apache-2.0
"""The embedding table as a map: two principal directions, and each token's neighbours."""

from typing import Any

import numpy as np

from flaxlm.decoding.loading import Run
from flaxlm.errors import ConfigError
from flaxlm.look.pieces import describe, sort_of
from flaxlm.look.view import View

MOST_TOKENS = 4096
NUM_NEAREST = 10
ROWS_AT_A_TIME = 1024


def look_embeddings(run: Run, num_tokens: int | None = None) -> View:
  """The first `num_tokens` ids on a plane; in a BPE these are the most frequent ones."""
  size = run.tokenizer.vocab_size
  if num_tokens is not None and num_tokens > size:
    raise ConfigError(f"tokens is {num_tokens}", f"the tokenizer has {size}")
  count = min(num_tokens or MOST_TOKENS, size, run.model.cfg.num_ids)
  table_ND = embedding_table(run.params)[:count].astype(np.float64)
  points_NC, explained_C = principal(table_ND)
  nearest_NC, cosines_NC = nearest(table_ND)
  norms_N = np.linalg.norm(table_ND, axis=1)
  cuts = []
  if count < size:
    cuts.append(f"The first {count:,} of {size:,} ids (--tokens), and neighbours of these.")
  x, y = (f"{share:.1%}" for share in explained_C)
  notes = [
    f"{run.path} at step {run.step}, model.family={run.cfg.model.family}",
    f"Each token is a vector of {table_ND.shape[1]} numbers; the horizontal axis has {x} "
    f"of their variance, the vertical axis {y}. Tokens that are near here may be far apart "
    "in the other directions: the neighbours are listed by the cosine of whole vectors.",
  ]
  figures = {
    "num_tokens": count,
    "width": table_ND.shape[1],
    "explained": explained_C.tolist(),
    "mean_norm": float(norms_N.mean()),
  }
  data = {
    "tokens": [
      piece._asdict() | {"sort": sort_of(run.tokenizer, piece.id)}
      for piece in describe(run.tokenizer, range(count))
    ],
    "points": points_NC,
    "norms": norms_N,
    "nearest": nearest_NC.tolist(),
    "cosines": cosines_NC,
  }
  title = f"The embedding table of {run.cfg.name}"
  return View("embeddings", title, cuts, notes, figures, data)


def embedding_table(params: Any) -> np.ndarray:
  """Each id's vector, (V, D) in float32, also of parameters that are laid out for decoding
  (decoding/weights.py)."""
  embedding = params["embedding"]
  if "table" in embedding:
    return np.asarray(embedding["table"]).astype(np.float32)
  scales_V = np.asarray(embedding.get("scale", 1.0), np.float32)
  return np.asarray(embedding["matrix"]).astype(np.float32) * scales_V[..., None]


def principal(table_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Each row along the two directions of the largest variance, (N, 2), and their shares."""
  centred_ND = table_ND - table_ND.mean(0)
  # This D x D matrix has the right singular vectors of the table, and its size is fixed.
  _, squares_D, directions_DD = np.linalg.svd(centred_ND.T @ centred_ND, hermitian=True)
  points_NC = centred_ND @ directions_DD[:2].T
  shares_C = squares_D[:2] / max(squares_D.sum(), 1e-300)
  missing = 2 - len(shares_C)  # a table of width 1 has one direction
  return np.pad(points_NC, ((0, 0), (0, missing))), np.pad(shares_C, (0, missing))


def nearest(
  table_ND: np.ndarray, rows_R: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """The rows nearest to each of `rows_R` (default: to all) by cosine, without itself, and
  the cosines; best first."""
  N = len(table_ND)
  rows_R = np.arange(N) if rows_R is None else rows_R
  count = min(NUM_NEAREST, N - 1)
  norms_N1 = np.linalg.norm(table_ND, axis=1, keepdims=True)
  units_ND = table_ND / np.maximum(norms_N1, 1e-30)
  ids_RC = np.zeros((len(rows_R), count), np.int64)
  cosines_RC = np.zeros((len(rows_R), count))
  for start in range(0, len(rows_R), ROWS_AT_A_TIME):
    rows = slice(start, start + ROWS_AT_A_TIME)
    cosines_XN = units_ND[rows_R[rows]] @ units_ND.T
    cosines_XN[np.arange(len(cosines_XN)), rows_R[rows]] = -np.inf
    some_XC = np.argpartition(-cosines_XN, count - 1, -1)[:, :count]
    of_some_XC = np.take_along_axis(cosines_XN, some_XC, -1)
    order_XC = np.argsort(-of_some_XC, -1)
    ids_RC[rows] = np.take_along_axis(some_XC, order_XC, -1)
    cosines_RC[rows] = np.clip(np.take_along_axis(of_some_XC, order_XC, -1), -1, 1)
  return ids_RC, cosines_RC
