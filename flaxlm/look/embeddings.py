# SPDX-License-Identifier: Apache-2.0
"""The embedding table as a map, before training and after it, and each token's neighbours.

A few tokens have vectors several times as long as the others, and all share a direction, so
that the raw table is a blob along one axis. The map is of directions: each vector minus the
mean, at length 1 (Mu and Viswanath, 2018, take away more).
"""

from typing import Any

import flax.linen as nn
import jax
import numpy as np

from flaxlm.decoding.loading import Run, load_params
from flaxlm.errors import CheckpointError, ConfigError
from flaxlm.look.pieces import describe, sort_of
from flaxlm.look.tsne import PERPLEXITY, tsne
from flaxlm.look.view import View
from flaxlm.nn.models import abstract_params, build_model, init_params
from flaxlm.origin import located, read_origin

MOST_TOKENS = 4096
MOST_ON_PLANE = 1024  # t-SNE compares all pairs: this takes a few seconds on two cores
NUM_NEAREST = 10
ROWS_AT_A_TIME = 1024


def look_embeddings(run: Run, num_tokens: int | None = None) -> View:
  """The first `num_tokens` ids as a map; in a BPE these are the most frequent ones."""
  size = run.tokenizer.vocab_size
  if num_tokens is not None and num_tokens > size:
    raise ConfigError(f"tokens is {num_tokens}", f"the tokenizer has {size}")
  count = min(num_tokens or MOST_TOKENS, size, run.model.cfg.num_ids)
  table_ND = embedding_table(run.params)[:count].astype(np.float64)
  before_ND, told = table_before(run)
  after = to_layouts(table_ND)
  moments = [{"name": f"after training, at step {run.step:,}"} | after]
  if before_ND is not None:
    moments.append({"name": told} | to_layouts(before_ND[:count].astype(np.float64)))
  norms_N = np.linalg.norm(table_ND, axis=1)
  cuts = []
  if count < size:
    cuts.append(f"The first {count:,} of {size:,} ids (--tokens), and neighbours of these.")
  on_plane = len(after["plane"])
  notes = [
    f"{run.path} at step {run.step}, model.family={run.cfg.model.family}",
    f"Each token is a vector of {table_ND.shape[1]} numbers. The maps are of directions: "
    "the mean is taken away, and each vector has length 1. Neighbourhoods are t-SNE's "
    f"(perplexity {PERPLEXITY:g}) of the first {on_plane:,} ids: who is near whom means "
    "something, distances between groups do not. The turning map has the three directions "
    "of most variance, each scaled to variance 1. The neighbours are listed by the cosine "
    "of whole vectors.",
  ]
  if before_ND is None:
    notes.append(told)
  figures = {
    "num_tokens": count,
    "width": table_ND.shape[1],
    "explained": after["explained"][:2],
    "mean_norm": float(norms_N.mean()),
  }
  data = {
    "tokens": [
      piece._asdict() | {"sort": sort_of(run.tokenizer, piece.id)}
      for piece in describe(run.tokenizer, range(count))
    ],
    "points": after["solid"][:, :2],  # of the PNG
    "moments": moments,
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


def table_before(run: Run) -> tuple[np.ndarray | None, str]:
  """The table with which training began, and what that was; None, and why, if it is not to
  be had.

  A run that began from another has that one's; others are made again from their seed, as
  training made them.
  """
  if read_origin(run.path) is not None:
    try:
      origin = located(run.path, "began from")
    except CheckpointError as e:
      return None, f"The table before training is not shown: {e}"
    params = load_params(origin, abstract_params(run.model, run.mesh), run.mesh)
    name = f"before, as {origin.path.name} had it at step {origin.step:,}"
    return embedding_table(params), name
  if run.step == 0:
    return None, "The table before training is not known: the run was imported."
  model = build_model(run.cfg.model)
  first = lambda seed: nn.unbox(init_params(model, seed))["embedding"]["table"]
  table_VD = jax.jit(first)(np.uint32(run.cfg.seed))
  return np.asarray(table_VD), f"before training, from seed {run.cfg.seed}"


def to_layouts(table_ND: np.ndarray) -> dict[str, Any]:
  """One table's maps, and its neighbours: `plane` (M, 2), `solid` (N, 3), `explained` (3),
  `norms` (N), `nearest` and `cosines` (N, C)."""
  directions_ND = to_directions(table_ND)
  points_N3, shares_3 = principal(directions_ND, 3)
  nearest_NC, cosines_NC = nearest(table_ND)
  return {
    "plane": tsne(directions_ND[:MOST_ON_PLANE]),
    "solid": points_N3 / np.maximum(points_N3.std(0), 1e-30),
    "explained": shares_3.tolist(),
    "norms": np.linalg.norm(table_ND, axis=1),
    "nearest": nearest_NC.tolist(),
    "cosines": cosines_NC,
  }


def to_directions(table_ND: np.ndarray) -> np.ndarray:
  """Each row minus the mean of all, at length 1; a row that is the mean stays 0."""
  centred_ND = table_ND - table_ND.mean(0)
  norms_N1 = np.linalg.norm(centred_ND, axis=1, keepdims=True)
  return centred_ND / np.maximum(norms_N1, 1e-30)


def principal(table_ND: np.ndarray, count: int = 2) -> tuple[np.ndarray, np.ndarray]:
  """Each row along the directions of the largest variance, (N, count), and their shares."""
  centred_ND = table_ND - table_ND.mean(0)
  # This D x D matrix has the right singular vectors of the table, and its size is fixed.
  _, squares_D, directions_DD = np.linalg.svd(centred_ND.T @ centred_ND, hermitian=True)
  points_NC = centred_ND @ directions_DD[:count].T
  shares_C = squares_D[:count] / max(squares_D.sum(), 1e-300)
  missing = count - len(shares_C)  # a narrow table has fewer directions
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
