# SPDX-License-Identifier: Apache-2.0
"""Kernels that no law meets alone: each equals the plain form that it stands for."""

import functools
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_layers import activate as reference

from flaxlm.nn.attention import attend
from flaxlm.nn.kernels.cached import attend_cached
from flaxlm.nn.kernels.fusion import activate, activated, normalised, unfused
from flaxlm.nn.kernels.grouped import (
  blocked_dot,
  blocked_outer,
  grouped_dot,
  ragged_dot,
  ragged_outer,
)
from flaxlm.nn.kernels.products import matrix_dot, rows_dot
from flaxlm.nn.masks import Placement, Scoring, Sight, visible
from flaxlm.planning.compile import TPU_ENVIRONMENT


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_attention_over_a_cache_is_attention(rows, new, everything, kv_heads):
  """One query of each row takes forms of its own (`mix_one`), all others another."""
  N, K, S, H = 4, kv_heads, 12, 32
  q, k, v, bias, sinks = (
    jax.random.normal(jax.random.key(seed), shape)
    for seed, shape in enumerate(
      [(rows, new, N, H), (rows, S, K, H), (rows, S, K, H), (rows, N, new, S), (N,)]
    )
  )
  slots_BT = jnp.arange(5, 5 + rows)[:, None] + jnp.arange(new)
  mask_BTS = visible(Placement(slots_BT), S, window=4 if everything else None)
  sight = Sight(mask_BTS, bias if everything else None)
  scoring = Scoring(H**-0.5, 2.0 if everything else None)
  sinks_N = sinks if everything else None
  expected = jax.jit(lambda: attend(q, k, v, sight, scoring, sinks_N)[0])()
  cached = jax.jit(
    lambda: attend_cached(q, k.swapaxes(1, 2), v.swapaxes(1, 2), sight, scoring, sinks_N)
  )()
  np.testing.assert_allclose(cached, expected, atol=2e-6)


def test_rows_times_a_matrix_are_a_tensor_product():
  x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
  kernel = jax.random.normal(jax.random.key(1), (4, 5, 6, 7))
  np.testing.assert_allclose(
    rows_dot(x, kernel, 2), np.tensordot(x, kernel, 2), rtol=1e-5, atol=1e-5
  )


@pytest.mark.parametrize("rows", [1, 5])
def test_a_matrix_laid_out_for_decoding_is_the_kernel(rows):
  """With the scale of each output, and the bias after it."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal((rows, 1, 16)).astype(np.float32)
  matrix = rng.integers(-127, 128, (24, 16)).astype(np.int8)
  scale, bias = rng.random(24).astype(np.float32), rng.random((4, 6)).astype(np.float32)
  found = jax.jit(matrix_dot)(x, dict(matrix=matrix, scale=scale, bias=bias))
  expected = x[:, 0] @ (matrix * scale[:, None]).T + bias.reshape(-1)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("centred", [False, True])
def test_a_norm_is_its_formula_with_its_gradient(centred, dtype):
  """In bfloat16 its gradient is of sums of products, which change nothing even where a
  row's numbers are nearly equal, or its first is an outlier."""
  x = 3 * jax.random.normal(jax.random.key(0), (2, 3, 768)) + 1
  x = x.at[0, 0].set(3008).at[0, 0, -1].set(3024).at[1, 0, 0].set(300).astype(dtype)
  scale, bias = jax.random.normal(jax.random.key(1), (2, 768))

  def plain(x, scale, bias):
    x = x.astype(jnp.float32)
    centre = x.mean(-1, keepdims=True) if centred else 0
    variance = ((x - centre) ** 2).mean(-1, keepdims=True)
    return (x - centre) / jnp.sqrt(variance + 1e-6) * scale + bias

  norm = functools.partial(normalised, centred, 1e-6)
  assert norm(x, scale, bias).dtype == dtype
  for function in (
    lambda f: f,
    lambda f: jax.grad(lambda *a: (f(*a) ** 2).sum(), (0, 1, 2)),
  ):
    found = jax.tree.leaves(jax.jit(function(norm))(x, scale, bias))
    exact = jax.tree.leaves(jax.jit(function(plain))(x.astype(jnp.float32), scale, bias))
    for ours, theirs in zip(found, exact, strict=True):
      error = np.linalg.norm(np.float32(ours) - theirs) / np.linalg.norm(theirs)
      assert error < (1e-5 if dtype == jnp.float32 else 1e-2)


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "silu", "relu"])
def test_an_activation_that_is_computed_again_is_the_activation(kind):
  h, gate = jax.random.normal(jax.random.key(0), (2, 64))
  gated = lambda h, gate: activate(gate, kind) * h
  np.testing.assert_allclose(activated(kind, h, None), activate(h, kind), rtol=1e-6)
  ours = jax.grad(lambda h, gate: activated(kind, h, gate).sum(), (0, 1))(h, gate)
  plain = jax.grad(lambda h, gate: gated(h, gate).sum(), (0, 1))(h, gate)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, plain
  )


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "silu", "relu"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_activation_is_rounded_once(kind, dtype):
  """Beside float64: few roundings of float32 or, on top of them, one of bfloat16."""
  x = jnp.linspace(-12, 12, 4_001).astype(dtype)
  gate = jnp.cos(x)
  for found, exact in [
    (activated(kind, x, None), reference(kind, np.float64(x))),
    (activated(kind, x, gate), reference(kind, np.float64(gate)) * np.float64(x)),
  ]:
    assert found.dtype == dtype
    few = 2.0**-22 * abs(np.float64(x))
    once = 0 if dtype == jnp.float32 else 2.0**-8 * abs(exact)
    assert (abs(np.float64(found) - exact) <= few + once).all()


@pytest.mark.parametrize("first", [-3, 0, 7])
def test_tables_kept_apart_are_the_tables(first):
  """Whichever branch of the conditional runs."""
  tables = lambda x: (jnp.cos(x * 0.1), jnp.sin(x * 0.1))
  x = jnp.arange(first, first + 5)
  jax.tree.map(
    np.testing.assert_array_equal, jax.jit(unfused(tables))(x), jax.jit(tables)(x)
  )


@pytest.mark.parametrize("sizes", [[0, 170, 90], [128, 128, 44], [0, 0, 0], [1, 0, 2]])
@pytest.mark.parametrize("rows", [300, 3])
def test_both_grouped_products_equal_a_loop_over_groups(rows, sizes):
  """Groups of several blocks, of none, and rows of no group, which become zero."""
  sizes = sizes if sum(sizes) <= rows else [0, 2, 1]
  rng = np.random.default_rng(0)
  x_MD, kernel_EDF, y_MF = (
    rng.standard_normal(shape).astype(np.float32)
    for shape in [(rows, 5), (3, 5, 4), (rows, 4)]
  )
  expected_MF, expected_EDF = np.zeros((rows, 4)), np.zeros((3, 5, 4))
  ends = np.cumsum(sizes)
  for e, (end, size) in enumerate(zip(ends, sizes, strict=True)):
    group = slice(end - size, end)
    expected_MF[group] = x_MD[group] @ kernel_EDF[e]
    expected_EDF[e] = x_MD[group].T @ y_MF[group]
  for dot in (blocked_dot, ragged_dot, grouped_dot):
    actual = jax.jit(dot)(x_MD, kernel_EDF, np.asarray(sizes))
    np.testing.assert_allclose(actual, expected_MF, atol=1e-5)
  for outer in (blocked_outer, ragged_outer):
    actual = jax.jit(outer)(x_MD, y_MF, np.asarray(sizes))
    np.testing.assert_allclose(actual, expected_EDF, atol=1e-4)


# -- On TPUs that are not here -----------------------------------------------------------

# Experts' products and their gradients in bfloat16: for each number of rows the FLOPs per
# product, the tiles' rows, and the bytes of temporaries.
COMPILE = """
import json
import re
import sys
import jax
from jax.sharding import NamedSharding, PartitionSpec
from flaxlm.config import mesh_shape
from flaxlm.devices import find_device
from flaxlm.nn.kernels.grouped import grouped_dot
from flaxlm.planning.compile import make_target_mesh, tpu_options

def gradients(x, kernel, sizes):
  y, backward = jax.vjp(lambda x, kernel: grouped_dot(x, kernel, sizes), x, kernel)
  return y, backward(y)

mesh = make_target_mesh(mesh_shape({"data": 1}), find_device(sys.argv[1]))[1]
place = NamedSharding(mesh, PartitionSpec())
array = lambda *shape, dtype="bfloat16": jax.ShapeDtypeStruct(shape, dtype, sharding=place)
for rows in (6, 1000, 4096):
  arguments = array(rows, 1024), array(8, 1024, 2048), array(8, dtype="int32")
  compiled = jax.jit(gradients).lower(*arguments).compile(tpu_options())
  tiles = re.findall(r'ragged_dot_tiling="(\\d+),', compiled.as_text())
  products = compiled.cost_analysis()["flops"] / (2 * rows * 1024 * 2048)
  temporaries = compiled.memory_analysis().temp_size_in_bytes
  print(json.dumps([products, list(map(int, tiles)), temporaries]))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_for_users")
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("name", ["v5e", "v5p", "v6e"])
def test_a_tpu_multiplies_each_row_by_one_expert(name):
  """Three products, each of XLA's kernel with the largest tile that there are rows for.
  Its temporaries are rows, and the kernels turned around for the gradient of x; without
  the kernel there are 8 times the FLOPs, and a float32 gradient has 64 MiB more."""
  environment = os.environ | TPU_ENVIRONMENT | {"JAX_PLATFORMS": "cpu"}
  child = subprocess.run(
    [sys.executable, "-c", COMPILE, name], env=environment, capture_output=True, text=True
  )
  assert child.returncode == 0, child.stderr
  found = [json.loads(line) for line in child.stdout.splitlines()]
  for (products, tiles, temporaries), tile in zip(found, (8, 128, 128), strict=True):
    assert len(tiles) == 3 and min(tiles) >= tile
    assert products < 3 * 8 / 6 * 1.01
    assert temporaries < 3 * 2**25
