# SPDX-License-Identifier: Apache-2.0
"""Norms, activations and RoPE's tables, where XLA would keep or fuse too much.

The backward pass recomputes norms and activations. In bfloat16 that halves what is kept,
from 61 to 32 bytes per token, layer and unit of width.
"""

import functools
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

Arrays = TypeVar("Arrays")


def normalised(
  centred: bool,
  epsilon: float,
  x_BTD: jax.Array,
  scale_D: jax.Array,
  bias_D: jax.Array | None = None,
) -> jax.Array:
  """The computation of RMSNorm and, `centred`, of LayerNorm.

  The backward pass recomputes it for a 16-bit x, which would otherwise be kept in float32.
  For a float32 x that would save little memory and take time on a CPU.
  """
  function = normalise if x_BTD.dtype == jnp.float32 else normalise_narrow
  return function(centred, epsilon, x_BTD, scale_D, bias_D)


def normalise(
  centred: bool,
  epsilon: float,
  x_BTD: jax.Array,
  scale_D: jax.Array,
  bias_D: jax.Array | None,
) -> jax.Array:
  """(x - mean) / std * scale + bias or, not `centred`, x / rms(x) * scale + bias."""
  x = x_BTD.astype(jnp.float32)
  if centred:
    x -= jnp.mean(x, -1, keepdims=True)
  x *= jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + epsilon)
  x *= scale_D
  if bias_D is not None:
    x += bias_D
  return x.astype(x_BTD.dtype)


def _normalise_backward(
  centred: bool, epsilon: float, kept: tuple, grad_BTD: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """The gradient of `normalise` in two passes over the rows: one for all sums along a row,
  and one for all gradients.

  Derived by JAX, XLA's GPU compiler makes three of a LayerNorm's, one of which writes the
  normalised rows in float32 for another: 20 bytes per number for 12, with the residual sum.
  """
  kept = x_BTD, scale_D, bias_D = jax.lax.optimization_barrier(kept)  # no float32 x
  mean = lambda a_BTD: jnp.mean(a_BTD, -1, keepdims=True)
  x, grad = x_BTD.astype(jnp.float32), grad_BTD.astype(jnp.float32)
  if centred:  # sums of products lose digits where a row is far from zero
    x -= x[..., :1]
  g = grad * scale_D
  square, along = mean(x * x), mean(x * g)
  if centred:
    mean_x, mean_g = mean(x), mean(g)
    square = jnp.maximum(square - mean_x * mean_x, 0)
    along -= mean_x * mean_g
    x, g = x - mean_x, g - mean_g
  factor = jax.lax.rsqrt(square + epsilon)
  x *= factor
  rows = tuple(range(x.ndim - 1))
  grads = (
    factor * (g - x * (factor * along)),
    (grad * x).sum(rows),
    None if bias_D is None else grad.sum(rows),
  )
  return jax.tree.map(lambda grad, primal: grad.astype(primal.dtype), grads, kept)


normalise_narrow = jax.custom_vjp(normalise, nondiff_argnums=(0, 1))
normalise_narrow.defvjp(
  lambda centred, epsilon, *arrays: (normalise(centred, epsilon, *arrays), arrays),
  _normalise_backward,
)


@functools.partial(jax.checkpoint, static_argnums=0)
def activated(kind: str, h: jax.Array, gate: jax.Array | None) -> jax.Array:
  """`activate` in float32, rounded once. The backward pass recomputes it: that is cheaper
  than keeping the several arrays of this size that its derivative needs.

  XLA's CPU compiler would round 16-bit numbers after each operation, in three times the
  time.
  """
  wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
  gate = None if gate is None else wide(gate)
  return activate(wide(h), kind, gate).astype(h.dtype)


def activate(x: jax.Array, kind: str, gate: jax.Array | None = None) -> jax.Array:
  """f(x), or f(gate) x; "gelu" is the exact one, "gelu_tanh" GPT-2's approximation."""
  if gate is not None:
    return activate(gate, kind) * x
  match kind:
    case "gelu" if x.dtype == jnp.float32:  # on a CPU, erfc takes twice an erf's time
      return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))
    case "gelu":
      return jax.nn.gelu(x, approximate=False)
    case "gelu_tanh":
      return jax.nn.gelu(x, approximate=True)
    case "silu":
      return jax.nn.silu(x)
    case "relu":
      return jax.nn.relu(x)
  raise ValueError(f"unknown activation {kind!r}")


def unfused(function: Callable[[jax.Array], Arrays]) -> Callable[[jax.Array], Arrays]:
  """The same function inside both branches of a conditional, where XLA's CPU compiler does
  not fuse it with its readers.

  Fused, the sines are computed again for every head, and for every key that a query meets:
  11 of the 16 ms of a token after 900 others, in a model of 4 layers of width 384.
  """

  def run(x: jax.Array) -> Arrays:
    return jax.lax.cond(x.ravel()[0] >= 0, function, function, x)

  return run
