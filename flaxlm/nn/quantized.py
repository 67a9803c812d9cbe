# SPDX-License-Identifier: Apache-2.0
"""Numbers in 8 bits with scales: caches, weights for decoding, and products in training.

`projected` is where a projection of a block chooses its product, by `training.matmul`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from flaxlm.nn.execution import NARROW_PRODUCT
from flaxlm.nn.kernels.products import rows_dot


class Narrow(NamedTuple):
  """Numbers in int8: `values` times `scales`."""

  values: jax.Array  # int8
  scales: jax.Array  # float32; dims that share a scale have size 1


def narrowed(x: jax.Array, dims: int | tuple[int, ...] = -1) -> Narrow:
  """int8 with one scale for all numbers along `dims`: 1/127 of the largest of them."""
  x = x.astype(jnp.float32)
  scales = jnp.maximum(jnp.abs(x).max(dims, keepdims=True), 1e-30) / 127
  return Narrow(jnp.round(x / scales).astype(jnp.int8), scales)


def widened(x: jax.Array | Narrow, dtype: jnp.dtype) -> jax.Array:
  if isinstance(x, Narrow):
    return (x.values.astype(jnp.float32) * x.scales).astype(dtype)
  return x.astype(dtype)


def projected(
  matmul: str,
  x: jax.Array,
  kernel: jax.Array,
  contracted: int,
  dtype: jnp.dtype | None = None,
) -> jax.Array:
  """`rows_dot` in the way that `training.matmul` names; "full" keeps the dtypes."""
  if matmul == "full":
    return rows_dot(x, kernel, contracted, dtype)
  assert dtype is None, "a head's product is full"
  return checkpoint_name(NARROW_DOTS[matmul](x, kernel, contracted), NARROW_PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def int8_dot(x: jax.Array, kernel: jax.Array, contracted: int) -> jax.Array:
  """`rows_dot` of both operands in int8, in the dtype of `x`.

  Rounding counts as the identity (straight through). The gradient of `x` is such a product,
  too. That of the kernel is full: it sums over all tokens, and the error of rounding grows
  with the number of terms (SwitchBack; Wortsman et al., 2023, section 2.2).
  """
  return int8_product(x, kernel, contracted).astype(x.dtype)


def _int8_dot_backward(contracted: int, operands: tuple, grad: jax.Array) -> tuple:
  x, kernel = operands
  dims = tuple(range(kernel.ndim))
  outputs_first = kernel.transpose(*dims[contracted:], *dims[:contracted])
  grad_x = int8_product(grad, outputs_first, kernel.ndim - contracted).astype(x.dtype)
  of_kernel = jax.linear_transpose(lambda kernel: rows_dot(x, kernel, contracted), kernel)
  return grad_x, *of_kernel(grad)


int8_dot.defvjp(
  lambda x, kernel, contracted: (int8_dot(x, kernel, contracted), (x, kernel)),
  _int8_dot_backward,
)


def int8_product(x: jax.Array, kernel: jax.Array, contracted: int) -> jax.Array:
  """A product of int8 numbers, summed in int32, then scaled; float32.

  Each row of `x` has a scale, so that no token depends on others, and each output of the
  kernel (AQT; Abdolrashidi et al., 2021, section 3).
  """
  narrow_x = narrowed(x, tuple(range(x.ndim - contracted, x.ndim)))
  narrow_kernel = narrowed(kernel, tuple(range(contracted)))
  sums = rows_dot(narrow_x.values, narrow_kernel.values, contracted, jnp.dtype(jnp.int32))
  outputs = kernel.shape[contracted:]
  rows = narrow_x.scales.reshape(*x.shape[: x.ndim - contracted], *[1] * len(outputs))
  return sums.astype(jnp.float32) * rows * narrow_kernel.scales.reshape(outputs)


NARROW_DOTS = {"int8": int8_dot}
