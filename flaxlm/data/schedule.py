# SPDX-License-Identifier: Apache-2.0
"""Which source of a mixture each row comes from.

The order of the sources repeats after a period of as many rows as their weights have
together, as integers: 10 for 0.7 and 0.3. A row's source, and its number among the rows of
that source, are then read from a table of one period, whatever the number of the row.
"""

from collections.abc import Sequence

import numpy as np


class Schedule:
  """Which source row n comes from: each has within one row of its share of any first rows.

  A source's row j may come no earlier than its share reaches j rows and has to come before
  it reaches j + 1; of the rows that may come, that which has to come first does. This meets
  every deadline (Balinski and Young, 1975; Baruah, Cohen, Plaxton and Varvel, 1996).
  """

  def __init__(self, weights: Sequence[int]):
    self.weights, self.period = np.array(weights), sum(weights)
    self._source_P = np.zeros(self.period, np.int64)
    self._before_P = np.zeros(self.period, np.int64)  # rows of the same source before
    counts = [0] * len(weights)
    for n in range(self.period):
      may_come = [
        (-(-(count + 1) * self.period // weight), source)
        for source, (count, weight) in enumerate(zip(counts, weights, strict=True))
        if count * self.period <= n * weight
      ]
      _, source = min(may_come)
      self._source_P[n], self._before_P[n] = source, counts[source]
      counts[source] += 1
    assert counts == list(weights), "every deadline is met"

  def __getitem__(self, n: int) -> tuple[int, int]:
    """(the source of row n, the row's number among those of that source)."""
    round_, place = divmod(n, self.period)
    source = int(self._source_P[place])
    return source, round_ * int(self.weights[source]) + int(self._before_P[place])

  def place_of(self, source: int, j: int) -> int:
    """The n of a source's row j."""
    round_, number = divmod(j, int(self.weights[source]))
    return round_ * self.period + int(np.flatnonzero(self._source_P == source)[number])
