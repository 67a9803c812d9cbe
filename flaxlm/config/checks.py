# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a config: every mistake at once, each with its cure."""

import dataclasses
import functools
import math
import operator
import re
import reprlib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from flaxlm.config.fields import is_a
from flaxlm.config.mesh import mesh_mistakes
from flaxlm.config.model import OBJECTIVES, TALKS, ModelConfig
from flaxlm.config.schema import Config
from flaxlm.errors import ConfigError

LEAST_WORDPIECES = 2 * 256 + 1  # and the end of a text
MOST_DIVISORS = 10_000  # that are tried, to name one that works
MOST_NAME_BYTES = 200  # of a run's name: file systems take 255, and some names get longer


def check_config(cfg: Config) -> None:
  """Raises one `ConfigError` that lists every mistake."""
  mistakes = list(_wrong_types(cfg))
  if not mistakes:  # what follows compares and divides
    mistakes = [*_out_of_bounds(cfg), *_unprintable(cfg), *_contradictions(cfg)]
  _refuse(mistakes)


def check_types(cfg: Config) -> None:
  """The same of the types alone, which a Python file may have wrong."""
  if not isinstance(cfg, Config):
    raise ConfigError(f"the config is {reprlib.repr(cfg)}", "use a Config of flaxlm.config")
  _refuse(list(_wrong_types(cfg)))


def check_model(cfg: Config) -> None:
  """The same of the model alone: how else a stored run was trained is no obstacle."""
  mistakes = list(_wrong_types(cfg.model, "model."))
  if not mistakes:
    mistakes = [*_out_of_bounds(cfg.model, "model.")]
    mistakes += [*_model_contradictions(cfg), *_head_contradictions(cfg)]
  _refuse(mistakes)


def _refuse(mistakes: list[tuple[str, str]]) -> None:
  if mistakes:
    cures = [cure for _, cure in mistakes if cure]
    raise ConfigError("; ".join(cause for cause, _ in mistakes), "; ".join(cures))


def _wrong_types(cfg: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
  """(cause, cure) of every value whose type does not fit: Python files are not checked."""
  for name, kind in typing.get_type_hints(type(cfg)).items():
    value = getattr(cfg, name)
    if dataclasses.is_dataclass(kind) and isinstance(value, typing.cast(type, kind)):
      yield from _wrong_types(value, f"{prefix}{name}.")
    elif not is_a(kind, value):
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
      # float32 holds no larger ones.
      unusable = not abs(value) <= 3e38 if is_float else abs(value) >= 2**63
      if unusable or too_low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"from {low} to {high}"
        yield f"{name} is {value}", f"{name} can be {allowed}"


def _unprintable(cfg: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
  """(cause, cure) of every text with characters that no name or path should have: control
  characters, and bytes that are not UTF-8. A prompt may have ends of lines."""
  for field in dataclasses.fields(cfg):
    value, name = getattr(cfg, field.name), prefix + field.name
    if dataclasses.is_dataclass(value):
      yield from _unprintable(value, f"{name}.")
    elif isinstance(value, str):
      blanks = "\n\t" if name == "training.sample_prompt" else ""
      if not all(letter.isprintable() or letter in blanks for letter in value):
        yield f"{name} is {reprlib.repr(value)}", f"{name} has a control character"


def _is_plain(name: str) -> bool:
  """Whether a run's name can be that of a folder."""
  is_one = Path(name).name == name and name not in ("", ".", "..")
  return is_one and len(name.encode("utf-8", "replace")) <= MOST_NAME_BYTES


def _contradictions(cfg: Config) -> Iterator[tuple[str, str]]:
  """(cause, cure) of every pair of fields that cannot go together: the only such list."""
  named = functools.partial(_named, cfg)
  yield from _model_contradictions(cfg)
  yield from _head_contradictions(cfg)
  objective = OBJECTIVES[cfg.model.family]
  more = (*TALKS, "reward") if objective == "next_token" else ()
  learnt = (objective, *more)
  if cfg.data.objective not in learnt:
    yield (
      f"{named('model.family')} cannot learn {named('data.objective')}",
      f"set --data.objective={objective}",
    )
  if cfg.data.objective in (*TALKS, "reward") and cfg.data.deduplicate != "none":
    yield (
      f"{named('data.deduplicate')} is for documents, not for conversations",
      "leave it out",
    )
  if cfg.data.objective == "preference" and cfg.training.label_smoothing:
    yield (
      f"{named('training.label_smoothing')} is of tokens, not of preferences",
      f"--dpo.label-smoothing={cfg.training.label_smoothing}",
    )
  least = LEAST_WORDPIECES + (cfg.data.objective == "masked")
  trained = cfg.tokenizer.path is None
  if trained and cfg.tokenizer.kind == "wordpiece" and cfg.tokenizer.vocab_size < least:
    yield (
      f"{named('tokenizer.vocab_size')} has no room for the alphabet of wordpiece, each "
      "byte at the beginning and inside of a word",
      f"tokenizer.vocab_size can be from {least}",
    )
  if cfg.data.objective == "reward":
    yield from _reward_contradictions(cfg)
  # The context of a run that training begins from is what it is.
  longer = lambda to: "" if cfg.init is not None else f"--model.context={to} or "
  if cfg.data.seq_len > cfg.model.context:
    yield (
      f"{named('data.seq_len')} is longer than {named('model.context')}",
      f"set {longer(cfg.data.seq_len)}--data.seq-len={cfg.model.context}",
    )
  if cfg.data.source_len is not None and cfg.data.source_len > cfg.model.context:
    yield (
      f"{named('data.source_len')} is longer than {named('model.context')}",
      f"set {longer(cfg.data.source_len)}--data.source-len={cfg.model.context}",
    )
  for whole, part in (
    ("data.batch_size", "training.accumulation_steps"),
    ("data.seq_len", "training.loss_chunks"),
  ):
    parts = operator.attrgetter(part)(cfg)
    if parts > 0 and operator.attrgetter(whole)(cfg) % parts:
      yield f"{named(whole)} is not a multiple of {named(part)}", ""
  narrow = cfg.training.matmul != "full"
  if narrow and (cfg.model.family == "rnn" or cfg.model.moe.num_experts):
    has = "an RNN" if cfg.model.family == "rnn" else "experts"
    yield (
      f"{named('training.matmul')} is for a transformer's projections, not for {has}",
      "--training.matmul=full",
    )
  if cfg.init_optimizer and cfg.lora.rank:
    yield (
      f"init_optimizer has no moments of adapters, which {named('lora.rank')} begins anew",
      "leave out --init-optimizer",
    )
  try:
    re.compile(cfg.lora.targets)
  except re.error as e:
    yield f"lora.targets={cfg.lora.targets!r} is no regular expression: {e}", ""
  if str(cfg.mesh.get("context", 1)) != "1" and cfg.model.family == "rnn":
    yield "mesh axis context cannot split the rows that an RNN reads", "leave it out"
  if cfg.name is not None and not _is_plain(cfg.name):
    yield (
      f"name={reprlib.repr(cfg.name)} is not a plain directory name",
      "use letters, digits, - and _",
    )
  yield from mesh_mistakes(cfg.mesh)


def _reward_contradictions(cfg: Config) -> Iterator[tuple[str, str]]:
  named, size = functools.partial(_named, cfg), cfg.reward.num_samples
  if cfg.data.batch_size % size:
    yield (
      f"{named('data.batch_size')} is not a multiple of {named('reward.num_samples')}",
      f"nearest: {max(1, round(cfg.data.batch_size / size)) * size}",
    )
  if cfg.reward.max_new_tokens >= cfg.data.seq_len:
    yield (
      f"{named('reward.max_new_tokens')} leaves no room for a prompt in "
      f"{named('data.seq_len')}",
      "lower it, or raise --data.seq-len",
    )
  if cfg.training.label_smoothing:
    yield (
      f"{named('training.label_smoothing')} has no meaning for rewards",
      "leave it out",
    )


def _named(cfg: Config, name: str) -> str:
  return f"{name}={operator.attrgetter(name)(cfg)}"


def _model_contradictions(cfg: Config) -> Iterator[tuple[str, str]]:
  model, named = cfg.model, functools.partial(_named, cfg)
  if model.num_ids is not None and model.num_ids > (model.vocab_size or 0):
    yield (
      f"{named('model.num_ids')} is more than {named('model.vocab_size')}",
      "it is for a vocabulary with padding: leave it out",
    )
  if model.positions == "sinusoidal" and model.width % 2:
    yield f"sinusoidal positions need an even model.width, not {model.width}", ""
  if model.layer_pattern is not None and not set(model.layer_pattern) <= {"L", "G"}:
    yield f"model.layer_pattern={model.layer_pattern!r}", "use only L and G, as in LLLLLG"
  if model.layer_pattern == "":
    yield "model.layer_pattern is empty", "leave it out, or set it to none"
  if "L" in (model.layer_pattern or "") and model.window is None:
    yield (
      "model.layer_pattern has local layers, but there is no window",
      "set --model.window",
    )
  rope = model.rope
  if rope.scaling in ("yarn", "llama3") and rope.fast_turns <= rope.slow_turns:
    yield (
      f"{named('model.rope.fast_turns')} is not more than {named('model.rope.slow_turns')}",
      "llama3 has 4 and 1, yarn 32 and 1",
    )
  if model.parallel != "none" and model.family == "encoder_decoder":
    yield (
      f"{named('model.parallel')} leaves an encoder_decoder no cross-attention",
      "--model.parallel=none",
    )
  if model.parallel != "none" and model.norm_placement != "pre":
    yield (
      f"{named('model.parallel')} with {named('model.norm_placement')}",
      "parallel branches need pre-norm: --model.norm-placement=pre",
    )
  if model.moe.experts_per_token > model.moe.num_experts > 0:
    yield (
      f"{named('model.moe.experts_per_token')} is more than "
      f"{named('model.moe.num_experts')}",
      f"model.moe.experts_per_token can be 1 to {model.moe.num_experts}",
    )
  if model.family == "rnn":
    default, others = ModelConfig(), ("norm_placement", "embedding_norm", "layer_pattern")
    for name in ("moe.num_experts", "parallel", *others):
      field = operator.attrgetter(name)
      if field(model) != field(default):
        yield f"model.{name} is for transformers only", "leave it out: model.family=rnn"
  if model.family != "encoder" and (model.num_token_types or model.pooler):
    yield "model.num_token_types and model.pooler are for encoders only", ""


def _head_contradictions(cfg: Config) -> Iterator[tuple[str, str]]:
  model, named = cfg.model, functools.partial(_named, cfg)
  if model.head_dim is None and model.num_heads > 0 and model.width % model.num_heads:
    unit = model.num_heads * (2 if model.positions == "rope" else 1)  # RoPE takes pairs
    nearest = unit * max(1, (2 * model.width + unit) // (2 * unit))
    yield (
      f"{named('model.width')} is not a multiple of {named('model.num_heads')}",
      f"nearest width: {nearest}, or set model.head_dim",
    )
  kv_heads = model.num_kv_heads or model.num_heads
  if min(kv_heads, model.num_heads) > 0 and model.num_heads % kv_heads:
    small = range(1, 1 + min(MOST_DIVISORS, math.isqrt(model.num_heads)))
    below = {n for n in small if model.num_heads % n == 0}
    divisors = sorted(below | {model.num_heads // n for n in below})
    yield (
      f"model.num_kv_heads={kv_heads} does not divide {named('model.num_heads')}",
      f"model.num_kv_heads can be {', '.join(map(str, divisors))}",
    )
  head_dim = model.head_dim or model.width // max(1, model.num_heads)
  if model.positions == "rope" and head_dim % 2:
    yield f"RoPE rotates pairs, but the head dim is {head_dim}", "make it even"
