# SPDX-License-Identifier: Apache-2.0
"""Autoregressive decoding: prefill the prompts, then decode steps in a jitted loop.

The loop runs in blocks of a fixed number of steps. An early exit would make an accelerator
wait for the host at every token, so the host looks at the tokens only between blocks.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flaxlm.decoding.drawing import (
  HISTORY_RULES,
  TokenHistory,
  history_of_prompts,
  rules_in_use,
  sample,
)
from flaxlm.decoding.prefill import BLOCK_STEPS, Request, prefill_prompts
from flaxlm.decoding.sampling import Sampling, check_rows
from flaxlm.decoding.weights import prepare_params
from flaxlm.errors import NonFiniteError
from flaxlm.nn.base import LanguageModel
from flaxlm.nn.vocabulary import mask_padding_ids
from flaxlm.sharding import on_host, use_mesh


class DecodeState(NamedTuple):
  """What one decode step hands to the next."""

  cache: Any  # a KVCache, or an RNN's state
  token_B: jax.Array  # the last sampled token, which is not in the cache yet
  history: TokenHistory | None  # None where no rule needs it


class TokenBlock(NamedTuple):
  """The tokens of a block of steps, (B, T), and the X likeliest ones of each, (B, T, X).

  `finite_B` is False for rows whose logits were NaN or infinite.
  """

  tokens_BT: Any
  logprobs_BT: Any
  top_tokens_BTX: Any
  top_logprobs_BTX: Any
  finite_B: Any

  def map_steps(self, change: Callable[[Any], Any]) -> "TokenBlock":
    """Applies `change` to every array with a dimension T."""
    changed = jax.tree.map(change, self._replace(finite_B=None))
    return changed._replace(finite_B=self.finite_B)


class StaticSampling(NamedTuple):
  """The part of sampling that is compiled in; its other settings are traced arrays."""

  rules: tuple[str, ...] = ()  # in use, see `rules_in_use`
  num_top: int = 0  # likeliest tokens to report at each step
  levels: tuple[tuple[str, ...], ...] = ()  # sets of rules, one of which it then takes


def generate(
  model: LanguageModel,
  params: Any,
  request: Request,
  sampling: Sampling,
  mesh: Mesh | None = None,
) -> Iterator[TokenBlock]:
  """Yields the rows' next tokens, a block at a time, as host arrays.

  Args:
    model: of any family that writes text.
    params: its parameters, sharded over the mesh. For many calls, lay them out once with
      `prepare_params`.
    request: the prompts; every row gets `max_new_tokens` tokens in all.
    sampling: settings for as many rows as there are prompts.
    mesh: where `params` live; None for a single device.

  The caller stops by asking for no more blocks. Raises `ConfigError` when a row would
  outgrow the model's context or may draw no token, `NonFiniteError` when logits are NaN or
  infinite.
  """
  request.check(model.cfg)
  check_rows(sampling, len(request.prompts), request.num_ids)
  num_rows, num_ids = len(request.prompts), jnp.int32(request.num_ids)
  static = StaticSampling(rules_in_use(sampling), request.num_top)
  with use_mesh(mesh):
    params = prepare_params(params, model.cfg)
    logits_BV, cache = prefill_prompts(model, params, request, mesh)
    batch = logits_BV.shape[0]
    sampling = repeat_to_batch(sampling, batch)
    history = None
    if HISTORY_RULES & set(static.rules):
      num_tokens = logits_BV.shape[1]
      history = history_of_prompts(request.prompts, sampling.states_B, num_tokens)
    state = DecodeState(cache, jnp.zeros(batch, jnp.int32), history)
    state, sampled = sample_step(logits_BV, state, sampling, num_ids, static)

  def decode() -> TokenBlock:
    nonlocal state
    with use_mesh(mesh):
      state, sampled = decode_block(model, params, state, sampling, num_ids, static)
    return sampled

  # A CPU would compute a block in vain for a caller who stops.
  ahead = jax.default_backend() != "cpu"
  for number in range(request.num_blocks + 1):
    is_last = number == request.num_blocks
    following = decode() if ahead and not is_last else None
    block = block_on_host(sampled, num_rows)
    num_before = 1 + (number - 1) * BLOCK_STEPS if number else 0
    yield first_steps(block, request.max_new_tokens - num_before)
    if not is_last:
      sampled = decode() if following is None else following


@functools.partial(jax.jit, static_argnames=("model", "static"), donate_argnames="state")
def decode_block(
  model: LanguageModel,
  params: Any,
  state: DecodeState,
  sampling: Sampling,
  num_ids: jax.Array,
  static: StaticSampling,
) -> tuple[DecodeState, TokenBlock]:
  """`BLOCK_STEPS` decode steps: each feeds every row's last token and samples the next."""

  def decode_step(state: DecodeState, _: None) -> tuple[DecodeState, TokenBlock]:
    output = model.apply({"params": params}, state.token_B[:, None], cache=state.cache)
    state = state._replace(cache=output.cache)
    return sample_step(output.value[:, -1], state, sampling, num_ids, static)

  state, steps = jax.lax.scan(decode_step, state, length=BLOCK_STEPS)
  block = steps.map_steps(lambda x_TB1: x_TB1.swapaxes(0, 1).squeeze(2))
  return state, block._replace(finite_B=steps.finite_B.all(0))


@functools.partial(jax.jit, static_argnames="static", donate_argnames="state")
def sample_step(
  logits_BV: jax.Array,
  state: DecodeState,
  sampling: Sampling,
  num_ids: jax.Array,
  static: StaticSampling,
) -> tuple[DecodeState, TokenBlock]:
  """Samples each row's next token from the logits of its last position.

  Ids from `num_ids` on are padding of the vocabulary, and never sampled.
  """
  logits_BV = mask_padding_ids(logits_BV, num_ids)
  history, lengths_B = state.history, state.cache.lengths_B
  sampled = sample(logits_BV, lengths_B, sampling, static.rules, history, static.num_top)
  if history is not None:
    history = history.add(sampled.token_B, sampling)
  one_step = (x[:, None] for x in sampled)  # T = 1
  block = TokenBlock._make([*one_step, jnp.isfinite(sampled.logprob_B)])
  return DecodeState(state.cache, sampled.token_B, history), block


def repeat_to_batch(sampling: Sampling, batch: int) -> Sampling:
  """The settings for the rows of a batch whose size was rounded up, repeated to fill it."""
  return sampling.map_rows(lambda x: np.resize(x, (batch, *x.shape[1:])))


def first_steps(block: TokenBlock, count: int) -> TokenBlock:
  return block.map_steps(lambda x_BT: x_BT[:, :count])


def block_on_host(block: TokenBlock, num_rows: int) -> TokenBlock:
  """The first `num_rows` rows of a block, as numpy arrays. Raises `NonFiniteError`."""
  block = jax.tree.map(lambda x: on_host(x)[:num_rows], block)
  if not block.finite_B.all():
    row = int(np.argmin(block.finite_B))
    raise NonFiniteError(
      f"the logits of row {row} are NaN or infinite", "the parameters are damaged"
    )
  return block
