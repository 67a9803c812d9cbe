# SPDX-License-Identifier: Apache-2.0
"""Attention over long rows on a CPU: the scores of a head stay in a processor's cache.

Equal to `nn.attention.attend`. As in Dao et al. (2022), only the logarithm of each sum is
kept, and the backward pass computes the scores again. Unlike a GPU's kernel it takes one
head of one row after the other; the products of each use all processors.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flaxlm.nn.masks import LOWEST, Reach, Scoring, Sight

QUERIES = 128  # of a tile: its scores with 1,024 keys are half a MiB
MOST_TILES = 16  # of a row; more would compile longer


class Tile(NamedTuple):
  """A range of queries, and the range of the keys that they can see."""

  queries: slice
  keys: slice


def attend_tiled(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  sight: Sight,
  scoring: Scoring,
) -> jax.Array:
  """The values of `attend` (B, T, N, H), without a bias, a soft cap or learned sinks."""
  B, T, N, H = q_BTNH.shape
  K = k_BSKH.shape[2]
  q_BTKGH = (q_BTNH * scoring.scale).reshape(B, T, K, N // K, H)
  q_XGTH = q_BTKGH.transpose(0, 2, 3, 1, 4).reshape(B * K, N // K, T, H)
  k_XSH, v_XSH = (x.swapaxes(1, 2).reshape(B * K, -1, H) for x in (k_BSKH, v_BSKH))
  out_XGTH = mix_heads(sight.reach, q_XGTH, k_XSH, v_XSH, sight.mask_BTS)
  return out_XGTH.reshape(B, K * (N // K), T, H).swapaxes(1, 2)


def tiles(reach: Reach | None, num_queries: int, num_keys: int) -> Iterator[Tile]:
  count = max(1, min(MOST_TILES, num_queries // QUERIES))
  for n in range(count):
    start, end = num_queries * n // count, num_queries * (n + 1) // count
    first = 0 if reach is None or reach.window is None else max(0, start - reach.window + 1)
    yield Tile(slice(start, end), slice(first, end if reach else num_keys))


def scores_of(
  tile: Tile, q_GTH: jax.Array, k_SH: jax.Array, mask_TS: jax.Array | None
) -> jax.Array:
  """The scores (G, T, S) of a tile in float32, `LOWEST` where the mask hides a key."""
  q, k = q_GTH[:, tile.queries], k_SH[tile.keys]
  scores = jnp.einsum("GTH,SH->GTS", q, k, preferred_element_type=jnp.float32)
  if mask_TS is None:
    return scores
  return jnp.where(mask_TS[tile.queries, tile.keys], scores, LOWEST)


def each_head(function: Callable, mask_BTS: jax.Array | None, *arrays: jax.Array) -> Any:
  """`function(mask, *arrays)` of one kv head of one row after the other."""
  heads = arrays[0].shape[0]

  def one(numbered: tuple[jax.Array, tuple[jax.Array, ...]]) -> Any:
    n, of_head = numbered
    mask_TS = None
    if mask_BTS is not None:
      mask_TS = mask_BTS[n * mask_BTS.shape[0] // heads]
    return function(mask_TS, *of_head)

  return jax.lax.map(one, (jnp.arange(heads), arrays))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def mix_heads(
  reach: Reach | None,
  q_XGTH: jax.Array,
  k_XSH: jax.Array,
  v_XSH: jax.Array,
  mask_BTS: jax.Array | None,
) -> jax.Array:
  """softmax(q k^T) v of X = B K heads, where the mask (of 1 or B rows) allows."""
  return mix_forward(reach, q_XGTH, k_XSH, v_XSH, mask_BTS)[0]


def mix_forward(
  reach: Reach | None,
  q_XGTH: jax.Array,
  k_XSH: jax.Array,
  v_XSH: jax.Array,
  mask_BTS: jax.Array | None,
) -> tuple[jax.Array, tuple]:
  def forward(
    mask_TS: jax.Array | None, q_GTH: jax.Array, k_SH: jax.Array, v_SH: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    outs, logs = [], []
    for tile in tiles(reach, q_GTH.shape[1], k_SH.shape[0]):
      scores = scores_of(tile, q_GTH, k_SH, mask_TS)
      max_GT1 = scores.max(-1, keepdims=True)
      exp_GTS = jnp.exp(scores - max_GT1)
      sum_GT1 = exp_GTS.sum(-1, keepdims=True)
      out_GTH = jnp.einsum("GTS,SH->GTH", exp_GTS.astype(v_SH.dtype), v_SH[tile.keys])
      outs.append(out_GTH / sum_GT1.astype(v_SH.dtype))
      logs.append(max_GT1 + jnp.log(sum_GT1))
    return jnp.concatenate(outs, 1), jnp.concatenate(logs, 1)

  out_XGTH, log_XGT1 = each_head(forward, mask_BTS, q_XGTH, k_XSH, v_XSH)
  return out_XGTH, (q_XGTH, k_XSH, v_XSH, mask_BTS, out_XGTH, log_XGT1)


def mix_backward(reach: Reach | None, residuals: tuple, grad_XGTH: jax.Array) -> tuple:
  q_XGTH, k_XSH, v_XSH, mask_BTS, out_XGTH, log_XGT1 = residuals
  delta_XGT1 = (grad_XGTH * out_XGTH).astype(jnp.float32).sum(-1, keepdims=True)

  def backward(
    mask_TS: jax.Array | None,
    q_GTH: jax.Array,
    k_SH: jax.Array,
    v_SH: jax.Array,
    grad_GTH: jax.Array,
    log_GT1: jax.Array,
    delta_GT1: jax.Array,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    dtype, grads_q = v_SH.dtype, []
    grad_k, grad_v = jnp.zeros(k_SH.shape), jnp.zeros(v_SH.shape)
    for queries, keys in tiles(reach, q_GTH.shape[1], k_SH.shape[0]):
      q, grad = q_GTH[:, queries], grad_GTH[:, queries]
      scores = scores_of(Tile(queries, keys), q_GTH, k_SH, mask_TS)
      weights_GTS = jnp.exp(scores - log_GT1[:, queries])
      of_weights = jnp.einsum("GTH,SH->GTS", grad, v_SH[keys])
      of_scores = weights_GTS * (of_weights - delta_GT1[:, queries])
      weights_GTS, of_scores = weights_GTS.astype(dtype), of_scores.astype(dtype)
      add = lambda sum_SH, x, y, keys=keys: sum_SH.at[keys].add(
        jnp.einsum("GTS,GTH->SH", x, y)
      )
      grad_v, grad_k = add(grad_v, weights_GTS, grad), add(grad_k, of_scores, q)
      grads_q.append(jnp.einsum("GTS,SH->GTH", of_scores, k_SH[keys]))
    return jnp.concatenate(grads_q, 1), grad_k.astype(dtype), grad_v.astype(dtype)

  arrays = (q_XGTH, k_XSH, v_XSH, grad_XGTH, log_XGT1, delta_XGT1)
  return *each_head(backward, mask_BTS, *arrays), None


mix_heads.defvjp(mix_forward, mix_backward)
