# SPDX-License-Identifier: Apache-2.0
"""Sampling: the papers' distributions, drawn row by row, with nothing recompiled."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from conftest import slow
from scipy import stats

from flaxlm.decoding.drawing import (
  GREEDY_RULES,
  RULES,
  TokenHistory,
  apply_rules,
  draw,
  rules_in_use,
  sample,
)
from flaxlm.decoding.sampling import (
  MOST_SAMPLES,
  Sampling,
  SamplingSettings,
  draw_key,
  make_sampling,
  stack_settings,
)
from flaxlm.errors import ConfigError

VOCAB = 24
NUM_DRAWS = 4096

jitted = jax.jit(sample, static_argnames=("rules", "num_top"))
CUTS = ("top_k", "top_p", "min_p", "typical")
DRAWING = ("temperature", *CUTS)
EVERY_RULE = tuple(name for name in RULES if name != "constraint")  # test_constraint.py


def logits_of(seed: int, rows: int = 1, spread: float = 2.0) -> np.ndarray:
  """Random logits (B, V) in which some tokens are equally likely."""
  rng = np.random.default_rng(seed)
  logits_BV = rng.normal(size=(rows, VOCAB)).astype(np.float32) * spread
  logits_BV[:, 5] = logits_BV[:, 3]
  return logits_BV


def random_rules(seed: int) -> dict[str, Any]:
  """A rule of the kind that users set; each filter is on in half of them."""
  rng = np.random.default_rng(seed)
  return {
    "temperature": float(rng.choice([0.3, 0.8, 1.0, 1.7])),
    "top_k": int(rng.integers(1, VOCAB + 5)) if rng.random() < 0.5 else None,
    "top_p": float(rng.uniform(0.05, 1)) if rng.random() < 0.5 else None,
    "min_p": float(rng.uniform(0, 0.5)) if rng.random() < 0.5 else None,
    "typical_p": float(rng.uniform(0.05, 1)) if rng.random() < 0.3 else None,
  }


def chosen(logits_BV: Any, lengths_B: Any, sampling: Sampling) -> tuple[Any, Any]:
  """Tokens and log-probabilities, with every cut compiled in: one program for all."""
  return jitted(logits_BV, lengths_B, sampling, DRAWING)[:2]


def draw_many(logits_V: np.ndarray, rules: dict[str, Any], seed: int) -> np.ndarray:
  """Many independent draws: the rows of a batch, alike but for their seeds."""
  sampling = make_sampling(NUM_DRAWS, **rules, seed=seed)
  logits_BV = np.tile(logits_V, (NUM_DRAWS, 1))
  lengths_B = np.full(NUM_DRAWS, 7)
  return np.asarray(chosen(logits_BV, lengths_B, sampling)[0])


def p_value(counts_V: np.ndarray, p_V: np.ndarray) -> float:
  """Pearson's chi-square test; bins that expect less than 5 are put together."""
  expected_V = p_V * counts_V.sum()
  large_V = expected_V >= 5
  counts = [*counts_V[large_V], counts_V[~large_V].sum()]
  expected = [*expected_V[large_V], expected_V[~large_V].sum()]
  if expected[-1] < 5:  # too rare to judge, even together
    counts, expected = counts[:-1], expected[:-1]
  if len(counts) < 2:
    return 1.0
  statistic = sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True))
  return float(stats.chi2.sf(statistic, len(counts) - 1))


@pytest.mark.parametrize("seed", [*range(8), *map(slow, range(8, 24))])
def test_draws_follow_the_filtered_distribution(seed: int):
  """Never a token that the rules forbid, and the others as often as they should be."""
  rules = random_rules(seed)
  (logits_V,) = logits_of(seed)
  p_V = references.filtered_distribution(logits_V, **rules)
  counts_V = np.bincount(draw_many(logits_V, rules, seed * 10_000), minlength=VOCAB)
  assert set(np.flatnonzero(counts_V)) <= set(np.flatnonzero(p_V)), rules
  assert p_value(counts_V, p_V) > 1e-4, rules


def test_the_chi_square_test_sees_a_wrong_temperature():
  """The test above can fail: 1.2 in place of 1 is enough."""
  (logits_V,) = logits_of(0)
  counts_V = np.bincount(draw_many(logits_V, {"temperature": 1.2}, 0), minlength=VOCAB)
  assert p_value(counts_V, references.filtered_distribution(logits_V)) < 1e-4


@functools.partial(jax.jit, static_argnames="rules")
def cut(logits_BV: Any, sampling: Sampling, rules: tuple[str, ...] = CUTS) -> Any:
  return apply_rules(rules, logits_BV, sampling)


@pytest.mark.parametrize("seed", range(100))
def test_what_is_kept_is_the_support_of_the_filtered_distribution(seed: int):
  rules = random_rules(seed)
  (logits_V,) = logits_of(seed, spread=float(1 + seed % 5))
  p_V = references.filtered_distribution(logits_V, **rules)
  scaled_BV = (logits_V / np.float32(rules["temperature"]))[None]
  kept_V = np.isfinite(cut(scaled_BV, make_sampling(1, **rules))[0])
  assert set(np.flatnonzero(kept_V)) == set(np.flatnonzero(p_V)), rules


@pytest.mark.parametrize("rule", CUTS)
def test_a_cut_that_is_off_cuts_nothing(rule: str):
  """Sums of probabilities round up to 1 long before the last token."""
  logits_BV = np.array([[0.0, -20.0, -21.0, -22.0, -80.0]], np.float32)
  assert np.isfinite(cut(logits_BV, make_sampling(1), (rule,))).all()


def test_a_large_vocabulary_is_cut_as_a_small_one():
  """The search over thresholds against sorting, on what GPT-2 has."""
  logits_BV = np.random.default_rng(0).normal(size=(2, 50257)).astype(np.float32) * 3
  for rules in ({"top_k": 40}, {"top_p": 0.9}, {"top_k": 50000}):
    kept_BV = np.isfinite(cut(logits_BV, make_sampling(2, **rules), (*rules,)))
    for logits_V, kept_V in zip(logits_BV, kept_BV, strict=True):
      order_V = np.argsort(-logits_V)
      p_V = references.softmax(logits_V[order_V].astype(float))
      before_V = np.cumsum(p_V) - p_V
      expected = (before_V < rules["top_p"]).sum() if "top_p" in rules else rules["top_k"]
      # float32 sums of so many probabilities are right to 1e-6: 0 or 1 tokens.
      assert abs(int(kept_V.sum()) - expected) <= ("top_p" in rules)
      assert kept_V[order_V[: kept_V.sum()]].all()


def test_draws_from_several_blocks_are_as_likely_as_their_weights():
  """Tokens of three blocks, the last one not full, each in its turn and within."""
  rng = np.random.default_rng(0)
  weights_V = rng.exponential(size=700).astype(np.float32) ** 2
  uniforms = rng.random((20_000, 2)).astype(np.float32)
  tile = lambda weights_V: np.tile(weights_V, (len(uniforms), 1))
  token_B = np.asarray(jax.jit(draw)(tile(weights_V), uniforms))
  counts_V = np.bincount(token_B, minlength=700)
  assert p_value(counts_V, weights_V / weights_V.sum()) > 1e-4
  other_V = np.roll(weights_V, 1)
  assert p_value(counts_V, other_V / other_V.sum()) < 1e-4


def test_what_has_no_weight_is_never_drawn():
  rng = np.random.default_rng(1)
  weights_BV = (rng.random((4096, 700)) * (rng.random((4096, 700)) < 0.02)).astype(
    "float32"
  )
  weights_BV[:, 3] = 1e-30
  uniforms = rng.choice([0.0, 0.5, 1 - 2.0**-24], (4096, 2)).astype(np.float32)
  token_B = np.asarray(jax.jit(draw)(weights_BV, uniforms))
  assert (weights_BV[np.arange(4096), token_B] > 0).all()


# -- Rules that change logits --------------------------------------------------------------


def random_adjustments(seed: int) -> dict[str, Any]:
  rng = np.random.default_rng(seed)
  biased = rng.choice(VOCAB, 3, replace=False).tolist()
  return {
    "repetition_penalty": float(rng.uniform(0.5, 2)),
    "presence_penalty": float(rng.uniform(-2, 2)),
    "frequency_penalty": float(rng.uniform(-1, 1)),
    "logit_bias": dict(zip(biased, rng.normal(size=3).tolist(), strict=True)),
    "banned_tokens": rng.choice(VOCAB, seed % 3, replace=False).tolist(),
  }


@pytest.mark.parametrize("seed", range(10))
def test_penalties_and_biases_follow_their_definitions(seed: int):
  """Against the definitions, token by token, and greedy is what they leave on top."""
  rules = random_adjustments(seed)
  (logits_V,) = logits_of(seed)
  rng = np.random.default_rng(seed)
  prompt, answer = rng.integers(0, VOCAB, 6).tolist(), rng.integers(0, VOCAB, 9).tolist()
  in_prompt_V = np.isin(np.arange(VOCAB), prompt)
  counts_V = np.bincount(answer, minlength=VOCAB)
  seen = TokenHistory(
    jnp.asarray(in_prompt_V)[None], jnp.asarray(counts_V)[None], jnp.zeros(1, int)
  )
  banned = {token: -np.inf for token in rules.pop("banned_tokens")}
  sampling = make_sampling(1, 0.0, **rules, banned_tokens=[*banned])
  names = rules_in_use(sampling)
  assert set(names) == {"bias", "repetition", "presence"}
  logits_BV, traced = jnp.asarray(logits_V)[None], jax.tree.map(jnp.asarray, sampling)
  adjusted_BV = apply_rules(names, logits_BV, traced, seen)
  rules["logit_bias"] = rules["logit_bias"] | banned
  expected_V = references.adjusted_logits(logits_V, prompt, answer, **rules)
  np.testing.assert_allclose(adjusted_BV[0], expected_V, rtol=1e-5, atol=1e-5)
  drawn = jitted(logits_V[None], np.array([15]), sampling, EVERY_RULE, seen)
  assert drawn.token_B[0] == np.argmax(expected_V)
  logprobs_V = np.log(references.softmax(logits_V.astype(float)))
  np.testing.assert_allclose(drawn.logprob_B[0], logprobs_V[drawn.token_B[0]], atol=1e-5)


def test_what_was_drawn_is_seen():
  seen = TokenHistory(jnp.zeros((2, 4), bool), jnp.zeros((2, 4), int), jnp.zeros(2, int))
  greedy = make_sampling(2, 0.0)
  seen = seen.add(jnp.array([1, 3]), greedy).add(jnp.array([1, 0]), greedy)
  assert seen.counts_BV.tolist() == [[0, 2, 0, 0], [1, 0, 0, 1]]


def test_the_likeliest_tokens_are_told():
  """Under the model itself, best first, whatever is drawn."""
  logits_BV = logits_of(9, rows=5)
  logits_BV[:, 5] -= 0.1  # no ties
  drawn = jitted(logits_BV, np.arange(5), make_sampling(5, top_k=2), DRAWING, None, 4)
  logprobs_BV = np.log([references.softmax(row.astype(float)) for row in logits_BV])
  order_BV = np.argsort(-logprobs_BV, -1)[:, :4]
  assert drawn.top_tokens_BX.tolist() == order_BV.tolist()
  expected = np.take_along_axis(logprobs_BV, order_BV, -1)
  np.testing.assert_allclose(drawn.top_logprobs_BX, expected, atol=1e-5)


# -- Temperature ---------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_temperature_zero_is_the_argmax(rules: dict[str, Any]):
  logits_BV = logits_of(1, rows=64)
  logits_BV[:8] = 0.0  # all alike: the first wins
  sampling = make_sampling(64, 0.0, **rules, seed=3)
  token_B, _ = chosen(logits_BV, np.arange(64), sampling)
  assert token_B.tolist() == logits_BV.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 2e-38, 1e-30, 1e-6])
def test_a_temperature_near_zero_is_nearly_the_argmax(temperature: float):
  logits_BV = logits_of(2, rows=64, spread=50.0)
  logits_BV[:, 5] -= 1  # no ties
  sampling = make_sampling(64, temperature)
  token_B, logprob_B = chosen(logits_BV, np.arange(64), sampling)
  assert token_B.tolist() == logits_BV.argmax(-1).tolist()
  assert np.isfinite(logprob_B).all()


def test_a_very_high_temperature_is_uniform():
  (logits_V,) = logits_of(3)
  counts_V = np.bincount(draw_many(logits_V, {"temperature": 1e30}, 5), minlength=VOCAB)
  assert p_value(counts_V, np.full(VOCAB, 1 / VOCAB)) > 1e-4


@pytest.mark.parametrize(
  "rules", [{"temperature": 0.0}, {}, {"temperature": 3.0, "top_k": 4}]
)
def test_logprobs_are_the_models_own(rules: dict[str, Any]):
  """Whatever the rules: log softmax of the logits as they came."""
  logits_BV = logits_of(4, rows=64)
  sampling = make_sampling(64, **rules, seed=3)
  token_B, logprob_B = chosen(logits_BV, np.arange(64), sampling)
  expected_BV = np.log([references.softmax(row.astype(float)) for row in logits_BV])
  np.testing.assert_allclose(logprob_B, expected_BV[np.arange(64), token_B], atol=1e-5)


def test_tokens_of_no_probability_are_never_drawn():
  (logits_V,) = logits_of(5)
  logits_V[10:] = -np.inf
  for rules in ({}, {"top_k": 20}, {"temperature": 50.0, "min_p": 0.0}):
    assert draw_many(logits_V, rules, 11).max() < 10


# -- A row is its own ----------------------------------------------------------------------


def mixed(batch: int, seed: int = 0) -> Sampling:
  """Rows with different rules: greedy, plain, and each of the filters."""
  kinds = [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}]
  rows = [SamplingSettings(**kinds[i % len(kinds)], seed=seed + i) for i in range(batch)]
  return stack_settings(rows)


def take(sampling: Sampling, rows: Any) -> Sampling:
  return sampling.map_rows(lambda rule: np.asarray(rule)[rows])


def test_a_rows_draw_depends_on_no_other_row():
  """Alone, or in any order: the filters of others play no part either."""
  logits_BV, sampling, lengths_B = logits_of(6, rows=50), mixed(50), np.arange(50)
  together_B, logprobs_B = chosen(logits_BV, lengths_B, sampling)
  order = np.random.default_rng(0).permutation(50)
  shuffled_B, _ = chosen(logits_BV[order], lengths_B[order], take(sampling, order))
  assert shuffled_B.tolist() == np.asarray(together_B)[order].tolist()
  for row in range(50):
    alone = take(sampling, [row])
    own = rules_in_use(alone)  # only those that this row uses
    token_B, logprob_B, *_ = jitted(logits_BV[[row]], lengths_B[[row]], alone, own)
    assert token_B[0] == together_B[row], row
    np.testing.assert_allclose(logprob_B[0], logprobs_B[row], atol=1e-6)


def test_a_draw_depends_on_the_seed_and_on_the_length():
  (logits_V,) = logits_of(7)

  def tokens(seeds: Any, lengths: Any) -> list[int]:
    seeds = np.broadcast_to(seeds, 64).tolist()
    rule = stack_settings([SamplingSettings(seed=seed) for seed in seeds])
    logits_BV = np.tile(logits_V, (64, 1))
    return jitted(logits_BV, np.broadcast_to(lengths, 64), rule, DRAWING)[0].tolist()

  assert tokens(3, 5) == tokens(3, 5)
  assert len(set(tokens(3, 5))) == 1  # the same row, 64 times
  assert len(set(tokens(np.arange(64), 5))) > 3
  assert len(set(tokens(3, np.arange(64)))) > 3


def test_no_sample_of_a_row_draws_with_the_key_of_another():
  """Not of the next row, nor of the next seed; the very first has JAX's key of the seed."""
  keys = [
    draw_key(*numbers)
    for numbers in itertools.product((0, 1, 2**31 - 1), range(9), range(9))
  ]
  assert len(set(keys)) == 3 * 9 * 9
  assert np.array_equal(draw_key(5), jax.random.key_data(jax.random.key(5)))
  assert sum(first == 0 for first, _ in keys) == 3, "nothing hashed meets a plain seed"
  assert all(0 <= word < 2**32 for key in keys for word in key)


@pytest.mark.parametrize("count", [0, MOST_SAMPLES + 1, 10**9])
def test_samples_are_bounded(count: int):
  with pytest.raises(ConfigError, match=f"num-samples is {count}"):
    SamplingSettings().for_samples(count)


def test_rows_and_samples_have_the_keys_of_their_numbers():
  rows = make_sampling(3, seed=5).keys_B2.tolist()
  assert rows == [[*draw_key(5, row)] for row in range(3)]
  samples = stack_settings(SamplingSettings(seed=5, row=1).for_samples(3))
  assert samples.keys_B2.tolist() == [[*draw_key(5, 1, n)] for n in range(3)]


# -- Rules are values ----------------------------------------------------------------------


def test_changing_values_recompiles_nothing():
  fresh = jax.jit(functools.partial(sample), static_argnames="rules")
  logits_BV, lengths_B = logits_of(8, rows=4), np.arange(4)
  for seed in range(8):
    sampling = make_sampling(4, **random_rules(seed), seed=seed)
    fresh(logits_BV, lengths_B, sampling, DRAWING)
  assert fresh._cache_size() == 1
  for temperature in (0.0, 0.5, 2.0):
    fresh(logits_BV, lengths_B, make_sampling(4, temperature), ("temperature",))
  assert fresh._cache_size() == 2


@pytest.mark.parametrize(
  ("rules", "names"),
  [
    ({}, ()),
    ({"temperature": 0.0}, ()),
    ({"top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}, ()),
    ({"top_k": 10**12}, ()),
    ({"repetition_penalty": 1.0, "logit_bias": {}, "banned_tokens": ()}, ()),
    ({"top_k": 1}, ("top_k",)),
    ({"top_p": 0.999}, ("top_p",)),
    ({"min_p": 0.001}, ("min_p",)),
    ({"frequency_penalty": -0.1}, ("presence",)),
    ({"banned_tokens": [0]}, ("bias",)),
    ({"typical_p": 0.9, "repetition_penalty": 1.1}, ("repetition", "typical")),
  ],
)
def test_only_rules_that_some_row_uses_are_compiled(rules: dict[str, Any], names: tuple):
  """Of greedy rows, only those that change which token is the likeliest."""
  rows = [SamplingSettings(), SamplingSettings(**rules)]
  used = rules_in_use(stack_settings(rows))
  assert {*used} == {"temperature", *names}
  assert used == tuple(name for name in RULES if name in used)
  greedy = dataclasses.replace(rows[1], temperature=0.0)
  kept = tuple(name for name in names if name in GREEDY_RULES)
  assert rules_in_use(stack_settings([greedy, greedy])) == kept


@pytest.mark.parametrize(
  ("rules", "complaint"),
  [
    ({"temperature": -0.1}, "temperature is -0.1"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"temperature": float("inf")}, "temperature is inf"),
    ({"top_k": 0}, "top-k is 0"),
    ({"top_k": -1}, "top-k is -1"),
    ({"top_p": 0.0}, "top-p is 0.0"),
    ({"typical_p": 0.0}, "typical-p is 0.0"),
    ({"repetition_penalty": 0.0}, "repetition-penalty is 0.0"),
    ({"presence_penalty": float("nan")}, "presence-penalty is nan"),
    ({"frequency_penalty": 101}, "frequency-penalty is 101"),
    ({"logit_bias": {3: float("inf")}}, "logit-bias of token 3 is inf"),
    ({"logit_bias": {3: 1e39}}, "logit-bias of token 3 is 1e+39"),
    ({"banned_tokens": [-1]}, "there is no token id -1"),
    ({"top_p": 1.1}, "top-p is 1.1"),
    ({"top_p": float("nan")}, "top-p is nan"),
    ({"min_p": -0.1}, "min-p is -0.1"),
    ({"min_p": 1.1}, "min-p is 1.1"),
    ({"min_p": float("nan")}, "min-p is nan"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": 2**31}, "seed is 2147483648"),
  ],
)
def test_rules_out_of_range_are_refused(rules: dict[str, Any], complaint: str):
  with pytest.raises(ConfigError) as caught:
    make_sampling(1, **rules)
  assert caught.value.cause == complaint
  assert caught.value.cure
