# SPDX-License-Identifier: Apache-2.0
"""JSON schemas as regular expressions: every keyword is honoured, or refused by its name.

Whatever matches the expression satisfies the schema (JSON Schema, draft 2020-12). The
reverse need not hold: an object has the properties that the schema names, in its order, and
no others; a string has no \\u escapes; a bounded number has no exponent.
"""

import json
import math
import reprlib
import urllib.parse
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn

from flaxlm.config import unique_keys
from flaxlm.decoding.json_numbers import BOUNDS, any_of, is_real, number_within
from flaxlm.decoding.json_strings import (
  CHARACTER,
  FORMATS,
  MOST_REPEATS,
  Pattern,
  literal,
  text_of,
)
from flaxlm.errors import ConfigError

MOST_LEVELS = 32
MOST_LENGTH = 50_000  # characters of an expression
MOST_CHOICES = 256  # of oneOf, each of which is compared with all others

# They say nothing about which values are valid.
ANNOTATIONS = {
  *("$schema", "$id", "$comment", "$defs", "definitions", "title", "description"),
  *("default", "examples", "deprecated", "readOnly", "writeOnly", "discriminator"),
}
KEYWORDS: dict[str, tuple[str, ...]] = {
  "string": ("minLength", "maxLength", "pattern", "format"),
  "integer": BOUNDS,
  "number": BOUNDS,
  "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems"),
  "object": (
    *("properties", "required", "additionalProperties"),
    *("minProperties", "maxProperties"),
  ),
  "boolean": (),
  "null": (),
}
# A schema that has one of these says all that it says by it.
FORMS = ("$ref", "enum", "const", "anyOf", "oneOf", "allOf")

SPACE = "[ ]?"
COMMA = f"{SPACE},{SPACE}"


def regex_of_form(regex: Any, schema: Any) -> Any:
  """The regular expression of the form that an answer is to have, if it is to have one: it
  is given, or a schema's. Raises `ConfigError` for both, and as `regex_of_schema` does."""
  if schema is None:
    return regex
  if regex is not None:
    raise ConfigError("regex with json_schema", "leave one of them out")
  return regex_of_schema(schema)


def regex_of_schema(schema: Any) -> str:
  """A regular expression for JSON texts that satisfy a schema, given as JSON or parsed.

  Raises `ConfigError`, with the keyword and its place, for a schema that is invalid, too
  large, or says what no regular expression can.
  """
  try:
    # Both ways, so that a parsed one is JSON, too, and not nested too deeply.
    text = schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False)
    schema = json.loads(
      text,
      object_pairs_hook=unique_keys,
      parse_float=_number_of,
      parse_constant=_number_of,
    )
    return _Reader(schema).value(schema, ())
  except RecursionError as e:
    raise ConfigError("the JSON schema is nested too deeply") from e
  except (ValueError, TypeError) as e:
    raise ConfigError(f"the JSON schema cannot be used: {e}") from e


def regex_of_any_object() -> str:
  """A regular expression for JSON objects whose values are no deeper than objects and
  arrays of plain values: no expression is for all depths, and each one more makes its
  automaton four times as large."""
  plain = {"type": ["string", "number", "boolean", "null"]}
  one = {
    "anyOf": [
      plain,
      {"type": "array", "items": plain},
      {"type": "object", "additionalProperties": plain},
    ]
  }
  return regex_of_schema({"type": "object", "additionalProperties": one})


def _number_of(text: str) -> float:
  """A number of a JSON text; 1.0 is 1, as in JSON Schema."""
  number = float(text)
  if not math.isfinite(number):
    raise ValueError(f"{text} is not a number of JSON")
  return int(number) if number.is_integer() else number


Place = tuple[str, ...]  # the names on the way from the root


def _refuse(place: Place, cause: str, cure: str = "") -> NoReturn:
  at = f" at {'.'.join(place)}" if place else ""
  raise ConfigError(f"the JSON schema cannot be used{at}: {cause}", cure)


def _at(place: Place, read: Callable[[], str]) -> str:
  """What `read` returns, or its error with the place."""
  try:
    return read()
  except ConfigError as e:
    _refuse(place, e.cause, e.cure)


class _Reader:
  """Reads one schema, whose references lead to other parts of it."""

  def __init__(self, root: Any):
    self.root = root
    self.inside: list[str] = []  # the references that are being read

  def value(self, schema: Any, place: Place) -> str:
    """The expression for the values of a schema."""
    if len(place) > 4 * MOST_LEVELS:  # a level has up to three names
      _refuse(place[:4], f"it has more than {MOST_LEVELS} levels")
    if schema is True or schema == {}:
      _refuse(place, "it allows anything", 'say more, as in {"type": "string"}')
    if not isinstance(schema, dict):
      _refuse(place, f"{reprlib.repr(schema)} is not a schema that a value can satisfy")
    keywords = [name for name in schema if name not in ANNOTATIONS]
    form = next((form for form in FORMS if form in schema), None)
    if form is None:
      expression = self._of_types(schema, keywords, place)
    else:
      typed = ("type",) if form in ("enum", "const") else ()
      if beside := [name for name in keywords if name not in (form, *typed)]:
        _refuse(place, f"{beside[0]} beside {form} is not supported")
      expression = self._of_form(form, schema, place)
    if len(expression) > MOST_LENGTH:
      _refuse(place, "its regular expression is too large", "make it smaller")
    return expression

  def _of_form(self, form: str, schema: dict, place: Place) -> str:
    found, place = schema[form], (*place, form)
    if form == "$ref":
      return self._of_reference(found, place)
    if form in ("enum", "const"):
      return self._of_values(schema, place)
    if not isinstance(found, list) or not found:
      _refuse(place, "it is not a list of schemas")
    if form == "allOf" and len(found) > 1:
      _refuse(place, "several schemas at once are not supported", "merge them into one")
    if form == "oneOf" and len(found) > MOST_CHOICES:
      _refuse(place, f"it has more than {MOST_CHOICES} schemas", "use anyOf")
    expression = any_of([self.value(one, (*place, str(i))) for i, one in enumerate(found)])
    if form == "oneOf":  # whose schemas are valid, as `value` has read them
      self._check_disjoint(found, place)
    return expression

  def _of_reference(self, name: Any, place: Place) -> str:
    if name in self.inside:
      _refuse(place, f"{name} is inside itself", "unfold it as often as you need it")
    self.inside.append(name)
    expression = self.value(self._follow(name, place), place)
    self.inside.pop()
    return expression

  def _of_values(self, schema: dict, place: Place) -> str:
    values, types = _values_of(schema), schema.get("type")
    kinds = [types] if isinstance(types, str) else types
    if kinds is not None and not (isinstance(kinds, list) and set(kinds) <= set(IS_A)):
      _refuse(place, f"type is {reprlib.repr(types)}", f"it can be {', '.join(IS_A)}")
    if kinds is not None:
      values = [v for v in values or [] if any(IS_A[kind](v) for kind in kinds)]
    if not values:
      _refuse(place, "no value fits")
    return any_of(map(literal, values))

  def _follow(self, name: Any, place: Place) -> Any:
    """The part of the root that a JSON pointer (RFC 6901) such as `#/$defs/a` names."""
    if not isinstance(name, str) or not (name == "#" or name.startswith("#/")):
      _refuse(place, f"{reprlib.repr(name)} is not in this schema", "as in #/$defs/name")
    found = self.root
    for part in name.split("/")[1:]:
      part = urllib.parse.unquote(part).replace("~1", "/").replace("~0", "~")
      if isinstance(found, list) and part.isdecimal() and int(part) < len(found):
        found = found[int(part)]
      elif isinstance(found, dict) and part in found:
        found = found[part]
      else:
        _refuse(place, f"{name} is not in this schema")
    return found

  # -- oneOf: no value may satisfy two of them

  def _check_disjoint(self, schemas: Sequence[Any], place: Place) -> None:
    for number, one in enumerate(schemas):
      for other in schemas[:number]:
        if not self._are_disjoint(one, other, place):
          _refuse(place, "a value could satisfy two of its schemas", "use anyOf")

  def _are_disjoint(self, one: Any, other: Any, place: Place) -> bool:
    one, other = self._resolve(one, place), self._resolve(other, place)
    if not (isinstance(one, dict) and isinstance(other, dict)):
      return False
    values, others = _values_of(one), _values_of(other)
    if values is not None and others is not None:
      return not set(map(text_of, values)) & set(map(text_of, others))
    kinds, other_kinds = _kinds_of(one), _kinds_of(other)
    if not kinds & other_kinds:
      return True
    if kinds != {"object"} or other_kinds != {"object"}:
      return False
    both = set(one.get("required", ())) & set(other.get("required", ()))
    properties, others = one["properties"], other["properties"]
    return any(
      _values_of(properties[name]) is not None
      and self._are_disjoint(properties[name], others[name], place)
      for name in both
    )

  def _resolve(self, schema: Any, place: Place) -> Any:
    seen: list[Any] = []
    while isinstance(schema, dict) and "$ref" in schema and schema["$ref"] not in seen:
      seen.append(schema["$ref"])
      schema = self._follow(schema["$ref"], place)
    return schema

  # -- By type

  def _of_types(self, schema: dict, keywords: Collection[str], place: Place) -> str:
    types = schema.get("type")
    if types is None:  # as {"properties": ...}: its other values are left out
      types = [kind for kind, names in KEYWORDS.items() if set(keywords) & set(names)][:1]
    types = [types] if isinstance(types, str) else types
    if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
      _refuse(place, f"type is {reprlib.repr(types)}")
    for kind in types:
      if kind not in KEYWORDS:
        _refuse(place, f"type is {kind!r}", f"it can be {', '.join(KEYWORDS)}")
    used = {"type", *(name for kind in types for name in KEYWORDS[kind])}
    for name in keywords:
      if name not in used:
        known = any(name in names for names in KEYWORDS.values())
        _refuse(
          place,
          f"{name} says nothing about type {', '.join(types)}"
          if known and types
          else f"{name} is not supported",
        )
    if not types:
      _refuse(place, "it allows anything", 'say more, as in {"type": "string"}')
    return any_of(self._of_type(kind, schema, place) for kind in types)

  def _of_type(self, kind: str, schema: dict, place: Place) -> str:
    if kind == "boolean":
      return "(?:true|false)"
    if kind == "null":
      return "null"
    if kind in ("integer", "number"):
      return _at(place, lambda: number_within(schema, kind == "integer"))
    if kind == "string":
      return _string(schema, place)
    return (self._array if kind == "array" else self._object)(schema, place)

  def _array(self, schema: dict, place: Place) -> str:
    low = _count(schema, "minItems", place) or 0
    high = _count(schema, "maxItems", place)
    if schema.get("uniqueItems", False) is not False:
      _refuse(place, "uniqueItems is not supported")
    if high is not None and high < low:
      _refuse(place, f"minItems is {low}, maxItems {high}: no array has that")
    if "prefixItems" in schema:
      return self._tuple(schema, low, high, place)
    if high == 0:
      return rf"\[{SPACE}\]"
    item = self.value(schema.get("items", True), (*place, "items"))
    more = f"{{{max(low - 1, 0)},{'' if high is None else high - 1}}}"
    items = f"{item}(?:{COMMA}{item}){more}"
    return rf"\[{SPACE}{items if low else f'(?:{items})?'}{SPACE}\]"

  def _tuple(self, schema: dict, low: int, high: int | None, place: Place) -> str:
    """An array of one item for each of `prefixItems`."""
    firsts = schema["prefixItems"]
    if not isinstance(firsts, list) or not firsts:
      _refuse(place, "prefixItems is not a list of schemas")
    if not isinstance(schema.get("items", True), bool):
      _refuse(place, "items beside prefixItems is not supported")
    firsts = firsts[:high]
    if low > len(firsts):
      _refuse(place, f"minItems is {low}, but only {len(firsts)} items are described")
    items = (
      self.value(one, (*place, "prefixItems", str(i))) for i, one in enumerate(firsts)
    )
    return rf"\[{SPACE}{COMMA.join(items)}{SPACE}\]"

  def _object(self, schema: dict, place: Place) -> str:
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict):
      _refuse(place, "properties is not an object")
    if not isinstance(required, list) or not all(isinstance(n, str) for n in required):
      _refuse(place, "required is not a list of names")
    if missing := [name for name in required if name not in properties]:
      _refuse(place, f"required names {missing[0]!r}, which properties lack")
    others = schema.get("additionalProperties", True)
    low = _count(schema, "minProperties", place) or 0
    high = _count(schema, "maxProperties", place)
    if low > len(required) or (high is not None and high < len(properties)):
      name = "minProperties" if low > len(required) else "maxProperties"
      _refuse(place, f"{name} is not supported beside properties that may be left out")
    if not properties and not isinstance(others, bool):
      value = self.value(others, (*place, "additionalProperties"))
      pair = f'"{CHARACTER}*"{SPACE}:{SPACE}{value}'
      return rf"\{{{SPACE}(?:{pair}(?:{COMMA}{pair})*)?{SPACE}\}}"
    if not isinstance(others, bool):
      _refuse(place, "additionalProperties beside properties can be true or false")
    if not properties and others and high != 0:
      _refuse(place, "it allows any object", "name its properties")
    pairs = [
      (
        f"{literal(name)}{SPACE}:{SPACE}{self.value(one, (*place, 'properties', name))}",
        name in required,
      )
      for name, one in properties.items()
    ]
    return rf"\{{{SPACE}{_in_order(pairs)}{SPACE}\}}"


def _in_order(pairs: Sequence[tuple[str, bool]]) -> str:
  """The members of an object, with commas between those that are there.

  Some member comes first: one up to the first that is required, which no text leaves out.
  """
  ways, rest = [], ""
  firsts = next((i for i, (_, is_required) in enumerate(pairs) if is_required), len(pairs))
  for number, (pair, is_required) in reversed([*enumerate(pairs)]):
    if number <= firsts:
      ways.append(pair + rest)
    rest = (f"{COMMA}{pair}" if is_required else f"(?:{COMMA}{pair})?") + rest
  return any_of(reversed(ways)) + ("?" if firsts == len(pairs) and pairs else "")


def _count(schema: dict, name: str, place: Place) -> int | None:
  """A length or a number of things, or None if the schema does not say."""
  value = schema.get(name)
  if name not in schema:
    return None
  if type(value) is not int or not 0 <= value <= MOST_REPEATS:
    _refuse(place, f"{name} is {reprlib.repr(value)}", f"it can be 0 to {MOST_REPEATS}")
  return value


# -- Strings -------------------------------------------------------------------------------


def _string(schema: dict, place: Place) -> str:
  low = _count(schema, "minLength", place)
  high = _count(schema, "maxLength", place)
  given = [name for name in ("pattern", "format") if name in schema]
  lengths = [name for name in ("minLength", "maxLength") if name in schema]
  if len(given + lengths[:1]) > 1:
    other, name = (given + lengths)[:2]
    _refuse(place, f"{name} beside {other} is not supported")
  if "format" in schema:
    if schema["format"] not in [*FORMATS]:
      cure = f"it can be {', '.join(FORMATS)}"
      _refuse(place, f"format is {reprlib.repr(schema['format'])}", cure)
    return f'"{FORMATS[schema["format"]]}"'
  if "pattern" in schema:
    if not isinstance(schema["pattern"], str):
      _refuse(place, f"pattern is {reprlib.repr(schema['pattern'])}")
    pattern = Pattern(schema["pattern"])
    return f'"{_at((*place, "pattern"), pattern.expression)}"'
  if high is not None and high < (low or 0):
    _refuse(place, f"minLength is {low}, maxLength {high}: no string has that")
  return f'"{CHARACTER}{{{low or 0},{"" if high is None else high}}}"'


# -- Values that the schema lists ----------------------------------------------------------

IS_A: dict[str, Callable[[Any], bool]] = {
  "string": lambda value: isinstance(value, str),
  "integer": lambda value: is_real(value) and isinstance(value, int),
  "number": lambda value: is_real(value),
  "array": lambda value: isinstance(value, list),
  "object": lambda value: isinstance(value, dict),
  "boolean": lambda value: isinstance(value, bool),
  "null": lambda value: value is None,
}


def _values_of(schema: Any) -> list[Any] | None:
  """The values that a valid schema lists, or None if it lists none."""
  if not isinstance(schema, dict):
    return None
  if "const" in schema:
    return [schema["const"]]
  found = schema.get("enum")
  return found if isinstance(found, list) else None


def _kinds_of(schema: dict) -> set[str]:
  """The types that a schema's values may have, each of which excludes the others."""
  values, types = _values_of(schema), schema.get("type")
  if values is not None:
    return {next(kind for kind, is_a in IS_A.items() if is_a(value)) for value in values}
  kinds = {types} if isinstance(types, str) else set(types or IS_A)
  return kinds | ({"integer"} if "number" in kinds else set())
