# SPDX-License-Identifier: Apache-2.0
"""What a field of a config is: its default, help text and bounds, and what it can hold."""

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

# The largest sizes that a config may ask for: far above what anybody trains, and below what
# would take the machine's memory before anything could look at it.
MOST_DEVICES = 4096
MOST_LAYERS = 1024
MOST_WIDTH = 2**18
MOST_FFN_WIDTH = 2**21
MOST_IDS = 2**24
MOST_TOKENS = 2**27
MOST_ROWS = 2**24
MOST_STEPS = 2**31 - 1  # steps are counted in int32
MOST_SECONDS = 1e7  # longer times overflow timers


def knob(
  default: Any, text: str, low: float | None = None, high: float | None = None
) -> Any:
  """A field with its help text and, for numbers, its inclusive bounds."""
  metadata = {"help": text, "low": low, "high": high}
  if isinstance(default, dict):
    return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
  return dataclasses.field(default=default, metadata=metadata)


def is_a(kind: Any, value: Any) -> bool:
  """Whether a field of type `kind` can hold `value`."""
  origin, arguments = typing.get_origin(kind), typing.get_args(kind)
  if origin is types.UnionType:
    return any(is_a(argument, value) for argument in arguments)
  if origin is Literal:
    return value in arguments
  if origin is Mapping:
    return isinstance(value, dict) and all(type(n) in (int, str) for n in value.values())
  if kind is float:
    return type(value) in (int, float)
  return type(value) is kind


def knobs(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
  """(dotted name, type, dataclass field) of every leaf of a config class."""
  hints = typing.get_type_hints(kind)
  for field in dataclasses.fields(kind):
    if dataclasses.is_dataclass(hints[field.name]):
      yield from knobs(hints[field.name], f"{prefix}{field.name}.")
    else:
      yield prefix + field.name, hints[field.name], field


def fields_of(instance: Any) -> dict[str, Any]:
  """{name: value} of a dataclass; nested dataclasses are not converted."""
  return {
    field.name: getattr(instance, field.name) for field in dataclasses.fields(instance)
  }
