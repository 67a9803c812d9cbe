# SPDX-License-Identifier: Apache-2.0
"""Products of narrow numbers: every form is the same product, and so are its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxlm.nn.kernels.products import matrix_first, matrix_sum, rows_dot, wide_dot


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_a_sum_is_the_product_of_one_row(kind):
  """The form that GPUs use for one row equals the form that all others use."""
  x = jax.random.normal(jax.random.key(0), (1, 96))
  matrix = jax.random.normal(jax.random.key(1), (40, 96))
  if kind == "int8":
    matrix = jnp.round(40 * matrix).astype(jnp.int8)
  else:
    x, matrix = x.astype(kind), matrix.astype(kind)
  exact = np.float64(x) @ np.float64(matrix).T
  for form in (matrix_sum, matrix_first):
    found = jax.jit(form)(x, matrix)
    assert found.shape == (1, 40) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-4 * abs(exact).max())


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
  # No product of it runs in float32.
  jaxpr = jax.make_jaxpr(jax.grad(lambda x, k: wide_dot(x, k).sum(), (0, 1)))(x[0], kernel)
  products = [eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "dot_general"]
  assert products
  assert all(var.aval.dtype == jnp.bfloat16 for eqn in products for var in eqn.invars)
