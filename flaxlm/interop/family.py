# SPDX-License-Identifier: Apache-2.0
"""A family of checkpoints: its table of weights and its table of settings."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from flaxlm.config import (
  OBJECTIVES,
  Config,
  DataConfig,
  ModelConfig,
  MoEConfig,
  ResolvedModel,
  ResolvedMoE,
  ResolvedRope,
  check_config,
  difference,
)
from flaxlm.errors import CheckpointError, ConfigError
from flaxlm.interop.layouts import Shape, Weight
from flaxlm.interop.safetensors import MAX_TENSORS
from flaxlm.interop.settings import (
  SCALINGS,
  Row,
  fixed_base,
  read_fields,
  rotary_dims,
  rotary_fraction,
  shortest_period,
  write_keys,
)
from flaxlm.interop.values import Values

Table = tuple[Weight, ...]


@dataclasses.dataclass(frozen=True)
class Family:
  """One kind of Hugging Face checkpoint.

  model_type: as in config.json.
  architectures: its classes. We write the first, which has a language model's head.
  weights: its table of weights, or a function that makes one for a model. Rows for
    parameters that a model does not have are ignored.
  settings: its table of settings. It need not refuse to write what the family cannot
    express: `keys` reads what was written, and compares.
  prefix: of every name except the head's. Files saved from the model without its head
    leave it out.
  renamed: pairs of name endings, (older, newer).
  tied: (name, twin): a file may hold both tensors, which are the same.
  ignored: regular expressions for tensors that are not parameters.
  inner: the key of the object with the settings, where config.json has several models. Such
    a family is only read.
  """

  model_type: str
  architectures: tuple[str, ...]
  weights: Table | Callable[[ResolvedModel], Table]
  settings: tuple[Row, ...]
  prefix: str
  renamed: tuple[tuple[str, str], ...] = ()
  tied: tuple[tuple[str, str], ...] = ()
  ignored: tuple[str, ...] = ()
  inner: str | None = None

  def ignores(self, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in self.ignored)

  def read(self, hf: Values) -> ModelConfig:
    """The model of a config.json, not checked yet. Raises `CheckpointError`."""
    if self.inner is None:
      return read_fields(self.settings, hf)
    if not hf.values.get(self.inner):
      raise hf.refused(self.inner, "it is an object")
    return read_fields(self.settings, hf.inner(self.inner))

  def keys(self, cfg: ResolvedModel, names: tuple[str, ...]) -> dict[str, Any]:
    """The config.json of our model `cfg`; `names` are those of its tensors in the file.

    Raises `CheckpointError`, with the fields that this family cannot express.
    """
    if self.inner is not None:
      raise CheckpointError(f"{self.model_type} has image input, which flaxlm lacks")
    keys = {"model_type": self.model_type, **write_keys(self.settings, cfg.resolve())}
    written = Values(keys, self.model_type, names)
    theirs = read_config(self, written)
    pairs = difference(canonical(cfg), canonical(theirs), "model.")
    misfits = [
      f"{name}={ours}" for name, (ours, theirs) in pairs.items() if not close(ours, theirs)
    ]
    if misfits:
      raise CheckpointError(
        f"{self.model_type} has no place for {', '.join(misfits)}",
        f"exported as {self.model_type}, it would be a different model",
      )
    return keys

  def expected(
    self, cfg: ResolvedModel, shapes: Mapping[str, Shape]
  ) -> dict[str, tuple[Weight, tuple[int, ...], Shape]]:
    """{name of their tensor: (row of the table, index in our stacked array, its shape)}.

    `shapes` are those of our parameters. Raises `CheckpointError` if one has no row.
    """
    table = self.weights(cfg) if callable(self.weights) else self.weights
    table = tuple(row for row in table if row.applies(shapes))
    unmapped = shapes.keys() - {path for row in table for path in row.ours}
    if unmapped:
      raise CheckpointError(
        f"{self.model_type} has no place for the parameters {', '.join(sorted(unmapped))}"
      )
    return {
      name: (row, place, shape)
      for row in table
      for name, shape, place in row.tensors(shapes)
    }


def read_config(family: Family, hf: Values) -> ResolvedModel:
  """The checked model config of a config.json. Raises `CheckpointError`."""
  cfg = family.read(hf)
  try:
    data = DataConfig(objective=OBJECTIVES[cfg.family], seq_len=1)  # type: ignore[arg-type]
    check_config(Config(model=cfg, data=data))
  except ConfigError as e:
    raise CheckpointError(f"{hf.origin}: {e.cause}", e.cure) from e
  count = cfg.depth * max(1, cfg.moe.num_experts)
  if count > MAX_TENSORS:
    raise CheckpointError(f"{hf.origin}: {count} feed-forwards", f"at most {MAX_TENSORS}")
  return cfg.resolve()


def causal(
  model_type: str,
  name: str,
  weights: Table | Callable[[ResolvedModel], Table],
  settings: tuple[Row, ...],
  embedding: str,
  head: str = "lm_head",
  suffix: str = "ForCausalLM",
  ignored: tuple[str, ...] = (),
) -> Family:
  """The family of a decoder.

  `name` is that of its classes, `embedding` and `head` are modules, which may be tied.
  """
  return Family(
    model_type,
    (f"{name}{suffix}", f"{name}Model"),
    weights,
    settings,
    prefix=embedding.partition(".")[0] + ".",
    tied=((f"{head}.weight", f"{embedding}.weight"),),
    ignored=ignored,
  )


# -- Comparing models ----------------------------------------------------------------------


def close(ours: Any, theirs: Any) -> bool:
  """Whether two values are the same but for rounding, as in JSON and other libraries."""
  if not isinstance(ours, float) or not isinstance(theirs, float):
    return ours == theirs
  return math.isclose(ours, theirs, rel_tol=1e-6)


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
  plain = ResolvedRope(original_context=cfg.context)
  if cfg.positions != "rope":
    return plain
  share = rotary_fraction(rotary_dims(cfg), cfg.head_dim)
  rope = dataclasses.replace(fixed_base(cfg), fraction=share)
  if rope.scaling == "yarn" and rope.attention_factor is None and rope.factor != 1:
    rope = dataclasses.replace(rope, attention_factor=0.1 * math.log(rope.factor) + 1)
  scaled = rope.scaling != "none" and (
    rope.factor != 1 or rope.attention_factor is not None
  )
  names = ["theta", "fraction"]
  if "L" in cfg.period and (scaled or rope.local_theta != rope.theta):
    names.append("local_theta")
  if scaled:
    names.append("scaling")
    names += [row.ours.removeprefix("rope.") for row in SCALINGS[rope.scaling]]
  return dataclasses.replace(plain, **{name: getattr(rope, name) for name in names})


def canonical_moe(cfg: ResolvedModel) -> ResolvedMoE:
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
