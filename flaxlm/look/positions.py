# SPDX-License-Identifier: Apache-2.0
"""What a model's positional encoding does: added vectors, rotations, or biases of scores.

Everything is computed by the functions that the model itself calls.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.config import ResolvedModel
from flaxlm.errors import ConfigError
from flaxlm.look.view import View, heat_map, line_chart, shown
from flaxlm.nn.layers import Embedding
from flaxlm.nn.positions import (
  alibi_bias,
  alibi_slopes,
  inverse_wavelengths,
  relative_buckets,
  rotate,
  rotation,
  sinusoids,
)

MOST_ROWS = 256  # positions of a heat map
MOST_POINTS = 512  # distances of a curve
MOST_CURVES = 16  # heads in one chart of curves; more make a heat map
Part = tuple[dict[str, Any], list[dict[str, Any]]]  # figures, and charts
TURNED, UNSTRETCHED = "as the model rotates", "before stretching"

SAYS = {
  "rope": "Each pair of dims of queries and keys is rotated by an angle that grows with "
  "the position, so that it matters to a score only how far apart two tokens are, not "
  "where they stand (Su et al., 2021).",
  "learned": "A trained vector for each position is added to the embedded token.",
  "sinusoidal": "A fixed vector of sines and cosines for each position is added to the "
  "embedded token (Vaswani et al., 2017).",
  "alibi": "Each head subtracts its slope times the distance from its scores "
  "(Press et al., 2022).",
  "relative": "Each head adds a trained number to its scores, one for each bucket of "
  "distances (Raffel et al., 2020).",
  "none": "The model has no positions (model.positions=none): only the causal mask tells "
  "it about the order of tokens.",
}


def check_positions(cfg: ResolvedModel) -> None:
  """Raises `ConfigError` for a family that has no positions."""
  if cfg.family == "rnn":
    raise ConfigError(
      "model.family=rnn has no positions: it reads one token after the other",
      "look at a decoder, encoder or encoder_decoder",
    )


def look_positions(
  cfg: ResolvedModel, name: str, origin: str, params: Any | None = None
) -> View:
  """The positions of a model; without `params`, trained ones as they are initialised."""
  check_positions(cfg)
  notes = [f"{origin}, model.positions={cfg.positions}", SAYS[cfg.positions]]
  if cfg.positions in ("learned", "relative") and params is None:
    notes.append(
      "Untrained: the picture shows noise. Give a run to see what it has learnt."
    )
  charts: list[dict[str, Any]] = []
  figures: dict[str, Any] = {"positions": cfg.positions}

  def add(key: str, part: Part, what: str = "") -> None:
    """Keeps the figures of one stack or kind of layer, and names it in its titles."""
    figures[key], drawn = part
    charts.extend(c | {"title": c["title"] + (f" ({what})" if what else "")} for c in drawn)

  stacks = ["encoder", "decoder"] if cfg.family == "encoder_decoder" else [""]
  positions = shown(cfg.context, MOST_ROWS)
  if cfg.positions == "rope":
    kinds = {"L": "local layers", "G": "global layers"}
    for kind in sorted(set(cfg.period)):
      add(kind, rope_part(cfg, kind), kinds[kind] if len(set(cfg.period)) > 1 else "")
  elif cfg.positions == "alibi":
    own, charts = alibi_part(cfg)
    figures |= own
  elif cfg.positions == "relative":
    for stack in stacks:
      shape = (cfg.relative_buckets, cfg.num_heads)
      table = table_of(params, stack, "relative_bias", shape)
      causal = cfg.family != "encoder" and stack != "encoder"
      add(stack, relative_part(cfg, causal, table), stack)
  elif cfg.positions == "sinusoidal":
    table_TD = np.asarray(sinusoids(jnp.asarray(positions)[None], cfg.width))[0]
    own, charts = vectors_part(positions, table_TD)
    figures |= own
  elif cfg.positions == "learned":
    for stack in stacks:
      table_TD = table_of(params, stack, "positions", (cfg.context, cfg.width))
      add(stack or "table", vectors_part(positions, table_TD[positions]), stack)
  return View("positions", f"Positions of {name}", [], notes, figures, {"charts": charts})


def spread(most: int) -> np.ndarray:
  """Distances from 0 to `most`: all of the short ones, and fewer of the long ones."""
  if most < MOST_POINTS:
    return np.arange(most + 1, dtype=np.int32)
  near = np.arange(MOST_POINTS // 4)
  far = np.geomspace(MOST_POINTS // 4, most, 3 * MOST_POINTS // 4)
  return np.unique(np.concatenate([near, far]).round().astype(np.int32))


# -- Rotations -----------------------------------------------------------------------------


def rope_part(cfg: ResolvedModel, kind: str) -> Part:
  """The wavelength of each pair, its angle at each position, and how a score fades."""
  rope, local = cfg.rope, kind == "L"
  own_theta = local and rope.local_theta is not None
  theta = rope.local_theta if own_theta else rope.theta
  assert theta is not None
  stretched = rope.scaling != "none" and not own_theta
  cos_sin = lambda at: rotation(jnp.asarray(at)[None], cfg.head_dim, rope, local)

  # The angle at position 1, by the model's own function, is the speed in radians.
  cos_P, sin_P = (np.asarray(part)[0, 0] for part in cos_sin([1]))
  speeds_P = np.arctan2(sin_P, cos_P).astype(np.float64)
  pairs = [*range(len(speeds_P))]
  figures: dict[str, Any] = {"theta": theta, "head_dim": cfg.head_dim}
  figures["rotated_dims"] = 2 * len(pairs)
  if not pairs:
    return figures, []
  wavelengths_P = 2 * np.pi / np.maximum(speeds_P, 1e-300)
  turns = [{"name": TURNED, "x": pairs, "y": wavelengths_P}]
  positions_T = shown(min(cfg.context, 4 * MOST_ROWS), MOST_ROWS)
  # YaRN scales cosines and sines, and with them the scores: no part of the angle.
  scale = float(np.hypot(cos_P[0], sin_P[0]))
  cosines_TP = np.clip(np.asarray(cos_sin(positions_T)[0])[0] / max(scale, 1e-30), -1, 1)
  distances_T = spread(cfg.context - 1)
  at = distances_T.tolist()
  scores_T = fade(cos_sin(distances_T), cos_sin([0]))
  scores = [{"name": TURNED, "x": at, "y": scores_T}]
  marks = []
  if stretched:
    plain_P = np.array(inverse_wavelengths(2 * len(pairs), theta))
    turns.append({"name": UNSTRETCHED, "x": pairs, "y": 2 * np.pi / plain_P})
    angles_TP = distances_T[:, None] * plain_P
    before_T = fade((np.cos(angles_TP)[None], np.sin(angles_TP)[None]), cos_sin([0]))
    scores.append({"name": UNSTRETCHED, "x": at, "y": before_T})
    original = float(rope.original_context)
    marks = [{"name": "original context", "at": original, "axis": "x"}]
  charts = [
    line_chart(
      "Tokens for one whole turn, by pair of dims",
      turns,
      x_label="pair of dims",
      y_label="tokens",
      log="y",
      marks=[{"name": "context", "at": float(cfg.context), "axis": "y"}],
      says="The first pairs turn once within a few tokens and tell neighbours apart. Pairs "
      "that need more tokens than the context never complete a turn: they tell far from "
      "near.",
    ),
    heat_map(
      "The cosine of each pair's angle",
      cosines_TP.T,
      x=("position", positions_T.tolist()),
      y=("pair of dims", pairs),
      says=""
      if math.isclose(scale, 1, rel_tol=1e-5)
      else f"What the model multiplies it by, {scale:.4f}, is divided out.",
    ),
    line_chart(
      "Score of equal queries and keys, by distance",
      scores,
      x_label="distance in tokens",
      y_label="score / score at distance 0",
      log="x",
      marks=marks,
      says="Before the rotation, query and key are the same vector of ones.",
    ),
  ]
  figures |= {
    "scaling": rope.scaling if stretched else "none",
    "attention_scale": scale,
    "wavelengths": wavelengths_P.tolist(),
    "distances": at,
    "scores": scores_T.tolist(),
  }
  return figures, charts


def fade(cos_sin: Any, at_zero: Any) -> np.ndarray:
  """q . k of vectors of ones, the key at position 0, relative to that at distance 0."""
  cos_sin = tuple(jnp.asarray(part, jnp.float32) for part in cos_sin)
  num_dims = 2 * cos_sin[0].shape[-1]
  ones = lambda count: jnp.ones((1, count, 1, num_dims))
  q_TH = rotate(ones(cos_sin[0].shape[1]), cos_sin)[0, :, 0]
  k_H = rotate(ones(1), at_zero)[0, 0, 0]
  scores_T = np.asarray(q_TH @ k_H, np.float64)
  return scores_T / max(float(scores_T[0]), 1e-300)


# -- Added vectors -------------------------------------------------------------------------


def table_of(
  params: Any | None, stack: str, name: str, shape: tuple[int, int]
) -> np.ndarray:
  """A trained table of a stack ("" if the model is one), or one as it is initialised."""
  if params is None:
    module = Embedding(shape, ("slots", "embed"))
    born = module.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return np.asarray(born["params"]["table"].value)
  stack_params = params[stack] if stack else params
  return np.asarray(stack_params[name]["table"]).astype(np.float32)


def vectors_part(positions: np.ndarray, table_TD: np.ndarray) -> Part:
  """The table, and how similar the vectors of two positions are."""
  at = positions.tolist()
  dims = shown(table_TD.shape[1], 2 * MOST_ROWS)
  norms_T = np.linalg.norm(table_TD.astype(np.float64), axis=1)
  units_TD = table_TD / np.maximum(norms_T, 1e-300)[:, None]
  cosines_TT = np.clip(units_TD @ units_TD.T, -1, 1)
  means = [float(np.diagonal(cosines_TT, by).mean()) for by in range(len(at))]
  charts = [
    heat_map(
      "The vector of each position",
      table_TD[:, dims],
      x=("dim", dims.tolist()),
      y=("position", at),
    ),
    heat_map(
      "Cosine of the vectors of two positions",
      cosines_TT,
      x=("position", at),
      y=("position", at),
    ),
    line_chart(
      "Mean cosine by distance",
      [{"name": "cosine", "x": at, "y": means}],  # position 0's distances are all of them
      x_label="distance in tokens",
      y_label="cosine",
    ),
  ]
  return {"distances": at, "cosines": means, "mean_norm": float(norms_T.mean())}, charts


# -- Biases of scores ----------------------------------------------------------------------


def alibi_part(cfg: ResolvedModel) -> Part:
  """The bias of the last query of the context, by the distance of the key before it."""
  causal = cfg.family != "encoder"
  distances = spread(cfg.context - 1)
  last = cfg.context - 1
  bias_1N1S = np.asarray(alibi_bias(jnp.array([[last]]), last + 1, cfg.num_heads, causal))
  bias_NS = bias_1N1S[0, :, 0][:, last - distances]
  chart = bias_chart("The bias of each head, by distance", distances, bias_NS, "distance")
  return {"slopes": np.asarray(alibi_slopes(cfg.num_heads)).tolist()}, [chart]


def relative_part(cfg: ResolvedModel, causal: bool, table: np.ndarray) -> Part:
  """The bias and the bucket of each distance; if causal, only of keys before the query."""
  reach = min(cfg.context - 1, 2 * cfg.relative_distance)
  distances = np.arange(-reach, 1 if causal else reach + 1)
  buckets = np.asarray(
    relative_buckets(
      jnp.asarray(distances), cfg.relative_buckets, cfg.relative_distance, causal
    )
  )
  apart = "key - query"
  charts = [
    bias_chart("The bias of each head", distances, table[buckets].T, apart),
    line_chart(
      "The bucket of each distance",
      [{"name": "bucket", "x": distances.tolist(), "y": buckets.tolist()}],
      x_label=f"{apart}, in tokens",
      y_label="bucket",
      says=f"All distances from {cfg.relative_distance} tokens on share a bucket.",
    ),
  ]
  return {"bias_of_buckets": table.tolist()}, charts


def bias_chart(
  title: str, distances: np.ndarray, bias_NS: np.ndarray, apart: str
) -> dict[str, Any]:
  """What each head adds to its scores: curves, or a heat map for many heads."""
  label, at = f"{apart}, in tokens", distances.tolist()
  if len(bias_NS) > MOST_CURVES:
    return heat_map(title, bias_NS, x=(label, at), y=("head", [*range(len(bias_NS))]))
  series = [
    {"name": f"head {n}", "x": at, "y": of_head} for n, of_head in enumerate(bias_NS)
  ]
  return line_chart(title, series, label, "added to the score")
