# SPDX-License-Identifier: Apache-2.0
"""JSON as every reader takes it: a number that is not finite is null.

Python writes NaN and Infinity, which are not JSON (RFC 8259, section 6): browsers, jq and
most other readers refuse the whole line.
"""

import json
import math
from typing import Any


def to_json(values: Any, **options: Any) -> str:
  """The text of values that `json.dumps` takes, with its options."""
  try:
    return json.dumps(values, allow_nan=False, **options)
  except ValueError:  # it has found one
    return json.dumps(with_nulls(values), allow_nan=False, **options)


def with_nulls(values: Any) -> Any:
  """The values with None in place of each NaN and infinity."""
  if isinstance(values, float) and not math.isfinite(values):
    return None
  if isinstance(values, dict):
    return {name: with_nulls(value) for name, value in values.items()}
  if isinstance(values, (list, tuple)):
    return [with_nulls(value) for value in values]
  return values
