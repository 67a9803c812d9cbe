# SPDX-License-Identifier: Apache-2.0
"""Products of up to eight rows with narrow weights, as one kernel for NVIDIA GPUs.

Equal to `products.matrix_dot` for int8 and int4 matrices. It reads the narrow weights once
and widens them in registers: one row as sums, more of them in the tensor cores, padded to
16. It was compiled for a Hopper GPU, and has not been measured on any: who wants it asks
for it by name (`--weights-kernel pallas`).
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as library

from flaxlm.nn.kernels.int4 import FEW_ROWS, MOST_IN_GROUP, group_size, halves

PADDED_ROWS = 16  # of a product in the tensor cores
OUTPUTS = 16  # of one program
INPUTS = 256  # int8 weights of an output that are read at a time; of int4 it is a group


def obstacle(num_outputs: int, num_inputs: int) -> str | None:
  """Why the kernel cannot multiply by a narrow matrix; None: it can."""
  unit = MOST_IN_GROUP
  if num_outputs % OUTPUTS or num_inputs % unit:
    return f"{num_outputs} x {num_inputs} weights are not a multiple of {OUTPUTS} x {unit}"
  return None


def few_rows_dot(
  x_RI: jax.Array, params: Mapping[str, jax.Array], interpreted: bool = False
) -> jax.Array:
  """x . matrix^T with its scales, (R, O) in float32, for at most `FEW_ROWS` rows."""
  (R, I), O = x_RI.shape, params["matrix"].shape[0]
  assert R <= FEW_ROWS and obstacle(O, I) is None, (R, O, I)
  is_int4 = params["matrix"].dtype == jnp.uint8
  rows = 1 if R == 1 else PADDED_ROWS
  x_RI = jnp.pad(x_RI, ((0, rows - R), (0, 0)))
  kernel = functools.partial(int4_kernel if is_int4 else int8_kernel, rows == 1)
  scales = params["scale"] if is_int4 else params["scale"][:, None]
  of_outputs = lambda width: pl.BlockSpec((OUTPUTS, width), lambda n: (n, 0))
  y_OR = pl.pallas_call(
    kernel,
    grid=(O // OUTPUTS,),
    in_specs=[
      pl.BlockSpec((rows, I), lambda n: (0, 0)),
      of_outputs(params["matrix"].shape[1]),
      of_outputs(scales.shape[1]),
    ],
    out_specs=of_outputs(rows),
    out_shape=jax.ShapeDtypeStruct((O, rows), jnp.float32),
    compiler_params=library.CompilerParams(num_warps=4, num_stages=3),
    interpret=interpreted,
  )(x_RI, params["matrix"], scales)
  return y_OR[:, :R].T


def int8_kernel(
  is_sum: bool, x_ref: Any, matrix_ref: Any, scale_ref: Any, y_ref: Any
) -> None:
  """`OUTPUTS` outputs of all rows: inputs in blocks, then one scale for each output."""
  num_inputs = matrix_ref.shape[1]
  size = INPUTS if num_inputs % INPUTS == 0 else MOST_IN_GROUP

  def add(n: jax.Array, sums: jax.Array) -> jax.Array:
    here = pl.ds(n * size, size)
    return sums + partial(is_sum, x_ref[:, here], matrix_ref[:, here])

  sums = jnp.zeros((OUTPUTS, size if is_sum else PADDED_ROWS), jnp.float32)
  sums = jax.lax.fori_loop(0, num_inputs // size, add, sums)
  y_ref[...] = finished(is_sum, sums) * scale_ref[...]


def int4_kernel(
  is_sum: bool, x_ref: Any, matrix_ref: Any, scale_ref: Any, y_ref: Any
) -> None:
  """The same, one group of inputs after the other, each with a scale of its own."""
  half = group_size(2 * matrix_ref.shape[1]) // 2

  def add(n: jax.Array, sums: jax.Array) -> jax.Array:
    low, high = halves(matrix_ref[:, pl.ds(n * half, half)])
    first, second = (x_ref[:, pl.ds((2 * n + k) * half, half)] for k in range(2))
    product = partial(is_sum, first, low) + partial(is_sum, second, high)
    return sums + product * scale_ref[:, pl.ds(n, 1)].astype(jnp.float32)

  sums = jnp.zeros((OUTPUTS, half if is_sum else PADDED_ROWS), jnp.float32)
  sums = jax.lax.fori_loop(0, scale_ref.shape[1], add, sums)
  y_ref[...] = finished(is_sum, sums)


def partial(is_sum: bool, x_RI: jax.Array, numbers_OI: jax.Array) -> jax.Array:
  """Products of one row, (O, I), to be summed at the end; or of all rows, (O, R)."""
  if is_sum:
    return numbers_OI.astype(jnp.float32) * x_RI.astype(jnp.float32)
  return jax.lax.dot_general(
    numbers_OI.astype(x_RI.dtype),
    x_RI,
    (((1,), (1,)), ((), ())),
    precision=jax.lax.Precision.HIGHEST if x_RI.dtype == jnp.float32 else None,
    preferred_element_type=jnp.float32,
  )


def finished(is_sum: bool, sums: jax.Array) -> jax.Array:
  return sums.sum(1, keepdims=True) if is_sum else sums
