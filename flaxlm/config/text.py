# SPDX-License-Identifier: Apache-2.0
"""Configs as text: Python files, command-line overrides, JSON.

An experiment comes from a Python file that builds a `Config` (`load_config`), is changed
on the command line (`override`: `--optimizer.learning-rate=1e-3`), and is kept in a run
directory as JSON (`to_json`, `from_json`). Standard library only: importing is instant.
"""

import dataclasses
import difflib
import json
import re
import runpy
import traceback
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from flaxlm.config.fields import is_a, knobs
from flaxlm.config.mesh import parse_mesh
from flaxlm.config.schema import Config
from flaxlm.errors import ConfigError, FlaxLMError, first_line


def load_config(name: str) -> Config:
  """The `config` that a Python file defines; `name` is a path or a shipped experiment.

  Raises `ConfigError` when there is no such file, or it does not build a `Config`.
  """
  path = find_config(name)
  try:
    config = runpy.run_path(str(path)).get("config")
  except (Exception, SystemExit) as e:  # whatever a user's file may raise
    raise ConfigError(*_failure(path, e)) from e
  if not isinstance(config, Config):
    raise ConfigError(
      f"{path} does not define `config = Config(...)`", "see configs/stdlib_tiny.py"
    )
  return dataclasses.replace(config, name=config.name or path.stem)


def _failure(path: Path, error: BaseException) -> tuple[str, str]:
  """(cause, cure) of what a config file raised, with the line where it did."""
  frames = traceback.extract_tb(error.__traceback__)
  lines = [frame.lineno for frame in frames if frame.filename == str(path)]
  if isinstance(error, SyntaxError) and error.filename == str(path):
    lines = [error.lineno]
  place = f"{path}:{lines[-1]}" if lines else str(path)
  if isinstance(error, FlaxLMError):
    return f"{place}: {error.cause}", error.cure
  text = str(error)
  unknown = re.search(
    r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text
  )
  if isinstance(error, TypeError) and unknown:
    section, field = unknown.groups()
    return f"{place}: {section} has no field {field!r}", _suggest_field(section, field)
  return f"{place} failed: {type(error).__name__}: {first_line(error)}", ""


def _suggest_field(section: str, field: str) -> str:
  """What may have been meant by a field that the class `section` does not have."""
  sections = dict(_sections(Config))
  own = typing.get_type_hints(sections.get(section, Config))
  if near := difflib.get_close_matches(field, own, 1):
    return f"did you mean {near[0]}?"
  for other, kind in sections.items():
    if near := difflib.get_close_matches(field, typing.get_type_hints(kind), 1, 0.8):
      return f"did you mean {near[0]}, a field of {other}?"
  return "flaxlm train --help lists all"


def _sections(kind: Any) -> Iterator[tuple[str, Any]]:
  """(name, class) of a config class and of the sections within it."""
  yield kind.__name__, kind
  for hint in typing.get_type_hints(kind).values():
    if dataclasses.is_dataclass(hint):
      yield from _sections(hint)


def config_folders() -> list[Path]:
  """Where experiments are looked up: the working directory, the checkout, the wheel."""
  package = Path(__file__).parent.parent
  folders = (Path("configs"), package.parent / "configs", package / "configs")
  return [folder for folder in folders if folder.is_dir()]


def find_config(name: str) -> Path:
  """The file of an experiment given by path or by name (`stdlib_tiny`)."""
  stem = name.removesuffix(".py")
  candidates = [Path(name)]
  candidates += [folder / f"{Path(stem).name}.py" for folder in config_folders()]
  for path in candidates:
    if is_file(path):
      if path.suffix != ".py":
        raise ConfigError(f"{path} is not a Python config file", "see configs/")
      return path
  known = sorted({p.stem for folder in config_folders() for p in folder.glob("*.py")})
  near = difflib.get_close_matches(Path(stem).name, known, 1)
  cure = f"did you mean {near[0]}?" if near else f"shipped: {', '.join(known)}"
  raise ConfigError(f"no config file {name!r}", cure)


def is_shipped(name: str) -> bool:
  """Whether a config comes with the package: of those, a published model's is a card."""
  package = Path(__file__).parent.parent
  folder = find_config(name).resolve().parent
  return folder in ((package.parent / "configs").resolve(), package / "configs")


def is_file(path: Path) -> bool:
  """Whether there is a file; not if the name is too long, or its folder may not be read."""
  try:
    return path.is_file()
  except OSError:
    return False


def override(cfg: Config, arguments: Sequence[str]) -> Config:
  """`cfg` changed by `--section.field=value` or `--section.field value` arguments.

  Underscores in names may be written as hyphens.
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
      name = name.replace("-", "_")  # both spellings are accepted; we print hyphens
      kind = _field_type(name)
      if not equals:
        if kind is bool and (not remaining or remaining[0].startswith("--")):
          text = "true"
        elif remaining and not remaining[0].startswith("--"):
          text = remaining.pop(0)
        else:
          raise ConfigError(f"{flag(name)} needs a value")
      if seen.get(name, text) != text:
        raise ConfigError(f"{flag(name)} is given twice, as {seen[name]} and as {text}")
      seen[name] = text
      cfg = _replace(cfg, name.split("."), _parse(kind, text, name))
    except ConfigError as e:
      mistakes.append(e)
  if mistakes:
    cures = "; ".join(dict.fromkeys(e.cure for e in mistakes if e.cure))
    raise ConfigError("; ".join(e.cause for e in mistakes), cures)
  return cfg


def flag(name: str) -> str:
  """The flag that sets a field, as we print it: `--training.num-steps`."""
  return "--" + name.replace("_", "-")


def fields_in(arguments: Sequence[str]) -> set[str]:
  """The fields that arguments of a command line set, as `training.num_steps`."""
  flags = [argument[2:] for argument in arguments if argument.startswith("--")]
  return {text.partition("=")[0].replace("-", "_") for text in flags}


def without(arguments: Sequence[str], fields: Collection[str]) -> list[str]:
  """The arguments of a command line but for those that set one of `fields`."""
  kept: list[str] = []
  skipping = False  # the value of a field that is left out, as in `--name longer`
  for argument in arguments:
    if argument.startswith("--"):
      name, equals, _ = argument[2:].partition("=")
      leave_out = name.replace("-", "_") in fields
      skipping = leave_out and not equals
      if leave_out:
        continue
    elif skipping:
      skipping = False
      continue
    kept.append(argument)
  return kept


def _field_type(name: str) -> Any:
  table = {path: kind for path, kind, _ in knobs(Config)}
  if name in table:
    return table[name]
  last = name.split(".")[-1]
  near = [path for path in table if path.split(".")[-1] == last]
  if not near and "." not in name:  # --steps means --training.num-steps
    near = [path for path in table if last in path.split(".")[-1].split("_")]
    near = sorted(near, key=len)[:2]
  near = near or difflib.get_close_matches(name, table, 2, 0.6)
  cure = (
    f"did you mean {' or '.join(map(flag, near))}?"
    if near
    else "flaxlm train --help lists all"
  )
  raise ConfigError(f"unknown option {flag(name)}", cure)


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
      f"{flag(name)}: {text!r} is not a choice", f"{cure}it can be {', '.join(arguments)}"
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
    raise ConfigError(f"{flag(name)}: expected {want}, got {text!r}") from None


# -- JSON ------------------------------------------------------------------------------


def to_json(cfg: Config) -> str:
  return json.dumps(dataclasses.asdict(cfg), indent=2, allow_nan=False) + "\n"


def from_json(text: str, origin: str) -> Config:
  """The inverse of `to_json`. `origin` names the text in errors."""
  try:
    return _from_dict(Config, json.loads(text, object_pairs_hook=unique_keys))
  except (ValueError, TypeError, AttributeError, RecursionError) as e:
    raise ConfigError(f"{origin} is not a flaxlm config: {e}") from e


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """The object of a JSON text: a hook that raises `ValueError` for a repeated name."""
  values = dict(pairs)
  if len(values) < len(pairs):
    names = [name for name, _ in pairs]
    raise ValueError(f"{max(names, key=names.count)!r} appears twice")
  return values


def _from_dict(kind: Any, values: dict[str, Any]) -> Any:
  hints = typing.get_type_hints(kind)
  unknown = set(values) - set(hints)
  if unknown:
    raise ValueError(f"unknown field {', '.join(sorted(unknown))}")
  for name, value in values.items():
    if dataclasses.is_dataclass(hints[name]):
      values = values | {name: _from_dict(hints[name], value)}
    elif not is_a(hints[name], value):
      raise ValueError(f"{name} is {value!r}")
  return kind(**values)


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
