# SPDX-License-Identifier: Apache-2.0
"""Constrained decoding: answers that match a regular expression or a JSON schema.

An expression becomes an automaton over the tokenizer's tokens (Willard & Louf, 2023; the
library is outlines-core): each state allows some tokens, and each of them leads to a next
state. Its two tables are used inside the jitted loop, so no token waits for the host.
Tokens that lead to the same next state from every state are of one kind, and share a
column of the table: there are far fewer kinds than tokens.
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

FREE = 0  # the state that allows every token: of unconstrained rows, and after the end
NEVER = -1  # the next state of a token that is not allowed
END = "\U0010ffff"  # stands for the end of text; no text has this code point


class Automaton(NamedTuple):
  """The next state for each state (X) and kind of token (Y).

  All expressions of a batch share one automaton; each has its own initial state.
  """

  kinds_V: Any  # the kind of each token; kind 0, of padding ids, is allowed in `FREE` only
  next_XY: Any  # the next state, or `NEVER`

  def allowed(self, states_B: jax.Array, num_tokens: int) -> jax.Array:
    """Which of `num_tokens` ids are allowed (B, V)."""
    next_BY = jnp.asarray(self.next_XY)[states_B]
    return next_BY[:, self._kinds(num_tokens)] >= 0

  def follow(self, states_B: jax.Array, token_B: jax.Array, num_tokens: int) -> jax.Array:
    """The states after these tokens."""
    return jnp.asarray(self.next_XY)[states_B, self._kinds(num_tokens)[token_B]]

  def _kinds(self, num_tokens: int) -> jax.Array:
    missing = num_tokens - self.kinds_V.shape[0]
    if missing < 0:
      raise ConfigError(
        f"the tokenizer has {-missing} more ids than the model",
        "decode without a regex or JSON schema",
      )
    return jnp.pad(jnp.asarray(self.kinds_V), (0, missing))


NO_AUTOMATON = Automaton(np.zeros(0, np.int32), np.zeros((0, 0), np.int32))


def regex_of_schema(schema: str | dict) -> str:
  """A regular expression for the JSON texts that a schema describes.

  Raises `ConfigError` for an invalid schema, and for one that no expression can describe.
  """
  text = schema if isinstance(schema, str) else json.dumps(schema)
  try:
    return outlines().json_schema.build_regex_from_schema(text)
  except (ValueError, TypeError) as e:
    raise ConfigError(f"the JSON schema cannot be used: {e}") from e


@functools.lru_cache(maxsize=16)
def build_automaton(
  expressions: tuple[str, ...], tokenizer: AnyTokenizer
) -> tuple[Automaton, Sequence[int]]:
  """One automaton for some regular expressions, and the initial state of each.

  Where the text matches, the end of text is allowed, and leads to `FREE`. Raises
  `ConfigError` for an invalid expression, and for one that no tokens can spell.
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
      # Other tokens may contain `END`, but only the end of text leads to a final state.
      states.append({t: number[to] for t, to in pairs if (to in final) == (t == end)})
  return tabulate(states, tokenizer.vocab_size), initial


@functools.lru_cache(maxsize=64)
def build_index(expression: str, tokenizer: AnyTokenizer) -> Any:
  """The library's automaton for the expression followed by `END`, the end of text.

  With `END`, no text that it accepts is the beginning of another. Without, the library
  loses the longer one (version 0.2.14 accepts only 1 for `1(\\.5)?`).
  """
  if tokenizer.eos_id < 0:
    raise ConfigError("a regex or JSON schema needs a tokenizer with an end of text")
  try:
    return outlines().Index(f"(?:{expression}){END}", build_vocabulary(tokenizer))
  except ValueError as e:
    raise ConfigError(
      f"the regular expression {expression!r} cannot be used: {e}",
      "it must match the whole answer; its syntax is Rust's: docs.rs/regex",
    ) from e


@functools.lru_cache(maxsize=4)
def build_vocabulary(tokenizer: AnyTokenizer) -> Any:
  """The library's vocabulary: the bytes of each token."""
  ids: dict[bytes, list[int]] = {}
  for token in range(tokenizer.vocab_size):
    if (piece := tokenizer.bytes_of(token)) and token not in tokenizer.special_ids:
      ids.setdefault(piece, []).append(token)
  ids[END.encode()] = [tokenizer.eos_id]
  # The library's own end-of-text id is none of ours: `END` stands for the end.
  return outlines().Vocabulary(tokenizer.vocab_size, ids)


def tabulate(states: Sequence[dict[int, int]], num_tokens: int) -> Automaton:
  """The automaton's tables; state 0 is `FREE`.

  Sizes are rounded up to powers of two, so that few programs compile.
  """
  kinds_V = np.zeros(num_tokens, np.int64)
  for following in states:
    next_V = np.full(num_tokens, NEVER, np.int64)
    next_V[[*following.keys()]] = [*following.values()]
    # Tokens stay of one kind if they also lead to the same state from here.
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


def outlines() -> Any:
  try:
    import outlines_core
    import outlines_core.json_schema
  except ImportError as e:
    raise ConfigError(
      "a regex or JSON schema needs outlines-core", "pip install 'flaxlm[constraint]'"
    ) from e
  return outlines_core
