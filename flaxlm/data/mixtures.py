# SPDX-License-Identifier: Apache-2.0
"""What a mixture of corpora says, as `0.7 stdlib + 0.3 files:notes/*.md`.

All rows hold as many tokens, so that shares of tokens are shares of rows: see `schedule`.
"""

import math
import re
from fractions import Fraction
from typing import NamedTuple

from flaxlm.errors import ConfigError

MOST_ROWS = 10**5  # of a period
EXAMPLE = "as in '0.7 stdlib + 0.3 files:notes/*.md'"
_WEIGHT = re.compile(r"\+?(?:\d{1,9}(?:\.\d{0,9})?|\.\d{1,9})(?:[eE][-+]?\d)?")
_BEGINS_WITH_NUMBER = re.compile(r"\s*[-+]?(?:\.?\d|nan\b|inf)\S*\s", re.IGNORECASE)


class Mixture(NamedTuple):
  """The names of corpora, and their weights as integers without a common divisor."""

  corpora: tuple[str, ...]
  weights: tuple[int, ...]


def parse_mixture(name: str) -> Mixture | None:
  """What a corpus is mixed of; None if it is not a mixture: does not begin with a weight.

  Raises `ConfigError` for a weight that is not positive or is missing, for one source only
  and for a source named twice.
  """
  if not _BEGINS_WITH_NUMBER.match(name):
    return None
  corpora, weights = [], []
  for part in re.split(r"\s\+\s+", name.strip()):
    weight, corpus = (*part.split(maxsplit=1), "")[:2]
    if _WEIGHT.fullmatch(weight) is None or not Fraction(weight):
      raise ConfigError(f"data.corpus={name!r}: {part!r} has no positive weight", EXAMPLE)
    if not corpus:
      raise ConfigError(f"data.corpus={name!r}: {part!r} is a weight of nothing", EXAMPLE)
    corpora.append(corpus)
    weights.append(Fraction(weight))
  twice = [corpus for corpus in corpora if corpora.count(corpus) > 1]
  if twice:
    raise ConfigError(f"data.corpus={name!r} names {twice[0]!r} twice", "add the weights")
  if len(corpora) == 1:
    raise ConfigError(f"data.corpus={name!r} is no mixture", f"name {corpora[0]!r} alone")
  scale = math.lcm(*(weight.denominator for weight in weights))
  integers = [int(weight * scale) for weight in weights]
  divisor = math.gcd(*integers)
  integers = [weight // divisor for weight in integers]
  if sum(integers) > MOST_ROWS:
    raise ConfigError(
      f"data.corpus={name!r}: weights in the ratio {':'.join(map(str, integers))}",
      f"round them, so that these numbers add up to {MOST_ROWS:,} or less",
    )
  return Mixture(tuple(corpora), tuple(integers))
