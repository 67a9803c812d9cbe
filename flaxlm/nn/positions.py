# SPDX-License-Identifier: Apache-2.0
"""Positions: rotations of queries and keys, vectors added to embeddings, score biases."""

import math

import jax
import jax.numpy as jnp

from flaxlm.config import ResolvedRope
from flaxlm.nn.kernels.fusion import unfused
from flaxlm.nn.masks import CosSin

# -- Rotary ------------------------------------------------------------------------------


def rotation(
  positions_BT: jax.Array, head_dim: int, rope: ResolvedRope, local: bool
) -> CosSin:
  """RoPE's (cos, sin), each (B, T, R/2) in float32 (Su et al., 2021, section 3.2.2).

  R is `rope.fraction` of the head dim, rounded down to an even number. A local layer that
  has its own theta is not stretched (Gemma 3).
  """
  num_dims = 2 * int(head_dim * rope.fraction / 2)
  if local and rope.local_theta is not None:
    frequencies, size = inverse_wavelengths(num_dims, rope.local_theta), 1.0
  else:
    frequencies, size = stretched_frequencies(num_dims, rope)

  def tables(positions_BT: jax.Array) -> CosSin:
    angles = positions_BT[..., None].astype(jnp.float32) * jnp.array(frequencies)
    return jnp.cos(angles) * size, jnp.sin(angles) * size

  return jax.lax.platform_dependent(positions_BT, cpu=unfused(tables), default=tables)


def inverse_wavelengths(num_dims: int, theta: float) -> list[float]:
  """Radians per position of each pair of dims, R/2 of them."""
  return [theta ** (-i / num_dims) for i in range(0, num_dims, 2)]


def stretched_frequencies(num_dims: int, rope: ResolvedRope) -> tuple[list[float], float]:
  """Radians per position under `rope.scaling`, and the factor on cos and sin."""
  frequencies, factor = inverse_wavelengths(num_dims, rope.theta), rope.factor
  match rope.scaling:
    case "linear":  # Chen et al. (2023): positions are squeezed
      return [f / factor for f in frequencies], 1.0
    case "ntk":  # a larger base keeps the fastest pair as it is and stretches the slowest
      theta = rope.theta * factor ** (num_dims / max(1, num_dims - 2))
      return inverse_wavelengths(num_dims, theta), 1.0
    case "yarn":  # Peng et al. (2023), section 3.2; the ramp as in its authors' code
      size = rope.attention_factor
      if size is None:
        size = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
      low = math.floor(max(0.0, pair_that_turns(rope.fast_turns, num_dims, rope)))
      high = math.ceil(min(num_dims - 1, pair_that_turns(rope.slow_turns, num_dims, rope)))
      span = high - low or 0.001  # negative over a short context, in their code too
      kept = [1 - (i - low) / span for i in range(num_dims // 2)]
      return stretch(frequencies, kept, factor), size
    case "llama3":  # Llama 3.1's own: a ramp over the number of turns
      turns = [rope.original_context * f / (2 * math.pi) for f in frequencies]
      span = rope.fast_turns - rope.slow_turns
      return stretch(
        frequencies, [(t - rope.slow_turns) / span for t in turns], factor
      ), 1.0
  return frequencies, 1.0


def stretch(frequencies: list[float], kept: list[float], factor: float) -> list[float]:
  """Interpolates each frequency from f / `factor` (`kept` <= 0) to f (`kept` >= 1)."""
  shares = [min(1.0, max(0.0, share)) for share in kept]
  return [f * (k + (1 - k) / factor) for f, k in zip(frequencies, shares, strict=True)]


def pair_that_turns(turns: float, num_dims: int, rope: ResolvedRope) -> float:
  """The index (not rounded) of the pair that turns so often over the original context."""
  length = rope.original_context / (2 * math.pi * max(turns, 1e-9))
  return num_dims * math.log(length) / (2 * math.log(rope.theta))


def rotate(x_BTNH: jax.Array, cos_sin: CosSin) -> jax.Array:
  """Rotates the pairs (i, i + R/2) of the first R dims of every head: LLaMA's layout."""
  cos, sin = (part[:, :, None].astype(x_BTNH.dtype) for part in cos_sin)
  half = cos.shape[-1]
  first, second, rest = jnp.split(x_BTNH, (half, 2 * half), -1)
  turned = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate([*turned, rest], -1)


# -- Added to the embedding ---------------------------------------------------------------


def sinusoids(positions_BT: jax.Array, width: int) -> jax.Array:
  """(B, T, D) of sines, then cosines (Vaswani et al., 2017, section 3.5).

  The paper interleaves the two: a fixed permutation of dims, which training absorbs.
  """
  frequencies = jnp.array(inverse_wavelengths(width, 10_000.0))
  angles = positions_BT[..., None].astype(jnp.float32) * frequencies
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


# -- Added to the scores -------------------------------------------------------------------


def alibi_slopes(num_heads: int) -> jax.Array:
  """(N,): 2^(-8/n), 2^(-16/n), ... for n heads (Press et al., 2022, section 3).

  If N is not a power of two, the other heads take every second slope of the next power.
  """
  power = 1 << (num_heads.bit_length() - 1)
  slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
  between = [2.0 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]
  return jnp.array(slopes + between)


def alibi_bias(
  query_slots_XT: jax.Array, num_keys: int, num_heads: int, causal: bool
) -> jax.Array:
  """bias_XNTS: -slope x distance; in a document, slots are positions plus a constant."""
  distance = query_slots_XT[:, None, :, None] - jnp.arange(num_keys)
  if not causal:
    distance = jnp.abs(distance)
  return -alibi_slopes(num_heads)[:, None, None] * distance.astype(jnp.float32)


def relative_buckets(
  distances: jax.Array, num_buckets: int, max_distance: int, causal: bool
) -> jax.Array:
  """Buckets of (key - query) distances: half exact, half logarithmic (Raffel et al.,
  2020, section 2.1). Causal: later keys share bucket 0; otherwise they get half of all."""
  first = jnp.zeros_like(distances)
  if causal:
    distances = jnp.maximum(-distances, 0)
  else:
    num_buckets //= 2
    first = jnp.where(distances > 0, num_buckets, 0)
    distances = jnp.abs(distances)
  exact = num_buckets // 2
  ratio = jnp.log(jnp.maximum(distances, 1).astype(jnp.float32) / exact)
  ratio /= math.log(max_distance / exact)
  far = exact + (ratio * (num_buckets - exact)).astype(jnp.int32)
  far = jnp.minimum(far, num_buckets - 1)
  return first + jnp.where(distances < exact, distances, far)
