# SPDX-License-Identifier: Apache-2.0
"""Reading prompts into a cache: what is asked for, and the prefill.

Nothing is read twice: equal prompts are read once (several samples of one prompt), and so
is a prefix that all prompts share, or that an earlier call has read. Lengths, cache size
and batch are rounded up to buckets, so that requests of all lengths share a few compiled
programs.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flaxlm.config import MAX_NEW_IN_RING, ResolvedModel
from flaxlm.errors import ConfigError
from flaxlm.nn.base import LanguageModel, Source
from flaxlm.nn.models import init_cache
from flaxlm.sharding import batch_shards

BLOCK_STEPS = 16
SMALLEST_BUCKET = 32
CHUNK = MAX_NEW_IN_RING  # tokens of a prompt that are read at a time
SMALLEST_PREFIX = 64  # shared by all prompts, and worth a pass of its own


@dataclasses.dataclass(frozen=True)
class Request:
  """What is to be continued: ids of each row, which may differ in length.

  `num_ids` are the tokenizer's ids, at most the vocabulary's padded size. `sources` are
  what an encoder-decoder reads; its prompts are what it has written so far. `num_top` of
  the likeliest tokens are told for each step.
  """

  prompts: Sequence[Sequence[int]]
  max_new_tokens: int
  num_ids: int
  sources: Sequence[Sequence[int]] | None = None
  num_top: int = 0

  def check(self, cfg: ResolvedModel) -> None:
    """Refuses what JAX would swallow silently: no prompt, one too long, an unknown id.

    Raises `ConfigError`.
    """
    if self.max_new_tokens < 1:
      raise ConfigError(f"max-new-tokens is {self.max_new_tokens}", "it is at least 1")
    if not 0 <= self.num_top <= self.num_ids:
      raise ConfigError(f"top-logprobs is {self.num_top}", "0 to the vocabulary's size")
    reads = cfg.family == "encoder_decoder"
    if reads != (self.sources is not None) or cfg.family == "encoder":
      raise ConfigError(f"a model of family {cfg.family} does not continue this", "")
    for rows in (self.prompts, self.sources or []):
      if (rows is self.prompts and not rows) or not all(map(len, rows)):
        raise ConfigError("a prompt has no tokens", "begin it with the end-of-text token")
      _check_ids(rows, cfg.num_ids)
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

  def slots(self, shared: int) -> int:
    """Room in the cache, in a bucket: sized to the request, not to the context.

    Padding is written, too, behind a `shared` prefix and at the end of a prompt.
    """
    longest = max(map(len, self.prompts))
    ends = (longest + self.num_blocks * BLOCK_STEPS, padded_length(shared))
    return bucket(max(*ends, shared + padded_length(longest - shared)), fine=True)


def _check_ids(rows: Sequence[Sequence[int]], vocab_size: int) -> None:
  for token in (min(map(min, rows), default=0), max(map(max, rows), default=0)):
    if not 0 <= token < vocab_size:
      raise ConfigError(
        f"token id {token} is not in the model's vocabulary of {vocab_size}",
        "the tokenizer does not fit the model",
      )


def bucket(size: int, smallest: int = SMALLEST_BUCKET, fine: bool = False) -> int:
  """The next power of two, at least `smallest`; if `fine`, or the next 3/2 of one."""
  power = max(smallest, 1 << (size - 1).bit_length())
  between = power // 4 * 3
  return between if fine and smallest < between and size <= between else power


class Past(NamedTuple):
  """What a call has read of one row, for calls that begin with the same tokens."""

  tokens: tuple[int, ...]
  cache: Any

  def usable(self, cfg: ResolvedModel, common: int) -> int:
    """How much of `common` first tokens the cache still has: an RNN keeps its end only."""
    return common if self.cache.can_return(cfg, len(self.tokens) - common) else 0


def prefill_logits(
  model: LanguageModel,
  params: Any,
  request: Request,
  mesh: Mesh | None,
  past: Past | None = None,
) -> tuple[jax.Array, Any]:
  """The logits (B, V) that follow each prompt, and the cache; B is in a bucket."""
  multiple = 1 if mesh is None else batch_shards(mesh.shape)
  fill = lambda count: multiple * bucket(-(-count // multiple), smallest=1)
  sources = request.sources or [()] * len(request.prompts)
  rows = [(tuple(p), tuple(s)) for p, s in zip(request.prompts, sources, strict=True)]
  unique = {row: number for number, row in enumerate(dict.fromkeys(rows))}
  prompts, sources = ([*of] for of in zip(*unique, strict=True))
  batch, shared = fill(len(prompts)), 0
  if request.sources is None:
    shared = shared_prefix(model.cfg, prompts, past)
  slots = request.slots(shared)
  if request.sources is not None:
    source_BS, source_lengths_B = padded(sources, batch)
    cache = start_with_source(model, params, source_BS, source_lengths_B, slots)
  elif shared:
    if past is None or shared > len(past.tokens):
      start = empty(model, multiple, slots)
      _, cache = read(model, params, [prompts[0][:shared]], start)
    else:
      cache = past.cache
    cache = spread(model.cfg, cache, np.zeros(batch, np.int32), np.int32(shared), slots)
  else:
    cache = empty(model, batch, slots)
  logits_BV, cache = read(model, params, [prompt[shared:] for prompt in prompts], cache)
  if len(unique) < len(rows):
    rows_B = np.zeros(fill(len(rows)), np.int32)
    rows_B[: len(rows)] = [unique[row] for row in rows]
    logits_BV, cache = take(logits_BV, cache, rows_B)
  return logits_BV, cache


def shared_prefix(
  cfg: ResolvedModel, prompts: Sequence[Sequence[int]], past: Past | None
) -> int:
  """How many first tokens need not be read row by row; one of each prompt is, always.

  What all prompts share is worth a pass of its own only where there are several.
  """
  first, last = min(map(tuple, prompts)), max(map(tuple, prompts))  # share the least
  most = min(map(len, prompts)) - 1
  among = common_length(first, last, most)
  of_past = 0
  if past is not None:
    of_past = past.usable(cfg, common_length(past.tokens, first, among))
  alone = len(prompts) == 1 or among < SMALLEST_PREFIX or among <= of_past
  return of_past if alone else among


def common_length(first: Sequence[int], second: Sequence[int], most: int) -> int:
  pairs = zip(first[:most], second, strict=False)
  differ = (n for n, (a, b) in enumerate(pairs) if a != b)
  return next(differ, min(most, len(first), len(second)))


def read(
  model: LanguageModel, params: Any, prompts: Sequence[Sequence[int]], cache: Any
) -> tuple[jax.Array, Any]:
  """Reads prompts into a cache, a chunk at a time: (logits (B, V) after each, cache)."""
  batch = cache.lengths_B.shape[0]
  last_BD = np.zeros((batch, model.cfg.width), model.run.dtype)
  for start in range(0, max(map(len, prompts)), CHUNK):
    chunk = [prompt[start : start + CHUNK] for prompt in prompts]
    tokens_BT, num_new_B = padded(chunk, batch)
    last_BD, cache = extend(model, params, tokens_BT, num_new_B, cache, last_BD)
  return head(model, params, last_BD), cache


def padded(rows: Sequence[Sequence[int]], batch: int) -> tuple[np.ndarray, np.ndarray]:
  """(tokens_BT, lengths_B): rows right-padded to a bucket, and rows of one token more."""
  lengths_B = np.array([*map(len, rows), *[1] * (batch - len(rows))], np.int32)
  tokens_BT = np.zeros((batch, bucket(int(lengths_B.max()))), np.int32)
  for number, row in enumerate(rows):
    tokens_BT[number, : len(row)] = row
  return tokens_BT, lengths_B


def padded_length(length: int) -> int:
  """The slots that `read` writes for a prompt."""
  whole = max(0, length - 1) // CHUNK * CHUNK
  return whole + bucket(length - whole)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def extend(
  model: LanguageModel,
  params: Any,
  tokens_BT: jax.Array,
  num_new_B: jax.Array,
  cache: Any,
  last_BD: jax.Array,
) -> tuple[jax.Array, Any]:
  """Reads the first `num_new_B` of right-padded tokens: (hidden of each last, cache).

  A row without new tokens keeps `last_BD`. Slots past a row's length hold its padding's
  keys; no query looks there before the slot is overwritten.
  """
  output = model.apply(
    {"params": params}, tokens_BT, cache=cache, num_new_B=num_new_B, method="hidden"
  )
  index_B11 = jnp.maximum(num_new_B - 1, 0)[:, None, None]
  newest_BD = jnp.take_along_axis(output.value, index_B11, 1)[:, 0]
  return jnp.where(num_new_B[:, None] > 0, newest_BD, last_BD), output.cache


@functools.partial(jax.jit, static_argnames="model")
def head(model: LanguageModel, params: Any, x_BD: jax.Array) -> jax.Array:
  return model.apply({"params": params}, x_BD[:, None], method="logits")[:, 0]


@functools.partial(jax.jit, static_argnames=("model", "batch", "slots"))
def empty(model: LanguageModel, batch: int, slots: int) -> Any:
  return init_cache(model, batch, slots)


@jax.jit
def take(logits_BV: jax.Array, cache: Any, rows_B: jax.Array) -> tuple[jax.Array, Any]:
  return logits_BV[rows_B], cache.take(rows_B)


@functools.partial(jax.jit, static_argnames=("cfg", "slots"))
def spread(
  cfg: ResolvedModel, cache: Any, rows_B: jax.Array, length: jax.Array, slots: int
) -> Any:
  """The first `length` tokens of some rows, with room for `slots` of them."""
  cache = cache.take(rows_B)
  lengths_B = jnp.full_like(cache.lengths_B, length)
  return cache._replace(lengths_B=lengths_B).resized(cfg, slots)


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
