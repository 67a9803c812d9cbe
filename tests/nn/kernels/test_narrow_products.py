# SPDX-License-Identifier: Apache-2.0
"""Products of narrow numbers: every form is the same product, and so are its gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh_of

from flaxlm.config import NO_KERNEL, SPLASH, TILED, TrainingConfig
from flaxlm.nn.execution import Execution
from flaxlm.nn.kernels.products import (
  cpu_dot,
  matrix_dot,
  matrix_first,
  matrix_first_on_cpu,
  matrix_sum,
  rows_dot,
  suits_cpu,
  table_dot,
  turned,
  wide_dot,
)
from flaxlm.nn.quantized import projected


def few_rows(kind: str, rows: int, inputs: int) -> tuple[jax.Array, jax.Array, np.ndarray]:
  """Rows, a matrix of this kind, and their product."""
  x = jax.random.normal(jax.random.key(0), (rows, inputs))
  matrix = jax.random.normal(jax.random.key(1), (40, inputs))
  if kind == "int8":
    matrix = jnp.round(40 * matrix).astype(jnp.int8)
  elif kind == "bfloat16":
    x, matrix = x.astype(kind), matrix.astype(kind)
  elif kind == "wide x":
    matrix = matrix.astype(jnp.bfloat16)
  return x, matrix, np.float64(x) @ np.float64(matrix).T


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "wide x", "int8"])
@pytest.mark.parametrize("rows", [0, 1, 2, 4, 5])
def test_all_forms_of_a_few_rows_are_their_product(kind, rows):
  x, matrix, exact = few_rows(kind, rows, 96)
  for form in (matrix_first, matrix_first_on_cpu, *([matrix_sum] if rows == 1 else [])):
    found = jax.jit(form)(x, matrix, None)
    assert found.shape == (rows, 40) and found.dtype == jnp.float32
    np.testing.assert_allclose(
      found, exact, rtol=1e-5, atol=1e-4 * abs(exact).max(initial=1)
    )


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("inputs", [4095, 4096, 5000])
def test_a_long_row_of_int8_is_multiplied_in_parts(rows, inputs):
  x, matrix, exact = few_rows("int8", rows, inputs)
  found = jax.jit(matrix_first_on_cpu)(x, matrix, None)
  np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-5 * abs(exact).max())


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_row_that_is_not_finite_spoils_no_other(number):
  x, matrix, exact = few_rows("int8", 4, 96)
  found = jax.jit(matrix_first_on_cpu)(x.at[0, 0].set(number), matrix, None)
  assert not np.isfinite(found[0]).any()
  np.testing.assert_allclose(found[1:], exact[1:], rtol=1e-5, atol=1e-4 * abs(exact).max())


@pytest.mark.parametrize("kind", ["bfloat16", "wide x", "int8"])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_cpu_computes_a_row_once_and_not_for_each_output(kind, rows):
  """In a loop, as of tokens: the matrix is widened inside the product that reads it, and
  what makes the row is outside."""
  x, matrix, _ = few_rows(kind, rows, 96)

  def steps(x, matrix):
    def step(x, _):
      y = matrix_dot(jnp.tanh(x), {"matrix": matrix, "scale": jnp.ones(40)})
      return jnp.pad(y.astype(x.dtype), ((0, 0), (0, 56))), None

    return jax.lax.scan(step, x, length=4)[0]

  text = jax.jit(steps).lower(x, matrix).compile().as_text()
  products = [part for part in text.split("\n\n") if " dot(" in part]
  loops = [line for line in text.splitlines() if " while(" in line]
  assert products and not any(" tanh(" in part for part in products)
  assert loops and not any("f32[40,96]" in line for line in loops)


def test_a_wide_product_has_narrow_gradients():
  x = jax.random.normal(jax.random.key(0), (2, 12, 32), jnp.bfloat16)
  kernel = jax.random.normal(jax.random.key(1), (32, 24), jnp.bfloat16)
  weights = jax.random.normal(jax.random.key(2), (2, 12, 24))

  def weighted(x, kernel, dot):
    return (dot(x, kernel) * weights).sum()

  wide = lambda x, kernel: rows_dot(x, kernel, 1, jnp.float32)
  exact = lambda x, kernel: jnp.matmul(x, kernel, precision="highest")
  assert wide(x, kernel).dtype == jnp.float32
  found = jax.grad(weighted, (0, 1))(x, kernel, wide)
  expected = jax.grad(weighted, (0, 1))(jnp.float32(x), jnp.float32(kernel), exact)
  for ours, exactly in zip(found, expected, strict=True):
    assert ours.dtype == jnp.bfloat16
    error = np.linalg.norm(np.float32(ours) - exactly) / np.linalg.norm(exactly)
    assert error < 5e-3


def multiplied(function, *arguments, platform: str = "cpu") -> set[tuple[str, ...]]:
  """The dtypes of the products' operands and results in a lowered function."""
  traced = jax.jit(function).trace(*arguments)
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  lines = [line for line in text.splitlines() if "dot_general" in line]
  assert lines
  return {tuple(re.findall(r"x([a-z]\w*)>", line.rsplit(" : ")[1])) for line in lines}


@pytest.mark.parametrize("inputs", [0, 1])
def test_all_products_of_a_narrow_head_take_narrow_operands(inputs):
  """On a CPU, those of the gradients are summed in float32 and then rounded, because XLA
  widens the operands of others."""
  x = jnp.ones((12, 32), jnp.bfloat16)
  kernel = jnp.ones((32, 24) if inputs == 0 else (24, 32), jnp.bfloat16)
  gradients = jax.grad(lambda x, kernel: wide_dot(x, kernel, inputs).sum(), (0, 1))
  assert multiplied(gradients, x, kernel) == {("bf16", "bf16", "f32")}
  assert multiplied(gradients, x, kernel, platform="tpu") == {("bf16", "bf16", "bf16")}


@pytest.mark.parametrize("rows", [12, 13])  # blocks of 4 rows, and no block
def test_a_product_on_a_cpu_is_the_same(rows):
  """Of a projection and of a table: a rounding of 16 bits apart from exact products."""
  x = jax.random.normal(jax.random.key(0), (rows, 4, 8), jnp.bfloat16)
  kernel = jax.random.normal(jax.random.key(1), (4, 8, 24), jnp.bfloat16)
  table = jax.random.normal(jax.random.key(2), (24, 32), jnp.bfloat16)
  grad = jax.random.normal(jax.random.key(3), (rows, 24))

  def both(projected, looked_up):
    def run(x, kernel, table):
      y, logits = projected(x, kernel), looked_up(x.reshape(1, rows, 32), table)
      return (y.astype(jnp.float32) * grad).sum() + (logits * grad).sum(), (y, logits)

    (_, values), gradients = jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(
      x, kernel, table
    )
    return *values, *gradients

  found = both(lambda x, kernel: cpu_dot(x, kernel, 2), table_dot)
  exact = lambda x, y: jnp.tensordot(jnp.float32(x), jnp.float32(y), y.ndim - 1)
  expected = both(exact, lambda x, table: exact(x, table.T))
  assert [x.dtype for x in found] == [jnp.bfloat16, jnp.float32, *[jnp.bfloat16] * 3]
  for ours, exactly in zip(found, expected, strict=True):
    error = np.linalg.norm(np.float32(ours) - np.float32(exactly))
    assert error < 5e-3 * np.linalg.norm(np.float32(exactly))


@pytest.mark.parametrize("shape", [(12, 5), (13, 5), (32, 48), (1, 7)])
def test_a_turned_matrix_is_its_transpose(shape):
  x = jnp.arange(shape[0] * shape[1], dtype=jnp.float32).reshape(shape)
  np.testing.assert_array_equal(jax.jit(turned)(x), x.T)


def test_only_a_cpu_has_products_of_its_own():
  for dtype in ("float32", "bfloat16"):
    for matmul in ("full", "int8"):
      training = TrainingConfig(dtype=dtype, matmul=matmul)
      for kernel in (NO_KERNEL, SPLASH):
        assert Execution.of(training, kernel).product == matmul
      own = "cpu" if matmul == "full" else "int8"
      assert Execution.of(training, TILED).product == own
  assert suits_cpu(jnp.ones((2, 3, 4), jnp.bfloat16), 1)
  assert suits_cpu(jnp.ones((2, 256, 4)), 1)
  assert not suits_cpu(jnp.ones((1, 256, 4, 4)), 2)


@pytest.mark.parametrize("outputs", [4, 8])  # the operand with fewer columns is turned
def test_many_rows_on_a_cpu_have_the_same_gradients(outputs):
  x = jax.random.normal(jax.random.key(0), (2, 1024, 6))
  kernel = jax.random.normal(jax.random.key(1), (6, outputs))

  def gradients(dot):
    squares = lambda x, kernel: (dot(x, kernel) ** 2).sum()
    return jax.jit(jax.grad(squares, (0, 1)))(x, kernel)

  found = gradients(lambda x, kernel: projected("cpu", x, kernel, 1))
  expected = gradients(lambda x, kernel: jnp.matmul(x, kernel, precision="highest"))
  for ours, exactly in zip(found, expected, strict=True):
    np.testing.assert_allclose(ours, exactly, rtol=1e-4, atol=1e-2)


def test_eigen_computes_the_products_of_many_rows():
  """XLA's CPU compiler would give them to YNNPACK, and has no fast convolution of rows."""
  x = jnp.ones((2, 256, 48))
  kernel = jnp.ones((48, 32))
  weights = jnp.ones((2, 256, 32))
  loss = lambda x, kernel: (jnp.tanh(projected("cpu", x, kernel, 1)) * weights).sum()
  compiled = jax.jit(jax.grad(loss, (0, 1))).lower(x, kernel).compile()
  text = compiled.as_text()
  assert len(re.findall(r"= f32\S+ dot\(", text)) == 3
  assert " convolution(" not in text and "__ynn_fusion" not in text


@pytest.mark.parametrize(("outputs", "convolutions"), [(512, 3), (513, 1)])
def test_a_large_kernel_is_not_turned_for_few_rows(outputs, convolutions):
  """Its transpose costs more than Eigen gains: both gradients are plain products."""
  x = jax.random.normal(jax.random.key(0), (512, 512))
  kernel = jax.random.normal(jax.random.key(1), (512, outputs)) / 16
  loss = lambda dot, x, kernel: jnp.tanh(dot(x, kernel)).sum()
  gradients = jax.jit(jax.grad(loss, (1, 2)), static_argnums=0)
  ours = lambda x, kernel: projected("cpu", x, kernel, 1)
  lowered = gradients.lower(ours, x, kernel).as_text()
  assert lowered.count("stablehlo.convolution") == convolutions
  exact = lambda x, kernel: jnp.matmul(x, kernel, precision="highest")
  for found, exactly in zip(
    gradients(ours, x, kernel), gradients(exact, x, kernel), strict=True
  ):
    np.testing.assert_allclose(found, exactly, rtol=1e-4, atol=1e-3)


def test_a_product_over_a_mesh_is_not_turned():
  """The product's form would ask for a number of each row, from another device."""
  with jax.set_mesh(mesh_of(data=2)):
    assert not suits_cpu(jnp.ones((2, 1024, 4)), 1)
