# SPDX-License-Identifier: Apache-2.0
"""The engine: a request draws what it would alone, whoever comes and goes beside it."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest
from conftest import fuzz, slow, slow_but
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from meshes import mesh_of
from parameters import random_params
from test_completions import make_run
from test_generate import model_of

from flaxlm.config import ModelConfig, MoEConfig
from flaxlm.decoding import engine as engine_module
from flaxlm.decoding import reader
from flaxlm.decoding.compile_counter import count_compilations
from flaxlm.decoding.engine import Engine
from flaxlm.decoding.generate import generate
from flaxlm.decoding.prefill import Request
from flaxlm.decoding.prefix_store import PIECE
from flaxlm.decoding.requests import EngineOptions, EngineRequest, Event, Shapes, few_shapes
from flaxlm.decoding.row_sizes import cache_bytes
from flaxlm.decoding.sampling import SamplingSettings, stack_settings
from flaxlm.decoding.warming import warm
from flaxlm.errors import ConfigError, NonFiniteError
from flaxlm.nn.models import abstract_params, build_model
from flaxlm.sharding import mesh_for, use_mesh


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


@pytest.mark.parametrize(("rows", "ahead"), [(3, False), slow(1, False), slow(3, True)])
def test_the_tokens_are_those_of_generate(rows: int, ahead: bool):
  """Also where the device is a block ahead of the host, as an accelerator is."""
  model, params = model_of("gqa")
  engine = Engine(model, params, 64, options=EngineOptions(rows=rows))
  engine.runs_ahead = ahead
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
  if name == "int8":
    model, params = model_of("gqa")
    execution = dataclasses.replace(model.execution, narrow_cache=True)
    return model.clone(execution=execution), params
  if name in FAMILIES:
    model = build_model(FAMILIES[name])
    return model, random_params(model)
  return model_of(name)


FAMILIES = {
  "long": ModelConfig(depth=1, width=16, num_heads=2, vocab_size=64, context=320),
  "moe": ModelConfig(
    depth=1,
    width=16,
    num_heads=2,
    vocab_size=64,
    context=64,
    tied_embeddings=False,
    moe=MoEConfig(num_experts=4, experts_per_token=2),
  ),
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
  "name",
  [
    *slow_but(["gqa"], ["gqa", "rnn", "window, mqa, untied"]),
    fuzz("encoder_decoder"),
    fuzz("int8"),
  ],
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


@pytest.mark.parametrize("is_open, later", [(True, [1, 4, 4]), (False, [16, 16, 16])])
def test_a_block_ends_with_an_answer_and_is_short_while_others_may_come(is_open, later):
  """Who waits for an answer, or for its row, does not wait for others' next tokens."""
  model, params = small_model("gqa")
  options = EngineOptions(rows=2, most_steps=16, is_open=is_open)
  engine = Engine(model, params, 64, options=options)
  short, _ = (
    engine.submit(request([1, number], new)) for number, new in enumerate((4, 60))
  )
  events: list[Event] = []
  while not any(event.number == short and event.finish_reason for event in events):
    events = engine.step()
  assert engine.counters.steps == 3  # its first token is the prompt's
  for num_steps in later:
    before = engine.counters.steps
    engine.step()
    assert engine.counters.steps - before == num_steps


def test_a_full_batch_has_long_blocks():
  model, params = small_model("gqa")
  options = EngineOptions(rows=2, most_steps=16, is_open=True)
  engine = Engine(model, params, 64, options=options)
  for number in range(2):
    engine.submit(request([1, number], 40))
  while engine.counters.steps < 16:
    engine.step()
  assert engine.counters.blocks == 1


# -- Programs ------------------------------------------------------------------------------


def placed_on(mesh: Mesh, model: Any, params: Any) -> Any:
  wanted = abstract_params(model, mesh)
  return jax.tree.map(lambda x, at: jax.device_put(x, at.sharding), params, wanted)


def serving(name: str = "gqa", **more: Any) -> Engine:
  """An engine with few shapes, which is warm; on a mesh, as the server's."""
  model, params = small_model(name)
  mesh = mesh_of()
  rules = few_shapes(model.cfg, 3).rules[1::2]
  shapes = Shapes(rows=[1, 3], slots=[64, 96], rules=rules, num_top=4)
  options = EngineOptions(rows=3, most_read=64, most_steps=4, shapes=shapes, **more)
  with use_mesh(mesh):
    engine = Engine(model, placed_on(mesh, model, params), 64, mesh, options=options)
  assert warm(engine) > 0
  return engine


@pytest.mark.parametrize("name", [slow("gqa"), fuzz("rnn"), slow("window, mqa, untied")])
def test_nothing_is_compiled_after_the_start(name: str):
  model, params = small_model(name)
  engine = serving(name, prefix_bytes=2**20)
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
  all_asked = [*asked[:6], *asked, *(request([*of.prompt, 5], 5) for of in asked[:3])]
  with count_compilations() as counter:
    numbers, events = [], []
    for of in all_asked:
      numbers.append(engine.submit(of))
      events += engine.step()
    found = finish(engine, events)
  assert counter.programs == 0
  assert engine.counters.cached_tokens or name == "gqa", "its pieces are longer"
  for number, of in [*zip(numbers, all_asked, strict=True)][::4]:
    assert tokens_of(found[number]) == alone(model, params, of)
    assert all(len(top) == of.num_top for e in found[number] for top in e.top_tokens)


# -- Rows ----------------------------------------------------------------------------------


def test_a_long_prompt_does_not_stall_the_others(monkeypatch):
  """At most `most_read` of its tokens are read between two blocks of steps."""
  done: list[int] = []  # tokens read, or 0 for a block

  def logged(module: Any, name: str, what: Any) -> None:
    function = getattr(module, name)

    def logging(*arguments: Any) -> Any:
      done.append(what(*arguments))
      return function(*arguments)

    monkeypatch.setattr(module, name, logging)

  logged(reader, "prefill_chunk", lambda model, params, tokens_RT, *_: tokens_RT.size)
  logged(engine_module, "decode_rows", lambda *_: 0)
  engine = engine_of("gqa")
  engine.submit(request([50], 25, 1))
  engine.step()
  for row in (2, 3):
    engine.submit(request([*range(row, row + 38)], 3, row))
  finish(engine)
  between = [sum(run) for is_block, run in itertools.groupby(done, bool) if is_block]
  assert between == [32] * 5, "one short prompt, and two of 38 in two chunks each"
  assert done.count(0) > len(between)


def test_a_free_row_is_taken_at_once():
  """And is never idle while others wait: few steps more than there are tokens."""
  options = dataclasses.replace(engine_of("gqa").options, most_read=None)
  engine = Engine(*model_of("gqa"), 64, options=options)
  asked = [request([row], 2 + 7 * (row % 2), row) for row in range(8)]
  numbers = [engine.submit(of) for of in asked]
  found = finish(engine)
  assert [len(tokens_of(found[number])) for number in numbers] == [2, 9] * 4
  after_first = sum(of.max_new_tokens - 1 for of in asked)
  assert engine.counters.drawn_tokens == after_first + len(asked)
  assert engine.counters.steps <= after_first / 3 + 8


def test_a_cancelled_request_is_gone_wherever_it_is():
  engine = engine_of("gqa")
  kept = engine.submit(request([1], 20, 1))
  in_row = engine.submit(request([2], 20, 2))
  being_read = engine.submit(request([*range(1, 39)], 20, 3))
  in_queue = [engine.submit(request([4], 20, 4 + n)) for n in range(4)]
  events = engine.step()
  for number in (in_row, being_read, *in_queue, in_row):
    engine.cancel(number)
  found = finish(engine, [event for event in events if event.number == kept])
  assert [*found] == [kept] and len(tokens_of(found[kept])) == 20
  assert engine.is_idle and not engine.step()


def test_what_can_never_fit_is_refused_and_the_rest_waits():
  model, params = small_model("gqa")
  slots_64 = cache_bytes(model, 1, 64, 0)
  options = EngineOptions(rows=3, most_steps=4, most_read=32, most_bytes=slots_64)
  engine = Engine(model, params, 64, options=options)
  with pytest.raises(ConfigError, match="a prompt has no tokens"):
    engine.submit(request([], 2))
  with pytest.raises(ConfigError, match="a regex needs the tokenizer"):
    engine.submit(request([1], 2, regex="a"))
  with pytest.raises(ConfigError, match="prompt of 60 tokens"):
    engine.submit(request([1] * 60, 20))
  for row in range(3):
    engine.submit(request([1], 2, row))
  most = 0
  while not engine.is_idle:
    engine.step()
    most = max(most, engine.num_active)
  assert most == 1, "there is room for one row"
  options = dataclasses.replace(options, most_bytes=slots_64 - 1)
  engine = Engine(model, params, 64, options=options)
  with pytest.raises(ConfigError, match=r"a request of 3 tokens needs a cache of more"):
    engine.submit(request([1], 2))


# -- What texts begin with -----------------------------------------------------------------


@pytest.mark.slow
def test_what_was_read_before_is_not_read_again():
  """And what was written, where a conversation goes on; the tokens are the same."""
  model, params = small_model("long")
  options = EngineOptions(rows=2, most_steps=16, prefix_bytes=2**20)
  engine = Engine(model, params, 64, options=options)
  rng = np.random.default_rng(0)
  beginning = rng.integers(0, 64, 2 * PIECE).tolist()
  for n, end in enumerate(([1], [2, 3], [])):
    of = request([*beginning, *end], 4, n)
    number, before = engine.submit(of), dataclasses.replace(engine.counters)
    events = finish(engine)[number]
    assert tokens_of(events) == alone(model, params, of)
    cached = engine.counters.cached_tokens - before.cached_tokens
    read = engine.counters.read_tokens - before.read_tokens
    assert cached + read == len(of.prompt)
    assert {event.cached for event in events} == {cached}
    assert cached == [0, 2 * PIECE, PIECE][n], "a token of a prompt is always read"
  first = request([*beginning, 5], PIECE, 7)
  number = engine.submit(first)
  answer = tokens_of(finish(engine)[number])
  before = engine.counters.cached_tokens
  following = request([*first.prompt, *answer, 9], 4, 8)
  number = engine.submit(following)
  assert tokens_of(finish(engine)[number]) == alone(model, params, following)
  assert engine.counters.cached_tokens - before == 3 * PIECE


# -- What goes wrong -----------------------------------------------------------------------


@pytest.mark.slow
def test_a_request_that_is_not_finite_ends_alone():
  """An id whose embedding is NaN; the next one in its row finds nothing of it."""
  model, params = small_model("moe")
  table = np.array(params["embedding"]["table"])
  table[5] = np.nan
  broken = params | {"embedding": {"table": table}}
  engine = Engine(model, broken, 64, options=EngineOptions(rows=2, most_steps=4))
  no_5 = dict(banned_tokens=[5])
  ways = [
    request([1, 2], 12, **no_5),
    request([5, 2], 12, 1),
    request([3], 12, 2, **no_5),
  ]
  numbers = [engine.submit(of) for of in ways]
  found = finish(engine)
  assert found[numbers[1]][-1].finish_reason == "error"
  assert isinstance(found[numbers[1]][-1].error, NonFiniteError)
  assert not tokens_of(found[numbers[1]])
  for n in (0, 2):
    assert tokens_of(found[numbers[n]]) == alone(model, params, ways[n])


# -- Everything together -------------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "tensor"),
  [
    fuzz("gqa", 2),
    fuzz("rnn", 2),
    fuzz("encoder_decoder", 2),
    slow("int8", 4),  # of 2 kv heads, each is on two devices
    fuzz("window, mqa, untied", 4),
  ],
)
def test_a_mesh_changes_no_token(name: str, tensor: int):
  model, params = small_model(name)
  mesh = mesh_for(mesh_of(fsdp=2, tensor=tensor), model.cfg)
  options = EngineOptions(rows=4, most_read=32, most_steps=4, prefix_bytes=2**20)
  engine = Engine(model, placed_on(mesh, model, params), 64, mesh, options=options)
  numbers = [engine.submit(of) for of in requests_of(name)]
  found = finish(engine)
  for which, number in enumerate(numbers):
    assert tokens_of(found[number]) == expected(name, which)


@pytest.mark.slow
def test_answers_have_their_forms_whoever_comes_and_goes():
  """Forms of several requests, which begin and end at different times."""
  run = make_run(0.0)
  options = EngineOptions(rows=2, most_steps=4, most_read=32)
  engine = Engine(run.model, run.params, run.num_ids, run.mesh, run.tokenizer, options)
  forms = ["[0-9]{2,9}", "(ab|cd)+x", None, "yes|no", "[0-9]{2,9}", None, "é{3}"]
  asked = [
    request([97], 30, row, regex=form, stop_tokens=[*run.tokenizer.eos_ids])
    for row, form in enumerate(forms)
  ]
  numbers = [engine.submit(of) for of in asked]
  found = finish(engine)
  for number, of, form in zip(numbers, asked, forms, strict=True):
    tokens = tokens_of(found[number])
    if form is not None and found[number][-1].finish_reason == "stop":
      assert re.fullmatch(form, run.tokenizer.decode(tokens[:-1]))
    settings = stack_settings([of.settings], run.tokenizer)
    whole = Request([of.prompt], of.max_new_tokens, run.num_ids)
    blocks = [*generate(run.model, run.params, whole, settings, run.mesh)]
    apart = np.concatenate([block.tokens_BT[0] for block in blocks]).tolist()
    assert tokens == apart[: len(tokens)]
