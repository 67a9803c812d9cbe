# SPDX-License-Identifier: Apache-2.0
"""JSON that every reader takes."""

import json
import math
from typing import Any

import pytest

from flaxlm.strict_json import to_json

INF, NAN = math.inf, math.nan


def refuse(constant: str) -> None:
  raise AssertionError(constant)


@pytest.mark.parametrize(
  ("values", "expected"),
  [
    (NAN, None),
    ({"step": 3, "train/loss": NAN, "b": -INF}, {"step": 3, "train/loss": None, "b": None}),
    (
      [[1, 0.5, INF], (NAN, "NaN", True, None)],
      [[1, 0.5, None], [None, "NaN", True, None]],
    ),
    ({"a": {"b": [{"c": INF}]}, 1: -0.0}, {"a": {"b": [{"c": None}]}, "1": -0.0}),
    ({"a": "é<>\\u2028", "b": 1e308}, {"a": "é<>\\u2028", "b": 1e308}),
  ],
)
def test_what_is_not_finite_is_null(values: Any, expected: Any):
  assert json.loads(to_json(values), parse_constant=refuse) == expected


def test_options_are_those_of_json():
  assert to_json({"b": NAN, "a": 1}, indent=1, sort_keys=True) == json.dumps(
    {"a": 1, "b": None}, indent=1
  )
  assert to_json([{1, 2}, NAN], default=sorted) == "[[1, 2], null]"


def test_what_is_no_json_is_an_error():
  circle: list = []
  circle.append(circle)
  with pytest.raises((ValueError, RecursionError)):
    to_json(circle)
  with pytest.raises(TypeError):
    to_json({1, 2})
