# SPDX-License-Identifier: Apache-2.0
"""Which query sees which key, and what else is added to their scores.

Visibility is decided in one place, `visible`, from slots (where a token lies in its row),
never from positions (which restart with every packed document).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# The value of a masked score or logit; -inf would make empty rows and entropies NaN.
LOWEST = jnp.finfo(jnp.float32).min

CosSin = tuple[jax.Array, jax.Array]


class Placement(NamedTuple):
  """Where queries and keys are in their rows, from which `visible` makes the mask.

  Segments are None if every row is one document, key positions are None if they equal the
  slots, and key slots are None if key s is in slot s.
  """

  query_slots_BT: jax.Array
  query_segments_BT: jax.Array | None = None
  key_segments_BS: jax.Array | None = None
  key_positions_BS: jax.Array | None = None
  key_slots_BS: jax.Array | None = None


class Scoring(NamedTuple):
  """How scores are computed from q . k before masking: constants of the architecture."""

  scale: float
  softcap: float | None = None


class Reach(NamedTuple):
  """Causal attention over whole rows; with a window, no key before it is visible.

  `is_all`: the mask hides nothing else, because every row is one document.
  """

  window: int | None = None
  is_all: bool = False


class Pattern(NamedTuple):
  """All that a mask of whole rows hides, for kernels that compute it by themselves: later
  keys if `causal`, those outside of the window, and those of other segments."""

  causal: bool = False
  window: int | None = None
  segments: tuple[jax.Array, jax.Array] | None = None  # of queries (B, T), of keys (B, S)


@dataclasses.dataclass(frozen=True)
class Band:
  """A mask by the distance of a key before its query: from `least` to `most`, None: any.

  As a function it is what kernels compute for their blocks, so it has to be hashable.
  """

  least: int | None
  most: int | None

  @classmethod
  def of(cls, pattern: Pattern) -> "Band":
    most = None if pattern.window is None else pattern.window - 1
    return cls(0 if pattern.causal else None if most is None else -most, most)

  @property
  def is_all(self) -> bool:
    """Whether it hides nothing."""
    return self.least is None and self.most is None

  def __call__(self, queries: Any, keys: Any) -> Any:
    seen = [] if self.least is None else [queries - keys >= self.least]
    seen += [] if self.most is None else [queries - keys <= self.most]
    return seen[0] if len(seen) == 1 else seen[0] & seen[1]


class Sight(NamedTuple):
  """What the layers of one kind see: a mask, a bias of the scores, RoPE's (cos, sin).

  `reach` says which keys a kernel may skip, all of which the mask hides; None: no keys.
  `pattern` says the same as the mask; None: only the mask says it.
  """

  mask_BTS: jax.Array | None
  bias_XNTS: jax.Array | None = None  # X is 1 or B
  cos_sin: CosSin | None = None
  reach: Reach | None = None
  pattern: Pattern | None = None


def visible(
  where: Placement,
  num_keys: int,
  causal: bool = True,
  window: int | None = None,
  sink_tokens: int = 0,
) -> jax.Array | None:
  """mask_BTS: the key is of the same document, within the window, and, if `causal`, not
  later. The first `sink_tokens` of a document are within every window (Xiao et al., 2023).
  None: everything is visible."""
  masks = []
  query, key = where.query_slots_BT[:, :, None], jnp.arange(num_keys)[None, None, :]
  if where.key_slots_BS is not None:
    key = where.key_slots_BS[:, None]
  if window is not None:
    near = key > query - window
    if not causal:
      near &= key < query + window
    if sink_tokens:
      positions_BS = where.key_positions_BS
      near |= (key if positions_BS is None else positions_BS[:, None]) < sink_tokens
    masks.append(near)
  if causal:
    masks.append(key <= query)
  if where.query_segments_BT is not None:
    assert where.key_segments_BS is not None
    masks.append(where.query_segments_BT[:, :, None] == where.key_segments_BS[:, None])
  return functools.reduce(jnp.logical_and, masks) if masks else None
