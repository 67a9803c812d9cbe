# SPDX-License-Identifier: Apache-2.0
"""Attention over a key/value cache, whose layout is (B, K, S, H).

Equal to `nn.attention.attend`. A single query of a single row is computed with sums instead
of matrix products: 2.6 ms instead of 5.1 for twelve layers of 256 slots on a CPU. Not on
TPUs, whose compiler would keep the cache widened, and turn it around (docs/LOG.md).
"""

import jax
import jax.numpy as jnp

from flaxlm.nn.kernels.blocked import mix_forward
from flaxlm.nn.masks import LOWEST, Scoring, Sight


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

  if B == 1 and T == 1:
    arrays = (q_BKGTH, k_BKSH, v_BKSH)
    return jax.lax.platform_dependent(*arrays, tpu=products, default=sums)
  return products(q_BKGTH, k_BKSH, v_BKSH)


def mix_one(
  q_BKGTH: jax.Array,
  k_BKSH: jax.Array,
  v_BKSH: jax.Array,
  sight: Sight,
  scoring: Scoring,
  sinks_KG: jax.Array | None,
) -> jax.Array:
  """`attend_cached` for one query of one row, as sums of products.

  XLA would fuse a matrix product of one row with the preceding write to the cache, and do
  that write twice, which copies the whole cache at every token.
  """
  _, K, G, _, H = q_BKGTH.shape
  q_KG1H, k_K1SH, v_K1SH = q_BKGTH[0], k_BKSH[0][:, None], v_BKSH[0][:, None]
  scores_KGS = (q_KG1H * k_K1SH).astype(jnp.float32).sum(-1)
  if scoring.softcap is not None:
    scores_KGS = scoring.softcap * jnp.tanh(scores_KGS / scoring.softcap)
  if sight.bias_XNTS is not None:
    scores_KGS += sight.bias_XNTS.reshape(K, G, -1)
  if sight.mask_BTS is not None:
    scores_KGS = jnp.where(sight.mask_BTS[0], scores_KGS, LOWEST)
  most_KG1 = scores_KGS.max(-1, keepdims=True)
  if sinks_KG is not None:
    most_KG1 = jnp.maximum(most_KG1, sinks_KG[:, :, None])
  exp_KGS = jnp.exp(scores_KGS - most_KG1)
  sum_KG1 = exp_KGS.sum(-1, keepdims=True)
  if sinks_KG is not None:
    sum_KG1 += jnp.exp(sinks_KG[:, :, None] - most_KG1)
  out_KGH = (exp_KGS[..., None] * v_K1SH).sum(2) / sum_KG1
  return out_KGH.reshape(1, 1, K * G, H).astype(v_BKSH.dtype)
