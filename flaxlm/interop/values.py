# SPDX-License-Identifier: Apache-2.0
"""JSON files of others, read key by key with types and bounds."""

import codecs
import json
import math
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flaxlm.config import unique_keys
from flaxlm.errors import CheckpointError, first_line
from flaxlm.interop.files import has_file

MAX_JSON_BYTES = 32 * 2**20
MOST = 2**31  # limit of integers in a config
MOST_SHOWN = 200  # characters
BYTE_ORDER_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

REQUIRED = object()


def read_json(path: Path) -> dict[str, Any]:
  """The object in a JSON file. Raises `CheckpointError`, also for duplicate keys."""
  if not has_file(path):
    raise CheckpointError(f"{path} does not exist")
  try:
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
      raise CheckpointError(f"{path} has {size} bytes", f"at most {MAX_JSON_BYTES}")
    return parse_json(path.read_bytes(), str(path))
  except OSError as e:
    raise CheckpointError(f"{path} cannot be read: {first_line(e)}") from e


def parse_json(text: bytes, origin: str) -> dict[str, Any]:
  """The JSON object in `text`; `origin` names it in errors."""
  if text.startswith(BYTE_ORDER_MARKS):
    raise CheckpointError(
      f"{origin} begins with a byte order mark, which JSON has not",
      "save it as plain UTF-8",
    )
  try:
    values = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys)
  except (ValueError, RecursionError) as e:
    raise CheckpointError(f"{origin} is not JSON: {shortened(str(e))}") from e
  if not isinstance(values, dict):
    raise CheckpointError(f"{origin} is not a JSON object")
  return values


def shown(value: Any) -> str:
  """A foreign value in an error: a few of its parts, without control characters."""
  return reprlib.repr(value)


def shortened(name: str) -> str:
  """A foreign name in an error: itself, unless it is long or would control a terminal."""
  return name if name.isprintable() and len(name) <= MOST_SHOWN else shown(name)


class Values:
  """The values of a config.json, and the names of the tensors beside it.

  Every method raises `CheckpointError` for a value of the wrong type or out of bounds.
  """

  def __init__(self, values: Mapping[str, Any], origin: str, names: Iterable[str] = ()):
    self.values, self.origin, self.names = values, origin, frozenset(names)

  def refused(self, key: str, cure: str = "") -> CheckpointError:
    return CheckpointError(f"{self.origin}: {key} is {shown(self.values.get(key))}", cure)

  def inner(self, *keys: str) -> "Values":
    """The object under the first of `keys` that is neither missing, null nor empty.

    Without any, an object without values.
    """
    for key in keys:
      value = self.values.get(key)
      if value:
        if not isinstance(value, dict):
          raise self.refused(key, "it must be an object")
        return Values(value, f"{self.origin}: {key}", self.names)
    return Values({}, self.origin, self.names)

  def get(self, kind: Any, key: str, default: Any = REQUIRED) -> Any:
    """The int, float, bool or str under `key`; `default` if it is missing or null."""
    value = self.values.get(key)
    if value is None:
      if default is REQUIRED:
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

  def demand(self, **values: Any) -> None:
    """Raises `CheckpointError` for a key that is present with another value than these."""
    for key, wanted in values.items():
      value = self.values.get(key)
      if value is not None and value != wanted:
        raise self.refused(key, f"flaxlm supports only {wanted!r}")

  def has(self, end: str) -> bool:
    """Whether the name of some tensor has this ending."""
    return any(name.endswith(end) for name in self.names)
