# SPDX-License-Identifier: Apache-2.0
"""What each head of each layer attends to, what tells the heads apart, and the queries and
keys from which their weights come."""

import functools
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.config import ResolvedModel
from flaxlm.decoding.loading import Run
from flaxlm.errors import ConfigError
from flaxlm.look.heads import (
  RULE,
  Word,
  layer_figures,
  patterns_of,
  repeated_share,
  sight_of,
)
from flaxlm.look.pieces import (
  Piece,
  Reading,
  apply_to_row,
  complete_reading,
  describe,
  sort_of,
)
from flaxlm.look.view import Shares, View
from flaxlm.nn.attention import Attention
from flaxlm.nn.base import LanguageModel
from flaxlm.nn.models import unrolled

MOST_WEIGHTS = 1 << 25  # two bytes each, before they are deflated: 67 MB
# A page has 3 MB at most where it can: of weights in base64, and of queries and keys.
MOST_PACKED, MOST_NUMBERS = 1_900_000, 1 << 18
STEPS = (65535, 16383, 4095, 2047, 1023, 511, 255)  # of weights: the finest that fits
SAMPLED = 5  # every so manieth head tells how well the weights deflate
REPEATED = 32  # random tokens that are read twice, to find induction heads


class Sequences(NamedTuple):
  """What one kind of map joins: its name, and the tokens that look and are looked at."""

  kind: str  # "self", "cross" or "encoder_self"
  title: str
  queries: list[Piece]
  keys: list[Piece]


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
  row, source = (describe(run.tokenizer, some) for some in (ids, reading.source_ids or []))
  repeated_LN = find_repeated(run, layer, head)
  figures: list[dict[str, Any]] = []
  maps: list[dict[str, Any]] = []
  for one in (
    Sequences("self", "self-attention", row, row),
    Sequences("cross", "cross-attention", row, source),
    Sequences("encoder_self", "self-attention of the encoder", source, source),
  ):
    weights_LNTS = captured.get(one.kind)
    if weights_LNTS is None or not weights_LNTS.size:
      continue
    shown = {
      "kind": one.kind,
      "layers": [*range(len(weights_LNTS))] if layer is None else [layer],
      "heads": [*range(cfg.num_heads)] if head is None else [head],
      "causal": one.kind == "self" and cfg.family != "encoder",
    }
    of_self = repeated_LN if one.kind == "self" else None
    per_head = head_figures(run, weights_LNTS, one, shown, of_self)
    figures.append(shown | {"per_head": per_head})
    maps.append(shown | {"weights": weights_LNTS, **one._asdict()})
  add_vectors(run, ids, reading.source_ids, maps, figures)
  steps = finest_steps([one["weights"] for one in maps])
  for drawn in maps:
    drawn["weights"] = Shares(drawn["weights"], steps)
    is_cross = drawn["kind"] == "cross"
    drawn["layer_kinds"] = ["" if is_cross else layer_kind(cfg, n) for n in drawn["layers"]]
    for side in ("queries", "keys"):
      drawn[side] = [piece._asdict() for piece in drawn[side]]
  data = {"maps": maps, "rule": RULE, "scoring": scoring_words(cfg)}
  title = f"What the heads of {run.cfg.name} attend to"
  return View("attention", title, cuts, notes_of(run, steps), {"maps": figures}, data)


def notes_of(run: Run, steps: int) -> list[str]:
  cfg = run.model.cfg
  notes = [
    f"{run.path} at step {run.step}, model.family={cfg.family}",
    "In a head each token (down) looks at others (across): the darker, the more. What it "
    "looks at is mixed into it. flaxlm look story tells how, from the beginning.",
  ]
  if cfg.num_kv_heads != cfg.num_heads:
    group = cfg.num_heads // cfg.num_kv_heads
    notes.append(f"{group} query heads share each key/value head.")
  if steps < STEPS[0]:
    notes.append(
      f"To keep the page small, a weight is drawn to the nearest 1/{steps}; the figures of "
      "the heads are exact."
    )
  return notes


def scoring_words(cfg: ResolvedModel) -> str:
  """What happens to a sum of products before the softmax, besides the scale."""
  words = []
  if cfg.attention_softcap is not None:
    words.append(f"it is capped softly at ±{cfg.attention_softcap:g}")
  if cfg.positions in ("alibi", "relative"):
    words.append(f"a bias by distance ({cfg.positions}) is added in self-attention")
  if cfg.learned_sinks:
    words.append("a learned sink takes part in the softmax")
  return " and ".join(words)


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
  window = window_of(cfg, layer)
  return "" if window is None else f"local, {window} tokens"


def window_of(cfg: ResolvedModel, layer: int) -> int | None:
  return cfg.window_of(cfg.layer_kinds(layer + 1)[layer])


# -- Figures -------------------------------------------------------------------------------


def head_figures(
  run: Run,
  weights_LNTS: np.ndarray,
  one: Sequences,
  shown: dict[str, Any],
  repeated_LN: np.ndarray | None = None,
) -> list[dict[str, Any]]:
  """The figures of every head of one kind of map, an entry each; see heads.py."""
  cfg, causal = run.model.cfg, shown["causal"]
  words = [[word_of(run, piece) for piece in pieces] for pieces in (one.queries, one.keys)]
  patterns = patterns_of(one.kind, causal, *words)
  result = []
  for i, layer in enumerate(shown["layers"]):
    window = None if one.kind == "cross" else window_of(cfg, layer)
    T, S = weights_LNTS.shape[2:]
    sight_TS = sight_of(T, S, causal, window, cfg.sink_tokens)
    repeated_N = None if repeated_LN is None else repeated_LN[i]
    entries = layer_figures(weights_LNTS[i], sight_TS, patterns, causal, repeated_N)
    for head, entry in zip(shown["heads"], entries, strict=True):
      result.append({"layer": layer, "head": head} | entry)
  return result


def word_of(run: Run, piece: Piece) -> Word:
  data = bytes.fromhex(piece.hex).strip()
  return Word(piece.id, data or piece.id, sort_of(run.tokenizer, piece.id))


def find_repeated(run: Run, layer: int | None, head: int | None) -> np.ndarray | None:
  """`repeated_share` of a decoder's heads; None if its context is too short to tell."""
  cfg, tokenizer = run.model.cfg, run.tokenizer
  start = tokenizer.framed([], "prompt")
  unfit = {*tokenizer.special_ids, tokenizer.mask_id, tokenizer.unknown_id}
  ordinary = [id_ for id_ in range(run.num_ids) if id_ not in unfit]
  length = min(REPEATED, (cfg.context - len(start)) // 2, len(ordinary))
  if cfg.family != "decoder" or length < 4:
    return None
  drawn = np.random.default_rng(0).choice(ordinary, length, replace=False).tolist()
  ids = [*start, *drawn, *drawn]
  return repeated_share(apply_to_row(run, capture, ids, None, layer, head)["self"], length)


def finest_steps(weights: Sequence[np.ndarray]) -> int:
  """The finest of `STEPS` with which the weights fit into `MOST_PACKED`, or the last."""
  if 4 / 3 * 2 * sum(map(np.size, weights)) <= MOST_PACKED:
    return STEPS[0]
  for steps in STEPS:
    packed = 0.0
    for weights_LNTS in weights:
      some_NTS = weights_LNTS.reshape(-1, *weights_LNTS.shape[2:])[::SAMPLED]
      size = len(zlib.compress(Shares(some_NTS, steps).to_bytes(), 6))
      packed += size * weights_LNTS.size / some_NTS.size
    if 4 / 3 * packed <= MOST_PACKED:
      break
  return steps


# -- Queries and keys ----------------------------------------------------------------------


def add_vectors(
  run: Run,
  ids: Sequence[int],
  source_ids: Sequence[int] | None,
  maps: list[dict[str, Any]],
  figures: list[dict[str, Any]],
) -> None:
  """Adds to each map the `vectors` of as many of its heads as a page has room for: None, or
  the indices of the `heads`, counted layer by layer, and their queries and keys.
  """
  cfg = run.model.cfg
  sizes = [cfg.head_dim * (len(one["queries"]) + len(one["keys"])) for one in maps]
  chosen = choose_heads([one["per_head"] for one in figures], sizes)
  picks = {}
  for one, some in zip(maps, chosen, strict=True):
    if some:
      of_layer, of_head = np.divmod(np.array(some), len(one["heads"]))
      numbers = np.array(one["layers"])[of_layer], np.array(one["heads"])[of_head]
      picks[one["kind"]] = np.stack(numbers).astype(np.int32)
  plain = run._replace(model=unrolled(run.model))
  vectors = apply_to_row(plain, capture_vectors, ids, source_ids, picks)
  for one, some in zip(maps, chosen, strict=True):
    one["vectors"] = None
    if some:
      q_XTH, k_XSH = vectors[one["kind"]]
      scaled = in_range(cfg.attention_scale * q_XTH)
      one["vectors"] = {"heads": some, "queries": scaled, "keys": in_range(k_XSH)}


def choose_heads(
  entries: Sequence[list[dict[str, Any]]], sizes: Sequence[int]
) -> list[list[int]]:
  """The heads of each map whose vectors fit into `MOST_NUMBERS`; one has `sizes` numbers.

  Those of each name are taken in turn, the clearest first.
  """
  order = []
  for m, per_head in enumerate(entries):
    ranks: dict[str, int] = {}
    for n in sorted(range(len(per_head)), key=lambda n: -per_head[n]["strength"]):
      name = per_head[n]["looks_at"]
      ranks[name] = ranks.get(name, 0) + 1
      order.append((ranks[name], -per_head[n]["strength"], m, n))
  chosen: list[list[int]] = [[] for _ in entries]
  room = MOST_NUMBERS
  for _, _, m, n in sorted(order):
    if sizes[m] <= room:
      room -= sizes[m]
      chosen[m].append(n)
  return [sorted(some) for some in chosen]


def in_range(x_XTH: np.ndarray) -> dict[str, Any]:
  """Each head's numbers, from -`most` to `most`, as shares of that range."""
  most_X = np.maximum(np.abs(x_XTH).max((1, 2)), 1e-30).astype(np.float64)
  return {
    "most": most_X.tolist(),
    "values": Shares(0.5 + x_XTH / (2 * most_X[:, None, None])),
  }


@functools.partial(jax.jit, static_argnames="model")
def capture_vectors(
  model: LanguageModel,
  params: Any,
  tokens_BT: jax.Array,
  source: Any,
  picks: dict[str, jax.Array],
) -> dict[str, tuple[jax.Array, jax.Array]]:
  """The queries (X, T, H) and keys (X, S, H) of the first row, after norms and rotation, of
  the X heads of each kind of map in `picks`: (2, X), their layers and heads."""
  found: dict[str, list[jax.Array]] = {}

  def watch(next_fun: Any, args: tuple, kwargs: Any, context: Any) -> Any:
    out = next_fun(*args, **kwargs)
    module, method = context.module, context.method_name
    if isinstance(module, Attention) and method in ("queries", "keys_values"):
      vectors_BTNH = out if method == "queries" else out[0]
      found.setdefault(f"{module.name} {method}", []).append(vectors_BTNH[0])
    return out

  options = {} if source is None else {"source": source}
  with nn.intercept_methods(watch):
    model.apply({"params": params}, tokens_BT, **options)
  depth, group = model.cfg.depth, model.cfg.num_heads // model.cfg.num_kv_heads
  result = {}
  for kind, (layers_X, heads_X) in picks.items():
    name = "cross_attention" if kind == "cross" else "attention"
    # An encoder's layers are the first, and the decoder's the last.
    own = slice(-depth) if kind == "encoder_self" else slice(-depth, None)
    q_LTNH, k_LSKH = (
      jnp.stack(found[f"{name} {method}"][own]).astype(jnp.float32)
      for method in ("queries", "keys_values")
    )
    result[kind] = (q_LTNH[layers_X, :, heads_X], k_LSKH[layers_X, :, heads_X // group])
  return result
