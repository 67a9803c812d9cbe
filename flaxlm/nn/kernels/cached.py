# SPDX-License-Identifier: Apache-2.0
"""Attention over a key/value cache, whose layout is (B, K, S, H).

Equal to `nn.attention.attend`. A single query of each row is computed with sums instead of
matrix products: for one row, 2.6 ms instead of 5.1 for twelve layers of 256 slots on a CPU;
for several, because XLA's CPU runtime computes a batched product in one thread, and shares
sums out. Not on TPUs, whose compiler would keep the cache widened, and turn it around
(docs/LOG.md).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flaxlm.nn.kernels.blocked import mix_forward
from flaxlm.nn.masks import LOWEST, Scoring, Sight

# Of a head, and of a row's slots: what each compiler makes the fastest code of.
LANES, SLOT_PARTS = (16, 4) if jax.__version_info__ < (0, 11) else (1, 1)


class Shares(NamedTuple):
  """The parts that a head's numbers, and a row's slots, are added up in."""

  of_head: int = 1
  of_slots: int = 1


WHOLE = Shares()


def attend_cached(
  q_BTNH: jax.Array,
  k_BKSH: jax.Array,
  v_BKSH: jax.Array,
  sight: Sight,
  scoring: Scoring,
  sinks_N: jax.Array | None = None,
) -> jax.Array:
  """The values of `attend`, for keys and values in the layout of a cache."""
  B, T, N, H = q_BTNH.shape
  K = k_BKSH.shape[1]
  q_BKGTH = (q_BTNH * scoring.scale).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
  sinks_KG = None if sinks_N is None else sinks_N.reshape(K, N // K)

  def products(q_BKGTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array) -> jax.Array:
    seen = (sight.mask_BTS, sight.bias_XNTS, sinks_KG)
    out_BKGTH, _ = mix_forward(scoring.softcap, q_BKGTH, k_BKSH, v_BKSH, *seen)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)

  def sums(q_BKGTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array) -> jax.Array:
    return mix_one(q_BKGTH, k_BKSH, v_BKSH, sight, scoring, sinks_KG)

  def shared_sums(q_BKGTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array) -> jax.Array:
    # A product, whose result is kept: XLA would compute a cheap sum again for each key.
    q_BKGTH = q_BKGTH @ jnp.eye(H, dtype=q_BKGTH.dtype)
    shares = Shares(max(1, H // LANES), SLOT_PARTS)
    return mix_one(q_BKGTH, k_BKSH, v_BKSH, sight, scoring, sinks_KG, shares)

  arrays = (q_BKGTH, k_BKSH, v_BKSH)
  if B == 1 and T == 1:
    return jax.lax.platform_dependent(*arrays, tpu=products, default=sums)
  if T == 1 and N == K and k_BKSH.dtype == jnp.float32:  # no head reads a cache twice
    return jax.lax.platform_dependent(*arrays, cpu=shared_sums, default=products)
  return products(*arrays)


def mix_one(
  q_BKGTH: jax.Array,
  k_BKSH: jax.Array,
  v_BKSH: jax.Array,
  sight: Sight,
  scoring: Scoring,
  sinks_KG: jax.Array | None,
  shares: Shares = WHOLE,
) -> jax.Array:
  """`attend_cached` for one query of each row, as sums of products.

  XLA would fuse a matrix product of one row with the preceding write to the cache, and do
  that write twice, which copies the whole cache at every token.
  """
  B, K, G, _, H = q_BKGTH.shape
  q_BKG1H, k_BK1SH, v_BK1SH = q_BKGTH, k_BKSH[:, :, None], v_BKSH[:, :, None]
  scores = sum_of_parts((q_BKG1H * k_BK1SH).astype(jnp.float32), -1, shares.of_head)
  if scoring.softcap is not None:
    scores = scoring.softcap * jnp.tanh(scores / scoring.softcap)
  if sight.bias_XNTS is not None:
    scores += sight.bias_XNTS.reshape(-1, K, G, scores.shape[-1])
  if sight.mask_BTS is not None:
    scores = jnp.where(sight.mask_BTS[:, :, None], scores, LOWEST)
  max_BKG1 = scores.max(-1, keepdims=True)
  if sinks_KG is not None:
    max_BKG1 = jnp.maximum(max_BKG1, sinks_KG[:, :, None])
  exp_BKGS = jnp.exp(scores - max_BKG1)
  sum_BKG1 = exp_BKGS.sum(-1, keepdims=True)
  if sinks_KG is not None:
    sum_BKG1 += jnp.exp(sinks_KG[:, :, None] - max_BKG1)
  out_BKGH = sum_of_parts(exp_BKGS[..., None] * v_BK1SH, 3, shares.of_slots) / sum_BKG1
  return out_BKGH.reshape(B, 1, K * G, H).astype(v_BKSH.dtype)


def sum_of_parts(x: jax.Array, dim: int, parts: int) -> jax.Array:
  """The sum over a dim, whose `parts` are added up first, if it has so many.

  Of a plain sum XLA's CPU compiler adds one number after the other, in order.
  """
  while parts > 1 and x.shape[dim] % 2 == 0:
    halves = jnp.split(x, 2, dim)
    x, parts = halves[0] + halves[1], parts // 2
  return x.sum(dim)
