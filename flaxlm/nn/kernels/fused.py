# SPDX-License-Identifier: Apache-2.0
"""Norms, activations and RoPE's tables, where XLA would keep too much or fuse too far.

Norms and activations are computed again for the backward pass: in bfloat16 that halves what
is kept per token, layer and width (61 to 32 bytes).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from flaxlm.nn.masks import CosSin


def normalised(
  centred: bool,
  epsilon: float,
  x_BTD: jax.Array,
  scale_D: jax.Array,
  bias_D: jax.Array | None = None,
) -> jax.Array:
  """What the norms compute; of a narrow x, again for the backward pass, which would keep
  it in float32. A float32 x would save little, and cost a CPU time."""

  def normalise(x_BTD: jax.Array) -> jax.Array:
    x = x_BTD.astype(jnp.float32)
    if centred:
      x -= jnp.mean(x, -1, keepdims=True)
    x *= jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + epsilon)
    x *= scale_D
    if bias_D is not None:
      x += bias_D
    return x.astype(x_BTD.dtype)

  again = x_BTD.dtype != jnp.float32
  return (jax.checkpoint(normalise) if again else normalise)(x_BTD)


@functools.partial(jax.checkpoint, static_argnums=0)
def activated(kind: str, h: jax.Array, gate: jax.Array | None) -> jax.Array:
  """f(h), or f(gate) h. Computed again for the backward pass: cheaper than to keep what
  its derivative is made of, several arrays of this size."""
  return activate(h, kind) if gate is None else activate(gate, kind) * h


def activate(x: jax.Array, kind: str) -> jax.Array:
  """The nonlinearity; "gelu" is the exact one, "gelu_tanh" GPT-2's approximation."""
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


def apart(function: Callable[[jax.Array], CosSin]) -> Callable[[jax.Array], CosSin]:
  """The same, where XLA's CPU compiler cannot reach it: in both branches of a conditional.

  It would fuse the sines with what reads them, and compute them again for every head, and
  for every key that a query meets: 11 of 16 ms of a token of 4x384 after 900 others.
  """

  def run(x: jax.Array) -> CosSin:
    return jax.lax.cond(x.ravel()[0] >= 0, function, function, x)

  return run
