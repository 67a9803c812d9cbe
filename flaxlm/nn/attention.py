# SPDX-License-Identifier: Apache-2.0
"""Multi-head attention (Vaswani et al., 2017, section 3.2), multi-query and grouped
(Shazeer, 2019; Ainslie et al., 2023), its masks, and the key/value cache.

`attend` is the one attention function. Which query sees which key is decided in one
place, `visible`, from slots (where a token lies in its row), never from positions
(which restart with every packed document).
"""

import itertools
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
  """softmax(q k^T / sqrt(H)) v for each head, the softmax in float32: the reference.

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


def attend_blocked(
  q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, mask_BTT: jax.Array
) -> jax.Array:
  """`attend` for a causal mask over whole rows (T = S), in blocks of queries.

  A block reads no keys after its own, which saves up to half of the work, and keeps one
  array of its scores' size for the backward pass instead of three.
  """
  B, T, N, H = q_BTNH.shape
  K = k_BTKH.shape[2]
  G = N // K
  # One matrix per kv head, its G query heads one after the other in the rows.
  q_BKGTH = (q_BTNH * H**-0.5).reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4)
  k_BKTH, v_BKTH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
  blocks = []
  for start, end in query_blocks(T):
    blocks.append(
      mix(
        q_BKGTH[:, :, :, start:end],
        k_BKTH[:, :, :end],
        v_BKTH[:, :, :end],
        mask_BTT[:, start:end, :end],
      )
    )
  out_BKGTH = jnp.concatenate(blocks, 3)
  return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def query_blocks(num_queries: int) -> list[tuple[int, int]]:
  """Up to four ranges of at least 64 queries: more save little and compile longer."""
  count = max(1, min(4, num_queries // 64))
  edges = [num_queries * i // count for i in range(count + 1)]
  return list(itertools.pairwise(edges))


@jax.custom_vjp
def mix(
  q_BKGTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
  """softmax(q k^T) v where the mask allows, with a backward pass written by hand.

  The weights are left unnormalised, exp(score - max): their sum divides the output, which
  is S / H times smaller, and likewise its gradient (Dao et al., 2022, appendix B).
  """
  return mix_forward(q_BKGTH, k_BKSH, v_BKSH, mask_BTS)[0]


def mix_forward(
  q_BKGTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array
) -> tuple[jax.Array, tuple]:
  B, K, G, T, H = q_BKGTH.shape
  S = k_BKSH.shape[2]
  q_XRH = q_BKGTH.reshape(B * K, G * T, H)
  k_XSH, v_XSH = k_BKSH.reshape(B * K, S, H), v_BKSH.reshape(B * K, S, H)
  scores = jnp.einsum("XRH,XSH->XRS", q_XRH, k_XSH, preferred_element_type=jnp.float32)
  scores = jnp.where(
    mask_BTS[:, None, None], scores.reshape(B, K, G, T, S), jnp.finfo(jnp.float32).min
  ).reshape(B * K, G * T, S)
  exp_XRS = jnp.exp(scores - scores.max(-1, keepdims=True))
  sum_XR1 = exp_XRS.sum(-1, keepdims=True)
  exp_XRS = exp_XRS.astype(v_XSH.dtype)
  out_XRH = jnp.einsum("XRS,XSH->XRH", exp_XRS, v_XSH) / sum_XR1.astype(v_XSH.dtype)
  residuals = (q_XRH, k_XSH, v_XSH, exp_XRS, sum_XR1, out_XRH)
  return out_XRH.reshape(q_BKGTH.shape), residuals


def mix_backward(residuals: tuple, grad_BKGTH: jax.Array) -> tuple:
  q_XRH, k_XSH, v_XSH, exp_XRS, sum_XR1, out_XRH = residuals
  B, K = grad_BKGTH.shape[:2]
  dtype = v_XSH.dtype
  grad_XRH = grad_BKGTH.reshape(out_XRH.shape) / sum_XR1.astype(dtype)
  grad_v_XSH = jnp.einsum("XRS,XRH->XSH", exp_XRS, grad_XRH)
  grad_exp_XRS = jnp.einsum("XRH,XSH->XRS", grad_XRH, v_XSH)
  along_XR1 = (grad_XRH * out_XRH).sum(-1, keepdims=True)
  grad_scores_XRS = exp_XRS * (grad_exp_XRS - along_XR1)
  grad_q_XRH = jnp.einsum("XRS,XSH->XRH", grad_scores_XRS, k_XSH)
  grad_k_XSH = jnp.einsum("XRS,XRH->XSH", grad_scores_XRS, q_XRH)
  kv_shape = (B, K, *k_XSH.shape[1:])
  grad_k_BKSH, grad_v_BKSH = grad_k_XSH.reshape(kv_shape), grad_v_XSH.reshape(kv_shape)
  return grad_q_XRH.reshape(grad_BKGTH.shape), grad_k_BKSH, grad_v_BKSH, None


mix.defvjp(mix_forward, mix_backward)


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
    if cache is None and not self.is_mutable_collection("intermediates"):
      out_BTNH = attend_blocked(q_BTNH, k_BSKH, v_BSKH, mask_BTS)
    else:
      k_BSKH, v_BSKH = k_BSKH.astype(self.dtype), v_BSKH.astype(self.dtype)
      out_BTNH, weights_BNTS = attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS)
      self.sow("intermediates", "weights_BNTS", weights_BNTS)  # for whoever looks
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
  write = lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at, 0, 0))
  return jax.vmap(write)(cache_BSKH, new_BTKH.astype(cache_BSKH.dtype), first_slots_B)
