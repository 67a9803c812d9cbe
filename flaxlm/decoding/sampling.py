# SPDX-License-Identifier: Apache-2.0
"""Sampling the next token from logits, with settings of its own for each row.

Settings are traced arrays, so changing a value never recompiles. Only the set of rules that
some row uses is compiled in, in the order of `RULES`; unused rules cost nothing. No rule
sorts the vocabulary: a search for the threshold finds what a sort would find.
"""

import dataclasses
import hashlib
import math
import numbers
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.decoding.constraint import FREE, NO_AUTOMATON, Automaton, build_automaton
from flaxlm.errors import ConfigError
from flaxlm.tokenizers import AnyTokenizer

OFF_TOP_K = 2**30
MOST_SAMPLES = 1024  # of one prompt: they are decoded together
LARGEST_BIAS = 1e30  # float32 holds its sum with any logit
BLOCK = 256  # tokens in a block of `draw`
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


class TokenHistory(NamedTuple):
  """What the rules need to know about the tokens of each row so far."""

  in_prompt_BV: jax.Array
  counts_BV: jax.Array  # how often each token was generated
  states_B: jax.Array  # the automaton's states

  def add(self, token_B: jax.Array, sampling: Sampling) -> "TokenHistory":
    """The history after one more generated token of each row."""
    rows_B, states_B = jnp.arange(token_B.shape[0]), self.states_B
    if sampling.automaton.kinds_EV.size:
      num_tokens = self.counts_BV.shape[1]
      states_B = sampling.automaton.follow(states_B, token_B, num_tokens)
    counts_BV = self.counts_BV.at[rows_B, token_B].add(1)
    return self._replace(counts_BV=counts_BV, states_B=states_B)


def history_of_prompts(
  prompts: Sequence[Sequence[int]], states_B: np.ndarray, num_tokens: int
) -> TokenHistory:
  """The history of rows that have drawn nothing yet, of a vocabulary of `num_tokens`.

  There may be more rows than prompts, as a batch is rounded up.
  """
  shape = (len(states_B), num_tokens)
  in_prompt_BV = np.zeros(shape, bool)
  for row, prompt in enumerate(prompts):
    in_prompt_BV[row, [*prompt]] = True
  counts_BV = np.zeros(shape, np.int32)
  return TokenHistory(*map(jax.device_put, (in_prompt_BV, counts_BV, states_B)))


class SampledTokens(NamedTuple):
  """The next tokens (B,), and the X likeliest ones (B, X).

  Log-probabilities are those of the model itself, before any rule.
  """

  token_B: jax.Array
  logprob_B: jax.Array
  top_tokens_BX: jax.Array
  top_logprobs_BX: jax.Array


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


# -- Rules: logits in, logits out; -inf where a token is cut ------------------------------


class Rule(NamedTuple):
  """`used` tells on the host whether some row uses the rule; `apply` is traced."""

  used: Callable[[Sampling], Any]
  apply: Callable[..., jax.Array]  # of the logits, the settings and, if so, the history
  needs_history: bool = False


def add_bias(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
  rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
  return logits_BV.at[rows_B1, sampling.bias_ids_BX].add(sampling.biases_BX)


def penalise_repetition(
  logits_BV: jax.Array, sampling: Sampling, history: TokenHistory
) -> jax.Array:
  """Makes tokens of prompt and answer less likely (Keskar et al., 2019, section 4.1)."""
  penalty_B1 = sampling.repetition_penalty_B[:, None]
  worse_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
  return jnp.where(history.in_prompt_BV | (history.counts_BV > 0), worse_BV, logits_BV)


def penalise_presence(
  logits_BV: jax.Array, sampling: Sampling, history: TokenHistory
) -> jax.Array:
  """Makes tokens of the answer less likely, once or for each time, as in OpenAI's API."""
  logits_BV -= sampling.presence_penalty_B[:, None] * (history.counts_BV > 0)
  return logits_BV - sampling.frequency_penalty_B[:, None] * history.counts_BV


def apply_constraint(
  logits_BV: jax.Array, sampling: Sampling, history: TokenHistory
) -> jax.Array:
  """Keeps the tokens after which the answer can still match its regular expression."""
  allowed_BV = sampling.automaton.allowed(history.states_B, logits_BV.shape[1])
  return keep_only(logits_BV, allowed_BV)


def apply_temperature(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
  logits_BV = logits_BV - logits_BV.max(-1, keepdims=True)  # no overflow if it is tiny
  temperature_B = jnp.where(is_greedy(sampling), 1.0, sampling.temperature_B)
  return logits_BV / temperature_B[:, None]


def is_greedy(sampling: Sampling) -> Any:
  """The rows (B,) that take the likeliest token and draw nothing."""
  return sampling.temperature_B < np.finfo(np.float32).tiny


def cut_top_k(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
  """Keeps the k likeliest tokens (Fan et al., 2018), and those as likely as the k-th."""
  ones_BV = jnp.isfinite(logits_BV).astype(jnp.float32)
  k_B = sampling.top_k_B.astype(jnp.float32)
  return keep_only(logits_BV, is_within_budget(logits_BV, ones_BV, k_B))


def cut_top_p(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
  """Keeps the likeliest tokens, as many as have the mass top_p (Holtzman et al., 2020)."""
  probs_BV, budget_B = jax.nn.softmax(logits_BV, -1), mass_budget(sampling.top_p_B)
  return keep_only(logits_BV, is_within_budget(logits_BV, probs_BV, budget_B))


def cut_min_p(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
  """Keeps tokens at least min_p times as likely as the likeliest (Nguyen et al., 2024)."""
  below_BV = logits_BV - logits_BV.max(-1, keepdims=True)
  return keep_only(logits_BV, below_BV >= jnp.log(sampling.min_p_B)[:, None])


def cut_typical(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
  """As top-p, but keeps the tokens whose surprise, -log p, is nearest to its mean, the
  entropy (Meister et al., 2023)."""
  logp_BV = jax.nn.log_softmax(logits_BV, -1)
  terms_BV = jnp.where(logp_BV > -INF, jnp.exp(logp_BV) * logp_BV, 0)
  entropy_B1 = -terms_BV.sum(-1, keepdims=True)
  nearness_BV = -jnp.abs(logp_BV + entropy_B1)
  probs_BV, budget_B = jax.nn.softmax(logits_BV, -1), mass_budget(sampling.typical_p_B)
  return keep_only(logits_BV, is_within_budget(nearness_BV, probs_BV, budget_B))


def keep_only(logits_BV: jax.Array, kept_BV: jax.Array) -> jax.Array:
  return jnp.where(kept_BV, logits_BV, -INF)


def mass_budget(share_B: jax.Array) -> jax.Array:
  """The probability that may be kept: no limit where the share is 1, because sums of
  probabilities round up to 1 long before the last token."""
  return jnp.where(share_B >= 1, INF, share_B)


def is_within_budget(
  keys_BV: jax.Array, weights_BV: jax.Array, budget_B: jax.Array
) -> jax.Array:
  """True for each token if all tokens with a larger key weigh less than the budget.

  Tokens with equal keys get the same answer. The smallest such key is found by bisecting
  its bits: 32 sums over the vocabulary, a tenth of the time of a sort on a CPU.
  """
  bits_BV = jax.lax.bitcast_convert_type(keys_BV, jnp.int32)
  # As integers these are ordered as the floats are.
  order_BV = jnp.where(bits_BV < 0, bits_BV ^ 0x7FFFFFFF, bits_BV)

  def halve(_: jax.Array, ends: tuple[jax.Array, jax.Array]) -> tuple:
    low_B, high_B = ends
    middle_B = (low_B & high_B) + ((low_B ^ high_B) >> 1)  # their mean, without overflow
    larger_BV = jnp.where(order_BV > middle_B[:, None], weights_BV, 0)
    fits_B = larger_BV.sum(-1) < budget_B
    return jnp.where(fits_B, low_B, middle_B + 1), jnp.where(fits_B, middle_B, high_B)

  whole = jnp.iinfo(jnp.int32)
  ends = tuple(jnp.full_like(order_BV[:, 0], end) for end in (whole.min, whole.max))
  _, threshold_B = jax.lax.fori_loop(0, 32, halve, ends)
  return order_BV >= threshold_B[:, None]


RULES: dict[str, Rule] = {
  "bias": Rule(lambda s: s.biases_BX != 0, add_bias),
  "repetition": Rule(lambda s: s.repetition_penalty_B != 1, penalise_repetition, True),
  "presence": Rule(
    lambda s: (s.presence_penalty_B != 0) | (s.frequency_penalty_B != 0),
    penalise_presence,
    True,
  ),
  "constraint": Rule(lambda s: s.states_B > 0, apply_constraint, True),
  "temperature": Rule(lambda s: ~is_greedy(s), apply_temperature),
  "top_k": Rule(lambda s: s.top_k_B < OFF_TOP_K, cut_top_k),
  "top_p": Rule(lambda s: s.top_p_B < 1, cut_top_p),
  "min_p": Rule(lambda s: s.min_p_B > 0, cut_min_p),
  "typical": Rule(lambda s: s.typical_p_B < 1, cut_typical),
}
HISTORY_RULES = {name for name, rule in RULES.items() if rule.needs_history}
GREEDY_RULES = tuple(RULES)[: tuple(RULES).index("temperature")]


def rules_in_use(sampling: Sampling) -> tuple[str, ...]:
  """The names of the rules that some row uses; they are compiled in.

  If no row draws, the rules from the temperature on change nothing, and are left out.
  """
  used = tuple(name for name, rule in RULES.items() if np.any(rule.used(sampling)))
  return used if "temperature" in used else tuple(n for n in used if n in GREEDY_RULES)


def apply_rules(
  names: Sequence[str],
  logits_BV: jax.Array,
  sampling: Sampling,
  history: TokenHistory | None = None,
) -> jax.Array:
  """The logits (B, V) after these rules, one by one."""
  for name in names:
    needed = [history] if RULES[name].needs_history else []
    logits_BV = RULES[name].apply(logits_BV, sampling, *needed)
  return logits_BV


def sample(
  logits_BV: jax.Array,
  lengths_B: jax.Array,
  sampling: Sampling,
  rules: tuple[str, ...] = (),
  history: TokenHistory | None = None,
  num_top: int = 0,
) -> SampledTokens:
  """Each row's next token, by its own settings, and the `num_top` likeliest ones.

  A row's draw depends on its logits, key and length so far: on no other row.
  """
  logits_BV = logits_BV.astype(jnp.float32)
  token_B = next_token(logits_BV, lengths_B, sampling, rules, history)
  return SampledTokens(token_B, *logprobs_of(logits_BV, token_B, num_top))


def next_token(
  logits_BV: jax.Array,
  lengths_B: jax.Array,
  sampling: Sampling,
  rules: tuple[str, ...],
  history: TokenHistory | None,
) -> jax.Array:
  sampling = jax.tree.map(jnp.asarray, sampling)
  greedy_rules = [name for name in rules if name in GREEDY_RULES]
  logits_BV = apply_rules(greedy_rules, logits_BV, sampling, history)
  token_B = first_highest(logits_BV).astype(jnp.int32)
  if "temperature" in rules:
    logits_BV = apply_rules(rules[len(greedy_rules) :], logits_BV, sampling, history)
    drawn_B = draw(jnp.exp(logits_BV), uniforms(sampling.keys_B2, lengths_B))
    token_B = jnp.where(is_greedy(sampling), token_B, drawn_B).astype(jnp.int32)
  return token_B


def logprobs_of(
  logits_BV: jax.Array, token_B: jax.Array, num_top: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Log-probabilities of tokens; the likeliest ones (B, X), and theirs."""
  total_B = jax.nn.logsumexp(logits_BV, -1)
  chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], -1)[:, 0]
  top_BX, top_tokens_BX = jax.lax.top_k(logits_BV, num_top)
  return chosen_B - total_B, top_tokens_BX, top_BX - total_B[:, None]


def uniforms(keys_B2: jax.Array, lengths_B: jax.Array) -> jax.Array:
  """Two random numbers for each row, (B, 2)."""

  def of_row(words_2: jax.Array, length: jax.Array) -> jax.Array:
    key = jax.random.wrap_key_data(words_2, impl="threefry2x32")
    return jax.random.uniform(jax.random.fold_in(key, length), (2,))

  return jax.vmap(of_row)(keys_B2, lengths_B)


def first_highest(logits_BV: jax.Array) -> jax.Array:
  """`argmax` in two passes that XLA vectorises: a quarter of the time on a CPU."""
  highest_BV = logits_BV == logits_BV.max(-1, keepdims=True)
  return jnp.where(highest_BV, jnp.arange(logits_BV.shape[-1]), OFF_TOP_K).min(-1)


def draw(weights_BV: jax.Array, uniforms_B2: jax.Array) -> jax.Array:
  """Token ids (B,), drawn in proportion to their weights by inverting the distribution.

  First a block of tokens is drawn, then a token in it: sums stay short, and steps are finer
  than the 24 bits of one float32. Gumbel noise would need V random numbers instead of two.
  """
  B, V = weights_BV.shape
  padded_BV = jnp.pad(weights_BV, ((0, 0), (0, -V % BLOCK)))
  blocks_BXW = padded_BV.reshape(B, -1, BLOCK)
  block_B = inverse_cdf(blocks_BXW.sum(-1), uniforms_B2[:, 0])
  inside_BW = jnp.take_along_axis(blocks_BXW, block_B[:, None, None], 1)[:, 0]
  return block_B * BLOCK + inverse_cdf(inside_BW, uniforms_B2[:, 1])


def inverse_cdf(weights_BX: jax.Array, uniforms_B: jax.Array) -> jax.Array:
  """The first index at which the running sum exceeds the uniform's share of the total."""
  # Indices without weight are left out: rounding could let the running sum fall there.
  sums_BX = jnp.where(weights_BX > 0, jnp.cumsum(weights_BX, -1), 0)
  target_B = uniforms_B * sums_BX.max(-1)
  return jnp.argmax(sums_BX > target_B[:, None], -1)
