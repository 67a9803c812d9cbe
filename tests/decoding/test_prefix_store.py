# SPDX-License-Identifier: Apache-2.0
"""What is kept of past texts: the same tokens with it, and less that is read."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest
from conftest import fuzz, slow
from hypothesis import given
from hypothesis import strategies as st
from meshes import mesh_of
from parameters import random_params
from test_engine import alone, finish, placed_on, request, small_model, tokens_of

from flaxlm.config import ModelConfig
from flaxlm.decoding import engine as engine_module
from flaxlm.decoding.compile_counter import count_compilations
from flaxlm.decoding.engine import Engine
from flaxlm.decoding.prefill import CHUNK
from flaxlm.decoding.prefix_store import (
  MOST_KEPT,
  PIECE,
  PieceStore,
  Row,
  RowStore,
  StateStore,
  common_length,
)
from flaxlm.decoding.requests import EngineOptions
from flaxlm.decoding.row_sizes import RowSizes, cache_bytes
from flaxlm.errors import NonFiniteError
from flaxlm.nn.models import build_model
from flaxlm.nn.rnn import RNNCache
from flaxlm.sharding import mesh_for

SIZES = dict(depth=1, width=16, vocab_size=64)
KEYS = ModelConfig(**SIZES, num_heads=2, context=64).resolve()
RINGS = ModelConfig(**SIZES, num_heads=2, context=2048, window=20).resolve()
STATES = ModelConfig(**SIZES, family="rnn").resolve()


class Talk:
  """A conversation as token ids: each turn has an engine of its own, and the same past."""

  def __init__(self, model: Any, params: Any, mesh: Any = None, ahead: bool = False):
    self.past = RowStore(model.cfg)
    self.same, self.mesh, self.ahead = (model, params, 64), mesh, ahead
    self.num_read = 0

  def answer(self, prompt: Sequence[int], num_new: int, **more: Any) -> list[int]:
    """What `generate` answers; `num_read` is then how many tokens were read for it."""
    options = EngineOptions(rows=1, most_read=None, whole_rows=True)
    engine = Engine(*self.same, self.mesh, options=options, past=self.past)
    engine.runs_ahead = self.ahead
    number = engine.submit(request(prompt, num_new, **more))
    events = finish(engine)[number]
    if events[-1].error is not None:
      raise events[-1].error
    self.num_read = engine.counters.read_tokens
    assert engine.counters.cached_tokens == len(prompt) - self.num_read
    return tokens_of(events)


# -- Conversations -------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "ahead"), [("gqa", False), slow("gqa", True), slow("int8", False)]
)
def test_a_turn_reads_only_what_is_new(name: str, ahead: bool):
  """It goes on from the answer before or takes a part of it back; also where the device is
  a block ahead of the host, as it is not by itself on a CPU."""
  model, params = small_model(name)
  talk, prompt = Talk(model, params, ahead=ahead), [3, 1, 4]
  answer = talk.answer(prompt, 50)
  for cut, more in ((None, [9, 2]), (2, [8])):
    ended = talk.answer(prompt, 50, stop_tokens=[answer[8]])
    assert 3 < len(ended) < 10
    turn = [*prompt, *ended[:cut], *more]
    assert talk.answer(turn, 7) == alone(model, params, request(turn, 7))
    assert talk.num_read <= len(more) + 1, "the last token of an answer is never in it"
  other = [7, 7, 7]
  assert talk.answer(other, 7) == alone(model, params, request(other, 7))
  assert talk.num_read == len(other)


@pytest.mark.parametrize("ahead", [False, slow(True)])
def test_an_rnn_goes_on_from_a_prompt_and_from_an_answer(ahead: bool):
  model, params = small_model("rnn")
  talk, prompt = Talk(model, params, ahead=ahead), [3, 1, 4, 1, 5]
  stop = talk.answer(prompt, 9)[-3]
  for cut, num_read in ((0, 2), (2, 4), (None, 3)):
    answer = talk.answer(prompt, 50, stop_tokens=[stop])
    assert len(answer) > 3
    turn = [*prompt, *answer[:cut], 5, 6]
    expected = alone(model, params, request(turn, 5))
    assert talk.answer(turn, 5) == expected
    assert talk.num_read == num_read, "the state has no middle"
  other = [7, 7, 7]
  assert talk.answer(other, 7) == alone(model, params, request(other, 7))


@pytest.mark.slow
def test_rings_that_have_turned_go_on_from_an_end():
  model = build_model(ModelConfig(**SIZES, num_heads=2, context=2048, window=20))
  params = random_params(model)
  rng = np.random.default_rng(0)
  talk, prompt = Talk(model, params), rng.integers(0, 64, 700).tolist()
  for cut, num_read in ((40, 3), (30, 32)):
    answer = talk.answer(prompt, 40)
    turn = [*prompt, *answer[:cut], 1, 2]
    assert talk.answer(turn, 9) == alone(model, params, request(turn, 9))
    assert talk.num_read == num_read, "it is read again from the end of the prompt"


def test_following_turns_compile_nothing_new():
  """A model that no other test has compiled; its prompts are read into a larger cache than
  they are decoded in."""
  model = build_model(ModelConfig(**SIZES | {"width": 24}, num_heads=2, context=128))
  talk, turn, counts = Talk(model, random_params(model)), [*range(40)], []
  for _ in range(3):
    with count_compilations() as counter:
      answer = talk.answer(turn, 4)
    counts.append(counter.programs)
    turn = [*turn, *answer, 9, 2]
  assert counts[0] > 5 and counts[1:] == [1, 0], "only a chunk of 32 tokens"


@pytest.mark.slow
def test_a_conversation_on_a_mesh():
  model, params = small_model("gqa")
  mesh = mesh_for(mesh_of(fsdp=2, tensor=4), model.cfg)  # each kv head on 2 devices
  talk = Talk(model, placed_on(mesh, model, params), mesh)
  turn = [3, 1, 4]
  for length in (3, 6, 6):
    answer = talk.answer(turn, 9)
    assert answer == alone(model, params, request(turn, 9)) and talk.num_read <= length
    turn = [*turn, *answer, 5, 6, 7, 8, 9]


def test_what_is_interrupted_goes_on_from_its_prompt(monkeypatch: pytest.MonkeyPatch):
  """The block that is lost has taken the state of its row with it."""
  model, params = small_model("gqa")
  decode_rows = engine_module.decode_rows

  def interrupted(*arguments: Any) -> Any:
    decode_rows(*arguments)
    raise KeyboardInterrupt

  talk, prompt = Talk(model, params), [3, 1, 4, 1, 5]
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(engine_module, "decode_rows", interrupted)
    talk.answer(prompt, 9)
  turn = [*prompt, 9, 2]
  assert talk.answer(turn, 9) == alone(model, params, request(turn, 9))
  assert talk.num_read == 2


@pytest.mark.slow
def test_nothing_is_kept_of_what_is_not_finite():
  """Behind the tokens that two texts have in common."""
  model, params = small_model("moe")
  table = np.array(params["embedding"]["table"])
  table[5] = np.nan
  talk = Talk(model, params | {"embedding": {"table": table}})
  for turn in ([1, 2, 5, 3], [1, 2, 3]):
    if 5 in turn:
      with pytest.raises(NonFiniteError):
        talk.answer(turn, 4)
    else:
      no_5 = dict(banned_tokens=[5])
      expected = alone(model, params, request(turn, 4, **no_5))
      assert talk.answer(turn, 4, **no_5) == expected


# -- Many texts ----------------------------------------------------------------------------

ENDED = {
  "gru": ModelConfig(**SIZES | {"depth": 2}, family="rnn", cell="gru"),
  "lstm": ModelConfig(**SIZES, family="rnn", cell="lstm"),
  "window": ModelConfig(**SIZES, num_heads=2, context=2048, window=20),
  "sinks": ModelConfig(**SIZES, num_heads=2, context=2048, window=20, sink_tokens=4),
  "LG": ModelConfig(
    **SIZES | {"depth": 2}, num_heads=2, context=2048, window=20, layer_pattern="LG"
  ),
}


@pytest.mark.parametrize(
  ("name", "ahead"),
  [
    ("gru", False),
    *(fuzz("window", False), slow("LG", True)),
    *(fuzz("gru", True), fuzz("lstm", False), fuzz("sinks", True), fuzz("LG", False)),
  ],
)
def test_what_cannot_be_cut_goes_on_from_where_it_ended(name: str, ahead: bool):
  """A prompt, an answer, or what the second text has in common with the first one; rings
  have turned by then. The tokens are those of a model that keeps nothing."""
  model = build_model(ENDED[name])
  params, rng = random_params(model), np.random.default_rng(0)
  beginning = rng.integers(0, 64, 64 if name in ("gru", "lstm") else 704).tolist()
  options = EngineOptions(rows=2, most_steps=4, prefix_bytes=2**22)
  engine = Engine(model, params, 64, options=options)
  engine.runs_ahead = ahead
  cached, tokens = {}, []

  def answer(*asked: Any) -> None:
    numbers = [engine.submit(of) for of in asked]
    found = finish(engine)
    for number, of in zip(numbers, asked, strict=True):
      tokens.append(tokens_of(found[number]))
      assert tokens[-1] == alone(model, params, of)
      cached[number] = found[number][-1].cached

  first = request([*beginning, *range(36)], 60)
  drawn = alone(model, params, first)
  stop = next(x for n, x in [*enumerate(drawn[:8])][::-1] if x not in drawn[:n])
  first = dataclasses.replace(first, stop_tokens=[stop])
  answer(first)
  answer(request([*beginning, 9], 4, 1), request([*beginning, 4, 9, 9], 4, 2))
  answer(request([*first.prompt, 5], 4, 3))
  answer(request([*first.prompt, *tokens[0], 5], 3, 4))
  length = len(beginning)
  whole = len(first.prompt) + len(tokens[0]) - 1
  chunk = length // CHUNK * CHUNK
  assert [*cached.values()] == [0, chunk, length, len(first.prompt), whole]
  assert engine.counters.cached_tokens == sum(cached.values())


@given(st.lists(st.lists(st.integers(0, 1), max_size=4), max_size=12), st.integers(1, 4))
def test_pieces_are_whole_beginnings_within_their_limit(texts: list, room: int):
  """Each digit stands for a piece."""
  store = Digits(room * 8)
  texts = [[digit for digit in text for _ in range(PIECE)] for text in texts]
  for text in texts:
    store.add(text, Row(text, 0, 0), is_end=False)
    assert store.num_bytes == 8 * len(store._kept) <= room * 8
    count, (found,), _ = store.find([[*text, 2]])
    assert count == len(found) * PIECE
    found = [piece.item() for piece in found]
    assert found == text[::PIECE][:room], "the newest is kept, as far as there is room"
  for text in texts:
    _, (found,), _ = store.find([[*text, 2]])
    pieces = [piece.item() for piece in found]
    assert pieces == text[::PIECE][: len(pieces)]


class Digits(PieceStore):
  """Keeps the digits of texts for their caches."""

  def cut(self, row: Row, start: int) -> Any:
    return np.array([row.cache[start]])


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=4), max_size=12))
def test_states_are_those_of_the_longest_beginning_within_their_limit(texts: list):
  """Each text's state is its number; of three states there is room for the newest."""
  model = build_model(ENDED["gru"])
  sizes = RowSizes(model, EngineOptions(), 1)
  size = cache_bytes(model, 1, 64, 0)
  store = StateStore(3 * size + size // 2, sizes)
  numbers: dict[tuple, int] = {}
  for number, text in enumerate(texts):
    store.add(text, Row(None, 0, 64), is_end=False)
    numbers.setdefault(tuple(text), number)
    store.add(text, Row(number_cache(numbers[tuple(text)]), 0, 64), is_end=True)
    kept = [cache for cache in store._kept.values()]
    assert store.num_bytes == sum(x.nbytes for x in jax.tree.leaves(kept)) <= 3 * size
    count, (cache,), _ = store.find([[*text, 2]])
    assert count == len(text) and cache.state.min() == numbers[tuple(text)]
    assert cache.lengths_B.tolist() == [count]
  for text in texts:
    count, found, _ = store.find([text, [*text, 2]])
    assert count < len(text) and len(found) == (2 if count else 0)
    for cache in found:
      assert cache.state.min() == numbers[tuple(text[:count])]


def number_cache(number: int) -> RNNCache:
  return RNNCache(np.full((2, 1, 16), number, np.float32), np.array([9], np.int32))


def test_a_state_that_is_too_large_is_not_even_copied():
  model = build_model(ENDED["gru"])
  store = StateStore(100, RowSizes(model, EngineOptions(), 1))
  store.add([1, 2], Row(None, 0, 64), is_end=True)
  assert not store.num_bytes and store.find([[1, 2, 3]]) == (0, [], 0)


# -- The last rows of a conversation -------------------------------------------------------


@given(
  st.sampled_from([KEYS, RINGS, STATES]),
  st.lists(
    st.tuples(st.integers(0, 2), st.booleans(), st.lists(st.integers(0, 1), max_size=4)),
    max_size=9,
  ),
)
def test_a_row_that_is_found_has_the_text(cfg: Any, added: list):
  """Lists stand for caches, whose rings may have turned in the longer half of the texts."""
  store = RowStore(cfg)
  for size, is_end, tail in added:
    text = [*[0] * (40 * size), *tail]
    store.add(text, is_end, lambda text=text: [*text])
    assert len(store._rows) <= MOST_KEPT
    count, cache = store.find([*text, 1])
    assert bool(count) == (cache is not None)
    if is_end or cfg is KEYS:
      assert count == len(text), "the newest is there"
    if count:
      assert cache[:count] == text[:count]
    is_cut = count and count < len(cache)
    assert not is_cut or cfg is not STATES
    room = 640 - 512  # 20 + 512 + 64 - 1, in whole lanes, less the tokens of a chunk
    assert not is_cut or cfg is not RINGS or len(cache) <= room


def test_common_length():
  assert common_length([1, 2, 3], [1, 2, 4]) == 2
  assert common_length([1, 2, 3], [1, 2, 3, 4]) == 3
  assert common_length([], [1]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [False, True])
def test_an_answer_that_fills_its_row_is_kept_as_it_was(ahead: bool):
  """An idle step would write over its last key, while others are decoded."""
  model, params = small_model("long")
  options = EngineOptions(rows=2, most_steps=16, prefix_bytes=2**20)
  engine = Engine(model, params, 64, options=options)
  engine.runs_ahead = ahead
  full = request([*range(60)], 2 * PIECE - 60 + 1, 1)  # it ends within a block
  number = engine.submit(full)
  engine.submit(request([9], 100, 2))
  following = [*full.prompt, *tokens_of(finish(engine)[number]), 9]
  number = engine.submit(request(following, 40))
  expected = alone(model, params, request(following, 40))
  assert tokens_of(finish(engine)[number]) == expected
