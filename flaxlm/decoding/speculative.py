# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding (Leviathan et al., 2023): some tokens are guessed, then checked by
one pass of the model over all of them.

A guess counts where it is the very token that the model draws itself at that place. A draw
depends on logits, seed and length alone, so that the tokens are those of `generate`, drawn
or greedy; a guess x is right as often as the model draws it, p(x), which is what rejection
sampling accepts of a draft without a distribution. Guesses come from a smaller model's
greedy choice, or from what followed the last two tokens earlier in the text.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flaxlm.decoding.generate import Chosen, DecodeState, How, choose, for_batch, to_host
from flaxlm.decoding.prefill import Request, prefill_logits
from flaxlm.decoding.sampling import ASK_WHAT_WAS_SEEN, Sampling, rules_in_use, sample
from flaxlm.decoding.weights import prepare_params
from flaxlm.errors import ConfigError
from flaxlm.nn.base import LanguageModel
from flaxlm.sharding import use_mesh

PASSES = 4  # of the model in a block
MOST_GUESSES = 32


@dataclasses.dataclass(frozen=True)
class Draft:
  """Who guesses, and how many tokens at a time; without a model, the text's own n-grams."""

  model: LanguageModel | None = None
  params: Any = None
  num_tokens: int = 4

  def check(self, model: LanguageModel, rules: tuple[str, ...]) -> None:
    """Raises `ConfigError` for what cannot be checked in one pass."""
    if not 1 <= self.num_tokens <= MOST_GUESSES:
      raise ConfigError(f"draft-tokens is {self.num_tokens}", f"1 to {MOST_GUESSES}")
    if asking := sorted(ASK_WHAT_WAS_SEEN & set(rules)):
      raise ConfigError(f"a draft with the rule {asking[0]}", "leave one of them out")
    for part in (model, self.model):
      if part is not None and part.cfg.family != "decoder":
        raise ConfigError(f"a draft with a model of family {part.cfg.family}", "a decoder")


class Guessing(NamedTuple):
  """What is compiled in: the rules in use, and who guesses how much."""

  how: How
  model: LanguageModel | None
  num_tokens: int


class SpeculativeState(NamedTuple):
  """`token_B` is chosen, but not yet in a cache. No row grows past its limit."""

  cache: Any
  token_B: jax.Array
  texts_BS: jax.Array  # all tokens so far, `token_B` last
  draft_cache: Any
  limit_B: jax.Array  # most tokens in the cache


def speculate(
  model: LanguageModel,
  params: Any,
  request: Request,
  sampling: Sampling,
  draft: Draft,
  mesh: Mesh | None = None,
) -> Iterator[Chosen]:
  """Yields what `generate` yields; arguments and errors as there."""
  request.check(model.cfg)
  rules = rules_in_use(sampling)
  draft.check(model, rules)
  if draft.model is not None:
    request.check(draft.model.cfg)
  guessing = Guessing(How(rules, request.num_top), draft.model, draft.num_tokens)
  num_rows, ids = len(request.prompts), jnp.int32(request.num_ids)
  # A row that is done is run on at its limit, and writes its guesses behind it.
  roomy = dataclasses.replace(
    request, max_new_tokens=request.max_new_tokens + draft.num_tokens + 1
  )
  with use_mesh(mesh):
    params = prepare_params(params, model.cfg)
    logits_BV, cache = prefill_logits(model, params, roomy, mesh)
    draft_cache, draft_params = None, draft.params
    if draft.model is not None:
      draft_params = prepare_params(draft_params, draft.model.cfg)
      _, draft_cache = prefill_logits(draft.model, draft_params, roomy, mesh)
    batch = logits_BV.shape[0]
    sampling = for_batch(sampling, batch)
    first = DecodeState(cache, jnp.zeros(batch, jnp.int32), None)
    first, chosen = choose(logits_BV, first, sampling, ids, guessing.how)
    state = start(request, first, draft_cache)
  queue = Queue(num_rows, request.max_new_tokens)
  yield from queue.add(to_host(chosen, num_rows), np.ones((num_rows, 1), bool))
  while not queue.done:
    with use_mesh(mesh):
      state, chosen, real_BT = check_guesses(
        model, params, state, sampling, ids, guessing, draft_params
      )
    yield from queue.add(to_host(chosen, num_rows), np.asarray(real_BT)[:num_rows])


class Queue:
  """Rows grow unevenly; what all of them have is handed on."""

  def __init__(self, num_rows: int, most: int):
    self.rows: list[list[list]] = [[] for _ in range(num_rows)]
    self.most, self.given = most, 0

  @property
  def done(self) -> bool:
    return self.given == self.most

  def add(self, chosen: Chosen, real_BT: np.ndarray) -> Iterator[Chosen]:
    for number, row in enumerate(self.rows):
      steps = zip(*(x[number] for x in chosen[:-1]), real_BT[number], strict=True)
      row += [values for *values, real in steps if real]
    ready = min(self.most, *map(len, self.rows))
    if ready > self.given:
      parts = [row[self.given : ready] for row in self.rows]
      self.given = ready
      columns = zip(*(zip(*part, strict=True) for part in parts), strict=True)
      tokens_BT, logprobs_BT, *tops = (np.array(column) for column in columns)
      yield Chosen(tokens_BT, logprobs_BT, tops[0], tops[1], chosen.finite_B)


def start(request: Request, first: DecodeState, draft_cache: Any) -> SpeculativeState:
  """The state after the prefill and the first token."""
  batch = first.token_B.shape[0]
  lengths_B = np.ones(batch, np.int32)
  lengths_B[: len(request.prompts)] = [*map(len, request.prompts)]
  texts_BS = np.zeros((batch, request.slots(0) + 2 * MOST_GUESSES), np.int32)
  for row, prompt in enumerate(request.prompts):
    texts_BS[row, : len(prompt)] = prompt
  texts = jnp.asarray(texts_BS).at[jnp.arange(batch), lengths_B].set(first.token_B)
  limit_B = jnp.asarray(lengths_B + request.max_new_tokens - 1)
  return SpeculativeState(first.cache, first.token_B, texts, draft_cache, limit_B)


@functools.partial(jax.jit, static_argnames=("model", "guessing"), donate_argnames="state")
def check_guesses(
  model: LanguageModel,
  params: Any,
  state: SpeculativeState,
  sampling: Sampling,
  num_ids: jax.Array,
  guessing: Guessing,
  draft_params: Any,
) -> tuple[SpeculativeState, Chosen, jax.Array]:
  """Some passes of the model: (state, tokens, which of them are the text (B, T))."""
  T = guessing.num_tokens + 1
  by_token = sampling.each_row(lambda x: jnp.repeat(jnp.asarray(x), T, 0))

  def one_pass(state: SpeculativeState, _: None) -> tuple[SpeculativeState, tuple]:
    B, lengths_B = state.token_B.shape[0], state.cache.lengths_B
    guesses_BT, draft_cache = guess(state, guessing, draft_params, num_ids)
    tokens_BT = jnp.concatenate([state.token_B[:, None], guesses_BT], 1)
    output = model.apply({"params": params}, tokens_BT, cache=state.cache)
    real_V = jnp.arange(output.value.shape[-1]) < num_ids
    logits_RV = jnp.where(real_V, output.value, -jnp.inf).reshape(B * T, -1)
    lengths_BT = lengths_B[:, None] + 1 + jnp.arange(T)
    rules, num_top = guessing.how
    drawn = sample(logits_RV, lengths_BT.reshape(-1), by_token, rules, None, num_top)
    drawn = jax.tree.map(lambda x: x.reshape(B, T, *x.shape[1:]), drawn)
    right_BT = jnp.cumprod(drawn.token_B[:, :-1] == guesses_BT, 1)
    num_real_B = jnp.minimum(1 + right_BT.sum(1), state.limit_B - lengths_B)
    real_BT = jnp.arange(T) < num_real_B[:, None]
    last_B1 = jnp.maximum(num_real_B - 1, 0)[:, None]
    newest_B = jnp.take_along_axis(drawn.token_B, last_B1, 1)[:, 0]
    lengths_B += num_real_B
    if draft_cache is not None:
      draft_cache = draft_cache._replace(lengths_B=lengths_B)
    state = SpeculativeState(
      output.cache._replace(lengths_B=lengths_B),
      jnp.where(num_real_B > 0, newest_B, state.token_B),
      state.texts_BS.at[jnp.arange(B)[:, None], lengths_BT].set(drawn.token_B, mode="drop"),
      draft_cache,
      state.limit_B,
    )
    finite_B = (jnp.isfinite(drawn.logprob_B) | ~real_BT).all(1)
    return state, (Chosen(*drawn, finite_B), real_BT)  # type: ignore[call-arg]

  state, (chosen, real_PBT) = jax.lax.scan(one_pass, state, length=PASSES)
  by_row = lambda x_PBT: jnp.concatenate([*x_PBT], 1)
  finite_B = chosen.finite_B.all(0)
  return state, chosen.each(by_row)._replace(finite_B=finite_B), by_row(real_PBT)


def guess(
  state: SpeculativeState, guessing: Guessing, draft_params: Any, num_ids: jax.Array
) -> tuple[jax.Array, Any]:
  """The next tokens (B, T) as the draft has them, and its cache with `token_B` and them."""
  if guessing.model is None:
    return guess_again(state.texts_BS, state.cache.lengths_B + 1, guessing.num_tokens), None
  model = guessing.model

  def step(carry: tuple[jax.Array, Any], _: None) -> tuple[tuple, jax.Array]:
    token_B, cache = carry
    output = model.apply({"params": draft_params}, token_B[:, None], cache=cache)
    real_V = jnp.arange(output.value.shape[-1]) < num_ids
    token_B = jnp.argmax(jnp.where(real_V, output.value[:, -1], -jnp.inf), -1)
    token_B = token_B.astype(jnp.int32)
    return (token_B, output.cache), token_B

  # One step more than there are guesses: the last of them has to be in the cache, too.
  start = (state.token_B, state.draft_cache)
  (_, cache), tokens_TB = jax.lax.scan(step, start, length=guessing.num_tokens + 1)
  return tokens_TB[:-1].T, cache


def guess_again(texts_BS: jax.Array, lengths_B: jax.Array, num_tokens: int) -> jax.Array:
  """What followed the last two tokens when they last stood together, or anything.

  As in prompt lookup decoding (Saxena, 2023).
  """

  def of_row(text_S: jax.Array, length: jax.Array) -> jax.Array:
    places_S = jnp.arange(text_S.shape[0])
    before_S = jnp.roll(text_S, 1)
    last, last_but_one = text_S[length - 1], text_S[jnp.maximum(length - 2, 0)]
    fits_S = (text_S == last) & (before_S == last_but_one) & (places_S > 0)
    found = jnp.where(fits_S & (places_S < length - 1), places_S, -1).max()
    return jax.lax.dynamic_slice_in_dim(text_S, found + 1, num_tokens)

  return jax.vmap(of_row)(texts_BS, lengths_B)
