# SPDX-License-Identifier: Apache-2.0
"""Autoregressive decoding: prefill the prompts, then a jitted loop over the KV cache.

The loop runs in blocks of a fixed number of steps, since an early exit would make an
accelerator wait for the host at every token; the host looks between blocks.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flaxlm.decoding.prefill import (
  BLOCK_STEPS,
  Past,
  Request,
  prefill_logits,
)
from flaxlm.decoding.sampling import (
  ASK_WHAT_WAS_SEEN,
  Sampling,
  Seen,
  rules_in_use,
  sample,
)
from flaxlm.decoding.weights import prepare_params
from flaxlm.errors import NonFiniteError
from flaxlm.nn.base import LanguageModel
from flaxlm.sharding import on_host, use_mesh


class DecodeState(NamedTuple):
  """What one step hands to the next. `token_B` is chosen, but not yet in the cache."""

  cache: Any  # a KVCache, or an RNN's state
  token_B: jax.Array
  seen: Seen | None  # None where no rule asks what was seen


class Chosen(NamedTuple):
  """Tokens that a block chose, (B, T) each; `finite_B` is False where logits were not.

  The likeliest tokens of each step, as many as the request asks for, are (B, T, X).
  """

  tokens_BT: Any
  logprobs_BT: Any
  top_tokens_BTX: Any
  top_logprobs_BTX: Any
  finite_B: Any

  def each(self, change: Callable[[Any], Any]) -> "Chosen":
    """Changes every array that has a T."""
    changed = jax.tree.map(change, self._replace(finite_B=None))
    return changed._replace(finite_B=self.finite_B)


@dataclasses.dataclass
class Memory:
  """What the last call of `generate` has read, for a next one that begins with it.

  Of the first row only. A call that is broken off in the middle of a block forgets all.
  """

  past: Past | None = None


class How(NamedTuple):
  """What of choosing tokens is compiled in: the rules in use, and how many are told."""

  rules: tuple[str, ...] = ()
  num_top: int = 0


def generate(
  model: LanguageModel,
  params: Any,
  request: Request,
  sampling: Sampling,
  mesh: Mesh | None = None,
  memory: Memory | None = None,
) -> Iterator[Chosen]:
  """Yields the rows' next tokens, a block at a time, as host arrays.

  Args:
    model: of any family that writes text.
    params: its parameters, as they lie on the mesh; `prepare_params` lays them out once
      for many calls.
    request: the prompts; `max_new_tokens` is the length of what is yielded, per row.
    sampling: settings for as many rows as there are prompts.
    mesh: where `params` live; None for a single device.
    memory: of an earlier call, for prompts that begin with the same tokens; kept up.

  The caller stops by not asking for more. Raises `ConfigError` when a row would outgrow
  the model's context, `NonFiniteError` when logits are NaN or infinite.
  """
  request.check(model.cfg)
  num_rows, ids = len(request.prompts), jnp.int32(request.num_ids)
  how = How(rules_in_use(sampling), request.num_top)
  with use_mesh(mesh):
    params = prepare_params(params, model.cfg)
    past = None if memory is None else memory.past
    logits_BV, cache = prefill_logits(model, params, request, mesh, past)
    batch = logits_BV.shape[0]
    sampling = for_batch(sampling, batch)
    seen = None
    if ASK_WHAT_WAS_SEEN & set(how.rules):
      seen = first_seen(request, sampling, logits_BV.shape)
    state = DecodeState(cache, jnp.zeros(batch, jnp.int32), seen)
    state, chosen = choose(logits_BV, state, sampling, ids, how)

  def decode() -> Chosen:
    nonlocal state
    if memory is not None:
      memory.past = None  # its cache is given away
    with use_mesh(mesh):
      state, chosen = decode_block(model, params, state, sampling, ids, how)
    return chosen

  tokens, ahead = [*request.prompts[0]], runs_ahead(model, memory)
  for block in range(request.num_blocks + 1):
    last = block == request.num_blocks
    following = decode() if ahead and not last else None
    on_host = to_host(chosen, num_rows)
    if memory is not None:
      tokens += on_host.tokens_BT[0].tolist()
      memory.past = Past(tuple(tokens[:-1]), state.cache)  # the last is not in it yet
    most = request.max_new_tokens - (1 + (block - 1) * BLOCK_STEPS if block else 0)
    yield on_host.each(functools.partial(first_tokens, most=most))
    if not last:
      chosen = decode() if following is None else following


def runs_ahead(model: LanguageModel, memory: Memory | None) -> bool:
  """Whether the device begins a block before the host has seen the one before.

  A CPU would compute what a caller who stops never sees; an RNN's memory would be of it.
  """
  remembers_end = memory is not None and model.cfg.family == "rnn"
  return jax.default_backend() != "cpu" and not remembers_end


@functools.partial(jax.jit, static_argnames=("model", "how"), donate_argnames="state")
def decode_block(
  model: LanguageModel,
  params: Any,
  state: DecodeState,
  sampling: Sampling,
  num_ids: jax.Array,
  how: How,
) -> tuple[DecodeState, Chosen]:
  """`BLOCK_STEPS` tokens for every row: each step feeds one token and chooses the next."""

  def step(state: DecodeState, _: None) -> tuple[DecodeState, Chosen]:
    output = model.apply({"params": params}, state.token_B[:, None], cache=state.cache)
    state = state._replace(cache=output.cache)
    return choose(output.value[:, -1], state, sampling, num_ids, how)

  state, chosen = jax.lax.scan(step, state, length=BLOCK_STEPS)
  by_row = chosen.each(lambda x_TB1: x_TB1.swapaxes(0, 1).squeeze(2))
  return state, by_row._replace(finite_B=chosen.finite_B.all(0))


@functools.partial(jax.jit, static_argnames="how", donate_argnames="state")
def choose(
  logits_BV: jax.Array,
  state: DecodeState,
  sampling: Sampling,
  num_ids: jax.Array,
  how: How,
) -> tuple[DecodeState, Chosen]:
  """Draws each row's next token from the logits of its last position.

  Ids from `num_ids` on are the vocabulary's padding, and never drawn.
  """
  real_V = jnp.arange(logits_BV.shape[-1]) < num_ids
  logits_BV = jnp.where(real_V, logits_BV, -jnp.inf)
  seen, lengths_B = state.seen, state.cache.lengths_B
  drawn = sample(logits_BV, lengths_B, sampling, how.rules, seen, how.num_top)
  if seen is not None:
    seen = seen.add(drawn.token_B, sampling)
  chosen = Chosen(*drawn, finite_B=jnp.isfinite(drawn.logprob_B))
  chosen = chosen.each(lambda x_B: x_B[:, None])
  return DecodeState(state.cache, drawn.token_B, seen), chosen


def for_batch(sampling: Sampling, batch: int) -> Sampling:
  """As many rows as a bucket has, by repeating."""
  return sampling.each_row(lambda x: np.resize(x, (batch, *x.shape[1:])))


def first_seen(request: Request, sampling: Sampling, shape: tuple[int, ...]) -> Seen:
  """What the prompts hold; nothing is generated yet."""
  in_prompt_BV = np.zeros(shape, bool)
  for row, prompt in enumerate(request.prompts):
    in_prompt_BV[row, [*prompt]] = True
  states_B = jnp.asarray(sampling.states_B)
  return Seen(jnp.asarray(in_prompt_BV), jnp.zeros(shape, jnp.int32), states_B)


def first_tokens(x_BT: np.ndarray, most: int) -> np.ndarray:
  return x_BT[:, :most]


def to_host(chosen: Chosen, num_rows: int) -> Chosen:
  """The real rows of a block. Raises `NonFiniteError`."""
  chosen = jax.tree.map(lambda x: on_host(x)[:num_rows], chosen)
  if not chosen.finite_B.all():
    row = int(np.argmin(chosen.finite_B))
    raise NonFiniteError(
      f"the logits of row {row} are NaN or infinite", "the parameters are damaged"
    )
  return chosen
