# SPDX-License-Identifier: Apache-2.0
"""What tells attention heads apart: figures of their weights, and an honest name of each.

A *pattern* is a set of places, for each query, such as the token before it. A head's share
of a pattern is the weight on those places, in the mean over the queries that have any. A
head is named by the rule of `name_head`, which the page states too.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# A head is named after a pattern that has so much of its weight, and partly if less has.
MOSTLY, PARTLY = 0.5, 0.25
LIFT = 2.0  # and so many times what an even spread over all that it sees would give
PART = 0.2  # each part of a mixture has as much, and together they have MOSTLY
FEWEST = 3  # queries, from which on a pattern that not all queries have can name a head
EVENLY = 0.9  # of the largest possible entropy
RULE = (
  f"A head is named after what has {MOSTLY:.0%} of its weight or more, in the mean over "
  f"the tokens for which there is such a thing, if that is {LIFT:g} times what an even "
  f"spread would give it. What depends on the words needs {FEWEST} such tokens, and "
  f"{LIFT:g} times the weight that any fixed place has there. Induction (Olsson et al., "
  "2022) is what followed an earlier copy of the token, in this text or in random tokens "
  "that the model reads twice; same word is earlier copies themselves. "
  f"From {PARTLY:.0%} it is partly so. "
  f"A mixture has {PART:.0%} or more on each part, and {MOSTLY:.0%} on all. "
  f"Evenly is {EVENLY:.0%} of the largest entropy. All others are told by how many tokens "
  "they look at, and how far away."
)

NAMES = {
  "induction": "induction",
  "same": "same word",
  "punctuation": "punctuation",
  "blank": "blanks",
  "first": "first token",
  "last": "last token",
  "previous": "previous token",
  "itself": "itself",
  "next": "next token",
}
BY_WORDS = ("induction", "same", "punctuation", "blank")  # the others are fixed places


class Word(NamedTuple):
  """What decides whether tokens are the same, and what kind of token one is."""

  id: int
  text: bytes | int  # without blanks around it; the id, if nothing is left
  sort: str  # see `pieces.sort_of`


class Share(NamedTuple):
  """How much weight each of N heads has on a pattern."""

  own_N: np.ndarray  # of the queries that have the pattern, in the mean
  whole_N: np.ndarray  # of all queries
  even: float  # what an even spread would have, of the first
  num_queries: int
  rival_N: np.ndarray  # the most that a fixed place has, of the same queries


def sight_of(T: int, S: int, causal: bool, window: int | None, sinks: int) -> np.ndarray:
  """Which keys a query may see (T, S), as nn/masks.py has it for one document."""
  away_TS = np.arange(T)[:, None] - np.arange(S)
  sight_TS = np.ones((T, S), bool)
  if window is not None:
    sight_TS = (np.abs(away_TS) < window) | (np.arange(S) < sinks)
  return sight_TS & (away_TS >= 0) if causal else sight_TS


def patterns_of(
  kind: str, causal: bool, queries: Sequence[Word], keys: Sequence[Word]
) -> dict[str, np.ndarray]:
  """The places (T, S) of each pattern that this kind of map can have."""
  T, S = len(queries), len(keys)
  at_T1, at_S = np.arange(T)[:, None], np.arange(S)
  same_TS = np.array([[q.text == k.text for k in keys] for q in queries])
  of_sort = lambda sort: np.tile([key.sort == sort for key in keys], (T, 1))
  everywhere_TS = np.ones((T, S), bool)
  found = {"first": everywhere_TS & (at_S == 0)}
  if kind == "cross":
    found["last"] = everywhere_TS & (at_S == S - 1)
    return found | {"same": same_TS, "punctuation": of_sort("punctuation")}
  others_TS = at_S != at_T1
  found |= {"previous": at_S == at_T1 - 1, "itself": ~others_TS}
  if causal:
    ids_S = np.array([key.id for key in keys])
    after_TS = np.zeros((T, S), bool)
    after_TS[:, 1:] = ids_S[:, None] == ids_S[None, :-1]
    found["induction"] = after_TS & (at_S < at_T1)
  else:
    found["next"] = at_S == at_T1 + 1
  found["same"] = same_TS & others_TS
  return found | {name: of_sort(name) & others_TS for name in ("punctuation", "blank")}


def measure(
  weights_NTS: np.ndarray, sight_TS: np.ndarray, patterns: dict[str, np.ndarray], start: int
) -> dict[str, Share]:
  """Each pattern's share of the weight, over the queries from `start` on; a pattern that no
  query has is left out."""
  seen_NTS, sight_TS = weights_NTS[:, start:], sight_TS[start:]
  by_query: dict[str, np.ndarray] = {}
  places: dict[str, np.ndarray] = {}
  for name, mask_TS in patterns.items():
    places[name] = mask_TS[start:] & sight_TS
    by_query[name] = np.einsum("NTS,TS->NT", seen_NTS, places[name].astype(np.float64))
  fixed = [name for name in patterns if name not in BY_WORDS]
  result = {}
  for name, mask_TS in places.items():
    has_T = mask_TS.any(1)
    if not has_T.any():
      continue
    rivals = [by_query[other][:, has_T].mean(1) for other in fixed]
    result[name] = Share(
      own_N=by_query[name][:, has_T].mean(1),
      whole_N=by_query[name].mean(1),
      even=float((mask_TS.sum(1) / sight_TS.sum(1))[has_T].mean()),
      num_queries=int(has_T.sum()),
      rival_N=np.max(rivals, 0),
    )
  return result


def layer_figures(
  weights_NTS: np.ndarray,
  sight_TS: np.ndarray,
  patterns: dict[str, np.ndarray],
  causal: bool,
  repeated_N: np.ndarray | None,
) -> list[dict[str, Any]]:
  """Numbers that tell the heads of one layer apart, one entry per head.

  They are means over the queries. In causal maps the first query, which sees only itself,
  is left out if there are others. `entropy` is in bits and `distance` in tokens; the others
  are shares of the weight, None where no query has such a place. Weight that goes to
  learned sinks is one more outcome of the entropy. `repeated_N` is what `repeated_share`
  found.
  """
  weights = weights_NTS.astype(np.float64)
  T, S = weights.shape[-2:]
  start = 1 if causal and T > 1 else 0
  shares = measure(weights, sight_TS, patterns, start)
  entropies_N = entropy_bits(weights[:, start:]).mean(-1)
  most_bits = float(np.log2(sight_TS[start:].sum(-1)).mean())
  away_TS = np.abs(np.arange(T)[:, None] - np.arange(S))[start:]
  distances_N = (weights[:, start:] * away_TS).sum(-1).mean(-1)
  is_self = "itself" in patterns
  result = []
  for n, bits in enumerate(entropies_N.tolist()):
    own = {name: float(share.own_N[n]) for name, share in shares.items()}
    entry: dict[str, Any] = {"entropy": bits}
    if is_self:
      entry["distance"] = float(distances_N[n])
    entry |= {name: own.get(name) for name in patterns}
    if repeated_N is not None:
      entry["induction_repeated"] = float(repeated_N[n])
    is_even = bits >= EVENLY * most_bits
    named, strength = name_head(shares, n, is_even, entry.get("induction_repeated"))
    where = entry.get("distance")
    entry["looks_at"] = named or describe_head(bits, where, "back" if causal else "away")
    result.append(entry | {"strength": strength})
  return result


def name_head(
  shares: dict[str, Share], n: int, is_even: bool, repeated: float | None
) -> tuple[str, float]:
  """The name of head n by `RULE`, and the share that earned it; "" if it has none."""
  lifted = {
    name: float(share.own_N[n])
    for name, share in shares.items()
    if share.own_N[n] >= LIFT * share.even
    and (name not in BY_WORDS or is_told_by_words(share, n))
  }
  if repeated is not None:
    lifted["induction"] = max(lifted.get("induction", 0.0), repeated)
  for group in (BY_WORDS, tuple(lifted)):
    best = max(group, key=lambda name: lifted.get(name, 0.0), default="")
    if lifted.get(best, 0.0) >= MOSTLY:
      return NAMES[best], lifted[best]
  if is_even:
    return "evenly", EVENLY
  parts = sorted(shares, key=lambda name: -shares[name].whole_N[n])
  parts = [name for name in parts if name in lifted and shares[name].whole_N[n] >= PART]
  together = sum(float(shares[name].whole_N[n]) for name in parts)
  if len(parts) > 1 and MOSTLY <= together <= 1:  # above 1, they are the same places
    return "mixture: " + " + ".join(NAMES[name] for name in parts), together / 2
  best = max(lifted, key=lambda name: lifted[name], default="")
  if lifted.get(best, 0.0) >= PARTLY:
    return f"partly {NAMES[best]}", lifted[best]
  return "", 0.0


def is_told_by_words(share: Share, n: int) -> bool:
  return share.num_queries >= FEWEST and bool(share.own_N[n] >= LIFT * share.rival_N[n])


def describe_head(bits: float, distance: float | None, way: str) -> str:
  """A head without a name: as many tokens as would, evenly, have its entropy."""
  count = round(2**bits)
  words = f"about {count} tokens" if count > 1 else "one token"
  return words if distance is None else f"{words}, {distance:.0f} {way}"


def repeated_share(weights_LNTS: np.ndarray, length: int) -> np.ndarray:
  """Of a row that ends in `length` tokens twice: the weight (L, N) of the second copies on
  what followed the first. It is the prefix matching score of Olsson et al. (2022)."""
  on_next = np.diagonal(weights_LNTS, 1 - length, -2, -1)
  return on_next[..., -length:].astype(np.float64).mean(-1)


def entropy_bits(weights: np.ndarray) -> np.ndarray:
  """The entropy of each distribution along the last dim; the rest to 1 is one outcome."""
  rest = np.maximum(1 - weights.sum(-1, keepdims=True), 0)
  rest[rest < 1e-4] = 0  # rounding, not a sink
  whole = np.concatenate([weights, rest], -1)
  return -(whole * np.log2(np.where(whole > 0, whole, 1))).sum(-1)
