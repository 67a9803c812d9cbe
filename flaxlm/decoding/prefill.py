# SPDX-License-Identifier: Apache-2.0
"""Prefill: a request's prompts are read into a cache.

Equal prompts are read once (several samples of one prompt). Lengths, cache size and batch
are rounded up to buckets, so that requests of all lengths share a few compiled programs.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flaxlm.config import MAX_NEW_IN_RING, ResolvedModel
from flaxlm.errors import ConfigError
from flaxlm.nn.base import LanguageModel, Source
from flaxlm.nn.models import init_cache
from flaxlm.sharding import batch_shards, constrain, wait_on_cpu

BLOCK_STEPS = 16
SMALLEST_BUCKET = 32
MOST_NEW_TOKENS = 2**20  # of an RNN, which no context limits
CHUNK = MAX_NEW_IN_RING  # tokens of a prompt that one pass reads


def check_ids(rows: Sequence[Sequence[int]], num_ids: int) -> None:
  """Raises `ConfigError` for an id that the model has not: JAX would read another one."""
  for token in (min(map(min, rows), default=0), max(map(max, rows), default=0)):
    if not 0 <= token < num_ids:
      raise ConfigError(
        f"token id {token} is not in the model's vocabulary of {num_ids}",
        "the tokenizer does not fit the model",
      )


@dataclasses.dataclass(frozen=True)
class Request:
  """The rows to continue, as token ids; they may differ in length.

  `num_ids` is the number of the tokenizer's ids, which may be smaller than the model's
  vocabulary. `sources` are what an encoder-decoder reads; its prompts are then what it has
  written so far. `num_top` is how many of the likeliest tokens each step reports.
  """

  prompts: Sequence[Sequence[int]]
  max_new_tokens: int
  num_ids: int
  sources: Sequence[Sequence[int]] | None = None
  num_top: int = 0

  def check(self, cfg: ResolvedModel) -> None:
    """Raises `ConfigError` for prompts that JAX would accept silently, and decode wrongly:
    none at all, an empty one, one that is too long, or an unknown id."""
    if not 1 <= self.max_new_tokens <= MOST_NEW_TOKENS:
      raise ConfigError(
        f"max-new-tokens is {self.max_new_tokens}", f"it can be 1 to {MOST_NEW_TOKENS}"
      )
    if not 0 <= self.num_top <= self.num_ids:
      raise ConfigError(f"top-logprobs is {self.num_top}", "0 to the vocabulary's size")
    needs_sources = cfg.family == "encoder_decoder"
    if needs_sources != (self.sources is not None) or cfg.family == "encoder":
      raise ConfigError(f"a model of family {cfg.family} does not continue such a request")
    for rows in (self.prompts, self.sources or []):
      if (rows is self.prompts and not rows) or not all(map(len, rows)):
        raise ConfigError("a prompt has no tokens", "begin it with the end-of-text token")
      check_ids(rows, cfg.num_ids)
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
    """Blocks of decode steps that follow the first token, which the prefill gives."""
    return -(-(self.max_new_tokens - 1) // BLOCK_STEPS)

  @property
  def slots(self) -> int:
    """Slots of a cache for this request, rounded up to a bucket.

    They depend on the request, not on the model's context. There is room for the padding
    that the prefill writes at the end of a prompt.
    """
    longest = max(map(len, self.prompts))
    decoded = longest + self.num_blocks * BLOCK_STEPS
    return bucket(max(decoded, padded_length(longest)), fine=True)


def bucket(size: int, smallest: int = SMALLEST_BUCKET, fine: bool = False) -> int:
  """`size` rounded up to a power of two, at least `smallest`.

  If `fine`, also to 3/2 of a power of two.
  """
  power = max(smallest, 1 << (size - 1).bit_length())
  between = power // 4 * 3
  return between if fine and smallest < between and size <= between else power


def prefill_prompts(
  model: LanguageModel, params: Any, request: Request, mesh: Mesh | None
) -> tuple[jax.Array, Any]:
  """The logits (B, V) that follow each prompt, and the cache.

  B is the number of prompts rounded up to a bucket that the mesh can split.
  """
  shards = 1 if mesh is None else batch_shards(mesh.shape)
  batch_of = lambda count: shards * bucket(-(-count // shards), smallest=1)
  sources = request.sources or [()] * len(request.prompts)
  rows = [(tuple(p), tuple(s)) for p, s in zip(request.prompts, sources, strict=True)]
  unique = {row: number for number, row in enumerate(dict.fromkeys(rows))}
  prompts, sources = ([*column] for column in zip(*unique, strict=True))
  batch = batch_of(len(prompts))
  if request.sources is not None:
    source_BS, source_lengths_B = pad_rows(sources, batch)
    sources_of_rows = source_BS, source_lengths_B
    cache = init_cache_with_source(model, params, *sources_of_rows, request.slots)
  else:
    cache = init_cache(model, batch, request.slots)
  logits_BV, cache = prefill_rows(model, params, prompts, cache)
  if len(unique) < len(rows):
    rows_B = np.zeros(batch_of(len(rows)), np.int32)
    rows_B[: len(rows)] = [unique[row] for row in rows]
    logits_BV, cache = take_rows(logits_BV, cache, rows_B)
  return logits_BV, cache


def prefill_rows(
  model: LanguageModel, params: Any, rows: Sequence[Sequence[int]], cache: Any
) -> tuple[jax.Array, Any]:
  """Reads rows into a cache, a chunk at a time: (logits (B, V) after each, cache)."""
  batch = cache.lengths_B.shape[0]
  last_BD = no_hidden(model, batch)
  for start in range(0, max(map(len, rows)), CHUNK):
    chunk = [row[start : start + CHUNK] for row in rows]
    tokens_BT, num_new_B = pad_rows(chunk, batch)
    last_BD, cache = prefill_chunk(model, params, tokens_BT, num_new_B, cache, last_BD)
    wait_on_cpu(last_BD)
  return logits_of_hidden(model, params, last_BD), cache


def pad_rows(
  rows: Sequence[Sequence[int]], batch: int, length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """(tokens_BT, lengths_B): rows padded at the right to a `length`, or to a bucket.

  Rows that only fill up the batch have one token.
  """
  lengths_B = np.array([*map(len, rows), *[1] * (batch - len(rows))], np.int32)
  length = length or bucket(int(lengths_B.max()))
  tokens_BT = np.zeros((batch, length), np.int32)
  for number, row in enumerate(rows):
    tokens_BT[number, : len(row)] = row
  return tokens_BT, lengths_B


def is_real_token(tokens_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
  """False for the padding of right-padded rows (B, T)."""
  return jnp.arange(tokens_BT.shape[1]) < lengths_B[:, None]


def padded_length(length: int) -> int:
  """The slots that the prefill writes for a row of `length` tokens."""
  whole = max(0, length - 1) // CHUNK * CHUNK
  return whole + bucket(length - whole)


@functools.partial(jax.jit, static_argnames=("model", "batch"))
def no_hidden(model: LanguageModel, batch: int) -> jax.Array:
  """(B, D) for rows of which nothing was read, as `prefill_chunk` lays them out."""
  zeros_BD = jnp.zeros((batch, model.cfg.width), model.execution.dtype)
  return constrain(zeros_BD, "batch", None)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def prefill_chunk(
  model: LanguageModel,
  params: Any,
  tokens_BT: jax.Array,
  num_new_B: jax.Array,
  cache: Any,
  last_BD: jax.Array,
) -> tuple[jax.Array, Any]:
  """Reads the first `num_new_B` tokens of each row: (hidden vector of its last, cache).

  A row without new tokens keeps `last_BD`. Slots past a row's length hold the keys of its
  padding; no query looks there before the slot is overwritten.
  """
  output = model.apply(
    {"params": params}, tokens_BT, cache=cache, num_new_B=num_new_B, method="hidden"
  )
  index_B11 = jnp.maximum(num_new_B - 1, 0)[:, None, None]
  newest_BD = jnp.take_along_axis(output.value, index_B11, 1)[:, 0]
  last_BD = jnp.where(num_new_B[:, None] > 0, newest_BD, last_BD)
  return constrain(last_BD, "batch", None), output.cache


@functools.partial(jax.jit, static_argnames="model")
def logits_of_hidden(model: LanguageModel, params: Any, x_BD: jax.Array) -> jax.Array:
  return model.apply({"params": params}, x_BD[:, None], method="logits")[:, 0]


@functools.partial(jax.jit, static_argnames=("model", "slots"))
def init_cache_with_source(
  model: LanguageModel,
  params: Any,
  source_BS: jax.Array,
  lengths_B: jax.Array,
  slots: int,
) -> Any:
  """An empty cache for the text, with the encoder's output for right-padded sources."""
  segments_BS = is_real_token(source_BS, lengths_B).astype(jnp.int32)
  source = Source(source_BS, segments_BS=segments_BS)
  return model.apply({"params": params}, source, slots, method="start")


@jax.jit
def take_rows(logits_BV: jax.Array, cache: Any, rows_B: jax.Array) -> tuple[jax.Array, Any]:
  return logits_BV[rows_B], cache.take(rows_B)
