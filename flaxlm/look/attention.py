# SPDX-License-Identifier: Apache-2.0
"""What each head of each layer attends to, and what tells the heads apart."""

import functools
from typing import Any

import jax
import numpy as np

from flaxlm.config import ResolvedModel
from flaxlm.decoding.loading import Run
from flaxlm.errors import ConfigError
from flaxlm.look.pieces import Reading, apply_to_row, complete_reading, describe
from flaxlm.look.view import Shares, View
from flaxlm.nn.base import LanguageModel

MOST_WEIGHTS = 1 << 25  # two bytes each, before they are deflated: 67 MB
# The share of its weight from which on a head looks at one thing mostly, or partly, and the
# share of the largest possible entropy from which on it looks at all evenly.
MOSTLY, PARTLY, EVENLY = 0.5, 0.25, 0.9


def check_attention(cfg: ResolvedModel, layer: int | None, head: int | None) -> None:
  """Raises `ConfigError` if the model has no attention, or no such layer or head."""
  if cfg.family == "rnn":
    raise ConfigError(
      "model.family=rnn has no attention: it remembers what it has read in one state",
      "look at a decoder, encoder or encoder_decoder; look tokens takes an rnn",
    )
  depth = max(cfg.depth, (cfg.encoder_depth or 0) if cfg.family == "encoder_decoder" else 0)
  for name, value, count in (("layer", layer, depth), ("head", head, cfg.num_heads)):
    if value is not None and not 0 <= value < count:
      raise ConfigError(f"{name} is {value}", f"{name}s are 0 to {count - 1}")


def look_attention(
  run: Run, reading: Reading, most: int, layer: int | None = None, head: int | None = None
) -> View:
  """Every head's map for one text; or only those of one layer, or of one head per layer."""
  cfg = run.model.cfg
  ids, cuts = complete_reading(run, reading, most)
  check_size(cfg, len(ids), len(reading.source_ids or []), layer, head)
  captured = apply_to_row(run, capture, ids, reading.source_ids, layer, head)
  row, source = (
    [piece._asdict() for piece in describe(run.tokenizer, some)]
    for some in (ids, reading.source_ids or [])
  )
  figures, maps = [], []
  for name, title, queries, keys in (
    ("self", "self-attention", row, row),
    ("cross", "cross-attention", row, source),
    ("encoder_self", "self-attention of the encoder", source, source),
  ):
    weights_LNTS = captured.get(name)
    if weights_LNTS is None or not weights_LNTS.size:
      continue
    layers = [*range(len(weights_LNTS))] if layer is None else [layer]
    shown = {
      "kind": name,
      "layers": layers,
      "heads": [*range(cfg.num_heads)] if head is None else [head],
      "causal": name == "self" and cfg.family != "encoder",
    }
    figures.append(shown | {"per_head": head_figures(weights_LNTS, shown)})
    maps.append(
      {
        **shown,
        "title": title,
        "queries": queries,
        "keys": keys,
        "weights": Shares(weights_LNTS),
        "layer_kinds": ["" if name == "cross" else layer_kind(cfg, n) for n in layers],
      }
    )
  notes = [f"{run.path} at step {run.step}, model.family={cfg.family}"]
  if cfg.num_kv_heads != cfg.num_heads:
    group = cfg.num_heads // cfg.num_kv_heads
    notes.append(f"{group} query heads share each key/value head.")
  title = f"What the heads of {run.cfg.name} attend to"
  return View("attention", title, cuts, notes, {"maps": figures}, {"maps": maps})


@functools.partial(jax.jit, static_argnames=("model", "layer", "head"))
def capture(
  model: LanguageModel,
  params: Any,
  tokens_BT: jax.Array,
  source: Any,
  layer: int | None,
  head: int | None,
) -> dict[str, jax.Array]:
  """The maps (L, N, T, S) of the first row, by name; of one layer or head, if it is given.

  Encoder and decoder may differ in depth: a stack without this layer has no map.
  """
  options = {} if source is None else {"source": source}
  output = model.apply({"params": params}, tokens_BT, capture=True, **options)
  pick = lambda number: slice(None) if number is None else slice(number, number + 1)
  return {
    name: maps_LBNTS[pick(layer), 0, pick(head)]
    for name, maps_LBNTS in output.attention.items()
  }


def check_size(
  cfg: ResolvedModel, num_tokens: int, num_source: int, layer: int | None, head: int | None
) -> None:
  """Raises `ConfigError` if the page would be too large for a browser."""
  depth = 1 if layer is not None else cfg.depth
  encoder = 1 if layer is not None else (cfg.encoder_depth or 0)
  of_decoder = depth * num_tokens * (num_tokens + num_source)
  of_encoder = encoder * num_source * num_source
  count = (of_decoder + of_encoder) * (cfg.num_heads if head is None else 1)
  if count > MOST_WEIGHTS:
    raise ConfigError(
      f"{count:,} weights would be {2 * count / 1e6:,.0f} MB",
      "choose one with --layer or --head, or shorten the text with --max-tokens",
    )


def layer_kind(cfg: ResolvedModel, layer: int) -> str:
  window = cfg.window_of(cfg.layer_kinds(layer + 1)[layer])
  return "" if window is None else f"local, {window} tokens"


# -- Figures -------------------------------------------------------------------------------


def head_figures(weights_LNTS: np.ndarray, shown: dict[str, Any]) -> list[dict[str, Any]]:
  """Numbers that tell the heads of one kind of map apart, one entry per head.

  They are means over the queries. In causal maps the first query, which sees only itself,
  is left out if there are others. `entropy` is in bits and `distance` in tokens; the others
  are shares of the weight. Weight that goes to learned sinks is one more outcome of the
  entropy.
  """
  name, causal = shown["kind"], shown["causal"]
  weights = weights_LNTS.astype(np.float64)
  T, S = weights.shape[-2:]
  start = 1 if causal and T > 1 else 0
  seen = weights[..., start:, :]
  entropies_LN = entropy_bits(seen).mean(-1)
  even_LN = np.log2(np.maximum((seen > 0).sum(-1), 1)).mean(-1)
  shares = {"first": seen[..., 0].mean(-1)}
  if name == "cross":
    shares["last"] = seen[..., -1].mean(-1)
  else:
    distances_TS = np.abs(np.arange(T)[:, None] - np.arange(S))
    distance_LN = (seen * distances_TS[start:]).sum(-1).mean(-1)
    diagonal = lambda by: np.diagonal(weights, by, -2, -1).sum(-1) / max(T - 1, 1)
    shares["previous"] = diagonal(-1)
    shares["itself"] = np.diagonal(weights, 0, -2, -1)[..., start:].mean(-1)
    if not causal:
      shares["next"] = diagonal(1)
  result = []
  for i, layer in enumerate(shown["layers"]):
    for j, head in enumerate(shown["heads"]):
      of_head = {key: float(value[i, j]) for key, value in shares.items()}
      entry = {"layer": layer, "head": head, "entropy": float(entropies_LN[i, j])}
      if name != "cross":
        entry["distance"] = float(distance_LN[i, j])
      even = bool(entropies_LN[i, j] >= EVENLY * even_LN[i, j])
      result.append(entry | of_head | {"looks_at": looks_at(of_head, even, name)})
  return result


def entropy_bits(weights: np.ndarray) -> np.ndarray:
  """The entropy of each distribution along the last dim; the rest to 1 is one outcome."""
  rest = np.maximum(1 - weights.sum(-1, keepdims=True), 0)
  rest[rest < 1e-4] = 0  # rounding, not a sink
  whole = np.concatenate([weights, rest], -1)
  return -(whole * np.log2(np.where(whole > 0, whole, 1))).sum(-1)


def looks_at(shares: dict[str, float], even: bool, name: str) -> str:
  """A head in words: what has most of its weight, or how the weight is spread."""
  of = "source token" if name == "cross" else "token"
  best = max(shares, key=lambda key: shares[key])
  thing = "itself" if best == "itself" else f"the {best} {of}"
  if shares[best] >= MOSTLY:
    return thing
  if even:
    return "all evenly"
  return f"partly {thing}" if shares[best] >= PARTLY else "a mixture"
