# SPDX-License-Identifier: Apache-2.0
"""What an engine is asked, what it answers, and what it may use for that."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax

from flaxlm.config import ResolvedModel
from flaxlm.decoding.drawing import HISTORY_RULES, RULES
from flaxlm.decoding.prefill import BLOCK_STEPS, CHUNK, bucket
from flaxlm.decoding.sampling import GREEDY, SamplingSettings
from flaxlm.errors import FlaxLMError

MOST_PADDING = 32  # tokens of padding, which cost no more than a pass of their own
SMALLEST_CACHE = 64  # slots
IDLE = GREEDY


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineRequest:
  """One answer to one prompt, as token ids.

  `source` is what an encoder-decoder reads; its prompt is what it has written so far. The
  answer ends after a token of `stop_tokens`, which are all of them: no other id is special.
  What depends on the text or the time is the client's, who cancels.
  """

  prompt: Sequence[int]
  max_new_tokens: int
  settings: SamplingSettings = IDLE  # greedy
  source: Sequence[int] | None = None
  num_top: int = 0  # likeliest tokens to report at each step
  stop_tokens: Collection[int] = ()

  @property
  def final_length(self) -> int:
    """Tokens that its cache holds in the end: the last one is never read."""
    return len(self.prompt) + self.max_new_tokens - 1


class Event(NamedTuple):
  """New tokens of a request, with their log-probabilities and the likeliest of each step.

  The last event of a request has the reason of its end: "stop" (a stop token, which is the
  last of `tokens`), "length", or "error", which is told by `error`.
  """

  number: int  # as `submit` has returned
  tokens: list[int]
  logprobs: list[float]
  top_tokens: list[list[int]]
  top_logprobs: list[list[float]]
  finish_reason: str | None = None
  error: FlaxLMError | None = None
  cached: int = 0  # tokens of its prompt that had been read before


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
  """The few shapes that an engine may use; each combination of them is a program.

  Sizes ascend, and the last of each is enough for every request.
  """

  rows: Sequence[int]  # of the batch
  slots: Sequence[int]  # of a row, and for an encoder-decoder of its source
  rules: Sequence[tuple[str, ...]]  # each set has all rules of those before it
  num_top: int  # the most likeliest tokens that a request may want

  @property
  def slots_of_reading(self) -> Sequence[int]:
    """Of a cache that prompts are read into: every second size, as each is a program for
    each length of a chunk, and a longer row costs a chunk little."""
    return [*self.slots][::-2][::-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
  """How large the batch may become, and which shapes it may have.

  Without `shapes` it takes what suits the requests, and compiles it when it is first
  needed. With them `warming.warm` compiles all programs before the first request.
  """

  rows: int = 16  # the most requests that are decoded together
  most_read: int | None = CHUNK  # prompt tokens between two blocks; None: whole prompts
  most_steps: int = BLOCK_STEPS  # of a block
  is_open: bool = False  # requests come at any time: short blocks while there are free rows
  most_bytes: int | None = None  # of the batch's cache, on all devices together
  prefix_bytes: int = 0  # of past texts that are kept, on all devices together
  whole_rows: bool = False  # room for whole answers at once, and padding: fewer programs
  shapes: Shapes | None = None


def few_shapes(cfg: ResolvedModel, rows: int, most_top: int = 20) -> Shapes:
  """Shapes for a server: few programs, for requests of all kinds.

  Of rows a CPU has half of the most, too: each costs its step time, of 124M 41 ms of
  processors with 4, 58 with 8, 90 with 16 and 157 with 32.
  """
  last = -(-(cfg.context + MOST_PADDING) // SMALLEST_CACHE) * SMALLEST_CACHE
  slots = [2 * SMALLEST_CACHE]
  while slots[-1] < last:
    slots.append(bucket(slots[-1] + 1, 2 * SMALLEST_CACHE, fine=256 <= slots[-1] < 1024))
  parts = [4] * (rows > 8) + [2] * (rows > 4 and jax.default_backend() == "cpu")
  without_history = tuple(name for name in RULES if name not in HISTORY_RULES)
  return Shapes(
    rows=sorted({1, *(-(-rows // part) for part in parts), rows}),
    slots=[*(n for n in slots if 5 * n <= 4 * last), last],
    rules=[(), ("temperature",), without_history, tuple(RULES)],
    num_top=min(most_top, cfg.num_ids),
  )


@dataclasses.dataclass
class Counters:
  """What an engine has done so far."""

  read_tokens: int = 0  # of prompts, by the model
  cached_tokens: int = 0  # of prompts, taken from the prefix cache
  drawn_tokens: int = 0
  steps: int = 0  # of decoding
  blocks: int = 0
