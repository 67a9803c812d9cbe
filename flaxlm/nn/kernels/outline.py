# SPDX-License-Identifier: Apache-2.0
"""A stand-in that keeps what a fused attention kernel keeps, without computing attention.

The planner traces it, on machines that have no such kernel, to find the memory needed.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

OUTLINE = "outline"  # a path for the planner alone


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend_outline(
  q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, lanes: int
) -> jax.Array:
  """An array of attention's shape. For the backward pass it keeps what a fused kernel
  keeps: q, k, v, the output, all with their heads padded to a multiple of `lanes`, and one
  number per row of scores."""
  return q_BTNH


def _outline_forward(*qkv_and_lanes: Any) -> tuple[jax.Array, tuple]:
  *qkv, lanes = qkv_and_lanes
  out_BTNH = jnp.exp(qkv[0])
  missing = -out_BTNH.shape[-1] % lanes
  pad = lambda x: jnp.pad(x, [(0, 0)] * 3 + [(0, missing)]) if missing else x
  return out_BTNH, (*map(pad, (*qkv, out_BTNH)), out_BTNH[..., 0].astype(jnp.float32))


def _outline_backward(lanes: int, kept: tuple, grad_BTNH: jax.Array) -> tuple:
  return tuple(x[..., : grad_BTNH.shape[-1]] for x in kept[:3])


attend_outline.defvjp(_outline_forward, _outline_backward)
