# SPDX-License-Identifier: Apache-2.0
"""Multi-head attention (Vaswani et al., 2017, section 3.2), multi-query and grouped
(Shazeer, 2019; Ainslie et al., 2023).

`attend` is the reference, and the only form that returns the attention weights. The kernels
in nn/kernels/ compute the same values. nn/masks.py decides which query sees which key.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxlm.config import ResolvedModel
from flaxlm.nn.execution import Execution
from flaxlm.nn.kernels.blocked import attend_blocked
from flaxlm.nn.kernels.cached import attend_cached
from flaxlm.nn.kernels.cudnn import attend_cudnn
from flaxlm.nn.kernels.outline import OUTLINE, attend_outline
from flaxlm.nn.kernels.paths import offsets_obstacle, prompt_path, rows_path
from flaxlm.nn.kernels.tiled import attend_tiled
from flaxlm.nn.layers import Einsum, residual_scale
from flaxlm.nn.masks import LOWEST, CosSin, Scoring, Sight
from flaxlm.nn.positions import rotate
from flaxlm.nn.quantized import widened
from flaxlm.sharding import axis_sizes_in_use, constrain


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  sight: Sight,
  scoring: Scoring,
  sinks_N: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """softmax(scale q k^T + bias) v for each head, the softmax in float32: the reference.

  Returns the mixed values (B, T, N, H) and the weights (B, N, T, S); query head n reads
  kv head n // G. `sinks_N` holds each head's logit of one extra key that has no value, so
  that the weights may add up to less than 1 (gpt-oss).
  """
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  q_BTKGH = (q_BTNH * scoring.scale).reshape(B, T, K, N // K, H)
  scores = jnp.einsum(
    "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
  )
  if scoring.softcap is not None:
    scores = scoring.softcap * jnp.tanh(scores / scoring.softcap)
  if sight.bias_XNTS is not None:
    scores += sight.bias_XNTS.reshape(-1, K, N // K, T, S)
  if sight.mask_BTS is not None:
    scores = jnp.where(sight.mask_BTS[:, None, None], scores, LOWEST)
  if sinks_N is not None:
    sinks = jnp.broadcast_to(sinks_N.reshape(K, N // K, 1, 1), (B, K, N // K, T, 1))
    scores = jnp.concatenate([scores, sinks.astype(jnp.float32)], -1)
  weights_BKGTS = jax.nn.softmax(scores, -1)[..., :S]
  out = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS.astype(v_BSKH.dtype), v_BSKH)
  return out.reshape(B, T, N, H), weights_BKGTS.reshape(B, N, T, S)


class Attention(nn.Module):
  """Self-attention or cross-attention with N query heads and K key/value heads."""

  cfg: ResolvedModel
  execution: Execution

  def setup(self):
    cfg = self.cfg
    D, N, K, H = cfg.width, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    shared = self.execution.projections
    heads, kv_heads = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
    biased = cfg.qkv_biased
    self.q = Einsum("BTD,DNH->BTNH", (D, N, H), heads, biased=biased, **shared)
    self.k = Einsum("BSD,DKH->BSKH", (D, K, H), kv_heads, biased=biased, **shared)
    self.v = Einsum("BSD,DKH->BSKH", (D, K, H), kv_heads, biased=biased, **shared)
    self.o = Einsum(
      "BTNH,NHD->BTD",
      (N, H, D),
      ("heads", "head_dim", "embed"),
      biased=cfg.o_biased,
      init_scale=residual_scale(cfg.depth),
      **shared,
    )
    if cfg.qk_norm != "none":
      whole = cfg.qk_norm == "width"
      self.q_norm = HeadNorm(cfg.norm_epsilon, (N, H), "heads", whole)
      self.k_norm = HeadNorm(cfg.norm_epsilon, (K, H), "kv_heads", whole)
    if cfg.learned_sinks:
      zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("heads",))
      self.sinks = self.param("sinks", zeros, (N,), jnp.float32)

  def keys_values(
    self, x_BSD: jax.Array, cos_sin: CosSin | None = None
  ) -> tuple[jax.Array, jax.Array]:
    """Keys and values (B, S, K, H) of the sequence that is attended to."""
    k_BSKH, v_BSKH = self.k(x_BSD), self.v(x_BSD)
    if self.cfg.qk_norm != "none":
      k_BSKH = self.k_norm(k_BSKH)
    if cos_sin is not None:
      k_BSKH = rotate(k_BSKH, cos_sin)
    names = ("batch", "key_length", "act_kv_heads", "head_dim")
    return constrain(k_BSKH, *names), constrain(v_BSKH, *names)

  def queries(self, x_BTD: jax.Array, cos_sin: CosSin | None = None) -> jax.Array:
    """Queries (B, T, N, H)."""
    q_BTNH = self.q(x_BTD)
    if self.cfg.qk_norm != "none":
      q_BTNH = self.q_norm(q_BTNH)
    if cos_sin is not None:
      q_BTNH = rotate(q_BTNH, cos_sin)
    return constrain(q_BTNH, "batch", "length", "act_heads", "head_dim")

  def __call__(
    self,
    x_BTD: jax.Array,
    sight: Sight,
    keys_values: tuple[Any, Any],
    cached: bool = False,
    capture: bool = False,
  ) -> tuple[jax.Array, jax.Array | None]:
    """The output (B, T, D) and, if `capture`, the weights (B, N, T, S).

    Keys and values are (B, S, K, H) or, `cached`, (B, K, S, H).
    """
    q_BTNH = self.queries(x_BTD, sight.cos_sin)
    sinks_N = self.sinks if self.cfg.learned_sinks else None
    k, v = (widened(x, self.execution.dtype) for x in keys_values)
    mixing = (sight, Scoring(self.cfg.attention_scale, self.cfg.attention_softcap))
    path, weights_BNTS = self.path(q_BTNH, k, cached, capture), None
    if cached and path != "cached":  # all other functions take (B, S, K, H)
      k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    match path:
      case "captured":
        out_BTNH, weights_BNTS = attend(q_BTNH, k, v, *mixing, sinks_N)
      case "cached":
        out_BTNH = attend_cached(q_BTNH, k, v, *mixing, sinks_N)
      case "cudnn":
        out_BTNH = self.attend_cudnn(q_BTNH, k, v, *mixing)
      case "splash":
        # Imported where it runs: Pallas takes 0.4 s, at every start on a machine without.
        from flaxlm.nn.kernels.splash import attend_splash

        interpreted = self.execution.kernel.interpreted
        out_BTNH = attend_splash(q_BTNH, k, v, *mixing, sinks_N, interpreted)
      case "tiled":
        out_BTNH = attend_tiled(q_BTNH, k, v, *mixing)
      case "outline":
        out_BTNH = attend_outline(q_BTNH, k, v, self.execution.kernel.lanes)
      case "blocked":
        out_BTNH = attend_blocked(q_BTNH, k, v, *mixing, sinks_N)
    return self.o(out_BTNH), weights_BNTS

  def attend_cudnn(
    self, q: jax.Array, k: jax.Array, v: jax.Array, sight: Sight, scoring: Scoring
  ) -> jax.Array:
    """By cuDNN's kernel: packed documents by their offsets where it can."""
    if offsets_obstacle(self.cfg, self.execution) is None:
      # Imported where it runs: it needs a private module of jax.
      from flaxlm.nn.kernels.cudnn_packed import Form, attend_packed, packed_segments

      segments_BT = packed_segments(sight.pattern)
      if segments_BT is not None:
        form = Form(sight.reach is not None, scoring.scale)
        return attend_packed(q, k, v, segments_BT, form)
    return attend_cudnn(q, k, v, sight, scoring)

  def path(self, q_BTNH: jax.Array, k: jax.Array, cached: bool, capture: bool) -> str:
    """Which of the functions above computes attention for these arguments."""
    if capture:
      return "captured"
    if cached:
      return prompt_path(self.cfg, self.execution, q_BTNH.shape[1], k.shape[2]).name
    if self.execution.attention == OUTLINE:
      return OUTLINE
    if self.is_initializing():
      return "blocked"
    lengths = (q_BTNH.shape[1], k.shape[1])
    return rows_path(self.cfg, self.execution, axis_sizes_in_use(), lengths).name


class HeadNorm(nn.Module):
  """RMSNorm of queries or keys, over each head separately or over all heads together.

  Per head: Dehghani et al. (2023), section 2; over the whole width: OLMo 2.
  """

  epsilon: float
  shape: tuple[int, int]
  heads_name: str
  over_width: bool

  @nn.compact
  def __call__(self, x_BTNH: jax.Array) -> jax.Array:
    names = (self.heads_name, "head_dim") if self.over_width else ("head_dim",)
    ones = nn.with_logical_partitioning(nn.initializers.ones, names)
    scale = self.param("scale", ones, self.shape[-len(names) :], jnp.float32)
    x = x_BTNH.astype(jnp.float32)
    dims = (-2, -1) if self.over_width else -1
    x *= jax.lax.rsqrt(jnp.mean(x * x, dims, keepdims=True) + self.epsilon)
    return (x * scale).astype(x_BTNH.dtype)
