# SPDX-License-Identifier: Apache-2.0
"""The fields of a JSON body: each is read, refused by name, or listed as ignored."""

import difflib
import math
import reprlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from flaxlm.decoding.completions import as_texts
from flaxlm.decoding.sampling import is_number
from flaxlm.errors import ConfigError
from flaxlm.serving.errors import refuse

# They say who asks, how it is billed, or what a template cannot be told.
IGNORED = {
  *("user", "metadata", "safety_identifier", "service_tier", "parallel_tool_calls"),
  *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
}


class Fields:
  """The fields of a body that are not null.

  Raises `ApiError` for one that is not `known`, or that is `refused`: a name with a reason.
  """

  def __init__(
    self,
    values: dict[str, Any],
    known: Collection[str],
    refused: Mapping[str, str],
    where: str = "",
  ):
    self.where = f"{where}." if where else ""  # of an object within the body
    self.values = {name: value for name, value in values.items() if value is not None}
    self.ignored = sorted(IGNORED & set(self.values))
    for name in sorted(self.values):
      shown = reprlib.repr(f"{self.where}{name}")
      if name in refused:
        message = f"{self.where}{name} is not supported: {refused[name]}"
        refuse(f"{self.where}{name}", message, "unsupported_parameter")
      if name not in known and name not in IGNORED:
        near = difflib.get_close_matches(name, [*known], 1)
        cure = f"; did you mean {near[0]}?" if near else ""
        refuse(
          f"{self.where}{name}"[:100],
          f"there is no field {shown}{cure}",
          "unknown_parameter",
        )

  def __contains__(self, name: str) -> bool:
    return name in self.values

  def any(self, name: str) -> Any:
    return self.values.get(name)

  def switch(self, name: str) -> bool:
    value = self.values.get(name, False)
    if not isinstance(value, bool):
      name = f"{self.where}{name}"
      refuse(name, f"{name} is {reprlib.repr(value)}; use true or false", "invalid_type")
    return value

  def number(self, name: str, low: float, high: float, default: Any = None) -> Any:
    return self._bounded(name, low, high, default, whole=False)

  def whole(self, name: str, low: int, high: float, default: Any = None) -> Any:
    return self._bounded(name, low, high, default, whole=True)

  def _bounded(self, name: str, low: float, high: float, default: Any, whole: bool) -> Any:
    value = self.values.get(name, default)
    if name not in self.values:
      return value
    kind = "a whole number" if whole else "a number"
    if not is_number(value, whole):
      refuse(name, f"{name} is {reprlib.repr(value)}; use {kind}", "invalid_type")
    if not low <= value <= high:
      most = "" if high == math.inf else f", at most {high:g}"
      message = f"{name} is {reprlib.repr(value)}; use {kind} of at least {low:g}{most}"
      refuse(name, message)
    return value

  def text(self, name: str) -> str | None:
    value = self.values.get(name)
    return None if value is None else text_of(f"{self.where}{name}", value)

  def texts(self, name: str, most: int) -> tuple[str, ...]:
    """A string or a list of them."""
    value = self.values.get(name, ())
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, Sequence) or len(value) > most:
      refuse(name, f"{name} is not a string, or a list of at most {most}", "invalid_type")
    return tuple(text_of(name, one) for one in value)

  def object(self, name: str) -> dict[str, Any]:
    value = self.values.get(name, {})
    if not isinstance(value, dict):
      name = f"{self.where}{name}"
      refuse(name, f"{name} is {reprlib.repr(value)}; use an object", "invalid_type")
    return value


def text_of(name: str, value: Any) -> str:
  """A string that is text: it has no halves of surrogate pairs."""
  if not isinstance(value, str):
    refuse(name, f"{name} is {reprlib.repr(value)}; use a string", "invalid_type")
  try:
    as_texts([value])
  except ConfigError:
    refuse(name, f"{name} has a half of a surrogate pair, which is no character")
  return value
