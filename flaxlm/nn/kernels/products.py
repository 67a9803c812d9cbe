# SPDX-License-Identifier: Apache-2.0
"""Products with weights: rows times a matrix in training, a matrix times rows in decoding.

Equal to `jnp.tensordot`. In decoding, a matrix that is laid out for it is multiplied by a
few rows, in the order that reads it fastest.
"""

import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from flaxlm.nn.kernels.fusion import unfused
from flaxlm.nn.kernels.int4 import FEW_ROWS, unpacked
from flaxlm.sharding import axis_sizes_in_use, is_cut

# Of narrow matrices on a CPU, see `matrix_first_on_cpu`.
BYTES_BY_ROW = 4  # of a number times rows that are multiplied one by one: 8 are no gain
MOST_INPUTS, PART = 4095, 1024  # of int8
# The smaller dim of a float32 matrix that is read faster in a loop than by XLA's product of
# one row; from 0.11 on, such loops are not vectorised.
MOST_LOOPED = 512 if jax.__version_info__ < (0, 11) else 0
MANY_ROWS = 512  # fewer are worth less than the time to compile a form of their own
MOST_WEIGHTS_A_ROW = 512  # of a turned kernel: 768 x 768 for 1,024 rows is a loss


def rows_dot(
  x: jax.Array, kernel: jax.Array, contracted: int, dtype: jnp.dtype | None = None
) -> jax.Array:
  """Contracts the last `contracted` dims of `x` with the first ones of `kernel`.

  It is one plain matrix product: all kept dims of `x` are merged into rows. On a CPU the
  backward pass of a 3-D product runs at two thirds of the speed of a 2-D one. Rows that are
  sharded over the mesh are not merged, because that would gather them first.
  """
  if is_cut("norm_length"):
    return jnp.tensordot(x, kernel, contracted, preferred_element_type=dtype)
  if dtype == jnp.float32 and x.dtype != dtype:
    return in_rows(wide_dot, x, kernel, contracted)
  plain_dot = functools.partial(jnp.dot, preferred_element_type=dtype)
  return in_rows(plain_dot, x, kernel, contracted)


def in_rows(
  dot: Callable[[jax.Array, jax.Array], jax.Array],
  x: jax.Array,
  kernel: jax.Array,
  contracted: int,
) -> jax.Array:
  """`dot` of both as matrices: all kept dims of `x` are its rows."""
  size = math.prod(kernel.shape[:contracted])
  y_RO = dot(x.reshape(-1, size), kernel.reshape(size, -1))
  return y_RO.reshape(x.shape[: x.ndim - contracted] + kernel.shape[contracted:])


def table_dot(x_BTD: jax.Array, table_VD: jax.Array) -> jax.Array:
  """The product of rows and of the rows of a table, (B, T, V) in float32."""
  is_wide = x_BTD.dtype == jnp.float32
  if is_cut("norm_length") or (is_wide and not suits_cpu(x_BTD, 1)):
    return rows_dot(x_BTD, table_VD.T, 1, jnp.dtype(jnp.float32))
  y_RV = wide_dot(x_BTD.reshape(-1, x_BTD.shape[-1]), table_VD, 1)
  return y_RV.reshape(*x_BTD.shape[:-1], -1)


def suits_cpu(x: jax.Array, contracted: int) -> bool:
  """Whether `cpu_dot` is worth it: for all 16-bit arrays, and for many rows of others."""
  rows = math.prod(x.shape[: x.ndim - contracted])
  return is_one_device() and (x.dtype.itemsize == 2 or rows >= MANY_ROWS)


def is_one_device() -> bool:
  return math.prod(axis_sizes_in_use().values()) == 1


def cpu_dot(x: jax.Array, kernel: jax.Array, contracted: int) -> jax.Array:
  """`rows_dot` as XLA's CPU compiler has the fastest kernels for it and for its gradients.

  Products of 16-bit arrays are summed in float32 and then rounded: of these it makes what
  a CPU's matrix units (AMX) compute, ten times as fast as what it widens. Those of float32
  are Eigen's. And the gradient of a kernel is a product whose first operand is turned
  before (docs/LOG.md).
  """
  return in_rows(wide_dot, x, kernel, contracted).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def wide_dot(x_RI: jax.Array, kernel: jax.Array, inputs: int = 0) -> jax.Array:
  """A product in float32, whose gradients have the dtype of the operands.

  `inputs` is the dim of the kernel that is contracted. By default the gradient of 16-bit
  matrices would stay float32 and the kernel would be widened to it, so that two of the
  three products of a head would run in float32.
  """

  def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return dot(x, kernel, 1, inputs, jnp.float32)

  if x_RI.dtype != jnp.float32 or not is_one_device():
    return plain(x_RI, kernel)
  on_cpu = functools.partial(product_on_cpu, inputs=inputs)
  return jax.lax.platform_dependent(x_RI, kernel, cpu=on_cpu, default=plain)


def _wide_dot_backward(
  inputs: int, operands: tuple[jax.Array, jax.Array], grad_RO: jax.Array
) -> tuple[jax.Array, jax.Array]:
  x_RI, kernel = operands
  dtype, outputs = x_RI.dtype, 1 - inputs

  def plain(x: jax.Array, kernel: jax.Array, grad: jax.Array) -> tuple:
    of_kernel = (x, grad) if outputs else (grad, x)
    return dot(grad, kernel, 1, outputs, dtype), dot(*of_kernel, 0, 0, dtype)

  def on_cpu(x: jax.Array, kernel: jax.Array, grad: jax.Array) -> tuple:
    of_x = product_on_cpu(grad, kernel, outputs).astype(dtype)
    if not is_worth_turning(x, kernel):
      return of_x, plain(x, kernel, grad)[1]
    first, second = (x, grad) if x.shape[1] <= grad.shape[1] else (grad, x)
    of_kernel = product_on_cpu(unfused(turned)(first), second, 0).astype(dtype)
    return of_x, of_kernel if (first is x) == (inputs == 0) else turned(of_kernel)

  arrays = x_RI, kernel, grad_RO.astype(dtype)
  if not is_one_device():
    return plain(*arrays)
  return jax.lax.platform_dependent(*arrays, cpu=on_cpu, default=plain)


wide_dot.defvjp(
  lambda x, kernel, inputs: (wide_dot(x, kernel, inputs), (x, kernel)), _wide_dot_backward
)


def product_on_cpu(x_RI: jax.Array, kernel: jax.Array, inputs: int) -> jax.Array:
  """The product over the columns of x and dim `inputs` of a kernel, in float32.

  XLA's CPU compiler gives float32 products to YNNPACK, which takes up to 1.4 times as long
  for them as Eigen (docs/LOG.md). Of a convolution over one place it makes a product, too,
  but only after it has chosen, so that Eigen computes it. It turns a kernel for that whose
  second dim is contracted.
  """
  is_wide = x_RI.dtype == jnp.float32
  if not is_wide or (inputs == 1 and not is_worth_turning(x_RI, kernel)):
    return dot(x_RI, kernel, 1, inputs, jnp.float32)
  dims = ("NWC", "WIO" if inputs == 0 else "WOI", "NWC")
  return jax.lax.conv_general_dilated(
    x_RI[None], kernel[None], (1,), "VALID", dimension_numbers=dims
  )[0]


def is_worth_turning(x_RI: jax.Array, kernel: jax.Array) -> bool:
  """Whether a product of these rows gains more than its operand's transpose costs."""
  return x_RI.dtype != jnp.float32 or kernel.size <= MOST_WEIGHTS_A_ROW * len(x_RI)


def dot(x: jax.Array, y: jax.Array, of_x: int, of_y: int, dtype: jnp.dtype) -> jax.Array:
  """The product over dim `of_x` of one matrix and `of_y` of the other."""
  dims = (((of_x,), (of_y,)), ((), ()))
  return jax.lax.dot_general(x, y, dims, preferred_element_type=dtype)


def turned(x: jax.Array) -> jax.Array:
  """The transpose of a matrix as an array of its own, for XLA's CPU compiler.

  Otherwise it has a product read its first operand turned, for which its fastest kernels
  have no form. A barrier keeps the two apart, and a third dim has the array laid out.
  """
  barrier = jax.lax.optimization_barrier
  rows, columns = x.shape
  block = math.gcd(rows, 16)
  if block == 1:
    return barrier(barrier(x).T)
  turned_CRB = barrier(barrier(x).reshape(rows // block, block, columns).transpose(2, 0, 1))
  return turned_CRB.reshape(columns, rows)


def matrix_dot(
  x: jax.Array, params: Mapping[str, jax.Array], kernel: str | None = None
) -> jax.Array:
  """x . matrix^T (+ bias), (R, outputs), for parameters laid out for decoding.

  An int8 matrix has a scale per output, which is applied to the result; int4 numbers, two
  in a byte, have one for each group of inputs. "pallas" is the kernel of few_rows.py, for
  few rows and narrow matrices; None: XLA's products.
  """
  matrix = params["matrix"]
  is_int4 = matrix.dtype == jnp.uint8
  x_RI = x.reshape(-1, matrix.shape[1] * (2 if is_int4 else 1))
  if kernel == "pallas" and "scale" in params and x_RI.shape[0] <= FEW_ROWS:
    from flaxlm.nn.kernels.few_rows import few_rows_dot  # Pallas takes time to import

    y = few_rows_dot(x_RI, params)
  else:
    scales = params["scale"] if is_int4 else None
    on_cuda = matrix_sum if x_RI.shape[0] == 1 else matrix_first
    y = jax.lax.platform_dependent(
      *(x_RI, matrix, scales), cpu=matrix_first_on_cpu, cuda=on_cuda, default=matrix_first
    )
    if "scale" in params and not is_int4:
      y *= params["scale"]
  if "bias" in params:
    y += params["bias"].reshape(-1)
  return y


def matrix_first(x_RI: jax.Array, matrix: jax.Array, scales: jax.Array | None) -> jax.Array:
  """The product with the matrix as first operand: for a few rows on a CPU, up to 1.8 times
  as fast as with x first (docs/LOG.md). `scales` are those of int4 numbers."""
  return dot(wide(tied_to(x_RI, matrix), scales, x_RI.dtype), x_RI, 1, 1, jnp.float32).T


def matrix_first_on_cpu(
  x_RI: jax.Array, matrix: jax.Array, scales: jax.Array | None
) -> jax.Array:
  """`matrix_first` for XLA's CPU compiler, which by itself would lose most of what narrow
  numbers gain (docs/LOG.md).

  It would widen the matrix once, before a loop over tokens, and the loop would read the
  wide one; and it would compute x, as a norm or an activation makes it, again for each row
  of a matrix that it widens inside the product. A conditional keeps both out. It widens
  inside a product only with one row of less than 16 KiB: a few rows are multiplied one by
  one, and longer ones in parts. A small wide matrix is read faster by the same
  loop, which a choice that changes nothing stands for. A barrier hides the product from its
  transpose: of both together it makes the product with x first.
  """
  (R, I), is_narrow = x_RI.shape, matrix.dtype.itemsize < 4
  if is_one_device() and scales is None and 1 < R <= BYTES_BY_ROW // matrix.dtype.itemsize:
    row = lambda x_I: matrix_first_on_cpu(x_I[None], matrix, scales)[0]
    return jax.lax.map(row, x_RI)
  is_wide = x_RI.dtype == matrix.dtype == jnp.float32
  in_loop = is_wide and R == 1 and min(matrix.shape) <= MOST_LOOPED

  def product(part: slice = slice(None)) -> jax.Array:
    def multiply(x_RI: jax.Array) -> jax.Array:
      wide_OI = wide(matrix[:, part], scales, x_RI.dtype)
      if in_loop:
        wide_OI = jnp.where(jnp.isnan(x_RI[0, 0]), jnp.nan, wide_OI)
      return dot(wide_OI, x_RI[:, part], 1, 1, jnp.float32)

    y_OR = (unfused(multiply) if R and (is_narrow or in_loop) else multiply)(x_RI)
    return jax.lax.optimization_barrier(y_OR).T

  if matrix.dtype != jnp.int8 or R > 1 or I <= MOST_INPUTS:
    return product()
  parts = (product(slice(n, n + PART)) for n in range(0, I, PART))
  return functools.reduce(jnp.add, parts)


def matrix_sum(x_1I: jax.Array, matrix: jax.Array, scales: jax.Array | None) -> jax.Array:
  """One row's product as a sum, for which XLA's GPU compiler reads the matrix as it is. In
  a matrix product it would be padded, widened and merged with its neighbours, at every
  token."""
  if scales is not None:
    matrix = wide(tied_to(x_1I, matrix), scales, x_1I.dtype)
  return (matrix.astype(jnp.float32) * x_1I.astype(jnp.float32)).sum(-1)[None]


def wide(matrix: jax.Array, scales: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
  """The numbers (O, I) as they are multiplied; int4 ones with their scales."""
  return matrix.astype(dtype) if scales is None else unpacked(matrix, scales, dtype)


def tied_to(x: jax.Array, matrix: jax.Array) -> jax.Array:
  """The matrix, as a value that depends on x.

  Otherwise XLA widens narrow matrices once, before a loop over tokens, and the loop reads
  the wide ones.
  """
  if matrix.dtype == x.dtype:
    return matrix
  return jax.lax.optimization_barrier((matrix, x))[0]
