# SPDX-License-Identifier: Apache-2.0
"""Constrained decoding: answers that match a regular expression.

An expression becomes an automaton over the tokenizer's tokens (Willard & Louf, 2023; the
library is outlines-core): each state allows some tokens, and each of them leads to a next
state. Its two tables are used inside the jitted loop, so no token waits for the host.
Tokens that lead to the same next state from every state are of one kind, and share a
column of the table: there are far fewer kinds than tokens.
"""

import functools
import json
import reprlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.errors import ConfigError
from flaxlm.tokenizers import AnyTokenizer

FREE = 0  # the state that allows every token: of unconstrained rows, and after the end
NEVER = -1  # the next state of a token that is not allowed
MOST_LENGTH = 100_000  # characters of an expression
MOST_STATES = 20_000  # of its automaton
MOST_LINKS = 20_000_000  # of its automaton over tokens: about 2 GB
MOST_SECONDS, MOST_BYTES = 3, 2**30  # to build its automaton over bytes
PROBED_TOGETHER = 64
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


class Size(NamedTuple):
  """How many states the automaton of an expression has, and transitions by bytes."""

  states: int
  links: int


_sizes: dict[str, Size] = {}  # of the expressions that are known to be within the limits


def check_expressions(expressions: Sequence[str]) -> None:
  """Raises `ConfigError` for the first expression that is invalid or whose automaton is too
  large; needs no tokenizer. Processes with limits find out: see `probe`."""
  outlines()  # or say what to install
  unknown = [e for e in dict.fromkeys(expressions) if e not in _sizes]
  for expression in unknown:
    if len(expression) > MOST_LENGTH:
      raise _unusable(expression, f"it has more than {MOST_LENGTH} characters")
  for start in range(0, len(unknown), PROBED_TOGETHER):
    probe(unknown[start : start + PROBED_TOGETHER])


def probe(expressions: Sequence[str]) -> None:
  """Measures some expressions in a process of limited time and memory. Raises `ConfigError`
  for the first that exceeds them, or is invalid."""
  asked = dict(seconds=MOST_SECONDS, bytes=MOST_BYTES)
  framed = [f"(?:{expression}){END}" for expression in expressions]
  result = subprocess.run(
    [sys.executable, "-I", Path(__file__).with_name("probe.py")],
    input=json.dumps(asked | {"expressions": framed}).encode(),
    capture_output=True,
    check=False,
  )
  found = [json.loads(line) for line in result.stdout.splitlines()]
  for expression, size in zip(expressions, found, strict=False):
    if "error" in size:
      raise _unusable(expression, size["error"])
    if size["states"] > MOST_STATES:
      raise _unusable(expression, f"it has more than {MOST_STATES} states")
    _sizes[expression] = Size(**size)
  if len(found) < len(expressions):
    raise _unusable(
      expressions[len(found)],
      f"its automaton takes more than {MOST_SECONDS} s or {MOST_BYTES >> 20} MiB",
    )


def _unusable(expression: str, why: str) -> ConfigError:
  why = why.splitlines()[-1].removeprefix("error: ") if why else "it is not valid"
  return ConfigError(
    f"the regular expression {reprlib.repr(expression)} cannot be used: {why}",
    "use fewer and smaller counts; it must match the whole answer, in Rust's syntax: "
    "docs.rs/regex",
  )


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
  return tabulate(without_dead_ends(states), tokenizer.vocab_size), initial


def without_dead_ends(states: Sequence[dict[int, int]]) -> list[dict[int, int]]:
  """The states without the tokens after which the end of text cannot come any more.

  Where it may come, the tokens of single bytes could begin to spell `END`, whose last byte
  is none that they may write.
  """
  targets = [{*following.values()} for following in states]
  before: dict[int, list[int]] = {}  # the states from which a state is reached
  for state, reached in enumerate(targets, 1):
    for to in reached:
      before.setdefault(to, []).append(state)
  alive, waiting = {FREE}, [FREE]
  while waiting:
    found = [state for state in before.get(waiting.pop(), []) if state not in alive]
    alive.update(found)
    waiting += found
  return [
    following
    if reached <= alive
    else {token: to for token, to in following.items() if to in alive}
    for following, reached in zip(states, targets, strict=True)
  ]


@functools.lru_cache(maxsize=64)
def build_index(expression: str, tokenizer: AnyTokenizer) -> Any:
  """The library's automaton for the expression followed by `END`, the end of text.

  With `END`, no text that it accepts is the beginning of another. Without, the library
  loses the longer one (version 0.2.14 accepts only 1 for `1(\\.5)?`).
  """
  if tokenizer.eos_id < 0:
    raise ConfigError("a regex or JSON schema needs a tokenizer with an end of text")
  check_expressions([expression])
  # A state that 256 bytes may follow has a transition for each token.
  if _sizes[expression].links / 256 * tokenizer.vocab_size > MOST_LINKS:
    raise _unusable(
      expression, f"with {tokenizer.vocab_size} ids it has more than {MOST_LINKS:,} links"
    )
  try:
    return outlines().Index(f"(?:{expression}){END}", build_vocabulary(tokenizer))
  except ValueError as e:
    raise _unusable(expression, str(e)) from e


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
  except ImportError as e:
    raise ConfigError(
      "a regex or JSON schema needs outlines-core", "pip install 'flaxlm[constraint]'"
    ) from e
  return outlines_core
