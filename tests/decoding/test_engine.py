# SPDX-License-Identifier: Apache-2.0
"""The engine: a request draws what it would alone, whoever comes and goes beside it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from test_generate import model_of

from flaxlm.decoding.engine import Engine, EngineOptions, EngineRequest, Event
from flaxlm.decoding.generate import generate
from flaxlm.decoding.prefill import Request
from flaxlm.decoding.sampling import SamplingSettings, stack_settings

DRAWN = SamplingSettings(temperature=1.0, seed=3)


def request(
  prompt: Sequence[int], num_new: int, row: int = 0, **more: Any
) -> EngineRequest:
  own = {
    name: more.pop(name) for name in ("stop_tokens", "num_top", "source") if name in more
  }
  settings = SamplingSettings(**{"temperature": 1.0, "seed": 3, "row": row} | more)
  return EngineRequest(prompt=prompt, max_new_tokens=num_new, settings=settings, **own)


def finish(engine: Engine, events: list[Event] | None = None) -> dict[int, list[Event]]:
  """All events of all requests, by their number."""
  found: dict[int, list[Event]] = {}
  for event in events or []:
    found.setdefault(event.number, []).append(event)
  for _ in range(1000):
    if engine.is_idle:
      return found
    for event in engine.step():
      found.setdefault(event.number, []).append(event)
  raise AssertionError("it never ends")


def tokens_of(events: list[Event]) -> list[int]:
  return [token for event in events for token in event.tokens]


def alone(model: Any, params: Any, of: EngineRequest, num_ids: int = 64) -> list[int]:
  """The tokens of `generate`, up to a stop token."""
  sources = None if of.source is None else [of.source]
  whole = Request([of.prompt], of.max_new_tokens, num_ids, sources)
  blocks = generate(model, params, whole, stack_settings([of.settings]))
  tokens = np.concatenate([block.tokens_BT[0] for block in blocks]).tolist()
  ends = [n for n, token in enumerate(tokens) if token in of.stop_tokens]
  return tokens[: ends[0] + 1] if ends else tokens


REQUESTS = [
  request([1, 2, 3], 20),
  request([4], 9, 1),
  request([5, 6, 7, 8, 9, 10, 11], 3, 2, temperature=0),
  request([12, 13], 1, 3),
  request([*range(20, 60)], 24, 4, top_p=0.9),
  request([1, 2, 3], 20, 0, sample=1),
  request([9, 8], 30, 5, repetition_penalty=1.5),
  request([3, 1], 30, 6, stop_tokens=[5, 9, 11, 17, 25]),
]


@pytest.mark.parametrize("rows", [1, 3])
def test_the_tokens_are_those_of_generate(rows: int):
  model, params = model_of("gqa")
  engine = Engine(model, params, 64, options=EngineOptions(rows=rows))
  numbers = [engine.submit(of) for of in REQUESTS]
  found = finish(engine)
  for number, of in zip(numbers, REQUESTS, strict=True):
    assert tokens_of(found[number]) == alone(model, params, of), of
    reasons = [event.finish_reason for event in found[number]]
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    stopped = tokens_of(found[number])[-1] in of.stop_tokens
    assert reasons[-1] == ("stop" if stopped else "length")
