# SPDX-License-Identifier: Apache-2.0
"""Multi-head attention (Vaswani et al., 2017, section 3.2), multi-query and grouped
(Shazeer, 2019; Ainslie et al., 2023), its masks, and the key/value cache.

`attend` is the one attention function. Which query sees which key is decided in one
place, `visible`, from slots (where a token lies in its row), never from positions
(which restart with every packed document).
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxlm.config import ModelConfig
from flaxlm.nn.layers import Einsum, residual_scale, rotate
from flaxlm.sharding import constrain


class KVCache(NamedTuple):
  """Keys and values of the tokens so far: a value that goes in and comes out.

  Row b's token number s lies in slot s; slots from `lengths_B[b]` on hold nothing.
  """

  k_LBSKH: jax.Array
  v_LBSKH: jax.Array
  lengths_B: jax.Array


def init_cache(
  cfg: ModelConfig, batch: int, slots: int, dtype: jnp.dtype = jnp.float32
) -> KVCache:
  """An empty cache for `batch` rows of up to `slots` tokens."""
  cfg = cfg.resolve()
  shape = (cfg.depth, batch, slots, cfg.num_kv_heads, cfg.head_dim)
  empty = jnp.zeros(shape, dtype)
  return KVCache(empty, empty.copy(), jnp.zeros((batch,), jnp.int32))


class Visibility(NamedTuple):
  """Where queries and keys stand, from which `visible` makes the mask.

  Segments are None when every row is one document (decoding).
  """

  query_slots_BT: jax.Array
  query_segments_BT: jax.Array | None = None
  key_segments_BS: jax.Array | None = None


def visible(where: Visibility, num_keys: int, window: int | None) -> jax.Array:
  """mask_BTS: the key is not later, within the window, and of the same document."""
  query = where.query_slots_BT[:, :, None]
  key = jnp.arange(num_keys)[None, None, :]
  mask_BTS = key <= query
  if window is not None:
    mask_BTS &= key > query - window
  if where.query_segments_BT is not None:
    assert where.key_segments_BS is not None
    mask_BTS &= where.query_segments_BT[:, :, None] == where.key_segments_BS[:, None, :]
  return mask_BTS


def attend(
  q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """softmax(q k^T / sqrt(H)) v for each head, the softmax in float32.

  Returns the mixed values (B, T, N, H) and the weights (B, N, T, S); query head n reads
  kv head n // G. Every query must see at least one key.
  """
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  q_BTKGH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H)
  scores = jnp.einsum(
    "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
  )
  scores = jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
  weights_BKGTS = jax.nn.softmax(scores, -1)
  out = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS.astype(v_BSKH.dtype), v_BSKH)
  return out.reshape(B, T, N, H), weights_BKGTS.reshape(B, N, T, S)


class Attention(nn.Module):
  """Causal self-attention with N query heads and K key/value heads."""

  cfg: ModelConfig
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    where: Visibility,
    cos_sin: tuple[jax.Array, jax.Array] | None,
    cache: tuple[jax.Array, jax.Array] | None = None,
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """Returns (B, T, D), and this layer's cache (k, v), each (B, S, K, H), if given one."""
    cfg = self.cfg
    D, N, K, H = cfg.width, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    assert K is not None and H is not None
    shared = dict(biased=cfg.biased, dtype=self.dtype, param_dtype=self.param_dtype)
    q_names, kv_names = (
      ("embed", "heads", "head_dim"),
      ("embed", "kv_heads", "head_dim"),
    )
    q_BTNH = Einsum("BTD,DNH->BTNH", (D, N, H), q_names, name="q", **shared)(x_BTD)
    k_BTKH = Einsum("BTD,DKH->BTKH", (D, K, H), kv_names, name="k", **shared)(x_BTD)
    v_BTKH = Einsum("BTD,DKH->BTKH", (D, K, H), kv_names, name="v", **shared)(x_BTD)
    if cos_sin is not None:
      q_BTNH, k_BTKH = rotate(q_BTNH, cos_sin), rotate(k_BTKH, cos_sin)
    q_BTNH = constrain(q_BTNH, "batch", "length", "act_heads", "head_dim")
    k_BSKH = constrain(k_BTKH, "batch", "length", "act_kv_heads", "head_dim")
    v_BSKH = constrain(v_BTKH, "batch", "length", "act_kv_heads", "head_dim")
    if cache is not None:
      first_slots_B = where.query_slots_BT[:, 0]
      k_BSKH = write_slots(cache[0], k_BSKH, first_slots_B)
      v_BSKH = write_slots(cache[1], v_BSKH, first_slots_B)
      cache = (k_BSKH, v_BSKH)
    mask_BTS = visible(where, k_BSKH.shape[1], cfg.window)
    out_BTNH, weights_BNTS = attend(
      q_BTNH, k_BSKH.astype(self.dtype), v_BSKH.astype(self.dtype), mask_BTS
    )
    # For whoever looks; nothing is computed or kept unless "intermediates" is mutable.
    self.sow("intermediates", "weights_BNTS", weights_BNTS)
    out_BTD = Einsum(
      "BTNH,NHD->BTD",
      (N, H, D),
      ("heads", "head_dim", "embed"),
      init_scale=residual_scale(cfg.depth),
      name="o",
      **shared,
    )(out_BTNH)
    return out_BTD, cache


def write_slots(
  cache_BSKH: jax.Array, new_BTKH: jax.Array, first_slots_B: jax.Array
) -> jax.Array:
  """Writes T new entries of each row from its own first slot on.

  The caller sees to it that they fit: JAX would shift a write past the end back.
  """
  write = lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at, 0, 0))  # noqa: E731
  return jax.vmap(write)(cache_BSKH, new_BTKH.astype(cache_BSKH.dtype), first_slots_B)
