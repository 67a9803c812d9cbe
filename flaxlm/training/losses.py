# SPDX-License-Identifier: Apache-2.0
"""Losses as sums over tokens, so that parts of a batch add up to the whole batch."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def cross_entropy(logits_BTV: jax.Array, targets_BT: ArrayLike) -> jax.Array:
  """-log softmax(logits)[target] of every token, in nats and float32, (B, T)."""
  logits_BTV = logits_BTV.astype(jnp.float32)
  target_logits_BT = jnp.take_along_axis(
    logits_BTV, jnp.asarray(targets_BT)[..., None], -1
  )[..., 0]
  return jax.nn.logsumexp(logits_BTV, -1) - target_logits_BT
