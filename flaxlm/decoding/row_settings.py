# SPDX-License-Identifier: Apache-2.0
"""How the rows of a batch are sampled, whose requests come and go.

Settings are arrays, of which only the kinds of rules in use are compiled in. The regular
expressions of all rows share one automaton, and their states are numbered one expression
after another: when some are dropped, those that follow get other numbers.
"""

import functools
import itertools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.config import ResolvedModel
from flaxlm.decoding.constraint import (
  FREE,
  NO_AUTOMATON,
  Automaton,
  build_automaton,
  build_part,
)
from flaxlm.decoding.drawing import (
  HISTORY_RULES,
  TokenHistory,
  history_of_prompts,
  rules_in_use,
)
from flaxlm.decoding.generate import StaticSampling
from flaxlm.decoding.prefill import bucket
from flaxlm.decoding.requests import IDLE, EngineRequest, Shapes
from flaxlm.decoding.rows import Drawing
from flaxlm.decoding.sampling import Sampling, SamplingSettings, check_rows, stack_rows
from flaxlm.errors import ConfigError
from flaxlm.tokenizers import AnyTokenizer

# Where shapes are given: biases and stops of a row; expressions, states, kinds of tokens.
LEAST_BIASES, LEAST_STOPS, LEAST_AUTOMATON = 512, 8, (4, 256, 64)

# How some rows draw, and the part of it that is compiled in.
RowSampling = tuple[Drawing, StaticSampling]


class RowSettings:
  """The sampling of rows, and the automaton that they share."""

  def __init__(
    self,
    cfg: ResolvedModel,
    num_ids: int,
    shapes: Shapes | None,
    tokenizer: AnyTokenizer | None,
  ):
    self.cfg, self.num_ids = cfg, np.int32(num_ids)
    self.shapes, self.tokenizer = shapes, tokenizer
    self._starts: dict[str, int] = {}  # the first state of each expression
    self._build([])

  def check(self, request: EngineRequest) -> None:
    """Raises `ConfigError` for settings that are wrong."""
    settings = request.settings
    settings.check()
    if settings.regex is not None:
      if self.tokenizer is None:
        raise ConfigError("a regex needs the tokenizer")
      build_part(settings.regex, self.tokenizer)
    states = {None: FREE, settings.regex: FREE}
    check_rows(stack_rows([settings], NO_AUTOMATON, states), 1, int(self.num_ids))
    if self.shapes is not None and request.num_top > self.shapes.num_top:
      raise ConfigError(
        f"top-logprobs is {request.num_top}", f"it can be 0 to {self.shapes.num_top}"
      )

  def sampling_of(self, requests: Sequence[EngineRequest | None]) -> RowSampling:
    """The sampling of some rows; None is an idle one."""
    settings = [IDLE if request is None else request.settings for request in requests]
    given = [request for request in requests if request is not None]
    num_top = max((request.num_top for request in given), default=0)
    stops = max((len(request.stop_tokens) for request in given), default=0)
    width = bucket(max(1, stops), smallest=4)
    if self.shapes is None:
      sampling = stack_rows(settings, self.automaton, self._states)
      level, has_top = None, None
      num_top = min(bucket(num_top, smallest=1), self.cfg.num_ids) if num_top else 0
      static = StaticSampling(rules_in_use(sampling), num_top)
    else:
      sampling = stack_rows(settings, self.automaton, self._states, LEAST_BIASES)
      level = np.int32(level_of(sampling, self.shapes))
      has_top, width = np.bool_(num_top > 0), max(width, LEAST_STOPS)
      static = StaticSampling((), self.shapes.num_top, tuple(self.shapes.rules))
    stops_BE = np.full((len(requests), width), -1, np.int32)
    for row, request in enumerate(requests):
      if request is not None:
        stops_BE[row, : len(request.stop_tokens)] = [*request.stop_tokens]
    drawing = Drawing(sampling, stops_BE, self.num_ids, level, has_top)
    return jax.device_put(drawing), static

  # -- Regular expressions

  def admit(
    self, new: Iterable[EngineRequest], active: Iterable[EngineRequest]
  ) -> np.ndarray | None:
    """Adds the expressions of new requests, and drops those that no active one has.

    Returns the new number of each state that had one; None if all of them stay.
    """
    used, wanted = (
      {request.settings.regex for request in requests if request.settings.regex is not None}
      for requests in (active, new)
    )
    unknown = sorted(wanted - self._starts.keys())
    if not unknown:
      return None
    assert self.tokenizer is not None
    before, num_states = self._starts, self.automaton.next_XY.shape[0]
    self._build([*(e for e in before if e in used), *unknown])
    moved_X = np.zeros(num_states, np.int32)  # FREE: dropped
    for expression in used:
      count = build_part(expression, self.tokenizer).num_states
      start = before[expression]
      moved_X[start : start + count] = self._starts[expression] + np.arange(count)
    stay = all(self._starts[expression] == before[expression] for expression in used)
    return None if stay else moved_X

  def _build(self, expressions: Sequence[str]) -> None:
    self.automaton: Automaton = NO_AUTOMATON
    self._states: dict[str | None, int] = {None: FREE}
    if self.tokenizer is None:
      return
    sizes = (1, 1, 1) if self.shapes is None else LEAST_AUTOMATON
    automaton, initial = build_automaton(expressions, self.tokenizer, sizes)
    self.automaton = jax.device_put(automaton)
    self._states |= dict(zip(expressions, initial, strict=True))
    parts = [build_part(expression, self.tokenizer) for expression in expressions]
    starts = itertools.accumulate((part.num_states for part in parts), initial=1)
    self._starts = dict(zip(expressions, starts, strict=False))

  # -- What rules must know of the past

  def needs_history(self, request: EngineRequest) -> bool:
    """Whether a rule that is compiled in for the request must know its tokens so far."""
    return self.shapes is not None or bool(rules_of([request.settings]) & HISTORY_RULES)

  def history_of(self, requests: Sequence[EngineRequest]) -> TokenHistory:
    """The history of requests that have drawn nothing yet."""
    states = [self._states[request.settings.regex] for request in requests]
    prompts, states_B = [request.prompt for request in requests], np.array(states, np.int32)
    return history_of_prompts(prompts, states_B, self.cfg.vocab_size)


def level_of(sampling: Sampling, shapes: Shapes) -> int:
  """The first of the shapes' sets of rules that has all that some row uses."""
  needed = {*rules_in_use(sampling)}
  return next(n for n, names in enumerate(shapes.rules) if needed <= {*names})


def rules_of(settings: Sequence[SamplingSettings]) -> set[str]:
  """The rules that some row uses; no automaton need be built to know."""
  states: dict[str | None, int] = {one.regex: FREE + 1 for one in settings}
  return {*rules_in_use(stack_rows(settings, NO_AUTOMATON, states | {None: FREE}))}


@functools.partial(jax.jit, static_argnames=("batch", "num_tokens"))
def empty_history(batch: int, num_tokens: int) -> TokenHistory:
  shape = (batch, num_tokens)
  states_B = jnp.full(batch, FREE, jnp.int32)
  return TokenHistory(jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32), states_B)
