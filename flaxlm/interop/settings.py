# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's config.json: read key by key, with types and bounds, and written.

Values that both sides express alike are in a table of (their key, our field), which
is used in both directions (`Settings.fields`, `to_keys`). Each family converts the rest.
"""

import dataclasses
import json
import math
import typing
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flaxlm.config import (
  ModelConfig,
  MoEConfig,
  ResolvedModel,
  ResolvedMoE,
  ResolvedRope,
  RopeConfig,
)
from flaxlm.errors import CheckpointError

MAX_JSON_BYTES = 32 * 2**20
MOST = 2**31  # limit of integers in a config
MOST_LAYERS = 10_000

Keys = tuple[tuple[str, str], ...]

ACTIVATIONS = {
  "gelu": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
  "silu": "silu",
  "swish": "silu",
  "relu": "relu",
}
ACTIVATION_NAMES = {
  "gelu": "gelu",
  "gelu_tanh": "gelu_pytorch_tanh",
  "silu": "silu",
  "relu": "relu",
}

_REQUIRED = object()


def read_json(path: Path) -> dict[str, Any]:
  """The object in a JSON file. Raises `CheckpointError`, also for duplicate keys."""
  try:
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
      raise CheckpointError(f"{path} has {size} bytes", f"at most {MAX_JSON_BYTES}")
    return parse_json(path.read_bytes(), str(path))
  except OSError as e:
    raise CheckpointError(f"{path} cannot be read: {e}") from e


def parse_json(text: bytes, origin: str) -> dict[str, Any]:
  """The JSON object in `text`; `origin` names it in errors."""
  try:
    values = json.loads(text.decode("utf-8"), object_pairs_hook=_no_doubles)
  except (ValueError, RecursionError) as e:
    raise CheckpointError(f"{origin} is not JSON: {e}") from e
  if not isinstance(values, dict):
    raise CheckpointError(f"{origin} is not a JSON object")
  return values


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  values = dict(pairs)
  if len(values) < len(pairs):
    [(double, _)] = Counter(name for name, _ in pairs).most_common(1)
    raise ValueError(f"{double!r} is there twice")
  return values


class Settings:
  """The values of a config.json, and the names of the tensors beside it.

  Every method raises `CheckpointError` for a value of the wrong type or out of bounds.
  """

  def __init__(self, values: Mapping[str, Any], origin: str, names: Iterable[str] = ()):
    self.values, self.origin, self.names = values, origin, frozenset(names)

  def refused(self, key: str, cure: str = "") -> CheckpointError:
    return CheckpointError(f"{self.origin}: {key} is {self.values.get(key)!r}", cure)

  def inner(self, *keys: str) -> "Settings | None":
    """The object under the first of `keys` that is present, not null and not empty."""
    for key in keys:
      value = self.values.get(key)
      if value:
        if not isinstance(value, dict):
          raise self.refused(key, "it must be an object")
        return Settings(value, f"{self.origin}: {key}", self.names)
    return None

  def get(self, kind: Any, key: str, default: Any = _REQUIRED) -> Any:
    """The int, float, bool or str under `key`; `default` if it is missing or null."""
    value = self.values.get(key)
    if value is None:
      if default is _REQUIRED:
        raise CheckpointError(f"{self.origin} has no {key}")
      return default
    if kind is float and type(value) is int and abs(value) < MOST:
      value = float(value)
    if type(value) is not kind:
      raise self.refused(key, f"it must be of type {kind.__name__}")
    if (kind is int and not -MOST < value < MOST) or (
      kind is float and not math.isfinite(value)
    ):
      raise self.refused(key, "it is out of bounds")
    return value

  def fields(self, keys: Keys, defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Our fields, {name: value}, from a table of (their key, our field).

    A key may be missing if our field may be None, or if `defaults` (by their key) has it.
    """
    hints = typing.get_type_hints(ModelConfig)
    found = {}
    for key, field in keys:
      arguments = typing.get_args(hints[field])
      default = None if arguments else _REQUIRED
      default = (defaults or {}).get(key, default)
      found[field] = self.get(arguments[0] if arguments else hints[field], key, default)
    depth = found.get("depth", 0)
    if depth > MOST_LAYERS:
      raise CheckpointError(f"{self.origin}: {depth} layers", f"at most {MOST_LAYERS}")
    return found

  def activation(self, key: str, default: str) -> Any:
    name = self.get(str, key, default)
    if name not in ACTIVATIONS:
      raise self.refused(key, f"use one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]

  def demand(self, **values: Any) -> None:
    """Raises `CheckpointError` for a key that is present with another value than these."""
    for key, wanted in values.items():
      value = self.values.get(key)
      if value is not None and value != wanted:
        raise self.refused(key, f"flaxlm supports only {wanted!r}")

  def has(self, end: str) -> bool:
    """Whether the name of some tensor has this ending."""
    return any(name.endswith(end) for name in self.names)

  # -- Positions and windows

  def rope(self, head_dim: int, context: int, defaults: Mapping[str, float]) -> RopeConfig:
    """RoPE, from newer files (rope_parameters) or older ones (rope_theta and others).

    `defaults` may have rope_theta and partial_rotary_factor, for files without them.
    """
    scaling = self.inner("rope_parameters", "rope_scaling") or Settings({}, self.origin)
    both = Settings(dict(defaults) | dict(self.values) | dict(scaling.values), self.origin)
    share = both.get(float, "partial_rotary_factor", both.get(float, "rotary_pct", 1.0))
    rope = dict(
      theta=both.get(float, "rope_theta", 10_000.0),
      fraction=rotary_fraction(int(head_dim * share), head_dim),
    )
    if rope["theta"] <= 1:
      raise both.refused("rope_theta", "it must be more than 1")
    older = scaling.get(str, "type", "default")
    kind = scaling.get(str, "rope_type", older)
    original = self.values.get("original_max_position_embeddings")
    if original is None:
      original = scaling.values.get("original_max_position_embeddings", context)
    match kind:
      case "default":
        return RopeConfig(**rope)
      case "linear":
        return RopeConfig(**rope, scaling="linear", factor=scaling.get(float, "factor"))
      case "llama3":
        slow = scaling.get(float, "low_freq_factor")
        if scaling.get(float, "high_freq_factor") <= slow:
          raise scaling.refused("high_freq_factor", f"it must be more than {slow}")
        return RopeConfig(
          **rope,
          scaling="llama3",
          factor=scaling.get(float, "factor"),
          original_context=scaling.get(int, "original_max_position_embeddings"),
          slow_turns=slow,
          fast_turns=scaling.get(float, "high_freq_factor"),
        )
      case "yarn":
        scaling.demand(mscale=None, mscale_all_dim=None, truncate=True)
        return RopeConfig(
          **rope,
          scaling="yarn",
          factor=scaling.get(float, "factor"),
          original_context=original if type(original) is int else context,
          slow_turns=scaling.get(float, "beta_slow", 1.0),
          fast_turns=scaling.get(float, "beta_fast", 32.0),
          attention_factor=scaling.get(float, "attention_factor", None),
        )
    raise CheckpointError(
      f"{self.origin}: RoPE scaling {kind!r} is not supported",
      "supported: default, linear, llama3 and yarn",
    )

  def layer_pattern(self, depth: int, default: str) -> str:
    """The shortest pattern of L and G from their layer_types, or else from `default`,
    repeated over the layers."""
    kinds = self.values.get("layer_types")
    if kinds is None:
      return shortest_period((default * depth)[:depth])
    letters = {"full_attention": "G", "sliding_attention": "L"}
    if not isinstance(kinds, list) or len(kinds) != depth:
      raise CheckpointError(f"{self.origin}: layer_types is not a list of {depth} kinds")
    unknown = [kind for kind in kinds if not isinstance(kind, str) or kind not in letters]
    if unknown:
      raise CheckpointError(
        f"{self.origin}: layer_types has {unknown[0]!r}", f"supported: {', '.join(letters)}"
      )
    return shortest_period("".join(letters[kind] for kind in kinds))


def head_dim(hf: Settings, cfg: ModelConfig) -> int:
  """The head dim of a config that is neither resolved nor checked yet."""
  heads = cfg.num_heads
  if not cfg.head_dim and (heads < 1 or cfg.width < heads or cfg.width % heads):
    raise CheckpointError(f"{hf.origin}: {heads} heads cannot share a width of {cfg.width}")
  return cfg.head_dim or cfg.width // heads


def rotary_fraction(num_dims: int, head_dim: int) -> float:
  """The fraction of `head_dim` from which `nn.positions` computes exactly `num_dims`."""
  if num_dims == head_dim:
    return 1.0
  if not 0 < num_dims < head_dim or num_dims % 2:
    raise CheckpointError(
      f"RoPE rotates {num_dims} dims of a head of {head_dim}", "use an even number"
    )
  fraction = num_dims / head_dim
  while 2 * int(head_dim * fraction / 2) < num_dims:  # the quotient was rounded down
    fraction = math.nextafter(fraction, 1)
  return fraction


def shortest_period(kinds: str) -> str:
  """The shortest string that gives `kinds` when it is repeated and cut to its length."""
  sizes = range(1, len(kinds))
  whole = (kinds[:size] for size in sizes if kinds.startswith(kinds[size:]))
  return next(whole, kinds)


# -- Writing -------------------------------------------------------------------------------


def to_keys(cfg: ResolvedModel, keys: Keys) -> dict[str, Any]:
  """The inverse of `Settings.fields`."""
  return {key: getattr(cfg, field) for key, field in keys}


def rope_keys(rope: RopeConfig, head_dim: int) -> dict[str, Any]:
  """RoPE in the keys that all versions of transformers read."""
  theta, scaling = rope.theta, None
  match rope.scaling:
    case "linear":
      scaling = {"rope_type": "linear", "factor": rope.factor}
    case "ntk":  # a fixed factor: the same as a larger base
      num_dims = 2 * int(head_dim * rope.fraction / 2)
      theta *= rope.factor ** (num_dims / max(1, num_dims - 2))
    case "llama3":
      scaling = {
        "rope_type": "llama3",
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original_context,
        "low_freq_factor": rope.slow_turns,
        "high_freq_factor": rope.fast_turns,
      }
    case "yarn":
      scaling = {
        "rope_type": "yarn",
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original_context,
        "beta_slow": rope.slow_turns,
        "beta_fast": rope.fast_turns,
      }
      if rope.attention_factor is not None:
        scaling["attention_factor"] = rope.attention_factor
  keys: dict[str, Any] = {"rope_theta": theta, "rope_scaling": scaling}
  if rope.fraction != 1:
    keys["partial_rotary_factor"] = rope.fraction
  return keys


def layer_types(cfg: ResolvedModel) -> list[str]:
  """Their name for the kind of each layer."""
  names = {"G": "full_attention", "L": "sliding_attention"}
  return [names[cfg.period[n % len(cfg.period)]] for n in range(cfg.depth)]


def canonical(cfg: ModelConfig) -> ResolvedModel:
  """`cfg` without fields that only training reads, or that have no effect here.

  Two configs that compute the same have the same canonical config.
  """
  cfg = cfg.resolve()
  kinds = cfg.layer_kinds()
  window = cfg.window if "L" in kinds else None
  if window is not None and window >= cfg.context:
    window, kinds = None, "G" * cfg.depth
  return dataclasses.replace(
    cfg,
    layer_pattern=shortest_period(kinds),
    window=window,
    sink_tokens=cfg.sink_tokens if window else 0,
    rope=canonical_rope(cfg),
    moe=canonical_moe(cfg),
    encoder_depth=cfg.encoder_depth if cfg.family == "encoder_decoder" else cfg.depth,
    norm_biased=cfg.norm == "layernorm" and cfg.norm_biased,
    relative_buckets=cfg.relative_buckets if cfg.positions == "relative" else 32,
    relative_distance=cfg.relative_distance if cfg.positions == "relative" else 128,
    cell="lstm",
    dropout=0.0,
  )


def canonical_rope(cfg: ResolvedModel) -> ResolvedRope:
  rope = cfg.rope
  if cfg.positions != "rope":
    return ResolvedRope(original_context=cfg.context)
  fixed = rope.scaling == "ntk" or (rope.factor == 1 and rope.attention_factor is None)
  kept: dict[str, Any] = dict(
    original_context=cfg.context,
    theta=rope_keys(rope, cfg.head_dim)["rope_theta"],
    fraction=rope.fraction,
    scaling="none" if fixed else rope.scaling,
  )
  if "L" in cfg.period and not (
    kept["scaling"] == "none" and rope.local_theta == rope.theta
  ):
    kept["local_theta"] = rope.local_theta
  if kept["scaling"] != "none":
    kept["factor"] = rope.factor
  if kept["scaling"] in ("yarn", "llama3"):
    kept |= dict(
      original_context=rope.original_context,
      slow_turns=rope.slow_turns,
      fast_turns=rope.fast_turns,
    )
  if kept["scaling"] == "yarn":
    kept["attention_factor"] = rope.attention_factor or 0.1 * math.log(rope.factor) + 1
  return ResolvedRope(**kept)


def canonical_moe(cfg: ResolvedModel) -> Any:
  plain = MoEConfig()
  if not cfg.moe.num_experts:
    return ResolvedMoE(expert_width=cfg.ffn_width)
  return dataclasses.replace(
    cfg.moe,
    capacity_factor=None,  # decoding drops no token
    load_balance_weight=plain.load_balance_weight,
    router_z_weight=plain.router_z_weight,
    shared_gated=cfg.moe.shared_gated and cfg.moe.num_shared_experts > 0,
  )
