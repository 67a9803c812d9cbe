# SPDX-License-Identifier: Apache-2.0
"""Losses as sums over tokens, so that parts of a batch add up to the whole batch."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from flaxlm.nn.vocabulary import mask_padding_ids


def cross_entropy(
  logits_BTV: jax.Array,
  targets_BT: ArrayLike,
  smoothing: float = 0.0,
  num_ids: int | None = None,
) -> jax.Array:
  """-log softmax(logits)[target] of every token, in nats and float32, (B, T).

  `smoothing` spreads that share of the target over the vocabulary (Szegedy et al., 2016,
  section 7; Vaswani et al., 2017, 5.4). In a padded vocabulary it is spread over the first
  `num_ids` ids only: the logits of padding are masked.
  """
  logits_BTV = logits_BTV.astype(jnp.float32)
  # A masked sum, because a lookup's gradient is a scatter, which XLA does not fuse.
  is_target_BTV = jnp.arange(logits_BTV.shape[-1]) == jnp.asarray(targets_BT)[..., None]
  target_logits_BT = jnp.where(is_target_BTV, logits_BTV, 0.0).sum(-1)
  if smoothing:
    if num_ids is None:
      mean_BT = logits_BTV.mean(-1)
    else:
      mean_BT = mask_padding_ids(logits_BTV, num_ids, 0.0).sum(-1) / num_ids
    target_logits_BT = (1 - smoothing) * target_logits_BT + smoothing * mean_BT
  return jax.nn.logsumexp(logits_BTV, -1) - target_logits_BT
