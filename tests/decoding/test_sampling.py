# SPDX-License-Identifier: Apache-2.0
"""Sampling: the papers' distributions, drawn row by row, with nothing recompiled."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from scipy import stats

from flaxlm.decoding.sampling import (
  Sampling,
  candidates,
  is_filtered,
  make_sampling,
  sample,
)
from flaxlm.errors import ConfigError

VOCAB = 24
NUM_DRAWS = 4096

jitted = jax.jit(sample, static_argnames="filtered")


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
  }


def draw(logits_V: np.ndarray, rules: dict[str, Any], seed: int) -> np.ndarray:
  """Many independent draws: the rows of a batch, alike but for their seeds."""
  sampling = make_sampling(NUM_DRAWS, **rules, seed=seed)
  logits_BV = np.tile(logits_V, (NUM_DRAWS, 1))
  lengths_B = np.full(NUM_DRAWS, 7)
  return np.asarray(jitted(logits_BV, lengths_B, sampling, is_filtered(sampling))[0])


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


@pytest.mark.parametrize("seed", range(24))
def test_draws_follow_the_filtered_distribution(seed: int):
  """Never a token that the rules forbid, and the others as often as they should be."""
  rules = random_rules(seed)
  (logits_V,) = logits_of(seed)
  p_V = references.filtered_distribution(logits_V, **rules)
  counts_V = np.bincount(draw(logits_V, rules, seed * 10_000), minlength=VOCAB)
  assert set(np.flatnonzero(counts_V)) <= set(np.flatnonzero(p_V)), rules
  assert p_value(counts_V, p_V) > 1e-4, rules


def test_the_chi_square_test_sees_a_wrong_temperature():
  """The test above can fail: 1.2 in place of 1 is enough."""
  (logits_V,) = logits_of(0)
  counts_V = np.bincount(draw(logits_V, {"temperature": 1.2}, 0), minlength=VOCAB)
  assert p_value(counts_V, references.filtered_distribution(logits_V)) < 1e-4


@pytest.mark.parametrize("seed", range(100))
def test_candidates_are_the_support_of_the_filtered_distribution(seed: int):
  rules = random_rules(seed)
  (logits_V,) = logits_of(seed, spread=float(1 + seed % 5))
  p_V = references.filtered_distribution(logits_V, **rules)
  scaled_V = logits_V / np.float32(rules["temperature"])
  order_V = np.argsort(-scaled_V, stable=True)
  allowed_BV = candidates(jnp.asarray(scaled_V[order_V])[None], make_sampling(1, **rules))
  assert set(order_V[np.asarray(allowed_BV[0])]) == set(np.flatnonzero(p_V)), rules


def test_top_p_of_one_is_off_however_unlikely_the_tail():
  """Sums of probabilities round up to 1 long before the last token."""
  logits_V = np.array([0.0, -20.0, -21.0, -22.0], np.float32)
  p_V = references.filtered_distribution(logits_V, top_k=3, top_p=1.0)
  sampling = make_sampling(1, top_k=3, top_p=1.0)
  allowed_V = np.asarray(candidates(jnp.asarray(logits_V)[None], sampling))[0]
  assert allowed_V.tolist() == (p_V > 0).tolist()


@pytest.mark.parametrize("rules", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_temperature_zero_is_the_argmax(rules: dict[str, Any]):
  logits_BV = logits_of(1, rows=64)
  logits_BV[:8] = 0.0  # all alike: the first wins
  sampling = make_sampling(64, 0.0, **rules, seed=3)
  token_B, _ = jitted(logits_BV, np.arange(64), sampling, is_filtered(sampling))
  assert token_B.tolist() == logits_BV.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 2e-38, 1e-30, 1e-6])
def test_a_temperature_near_zero_is_nearly_the_argmax(temperature: float):
  logits_BV = logits_of(2, rows=64, spread=50.0)
  logits_BV[:, 5] -= 1  # no ties
  sampling = make_sampling(64, temperature)
  token_B, logprob_B = jitted(logits_BV, np.arange(64), sampling, False)
  assert token_B.tolist() == logits_BV.argmax(-1).tolist()
  assert np.isfinite(logprob_B).all()


def test_a_very_high_temperature_is_uniform():
  (logits_V,) = logits_of(3)
  counts_V = np.bincount(draw(logits_V, {"temperature": 1e30}, 5), minlength=VOCAB)
  assert p_value(counts_V, np.full(VOCAB, 1 / VOCAB)) > 1e-4


@pytest.mark.parametrize(
  "rules", [{"temperature": 0.0}, {}, {"temperature": 3.0, "top_k": 4}]
)
def test_logprobs_are_the_models_own(rules: dict[str, Any]):
  """Whatever the rules: log softmax of the logits as they came."""
  logits_BV = logits_of(4, rows=64)
  sampling = make_sampling(64, **rules, seed=3)
  token_B, logprob_B = jitted(logits_BV, np.arange(64), sampling, is_filtered(sampling))
  expected_BV = np.log([references.softmax(row.astype(float)) for row in logits_BV])
  np.testing.assert_allclose(logprob_B, expected_BV[np.arange(64), token_B], atol=1e-5)


def test_tokens_of_no_probability_are_never_drawn():
  (logits_V,) = logits_of(5)
  logits_V[10:] = -np.inf
  for rules in ({}, {"top_k": 20}, {"temperature": 50.0, "min_p": 0.0}):
    assert draw(logits_V, rules, 11).max() < 10


# -- A row is its own ----------------------------------------------------------------------


def mixed(batch: int, seed: int = 0) -> Sampling:
  """Rows with different rules: greedy, plain, and each of the filters."""
  kinds = [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}]
  rows = [make_sampling(1, **kinds[i % len(kinds)], seed=seed + i) for i in range(batch)]
  return Sampling(*(np.concatenate(rule) for rule in zip(*rows, strict=True)))


def take(sampling: Sampling, rows: Any) -> Sampling:
  return Sampling(*(np.asarray(rule)[rows] for rule in sampling))


def test_a_rows_draw_depends_on_no_other_row():
  """Alone, or in any order: the filters of others play no part either."""
  logits_BV, sampling, lengths_B = logits_of(6, rows=50), mixed(50), np.arange(50)
  together_B, logprobs_B = jitted(logits_BV, lengths_B, sampling, True)
  order = np.random.default_rng(0).permutation(50)
  shuffled_B, _ = jitted(logits_BV[order], lengths_B[order], take(sampling, order), True)
  assert shuffled_B.tolist() == np.asarray(together_B)[order].tolist()
  for row in range(50):
    alone = take(sampling, [row])
    token_B, logprob_B = jitted(
      logits_BV[[row]], lengths_B[[row]], alone, is_filtered(alone)
    )
    assert token_B[0] == together_B[row], row
    np.testing.assert_allclose(logprob_B[0], logprobs_B[row], atol=1e-6)


def test_a_draw_depends_on_the_seed_and_on_the_length():
  (logits_V,) = logits_of(7)

  def tokens(seeds: Any, lengths: Any) -> list[int]:
    rule = make_sampling(64)._replace(seeds_B=np.broadcast_to(seeds, 64).astype(np.uint32))
    logits_BV = np.tile(logits_V, (64, 1))
    return jitted(logits_BV, np.broadcast_to(lengths, 64), rule, False)[0].tolist()

  assert tokens(3, 5) == tokens(3, 5)
  assert len(set(tokens(3, 5))) == 1  # the same row, 64 times
  assert len(set(tokens(np.arange(64), 5))) > 3
  assert len(set(tokens(3, np.arange(64)))) > 3


def test_make_sampling_gives_each_row_its_own_seed():
  assert make_sampling(3, seed=5).seeds_B.tolist() == [5, 6, 7]
  last = make_sampling(2, seed=2**31 - 1)
  assert last.seeds_B.tolist() == [2**31 - 1, 2**31]


# -- Rules are values ----------------------------------------------------------------------


def test_changing_rules_recompiles_nothing():
  fresh = jax.jit(functools.partial(sample), static_argnames="filtered")
  logits_BV, lengths_B = logits_of(8, rows=4), np.arange(4)
  for seed in range(8):
    sampling = make_sampling(4, **random_rules(seed), seed=seed)
    fresh(logits_BV, lengths_B, sampling, True)
  assert fresh._cache_size() == 1
  for temperature in (0.0, 0.5, 2.0):
    fresh(logits_BV, lengths_B, make_sampling(4, temperature), False)
  assert fresh._cache_size() == 2


@pytest.mark.parametrize(
  ("rules", "filtered"),
  [
    ({}, False),
    ({"temperature": 0.0}, False),
    ({"top_p": 1.0, "min_p": 0.0}, False),
    ({"top_k": 10**12}, False),
    ({"top_k": 1}, True),
    ({"top_p": 0.999}, True),
    ({"min_p": 0.001}, True),
  ],
)
def test_only_rules_that_cut_are_sorted_for(rules: dict[str, Any], filtered: bool):
  assert is_filtered(make_sampling(2, **rules)) is filtered


@pytest.mark.parametrize(
  ("rules", "complaint"),
  [
    ({"temperature": -0.1}, "temperature is -0.1"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"temperature": float("inf")}, "temperature is inf"),
    ({"top_k": 0}, "top-k is 0"),
    ({"top_k": -1}, "top-k is -1"),
    ({"top_p": 0.0}, "top-p is 0.0"),
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
