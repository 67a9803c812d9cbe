# SPDX-License-Identifier: Apache-2.0
"""Numbers of JSON within bounds, as regular expressions."""

import math
import reprlib
from collections.abc import Iterable, Iterator
from typing import Any

from flaxlm.errors import ConfigError

LARGEST_BOUND = 10**12  # of a number: with three digits after the point, a float is exact

BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")

WHOLE_NUMBER = "-?(?:0|[1-9][0-9]*)"
NUMBER = rf"{WHOLE_NUMBER}(?:\.[0-9]+)?(?:[eE][+-][0-9]+)?"


def number_within(schema: dict, whole: bool) -> str:
  """The numbers within a schema's bounds, each of which is closed or open (exclusive).

  Raises `ConfigError` for a bound that is no number or not supported.
  """
  multiple = schema.get("multipleOf", 1)
  if not is_real(multiple) or multiple != 1:
    raise ConfigError("multipleOf is not supported", "only 1 is")
  whole = whole or "multipleOf" in schema
  found = {name: schema[name] for name in BOUNDS[:-1] if name in schema}
  for name, bound in found.items():
    if not is_real(bound) or not abs(bound) <= LARGEST_BOUND:
      raise ConfigError(
        f"{name} is {reprlib.repr(bound)}", f"at most {LARGEST_BOUND:g} either way"
      )
    if not whole and not float(bound).is_integer():
      raise ConfigError(
        f"{name} is {bound}", "of a number, only whole bounds are supported"
      )
  if not found:
    return WHOLE_NUMBER if whole else NUMBER
  # A pair is a bound and whether it is open: the larger of two bounds below excludes more.
  lows = [(found[n], n != "minimum") for n in ("minimum", "exclusiveMinimum") if n in found]
  highs = [
    (-found[n], n != "maximum") for n in ("maximum", "exclusiveMaximum") if n in found
  ]
  low = max(lows, default=None)
  high = max(highs, default=None)
  if whole:  # closed, whole bounds
    low = low and (math.floor(low[0]) + 1 if low[1] else math.ceil(low[0]), False)
    high = high and (math.floor(high[0]) + 1 if high[1] else math.ceil(high[0]), False)
  upper = high and (-high[0], high[1])
  parts = [
    # Minus zero is left out.
    *_signed("-", upper and (-upper[0], upper[1]), low and (-low[0], low[1]), whole, True),
    *_signed("", low, upper, whole, False),
  ]
  if not parts:
    raise ConfigError(f"no number is within {', '.join(found)}")
  return any_of(parts)


Bound = tuple[float, bool] | None  # and whether it is open; None: no bound


def _signed(
  sign: str, low: Bound, high: Bound, whole: bool, above_0: bool
) -> Iterator[str]:
  """The numbers of one sign whose magnitudes are from `low` to `high`."""
  least: tuple[float, bool] = (0, above_0)
  low = least if low is None else max(low, least)
  if high is None or low[0] <= high[0]:
    most = None if high is None else (int(high[0]), high[1])
    make = _whole_magnitudes if whole else _magnitudes
    for part in make((int(low[0]), low[1]), most):
      yield sign + part


def _whole_magnitudes(
  low: tuple[int, bool], high: tuple[int, bool] | None
) -> Iterator[str]:
  least = low[0] + low[1]
  if high is None:
    yield _digits_from(least)
  elif least <= high[0] - high[1]:
    yield _digits(least, high[0] - high[1])


def _magnitudes(low: tuple[int, bool], high: tuple[int, bool] | None) -> Iterator[str]:
  """As many digits after the point as a float holds: none may round to an open bound."""
  places = 15 - len(str(max(low[0], 0 if high is None else high[0])))
  fraction = rf"(?:\.[0-9]{{1,{places}}})?"
  least, is_open = low
  if is_open:
    if high is None or least < high[0]:
      yield rf"{least}\.[0-9]{{0,{places - 1}}}[1-9]0*"
    least += 1
  if high is None:
    yield _digits_from(least) + fraction
    return
  if least < high[0]:
    yield _digits(least, high[0] - 1) + fraction
  if least <= high[0] and not high[1]:
    yield rf"{high[0]}(?:\.0{{1,{places}}})?"


def _digits_from(low: int) -> str:
  """The whole numbers from `low`: as long and not below, or longer."""
  length = len(str(low))
  return f"(?:{_digits(low, 10**length - 1)}|[1-9][0-9]{{{length},}})"


def _digits(low: int, high: int) -> str:
  """The whole numbers from `low` to `high`, length by length."""
  parts = []
  for length in range(len(str(low)), len(str(high)) + 1):
    shortest = 10 ** (length - 1) if length > 1 else 0
    first, last = max(low, shortest), min(high, 10**length - 1)
    parts.append(_same_length(str(first), str(last)))
  return any_of(parts)


def _same_length(first: str, last: str) -> str:
  """The texts of digits from `first` to `last`, which are equally long."""
  if first == last:
    return first
  if first[0] == last[0]:
    return first[0] + _same_length(first[1:], last[1:])
  rest = len(first) - 1
  low, high, before, after = int(first[0]), int(last[0]), [], []
  if first[1:] != "0" * rest:
    before, low = [first[0] + _same_length(first[1:], "9" * rest)], low + 1
  if last[1:] != "9" * rest:
    after, high = [last[0] + _same_length("0" * rest, last[1:])], high - 1
  between = (
    [f"[{low}-{high}]" + (f"[0-9]{{{rest}}}" if rest else "")] if low <= high else []
  )
  return any_of([*before, *between, *after])


def is_real(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def any_of(expressions: Iterable[str]) -> str:
  return f"(?:{'|'.join(expressions)})"
