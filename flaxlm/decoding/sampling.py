# SPDX-License-Identifier: Apache-2.0
"""Choosing the next token from logits, each row by its own rules.

The rules are arrays, so changing a temperature never recompiles.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.errors import ConfigError


class Sampling(NamedTuple):
  """Each row's rules; build with `make_sampling`."""

  temperature_B: jax.Array | np.ndarray  # 0: greedy
  top_k_B: jax.Array | np.ndarray  # the vocabulary's size: off
  top_p_B: jax.Array | np.ndarray  # 1: off
  min_p_B: jax.Array | np.ndarray  # 0: off
  seeds_B: jax.Array | np.ndarray  # all the randomness that a row has


def make_sampling(
  batch: int,
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
  min_p: float | None = None,
  seed: int = 0,
) -> Sampling:
  """The same rules for every row, row i with `seed + i`.

  Raises `ConfigError` for values out of range.
  """
  if not 0 <= temperature < float("inf"):
    raise ConfigError(f"temperature is {temperature}", "0 is greedy, 1 the model's own")
  if top_k is not None and top_k < 1:
    raise ConfigError(f"top-k is {top_k}", "it is at least 1, or left out")
  if top_p is not None and not 0 < top_p <= 1:
    raise ConfigError(f"top-p is {top_p}", "it is above 0 and at most 1, or left out")
  if min_p is not None and not 0 <= min_p <= 1:
    raise ConfigError(f"min-p is {min_p}", "it is from 0 to 1, or left out")
  if not 0 <= seed < 2**31:
    raise ConfigError(f"seed is {seed}", "it is from 0 to 2147483647")
  return Sampling(
    temperature_B=np.full(batch, temperature, np.float32),
    top_k_B=np.full(batch, min(top_k or 2**30, 2**30), np.int32),
    top_p_B=np.full(batch, 1.0 if top_p is None else top_p, np.float32),
    min_p_B=np.full(batch, min_p or 0.0, np.float32),
    seeds_B=np.uint32(seed) + np.arange(batch, dtype=np.uint32),
  )


def is_filtered(sampling: Sampling) -> bool:
  """Whether any row cuts its distribution; if none does, nothing need be sorted."""
  return bool(
    np.any(np.asarray(sampling.top_k_B) < 2**30)
    or np.any(np.asarray(sampling.top_p_B) < 1)
    or np.any(np.asarray(sampling.min_p_B) > 0)
  )


def sample(
  logits_BV: jax.Array, lengths_B: jax.Array, sampling: Sampling, filtered: bool
) -> tuple[jax.Array, jax.Array]:
  """Next token ids (B,), and their log-probabilities under the model itself (B,).

  A row's draw depends on its seed and its length so far: on nothing else in the batch.
  With `filtered` the candidates are cut after the temperature, in this order: top-k (Fan
  et al., 2018), top-p (Holtzman et al., 2020), min-p (Nguyen et al., 2024).
  """
  keys_B = jax.vmap(lambda s, n: jax.random.fold_in(jax.random.key(s), n))(
    jnp.asarray(sampling.seeds_B), lengths_B
  )
  logits_BV = logits_BV.astype(jnp.float32)
  greedy_B = jnp.argmax(logits_BV, -1)
  cold_B = sampling.temperature_B < jnp.finfo(jnp.float32).tiny
  scaled_BV = logits_BV - logits_BV.max(-1, keepdims=True)  # a tiny temperature: no inf
  scaled_BV /= jnp.where(cold_B, 1.0, sampling.temperature_B)[:, None]
  if filtered:
    order_BV = jnp.argsort(-scaled_BV, -1, stable=True)
    sorted_BV = jnp.take_along_axis(scaled_BV, order_BV, -1)
    allowed_BV = candidates(sorted_BV, sampling)
    # Back in the vocabulary's order: a row that cuts nothing draws as if unfiltered.
    allowed_BV = jnp.take_along_axis(allowed_BV, jnp.argsort(order_BV, -1), -1)
    scaled_BV = jnp.where(allowed_BV, scaled_BV, -jnp.inf)
  drawn_B = jax.vmap(jax.random.categorical)(keys_B, scaled_BV)
  token_B = jnp.where(cold_B, greedy_B, drawn_B).astype(jnp.int32)
  chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], -1)[:, 0]
  return token_B, chosen_B - jax.nn.logsumexp(logits_BV, -1)


def candidates(sorted_BV: jax.Array, sampling: Sampling) -> jax.Array:
  """Which of the logits, in falling order, may be drawn; the first always may."""
  in_top_k_BV = jnp.arange(sorted_BV.shape[-1]) < sampling.top_k_B[:, None]
  probs_BV = jax.nn.softmax(jnp.where(in_top_k_BV, sorted_BV, -jnp.inf), -1)
  mass_before_BV = jnp.cumsum(probs_BV, -1) - probs_BV
  top_p_B1 = sampling.top_p_B[:, None]
  in_nucleus_BV = (mass_before_BV < top_p_B1) | (top_p_B1 >= 1)  # sums round up to 1
  likely_BV = probs_BV >= sampling.min_p_B[:, None] * probs_BV[:, :1]
  allowed_BV = in_top_k_BV & in_nucleus_BV & likely_BV
  return allowed_BV.at[:, 0].set(True)
