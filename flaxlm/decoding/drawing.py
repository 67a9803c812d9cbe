# SPDX-License-Identifier: Apache-2.0
"""Drawing the next token from logits, by each row's own settings: rules, then a draw.

Only the set of rules that some row uses is compiled in, in the order of `RULES`; unused
rules cost nothing. No rule sorts the vocabulary: a search for the threshold finds what a
sort would find.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.decoding.sampling import INF, OFF_TOP_K, Sampling

BLOCK = 256  # tokens in a block of `draw`


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
