# SPDX-License-Identifier: Apache-2.0
"""Every knob of flaxlm and, here alone, its default.

An experiment is a `Config`: frozen dataclasses, one per concern, with typed and bounded
fields. It comes from a Python file that builds one (`load_config`), is changed on the
command line (`override`: `--optimizer.learning_rate=1e-3`), checked as a whole
(`Config.check`, which reports every mistake at once), and travels in a run directory
as JSON (`to_json`, `from_json`). Standard library only: importing this is instant.
"""

import dataclasses
import difflib
import json
import math
import runpy
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from flaxlm.errors import ConfigError

MESH_AXES = ("data", "fsdp", "tensor")


def knob(
  default: Any, text: str, low: float | None = None, high: float | None = None
) -> Any:
  """A field with its help text and, for numbers, its inclusive bounds."""
  metadata = {"help": text, "low": low, "high": high}
  if isinstance(default, dict):
    return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
  return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """The architecture: what the parameters are, and nothing about how they run."""

  family: Literal["decoder"] = knob("decoder", "kind of model")
  depth: int = knob(4, "number of blocks (L)", 1)
  width: int = knob(128, "model width (D)", 1)
  num_heads: int = knob(4, "query heads (N)", 1)
  num_kv_heads: int | None = knob(None, "key/value heads (K); none = num_heads", 1)
  head_dim: int | None = knob(None, "head dim (H); none = width / num_heads", 1)
  ffn_width: int | None = knob(
    None, "feed-forward width (F); none = 4 D, or 8/3 D when gated", 1
  )
  vocab_size: int | None = knob(
    None, "vocabulary (V); none = the tokenizer's, rounded up to a multiple of 64", 2
  )
  context: int = knob(256, "longest sequence the model takes, in tokens", 1)
  positions: Literal["rope", "learned", "sinusoidal", "none"] = knob(
    "rope", "positional encoding"
  )
  rope_theta: float = knob(10_000.0, "base of RoPE's wavelengths", 1)
  norm: Literal["rmsnorm", "layernorm"] = knob("rmsnorm", "normalisation")
  norm_placement: Literal["pre", "post"] = knob("pre", "norm before or after a branch")
  norm_epsilon: float = knob(1e-6, "added to the variance", 0)
  activation: Literal["gelu", "gelu_tanh", "silu", "relu"] = knob(
    "silu", "feed-forward nonlinearity"
  )
  gated: bool = knob(True, "gated feed-forward (SwiGLU with silu, GEGLU with gelu)")
  biased: bool = knob(False, "biases in the projections and the feed-forward")
  tied_embeddings: bool = knob(True, "the head is the embedding, transposed")
  window: int | None = knob(None, "sliding window, in tokens; none = all", 1)
  dropout: float = knob(0.0, "rate on embeddings and residual branches", 0, 0.999)

  def resolve(self, tokenizer_size: int | None = None) -> "ModelConfig":
    """Fills every `None` that has a rule, so that the modules see numbers only."""
    vocab_size = self.vocab_size
    if vocab_size is None and tokenizer_size is not None:
      # A multiple of 64 divides over a mesh and fills the vector units (nanoGPT's 50304).
      vocab_size = 64 * math.ceil(tokenizer_size / 64)
    ffn_width = 4 * self.width
    if self.gated:  # three matrices for two: 8/3 D keeps the parameters (Shazeer, 2020)
      ffn_width = 32 * math.ceil(8 * self.width / 3 / 32)
    return dataclasses.replace(
      self,
      num_kv_heads=self.num_kv_heads or self.num_heads,
      head_dim=self.head_dim or self.width // self.num_heads,
      ffn_width=self.ffn_width or ffn_width,
      vocab_size=vocab_size,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
  """How text becomes ids."""

  kind: Literal["byte", "bpe"] = knob("bpe", "byte: 256 ids; bpe: trained byte-level BPE")
  vocab_size: int = knob(4096, "ids of a trained tokenizer, specials included", 257)
  path: str | None = knob(None, "a tokenizer.json to use instead of training one")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """What is read, and how it is cut into batches."""

  corpus: str = knob("stdlib", "stdlib | files:GLOB | tfds:NAME[/CONFIG]")
  objective: Literal["next_token"] = knob("next_token", "what is predicted")
  seq_len: int = knob(256, "tokens in a row of a batch (T)", 1)
  batch_size: int = knob(16, "rows in a batch (B), over all devices", 1)
  num_epochs: int | None = knob(None, "passes over the corpus; none = no end", 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """The update rule and its schedule."""

  kind: Literal["adamw", "lion", "adafactor", "muon", "sgd"] = knob("adamw", "update rule")
  learning_rate: float = knob(1e-3, "peak learning rate", 0)
  schedule: Literal["cosine", "linear", "constant", "inverse_sqrt"] = knob(
    "cosine", "shape after the warm-up"
  )
  warmup_steps: int = knob(50, "steps of linear warm-up from 0", 0)
  final_fraction: float = knob(0.1, "cosine, linear: last rate / peak rate", 0, 1)
  weight_decay: float = knob(0.1, "decoupled decay, on matrices only", 0)
  beta1: float = knob(0.9, "decay of the first moment (sgd: momentum)", 0, 1)
  beta2: float = knob(0.95, "decay of the second moment", 0, 1)
  epsilon: float = knob(1e-8, "added to the denominator", 0)
  clip_norm: float | None = knob(1.0, "global gradient norm; none = no clipping", 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
  """How long, how often, and how the model runs; never what its parameters are."""

  num_steps: int = knob(1000, "optimizer steps", 0)
  accumulation_steps: int = knob(1, "micro-batches per step; they divide batch_size", 1)
  log_every_steps: int = knob(10, "steps per line of metrics", 1)
  eval_every_steps: int = knob(250, "steps between evaluations", 1)
  eval_batches: int | None = knob(None, "batches per evaluation; none = whole split", 1)
  dtype: Literal["float32", "bfloat16"] = knob("float32", "dtype of the computation")
  param_dtype: Literal["float32", "bfloat16"] = knob("float32", "dtype of parameters")
  remat: Literal["none", "dots", "full"] = knob(
    "none", "kept for the backward pass: all, matmul results, or only block inputs"
  )
  scanned: bool = knob(
    False, "one compiled block looped over (compiles faster, runs slower)"
  )
  sample_prompt: str = knob("", "continued for you when training ends")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  """What is stored, and what a second start does with it."""

  every_steps: int = knob(500, "steps between checkpoints; the last is always kept", 1)
  keep: int = knob(2, "newest checkpoints kept", 1)
  resume: Literal["auto", "must", "never"] = knob(
    "auto", "auto: go on if there is a checkpoint; must: or fail; never: start over"
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """One experiment."""

  name: str | None = knob(None, "run name; none = the config file's name")
  seed: int = knob(0, "of parameters, data order and dropout", 0, 2**31 - 1)
  runs_dir: str = knob("runs", "where run directories go")
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
  checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
  mesh: Mapping[str, int] = knob(
    {"data": -1}, "devices per mesh axis, as data=2,fsdp=4; one may be -1 (the rest)"
  )
  simulated_devices: int | None = knob(None, "CPU only: pretend to have this many", 1, 4096)

  @property
  def run_dir(self) -> Path:
    assert self.name is not None, "load_config names the run"
    return Path(self.runs_dir) / self.name

  def check(self) -> None:
    """Raises one `ConfigError` that lists every mistake."""
    mistakes = list(_wrong_types(self))
    if not mistakes:  # what follows compares and divides
      mistakes = [*_out_of_bounds(self), *_contradictions(self)]
    if mistakes:
      cures = [cure for _, cure in mistakes if cure]
      raise ConfigError("; ".join(cause for cause, _ in mistakes), "; ".join(cures))


def _wrong_types(cfg: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
  """(cause, cure) of every value that its field cannot hold: Python files are not typed."""
  for name, kind in typing.get_type_hints(type(cfg)).items():
    value = getattr(cfg, name)
    if dataclasses.is_dataclass(kind) and type(value) is kind:
      yield from _wrong_types(value, f"{prefix}{name}.")
    elif not _is_a(kind, value):
      choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
      wanted = ", ".join(choices) or getattr(kind, "__name__", str(kind))
      yield f"{prefix}{name} is {value!r}", f"{prefix}{name} can be {wanted}"


def _out_of_bounds(cfg: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
  """(cause, cure) of every number outside its field's bounds."""
  for field in dataclasses.fields(cfg):
    value, name = getattr(cfg, field.name), prefix + field.name
    if dataclasses.is_dataclass(value):
      yield from _out_of_bounds(value, f"{name}.")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
      low, high = field.metadata.get("low"), field.metadata.get("high")
      too_low = low is not None and value < low
      is_float = isinstance(value, float)
      unusable = not math.isfinite(value) if is_float else abs(value) >= 2**63
      if unusable or too_low or (high is not None and value > high):
        allowed = f"at least {low:g}" if high is None else f"from {low:g} to {high:g}"
        yield f"{name} is {value}", f"{name} can be {allowed}"


def _contradictions(cfg: Config) -> Iterator[tuple[str, str]]:
  """(cause, cure) of every pair of fields that cannot go together: the only such list."""
  model = cfg.model
  if model.head_dim is None and model.num_heads > 0 and model.width % model.num_heads:
    unit = model.num_heads * (2 if model.positions == "rope" else 1)  # RoPE takes pairs
    yield (
      f"model.width={model.width} is not a multiple of model.num_heads={model.num_heads}",
      f"nearest width: {_nearest_multiple(model.width, unit)}, or set model.head_dim",
    )
  kv_heads = model.num_kv_heads or model.num_heads
  if kv_heads > 0 and model.num_heads % kv_heads:
    divisors = [n for n in range(1, model.num_heads + 1) if model.num_heads % n == 0]
    yield (
      f"model.num_kv_heads={kv_heads} does not divide model.num_heads={model.num_heads}",
      f"model.num_kv_heads can be {', '.join(map(str, divisors))}",
    )
  head_dim = model.head_dim or model.width // max(1, model.num_heads)
  if model.positions == "rope" and head_dim % 2:
    yield f"RoPE rotates pairs, but the head dim is {head_dim}", "make it even"
  if model.positions == "sinusoidal" and model.width % 2:
    yield f"sinusoidal positions need an even model.width, not {model.width}", ""
  if cfg.data.seq_len > model.context:
    yield (
      f"data.seq_len={cfg.data.seq_len} is longer than model.context={model.context}",
      f"set --model.context={cfg.data.seq_len} or --data.seq_len={model.context}",
    )
  if cfg.training.accumulation_steps > 0 and (
    cfg.data.batch_size % cfg.training.accumulation_steps
  ):
    yield (
      f"data.batch_size={cfg.data.batch_size} is not a multiple of "
      f"training.accumulation_steps={cfg.training.accumulation_steps}",
      "",
    )
  if cfg.name is not None and (
    Path(cfg.name).name != cfg.name or cfg.name in ("", ".", "..")
  ):
    yield (
      f"name={cfg.name!r} is not a plain directory name",
      "use letters, digits, - and _",
    )
  yield from _mesh_mistakes(cfg.mesh)


def _nearest_multiple(number: int, of: int) -> int:
  return of * max(1, (2 * number + of) // (2 * of))


def _mesh_mistakes(mesh: Mapping[str, int]) -> Iterator[tuple[str, str]]:
  for axis, size in mesh.items():
    if axis not in MESH_AXES:
      yield f"unknown mesh axis {axis!r}", f"mesh axes are {', '.join(MESH_AXES)}"
    elif size != -1 and size < 1:
      yield f"mesh axis {axis}={size}", "a size is at least 1, or -1 for the rest"
  if sum(size == -1 for size in mesh.values()) > 1:
    yield "more than one mesh axis is -1", "only one axis can take the rest"


# -- Reading a config file and the command line ----------------------------------------


def load_config(name: str) -> Config:
  """The `config` that a Python file defines; `name` is a path, or a shipped experiment.

  Raises `ConfigError` when there is no such file, or it does not build a `Config`.
  """
  path = find_config(name)
  try:
    config = runpy.run_path(str(path)).get("config")
  except (Exception, SystemExit) as e:  # whatever a user's file may raise
    raise ConfigError(f"{path} failed: {type(e).__name__}: {e}") from e
  if not isinstance(config, Config):
    raise ConfigError(
      f"{path} does not define `config = Config(...)`", "see configs/stdlib_tiny.py"
    )
  return dataclasses.replace(config, name=config.name or path.stem)


def config_folders() -> list[Path]:
  """Where named experiments are looked for: here, beside the package, inside the wheel."""
  package = Path(__file__).parent
  folders = (Path("configs"), package.parent / "configs", package / "configs")
  return [folder for folder in folders if folder.is_dir()]


def find_config(name: str) -> Path:
  """The file of an experiment given by path or by name (`stdlib_tiny`)."""
  stem = name.removesuffix(".py")
  candidates = [Path(name)]
  candidates += [folder / f"{Path(stem).name}.py" for folder in config_folders()]
  for path in candidates:
    if _is_file(path):
      if path.suffix != ".py":
        raise ConfigError(f"{path} is not a Python config file", "see configs/")
      return path
  known = sorted({p.stem for folder in config_folders() for p in folder.glob("*.py")})
  near = difflib.get_close_matches(Path(stem).name, known, 1)
  cure = f"did you mean {near[0]}?" if near else f"shipped: {', '.join(known)}"
  raise ConfigError(f"no config file {name!r}", cure)


def _is_file(path: Path) -> bool:
  try:
    return path.is_file()
  except OSError:  # a name too long, a folder that we may not look into
    return False


def override(cfg: Config, arguments: Sequence[str]) -> Config:
  """`cfg` changed by `--section.field=value` or `--section.field value` arguments.

  Raises one `ConfigError` for all unknown names (with the nearest one) and wrong types.
  """
  mistakes: list[ConfigError] = []
  seen: dict[str, str] = {}
  remaining = list(arguments)
  while remaining:
    argument = remaining.pop(0)
    try:
      if not argument.startswith("--"):
        raise ConfigError(f"expected --section.field=value, got {argument!r}")
      name, equals, text = argument[2:].partition("=")
      name = name.replace("-", "_")
      kind = _field_type(name)
      if not equals:
        if kind is bool and (not remaining or remaining[0].startswith("--")):
          text = "true"
        elif remaining and not remaining[0].startswith("--"):
          text = remaining.pop(0)
        else:
          raise ConfigError(f"--{name} needs a value")
      if seen.get(name, text) != text:
        raise ConfigError(f"--{name} is given twice, as {seen[name]} and as {text}")
      seen[name] = text
      cfg = _replace(cfg, name.split("."), _parse(kind, text, name))
    except ConfigError as e:
      mistakes.append(e)
  if mistakes:
    cures = "; ".join(dict.fromkeys(e.cure for e in mistakes if e.cure))
    raise ConfigError("; ".join(e.cause for e in mistakes), cures)
  return cfg


def knobs(kind: Any = Config, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
  """(dotted name, type, dataclass field) of every leaf of the config."""
  hints = typing.get_type_hints(kind)
  for field in dataclasses.fields(kind):
    if dataclasses.is_dataclass(hints[field.name]):
      yield from knobs(hints[field.name], f"{prefix}{field.name}.")
    else:
      yield prefix + field.name, hints[field.name], field


def _field_type(name: str) -> Any:
  table = {path: kind for path, kind, _ in knobs()}
  if name in table:
    return table[name]
  last = name.split(".")[-1]
  near = [path for path in table if path.split(".")[-1] == last]
  if not near and "." not in name:  # --steps means --training.num_steps
    near = [path for path in table if last in path.split(".")[-1].split("_")]
    near = sorted(near, key=len)[:2]
  near = near or difflib.get_close_matches(name, table, 2, 0.6)
  cure = (
    f"did you mean --{' or --'.join(near)}?" if near else "flaxlm train --help lists all"
  )
  raise ConfigError(f"unknown option --{name}", cure)


def _replace(cfg: Any, path: list[str], value: Any) -> Any:
  if len(path) > 1:
    value = _replace(getattr(cfg, path[0]), path[1:], value)
  return dataclasses.replace(cfg, **{path[0]: value})


def _parse(kind: Any, text: str, name: str) -> Any:
  """The value of type `kind` that `text` spells."""
  arguments = typing.get_args(kind)
  if typing.get_origin(kind) is types.UnionType:
    if text.lower() == "none":
      return None
    return _parse(arguments[0], text, name)
  if typing.get_origin(kind) is Literal:
    if text in arguments:
      return text
    near = difflib.get_close_matches(text, arguments, 1)
    cure = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
      f"--{name}: {text!r} is not a choice", f"{cure}it can be {', '.join(arguments)}"
    )
  if typing.get_origin(kind) is Mapping:
    return parse_mesh(text)
  try:
    if kind is bool:
      return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
    if kind is int and not text.lstrip("+-").isdecimal():
      number = float(text)  # 1e4 is a fine way to write 10,000
      if not number.is_integer():
        raise ValueError
      return int(number)
    return kind(text)
  except (ValueError, KeyError, OverflowError):
    want = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
    raise ConfigError(f"--{name}: expected {want}, got {text!r}") from None


def parse_mesh(text: str) -> dict[str, int]:
  """`data=2,fsdp=4` -> {"data": 2, "fsdp": 4}."""
  mesh: dict[str, int] = {}
  for part in text.split(","):
    axis, _, size = part.partition("=")
    try:
      number = int(size)
    except ValueError:
      raise ConfigError(
        f"mesh {text!r}: {part!r} is not AXIS=SIZE", "as in data=2,fsdp=4"
      ) from None
    if axis in mesh:
      raise ConfigError(f"mesh {text!r} names {axis} twice")
    mesh[axis] = number
  mistakes = list(_mesh_mistakes(mesh))
  if mistakes:
    raise ConfigError(*mistakes[0])
  return mesh


# -- JSON ------------------------------------------------------------------------------


def to_json(cfg: Config) -> str:
  return json.dumps(dataclasses.asdict(cfg), indent=2) + "\n"


def from_json(text: str, origin: str) -> Config:
  """The inverse of `to_json`. `origin` names the text in errors."""
  try:
    return _from_dict(Config, json.loads(text, object_pairs_hook=_no_doubles))
  except (ValueError, TypeError, AttributeError, RecursionError) as e:
    raise ConfigError(f"{origin} is not a flaxlm config: {e}") from e


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  values = dict(pairs)
  if len(values) < len(pairs):
    names = [name for name, _ in pairs]
    raise ValueError(f"{max(names, key=names.count)} is there twice")
  return values


def _from_dict(kind: Any, values: dict[str, Any]) -> Any:
  hints = typing.get_type_hints(kind)
  unknown = set(values) - set(hints)
  if unknown:
    raise ValueError(f"unknown field {', '.join(sorted(unknown))}")
  for name, value in values.items():
    if dataclasses.is_dataclass(hints[name]):
      values = values | {name: _from_dict(hints[name], value)}
    elif not _is_a(hints[name], value):
      raise ValueError(f"{name} is {value!r}")
  return kind(**values)


def _is_a(kind: Any, value: Any) -> bool:
  origin, arguments = typing.get_origin(kind), typing.get_args(kind)
  if origin is types.UnionType:
    return any(_is_a(argument, value) for argument in arguments)
  if origin is Literal:
    return value in arguments
  if origin is Mapping:
    return isinstance(value, dict) and all(type(size) is int for size in value.values())
  if kind is float:
    return type(value) in (int, float)
  return type(value) is kind


def difference(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
  """{dotted name: (old, new)} of every leaf in which two configs differ."""
  changes: dict[str, tuple[Any, Any]] = {}
  for field in dataclasses.fields(old):
    before, after = getattr(old, field.name), getattr(new, field.name)
    if dataclasses.is_dataclass(before):
      changes |= difference(before, after, f"{prefix}{field.name}.")
    elif before != after:
      changes[prefix + field.name] = (before, after)
  return changes
