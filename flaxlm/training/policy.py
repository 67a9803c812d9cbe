# SPDX-License-Identifier: Apache-2.0
"""The policy gradient: tokens become likelier by how much more than others of its group the
completion that they are in was worth.

This is REINFORCE (Williams, 1992) with the mean reward of a prompt's completions for a
baseline, as in GRPO (Shao et al., 2024), without a critic. Advantages are not divided by
the group's deviation, and the loss is a mean over the tokens of all completions, not over
completions of means: both would favour some questions, and long wrong answers (Liu et al.,
2025, section 3.1). Each completion is learnt from once, by the parameters that drew it, so
the ratio of old and new probabilities is 1, and there is nothing to clip.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


class Advantages(NamedTuple):
  """By how much the completions of P groups of K were better than their groups."""

  values_PK: np.ndarray  # float32
  is_telling_P: np.ndarray  # whether not all rewards of a group are equal


def advantages(rewards_PK: np.ndarray) -> Advantages:
  """The rewards less the mean of their group; exactly 0 where all of a group are equal."""
  is_telling_P = rewards_PK.max(1) > rewards_PK.min(1)
  values_PK = rewards_PK - rewards_PK.mean(1, keepdims=True)
  values_PK = np.where(is_telling_P[:, None], values_PK, 0.0)
  return Advantages(values_PK.astype(np.float32), is_telling_P)


def policy_weights(weights_BT: ArrayLike, advantages_BT: ArrayLike) -> jax.Array:
  """What the cross-entropy of each token is multiplied by, (B, T).

  The sum of the products, over the sum of `weights_BT`, has the gradient of -J, where J is
  the mean over tokens of advantage times log-probability. Its value says nothing: it has
  no reason to fall.
  """
  return jnp.multiply(weights_BT, advantages_BT)
