# SPDX-License-Identifier: Apache-2.0
"""A stand-in that keeps what a fused attention kernel keeps, without computing attention.

The planner traces it, on machines that have no such kernel, to find the memory needed.
"""

import jax
import jax.numpy as jnp

OUTLINE = "outline"  # a path for the planner alone


@jax.custom_vjp
def attend_outline(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
  """An array of attention's shape. For the backward pass it keeps what a fused kernel
  keeps: q, k, v, the output, and one number per row of scores."""
  return q_BTNH


def _outline_forward(q_BTNH: jax.Array, *kv: jax.Array) -> tuple[jax.Array, tuple]:
  out_BTNH = jnp.exp(q_BTNH)
  return out_BTNH, (q_BTNH, *kv, out_BTNH, out_BTNH[..., 0].astype(jnp.float32))


attend_outline.defvjp(_outline_forward, lambda kept, _: kept[:3])
