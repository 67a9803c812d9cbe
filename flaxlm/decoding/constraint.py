# SPDX-License-Identifier: Apache-2.0
"""Answers of a given form: a regular expression, or a JSON schema.

An expression becomes an automaton over the tokenizer's tokens (Willard & Louf, 2023; the
library is outlines-core): in each of its states some tokens may come, and each leads to a
state. As two tables it runs inside the jitted loop, so no token waits for the host.
Tokens that lead to the same states from everywhere are of one kind and share a column of
the table: there are far fewer kinds than tokens.
"""

import functools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.errors import ConfigError
from flaxlm.tokenizers import AnyTokenizer

FREE = 0  # the state in which every token may come, before and after
NEVER = -1
END = "\U0010ffff"  # no character


class Automaton(NamedTuple):
  """Which tokens may come in each state (X), by kind of token (Y), and what follows.

  All expressions of a batch share one; each has an initial state of its own.
  """

  kinds_V: Any  # tokens past the last one are of kind 0, which comes in `FREE` only
  next_XY: Any  # the state that follows, or `NEVER`

  def allowed(self, states_B: jax.Array, num_tokens: int) -> jax.Array:
    """Which of so many tokens may come (B, V)."""
    next_BY = jnp.asarray(self.next_XY)[states_B]
    return next_BY[:, self._kinds(num_tokens)] >= 0

  def follow(self, states_B: jax.Array, token_B: jax.Array, num_tokens: int) -> jax.Array:
    """The states after these tokens."""
    return jnp.asarray(self.next_XY)[states_B, self._kinds(num_tokens)[token_B]]

  def _kinds(self, num_tokens: int) -> jax.Array:
    missing = num_tokens - self.kinds_V.shape[0]
    if missing < 0:
      raise ConfigError(
        f"the tokenizer has {-missing} ids more than the model", "answer without a form"
      )
    return jnp.pad(jnp.asarray(self.kinds_V), (0, missing))


NO_AUTOMATON = Automaton(np.zeros(0, np.int32), np.zeros((0, 0), np.int32))


def regex_of_schema(schema: str | dict) -> str:
  """The regular expression of the JSON texts that a schema describes.

  Raises `ConfigError` for what is no schema, or has parts that no expression has.
  """
  text = schema if isinstance(schema, str) else json.dumps(schema)
  try:
    return library().json_schema.build_regex_from_schema(text)
  except (ValueError, TypeError) as e:
    raise ConfigError(f"the JSON schema cannot be used: {e}") from e


@functools.lru_cache(maxsize=16)
def build_automaton(
  expressions: tuple[str, ...], tokenizer: AnyTokenizer
) -> tuple[Automaton, Sequence[int]]:
  """One automaton for some regular expressions, and the initial state of each.

  The end of the text may come where an expression is fulfilled, and leads to `FREE`.
  Raises `ConfigError` for an expression that is none, or that no tokens can spell.
  """
  states: list[dict[int, int]] = []  # of state i + 1: token -> next state
  initial, end = [], tokenizer.eos_id
  for expression in expressions:
    index = build_index(expression, tokenizer)
    transitions, final = index.get_transitions(), index.get_final_states()
    unfinished = [state for state in transitions if state not in final]
    number = {state: n for n, state in enumerate(unfinished, len(states) + 1)}
    number |= dict.fromkeys(final, FREE)
    initial.append(number[index.get_initial_state()])
    for state in unfinished:
      pairs = transitions[state].items()
      # A text may spell `END`, too, but does not end by it.
      states.append({t: number[to] for t, to in pairs if (to in final) == (t == end)})
  return tabulate(states, tokenizer.vocab_size), initial


@functools.lru_cache(maxsize=64)
def build_index(expression: str, tokenizer: AnyTokenizer) -> Any:
  """The library's automaton of the expression and an `END`, which the end of text spells.

  So none of what it accepts begins with something else that it accepts. Without, the
  library would lose the longer one (0.2.14: `1(\\.5)?` accepts 1 only).
  """
  if tokenizer.eos_id < 0:
    raise ConfigError("the tokenizer has no end of text to end an answer of a form with")
  try:
    return library().Index(f"(?:{expression}){END}", build_vocabulary(tokenizer))
  except ValueError as e:
    raise ConfigError(
      f"the regular expression {expression!r} cannot be used: {e}",
      "it describes the whole answer, in Rust's syntax: docs.rs/regex",
    ) from e


@functools.lru_cache(maxsize=4)
def build_vocabulary(tokenizer: AnyTokenizer) -> Any:
  """What each token spells, in the library's words."""
  ids: dict[bytes, list[int]] = {}
  for token in range(tokenizer.vocab_size):
    if (piece := tokenizer.bytes_of(token)) and token not in tokenizer.special_ids:
      ids.setdefault(piece, []).append(token)
  ids[END.encode()] = [tokenizer.eos_id]
  # What the library itself takes for the end is no token.
  return library().Vocabulary(tokenizer.vocab_size, ids)


def tabulate(states: Sequence[dict[int, int]], num_tokens: int) -> Automaton:
  """The tables, with `FREE` before the states; sizes in buckets, so that few compile."""
  kinds_V = np.zeros(num_tokens, np.int64)
  for following in states:
    next_V = np.full(num_tokens, NEVER, np.int64)
    next_V[[*following.keys()]] = [*following.values()]
    # Tokens stay of one kind if they were, and lead to one state from here as well.
    both_V = kinds_V * (len(states) + 2) + next_V - NEVER
    _, kinds_V = np.unique(both_V, return_inverse=True)
  _, tokens_Y = np.unique(kinds_V, return_index=True)
  sizes = [1 << int(n).bit_length() for n in (len(states), len(tokens_Y))]
  next_XY = np.full(sizes, NEVER, np.int32)
  next_XY[FREE] = FREE
  for state, following in enumerate(states, 1):
    for kind, token in enumerate(tokens_Y.tolist(), 1):
      next_XY[state, kind] = following.get(token, NEVER)
  return Automaton(kinds_V.astype(np.int32) + 1, next_XY)


def library() -> Any:
  try:
    import outlines_core
    import outlines_core.json_schema
  except ImportError as e:
    raise ConfigError(
      "answers of a given form need outlines-core", "pip install 'flaxlm[constraint]'"
    ) from e
  return outlines_core
