# SPDX-License-Identifier: Apache-2.0
"""Norms, activations and RoPE's tables, where XLA would keep or fuse too much.

The backward pass recomputes norms and activations. In bfloat16 that halves what is kept,
from 61 to 32 bytes per token, layer and unit of width.
"""

import functools
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

  def normalise(x_BTD: jax.Array) -> jax.Array:
    x = x_BTD.astype(jnp.float32)
    if centred:
      x -= jnp.mean(x, -1, keepdims=True)
    x *= jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + epsilon)
    x *= scale_D
    if bias_D is not None:
      x += bias_D
    return x.astype(x_BTD.dtype)

  recomputed = x_BTD.dtype != jnp.float32
  return (jax.checkpoint(normalise) if recomputed else normalise)(x_BTD)


@functools.partial(jax.checkpoint, static_argnums=0)
def activated(kind: str, h: jax.Array, gate: jax.Array | None) -> jax.Array:
  """`activate`, which the backward pass recomputes: that is cheaper than keeping the
  several arrays of this size that its derivative needs."""
  return activate(h, kind, gate)


def activate(x: jax.Array, kind: str, gate: jax.Array | None = None) -> jax.Array:
  """f(x), or f(gate) x; "gelu" is the exact one, "gelu_tanh" GPT-2's approximation."""
  if gate is not None:
    return activate(gate, kind) * x
  match kind:
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
