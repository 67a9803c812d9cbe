# SPDX-License-Identifier: Apache-2.0
"""Autoregressive decoding: prefill the prompts, then a jitted loop over the KV cache.

The loop runs in blocks of a fixed number of steps, since an early exit would make an
accelerator wait for the host at every token; the host looks between blocks. Prompt
length, cache size and batch are rounded up to buckets, so that requests of all lengths
share a few compiled programs.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flaxlm.decoding.sampling import Sampling, is_filtered, sample
from flaxlm.errors import ConfigError, NonFiniteError
from flaxlm.nn.base import LanguageModel
from flaxlm.nn.models import init_cache
from flaxlm.sharding import batch_shards

BLOCK_STEPS = 16
SMALLEST_BUCKET = 32


class DecodeState(NamedTuple):
  """What one step hands to the next. `token_B` is chosen, but not yet in the cache."""

  cache: Any  # a KVCache, or an RNN's state
  token_B: jax.Array


class Chosen(NamedTuple):
  """Tokens that a block chose, (B, T) each; `finite_B` is False where logits were not."""

  tokens_BT: Any
  logprobs_BT: Any
  finite_B: Any


@functools.partial(jax.jit, static_argnames=("model", "filtered"), donate_argnames="cache")
def prefill(
  model: LanguageModel,
  params: Any,
  tokens_BT: jax.Array,
  lengths_B: jax.Array,
  cache: Any,
  sampling: Sampling,
  num_ids: jax.Array,
  filtered: bool,
) -> tuple[DecodeState, Chosen]:
  """Reads right-padded prompts into an empty cache and chooses each row's next token.

  Slots past a row's length hold its padding's keys; no query looks there before the
  slot is overwritten.
  """
  variables = {"params": params}
  output = model.apply(
    variables, tokens_BT, cache=cache, num_new_B=lengths_B, method="hidden"
  )
  last_BTD = jnp.take_along_axis(output.value, lengths_B[:, None, None] - 1, 1)
  logits_BTV = model.apply(variables, last_BTD, method="logits")
  return choose(logits_BTV, output.cache, sampling, num_ids, filtered)


@functools.partial(
  jax.jit, static_argnames=("model", "num_steps", "filtered"), donate_argnames="state"
)
def decode_block(
  model: LanguageModel,
  params: Any,
  state: DecodeState,
  sampling: Sampling,
  num_ids: jax.Array,
  num_steps: int,
  filtered: bool,
) -> tuple[DecodeState, Chosen]:
  """`num_steps` tokens for every row: each step feeds one token and chooses the next."""

  def step(state: DecodeState, _: None) -> tuple[DecodeState, Chosen]:
    output = model.apply({"params": params}, state.token_B[:, None], cache=state.cache)
    return choose(output.value, output.cache, sampling, num_ids, filtered)

  state, chosen = jax.lax.scan(step, state, length=num_steps)
  by_row = lambda x_TB1: x_TB1[:, :, 0].T
  return state, Chosen(
    by_row(chosen.tokens_BT), by_row(chosen.logprobs_BT), chosen.finite_B.all(0)
  )


def choose(
  logits_BTV: jax.Array,
  cache: Any,
  sampling: Sampling,
  num_ids: jax.Array,
  filtered: bool,
) -> tuple[DecodeState, Chosen]:
  """Draws each row's next token from the logits of its last position.

  Ids from `num_ids` on are the vocabulary's padding, and never drawn.
  """
  logits_BV = logits_BTV[:, -1]
  real_V = jnp.arange(logits_BV.shape[-1]) < num_ids
  logits_BV = jnp.where(real_V, logits_BV, -jnp.inf)
  token_B, logprob_B = sample(logits_BV, cache.lengths_B, sampling, filtered)
  finite_B = jnp.isfinite(logprob_B)
  chosen = Chosen(token_B[:, None], logprob_B[:, None], finite_B)
  return DecodeState(cache, token_B), chosen


def bucket(size: int, smallest: int = SMALLEST_BUCKET) -> int:
  """The next power of two, at least `smallest`."""
  return max(smallest, 1 << (size - 1).bit_length())


def generate(
  model: LanguageModel,
  params: Any,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  sampling: Sampling,
  num_ids: int | None = None,
  mesh: Mesh | None = None,
) -> Iterator[Chosen]:
  """Yields the rows' next tokens, a block at a time, as host arrays.

  Args:
    model: the decoder.
    params: its parameters, as they lie on the mesh.
    prompts: ids, at least one a row; rows may differ in length.
    max_new_tokens: total length of what is yielded, per row.
    sampling: rules for as many rows as there are prompts.
    num_ids: ids of the tokenizer, if fewer than the vocabulary's padded size.
    mesh: where `params` live; None for a single device.

  The caller stops by not asking for more. Raises `ConfigError` when a row would outgrow
  the model's context, `NonFiniteError` when logits are NaN or infinite.
  """
  assert model.cfg.vocab_size is not None
  check_prompts(prompts, max_new_tokens, model.cfg.context, model.cfg.vocab_size)
  num_rows = len(prompts)
  multiple = 1 if mesh is None else batch_shards(mesh.shape)
  batch = multiple * bucket(-(-num_rows // multiple), smallest=1)
  lengths_B = np.array([*map(len, prompts), *[1] * (batch - num_rows)], np.int32)
  tokens_BT = np.zeros((batch, bucket(int(lengths_B.max()))), np.int32)
  for row, prompt in enumerate(prompts):
    tokens_BT[row, : len(prompt)] = prompt
  pad = lambda x: np.resize(x, batch)
  sampling = Sampling(*map(pad, sampling))
  filtered = is_filtered(sampling)
  ids = jnp.int32(num_ids or model.cfg.vocab_size)

  num_blocks = -(-(max_new_tokens - 1) // BLOCK_STEPS)
  slots = bucket(int(lengths_B.max()) + num_blocks * BLOCK_STEPS)
  with mesh_scope(mesh):
    cache = init_cache(model, batch, slots)
    state, chosen = prefill(
      model, params, tokens_BT, lengths_B, cache, sampling, ids, filtered
    )
  yield to_host(chosen, num_rows, max_new_tokens)
  for block in range(num_blocks):
    with mesh_scope(mesh):
      state, chosen = decode_block(
        model, params, state, sampling, ids, BLOCK_STEPS, filtered
      )
    yield to_host(chosen, num_rows, max_new_tokens - 1 - block * BLOCK_STEPS)


def mesh_scope(mesh: Mesh | None) -> contextlib.AbstractContextManager:
  """Sets the mesh around a call; not around a yield, where it would leak to the caller."""
  return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def to_host(chosen: Chosen, num_rows: int, most: int) -> Chosen:
  """The real rows of a block, cut to `most` tokens. Raises `NonFiniteError`."""
  chosen = Chosen(*(np.asarray(x)[:num_rows] for x in chosen))
  if not chosen.finite_B.all():
    row = int(np.argmin(chosen.finite_B))
    raise NonFiniteError(
      f"the logits of row {row} are NaN or infinite", "the parameters are damaged"
    )
  return chosen._replace(
    tokens_BT=chosen.tokens_BT[:, :most], logprobs_BT=chosen.logprobs_BT[:, :most]
  )


def check_prompts(
  prompts: Sequence[Sequence[int]], max_new_tokens: int, context: int, vocab_size: int
) -> None:
  """Refuses what JAX would swallow silently: no prompt, one too long, an unknown id."""
  if max_new_tokens < 1:
    raise ConfigError(f"max-new-tokens is {max_new_tokens}", "it is at least 1")
  if not prompts or not min(map(len, prompts)):
    raise ConfigError("a prompt has no tokens", "begin it with the end-of-text token")
  for token in (min(map(min, prompts)), max(map(max, prompts))):
    if not 0 <= token < vocab_size:
      raise ConfigError(
        f"token id {token} is not in the model's vocabulary of {vocab_size}",
        "the tokenizer does not fit the model",
      )
  longest = max(map(len, prompts))
  if longest + max_new_tokens > context:
    raise ConfigError(
      f"prompt of {longest} tokens + {max_new_tokens} new > model.context={context}",
      f"shorten the prompt, or ask for at most {max(0, context - longest)} new tokens",
    )
