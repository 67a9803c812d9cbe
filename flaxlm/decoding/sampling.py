# SPDX-License-Identifier: Apache-2.0
"""How the next token is sampled: settings of its own for each row, and as arrays of all.

The arrays are traced, so changing a value never recompiles. `drawing` reads them.
"""

import dataclasses
import hashlib
import math
import numbers
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from flaxlm.decoding.constraint import FREE, NO_AUTOMATON, Automaton, build_automaton
from flaxlm.errors import ConfigError
from flaxlm.tokenizers import AnyTokenizer

OFF_TOP_K = 2**30
MOST_SAMPLES = 1024  # of one prompt: they are decoded together
LARGEST_BIAS = 1e30  # float32 holds its sum with any logit
INF = float("inf")
WHOLE = {"top_k", "seed"}  # settings that are whole numbers
NO_RULE = {"top_k", "top_p", "min_p", "typical_p"}  # of which None is none


def is_number(value: Any, whole: bool = False) -> bool:
  """Whether it is a number, of Python's or numpy's; True and False are none."""
  kind = numbers.Integral if whole else numbers.Real
  return isinstance(value, kind) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingSettings:
  """The sampling settings of one row. By default only the temperature does anything."""

  temperature: float = 1.0  # 0: greedy
  top_k: int | None = None
  top_p: float | None = None
  min_p: float | None = None
  typical_p: float | None = None
  repetition_penalty: float = 1.0
  presence_penalty: float = 0.0
  frequency_penalty: float = 0.0
  logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
  banned_tokens: Sequence[int] = ()
  regex: str | None = None  # the whole answer matches it
  seed: int = 0
  # Which of the draws of one seed this is: see `draw_key`.
  row: int = 0
  sample: int = 0

  def __post_init__(self) -> None:
    # It is read more than once, and an iterator has nothing left after the first time.
    if isinstance(self.banned_tokens, Iterable):
      object.__setattr__(self, "banned_tokens", tuple(self.banned_tokens))

  def check(self) -> None:
    """Raises `ConfigError` for values of another type or out of range."""
    above_0 = math.ulp(0)
    for name, low, high, cure in (
      ("temperature", 0, 1e38, "0 is greedy, 1 the model's own distribution"),
      ("top_k", 1, INF, "use at least 1, or leave it out"),
      ("top_p", above_0, 1, "use a value above 0, at most 1, or leave it out"),
      ("min_p", 0, 1, "use 0 to 1, or leave it out"),
      ("typical_p", above_0, 1, "use a value above 0, at most 1, or leave it out"),
      ("repetition_penalty", 1e-3, 1e3, "1 is no penalty, 1.1 a usual one"),
      ("presence_penalty", -100, 100, "use -100 to 100; 0 is no penalty"),
      ("frequency_penalty", -100, 100, "use -100 to 100; 0 is no penalty"),
      ("seed", 0, 2**31 - 1, "use 0 to 2147483647"),
    ):
      value = getattr(self, name)
      if value is None and name in NO_RULE:
        continue
      if not is_number(value, whole=name in WHOLE) or not low <= value <= high:
        raise ConfigError(f"{name.replace('_', '-')} is {reprlib.repr(value)}", cure)
    self._check_ids()
    if self.regex is not None and not isinstance(self.regex, str):
      raise ConfigError(f"regex is {reprlib.repr(self.regex)}", "use a string")
    if self.regex is not None and -INF in self.biases.values():
      raise ConfigError(
        "with banned tokens, an answer may be unable to match the regex",
        "use banned tokens or a regex, not both",
      )

  def _check_ids(self) -> None:
    if not isinstance(self.logit_bias, Mapping):
      raise ConfigError(f"logit-bias is {reprlib.repr(self.logit_bias)}", "as in 50256=-5")
    if not isinstance(self.banned_tokens, Iterable):
      banned = reprlib.repr(self.banned_tokens)
      raise ConfigError(f"banned-tokens are {banned}", "use a list of ids")
    for token in (*self.logit_bias, *self.banned_tokens):
      if not is_number(token, whole=True) or not 0 <= token < OFF_TOP_K:
        raise ConfigError(
          f"there is no token id {reprlib.repr(token)}", "use an id of the vocabulary"
        )
    for token, bias in self.logit_bias.items():
      if not is_number(bias) or not (abs(bias) <= LARGEST_BIAS or bias == -INF):
        raise ConfigError(
          f"logit-bias of token {token} is {reprlib.repr(bias)}", "as in 50256=-5"
        )

  def for_samples(self, count: int) -> "list[SamplingSettings]":
    """The settings of `count` samples of one prompt, each with draws of its own.

    Raises `ConfigError` for values out of range, and for more than `MOST_SAMPLES`.
    """
    self.check()
    if not 1 <= count <= MOST_SAMPLES:
      raise ConfigError(f"num-samples is {count}", f"it can be 1 to {MOST_SAMPLES}")
    return [dataclasses.replace(self, sample=n) for n in range(count)]

  @property
  def biases(self) -> dict[int, float]:
    return {**self.logit_bias, **dict.fromkeys(self.banned_tokens, -INF)}


GREEDY = SamplingSettings(temperature=0.0)


def draw_key(seed: int, row: int = 0, sample: int = 0) -> tuple[int, int]:
  """The Threefry key (two 32-bit words) of all draws of one sample of one prompt.

  `row` is the prompt's place in its batch or file, `sample` counts its answers. The first
  sample of the first prompt has (0, seed), the key that JAX makes of a seed. All others
  have a hash of the three numbers whose first word is not 0: no row's samples are those of
  another row or of another seed, as they would be with seed + row + sample.
  """
  if row == sample == 0:
    return 0, seed
  digest = hashlib.blake2b(f"{seed},{row},{sample}".encode(), digest_size=8).digest()
  return int.from_bytes(digest[:4]) | 1 << 31, int.from_bytes(digest[4:])


class Sampling(NamedTuple):
  """The settings of all rows as arrays; see `make_sampling` and `stack_settings`."""

  temperature_B: Any
  top_k_B: Any  # OFF_TOP_K: off
  top_p_B: Any  # 1: off; so is typical_p
  min_p_B: Any
  typical_p_B: Any
  repetition_penalty_B: Any
  presence_penalty_B: Any
  frequency_penalty_B: Any
  bias_ids_BX: Any  # X tokens whose logits are changed
  biases_BX: Any  # by how much; 0 where a row has fewer of them
  keys_B2: Any  # a row's only source of randomness: see `draw_key`
  states_B: Any  # the automaton's initial states; 0: unconstrained
  automaton: Automaton  # shared by all rows

  def map_rows(self, change: Callable[[Any], Any]) -> "Sampling":
    """Applies `change` to every array with a dimension B."""
    return Sampling(*map(change, self[:-1]), automaton=self.automaton)  # type: ignore[misc]


def same_settings(
  count: int, temperature: float = 1.0, **settings: Any
) -> list[SamplingSettings]:
  """The same settings for so many prompts, each with draws of its own.

  Keywords are the fields of `SamplingSettings`.
  """
  same = SamplingSettings(temperature=temperature, **settings)
  return [dataclasses.replace(same, row=i) for i in range(count)]


def make_sampling(batch: int, temperature: float = 1.0, **settings: Any) -> Sampling:
  """The arrays of `same_settings`. Raises `ConfigError` for a bad value."""
  return stack_settings(same_settings(batch, temperature, **settings))


def stack_settings(
  rows: Sequence[SamplingSettings], tokenizer: AnyTokenizer | None = None
) -> Sampling:
  """Each row's own settings; rows with a regex need the `tokenizer`.

  Raises `ConfigError` for values out of range.
  """
  for row in rows:
    row.check()
  expressions = tuple(sorted({row.regex for row in rows if row.regex is not None}))
  automaton = NO_AUTOMATON
  states: dict[str | None, int] = {None: FREE}
  if expressions:
    if tokenizer is None:
      raise ConfigError("a regex needs the tokenizer")
    automaton, initial = build_automaton(expressions, tokenizer)
    states |= dict(zip(expressions, initial, strict=True))
  return stack_rows(rows, automaton, states)


def stack_rows(
  rows: Sequence[SamplingSettings],
  automaton: Automaton,
  states: Mapping[str | None, int],
  least_biases: int = 0,
) -> Sampling:
  """`stack_settings` for an automaton that is known, with the initial state of each regex.

  There is room for `least_biases` of each row.
  """

  def column(name: str, off: float = 1.0, dtype: Any = np.float32) -> np.ndarray:
    values = [getattr(row, name) for row in rows]
    return np.array([off if value is None else value for value in values], dtype)

  longest = max((len(row.biases) for row in rows), default=0)
  longest = max(longest, least_biases)
  # A power of two, so that few programs compile.
  width = 1 << (longest - 1).bit_length() if longest else 0
  ids_BX = np.zeros((len(rows), width), np.int32)
  biases_BX = np.zeros((len(rows), width), np.float32)
  for number, row in enumerate(rows):
    for at, (token, bias) in enumerate(row.biases.items()):
      ids_BX[number, at], biases_BX[number, at] = token, bias
  keys = [draw_key(row.seed, row.row, row.sample) for row in rows]
  top_ks = [min(row.top_k or OFF_TOP_K, OFF_TOP_K) for row in rows]
  return Sampling(
    temperature_B=column("temperature"),
    top_k_B=np.array(top_ks, np.int32),
    top_p_B=column("top_p"),
    min_p_B=column("min_p", 0.0),
    typical_p_B=column("typical_p"),
    repetition_penalty_B=column("repetition_penalty"),
    presence_penalty_B=column("presence_penalty"),
    frequency_penalty_B=column("frequency_penalty"),
    bias_ids_BX=ids_BX,
    biases_BX=biases_BX,
    keys_B2=np.array(keys, np.uint32).reshape(-1, 2),
    states_B=np.array([states[row.regex] for row in rows], np.int32),
    automaton=automaton,
  )


def check_count_of(settings: Any, num_rows: int) -> None:
  """Raises `ConfigError` unless there are as many settings as prompts."""
  if len(settings) != num_rows:
    raise ConfigError(
      f"there are sampling settings for {len(settings)} rows, and {num_rows} prompts",
      "give as many: same_settings(len(prompts))",
    )


def check_rows(sampling: Sampling, num_rows: int, num_ids: int) -> None:
  """Raises `ConfigError` unless there are settings for each of `num_rows` prompts, which
  name only ids below `num_ids` and leave at least one of them to be drawn."""
  check_count_of(sampling.temperature_B, num_rows)
  outside_BX = (sampling.bias_ids_BX >= num_ids) & (sampling.biases_BX != 0)
  if outside_BX.any():
    token = int(sampling.bias_ids_BX[outside_BX][0])
    raise ConfigError(
      f"token id {token} of a bias or a ban is not in the vocabulary",
      f"ids are 0 to {num_ids - 1}",
    )
  if ((sampling.biases_BX == -INF).sum(1) >= num_ids).any():
    raise ConfigError("every token is banned", "leave at least one to be drawn")
