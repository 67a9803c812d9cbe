# SPDX-License-Identifier: Apache-2.0
"""Numbers in 8 bits with scales: caches, weights for decoding, and products in training.

`projected` is where a projection of a block chooses its product, by `training.matmul`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from flaxlm.nn.execution import NARROW_PRODUCT
from flaxlm.nn.kernels.products import cpu_dot, rows_dot, suits_cpu


class Narrow(NamedTuple):
  """Numbers in 8 bits: `values` times `scales`."""

  values: jax.Array  # int8, or 8-bit floats
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
  """`rows_dot` in the way that `Execution.product` names; "full" keeps the dtypes."""
  if matmul == "full" or (matmul == "cpu" and not suits_cpu(x, contracted)):
    return rows_dot(x, kernel, contracted, dtype)
  assert dtype is None, "a head's product is full"
  return checkpoint_name(PRODUCTS[matmul](x, kernel, contracted), NARROW_PRODUCT)


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


# Of operands, and of gradients, whose range is wider (Micikevicius et al., 2022).
OPERANDS, GRADIENTS = jnp.float8_e4m3fn, jnp.float8_e5m2


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def fp8_dot(x: jax.Array, kernel: jax.Array, contracted: int) -> jax.Array:
  """`rows_dot` of operands in 8-bit floats, in the dtype of `x`; so are its gradients.

  Each array has one scale, from its largest number in this step. XLA's compiler for GPUs
  makes one product of 8-bit floats of it, from Ada on; others widen first, and compute the
  same. Rounding counts as the identity (straight through). What is kept for the backward
  pass has 8 bits.
  """
  return _fp8_dot_forward(x, kernel, contracted)[0]


def _fp8_dot_forward(x: jax.Array, kernel: jax.Array, contracted: int) -> tuple:
  operands = fp8(x, OPERANDS), fp8(kernel, OPERANDS)
  wide_x, wide_kernel = (widened_fp8(one, x.dtype) for one in operands)
  return rows_dot(wide_x, wide_kernel, contracted), operands


def _fp8_dot_backward(contracted: int, operands: tuple, grad: jax.Array) -> tuple:
  x, kernel = (widened_fp8(one, grad.dtype) for one in operands)
  grad = widened_fp8(fp8(grad, GRADIENTS), grad.dtype)
  product = lambda x, kernel: rows_dot(x, kernel, contracted)
  (grad_x,) = jax.linear_transpose(lambda x: product(x, kernel), x)(grad)
  (grad_kernel,) = jax.linear_transpose(lambda kernel: product(x, kernel), kernel)(grad)
  return grad_x, grad_kernel


fp8_dot.defvjp(_fp8_dot_forward, _fp8_dot_backward)


def fp8(x: jax.Array, dtype: Any) -> Narrow:
  """8-bit floats with one scale, the power of two that brings the largest below theirs: a
  product with it is exact in every dtype."""
  most = float(jnp.finfo(dtype).max)
  largest = jnp.maximum(jnp.abs(x).max().astype(jnp.float32), 1e-30)
  scale = jnp.ldexp(jnp.float32(1), jnp.frexp(largest / most)[1])
  return Narrow((x.astype(jnp.float32) / scale).astype(dtype), scale)


def widened_fp8(x: Narrow, dtype: jnp.dtype) -> jax.Array:
  return x.values.astype(dtype) * x.scales.astype(dtype)


PRODUCTS: dict[str, Callable[..., jax.Array]] = {
  "int8": int8_dot,
  "fp8": fp8_dot,
  "cpu": cpu_dot,
}
