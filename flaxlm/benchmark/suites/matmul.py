# SPDX-License-Identifier: Apache-2.0
"""Matrix products: square ones, which are the ceiling, and the shapes that a model has.

A product of (M, K) and (K, N) takes 2 M K N FLOPs, a batch of G of them G times as many.
"""

import jax
import jax.numpy as jnp
import numpy as np

from flaxlm.benchmark.measure import BenchOptions, Side, agree, measure, timed
from flaxlm.benchmark.report import Demand, Result, with_ratio
from flaxlm.planning.products import Product

# Largest error / largest value. float32 is as wide as it is because GPUs compute in TF32.
TOLERANCES = {"float32": 2e-3, "bfloat16": 2e-2, "int8": 0.0}
CHECKED_ROWS = 4


def bench_matmul(options: BenchOptions, square_only: bool = False) -> list[Result]:
  """GFLOP/s of each product and dtype."""
  squares = options.pick((32, 64), (256, 512, 1024, 1536), (2048, 4096, 8192, 16384))
  products = [Product(n, n, n) for n in squares]
  floats = ("float32", "bfloat16")
  dtypes = options.pick(floats, floats, (*floats, "int8"))
  if not square_only:
    products += model_products(options)
  return [
    bench_product(product, dtype, options) for dtype in dtypes for product in products
  ]


def model_products(options: BenchOptions) -> list[Product]:
  """A feed-forward layer over many tokens and over one, a kernel's gradient, and scores."""
  tokens, width, heads = options.pick((64, 32, 4), (2048, 512, 64), (16384, 4096, 512))
  length = options.pick(16, 256, 1024)
  return [
    Product(tokens, width, 4 * width),
    Product(width, tokens, 4 * width),
    Product(1, 2 * width, 8 * width),
    Product(length, 64, length, batch=heads),
  ]


def bench_product(product: Product, dtype: str, options: BenchOptions) -> Result:
  a, b = operands(product, dtype)
  sides = {"flaxlm": Side(jax.jit(multiply), lambda: (a, b))}
  if options.peer == "torch" and dtype != "int8":
    from flaxlm.benchmark.peers.torch_operations import torch_product

    left, right = np.asarray(a, np.float32), np.asarray(b, np.float32)
    sides["torch"] = torch_product(left, right, dtype)
  timings = measure(sides, options)
  ours = timings["flaxlm"]
  computed, exact = sample_rows(a, b, ours.result)
  gate = agree("a sample of rows in float64", computed, exact, TOLERANCES[dtype])
  num_bytes = float(product.elements * jnp.dtype(dtype).itemsize)
  demand = Demand(product.flops, num_bytes, dtype, num_bytes)
  case = f"{product.text} {dtype}"
  result = timed("matmul", case, ours, "GFLOP/s", gate, product.flops, demand)
  if len(timings) == 1:
    return result
  theirs = timings["torch"]
  gate = agree("the product", ours.result, theirs.result.float().cpu(), TOLERANCES[dtype])
  return with_ratio(result, "torch", ours.rounds, theirs.rounds, gate)


def multiply(a: jax.Array, b: jax.Array) -> jax.Array:
  wide = jnp.int32 if a.dtype == jnp.int8 else None
  return jnp.matmul(a, b, preferred_element_type=wide)


def operands(product: Product, dtype: str) -> tuple[jax.Array, jax.Array]:
  M, K, N, G = product
  rng = np.random.default_rng(0)
  lead = (G,) if G > 1 else ()

  def array(*shape: int) -> jax.Array:
    if dtype == "int8":
      return jnp.asarray(rng.integers(-8, 8, (*lead, *shape), np.int8))
    return jnp.asarray(rng.standard_normal((*lead, *shape), np.float32), dtype)

  return array(M, K), array(K, N)


def sample_rows(a: jax.Array, b: jax.Array, c: jax.Array) -> tuple[np.ndarray, np.ndarray]:
  """Some rows of the product, as computed and in float64."""
  first = lambda x: np.asarray(x[0] if x.ndim == 3 else x, np.float64)
  rows = slice(None, None, max(1, a.shape[-2] // CHECKED_ROWS))
  return first(c)[rows], first(a)[rows] @ first(b)
