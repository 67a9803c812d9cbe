# SPDX-License-Identifier: Apache-2.0
"""Narrow matrices and a few rows: int4 is what it says, the kernel is the product."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow_but

from flaxlm.decoding.weights import pack, quantise
from flaxlm.errors import ConfigError
from flaxlm.nn.kernels import few_rows
from flaxlm.nn.kernels.few_rows import few_rows_dot, obstacle
from flaxlm.nn.kernels.int4 import group_size, packed_int4, unpacked
from flaxlm.nn.kernels.products import matrix_dot


def normal(seed: int, *shape: int) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def read_int4(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
  """By numpy, byte by byte: the low half is an input, the high one half a group later."""
  O, G = scales.shape
  half = packed.shape[1] // G
  wide = np.zeros((O, G * 2 * half))
  for group in range(G):
    for place in range(half):
      for high in range(2):
        nibble = packed[:, group * half + place].astype(int) >> 4 * high & 15
        number = np.where(nibble < 8, nibble, nibble - 16)
        wide[:, (2 * group + high) * half + place] = number * scales[:, group]
  return wide


@pytest.mark.parametrize("num_inputs", [256, 96, 6])
def test_int4_is_within_its_rounding(num_inputs):
  """No number is further off than half a step of 1/7 of its group's largest, or clipped for
  a smaller error of the whole group."""
  matrix = normal(0, 8, num_inputs)
  matrix[3] = 0
  packed, scales = packed_int4(jnp.asarray(matrix))
  size = group_size(num_inputs)
  assert packed.shape == (8, num_inputs // 2) and packed.dtype == jnp.uint8
  assert scales.shape == (8, num_inputs // size) and scales.dtype == jnp.bfloat16
  wide = read_int4(np.asarray(packed), np.float32(scales))
  np.testing.assert_allclose(unpacked(packed, scales, jnp.float32), wide, rtol=1e-6)
  of_groups = lambda x: x.reshape(8, -1, size)
  largest = np.abs(of_groups(matrix)).max(-1, keepdims=True)
  plain = np.round(of_groups(matrix) / np.maximum(largest, 1e-30) * 7) * largest / 7
  squared = lambda x: np.square(of_groups(matrix) - x).sum(-1)
  if size > 2:  # of two numbers, one has no error but that of its scale in bfloat16
    assert (squared(of_groups(wide)) <= squared(plain) * 1.03 + 1e-12).all()
    assert squared(of_groups(wide)).sum() < 0.98 * squared(plain).sum()
  relative = np.linalg.norm(wide - matrix) / np.linalg.norm(matrix)
  assert 0.01 < relative < 0.13


def test_an_odd_number_of_inputs_is_refused():
  with pytest.raises(ConfigError, match="even number of inputs, not 5"):
    pack(jnp.ones((4, 5)))


def narrow(kind: str, matrix: np.ndarray) -> dict[str, jax.Array]:
  values, scale = (pack if kind == "int4" else quantise)(jnp.asarray(matrix))
  return {"matrix": values, "scale": scale}


def wide_of(params: dict[str, jax.Array]) -> np.ndarray:
  matrix, scale = (np.asarray(params[name]) for name in ("matrix", "scale"))
  if matrix.dtype == np.uint8:
    return read_int4(matrix, scale.astype(np.float32))
  return matrix * scale[:, None].astype(np.float64)


CASES = [
  (kind, rows, dtype)
  for kind in ("int4", "int8")
  for rows in (1, 2, 8)
  for dtype in ("bfloat16", "float32")
]
FAST = [("int4", 1, "bfloat16"), ("int4", 8, "float32"), ("int8", 2, "bfloat16")]


@pytest.mark.parametrize("case", slow_but(FAST, CASES))
def test_the_kernel_is_the_product(case):
  kind, rows, dtype = case
  params = narrow(kind, normal(1, 32, 384))
  x = jnp.asarray(normal(2, rows, 384), dtype)
  exact = np.float64(x) @ wide_of(params).T
  found = few_rows_dot(x, params, interpreted=True)
  assert found.shape == (rows, 32) and found.dtype == jnp.float32
  np.testing.assert_allclose(found, exact, atol=2e-6 * abs(exact).max())
  plain = matrix_dot(x, params)  # rounds widened int4 to the dtype of x
  off = 2e-3 if (kind, dtype) == ("int4", "bfloat16") else 2e-6
  np.testing.assert_allclose(found, plain, atol=off * abs(exact).max())


def test_a_projection_takes_the_kernel_that_was_asked_for(monkeypatch):
  """Up to eight rows; more of them, wide matrices and no name go XLA's way."""
  calls = []

  def spied(x, params):
    calls.append(x.shape[0])
    return few_rows_dot(x, params, interpreted=True)

  monkeypatch.setattr(few_rows, "few_rows_dot", spied)
  params = narrow("int4", normal(1, 16, 128)) | {"bias": jnp.arange(16.0)}
  for rows in (3, 8, 9):
    x = jnp.asarray(normal(2, rows, 128))
    found = matrix_dot(x, params, "pallas")
    np.testing.assert_allclose(found, matrix_dot(x, params), atol=1e-4)
  matrix_dot(x[:1], {"matrix": jnp.ones((16, 128))}, "pallas")
  assert calls == [3, 8]


@pytest.mark.skipif(
  jax.__version_info__ >= (0, 11), reason="jax 0.11 asks the GPU that is there for its kind"
)
@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("rows", [1, 8])
def test_it_compiles_to_triton_for_gpus(kind, rows):
  """What Pallas hands to XLA for a GPU, made on a machine without one."""
  params = narrow(kind, normal(1, 32, 256))
  traced = jax.jit(functools.partial(few_rows_dot)).trace(jnp.ones((rows, 256)), params)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("xla.gpu.triton") == 1
  assert f"{kind}_kernel" in text


def test_sizes_that_it_cannot_multiply_are_named():
  assert obstacle(4096, 4096) is None
  assert "24 x 128 weights" in str(obstacle(24, 128))
  assert "32 x 96 weights" in str(obstacle(32, 96))
