# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding (Leviathan et al., 2023): a draft guesses some tokens, and one pass
of the model over all of them verifies them.

A guess is accepted if it is the token that the model itself samples at that place. What it
samples depends only on logits, seed and length, so the tokens are those of `generate`,
greedy or drawn. A guess x is accepted as often as the model draws it, with probability
p(x), as in rejection sampling from a draft without a distribution. Guesses are a smaller
model's greedy choices, or what followed the last two tokens earlier in the text.
"""

import dataclasses
import functools
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flaxlm.decoding.drawing import HISTORY_RULES, rules_in_use, sample
from flaxlm.decoding.generate import (
  DecodeState,
  StaticSampling,
  TokenBlock,
  block_on_host,
  repeat_to_batch,
  sample_step,
)
from flaxlm.decoding.prefill import Request, prefill_prompts
from flaxlm.decoding.sampling import Sampling, check_rows
from flaxlm.decoding.weights import prepare_params
from flaxlm.errors import ConfigError
from flaxlm.nn.base import LanguageModel
from flaxlm.nn.vocabulary import mask_padding_ids
from flaxlm.sharding import use_mesh

PASSES = 4  # of the model in a block
MAX_DRAFT_TOKENS = 32
DRAFT_TOKENS = 4  # guesses at a time, by default


@dataclasses.dataclass(frozen=True)
class Draft:
  """What guesses `num_tokens` at a time: a smaller model or, without one, n-grams."""

  model: LanguageModel | None = None
  params: Any = None
  num_tokens: int = DRAFT_TOKENS

  def check(self, model: LanguageModel, rules: Collection[str]) -> None:
    """Raises `ConfigError` for guesses that one pass of `model` cannot verify."""
    if not 1 <= self.num_tokens <= MAX_DRAFT_TOKENS:
      raise ConfigError(f"draft-tokens is {self.num_tokens}", f"1 to {MAX_DRAFT_TOKENS}")
    if needing := sorted(HISTORY_RULES & set(rules)):
      named = "a form" if needing[0] == "constraint" else f"the rule {needing[0]}"
      raise ConfigError(f"a draft with {named}", "leave one of them out")
    for part in (model, self.model):
      if part is not None and part.cfg.family != "decoder":
        raise ConfigError(
          f"a draft with a model of family {part.cfg.family}", "use a decoder"
        )


class StaticDraft(NamedTuple):
  """The part of a draft that is compiled in."""

  model: LanguageModel | None
  num_tokens: int


class SpeculativeState(NamedTuple):
  """What one pass hands to the next. No row grows past its limit."""

  cache: Any
  token_B: jax.Array  # the last sampled token, which is not in a cache yet
  texts_BS: jax.Array  # all tokens so far; `token_B` is the last
  draft_cache: Any
  limit_B: jax.Array  # the most tokens that the cache may hold


def speculate(
  model: LanguageModel,
  params: Any,
  request: Request,
  sampling: Sampling,
  draft: Draft,
  mesh: Mesh | None = None,
) -> Iterator[TokenBlock]:
  """Yields the tokens that `generate` yields; arguments and errors are the same."""
  request.check(model.cfg)
  check_rows(sampling, len(request.prompts), request.num_ids)
  rules = rules_in_use(sampling)
  draft.check(model, rules)
  if draft.model is not None:
    request.check(draft.model.cfg)
  static = StaticSampling(rules, request.num_top)
  static_draft = StaticDraft(draft.model, draft.num_tokens)
  num_rows, num_ids = len(request.prompts), jnp.int32(request.num_ids)
  # A finished row goes on at its limit, and writes its guesses behind it.
  roomy = dataclasses.replace(
    request, max_new_tokens=request.max_new_tokens + draft.num_tokens + 1
  )
  with use_mesh(mesh):
    params = prepare_params(params, model.cfg)
    logits_BV, cache = prefill_prompts(model, params, roomy, mesh)
    draft_cache, draft_params = None, draft.params
    if draft.model is not None:
      draft_params = prepare_params(draft_params, draft.model.cfg)
      _, draft_cache = prefill_prompts(draft.model, draft_params, roomy, mesh)
    batch = logits_BV.shape[0]
    sampling = repeat_to_batch(sampling, batch)
    first = DecodeState(cache, jnp.zeros(batch, jnp.int32), None)
    first, block = sample_step(logits_BV, first, sampling, num_ids, static)
    state = init_speculation(request, first, draft_cache)
  buffer = RowBuffer(num_rows, request.max_new_tokens)
  yield from buffer.add(block_on_host(block, num_rows), np.ones((num_rows, 1), bool))
  while not buffer.is_done:
    with use_mesh(mesh):
      state, block, accepted_BT = verify_block(
        model, params, state, sampling, num_ids, static, static_draft, draft_params
      )
    accepted_BT = np.asarray(accepted_BT)[:num_rows]
    yield from buffer.add(block_on_host(block, num_rows), accepted_BT)


class RowBuffer:
  """Collects rows that grow unevenly, and yields the steps that all of them have."""

  def __init__(self, num_rows: int, max_steps: int):
    self.rows: list[list[list]] = [[] for _ in range(num_rows)]
    self.max_steps, self.num_yielded = max_steps, 0

  @property
  def is_done(self) -> bool:
    return self.num_yielded == self.max_steps

  def add(self, block: TokenBlock, accepted_BT: np.ndarray) -> Iterator[TokenBlock]:
    """Adds each row's accepted tokens; yields a block if every row has grown."""
    for number, row in enumerate(self.rows):
      steps = zip(*(x[number] for x in block[:-1]), accepted_BT[number], strict=True)
      row += [values for *values, is_accepted in steps if is_accepted]
    num_complete = min(self.max_steps, *map(len, self.rows))
    if num_complete > self.num_yielded:
      parts = [row[self.num_yielded : num_complete] for row in self.rows]
      self.num_yielded = num_complete
      columns = zip(*(zip(*part, strict=True) for part in parts), strict=True)
      tokens, logprobs, top_tokens, top_logprobs = map(np.array, columns)
      yield TokenBlock(tokens, logprobs, top_tokens, top_logprobs, block.finite_B)


def init_speculation(
  request: Request, first: DecodeState, draft_cache: Any
) -> SpeculativeState:
  """The state after the prefill and the first sampled token."""
  batch = first.token_B.shape[0]
  lengths_B = np.ones(batch, np.int32)
  lengths_B[: len(request.prompts)] = [*map(len, request.prompts)]
  texts_BS = np.zeros((batch, request.slots + 2 * MAX_DRAFT_TOKENS), np.int32)
  for row, prompt in enumerate(request.prompts):
    texts_BS[row, : len(prompt)] = prompt
  texts = jnp.asarray(texts_BS).at[jnp.arange(batch), lengths_B].set(first.token_B)
  limit_B = jnp.asarray(lengths_B + request.max_new_tokens - 1)
  return SpeculativeState(first.cache, first.token_B, texts, draft_cache, limit_B)


@functools.partial(
  jax.jit, static_argnames=("model", "static", "draft"), donate_argnames="state"
)
def verify_block(
  model: LanguageModel,
  params: Any,
  state: SpeculativeState,
  sampling: Sampling,
  num_ids: jax.Array,
  static: StaticSampling,
  draft: StaticDraft,
  draft_params: Any,
) -> tuple[SpeculativeState, TokenBlock, jax.Array]:
  """`PASSES` passes of the model: (state, sampled tokens, which are accepted (B, T))."""
  T = draft.num_tokens + 1
  by_token = sampling.map_rows(lambda x: jnp.repeat(jnp.asarray(x), T, 0))

  def verify(state: SpeculativeState, _: None) -> tuple[SpeculativeState, tuple]:
    B, lengths_B = state.token_B.shape[0], state.cache.lengths_B
    guesses_BT, draft_cache = draft_tokens(state, draft, draft_params, num_ids)
    tokens_BT = jnp.concatenate([state.token_B[:, None], guesses_BT], 1)
    output = model.apply({"params": params}, tokens_BT, cache=state.cache)
    logits_RV = mask_padding_ids(output.value, num_ids).reshape(B * T, -1)
    lengths_BT = lengths_B[:, None] + 1 + jnp.arange(T)
    sampled = sample(
      logits_RV, lengths_BT.reshape(-1), by_token, static.rules, None, static.num_top
    )
    sampled_BT, logprobs_BT, *tops = (x.reshape(B, T, *x.shape[1:]) for x in sampled)
    right_BT = jnp.cumprod(sampled_BT[:, :-1] == guesses_BT, 1)
    # Each pass gives a token more than there were right guesses, up to the row's limit.
    num_new_B = jnp.minimum(1 + right_BT.sum(1), state.limit_B - lengths_B)
    accepted_BT = jnp.arange(T) < num_new_B[:, None]
    last_B1 = jnp.maximum(num_new_B - 1, 0)[:, None]
    newest_B = jnp.take_along_axis(sampled_BT, last_B1, 1)[:, 0]
    lengths_B += num_new_B
    if draft_cache is not None:
      draft_cache = draft_cache._replace(lengths_B=lengths_B)
    state = SpeculativeState(
      output.cache._replace(lengths_B=lengths_B),
      jnp.where(num_new_B > 0, newest_B, state.token_B),
      state.texts_BS.at[jnp.arange(B)[:, None], lengths_BT].set(sampled_BT, mode="drop"),
      draft_cache,
      state.limit_B,
    )
    finite_BT = jnp.isfinite(logprobs_BT) | ~accepted_BT
    block = TokenBlock._make([sampled_BT, logprobs_BT, *tops, finite_BT.all(1)])
    return state, (block, accepted_BT)

  state, (blocks, accepted_PBT) = jax.lax.scan(verify, state, length=PASSES)
  join_passes = lambda x_PBT: jnp.concatenate([*x_PBT], 1)
  block = blocks.map_steps(join_passes)._replace(finite_B=blocks.finite_B.all(0))
  return state, block, join_passes(accepted_PBT)


def draft_tokens(
  state: SpeculativeState, draft: StaticDraft, draft_params: Any, num_ids: jax.Array
) -> tuple[jax.Array, Any]:
  """The draft's guesses (B, T), and its cache with `token_B` and all of them."""
  if draft.model is None:
    lengths_B = state.cache.lengths_B + 1
    return draft_from_ngrams(state.texts_BS, lengths_B, draft.num_tokens), None
  model = draft.model

  def step(carry: tuple[jax.Array, Any], _: None) -> tuple[tuple, jax.Array]:
    token_B, cache = carry
    output = model.apply({"params": draft_params}, token_B[:, None], cache=cache)
    logits_BV = mask_padding_ids(output.value[:, -1], num_ids)
    token_B = jnp.argmax(logits_BV, -1).astype(jnp.int32)
    return (token_B, output.cache), token_B

  # One step more than there are guesses: the last of them must be in the cache, too.
  carry = (state.token_B, state.draft_cache)
  (_, cache), tokens_TB = jax.lax.scan(step, carry, length=draft.num_tokens + 1)
  return tokens_TB[:-1].T, cache


def draft_from_ngrams(
  texts_BS: jax.Array, lengths_B: jax.Array, num_tokens: int
) -> jax.Array:
  """What followed the last two tokens where they last occurred before (B, num_tokens).

  If they never did, any tokens. As in prompt lookup decoding (Saxena, 2023).
  """

  def of_row(text_S: jax.Array, length: jax.Array) -> jax.Array:
    places_S = jnp.arange(text_S.shape[0])
    before_S = jnp.roll(text_S, 1)
    last, last_but_one = text_S[length - 1], text_S[jnp.maximum(length - 2, 0)]
    fits_S = (text_S == last) & (before_S == last_but_one) & (places_S > 0)
    found = jnp.where(fits_S & (places_S < length - 1), places_S, -1).max()
    return jax.lax.dynamic_slice_in_dim(text_S, found + 1, num_tokens)

  return jax.vmap(of_row)(texts_BS, lengths_B)
