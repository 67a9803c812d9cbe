# SPDX-License-Identifier: Apache-2.0
"""What a model's positions do: added vectors, rotations, or biases of the scores.

Everything is computed by the functions that the model itself calls.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.config import ModelConfig
from flaxlm.errors import ConfigError
from flaxlm.look.charts import heat_map, line_chart
from flaxlm.look.page import View
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

SAYS = {
  "rope": "Queries and keys are turned, pair of dims by pair, by an angle that grows with "
  "the position: a score depends on the distance alone (Su et al., 2021).",
  "learned": "A trained vector for each position is added to the embedded token.",
  "sinusoidal": "A fixed vector of sines and cosines for each position is added to the "
  "embedded token (Vaswani et al., 2017).",
  "alibi": "Each head subtracts its slope times the distance from its scores "
  "(Press et al., 2022).",
  "relative": "Each head adds a trained number to its scores, by the bucket of the "
  "distance (Raffel et al., 2020).",
  "none": "The model has no positions (model.positions=none): it tells the order of tokens "
  "only by what its causal mask hides.",
}


def check_positions(cfg: ModelConfig) -> None:
  """Raises `ConfigError` for a family that has none."""
  if cfg.family == "rnn":
    raise ConfigError(
      "model.family=rnn has no positions: it reads one token after the other",
      "look at a decoder, encoder or encoder_decoder",
    )


def look_positions(
  cfg: ModelConfig, name: str, origin: str, params: Any | None = None
) -> View:
  """The positions of a model; `params` None shows trained ones as they are born."""
  cfg = cfg.resolve()
  check_positions(cfg)
  notes = [f"{origin}, model.positions={cfg.positions}", SAYS[cfg.positions]]
  if cfg.positions in ("learned", "relative") and params is None:
    notes.append("Untrained: what is drawn is noise. Give a run to see what it has learnt.")
  charts: list[dict[str, Any]] = []
  figures: dict[str, Any] = {"positions": cfg.positions}
  if cfg.positions == "rope":
    for kind in sorted(set(cfg.period)):
      figures[kind] = add_rope(cfg, kind, charts)
  elif cfg.positions == "alibi":
    figures |= add_alibi(cfg, charts)
  elif cfg.positions == "relative":
    for stack, table in relative_tables(cfg, params):
      figures[stack] = add_relative(cfg, stack, table, charts)
  elif cfg.positions == "sinusoidal":
    positions = shown(cfg.context, MOST_ROWS)
    table_TD = np.asarray(sinusoids(jnp.asarray(positions)[None], cfg.width))[0]
    figures |= add_vectors(positions, table_TD, "", charts)
  elif cfg.positions == "learned":
    positions = shown(cfg.context, MOST_ROWS)
    for stack, table_TD in learned_tables(cfg, params):
      figures[stack or "table"] = add_vectors(positions, table_TD[positions], stack, charts)
  return View("positions", f"Positions of {name}", [], notes, figures, {"charts": charts})


def shown(count: int, most: int) -> np.ndarray:
  """0, 1, ... below `count`; if these are more than `most`, every second, third, ..."""
  return np.arange(0, count, -(-count // most), dtype=np.int32)


def spread(most: int) -> np.ndarray:
  """Distances 0, 1, ... `most`, all of the short ones and fewer of the long ones."""
  if most < MOST_POINTS:
    return np.arange(most + 1, dtype=np.int32)
  near = np.arange(MOST_POINTS // 4)
  far = np.geomspace(MOST_POINTS // 4, most, 3 * MOST_POINTS // 4)
  return np.unique(np.concatenate([near, far]).round().astype(np.int32))


# -- Rotations -----------------------------------------------------------------------------


def add_rope(cfg: ModelConfig, kind: str, charts: list[dict[str, Any]]) -> dict[str, Any]:
  """The speed of each pair, what is turned where, and how a score fades."""
  assert cfg.head_dim is not None
  rope, local = cfg.rope, kind == "L"
  own_theta = local and rope.local_theta is not None
  theta = rope.local_theta if own_theta else rope.theta
  assert theta is not None
  stretched = rope.scaling != "none" and not own_theta
  of_kind = (
    f" of {'local' if local else 'global'} layers" if len(set(cfg.period)) > 1 else ""
  )
  cos_sin = lambda positions: rotation(
    jnp.asarray(positions)[None], cfg.head_dim, rope, local
  )

  # The angle at position 1 is the speed; the model's own function says it, in radians.
  cos_P, sin_P = (np.asarray(part)[0, 0] for part in cos_sin(np.array([1])))
  speeds = np.arctan2(sin_P, cos_P).astype(np.float64)
  num_dims = 2 * len(speeds)
  if not num_dims:
    return {"theta": theta, "rotated_dims": 0}
  plain = np.array(inverse_wavelengths(num_dims, theta))
  wavelengths = 2 * np.pi / np.maximum(speeds, 1e-300)
  series = [{"name": "as the model turns", "x": [*range(len(speeds))], "y": wavelengths}]
  if stretched:
    before = 2 * np.pi / plain
    series.append({"name": "before stretching", "x": [*range(len(plain))], "y": before})
  charts.append(
    line_chart(
      f"Tokens for one whole turn, by pair of dims{of_kind}",
      series,
      ("pair of dims", "tokens"),
      log_y=True,
      marks=[("context", float(cfg.context), "y")],
      says="The first pairs turn within a few tokens and tell neighbours apart; those "
      "that take longer than the context never come round, and tell far from near.",
    )
  )
  positions = shown(min(cfg.context, 4 * MOST_ROWS), MOST_ROWS)
  cos_TP = np.asarray(cos_sin(positions)[0])[0]
  charts.append(
    heat_map(
      f"The cosine of each pair's angle{of_kind}",
      cos_TP.T,
      (("position", positions.tolist()), ("pair of dims", [*range(len(speeds))])),
    )
  )
  distances = spread(cfg.context - 1)
  series = [{"name": "as the model turns", "x": distances.tolist()}]
  series[0]["y"] = fade(cos_sin(distances), cos_sin(np.array([0])))
  if stretched:
    angles = distances[:, None] * plain
    unscaled = (np.cos(angles)[None], np.sin(angles)[None])
    series.append({"name": "before stretching", "x": distances.tolist()})
    series[1]["y"] = fade(unscaled, cos_sin(np.array([0])))
  original = rope.original_context if stretched else None
  charts.append(
    line_chart(
      f"Score of equal queries and keys, by distance{of_kind}",
      series,
      ("distance in tokens", "score / score at distance 0"),
      log_x=True,
      marks=[("original context", float(original), "x")] if original else [],
      says="Query and key are the same vector of ones before they are turned.",
    )
  )
  return {
    "theta": theta,
    "scaling": rope.scaling if stretched else "none",
    "rotated_dims": num_dims,
    "head_dim": cfg.head_dim,
    "wavelengths": wavelengths.tolist(),
    "distances": distances.tolist(),
    "scores": np.asarray(series[0]["y"]).tolist(),
  }


def fade(cos_sin: Any, at_zero: Any) -> np.ndarray:
  """q . k of vectors of ones, the key at 0, the query turned; over that at distance 0."""
  cos_sin = tuple(jnp.asarray(part, jnp.float32) for part in cos_sin)
  num_dims = 2 * cos_sin[0].shape[-1]
  ones = lambda count: jnp.ones((1, count, 1, num_dims))
  q_TH = rotate(ones(cos_sin[0].shape[1]), cos_sin)[0, :, 0]
  k_H = rotate(ones(1), at_zero)[0, 0, 0]
  scores_T = np.asarray(q_TH @ k_H, np.float64)
  return scores_T / max(float(scores_T[0]), 1e-300)


# -- Added vectors -------------------------------------------------------------------------


def learned_tables(cfg: ModelConfig, params: Any | None) -> list[tuple[str, np.ndarray]]:
  """(stack, table) of every stack with positions of its own."""
  names = ["encoder", "decoder"] if cfg.family == "encoder_decoder" else [""]
  return [(n, table_of(params, n, "positions", (cfg.context, cfg.width))) for n in names]


def table_of(
  params: Any | None, stack: str, name: str, shape: tuple[int, int]
) -> np.ndarray:
  """A trained table, or one as it is born."""
  if params is None:
    module = Embedding(shape, ("slots", "embed"))
    born = module.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return np.asarray(born["params"]["table"].value)
  stack_params = params[stack] if stack else params
  return np.asarray(stack_params[name]["table"]).astype(np.float32)


def add_vectors(
  positions: np.ndarray, table_TD: np.ndarray, stack: str, charts: list[dict[str, Any]]
) -> dict[str, Any]:
  """The table, and how alike the vectors of two positions are."""
  of_stack = f" of the {stack}" if stack else ""
  at = positions.tolist()
  dims = shown(table_TD.shape[1], 2 * MOST_ROWS)
  charts.append(
    heat_map(
      f"The vector of each position{of_stack}",
      table_TD[:, dims],
      (("dim", dims.tolist()), ("position", at)),
    )
  )
  norms_T = np.linalg.norm(table_TD.astype(np.float64), axis=1)
  units_TD = table_TD / np.maximum(norms_T, 1e-300)[:, None]
  cosines_TT = units_TD @ units_TD.T
  charts.append(
    heat_map(
      f"Cosine of the vectors of two positions{of_stack}",
      cosines_TT,
      (("position", at), ("position", at)),
    )
  )
  step = at[1] - at[0] if len(at) > 1 else 1
  steps = [*range(len(at))]
  means = [float(np.diagonal(cosines_TT, by).mean()) for by in steps]
  charts.append(
    line_chart(
      f"Mean cosine by distance{of_stack}",
      [{"name": "cosine", "x": [by * step for by in steps], "y": means}],
      ("distance in tokens", "cosine"),
    )
  )
  return {
    "distances": [by * step for by in steps],
    "cosines": means,
    "mean_norm": float(norms_T.mean()),
  }


# -- Biases of scores ----------------------------------------------------------------------


def add_alibi(cfg: ModelConfig, charts: list[dict[str, Any]]) -> dict[str, Any]:
  causal = cfg.family != "encoder"
  keys = spread(cfg.context - 1)
  most = int(keys[-1])
  # The last query of the context, and the keys at these distances before it.
  bias_NS = np.asarray(alibi_bias(jnp.array([[most]]), most + 1, cfg.num_heads, causal))
  bias_NS = bias_NS[0, :, 0, most - keys]
  slopes = np.asarray(alibi_slopes(cfg.num_heads)).tolist()
  charts.append(bias_chart("The bias of each head, by distance", keys, bias_NS.T))
  return {"slopes": slopes, "distances": keys.tolist(), "bias": bias_NS.T.tolist()}


def relative_tables(cfg: ModelConfig, params: Any | None) -> list[tuple[str, np.ndarray]]:
  stacks = ["encoder", "decoder"] if cfg.family == "encoder_decoder" else [""]
  shape = (cfg.relative_buckets, cfg.num_heads)
  return [(stack, table_of(params, stack, "relative_bias", shape)) for stack in stacks]


def add_relative(
  cfg: ModelConfig, stack: str, table: np.ndarray, charts: list[dict[str, Any]]
) -> dict[str, Any]:
  causal = cfg.family != "encoder" and stack != "encoder"
  reach = min(cfg.context - 1, 2 * cfg.relative_distance)
  distances = np.arange(-reach, 1 if causal else reach + 1)
  buckets = np.asarray(
    relative_buckets(
      jnp.asarray(distances), cfg.relative_buckets, cfg.relative_distance, causal
    )
  )
  of_stack = f" of the {stack}" if stack else ""
  bias_NS = table[buckets].T
  charts.append(
    bias_chart(f"The bias of each head{of_stack}, by key - query", distances, bias_NS)
  )
  charts.append(
    line_chart(
      f"The bucket of each distance{of_stack}",
      [{"name": "bucket", "x": distances.tolist(), "y": buckets.tolist()}],
      ("key - query, in tokens", "bucket"),
      says=f"From {cfg.relative_distance} tokens on all distances are one.",
    )
  )
  return {"distances": distances.tolist(), "bias": bias_NS.tolist()}


def bias_chart(title: str, distances: np.ndarray, bias_NS: np.ndarray) -> dict[str, Any]:
  series = [
    {"name": f"head {n}", "x": distances.tolist(), "y": bias_S}
    for n, bias_S in enumerate(bias_NS)
  ]
  return line_chart(title, series, ("distance in tokens", "added to the score"))
