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
MOST_KNOWN = 4096  # expressions whose sizes are remembered
END = "\U0010ffff"  # stands for the end of text; no text has this code point


class Automaton(NamedTuple):
  """The next state for each state (X) and kind of token (Y).

  Several expressions share one automaton; each has its own states and kinds of tokens.
  """

  # The kind of each token in each expression (E). Kind 0 is that of padding ids, which are
  # allowed in `FREE` only.
  kinds_EV: Any
  expressions_X: Any  # whose state it is
  next_XY: Any  # the next state, or `NEVER`

  def allowed(self, states_B: jax.Array, num_tokens: int) -> jax.Array:
    """Which of `num_tokens` ids are allowed (B, V)."""
    next_BY = jnp.asarray(self.next_XY)[states_B]
    kinds_BV = self._kinds(num_tokens)[jnp.asarray(self.expressions_X)[states_B]]
    return jnp.take_along_axis(next_BY, kinds_BV, 1) >= 0

  def follow(self, states_B: jax.Array, token_B: jax.Array, num_tokens: int) -> jax.Array:
    """The states after these tokens."""
    expressions_B = jnp.asarray(self.expressions_X)[states_B]
    kinds_B = self._kinds(num_tokens)[expressions_B, token_B]
    return jnp.asarray(self.next_XY)[states_B, kinds_B]

  def _kinds(self, num_tokens: int) -> jax.Array:
    missing = num_tokens - self.kinds_EV.shape[1]
    if missing < 0:
      raise ConfigError(
        f"the tokenizer has {-missing} more ids than the model",
        "decode without a regex or JSON schema",
      )
    return jnp.pad(jnp.asarray(self.kinds_EV), ((0, 0), (0, missing)))


# All rows are free, and its one state is `FREE`.
NO_AUTOMATON = Automaton(
  np.zeros((1, 0), np.int32), np.zeros(1, np.int32), np.full((1, 1), FREE, np.int32)
)


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
    if len(_sizes) >= MOST_KNOWN:  # of a server, which is asked for ever new ones
      _sizes.pop(next(iter(_sizes)))
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


def build_automaton(
  expressions: Sequence[str], tokenizer: AnyTokenizer, least: Sequence[int] = (1, 1, 1)
) -> tuple[Automaton, Sequence[int]]:
  """One automaton for some regular expressions, and the initial state of each.

  Where the text matches, the end of text is allowed, and leads to `FREE`. E, X and Y
  are at least `least`. Raises `ConfigError` for an invalid expression, and for one that no
  tokens can spell.
  """
  parts = [build_part(expression, tokenizer) for expression in expressions]
  num_tokens = tokenizer.vocab_size
  return join([part.automaton for part in parts], num_tokens, least), [
    sum(other.num_states for other in parts[:n]) + part.initial
    for n, part in enumerate(parts)
  ]


class Part(NamedTuple):
  """The automaton of one expression: states 1 to `num_states`, and `FREE`."""

  automaton: Automaton
  initial: int
  num_states: int


@functools.lru_cache(maxsize=256)
def build_part(expression: str, tokenizer: AnyTokenizer) -> Part:
  """The automaton of one expression. Raises `ConfigError` as `build_automaton` does."""
  end, index = tokenizer.eos_id, build_index(expression, tokenizer)
  transitions, final = index.get_transitions(), index.get_final_states()
  unfinished = [state for state in transitions if state not in final]
  number = {state: n for n, state in enumerate(unfinished, 1)}
  number |= dict.fromkeys(final, FREE)
  # Other tokens may contain `END`, but only the end of text leads to a final state.
  states = [
    {t: number[to] for t, to in transitions[state].items() if (to in final) == (t == end)}
    for state in unfinished
  ]
  automaton = tabulate(without_dead_ends(states), tokenizer.vocab_size)
  return Part(automaton, number[index.get_initial_state()], len(states))


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


def join(
  parts: Sequence[Automaton], num_tokens: int, least: Sequence[int] = (1, 1, 1)
) -> Automaton:
  """One automaton of several, whose states follow one another; all share `FREE`.

  Sizes are rounded up to powers of two, so that few programs compile.
  """
  if not parts and max(least) == 1:
    return NO_AUTOMATON
  sizes = (
    len(parts),
    1 + sum(part.next_XY.shape[0] - 1 for part in parts),
    max((part.next_XY.shape[1] for part in parts), default=1),
  )
  E, X, Y = (
    max(low, 1 << (max(1, size) - 1).bit_length())
    for low, size in zip(least, sizes, strict=True)
  )
  kinds_EV, expressions_X = np.zeros((E, num_tokens), np.int32), np.zeros(X, np.int32)
  next_XY = np.full((X, Y), NEVER, np.int32)
  next_XY[FREE] = FREE
  start = 1
  for n, part in enumerate(parts):
    of_part_XY = part.next_XY[1:]
    kinds_EV[n] = part.kinds_EV[0]
    end = start + len(of_part_XY)
    expressions_X[start:end] = n
    moved_XY = np.where(of_part_XY > 0, of_part_XY + start - 1, of_part_XY)
    next_XY[start:end, : moved_XY.shape[1]] = moved_XY
    start = end
  return Automaton(kinds_EV, expressions_X, next_XY)


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
  """The tables of one expression; state 0 is `FREE`."""
  kinds_V = np.zeros(num_tokens, np.int64)
  for following in states:
    next_V = np.full(num_tokens, NEVER, np.int64)
    next_V[[*following.keys()]] = [*following.values()]
    # Tokens stay of one kind if they also lead to the same state from here.
    both_V = kinds_V * (len(states) + 2) + next_V - NEVER
    _, kinds_V = np.unique(both_V, return_inverse=True)
  _, tokens_Y = np.unique(kinds_V, return_index=True)
  next_XY = np.full((1 + len(states), 1 + len(tokens_Y)), NEVER, np.int32)
  next_XY[FREE] = FREE
  for state, following in enumerate(states, 1):
    for kind, token in enumerate(tokens_Y.tolist(), 1):
      next_XY[state, kind] = following.get(token, NEVER)
  kinds_EV = kinds_V.astype(np.int32)[None] + 1
  return Automaton(kinds_EV, np.zeros(1 + len(states), np.int32), next_XY)


def outlines() -> Any:
  try:
    import outlines_core
  except ImportError as e:
    raise ConfigError(
      "a regex or JSON schema needs outlines-core", "pip install 'flaxlm[constraint]'"
    ) from e
  return outlines_core
