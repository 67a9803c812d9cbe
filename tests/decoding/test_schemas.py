# SPDX-License-Identifier: Apache-2.0
"""JSON schemas: each keyword is honoured in every answer, or refused by its name."""

import json
import re
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from test_completions import BYTES

from flaxlm.decoding.constraint import FREE, NEVER, build_automaton, check_expressions
from flaxlm.decoding.json_numbers import number_within
from flaxlm.decoding.json_strings import FORMATS, Pattern
from flaxlm.decoding.schemas import MOST_LENGTH, regex_of_schema
from flaxlm.errors import ConfigError

POINT = {
  "type": "object",
  "properties": {"x": {"type": "integer"}, "y": {"type": "boolean"}, "z": {"const": None}},
  "required": ["y"],
  "additionalProperties": False,
}
TREE = {
  "$defs": {"leaf": {"enum": ["a", 'q"\\', 1.0]}},
  "type": "array",
  "items": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "null"}]},
  "minItems": 1,
  "maxItems": 2,
}
PET = {
  "oneOf": [
    {
      "type": "object",
      "properties": {"kind": {"const": kind}, name: {"type": "boolean"}},
      "required": ["kind"],
    }
    for kind, name in (("cat", "purrs"), ("dog", "barks"))
  ]
}
# (schema, what it allows, what it does not)
SCHEMAS: dict[str, tuple[Any, list[str], list[str]]] = {
  "object": (
    POINT,
    ['{"x": 1, "y": true, "z": null}', '{"y":false}', '{"x": -3,"y": true}'],
    ["{}", '{"x": 1}', '{"y": true, "y": true}', '{"y": true, "x": 1}', '{"y": 1}'],
  ),
  "all may be left out": (
    {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}}},
    ["{}", '{"a": 1}', '{"b": 2}', '{"a": 1, "b": 2}'],
    ['{"a": 1, }', '{, "b": 2}', '{"b": 2, "a": 1}'],
  ),
  "array": (
    TREE,
    ['["a"]', '["q\\"\\\\", null]', "[1]"],
    ["[]", '["a", "a", "a"]', "[1.0]", '["b"]'],
  ),
  "no items": ({"type": "array", "maxItems": 0}, ["[]"], ["[1]"]),
  "tuple": (
    {"type": "array", "prefixItems": [{"type": "null"}, {"const": "b"}], "items": False},
    ['[null, "b"]'],
    ["[null]", '["b", null]', '[null, "b", 1]'],
  ),
  "map": (
    {"type": "object", "additionalProperties": {"type": "integer"}},
    ["{}", '{"a": 1, "b": 2}'],
    ['{"a": true}', "{a: 1}"],
  ),
  "types": ({"type": ["integer", "null"], "minimum": 3}, ["3", "null"], ["2", "true"]),
  "tagged": (
    PET,
    ['{"kind": "cat", "purrs": true}', '{"kind":"dog"}'],
    ['{"kind": "cow"}'],
  ),
  "filtered": (
    {"enum": [1, "a", None], "type": ["string", "null"]},
    ['"a"', "null"],
    ["1"],
  ),
  "lengths": (
    {"type": "string", "minLength": 2, "maxLength": 3},
    ['"ab"', '"é\\n漢"'],
    ['"a"', '"abcd"', '"a\nb"', '"a"b"'],
  ),
  "anything but": ({"type": "string", "pattern": "^[^a]$"}, ['"b"', '"é"'], ['"a"', '"""']),
  "dates": (
    {"type": "string", "format": "date"},
    ['"2024-12-31"', '"2024-02-28"'],
    ['"2024-13-01"', '"2023-02-29"', '"2024-04-31"'],
  ),
}


def automaton_of(expressions: tuple[str, ...]) -> Any:
  """A function: whether the text matches the expression of that number."""
  check_expressions(expressions)
  automaton, initial = build_automaton(expressions, BYTES)

  def accepts(number: int, text: str) -> bool:
    state = initial[number]
    for token in [*BYTES.encode(text), BYTES.eos_id]:
      kind = automaton.kinds_EV[automaton.expressions_X[state], token]
      state = NEVER if state == FREE else automaton.next_XY[state, kind]
      if state == NEVER:
        return False
    return bool(state == FREE)

  return accepts


def test_answers_are_what_the_schema_allows():
  accepts = automaton_of(
    tuple(regex_of_schema(schema) for schema, _, _ in SCHEMAS.values())
  )
  for number, (name, (_, right, wrong)) in enumerate(SCHEMAS.items()):
    for text in right:
      assert accepts(number, text), (name, text)
      json.loads(text)
    for text in wrong:
      assert not accepts(number, text), (name, text)


PATTERNS = (
  *(
    "a",
    "^a",
    "a$",
    "^a$",
    "^(a|bc)+$",
    "^a|b$",
    "[^b-]",
    "a.c",
    r"^\w+\.\d{2,3}$",
    r"\S\s\D",
  ),
  *("^a{0,2}b*?$", r"^[\w.]+[a-c]?$", r"\"|\\", "(?:ab){2}", "^[-.]$", r"^\W$", "x*"),
)


def test_patterns_mean_what_re_means():
  """Within a JSON string: found anywhere, and what must be escaped is."""
  accepts = automaton_of(tuple(Pattern(pattern).expression() for pattern in PATTERNS))
  rng = np.random.default_rng(0)
  words = ["a", "ab", "abab", "bc", "abc", "b", '"', "\\", "-", ".", "a 1", "q.12", "a.123"]
  words += ["".join(rng.choice([*"abc.1 -_é"], 4)) for _ in range(40)]
  found = 0
  for number, pattern in enumerate(PATTERNS):
    for word in words:
      expected = re.search(pattern, word, re.ASCII) is not None
      text = json.dumps(word, ensure_ascii=False)[1:-1]
      if expected and re.search(r"[\"\\]", word) and number != PATTERNS.index(r"\"|\\"):
        continue  # a class or a dot matches none of these: that is narrower, not wrong
      assert accepts(number, text) == expected, (pattern, word)
      found += expected
  assert found > 200


@pytest.mark.parametrize("seed", range(30))
def test_numbers_are_within_their_bounds(seed: int):
  rng = np.random.default_rng(seed)
  span = int(rng.choice([3, 30, 3000]))
  names = [*rng.choice(["minimum", "exclusiveMinimum", ""], 1)]
  names += [*rng.choice(["maximum", "exclusiveMaximum", ""], 1)]
  low = int(rng.integers(-span, span))
  bounds = dict(zip(names, (low, low + int(rng.integers(1, span))), strict=True))
  bounds.pop("", None)

  def fits(number: Decimal) -> bool:
    return (
      number >= bounds.get("minimum", number)
      and number <= bounds.get("maximum", number)
      and number > bounds.get("exclusiveMinimum", number - 1)
      and number < bounds.get("exclusiveMaximum", number + 1)
    )

  if not bounds:
    bounds = {"minimum": low}
  near = [b + d for b in bounds.values() for d in range(-12, 13)]
  wholes = {*near, *range(-15, 16), *rng.integers(-9 * span, 9 * span, 60).tolist()}
  if any(map(fits, map(Decimal, wholes))):
    whole = re.compile(number_within({"type": "integer"} | bounds, whole=True))
    for n in wholes:
      assert (whole.fullmatch(str(n)) is not None) == fits(Decimal(n)), (bounds, n)
    assert not whole.fullmatch("-0")
    assert not whole.fullmatch("01")
  real = re.compile(number_within(bounds, whole=False))
  for n in wholes:
    for fraction in ("", ".0", ".5", ".001", ".999", ".10"):
      text = f"{n}{fraction}"
      is_narrower = fits(Decimal(text)) and (text.startswith("-0") or text == "0.0")
      if not is_narrower and not (Decimal(text) == 0 and fraction):
        assert (real.fullmatch(text) is not None) == fits(Decimal(text)), (bounds, text)
      elif real.fullmatch(text):
        assert fits(Decimal(text))


def test_formats_are_in_the_automatons_syntax():
  accepts = automaton_of(tuple(FORMATS.values()))
  right = ["2024-01-31", "23:59:59.5Z", "2024-01-31T00:00:00+01:00", f"{'a1b2-' * 3}"]
  right = [*right[:3], "01234567-89ab-cdef-0123-456789abcdef", "255.0.10.1", "a.b@c-d.org"]
  right.append("https://example.org/a/b.html")
  assert [*FORMATS] == ["date", "time", "date-time", "uuid", "ipv4", "email", "uri"]
  for number, text in enumerate(right):
    assert accepts(number, text), text
    assert not accepts(number, text + "\n")


@pytest.mark.parametrize(
  ("schema", "complaint"),
  [
    ({}, "allows anything"),
    (True, "allows anything"),
    ({"title": "x"}, "allows anything"),
    (False, "is not a schema"),
    ({"type": "object"}, "allows any object"),
    ({"type": "array"}, "items: it allows anything"),
    ({"not": {}}, "not is not supported"),
    ({"type": "string", "nullable": True}, "nullable is not supported"),
    ({"type": "string", "minimum": 3}, "minimum says nothing about type string"),
    ({"type": "string", "pattern": "a", "maxLength": 3}, "pattern is not supported"),
    ({"type": "string", "format": "date", "pattern": "a"}, "format beside pattern"),
    ({"type": "string", "format": "hostname"}, "format is 'hostname'"),
    ({"type": "string", "minLength": 100_000_000}, "minLength is 100000000"),
    ({"type": "string", "minLength": True}, "minLength is True"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "no string has that"),
    ({"type": "string", "pattern": "(?=a)"}, r"(?= is not supported"),
    ({"type": "string", "pattern": r"\ba"}, r"\b is not supported"),
    ({"type": "string", "pattern": r"(a)\1"}, r"\1 is not supported"),
    ({"type": "string", "pattern": "a^b"}, "'^' is not supported"),
    ({"type": "string", "pattern": "("}, "its end is not supported"),
    ({"type": "string", "pattern": "a{99999}"}, "{99999} is not supported"),
    ({"type": "string", "pattern": "(" * 9999}, "more than 32 groups"),
    ({"type": "integer", "multipleOf": 7}, "multipleOf is not supported"),
    ({"type": "integer", "minimum": "3"}, "minimum is '3'"),
    ({"type": "integer", "minimum": 3, "maximum": 2}, "no number is within"),
    ({"type": "number", "minimum": 0.5}, "only whole bounds"),
    ({"type": "number", "minimum": 1e300}, "minimum is 1"),
    ({"type": "array", "items": {"type": "null"}, "uniqueItems": True}, "uniqueItems"),
    ({"type": "array", "items": {"type": "null"}, "contains": {}}, "contains is not"),
    (
      {"type": "array", "items": {"type": "null"}, "minItems": 100_000_000},
      "minItems is 1",
    ),
    ({"type": "array", "prefixItems": [{"type": "null"}], "minItems": 2}, "only 1 items"),
    ({"type": "object", "required": ["a"]}, "required names 'a'"),
    ({"required": ["a"]}, "required names 'a'"),
    (POINT | {"minProperties": 2}, "minProperties is not supported"),
    (POINT | {"patternProperties": {}}, "patternProperties is not supported"),
    (POINT | {"additionalProperties": {"type": "null"}}, "can be true or false"),
    ({"anyOf": [{"type": "null"}], "type": "null"}, "type beside anyOf"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "two of its schemas"),
    ({"oneOf": [{"const": 1}, {"const": 1.0}]}, "two of its schemas"),
    ({"allOf": [{"type": "null"}, {"type": "null"}]}, "several schemas at once"),
    ({"enum": [3], "minimum": 2}, "minimum beside enum"),
    ({"enum": [3], "type": "string"}, "no value fits"),
    ({"enum": []}, "no value fits"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "is inside itself"),
    ({"$ref": "https://example.org/schema"}, "is not in this schema"),
    ({"$ref": "#/nowhere"}, "is not in this schema"),
    ({"type": "nonsense"}, "type is 'nonsense'"),
    ({"type": 3}, "type is 3"),
    ('{"type": "null", "type": "null"}', "'type' appears twice"),
    ("[" * 100_000, "nested too deeply"),
    ('{"const": NaN}', "NaN is not a number"),
  ],
)
def test_what_is_not_honoured_is_refused_by_its_name(schema: Any, complaint: str):
  with pytest.raises(ConfigError, match=re.escape(complaint)) as caught:
    regex_of_schema(schema)
  assert len(str(caught.value).splitlines()) <= 2


def test_schemas_that_grow_are_refused():
  """References that each name two others, and arrays within arrays."""
  defs: dict[str, Any] = {"d0": {"type": "null"}}
  for level in range(1, 40):
    both = {"$ref": f"#/$defs/d{level - 1}"}
    defs[f"d{level}"] = {"type": "array", "prefixItems": [both, both]}
  with pytest.raises(ConfigError, match="too large"):
    regex_of_schema({"$ref": "#/$defs/d39", "$defs": defs})
  nested: dict[str, Any] = {"type": "null"}
  for _ in range(30):
    nested = {"type": "array", "items": nested}
  with pytest.raises(ConfigError, match="too large"):
    regex_of_schema(nested)
  assert len(regex_of_schema({"const": "x" * 40_000})) < MOST_LENGTH
