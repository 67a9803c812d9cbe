# SPDX-License-Identifier: Apache-2.0
"""Products of groups of rows, each with a matrix of its own, as experts need them.

Equal to a loop over the groups. On TPUs XLA has a kernel for this, `ragged_dot`. Elsewhere
it multiplies all rows by each of the E kernels, which on a CPU is 10 times slower than the
blocks of rows used here (docs/LOG.md). M rows come sorted into groups; a block has R.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


@jax.custom_vjp
def grouped_dot(x_MD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
  """Rows of `x`, sorted into groups of `sizes_E`, each group times its own kernel.

  Rows after the last group become zero.
  """
  return jax.lax.platform_dependent(
    x_MD, kernel_EDF, sizes_E, tpu=ragged_dot, default=blocked_dot
  )


def grouped_dot_backward(operands: tuple, grad_MF: jax.Array) -> tuple:
  x_MD, kernel_EDF, sizes_E = operands
  grad_x_MD = grouped_dot(grad_MF, kernel_EDF.swapaxes(1, 2), sizes_E)
  grad_kernel_EDF = jax.lax.platform_dependent(
    x_MD, grad_MF, sizes_E, tpu=ragged_outer, default=blocked_outer
  )
  return grad_x_MD, grad_kernel_EDF.astype(kernel_EDF.dtype), None


grouped_dot.defvjp(
  lambda *operands: (grouped_dot(*operands), operands), grouped_dot_backward
)


def ragged_dot(x_MD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
  y_XF = jax.lax.ragged_dot(in_whole_tiles(x_MD), kernel_EDF, sizes_E)
  return jnp.where(jnp.arange(len(x_MD))[:, None] < sizes_E.sum(), y_XF[: len(x_MD)], 0)


def ragged_outer(x_MD: jax.Array, y_MF: jax.Array, sizes_E: jax.Array) -> jax.Array:
  """x^T y of each group, (E, D, F), summed in float32 and rounded to the dtype of `x`.

  A TPU's kernel rounds its own sums; with a result in float32 there is one array more.
  """
  dims = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
  )
  x_XD, y_XF = in_whole_tiles(x_MD), in_whole_tiles(y_MF)
  return jax.lax.ragged_dot_general(
    x_XD, y_XF, sizes_E, dims, preferred_element_type=x_MD.dtype
  )


def in_whole_tiles(x_MD: jax.Array) -> jax.Array:
  """The rows, and rows of zeros after them, to a power of two or a multiple of 256.

  XLA's kernel takes the largest tile of rows, up to 256, that divides their number, which
  for 1,000 is 8; if it is no multiple of 8, XLA has no kernel, and multiplies all rows by
  all E matrices (seen in what libtpu compiles: docs/LOG.md).
  """
  num_rows = len(x_MD)
  tile = min(256, max(8, 1 << (num_rows - 1).bit_length()))
  return jnp.pad(x_MD, ((0, -num_rows % tile), (0, 0)))


def blocked_dot(x_MD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
  """`ragged_dot`, one block of rows at a time.

  The last block of a group runs into the next group, whose own blocks come later and
  overwrite the excess. The loop ends with the last group, so rows of no group cost nothing.
  """
  (M, _), F = x_MD.shape, kernel_EDF.shape[-1]
  num_blocks, R, place = blocks_of(sizes_E, M)
  x_XD = jnp.pad(x_MD, ((0, R), (0, 0)))

  def block(b: jax.Array, y_XF: jax.Array) -> jax.Array:
    e, start, _ = place(b)
    y_RF = jax.lax.dynamic_slice_in_dim(x_XD, start, R) @ kernel_EDF[e]
    return jax.lax.dynamic_update_slice_in_dim(y_XF, y_RF, start, 0)

  y_XF = jax.lax.fori_loop(0, num_blocks, block, jnp.zeros_like(x_MD, shape=(M + R, F)))
  return jnp.where(jnp.arange(M)[:, None] < sizes_E.sum(), y_XF[:M], 0)


def blocked_outer(x_MD: jax.Array, y_MF: jax.Array, sizes_E: jax.Array) -> jax.Array:
  """`ragged_outer`, one block of rows at a time."""
  (M, D), (E,), F = x_MD.shape, sizes_E.shape, y_MF.shape[-1]
  num_blocks, R, place = blocks_of(sizes_E, M)
  x_XD, y_XF = (jnp.pad(x, ((0, R), (0, 0))) for x in (x_MD, y_MF))

  def block(b: jax.Array, sum_EDF: jax.Array) -> jax.Array:
    e, start, end = place(b)
    x_RD = jax.lax.dynamic_slice_in_dim(x_XD, start, R)
    x_RD = jnp.where(start + jnp.arange(R)[:, None] < end, x_RD, 0)
    y_RF = jax.lax.dynamic_slice_in_dim(y_XF, start, R)
    return sum_EDF.at[e].add(jnp.dot(x_RD.T, y_RF, preferred_element_type=jnp.float32))

  zeros_EDF = jnp.zeros_like(x_MD, jnp.float32, (E, D, F))
  return jax.lax.fori_loop(0, num_blocks, block, zeros_EDF).astype(x_MD.dtype)


def blocks_of(sizes_E: jax.Array, num_rows: int) -> tuple[jax.Array, int, Callable]:
  """The number of blocks in use, the rows of a block, and a function from a block's number
  to its expert, its first row and the end of its group.

  A block has a quarter of an even share of the rows, within limits: large enough for a fast
  product, and small enough that little is wasted, on average half a block per expert.
  """
  rows = min(num_rows, max(128, min(num_rows // (4 * len(sizes_E)), 1024)))
  blocks_E = -(-sizes_E // rows)
  last_block_E = jnp.cumsum(blocks_E)
  ends_E = jnp.cumsum(sizes_E)

  def place(b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    e = (b >= last_block_E).sum()
    block_of_group = b - (last_block_E[e] - blocks_E[e])
    return e, ends_E[e] - sizes_E[e] + block_of_group * rows, ends_E[e]

  return last_block_E[-1], rows, place
