# SPDX-License-Identifier: Apache-2.0
"""Choosing the next token from logits, each row by its own settings.

Settings are arrays, so changing a value never recompiles. What compiles is the set of
rules that some row uses, in the order of `RULES`; rules that nobody uses cost nothing.
No rule sorts the vocabulary: what sorting would find, a search over thresholds does.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.decoding.constraint import FREE, NO_AUTOMATON, Automaton, build_automaton
from flaxlm.errors import ConfigError
from flaxlm.tokenizers import AnyTokenizer

OFF_TOP_K = 2**30
BLOCK = 256  # tokens that `draw` chooses among at a time
INF = float("inf")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """One row's settings, each of which does nothing by default but for the temperature."""

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
  regex: str | None = None  # of the whole answer
  seed: int = 0

  def check(self) -> None:
    """Raises `ConfigError` for values out of range."""
    fraction = (0, 1, "it is from 0 to 1, or left out")
    share = (math.ulp(0), 1, "it is above 0 and at most 1, or left out")
    for name, low, high, cure in (
      ("temperature", 0, 1e38, "0 is greedy, 1 the model's own"),
      ("top_k", 1, INF, "it is at least 1, or left out"),
      ("top_p", *share),
      ("min_p", *fraction),
      ("typical_p", *share),
      ("repetition_penalty", 1e-3, 1e3, "1 is none, 1.1 a usual one"),
      ("presence_penalty", -100, 100, "0 is none"),
      ("frequency_penalty", -100, 100, "0 is none"),
      ("seed", 0, 2**31 - 1, "it is from 0 to 2147483647"),
    ):
      value = getattr(self, name)
      if value is not None and not low <= value <= high:
        raise ConfigError(f"{name.replace('_', '-')} is {value}", cure)
    for token, bias in self.biases.items():
      if token < 0 or math.isnan(bias) or bias == INF:
        raise ConfigError(f"logit-bias of token {token} is {bias}", "as in 50256=-5")
    if self.regex is not None and not isinstance(self.regex, str):
      raise ConfigError(f"regex is {self.regex!r}", "it is a text")
    if self.regex is not None and -INF in self.biases.values():
      raise ConfigError(
        "banned tokens may leave a regex no way on", "leave one of them out"
      )

  def samples(self, count: int) -> "list[Settings]":
    """The settings of so many samples: sample n draws with `seed + n`."""
    self.check()
    return [dataclasses.replace(self, seed=(self.seed + n) % 2**31) for n in range(count)]

  @property
  def biases(self) -> dict[int, float]:
    return {**self.logit_bias, **dict.fromkeys(self.banned_tokens, -INF)}


class Sampling(NamedTuple):
  """Each row's settings as arrays; build with `make_sampling` or `stack_settings`."""

  temperature_B: Any
  top_k_B: Any  # OFF_TOP_K: off
  top_p_B: Any  # 1: off, as typical_p
  min_p_B: Any
  typical_p_B: Any
  repetition_penalty_B: Any
  presence_penalty_B: Any
  frequency_penalty_B: Any
  bias_ids_BX: Any  # X tokens whose logits change by so much; unused ones by 0
  biases_BX: Any
  seeds_B: Any  # all the randomness that a row has
  states_B: Any  # of the automaton, at first; 0: free
  automaton: Automaton  # of all rows

  def each_row(self, change: Callable[[Any], Any]) -> "Sampling":
    """Changes every array that has a B."""
    return Sampling(*map(change, self[:-1]), automaton=self.automaton)  # type: ignore[misc]


class Seen(NamedTuple):
  """What the tokens of each row so far come to, for the rules that ask."""

  in_prompt_BV: jax.Array
  counts_BV: jax.Array  # of what was generated
  states_B: jax.Array  # of the automaton

  def add(self, token_B: jax.Array, sampling: Sampling) -> "Seen":
    rows_B, states_B = jnp.arange(token_B.shape[0]), self.states_B
    if sampling.automaton.kinds_V.size:
      num_tokens = self.counts_BV.shape[1]
      states_B = sampling.automaton.follow(states_B, token_B, num_tokens)
    counts_BV = self.counts_BV.at[rows_B, token_B].add(1)
    return self._replace(counts_BV=counts_BV, states_B=states_B)


class Drawn(NamedTuple):
  """Next tokens (B,), their log-probabilities under the model itself, and its best ones."""

  token_B: jax.Array
  logprob_B: jax.Array
  top_tokens_BX: jax.Array
  top_logprobs_BX: jax.Array


def make_sampling(batch: int, temperature: float = 1.0, **settings: Any) -> Sampling:
  """The same settings for every row, row i with `seed + i`.

  Keywords are the fields of `Settings`. Raises `ConfigError` for values out of range.
  """
  return stack_settings(Settings(temperature=temperature, **settings).samples(batch))


def stack_settings(
  rows: Sequence[Settings], tokenizer: AnyTokenizer | None = None
) -> Sampling:
  """Rows with settings of their own; `tokenizer` is for those with a regex.

  Raises `ConfigError` for values out of range.
  """
  for row in rows:
    row.check()
  expressions = tuple(sorted({row.regex for row in rows if row.regex is not None}))
  automaton, states = NO_AUTOMATON, {}
  if expressions:
    if tokenizer is None:
      raise ConfigError("a regex is of text: it needs the tokenizer")
    automaton, initial = build_automaton(expressions, tokenizer)
    states = dict(zip(expressions, initial, strict=True))

  def column(name: str, off: float = 1.0, dtype: Any = np.float32) -> np.ndarray:
    values = [getattr(row, name) for row in rows]
    return np.array([off if value is None else value for value in values], dtype)

  longest = max((len(row.biases) for row in rows), default=0)
  width = 1 << (longest - 1).bit_length() if longest else 0  # few shapes: few programs
  ids_BX = np.zeros((len(rows), width), np.int32)
  biases_BX = np.zeros((len(rows), width), np.float32)
  for number, row in enumerate(rows):
    for at, (token, bias) in enumerate(row.biases.items()):
      ids_BX[number, at], biases_BX[number, at] = token, bias
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
    seeds_B=column("seed", dtype=np.uint32),
    states_B=np.array(
      [FREE if row.regex is None else states[row.regex] for row in rows], np.int32
    ),
    automaton=automaton,
  )


# -- Rules: logits in, logits out, cut ones at -inf ----------------------------------------


class Rule(NamedTuple):
  """`used` looks at the settings on the host, `apply` is traced."""

  used: Callable[[Sampling], Any]
  apply: Callable[[jax.Array, Sampling, Seen | None], jax.Array]


def add_bias(logits_BV: jax.Array, sampling: Sampling, _: Seen | None) -> jax.Array:
  rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
  return logits_BV.at[rows_B1, sampling.bias_ids_BX].add(sampling.biases_BX)


def penalise_repetition(
  logits_BV: jax.Array, sampling: Sampling, seen: Seen | None
) -> jax.Array:
  """Tokens of the prompt and the answer so far (Keskar et al., 2019, section 4.1)."""
  assert seen is not None
  penalty_B1 = sampling.repetition_penalty_B[:, None]
  worse_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
  return jnp.where(seen.in_prompt_BV | (seen.counts_BV > 0), worse_BV, logits_BV)


def penalise_presence(
  logits_BV: jax.Array, sampling: Sampling, seen: Seen | None
) -> jax.Array:
  """Tokens of the answer so far, once and for each time, as OpenAI's interface has it."""
  assert seen is not None
  logits_BV -= sampling.presence_penalty_B[:, None] * (seen.counts_BV > 0)
  return logits_BV - sampling.frequency_penalty_B[:, None] * seen.counts_BV


def keep_to_form(logits_BV: jax.Array, sampling: Sampling, seen: Seen | None) -> jax.Array:
  """Only tokens with which the answer can still become what was asked for."""
  assert seen is not None
  allowed_BV = sampling.automaton.allowed(seen.states_B, logits_BV.shape[1])
  return keep(logits_BV, allowed_BV)


def apply_temperature(
  logits_BV: jax.Array, sampling: Sampling, _: Seen | None
) -> jax.Array:
  logits_BV = logits_BV - logits_BV.max(-1, keepdims=True)  # a tiny temperature: no inf
  temperature_B = jnp.where(cold(sampling), 1.0, sampling.temperature_B)
  return logits_BV / temperature_B[:, None]


def cold(sampling: Sampling) -> Any:
  """Rows (B,) that take the likeliest token, and draw nothing."""
  return sampling.temperature_B < np.finfo(np.float32).tiny


def cut_top_k(logits_BV: jax.Array, sampling: Sampling, _: Seen | None) -> jax.Array:
  """Fan et al. (2018); tokens as likely as the k-th stay."""
  ones_BV = jnp.isfinite(logits_BV).astype(jnp.float32)
  budget_B = sampling.top_k_B.astype(jnp.float32)
  return keep(logits_BV, foremost(logits_BV, ones_BV, budget_B))


def cut_top_p(logits_BV: jax.Array, sampling: Sampling, _: Seen | None) -> jax.Array:
  """Holtzman et al. (2020): until likelier tokens have the mass top_p."""
  return keep(logits_BV, foremost(logits_BV, *mass(logits_BV, sampling.top_p_B)))


def cut_min_p(logits_BV: jax.Array, sampling: Sampling, _: Seen | None) -> jax.Array:
  """Nguyen et al. (2024): a share of the likeliest token's probability."""
  below_BV = logits_BV - logits_BV.max(-1, keepdims=True)
  return keep(logits_BV, below_BV >= jnp.log(sampling.min_p_B)[:, None])


def cut_typical(logits_BV: jax.Array, sampling: Sampling, _: Seen | None) -> jax.Array:
  """Meister et al. (2023): top-p, but for those whose surprise is nearest the entropy."""
  logp_BV = jax.nn.log_softmax(logits_BV, -1)
  entropy_B1 = -jnp.where(logp_BV > -INF, jnp.exp(logp_BV) * logp_BV, 0).sum(
    -1, keepdims=True
  )
  nearness_BV = -jnp.abs(logp_BV + entropy_B1)
  return keep(logits_BV, foremost(nearness_BV, *mass(logits_BV, sampling.typical_p_B)))


def keep(logits_BV: jax.Array, kept_BV: jax.Array) -> jax.Array:
  return jnp.where(kept_BV, logits_BV, -INF)


def mass(logits_BV: jax.Array, share_B: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Probabilities, and the budget for them: without end when the share is 1, as sums of
  probabilities round up to 1 long before the last token."""
  budget_B = jnp.where(share_B >= 1, INF, share_B)
  return jax.nn.softmax(logits_BV, -1), budget_B


def foremost(keys_BV: jax.Array, weights_BV: jax.Array, budget_B: jax.Array) -> jax.Array:
  """The tokens whose betters, by key, weigh less than the budget; equals stay together.

  Bisects the key's bits: 32 sums over the vocabulary, where a sort of it takes ten times
  as long on a CPU.
  """
  bits_BV = jax.lax.bitcast_convert_type(keys_BV, jnp.int32)
  order_BV = jnp.where(bits_BV < 0, bits_BV ^ 0x7FFFFFFF, bits_BV)  # as the floats'

  def halve(_: jax.Array, ends: tuple[jax.Array, jax.Array]) -> tuple:
    low_B, high_B = ends
    middle_B = (low_B & high_B) + ((low_B ^ high_B) >> 1)  # their mean, without overflow
    betters_BV = jnp.where(order_BV > middle_B[:, None], weights_BV, 0)
    fits_B = betters_BV.sum(-1) < budget_B
    return jnp.where(fits_B, low_B, middle_B + 1), jnp.where(fits_B, middle_B, high_B)

  whole = jnp.iinfo(jnp.int32)
  ends = (
    jnp.full_like(order_BV[:, 0], whole.min),
    jnp.full_like(order_BV[:, 0], whole.max),
  )
  _, threshold_B = jax.lax.fori_loop(0, 32, halve, ends)
  return order_BV >= threshold_B[:, None]


RULES: dict[str, Rule] = {
  "bias": Rule(lambda s: s.biases_BX.size, add_bias),
  "repetition": Rule(lambda s: s.repetition_penalty_B != 1, penalise_repetition),
  "presence": Rule(
    lambda s: (s.presence_penalty_B != 0) | (s.frequency_penalty_B != 0), penalise_presence
  ),
  "form": Rule(lambda s: s.states_B > 0, keep_to_form),
  "temperature": Rule(lambda s: ~cold(s), apply_temperature),
  "top_k": Rule(lambda s: s.top_k_B < OFF_TOP_K, cut_top_k),
  "top_p": Rule(lambda s: s.top_p_B < 1, cut_top_p),
  "min_p": Rule(lambda s: s.min_p_B > 0, cut_min_p),
  "typical": Rule(lambda s: s.typical_p_B < 1, cut_typical),
}
ASK_WHAT_WAS_SEEN = {"repetition", "presence", "form"}
GREEDY_RULES = tuple(RULES)[: tuple(RULES).index("temperature")]


def rules_in_use(sampling: Sampling) -> tuple[str, ...]:
  """The names of the rules that some row uses: static, as they decide what compiles.

  Where no row draws, what follows the temperature changes nothing.
  """
  used = tuple(name for name, rule in RULES.items() if np.any(rule.used(sampling)))
  return used if "temperature" in used else tuple(n for n in used if n in GREEDY_RULES)


def sample(
  logits_BV: jax.Array,
  lengths_B: jax.Array,
  sampling: Sampling,
  rules: tuple[str, ...] = (),
  seen: Seen | None = None,
  num_top: int = 0,
) -> Drawn:
  """Each row's next token, by its settings.

  A row's draw depends on its seed and its length so far: on nothing else in the batch.
  Log-probabilities are the model's own, before any rule.
  """
  own_BV = logits_BV = logits_BV.astype(jnp.float32)
  sampling = jax.tree.map(jnp.asarray, sampling)
  for name in rules:
    if name in GREEDY_RULES:
      logits_BV = RULES[name].apply(logits_BV, sampling, seen)
  token_B = first_highest(logits_BV)
  if "temperature" in rules:
    for name in rules:
      if name not in GREEDY_RULES:
        logits_BV = RULES[name].apply(logits_BV, sampling, seen)
    drawn_B = draw(jnp.exp(logits_BV), uniforms(sampling.seeds_B, lengths_B))
    token_B = jnp.where(cold(sampling), token_B, drawn_B).astype(jnp.int32)
  total_B = jax.nn.logsumexp(own_BV, -1)
  chosen_B = jnp.take_along_axis(own_BV, token_B[:, None], -1)[:, 0]
  top_BX, top_tokens_BX = jax.lax.top_k(own_BV, num_top)
  return Drawn(token_B, chosen_B - total_B, top_tokens_BX, top_BX - total_B[:, None])


def uniforms(seeds_B: jax.Array, lengths_B: jax.Array) -> jax.Array:
  """Two random numbers (B, 2) of each row's own."""

  def of_row(seed: jax.Array, length: jax.Array) -> jax.Array:
    return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), length), (2,))

  return jax.vmap(of_row)(seeds_B, lengths_B)


def first_highest(logits_BV: jax.Array) -> jax.Array:
  """`argmax`, as two passes that XLA vectorises: a quarter of the time on a CPU."""
  highest_BV = logits_BV == logits_BV.max(-1, keepdims=True)
  return jnp.where(highest_BV, jnp.arange(logits_BV.shape[-1]), OFF_TOP_K).min(-1)


def draw(weights_BV: jax.Array, uniforms_B2: jax.Array) -> jax.Array:
  """Token ids (B,), each as likely as its weight says: the distribution, inverted.

  Twice, for a block of tokens and for one in it: short sums, and finer steps than the 24
  bits of one float32. Gumbel noise would need V random numbers for these two.
  """
  B, V = weights_BV.shape
  padded_BV = jnp.pad(weights_BV, ((0, 0), (0, -V % BLOCK)))
  blocks_BXW = padded_BV.reshape(B, -1, BLOCK)
  block_B = invert(blocks_BXW.sum(-1), uniforms_B2[:, 0])
  inside_BW = jnp.take_along_axis(blocks_BXW, block_B[:, None, None], 1)[:, 0]
  return block_B * BLOCK + invert(inside_BW, uniforms_B2[:, 1])


def invert(weights_BX: jax.Array, uniforms_B: jax.Array) -> jax.Array:
  """The first index at which the running sum passes the uniform's share of the whole."""
  # A prefix sum may round below the one before it: only what has weight is looked at.
  sums_BX = jnp.where(weights_BX > 0, jnp.cumsum(weights_BX, -1), 0)
  target_B = uniforms_B * sums_BX.max(-1)
  return jnp.argmax(sums_BX > target_B[:, None], -1)
