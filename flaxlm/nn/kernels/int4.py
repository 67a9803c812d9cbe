# SPDX-License-Identifier: Apache-2.0
"""Matrices of 4-bit numbers, two in a byte, with a scale for each group of inputs.

A byte holds two inputs of one group, which are half a group apart: unpacking needs no
interleaving, and a kernel can multiply the two halves one after the other.
"""

import math

import jax
import jax.numpy as jnp

FEW_ROWS = 8  # the most that few_rows.py multiplies by such a matrix
LARGEST = 7  # of the numbers; -8 is not used
MOST_IN_GROUP = 128
# Of a group's largest weight: the scale whose squared error is least is taken.
CLIPPED = (1.0, 0.9, 0.8)


def group_size(num_inputs: int) -> int:
  """The largest power of two up to 128 that divides the inputs; 1: none can be paired."""
  return math.gcd(num_inputs, MOST_IN_GROUP)


def packed_int4(matrix_OI: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The bytes (O, I / 2), uint8, and the scales (O, G) in bfloat16."""
  O, I = matrix_OI.shape
  size = group_size(I)
  assert size > 1, I
  x_OGI = matrix_OI.astype(jnp.float32).reshape(O, I // size, size)
  largest_OG1 = jnp.maximum(jnp.abs(x_OGI).max(-1, keepdims=True), 1e-30)

  def rounded(share: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    scales_OG1 = (share * largest_OG1 / LARGEST).astype(jnp.bfloat16)
    wide_OG1 = scales_OG1.astype(jnp.float32)
    values_OGI = jnp.clip(jnp.round(x_OGI / wide_OG1), -LARGEST, LARGEST)
    error_OG1 = jnp.square(values_OGI * wide_OG1 - x_OGI).sum(-1, keepdims=True)
    return values_OGI, scales_OG1, error_OG1

  values_OGI, scales_OG1, error_OG1 = rounded(CLIPPED[0])
  for share in CLIPPED[1:]:
    others = rounded(share)
    better = others[2] < error_OG1
    values_OGI = jnp.where(better, others[0], values_OGI)
    scales_OG1 = jnp.where(better, others[1], scales_OG1)
    error_OG1 = jnp.where(better, others[2], error_OG1)
  nibbles_OGI = values_OGI.astype(jnp.int8).astype(jnp.uint8) & 15
  low_OGH, high_OGH = jnp.split(nibbles_OGI, 2, -1)
  return (low_OGH | high_OGH << 4).reshape(O, I // 2), scales_OG1[..., 0]


def halves(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The numbers in the low and in the high half of each byte, as int32."""
  bits = packed.astype(jnp.int32)
  signed = lambda nibble: (nibble ^ 8) - 8
  return signed(bits & 15), signed(bits >> 4)


def unpacked(packed_OB: jax.Array, scales_OG: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """The matrix (O, I), wide."""
  O, G = scales_OG.shape
  low, high = (half.reshape(O, G, 1, -1) for half in halves(packed_OB))
  numbers_OG2H = jnp.concatenate([low, high], 2).astype(jnp.float32)
  wide = numbers_OG2H * scales_OG[..., None, None].astype(jnp.float32)
  return wide.astype(dtype).reshape(O, -1)
