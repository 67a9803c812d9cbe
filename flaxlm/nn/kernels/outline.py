# SPDX-License-Identifier: Apache-2.0
"""What a fused attention kernel keeps for its backward pass, without computing attention.

The planner traces it on machines that have no such kernel, and reads off the memory.
"""

import jax
import jax.numpy as jnp

OUTLINE = "outline"  # a path for the planner alone


@jax.custom_vjp
def attend_outline(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
  """Has the shape of attention and keeps what a fused kernel keeps, for `planning`, which
  traces it where there is no such kernel: q, k, v, the output, a number per row of scores.
  """
  return q_BTNH


def _outline_forward(q_BTNH: jax.Array, *kv: jax.Array) -> tuple[jax.Array, tuple]:
  out_BTNH = jnp.exp(q_BTNH)
  return out_BTNH, (q_BTNH, *kv, out_BTNH, out_BTNH[..., 0].astype(jnp.float32))


attend_outline.defvjp(_outline_forward, lambda kept, _: kept[:3])
