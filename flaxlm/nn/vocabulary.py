# SPDX-License-Identifier: Apache-2.0
"""The ids of a vocabulary that only pad it, and the one place where they are masked.

A vocabulary is padded so that a mesh can split it evenly. Its padding ids come last, stand
for no token, and must have no probability.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def mask_padding_ids(
  logits: jax.Array, num_ids: ArrayLike, value: ArrayLike = -jnp.inf
) -> jax.Array:
  """Logits (..., V) with `value` at the padding ids, which are those from `num_ids` on.

  A model masks the padding of its own vocabulary. Decoding masks again, because its
  tokenizer may have fewer ids than the model.
  """
  is_token_V = jnp.arange(logits.shape[-1]) < num_ids
  return jnp.where(is_token_V, logits, value)
