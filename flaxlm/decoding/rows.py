# SPDX-License-Identifier: Apache-2.0
"""A batch whose rows come and go: its state on the device, and the programs that change it.

A row is a place in the batch, a slot is a place in the cache of one row. A row has a number
of tokens that it may still draw; at 0 it is idle: it draws nothing and its cache no longer
grows, until another request is put in its place.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flaxlm.config import ResolvedModel
from flaxlm.decoding.drawing import (
  HISTORY_RULES,
  SampledTokens,
  TokenHistory,
  logprobs_of,
  next_token,
  sample,
)
from flaxlm.decoding.generate import StaticSampling
from flaxlm.decoding.sampling import Sampling
from flaxlm.nn.base import LanguageModel
from flaxlm.nn.cache import put_rows
from flaxlm.nn.vocabulary import mask_padding_ids
from flaxlm.sharding import constrain


class Rows(NamedTuple):
  """What one block of decode steps hands to the next."""

  cache: Any  # a KVCache, or an RNN's state
  token_B: jax.Array  # the last sampled token, which is not in the cache yet
  left_B: jax.Array  # how many tokens the row may still draw
  history: TokenHistory | None = None  # None until a rule needs it


class Steps(NamedTuple):
  """The tokens of some steps, time first: (T, B), and the X likeliest of each, (T, B, X).

  `finite_TB` is False where the logits of a row were NaN or infinite.
  """

  tokens_TB: Any
  logprobs_TB: Any
  top_tokens_TBX: Any
  top_logprobs_TBX: Any
  finite_TB: Any


class Drawing(NamedTuple):
  """How each row draws; the part that is compiled in is `StaticSampling`.

  Where that has `levels`, `level` is the one that is in use, and `has_top` tells whether a
  row wants the likeliest tokens.
  """

  sampling: Sampling
  stops_BE: Any  # tokens that end a row; -1 where it has fewer
  num_ids: Any  # ids that can be drawn
  level: Any = None
  has_top: Any = None


def draw_step(
  logits_BV: jax.Array, rows: Rows, drawing: Drawing, static: StaticSampling
) -> tuple[Rows, Steps]:
  """Draws each row's next token from the logits of its last one; T is absent.

  A row ends with a token of `stops_BE`, or where its logits are not finite.
  """
  logits_BV = mask_padding_ids(logits_BV, drawing.num_ids)
  history, lengths_B = rows.history, rows.cache.lengths_B
  if static.levels:
    assert history is not None
    sampled, history = sample_at_level(logits_BV, lengths_B, history, drawing, static)
  else:
    args = (logits_BV, lengths_B, drawing.sampling)
    sampled = sample(*args, static.rules, history, static.num_top)
    if history is not None:
      history = history.add(sampled.token_B, drawing.sampling)
  finite_B = jnp.isfinite(sampled.logprob_B)
  token_B = jnp.where(rows.left_B > 0, sampled.token_B, rows.token_B)
  goes_on_B = finite_B & ~(token_B[:, None] == drawing.stops_BE).any(1)
  left_B = jnp.where(goes_on_B, jnp.maximum(rows.left_B - 1, 0), 0)
  return Rows(rows.cache, token_B, left_B, history), Steps(*sampled, finite_B)


def sample_at_level(
  logits_BV: jax.Array,
  lengths_B: jax.Array,
  history: TokenHistory,
  drawing: Drawing,
  static: StaticSampling,
) -> tuple[SampledTokens, TokenHistory]:
  """`sample` by the rules of the level that is in use; the others cost nothing.

  The history knows of tokens that were drawn by rules which read it, and of no others.
  """
  logits_BV, sampling = logits_BV.astype(jnp.float32), drawing.sampling

  def draw(rules: tuple[str, ...], history: TokenHistory) -> tuple:
    token_B = next_token(logits_BV, lengths_B, sampling, rules, history)
    if HISTORY_RULES & {*rules}:
      history = history.add(token_B, sampling)
    return token_B, history

  draws = [functools.partial(draw, rules) for rules in static.levels]
  token_B, history = jax.lax.switch(drawing.level, draws, history)

  def logprobs(num_top: int) -> tuple[jax.Array, ...]:
    chosen_B, *tops = logprobs_of(logits_BV, token_B, num_top)
    more = static.num_top - num_top
    return chosen_B, *[jnp.pad(x_BX, ((0, 0), (0, more))) for x_BX in tops]

  tops = [functools.partial(logprobs, n) for n in (static.num_top, 0)]
  return SampledTokens(token_B, *jax.lax.cond(drawing.has_top, *tops)), history


@functools.partial(
  jax.jit,
  static_argnames=("model", "most_steps", "can_end_early", "static"),
  donate_argnames="rows",
)
def decode_rows(
  model: LanguageModel,
  params: Any,
  rows: Rows,
  kept_B: jax.Array,
  drawing: Drawing,
  num_steps: jax.Array,
  most_steps: int,
  can_end_early: bool,
  static: StaticSampling,
) -> tuple[Rows, Steps, jax.Array]:
  """A block of decode steps of the rows `kept_B`: (rows, steps, how many steps there are).

  `most_steps` of them or, if it `can_end_early`, `num_steps`, fewer if a row ends: whoever
  waits for it, or for its place, goes on then. An accelerator would wait for the host at
  every step to know.
  """
  rows = rows._replace(left_B=jnp.where(kept_B, rows.left_B, 0))

  def step(rows: Rows) -> tuple[Rows, Steps]:
    is_active_B = (rows.left_B > 0).astype(jnp.int32)
    output = model.apply(
      {"params": params}, rows.token_B[:, None], cache=rows.cache, num_new_B=is_active_B
    )
    rows = rows._replace(cache=output.cache)
    return draw_step(output.value[:, -1], rows, drawing, static)

  if not can_end_early:
    rows, steps = jax.lax.scan(lambda rows, _: step(rows), rows, length=most_steps)
    return pinned(rows), steps, jnp.int32(most_steps)
  _, shapes = jax.eval_shape(step, rows)
  steps = jax.tree.map(lambda x: jnp.zeros((most_steps, *x.shape), x.dtype), shapes)
  num_active = (rows.left_B > 0).sum()

  def goes_on(carry: tuple) -> jax.Array:
    number, rows, _ = carry
    still_active = (rows.left_B > 0).sum()
    return (number < num_steps) & (still_active > 0) & (still_active == num_active)

  def body(carry: tuple) -> tuple:
    number, rows, steps = carry
    rows, new = step(rows)
    return number + 1, rows, jax.tree.map(lambda x, one: x.at[number].set(one), steps, new)

  number, rows, steps = jax.lax.while_loop(goes_on, body, (jnp.int32(0), rows, steps))
  return pinned(rows), steps, number


@functools.partial(jax.jit, static_argnames="static")
def draw_first(
  logits_RV: jax.Array,
  lengths_R: jax.Array,
  left_R: jax.Array,
  history: TokenHistory | None,
  drawing: Drawing,
  static: StaticSampling,
) -> tuple[Rows, Steps]:
  """The first token of each prompt that was read: rows without their cache, and the step
  (T = 1)."""
  read = _Lengths(lengths_R)
  rows = Rows(read, jnp.zeros_like(left_R), left_R, history)
  rows, step = draw_step(logits_RV, rows, drawing, static)
  return pinned(rows._replace(cache=None)), jax.tree.map(lambda x: x[None], step)


class _Lengths(NamedTuple):
  lengths_B: jax.Array


@functools.partial(jax.jit, donate_argnames="rows")
def insert_rows(rows: Rows, new: Rows, rows_R: jax.Array) -> Rows:
  """The batch with new rows, their caches of as many slots, in place of its `rows_R`.

  Of rows that are named twice, the first one counts.
  """
  put = lambda old, new: put_rows(old, new, rows_R)
  history = rows.history
  if new.history is not None:
    history = jax.tree.map(put, history, new.history)
  return pinned(
    Rows(
      rows.cache.put(new.cache, rows_R),
      put(rows.token_B, new.token_B),
      put(rows.left_B, new.left_B),
      history,
    )
  )


@jax.jit
def take_rows(rows: Rows, rows_B: jax.Array, kept_B: jax.Array) -> Rows:
  """A batch of the rows `rows_B`, in this order; those that are not `kept_B` are idle."""
  history = rows.history
  if history is not None:
    history = jax.tree.map(lambda x: x[rows_B], history)
  left_B = jnp.where(kept_B, rows.left_B[rows_B], 0)
  return pinned(Rows(rows.cache.take(rows_B), rows.token_B[rows_B], left_B, history))


@functools.partial(jax.jit, static_argnames=("cfg", "slots", "source_slots"))
def resize_cache(cfg: ResolvedModel, cache: Any, slots: int, source_slots: int) -> Any:
  """The cache with room for `slots` tokens of a row, and for as many of its source."""
  cache = cache.resized(cfg, slots)
  if source_slots:
    cache = cache._replace(source=cache.source.resized(source_slots))
  return cache.constrained()


@functools.partial(jax.jit, donate_argnames="rows")
def renumber(rows: Rows, moved_X: jax.Array) -> Rows:
  """The rows with the states of their automaton renamed, X to `moved_X`."""
  assert rows.history is not None
  states_B = jnp.asarray(moved_X)[rows.history.states_B]
  return pinned(rows._replace(history=rows.history._replace(states_B=states_B)))


def pinned(rows: Rows) -> Rows:
  """The same rows, each array in its one layout on a mesh: one program follows another."""
  names = {1: ("batch",), 2: ("batch", None)}
  pin = lambda x: constrain(x, *names[x.ndim])
  rest = jax.tree.map(pin, rows._replace(cache=None))
  return rest if rows.cache is None else rest._replace(cache=rows.cache.constrained())
