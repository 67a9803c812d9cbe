# SPDX-License-Identifier: Apache-2.0
"""Tables of settings: how the keys of a config.json correspond to fields of `ModelConfig`.

A table is a tuple of rows. Each row can read (their values become our fields) and write
(our config becomes their keys), so that one table serves import and export. Our fields have
dotted names, as in `rope.theta`. If two rows have the same field or key, the later one
counts, so that a family's table can begin with that of another.
"""

import dataclasses
import functools
import math
import operator
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flax.traverse_util import unflatten_dict

from flaxlm.config import ModelConfig, MoEConfig, ResolvedModel, RopeConfig, knobs
from flaxlm.errors import CheckpointError
from flaxlm.interop.values import REQUIRED, Values, shown

MOST_LAYERS = 10_000

Fields = dict[str, Any]  # of ours, by their dotted names
Keys = dict[str, Any]  # of a config.json

KINDS = {name: kind for name, kind, _ in knobs(ModelConfig)}
_UNSET = object()


# -- Rows ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Key:
  """A key and a field that have the same value.

  default: for a file where the key is missing or null. By default it is what an earlier row
    has found for the field, or else None if the field can be None; other keys are required.
  nullable: null is a value, and the default is only for a file without the key.
  older: the name of the key in older files, which is only read.
  """

  theirs: str
  ours: str
  default: Any = _UNSET
  nullable: bool = False
  older: str = ""

  def read(self, hf: Values, found: Fields) -> Fields:
    kind, *others = typing.get_args(KINDS[self.ours]) or (KINDS[self.ours],)
    default = self.default
    if default is _UNSET:
      default = found.get(self.ours, None if others else REQUIRED)
    if self.nullable and self.theirs in hf.values:
      default = None
    if self.older and hf.values.get(self.theirs) is None:
      default = hf.get(kind, self.older, default)
    return {self.ours: hf.get(kind, self.theirs, default)}

  def write(self, cfg: ResolvedModel) -> Keys:
    value = operator.attrgetter(self.ours)(cfg)
    # Our config files say 30 where 30.0 is meant; transformers refuses a whole number.
    kinds = typing.get_args(KINDS[self.ours]) or (KINDS[self.ours],)
    return {self.theirs: float(value) if value is not None and float in kinds else value}


@dataclasses.dataclass(frozen=True)
class Choice:
  """A key whose values stand for fields of ours: {their value: {our field: value}}.

  Of several values that stand for the same, the first is written.
  """

  theirs: str
  choices: Mapping[Any, Fields]
  default: Any

  def read(self, hf: Values, found: Fields) -> Fields:
    value = hf.get(type(self.default), self.theirs, self.default)
    if value not in self.choices:
      raise hf.refused(self.theirs, f"use one of {', '.join(map(str, self.choices))}")
    return dict(self.choices[value])

  def write(self, cfg: ResolvedModel) -> Keys:
    for theirs, fields in self.choices.items():
      if all(getattr(cfg, name) == value for name, value in fields.items()):
        return {self.theirs: theirs}
    return {self.theirs: self.default}


@dataclasses.dataclass(frozen=True)
class Rule:
  """A row of two functions, for all that is not one key and one field.

  `read` also gets the fields that earlier rows have found.
  """

  read: Callable[[Values, Fields], Fields] = lambda hf, found: {}
  write: Callable[[ResolvedModel], Keys] = lambda cfg: {}


Row = Key | Choice | Rule


def ours(**fields: Any) -> Rule:
  """Fields that all models of a family have in common, and for which there is no key."""
  return Rule(read=lambda hf, found: fields)


def written(**keys: Any) -> Rule:
  """Keys that are only written."""
  return Rule(write=lambda cfg: keys)


def fixed(**keys: Any) -> Rule:
  """Keys for which flaxlm supports one value, the default; any other is refused."""

  def read(hf: Values, found: Fields) -> Fields:
    hf.demand(**keys)
    return {}

  return Rule(read, lambda cfg: keys)


def defaults(rows: tuple[Row, ...], **values: Any) -> tuple[Row, ...]:
  """`rows` with other defaults, by their keys."""
  return tuple(
    dataclasses.replace(row, default=values[row.theirs])
    if isinstance(row, Key | Choice) and row.theirs in values
    else row
    for row in rows
  )


# -- The engine ----------------------------------------------------------------------------


def read_fields(rows: tuple[Row, ...], hf: Values) -> ModelConfig:
  """The model of a config.json, not checked yet. Raises `CheckpointError`."""
  found: Fields = {}
  for row in rows:
    found |= row.read(hf, found)
    depth = max(found.get(name) or 0 for name in ("depth", "encoder_depth"))
    if depth > MOST_LAYERS:
      raise CheckpointError(f"{hf.origin}: {depth} layers", f"at most {MOST_LAYERS}")
  fields = unflatten_dict(found, sep=".")
  for name, kind in (("rope", RopeConfig), ("moe", MoEConfig)):
    fields[name] = kind(**fields.get(name, {}))
  return ModelConfig(**fields)


def write_keys(rows: tuple[Row, ...], cfg: ResolvedModel) -> Keys:
  """The inverse of `read_fields`; it leaves out what the rows have no key for."""
  return {key: value for row in rows for key, value in row.write(cfg).items()}


# -- Keys that most families have ----------------------------------------------------------

SIZES = (
  Key("vocab_size", "vocab_size", REQUIRED),
  Key("hidden_size", "width"),
  Key("num_hidden_layers", "depth"),
  Key("num_attention_heads", "num_heads"),
  Key("max_position_embeddings", "context", 2048),
)

ACTIVATIONS: Mapping[str, Fields] = {
  "gelu": {"activation": "gelu"},
  "gelu_pytorch_tanh": {"activation": "gelu_tanh"},
  "gelu_new": {"activation": "gelu_tanh"},
  "gelu_fast": {"activation": "gelu_tanh"},
  "silu": {"activation": "silu"},
  "swish": {"activation": "silu"},
  "relu": {"activation": "relu"},
}


# -- RoPE ----------------------------------------------------------------------------------

ORIGINAL, PARTIAL = "original_max_position_embeddings", "partial_rotary_factor"
FACTOR = Key("factor", "rope.factor", REQUIRED)
# The keys of each kind of scaling.
SCALINGS: Mapping[str, tuple[Key, ...]] = {
  "default": (),
  "linear": (FACTOR,),
  "llama3": (
    FACTOR,
    Key(ORIGINAL, "rope.original_context"),
    Key("low_freq_factor", "rope.slow_turns", REQUIRED),
    Key("high_freq_factor", "rope.fast_turns", REQUIRED),
  ),
  "yarn": (
    FACTOR,
    Key(ORIGINAL, "rope.original_context"),
    Key("beta_slow", "rope.slow_turns", 1.0),
    Key("beta_fast", "rope.fast_turns", 32.0),
    Key("attention_factor", "rope.attention_factor"),
  ),
}


def read_rope(
  hf: Values, found: Fields, partial: bool = False, supported: Iterable[str] = SCALINGS
) -> Fields:
  """RoPE, from newer files (rope_parameters) or older ones (rope_theta and others).

  `partial`: the family reads partial_rotary_factor. Of the others, transformers rotates
  whole heads whatever stands there, and other programs do not, so it is refused.
  """
  scaling = hf.inner("rope_scaling", "rope_parameters")
  both = Values({**hf.values, **scaling.values}, hf.origin)
  theta = both.get(float, "rope_theta", found.get("rope.theta", 10_000.0))
  if theta <= 1:
    raise both.refused("rope_theta", "it must be more than 1")
  size = head_dim(hf, found)
  share = both.get(float, PARTIAL, found.get("rope.fraction", 1.0))
  if share != 1 and not partial:
    raise both.refused(
      PARTIAL, "this family rotates whole heads: remove it, or set it to 1"
    )
  fields = {"rope.theta": theta, "rope.fraction": rotary_fraction(int(size * share), size)}
  kind = scaling.get(str, "rope_type", scaling.get(str, "type", "default"))
  if kind not in supported:
    raise CheckpointError(
      f"{hf.origin}: RoPE scaling {shown(kind)} is not supported",
      f"supported: {', '.join(supported)}",
    )
  if kind != "default":
    fields["rope.scaling"] = kind
  if kind == "llama3":
    slow = scaling.get(float, "low_freq_factor")
    if slow <= 0:
      raise scaling.refused("low_freq_factor", "it must be positive")
    if scaling.get(float, "high_freq_factor") <= slow:
      raise scaling.refused("high_freq_factor", f"it must be more than {slow}")
  if kind == "yarn":
    scaling.demand(mscale=None, mscale_all_dim=None, truncate=True)
    # transformers takes 0 for a missing value.
    given = {k: v for k, v in scaling.values.items() if v or not k.startswith("beta_")}
    scaling = Values(given, scaling.origin)
  if kind in ("llama3", "yarn"):
    context = hf.get(int, ORIGINAL, scaling.get(int, ORIGINAL, found["context"]))
    scaling = Values({**scaling.values, ORIGINAL: context}, scaling.origin)
  for row in SCALINGS[kind]:
    fields |= row.read(scaling, fields)
  return fields


def write_rope(cfg: ResolvedModel) -> Keys:
  """RoPE in the keys that all versions of transformers read, but for a partial rotation."""
  rope = fixed_base(cfg)
  scaling = None
  if rope.scaling != "none":
    keys = write_keys(SCALINGS[rope.scaling], cfg)
    scaling = {"rope_type": rope.scaling}
    scaling |= {key: value for key, value in keys.items() if value is not None}
  return {"rope_theta": float(rope.theta), "rope_scaling": scaling}


def write_partial_rope(cfg: ResolvedModel) -> Keys:
  share = rotary_fraction(rotary_dims(cfg), cfg.head_dim)
  return {**write_rope(cfg), **({} if share == 1 else {PARTIAL: share})}


def partial_rope(*supported: str) -> Rule:
  """`ROPE` for a family that may rotate a part of each head, with these scalings."""
  read = functools.partial(read_rope, partial=True, supported=("default", *supported))
  return Rule(read, write_partial_rope)


ROPE = Rule(read_rope, write_rope)
PARTIAL_ROPE = partial_rope("linear", "llama3", "yarn")


def replaced(rows: tuple[Row, ...], old: Row, *new: Row) -> tuple[Row, ...]:
  """`rows` with others in the place of one of them."""
  return tuple(row for each in rows for row in (new if each is old else (each,)))


def fixed_base(cfg: ResolvedModel) -> RopeConfig:
  """RoPE without ntk scaling, which by a fixed factor is the same as a larger base."""
  rope = cfg.rope
  if rope.scaling != "ntk":
    return rope
  num_dims = rotary_dims(cfg)
  theta = rope.theta * rope.factor ** (num_dims / max(1, num_dims - 2))
  return dataclasses.replace(rope, scaling="none", theta=theta)


def head_dim(hf: Values, found: Fields) -> int:
  """The head dim of a model of which only these fields are known, and not checked."""
  width, heads = found["width"], found["num_heads"]
  given = found.get("head_dim")
  if not given and (heads < 1 or width < heads or width % heads):
    raise CheckpointError(f"{hf.origin}: {heads} heads cannot share a width of {width}")
  return given or width // heads


def rotary_dims(cfg: ResolvedModel) -> int:
  """How many dims of a head are rotated, as `nn.positions` computes it."""
  return 2 * int(cfg.head_dim * cfg.rope.fraction / 2)


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


# -- Windows -------------------------------------------------------------------------------

LAYER_KINDS = {"full_attention": "G", "sliding_attention": "L"}


def layer_pattern(hf: Values, depth: int, default: str) -> str:
  """The shortest pattern of L and G from their layer_types, or else from `default`, which
  is repeated over the layers."""
  kinds = hf.values.get("layer_types")
  if kinds is None:
    return shortest_period((default * depth)[:depth])
  if not isinstance(kinds, list) or len(kinds) != depth:
    raise CheckpointError(f"{hf.origin}: layer_types is not a list of {depth} kinds")
  for kind in kinds:
    if not isinstance(kind, str) or kind not in LAYER_KINDS:
      raise CheckpointError(
        f"{hf.origin}: layer_types has {shown(kind)}",
        f"supported: {', '.join(LAYER_KINDS)}",
      )
  return shortest_period("".join(LAYER_KINDS[kind] for kind in kinds))


def layer_types(cfg: ResolvedModel) -> list[str]:
  """Their name for the kind of each layer."""
  names = {ours: theirs for theirs, ours in LAYER_KINDS.items()}
  return [names[kind] for kind in cfg.layer_kinds()]


def shortest_period(kinds: str) -> str:
  """The shortest string that gives `kinds` when it is repeated and cut to its length."""
  sizes = range(1, len(kinds))
  whole = (kinds[:size] for size in sizes if kinds.startswith(kinds[size:]))
  return next(whole, kinds)
