# SPDX-License-Identifier: Apache-2.0
"""Autoregressive decoding: prefill the prompts, then a jitted loop over the KV cache.

The loop runs in blocks of a fixed number of steps, since an early exit would make an
accelerator wait for the host at every token; the host looks between blocks. Prompt
length, cache size and batch are rounded up to buckets, so that requests of all lengths
share a few compiled programs.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flaxlm.config import ModelConfig
from flaxlm.decoding.sampling import Sampling, is_filtered, sample
from flaxlm.errors import ConfigError, NonFiniteError
from flaxlm.nn.base import LanguageModel, Source
from flaxlm.nn.models import init_cache
from flaxlm.sharding import batch_shards, on_host

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


@dataclasses.dataclass(frozen=True)
class Request:
  """What is to be continued: ids of each row, which may differ in length.

  `num_ids` are the tokenizer's ids, at most the vocabulary's padded size. `sources` are
  what an encoder-decoder reads; its prompts are what it has written so far.
  """

  prompts: Sequence[Sequence[int]]
  max_new_tokens: int
  num_ids: int
  sources: Sequence[Sequence[int]] | None = None

  def check(self, cfg: ModelConfig) -> None:
    """Refuses what JAX would swallow silently: no prompt, one too long, an unknown id.

    Raises `ConfigError`.
    """
    if self.max_new_tokens < 1:
      raise ConfigError(f"max-new-tokens is {self.max_new_tokens}", "it is at least 1")
    reads = cfg.family == "encoder_decoder"
    if reads != (self.sources is not None) or cfg.family == "encoder":
      raise ConfigError(f"a model of family {cfg.family} does not continue this", "")
    for rows in (self.prompts, self.sources or []):
      if (rows is self.prompts and not rows) or not all(map(len, rows)):
        raise ConfigError("a prompt has no tokens", "begin it with the end-of-text token")
      _check_ids(rows, cfg.vocab_size)
    longest = max(map(len, self.prompts))
    if cfg.family != "rnn" and longest + self.max_new_tokens > cfg.context:
      room = max(0, cfg.context - longest)
      raise ConfigError(
        f"prompt of {longest} tokens + {self.max_new_tokens} new > "
        f"model.context={cfg.context}",
        f"shorten the prompt, or ask for at most {room} new tokens",
      )
    longest = max(map(len, self.sources or [[]]))
    if longest > cfg.context:
      raise ConfigError(
        f"prompt of {longest} tokens > model.context={cfg.context}", "shorten it"
      )

  @property
  def num_blocks(self) -> int:
    """Blocks of steps after the token that the prefill chooses."""
    return -(-(self.max_new_tokens - 1) // BLOCK_STEPS)

  @property
  def slots(self) -> int:
    """Room in the cache, in a bucket."""
    return bucket(max(map(len, self.prompts)) + self.num_blocks * BLOCK_STEPS)


def _check_ids(rows: Sequence[Sequence[int]], vocab_size: int | None) -> None:
  assert vocab_size is not None, "resolved"
  for token in (min(map(min, rows), default=0), max(map(max, rows), default=0)):
    if not 0 <= token < vocab_size:
      raise ConfigError(
        f"token id {token} is not in the model's vocabulary of {vocab_size}",
        "the tokenizer does not fit the model",
      )


def prefill_logits(
  model: LanguageModel, params: Any, request: Request, mesh: Mesh | None
) -> tuple[jax.Array, Any]:
  """The logits (B, V) that follow each prompt, and the cache; B is in a bucket."""
  num_rows = len(request.prompts)
  multiple = 1 if mesh is None else batch_shards(mesh.shape)
  batch = multiple * bucket(-(-num_rows // multiple), smallest=1)
  tokens_BT, lengths_B = padded(request.prompts, batch)
  if request.sources is None:
    cache = init_cache(model, batch, request.slots)
  else:
    source_BS, source_lengths_B = padded(request.sources, batch)
    cache = start_with_source(model, params, source_BS, source_lengths_B, request.slots)
  return prefill(model, params, tokens_BT, lengths_B, cache)


def padded(rows: Sequence[Sequence[int]], batch: int) -> tuple[np.ndarray, np.ndarray]:
  """(tokens_BT, lengths_B): rows right-padded to a bucket, and rows of one token more."""
  lengths_B = np.array([*map(len, rows), *[1] * (batch - len(rows))], np.int32)
  tokens_BT = np.zeros((batch, bucket(int(lengths_B.max()))), np.int32)
  for number, row in enumerate(rows):
    tokens_BT[number, : len(row)] = row
  return tokens_BT, lengths_B


@functools.partial(jax.jit, static_argnames=("model", "slots"))
def start_with_source(
  model: LanguageModel,
  params: Any,
  source_BS: jax.Array,
  lengths_B: jax.Array,
  slots: int,
) -> Any:
  """An empty cache that knows what the encoder made of right-padded sources."""
  segments_BS = (jnp.arange(source_BS.shape[1]) < lengths_B[:, None]).astype(jnp.int32)
  source = Source(source_BS, segments_BS=segments_BS)
  return model.apply({"params": params}, source, slots, method="start")


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def prefill(
  model: LanguageModel, params: Any, tokens_BT: jax.Array, lengths_B: jax.Array, cache: Any
) -> tuple[jax.Array, Any]:
  """Reads right-padded prompts into an empty cache: (logits (B, V) of each last, cache).

  Slots past a row's length hold its padding's keys; no query looks there before the
  slot is overwritten.
  """
  variables = {"params": params}
  output = model.apply(
    variables, tokens_BT, cache=cache, num_new_B=lengths_B, method="hidden"
  )
  last_BTD = jnp.take_along_axis(output.value, lengths_B[:, None, None] - 1, 1)
  logits_BTV = model.apply(variables, last_BTD, method="logits")
  return logits_BTV[:, 0], output.cache


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
    return choose(output.value[:, -1], output.cache, sampling, num_ids, filtered)

  state, chosen = jax.lax.scan(step, state, length=num_steps)
  by_row = lambda x_TB1: x_TB1[:, :, 0].T
  return state, Chosen(
    by_row(chosen.tokens_BT), by_row(chosen.logprobs_BT), chosen.finite_B.all(0)
  )


@functools.partial(jax.jit, static_argnames="filtered", donate_argnames="cache")
def choose(
  logits_BV: jax.Array,
  cache: Any,
  sampling: Sampling,
  num_ids: jax.Array,
  filtered: bool,
) -> tuple[DecodeState, Chosen]:
  """Draws each row's next token from the logits of its last position.

  Ids from `num_ids` on are the vocabulary's padding, and never drawn.
  """
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
  request: Request,
  sampling: Sampling,
  mesh: Mesh | None = None,
) -> Iterator[Chosen]:
  """Yields the rows' next tokens, a block at a time, as host arrays.

  Args:
    model: of any family that writes text.
    params: its parameters, as they lie on the mesh.
    request: the prompts; `max_new_tokens` is the length of what is yielded, per row.
    sampling: rules for as many rows as there are prompts.
    mesh: where `params` live; None for a single device.

  The caller stops by not asking for more. Raises `ConfigError` when a row would outgrow
  the model's context, `NonFiniteError` when logits are NaN or infinite.
  """
  request.check(model.cfg)
  num_rows, ids = len(request.prompts), jnp.int32(request.num_ids)
  with mesh_scope(mesh):
    logits_BV, cache = prefill_logits(model, params, request, mesh)
    sampling = Sampling(*(np.resize(x, logits_BV.shape[0]) for x in sampling))
    filtered = is_filtered(sampling)
    state, chosen = choose(logits_BV, cache, sampling, ids, filtered)
  yield to_host(chosen, num_rows, request.max_new_tokens)
  for block in range(request.num_blocks):
    with mesh_scope(mesh):
      state, chosen = decode_block(
        model, params, state, sampling, ids, BLOCK_STEPS, filtered
      )
    yield to_host(chosen, num_rows, request.max_new_tokens - 1 - block * BLOCK_STEPS)


def mesh_scope(mesh: Mesh | None) -> contextlib.AbstractContextManager:
  """Sets the mesh around a call; not around a yield, where it would leak to the caller."""
  return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def to_host(chosen: Chosen, num_rows: int, most: int) -> Chosen:
  """The real rows of a block, cut to `most` tokens. Raises `NonFiniteError`."""
  chosen = Chosen(*(on_host(x)[:num_rows] for x in chosen))
  if not chosen.finite_B.all():
    row = int(np.argmin(chosen.finite_B))
    raise NonFiniteError(
      f"the logits of row {row} are NaN or infinite", "the parameters are damaged"
    )
  return chosen._replace(
    tokens_BT=chosen.tokens_BT[:, :most], logprobs_BT=chosen.logprobs_BT[:, :most]
  )
