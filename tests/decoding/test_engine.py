# SPDX-License-Identifier: Apache-2.0
"""The engine: a request draws what it would alone, whoever comes and goes beside it."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from conftest import slow_but
from hypothesis import given, settings
from hypothesis import strategies as st
from parameters import random_params
from test_generate import model_of

from flaxlm.config import ModelConfig
from flaxlm.decoding.compile_counter import count_compilations
from flaxlm.decoding.engine import (
  Engine,
  EngineOptions,
  EngineRequest,
  Event,
  Shapes,
  few_shapes,
)
from flaxlm.decoding.generate import generate
from flaxlm.decoding.prefill import Request
from flaxlm.decoding.sampling import SamplingSettings, stack_settings
from flaxlm.decoding.warming import warm
from flaxlm.nn.models import build_model

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


# -- Requests come and go ------------------------------------------------------------------


@functools.cache
def expected(name: str, of: int) -> list[int]:
  model, params = small_model(name)
  return alone(model, params, requests_of(name)[of])


def small_model(name: str) -> tuple[Any, Any]:
  if name in FAMILIES:
    model = build_model(FAMILIES[name])
    return model, random_params(model)
  return model_of(name)


FAMILIES = {
  "rnn": ModelConfig(family="rnn", depth=1, width=16, vocab_size=64, context=64),
  "encoder_decoder": ModelConfig(
    family="encoder_decoder",
    encoder_depth=1,
    depth=1,
    width=16,
    num_heads=2,
    vocab_size=64,
    context=64,
  ),
}


def requests_of(name: str) -> list[EngineRequest]:
  rng, found = np.random.default_rng(7), []
  is_pair = name == "encoder_decoder"
  for row in range(6):
    prompt = rng.integers(0, 64, int(rng.integers(1, 40))).tolist()
    source = rng.integers(0, 64, int(rng.integers(1, 40))).tolist() if is_pair else None
    own = dict(source=source, stop_tokens=[7, 8] if row % 2 else [])
    found.append(request(prompt, int(rng.integers(1, 22)), row, **own))
  return found


@pytest.mark.parametrize(
  "name", slow_but(["gqa"], ["gqa", "rnn", "encoder_decoder", "window, mqa, untied"])
)
@settings(max_examples=8, deadline=None)
@given(
  st.lists(
    st.tuples(
      st.integers(0, 5), st.integers(0, 3), st.one_of(st.none(), st.integers(0, 4))
    ),
    min_size=1,
    max_size=10,
  )
)
def test_a_request_draws_the_same_tokens_alone_as_among_others(name: str, plan: list):
  """Each is (which request, steps before it arrives, steps after which it is cancelled)."""
  engine = engine_of(name)
  numbers: dict[int, tuple[int, bool]] = {}
  found: dict[int, list[Event]] = {}
  gone_at: dict[int, int] = {}
  now = 0

  def step() -> None:
    nonlocal now
    for event in engine.step():
      assert event.number not in cancelled
      found.setdefault(event.number, []).append(event)
    now += 1
    for number, at in gone_at.items():
      if at <= now:
        engine.cancel(number)
        cancelled.add(number)

  cancelled: set[int] = set()
  for which, wait, patience in plan:
    for _ in range(wait):
      step()
    number = engine.submit(requests_of(name)[which])
    numbers[number] = which
    if patience is not None:
      gone_at[number] = now + patience
  while not engine.is_idle:
    step()
  assert engine.num_active == engine.num_waiting == 0
  for number, which in numbers.items():
    tokens, whole = tokens_of(found.get(number, [])), expected(name, which)
    ended = found.get(number) and found[number][-1].finish_reason is not None
    assert tokens == whole if ended else tokens == whole[: len(tokens)]
    assert ended or number in cancelled


@functools.cache
def engine_of(name: str) -> Engine:
  """One for all examples: what others have left behind must not matter either."""
  model, params = small_model(name)
  options = EngineOptions(rows=3, most_read=32, most_steps=4, prefix_bytes=2**20)
  return Engine(model, params, 64, options=options)


# -- Programs ------------------------------------------------------------------------------


def serving(name: str = "gqa", **more: Any) -> Engine:
  """An engine with few shapes, which is warm."""
  model, params = small_model(name)
  shapes = Shapes(
    rows=[1, 3], slots=[64, 128], rules=few_shapes(model.cfg, 3).rules, num_tops=[0, 4]
  )
  options = EngineOptions(rows=3, most_read=32, most_steps=4, shapes=shapes, **more)
  engine = Engine(model, params, 64, tokenizer=None, options=options)
  assert warm(engine) > 0
  return engine


@pytest.mark.slow
def test_nothing_is_compiled_after_the_start():
  model, params = small_model("gqa")
  engine = serving(prefix_bytes=2**20)
  kinds = [{}, {"top_k": 3, "banned_tokens": [1, 2]}, {"presence_penalty": 1.0}]
  rng = np.random.default_rng(0)
  asked = [
    request(
      rng.integers(0, 64, int(rng.integers(1, 41))).tolist(),
      int(rng.integers(1, 23)),
      num_top=int(rng.integers(0, 5)),
      stop_tokens=[int(rng.integers(0, 64))],
      temperature=float(rng.integers(0, 2)),
      **kinds[n % 3],
    )
    for n in range(12)
  ]
  with count_compilations() as counter:
    numbers, events = [], []
    for of in [*asked[:6], *asked]:
      numbers.append(engine.submit(of))
      events += engine.step()
    found = finish(engine, events)
  assert counter.programs == 0
  for number, of in [*zip(numbers, [*asked[:6], *asked], strict=True)][::4]:
    assert tokens_of(found[number]) == alone(model, params, of)
    assert all(len(top) == of.num_top for e in found[number] for top in e.top_tokens)
